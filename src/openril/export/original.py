"""The checkpoint of an export in float32, with the questions and answers that its export is compared on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from openril.data.reading import read_questions
from openril.export.fidelity import Original
from openril.export.folder import identity, record
from openril.export.request import ExportRequest
from openril.models.loading import load_model, load_processor
from openril.models.prompts import PromptEncoder


def load_original(request: ExportRequest) -> Original:
    """Load the checkpoint and let it answer ``request.questions`` questions, spread over data.validation."""
    assert request.recipe is not None
    data, student = request.recipe.data, request.recipe.student
    model: Any = load_model(request.checkpoint, what="CHECKPOINT")
    limits = student.min_pixels, student.max_pixels
    encoder = PromptEncoder(
        load_processor(request.checkpoint, what="CHECKPOINT", min_pixels=limits[0], max_pixels=limits[1]),
        model,
        system_prompt=student.system_prompt,
        max_prompt_length=data.max_prompt_length,
        max_image_pixels=data.max_image_pixels,
        allow_urls=data.allow_urls,
    )
    questions = read_questions(data, "validation")
    count = min(request.questions, len(questions))
    chosen = [questions[i * len(questions) // count] for i in range(count)]
    made_from = {k: v for k, v in identity(request).items() if k in ("weights", "settings")}
    key = [made_from, limits, student.system_prompt, request.recipe.eval.max_completion_length]
    key.append([q.content_hash() for q in chosen])
    return Original(
        model, encoder, request.recipe, chosen, mark="", resize=None, folder=request.out, key=json.dumps(key)
    )


def conclude(
    request: ExportRequest, original: Original, kls: Sequence[float], limit: float | None, **others: Any
) -> bool:
    """Record and show the result of a check, and return whether it passed.

    Args:
        kls: KL(original || export) before each token of the original's answers, in nats.
        limit: The largest mean that passes, or None for any.
        others: More figures; ``other_prompts`` counts prompts with other tokens, none of which may be.
    """
    mean = fmean(kls)
    passed = (limit is None or mean <= limit) and not others.get("other_prompts")
    figures: dict[str, Any] = {
        "questions": len(original.questions),
        "too_long": original.too_long,
        "positions": len(kls),
    }
    figures |= {"kl_mean": mean, "kl_max": max(kls), "kl_limit": limit, **others}
    record(request.out, check={"passed": passed, **figures})
    request.say(f"check {'passed' if passed else 'FAILED'}: {', '.join(f'{k} {v}' for k, v in figures.items())}")
    return passed
