"""Measure the models on held-out questions by the exact rule: greedy, sampled, and with a derivation forced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openril.hf import DynamicCache
from openril.models.loading import load_model, load_processor
from openril.rewards import rules
from playground.models.examples import ExampleEncoder, Styles, as_question, image_features, row_positions, styles_of
from playground.world import SkillQuestion, style_of
from playground.world.skills import ALL_SKILLS as SKILLS

MAX_NEW_TOKENS = 96


@torch.inference_mode()
def write(
    model: Any,
    encoder: ExampleEncoder,
    questions: Sequence[SkillQuestion],
    beginnings: Sequence[str] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 160,
) -> list[str]:
    """Generate one response to each question.

    Args:
        beginnings: The first words of each response.
        temperature: 0 for greedy decoding; otherwise tokens are sampled with top-p 1.0.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [encoder.prompt(as_question(q)) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i][0]))
    out = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        begun = [
            encoder.prompt_encoder.tokenizer(beginnings[i] if beginnings else "", add_special_tokens=False)["input_ids"]
            for i in members
        ]
        rows = [prompts[i][0] + ids for i, ids in zip(members, begun, strict=True)]
        longest = max(map(len, rows))
        padding = torch.tensor([longest - len(row) for row in rows])
        ids = torch.tensor([[encoder.prompt_encoder.pad_token_id] * (longest - len(row)) + row for row in rows])
        mask = (torch.arange(longest)[None] >= padding[:, None]).long()
        channels = len(prompts[members[0]][1].position_ids)
        positions = torch.zeros((channels, len(rows), longest), dtype=torch.long)
        for r, (i, row) in enumerate(zip(members, rows, strict=True)):
            positions[:, r, longest - len(row) :] = row_positions(prompts[i][1], len(row))
        pictures = encoder.pictures([scene for i in members for scene in questions[i].scenes])
        features: Any = image_features(model, pictures)
        cache = DynamicCache()
        running = torch.ones(len(rows), dtype=torch.bool)
        written: list[Tensor] = []
        for _ in range(MAX_NEW_TOKENS):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions if channels > 1 else positions[0],
                mm_encoder_outputs=features, past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            features = None
            token = _draw(logits, temperature, generator)
            written.append(torch.where(running, token, encoder.prompt_encoder.eos_token_ids[0]))
            running &= token != encoder.prompt_encoder.eos_token_ids[0]
            if not running.any():
                break
            ids, positions = token[:, None], positions[:, :, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        for r, i in enumerate(members):
            out[i] = encoder.prompt_encoder.decode([*begun[r], *(int(t[r]) for t in written)])
    return out


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def by_skill(questions: Sequence[SkillQuestion], values: Sequence[float]) -> dict[str, float]:
    """Return the mean of each skill, and the mean over skills under "mean"."""
    found: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        found.setdefault(question.skill, []).append(value)
    means = {skill: sum(found[skill]) / len(found[skill]) for skill in SKILLS if skill in found}
    return {**means, "mean": sum(means.values()) / len(means)}


def right(questions: Sequence[SkillQuestion], responses: Sequence[str]) -> list[float]:
    """Return 1.0 for each response that is right by the exact rule, and 0.0 for the others."""
    return [float(rules.score(q.rule, as_question(q), r) == 1.0) for q, r in zip(questions, responses, strict=True)]


def first_word(question: SkillQuestion, style: Any) -> str:
    """Return the first word of a derivation in a style, with which no direct answer begins."""
    return question.derivations[style].split()[0]


def measure(
    model: Any, encoder: ExampleEncoder, questions: Sequence[SkillQuestion], styles: Styles | None = None
) -> dict[str, dict[str, float]]:
    """Measure a model by skill.

    Args:
        styles: Styles of a student's derivations. None for a teacher, of which only two values are measured.

    Returns:
        greedy: right greedy responses. sampled: right samples at temperature 1. forced: right greedy responses that begin
        with a derivation in the first style of the skill. derives: derivations of any style among the samples.
    """
    samples = write(model, encoder, questions, temperature=1.0)
    measured = {"greedy": right(questions, write(model, encoder, questions))}
    if styles is not None:
        beginnings = [first_word(q, styles_of(styles, q.skill)[0]) for q in questions]
        measured["forced"] = right(questions, write(model, encoder, questions, beginnings))
    measured["sampled"] = right(questions, samples)
    if styles is not None:
        measured["derives"] = [float(style_of(text) is not None) for text in samples]
    return {name: by_skill(questions, values) for name, values in measured.items()}


def load(folder: Path) -> tuple[Any, ExampleEncoder]:
    """Load a model in float32, and an encoder for it."""
    model, processor = load_model(str(folder), what="playground"), load_processor(str(folder), what="playground")
    return model, ExampleEncoder(model, processor)


def print_table(results: dict[str, dict[str, dict[str, float]]], number: int) -> None:
    """Print right answers in per cent, with skills as rows and models as columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Right by the exact rule, per cent, on {number} held-out questions")
    table.add_column("skill")
    columns = [(name, what) for name, found in results.items() for what in found]
    for name, what in columns:
        table.add_column(f"{name}\n{what}", justify="right")
    for skill in [*SKILLS, "mean"]:
        values = [results[name][what].get(skill) for name, what in columns]
        table.add_row(skill, *("" if v is None else f"{100 * v:.0f}" for v in values), end_section=skill == "everyday")
    Console(width=max(100, 18 + 24 * len(columns))).print(table)
