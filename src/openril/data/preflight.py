"""Check all data once before a run: every row, every image and the length of every prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from openril.data.choices import index_of
from openril.data.formats import COMPUTED
from openril.data.images import appearance, frame_count, load_image, read_bytes
from openril.data.reading import RowProblem, read_questions
from openril.data.row_checks import row_warnings, set_problems
from openril.data.unread import unread_warnings
from openril.errors import DataError
from openril.recipe.checks import ANSWER_RULES
from openril.recipe.schema import DataConfig
from openril.records import ImageSource, Question

if TYPE_CHECKING:
    from rich.console import Console

Size = tuple[int, int]
"""(width, height) in pixels."""

Opened = tuple[Size, str, str] | str
"""Size, digest of the pixels, and why the picture may show nothing ("" if it does not); or why it cannot be used."""

CountTokens = Callable[[Question, Sequence[Size]], tuple[int, int]]
"""(question, sizes of its images) -> (prompt tokens including image tokens, image tokens)."""

REFUSALS = (ValueError, TypeError, RuntimeError, ZeroDivisionError)
"""What processors raise for an image that they cannot use."""

_BATCH = 256
_SHOWN = 20
_COLUMNS = 40
_IMAGE_KINDS = {
    "does not exist": "missing image",
    "gray values": "gray values",
    "bomb": "decompression bomb",
    "on the network": "image on the network",
    "cannot be fetched": "missing image",
    "the server answered": "missing image",
}
"""Words in the message of an unusable image -> kind of the problem."""


@dataclass
class Quantiles:
    """Distribution of a count over the questions; all 0 if there are none."""

    smallest: float = 0
    median: float = 0
    p95: float = 0
    largest: float = 0
    total: float = 0

    @staticmethod
    def of(values: Iterable[float]) -> Quantiles:
        ordered = sorted(values)
        if not ordered:
            return Quantiles()

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

        return Quantiles(ordered[0], at(0.5), at(0.95), ordered[-1], sum(ordered))


@dataclass
class Report:
    """Result of a check of ``data.train`` or ``data.validation``.

    num_questions: questions that can be read. num_usable: those without an error that are not too long. problems: errors
    and warnings in the order of the data. prompt_tokens, image_tokens: None without a processor to count with.
    columns_read, columns_kept: what columns are read as ("options as choices"), and those that are only metadata, with
    their numbers of rows.
    """

    which: str
    num_questions: int = 0
    num_usable: int = 0
    num_images: int = 0
    num_text_only: int = 0
    num_stripped: int = 0
    dropped_turns: int = 0
    dropped_images: int = 0
    num_system: int = 0
    num_several_answers: int = 0
    columns_read: dict[str, int] = field(default_factory=dict)
    columns_kept: dict[str, int] = field(default_factory=dict)
    prompt_tokens: Quantiles | None = None
    image_tokens: Quantiles | None = None
    answer_chars: Quantiles = field(default_factory=Quantiles)
    image_pixels: Quantiles = field(default_factory=Quantiles)
    problems: list[RowProblem] = field(default_factory=list)

    @property
    def errors(self) -> list[RowProblem]:
        return [p for p in self.problems if p.level == "error"]

    @property
    def warnings(self) -> list[RowProblem]:
        return [p for p in self.problems if p.level == "warning"]

    def counts(self) -> dict[str, int]:
        """Return the number of problems of each kind, the most frequent first."""
        return dict(Counter(p.kind for p in self.problems).most_common())

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "counts": self.counts()}

    def print(self, console: Console, shown: int = _SHOWN) -> None:
        """Print counts and lengths, then at most ``shown`` problems."""
        from rich.markup import escape
        from rich.table import Table

        console.print(
            f"[bold]data.{self.which}[/bold]: {self.num_questions:,} questions, {self.num_usable:,} usable; "
            f"{self.num_images:,} images, {self.num_text_only:,} questions without one"
        )
        table = Table("", "smallest", "median", "95%", "largest", box=None, pad_edge=False, header_style="dim")
        lengths = {"prompt tokens": self.prompt_tokens, "of them image": self.image_tokens}
        lengths |= {"answer characters": self.answer_chars, "image pixels": self.image_pixels}
        for name, q in lengths.items():
            if q is not None:
                table.add_row(name, *(f"{v:,.0f}" for v in (q.smallest, q.median, q.p95, q.largest)))
        console.print(table)
        rows = max([self.num_questions, *self.columns_read.values()])
        for what, columns in {"read": self.columns_read, "kept as metadata": self.columns_kept}.items():
            shown_columns = [c if n == rows else f"{c} ({n:,})" for c, n in list(columns.items())[:_COLUMNS]]
            more = [f"{len(columns) - _COLUMNS} more"] * (len(columns) > _COLUMNS)
            if columns:
                line = f"  columns {what}: {', '.join(shown_columns + more)}"
                console.print(escape(line), highlight=False, soft_wrap=True)
        counted = {
            "later turns of conversations are ignored": self.dropped_turns,
            "images of ignored turns are left out": self.dropped_images,
            "rows have a system text, which is not used (see student.system_prompt)": self.num_system,
            "rows have several accepted answers": self.num_several_answers,
            "rows contain chat-template tokens, which are removed": self.num_stripped,
        }
        for what, number in counted.items():
            if number:
                console.print(f"  {number:,} {what}")
        for kind, number in self.counts().items():
            level = next(p.level for p in self.problems if p.kind == kind)
            console.print(f"  [{'red' if level == 'error' else 'yellow'}]{number:,} {level}: {kind}[/]")
        for problem in [*self.errors, *self.warnings][:shown]:
            console.print(f"    {escape(str(problem))}", highlight=False, soft_wrap=True)
        if len(self.problems) > shown:
            console.print(f"    ... and {len(self.problems) - shown:,} more")


def preflight(
    data: DataConfig,
    which: Literal["train", "validation"] = "train",
    count_tokens: CountTokens | None = None,
    *,
    answers_needed: bool = True,
    rule: str = "auto",
    truth_problem: Callable[[Question, str], str] | None = None,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read all rows and open all images; nothing is trained, sent or written.

    Args:
        count_tokens: Counter of the student's processor; None skips lengths.
        answers_needed: Whether an empty answer is an error (judge and rules need an answer) or only a warning.
        rule: The recipe's answer rule, for questions that name none.
        truth_problem: Function of a question and the recipe's rule that returns why the rule cannot read its answer, or "".
        progress: Called with (checked questions, all questions).

    Raises:
        DataError: Only for a source that cannot be read at all. Bad rows and images are in the report.
    """
    report = Report(which)
    used: Counter[str] = Counter()
    questions = read_questions(data, which, report.problems, used)
    report.num_questions = len(questions)
    report.columns_read = dict(used)
    report.columns_kept = dict(Counter(c for q in questions for c in q.metadata if c not in COMPUTED))
    report.problems += unread_warnings(questions, data.columns)
    opened: dict[ImageSource, Opened] = {}
    prompt_tokens: list[float] = []
    image_tokens: list[float] = []
    pixels: list[float] = []
    seen: dict[Any, Question] = {}
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            new = list(dict.fromkeys(i for q in batch for i in q.images if i not in opened))
            results = pool.map(lambda i: open_image(i, data), new)
            opened.update(zip(new, results, strict=True))
            for q in batch:
                found, sizes, digests = _check_question(q, opened, answers_needed, rule)
                if truth_problem and q.answer and not found and (cause := truth_problem(q, rule)):
                    found.append(RowProblem("unreadable answer", q.origin, q.id, cause, "warning"))
                key = (q.question, q.choices, digests)
                if None not in digests and (other := seen.setdefault(key, q)) is not q:
                    cause = f"same question and images as {other.id} at {other.origin}"
                    cause += " but another answer" if other.answer != q.answer else ""
                    found.append(RowProblem("duplicate content", q.origin, q.id, cause, "warning"))
                if count_tokens is not None and None not in sizes:
                    try:
                        prompt, image = count_tokens(q, [s for s in sizes if s is not None])
                    except REFUSALS as e:
                        cause = refusal(q, [s for s in sizes if s is not None], e)
                        found.append(RowProblem("processor", q.origin, q.id, cause))
                    else:
                        prompt_tokens.append(prompt)
                        image_tokens.append(image)
                        if prompt > data.max_prompt_length:
                            cause = (
                                f"expected at most data.max_prompt_length ({data.max_prompt_length:,}) tokens, got "
                                f"{prompt:,} ({image:,} of images), so every stage leaves it out. Raise it, or lower "
                                "student.max_pixels"
                            )
                            found.append(RowProblem("too long", q.origin, q.id, cause, "warning"))
                report.num_images += len(q.images)
                report.num_text_only += not q.images
                report.num_usable += not any(p.level == "error" or p.kind == "too long" for p in found)
                report.num_stripped += bool(q.metadata.get("special_tokens_removed"))
                report.dropped_turns += int(q.metadata.get("dropped_turns", 0))
                report.dropped_images += int(q.metadata.get("dropped_images", 0))
                report.num_system += bool(q.metadata.get("system_turns") or q.metadata.get("system"))
                report.num_several_answers += bool(q.other_answers)
                report.problems += found
                pixels += [s[0] * s[1] for s in sizes if s is not None]
            for image_source in new:  # an image in a Parquet file belongs to one row, so its bytes need not be kept
                if image_source.data is not None:
                    del opened[image_source]
            if progress is not None:
                progress(min(start + _BATCH, len(questions)), len(questions))
    report.problems += set_problems(questions)
    report.answer_chars = Quantiles.of(len(q.answer) for q in questions)
    report.image_pixels = Quantiles.of(pixels)
    if count_tokens is not None:
        report.prompt_tokens, report.image_tokens = Quantiles.of(prompt_tokens), Quantiles.of(image_tokens)
    return report


