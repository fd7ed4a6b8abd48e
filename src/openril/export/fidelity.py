"""Compare an export in its runtime with the original: prompt lengths, next-token distributions, answers, speed, memory.

The criterion is the KL divergence of the next-token distributions along the original's whole answer. A score over a
hundred questions hardly moves where the divergence is already large, and whether greedy answers agree depends on how
sure the model is, so both are only reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openril.errors import PromptTooLongError
from openril.evaluation.evaluate import GREEDY
from openril.evaluation.summary import Row, build_evaluation, compare
from openril.evaluation.table import difference, percent
from openril.export.request import ExportError
from openril.export.runtime import MARKER, Runtime, kl_divergence, runtime_version
from openril.models.prompts import Prompt, PromptEncoder, question_messages
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.rewards.answers import score_answers
from openril.sampling.transformers_engine import TransformersSampler
from openril.storage import append_jsonl, read_jsonl, write_jsonl

LIMITS = {"f16": 1e-4, "q8_0": 1e-2}
"""Type -> the largest mean KL that passes, in nats. Other types are held to --max-kl."""


class Original:
    """The checkpoint in float32, its questions and its greedy answers.

    Args:
        mark: What stands for an image in a rendered chat.
        resize: Returns the size in which an image is sent to the runtime; None sends it as it is.
        folder: Where answers are kept, so that a killed check continues.
        key: What the answers depend on.
    """

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        recipe: Recipe,
        questions: Sequence[Question],
        *,
        mark: str,
        resize: Callable[[int, int], tuple[int, int]] | None,
        folder: Path,
        key: str,
    ) -> None:
        self.model, self.encoder, self.recipe, self.mark, self.resize = model, encoder, recipe, mark, resize
        self.prompts: dict[str, Prompt] = {}
        self.questions: list[Question] = []
        for question in questions:
            try:
                self.prompts[question.id] = encoder(question)
                self.questions.append(question)
            except PromptTooLongError:
                continue
        self.too_long = len(questions) - len(self.questions)
        if not self.questions:
            raise ExportError("data.validation: expected questions below data.max_prompt_length tokens, got none.")
        self.answers = {row["id"]: row for row in _journal(folder / "check-original.jsonl", key)}
        todo = [q for q in self.questions if q.id not in self.answers]
        size, longest = recipe.eval.questions_per_batch, recipe.eval.max_completion_length
        sampler = TransformersSampler(model, encoder, questions_per_batch=size)
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            drawn = sampler.sample(batch, 1, settings=GREEDY, max_completion_length=longest, seed=0)
            rows = [{"id": r.question_id, "ids": list(r.token_ids or ()), "text": r.text} for [r] in drawn]
            append_jsonl(folder / "check-original.jsonl", *rows)
            self.answers |= {row["id"]: row for row in rows}
        self.context = max(self.prompts[q.id].length + longest for q in self.questions) + 64

    def text(self, question: Question) -> str:
        """Return the exact prompt, with the runtime's marker for each image."""
        rendered = self.encoder.render(self.messages(question))
        if rendered.count(self.mark) != len(question.images):
            raise ExportError(
                f"question {question.id}: expected {self.mark} in the prompt for each image, got {rendered[:200]!r}"
            )
        return rendered.replace(self.mark, MARKER)

    def messages(self, question: Question) -> list[dict[str, Any]]:
        return question_messages(question, self.encoder.system_prompt, self.encoder.clean)

    def images(self, question: Question) -> list[Image.Image]:
        """Return the images as the runtime gets them."""
        images = [image.convert("RGB") for image in self.encoder.load_images(question)]
        resize = self.resize
        return [i.resize(resize(*i.size), Image.Resampling.BICUBIC) for i in images] if resize else images

    def scores(self, texts: Sequence[str]) -> list[Row]:
        """Score one text for each question by the rules of data.validation."""
        items = list(zip(self.questions, texts, strict=True))
        scored = score_answers(items, "rules", self.recipe.eval.rule)
        return [
            Row(q.id, q.question, q.answer, text, score=s.score, parsed=s.parsed)
            for (q, text), s in zip(items, scored, strict=True)
        ]


