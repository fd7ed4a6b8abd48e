"""Which questions fit ``data.max_prompt_length``: every stage leaves out and lists the same others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from openril.data.images import image_size
from openril.data.preflight import REFUSALS, Size, refusal
from openril.data.sanitize import special_tokens, strip_special
from openril.errors import DataError, ModelError
from openril.models.loading import load_processor
from openril.models.prompts import process, question_messages
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.storage import append_jsonl, read_jsonl, stable_hash, write_json, write_jsonl


class LeftOut:
    """The rows of one stage in ``run_dir/left_out.jsonl``: questions that are too long for it."""

    def __init__(self, recipe: Recipe, stage: str) -> None:
        self.path = recipe.run_path / "left_out.jsonl"
        self.stage = stage
        self.limit = recipe.data.max_prompt_length
        self._listed: set[tuple[Any, ...]] | None = None

    def add(self, question: Question, tokens: int, **more: Any) -> None:
        """List a question once. tokens: those of its prompt. more: further columns."""
        if self._listed is None:
            self._listed = set(self.rows())
        row = {"stage": self.stage, "question_id": question.id, "origin": question.origin, "tokens": tokens}
        row |= {"limit": self.limit, **more}
        if (key := _key(row)) not in self._listed:
            self._listed.add(key)
            append_jsonl(self.path, row)

    def rows(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return this stage's rows under the present limit, each once, in the order in which they were found."""
        rows = (row for row in read_jsonl(self.path) if row.get("stage") == self.stage)
        return {_key(row): row for row in rows if row["limit"] == self.limit}

    def clear(self) -> None:
        """Remove this stage's examples, which have a source: it begins again."""
        if self.path.exists():
            kept = [row for row in read_jsonl(self.path) if row.get("stage") != self.stage or "source" not in row]
            write_jsonl(self.path, kept)
        self._listed = None


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["question_id"], row["limit"], row.get("source"), row.get("index")


def fitting_questions(
    recipe: Recipe,
    questions: Sequence[Question],
    stage: str,
    warn: Callable[[str], None] = lambda message: None,
    *,
    gather: Callable[[list[Any]], list[Any]] = lambda values: values,
    process_index: int = 0,
    num_processes: int = 1,
) -> list[Question]:
    """Return the questions whose prompts fit, and list the others, before a stage spends hours on them.

    Lengths are computed from the sizes of the images. The result is kept in ``run_dir/prompt_lengths.json`` for the next
    stage with the same questions.

    Args:
        stage: The name in the list.
        gather: Returns the values of all processes in a list. Every process counts its share.
        process_index: The process 0 writes.
    """
    limit, student = recipe.data.max_prompt_length, recipe.student
    path = recipe.run_path / "prompt_lengths.json"
    contents = [[q.id, q.question, q.choices, [i.name for i in q.images]] for q in questions]
    settings = [limit, student.model, student.system_prompt, student.min_pixels, student.max_pixels]
    key = f"{stable_hash(settings, contents):016x}"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if saved.get("key") == key:
        too_long: dict[str, int] = saved["too_long"]
    else:
        trained = recipe.sft_student_path
        processor = load_processor(
            str(trained) if trained.is_dir() else student.model,
            revision=None if trained.is_dir() else student.revision,
            trust_remote_code=student.trust_remote_code,
            min_pixels=student.min_pixels,
            max_pixels=student.max_pixels,
        )
        count = TokenCounter(processor, student.system_prompt)
        mine, refused = {}, []
        for q in questions[process_index % num_processes :: num_processes]:
            sizes = [image_size(i, recipe.data.max_image_pixels, recipe.data.allow_urls) for i in q.images]
            # The rule for image tokens is compared with the processor on a few sizes only, so it decides no close case.
            try:
                tokens, _ = count(q, sizes, exact_above=limit * 9 // 10)
            except REFUSALS as e:
                refused.append(f"{q.origin} ({q.id}): {refusal(q, sizes, e)}.")
                continue
            if tokens > limit:
                mine[q.id] = tokens
        if refused := [cause for part in gather([refused]) for cause in part]:
            more = f"\n... and {len(refused) - 8} more; `ril check` lists them all" if len(refused) > 8 else ""
            raise DataError("\n".join(refused[:8]) + more)
        too_long = {id: tokens for part in gather([mine]) for id, tokens in part.items()}
        if process_index == 0:
            write_json(path, {"key": key, "questions": len(questions), "limit": limit, "too_long": too_long})
    if too_long and process_index == 0:
        left_out = LeftOut(recipe, stage)
        for q in questions:
            if q.id in too_long:
                left_out.add(q, too_long[q.id])
        warn(
            f"{stage}: {len(too_long)} of {len(questions)} questions have more than data.max_prompt_length ({limit}) tokens"
            f" and are left out; {left_out.path} lists them"
        )
    return [q for q in questions if q.id not in too_long]


class TokenCounter:
    """Compute prompt lengths without opening images, by the processor's own rule for the number of image tokens.

    The rule is compared with real calls of the processor on the first few image sizes. Where they differ, or where the
    processor has no rule, every distinct size is measured by a real call on a blank image. Raises ModelError if there is
    no chat template.
    """

    _COMPARED = 3

    def __init__(self, processor: Any, system_prompt: str = "") -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if getattr(processor, "chat_template", None) is None and getattr(self.tokenizer, "chat_template", None) is None:
            raise ModelError("student: the checkpoint has no chat template. Add chat_template.jinja to its folder.")
        self.template = processor if getattr(processor, "chat_template", None) else self.tokenizer
        self.system_prompt = system_prompt
        self.special = special_tokens(self.tokenizer)
        self.exact_rule: bool | None = True if hasattr(processor, "_get_num_multimodal_tokens") else None
        self.compared: set[tuple[Size, ...]] = set()
        self.measured: dict[tuple[Size, ...], int] = {}

    def __call__(self, question: Question, sizes: Sequence[Size], exact_above: int | None = None) -> tuple[int, int]:
        """Return (prompt tokens, image tokens) of a question whose images have these (width, height).

        Args:
            exact_above: Where the rule gives more tokens than this, the processor is called instead.
        """
        messages = question_messages(question, self.system_prompt, lambda t: strip_special(t, self.special))
        text = self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        length = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not sizes:
            return length, 0
        key = tuple(sizes)
        if self.exact_rule:
            image = self._by_rule(key)
            if exact_above is not None and length - len(sizes) + image > exact_above:
                tokens = self._measure(text, key)
                return tokens, tokens - length + len(sizes)
            if key in self.compared or len(self.compared) >= self._COMPARED:
                return length - len(sizes) + image, image
            self.compared.add(key)
            if self._measure(text, key) == length - len(sizes) + image:
                return length - len(sizes) + image, image
            self.exact_rule = False
        if key not in self.measured:
            self.measured[key] = self._measure(text, key) - length + len(sizes)
        image = self.measured[key]
        return length - len(sizes) + image, image

    def _by_rule(self, sizes: tuple[Size, ...]) -> int:
        counts = self.processor._get_num_multimodal_tokens(image_sizes=[(h, w) for w, h in sizes])
        return int(sum(counts.num_image_tokens))

    def _measure(self, text: str, sizes: tuple[Size, ...]) -> int:
        blank = [Image.new("RGB", size) for size in sizes]
        return int(process(self.processor, text, blank)["input_ids"].shape[1])