def refusal(q: Question, sizes: Sequence[Size], error: Exception) -> str:
    """Return the cause of an error of the processor on a question with images of these (width, height)."""
    images = ", ".join(f"{i.name} of {w} x {h} pixels" for i, (w, h) in zip(q.images, sizes, strict=True))
    fix = "Crop or pad the image, or leave the row out" if images else "Leave the row out"
    return f"the student's processor refuses {images[:300] or 'it'}: {str(error)[:200]}. {fix}"


def open_image(source: ImageSource, data: DataConfig) -> Opened:
    """Return (size, digest of the pixels, why the picture may show nothing or ""), or why the image cannot be used."""
    try:
        content = read_bytes(source, data.allow_urls)
        image = load_image(ImageSource(data=content), data.max_image_pixels)
    except DataError as e:
        # Replace the generic name of the bytes by the name of the image.
        return re.sub(r"^image <\d+ bytes>", lambda _: f"image {source.name}", str(e))
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode())
    frames = frame_count(content)
    remark = appearance(image) or f"only the first of its {frames} frames is used" * (frames > 1)
    return image.size, digest.hexdigest(), remark


def _image_kind(cause: str) -> str:
    return next((kind for words, kind in _IMAGE_KINDS.items() if words in cause), "corrupt image")


def image_problems(q: Question, opened: Mapping[ImageSource, Opened]) -> list[RowProblem]:
    """Return an error for each image of a question that cannot be used, and a warning for each that may show nothing."""
    found = []
    for image in dict.fromkeys(q.images):
        result = opened[image]
        if isinstance(result, str):
            found.append(RowProblem(_image_kind(result), q.origin, q.id, result))
        elif result[2]:
            kind = "animation" if "frames" in result[2] else "picture of one color"
            found.append(RowProblem(kind, q.origin, q.id, f"image {image.name}: {result[2]}", "warning"))
    return found