@torch.inference_mode()
def answer_logprobs(model: Any, prompt: Prompt, ids: Sequence[int]) -> Tensor:
    """Return the log-probabilities before each token of an answer, float32 [T, V] on the CPU."""
    device = next(model.parameters()).device
    answer = torch.tensor(ids[:-1], dtype=torch.long)
    later = (prompt.next_position + torch.arange(len(answer))).expand(prompt.position_ids.shape[0], -1)
    positions = torch.cat([prompt.position_ids, later], dim=1)
    inputs = dict(prompt.vision)
    if prompt.token_types is not None:
        types = torch.cat([prompt.token_types, prompt.token_types.new_zeros(len(answer))])
        inputs[prompt.token_type_key] = types[None]
    inputs["input_ids"] = torch.cat([prompt.input_ids, answer])[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["position_ids"] = positions[:, None] if positions.shape[0] > 1 else positions
    output = model(**{k: v.to(device) for k, v in inputs.items()}, logits_to_keep=len(ids))
    return torch.log_softmax(output.logits[0].float(), dim=-1).cpu()


def divergences(runtime: Runtime, encoder: PromptEncoder, text: str, images: Sequence[Image.Image],
                ids: Sequence[int], logprobs: Tensor) -> list[float]:  # fmt: skip
    """Return KL(original || export) before each token of the original's answer, teacher-forced, in nats.

    The runtime returns no distribution for a token in the middle of a character of several bytes, so there is none here.
    """
    ended = ids[-1] in encoder.eos_token_ids
    forced = list(ids[:-1] if ended else ids)
    # An empty grammar would force nothing, so an answer that ends at once is left free.
    found = runtime.complete(text, images, len(ids), forced=forced, vocab_size=logprobs.shape[1]).logprobs
    decode = encoder.tokenizer.decode
    whole = [i for i in range(len(ids)) if not decode(list(ids[: i + 1])).endswith("\ufffd")]
    if len(found) != len(whole):
        raise ExportError(f"the runtime: expected {len(whole)} distributions, got {len(found)}")
    return [kl_divergence(logprobs[i], *row) for i, row in zip(whole, found, strict=True)]


def check_type(original: Original, runtime: Runtime, kind: str, journal: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each question. Questions of the journal are not asked again."""
    known = {row["id"]: row for row in _journal(journal, key)}
    for question in original.questions:
        if question.id not in known:
            prompt, ids = original.prompts[question.id], original.answers[question.id]["ids"]
            text, images = original.text(question), original.images(question)
            reply = runtime.complete(text, images, original.recipe.eval.max_completion_length)
            memory = runtime.peak_memory()  # before distributions are asked for, which need memory themselves
            row: dict[str, Any] = {
                "id": question.id,
                "text": reply.text,
                "prompt_tokens": [prompt.length, reply.prompt_tokens],
                "kl": [],
            }
            if reply.prompt_tokens == prompt.length:
                logprobs = answer_logprobs(original.model, prompt, ids)
                row["kl"] = divergences(runtime, original.encoder, text, images, ids, logprobs)
            row |= {"first_token_seconds": reply.first_token_seconds, "tokens_per_second": reply.tokens_per_second}
            row |= {"peak_memory": memory, "load": os.getloadavg()[0]}
            append_jsonl(journal, row)
            known[question.id] = row
        yield known[question.id]


def summarize_type(
    original: Original, kind: str, rows: Sequence[dict[str, Any]], *, size: int, threads: int, max_kl: float | None
) -> dict[str, Any]:
    """Return the figures of one type. ``passed`` says whether it answers like the original, and ``why`` if not."""
    kls = [kl for row in rows for kl in row["kl"]]
    unequal = [row for row in rows if len(set(row["prompt_tokens"])) > 1]
    before = original.scores([original.answers[q.id]["text"] for q in original.questions])
    then = build_evaluation("original", "", before)
    now = build_evaluation(kind, "", original.scores([row["text"] for row in rows]))
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"]]
    limit = LIMITS.get(kind, max_kl)
    mean = fmean(kls) if kls else None
    why = ""
    if unequal:
        first = unequal[0]
        why = (
            f"{len(unequal)} of {len(rows)} prompts have other lengths in the runtime (question {first['id']}:"
            f" expected {first['prompt_tokens'][0]} tokens, got {first['prompt_tokens'][1]})"
        )
    elif mean is None or (limit is not None and not mean <= limit):
        why = f"expected a mean KL of at most {limit:g}, got {mean if mean is None else f'{mean:.2g}'}"
    return {
        "type": kind,
        "passed": not why,
        "why": why,
        "questions": len(rows),
        "too_long": original.too_long,
        "unequal_prompts": len(unequal),
        "positions": len(kls),
        "kl_mean": mean,
        "kl_max": max(kls, default=None),
        "kl_limit": limit,
        "same_answers": sum(a.text.strip() == b.text.strip() for a, b in zip(before, now.rows, strict=True))
        / len(rows),
        "score": asdict(now.summary),
        "original_score": asdict(then.summary),
        "difference": asdict(compare(then, now)),
        "shown": [percent(s.score, s.standard_error) for s in (then.summary, now.summary)]
        + [difference(compare(then, now))],
        "bytes": size,
        "first_token_seconds": median(row["first_token_seconds"] for row in rows),
        "tokens_per_second": median(speeds) if speeds else None,
        "memory": rows[0]["peak_memory"],
        "peak_memory": max(row["peak_memory"] or 0 for row in rows) or None,
        "threads": threads,
        "load": fmean(row["load"] for row in rows),
        "cores": os.cpu_count(),
        "runtime": f"xllamacpp {runtime_version()}",
    }


def markdown_table(types: Sequence[dict[str, Any]]) -> str:
    """Return the figures of several types as a Markdown table with a line about the machine."""
    head = ["type", "passed", "MB", "mean KL", "max KL", "same answers", "score (original)", "difference",
            "first token, ms", "tokens/s", "memory MB (peak)"]  # fmt: skip
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for t in types:
        then, now, gain = t["shown"]
        kl = ["-" if t[k] is None else f"{t[k]:.2g}" for k in ("kl_mean", "kl_max")]
        speed = "-" if t["tokens_per_second"] is None else f"{t['tokens_per_second']:.0f}"
        memory = "-" if t["memory"] is None else f"{t['memory'] / 1e6:.0f} ({t['peak_memory'] / 1e6:.0f})"
        lines.append([t["type"], "yes" if t["passed"] else "no", f"{t['bytes'] / 1e6:.2f}", *kl,
                      f"{100 * t['same_answers']:.0f}%", f"{now} ({then})", gain,
                      f"{1000 * t['first_token_seconds']:.0f}", speed, memory])  # fmt: skip
    first = types[0]
    load = max(t["load"] for t in types)
    busy = f"; **the machine was busy** (load {load:.1f}), so the speeds are too low" if load > first["cores"] else ""
    note = (
        f"{first['questions']} questions, {first['runtime']}, {first['threads']} of {first['cores']} cores in use{busy}."
        " Scores are percentages ± standard error; the difference is paired."
    )
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", note, ""])


def _journal(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the rows of a journal, which is started again if it was made for something else."""
    rows = read_jsonl(path)
    if not rows or rows[0].get("key") != key:
        write_jsonl(path, [{"key": key}])
        return []
    return [row for row in rows[1:] if "id" in row]