def _check_question(
    q: Question, opened: Mapping[ImageSource, Opened], answers_needed: bool, rule: str
) -> tuple[list[RowProblem], list[Size | None], tuple[str | None, ...]]:
    """Return (problems, size of each image, digest of each image); None for images that cannot be used."""
    results = [opened[image] for image in q.images]
    sizes = [None if isinstance(r, str) else r[0] for r in results]
    digests = tuple(None if isinstance(r, str) else r[1] for r in results)
    found = [*image_problems(q, opened), *question_problems(q, answers_needed, rule), *row_warnings(q)]
    return found, sizes, digests


def question_problems(q: Question, answers_needed: bool, rule: str) -> list[RowProblem]:
    """Return the problems of a row that keep it from being used as it is meant, and of a rule that needs choices."""
    found: list[RowProblem] = []
    if not q.answer:
        cause = "answer: expected text, got nothing, so no response can be scored"
        if others := [name for name in q.metadata if name not in COMPUTED][:8]:
            cause += f". If another column holds it, map data.columns: {{answer: ...}} (columns: {', '.join(others)})"
        found.append(RowProblem("empty answer", q.origin, q.id, cause, "error" if answers_needed else "warning"))
    if q.rule is not None and q.rule not in ANSWER_RULES:
        cause = f"rule: expected one of {', '.join(ANSWER_RULES)}, got {q.rule!r}"
        found.append(RowProblem("unknown rule", q.origin, q.id, cause))
    if (q.rule or rule) == "choice" and not q.choices and not re.fullmatch(r"\(?[A-Za-z]\)?\.?", q.answer):
        cause = f"answer: expected a letter for the rule choice without choices, got {q.answer[:40]!r}"
        found.append(RowProblem("no choices", q.origin, q.id, cause, "warning"))
    if q.choices and q.answer and index_of(q.answer, q.choices) is None:
        cause = f"answer: expected one of the {len(q.choices)} choices or its letter, got {q.answer[:40]!r}"
        cause += '. If the columns that are read as choices are none, set data.columns: {choices: ""}'
        found.append(RowProblem("answer not among choices", q.origin, q.id, cause))
    return found
