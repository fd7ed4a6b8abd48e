"""Reading all data once before it costs anything: every row, every image, every prompt's length."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from openril.data.images import load_image, read_bytes
from openril.data.reading import RowProblem, read_questions
from openril.errors import DataError
from openril.recipe.checks import ANSWER_RULES
from openril.recipe.schema import DataConfig
from openril.records import ImageSource, Question

if TYPE_CHECKING:
    from rich.console import Console

Size = tuple[int, int]
"""(width, height) in pixels."""

CountTokens = Callable[[Question, Sequence[Size]], tuple[int, int]]
"""(question, its images' sizes) -> (prompt tokens with image tokens, image tokens alone)."""

_BATCH = 256
_SHOWN = 20


@dataclass
class Quantiles:
    """Spread of a count over the questions; all 0 when there are none."""

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
    """What a pass over ``data.train`` or ``data.validation`` found.

    num_questions: readable questions. num_usable: those without an error of any kind. problems: errors and warnings in
    the data's order. prompt_tokens, image_tokens: None when no processor was there to count with.
    """

    which: str
    num_questions: int = 0
    num_usable: int = 0
    num_images: int = 0
    num_text_only: int = 0
    num_stripped: int = 0
    dropped_turns: int = 0
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
        """Number of problems of each kind, the most frequent first."""
        return dict(Counter(p.kind for p in self.problems).most_common())

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "counts": self.counts()}

    def print(self, console: Console, shown: int = _SHOWN) -> None:
        """One readable block: counts, lengths, then at most ``shown`` problems."""
        from rich.markup import escape
        from rich.table import Table

        console.print(
            f"[bold]data.{self.which}[/bold]: {self.num_questions:,} questions, {self.num_usable:,} usable; "
            f"{self.num_images:,} images, {self.num_text_only:,} questions without one"
        )
        table = Table("", "smallest", "median", "95%", "largest", box=None, pad_edge=False, header_style="dim")
        rows = {"prompt tokens": self.prompt_tokens, "of them image": self.image_tokens}
        rows |= {"answer characters": self.answer_chars, "image pixels": self.image_pixels}
        for name, q in rows.items():
            if q is not None:
                table.add_row(name, *(f"{v:,.0f}" for v in (q.smallest, q.median, q.p95, q.largest)))
        console.print(table)
        if self.dropped_turns:
            console.print(f"  {self.dropped_turns:,} later turns of conversations are not used")
        if self.num_stripped:
            console.print(f"  {self.num_stripped:,} rows held chat-template tokens, which are taken out")
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
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read and open everything; nothing is trained, sent or written.

    count_tokens: of the student's processor; None skips lengths. answers_needed: an empty answer is an error (judge and
    rules have nothing to compare with) or only a warning. rule: the recipe's answer rule, for questions that name none.
    progress: called with (questions done, questions in all).

    Raises DataError only for a source that cannot be read at all; bad rows and images are in the report.
    """
    report = Report(which)
    questions = read_questions(data, which, problems=report.problems)
    report.num_questions = len(questions)
    opened: dict[ImageSource, tuple[Size, str] | str] = {}
    prompt_tokens: list[float] = []
    image_tokens: list[float] = []
    pixels: list[float] = []
    seen: dict[Any, Question] = {}
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            new = list(dict.fromkeys(i for q in batch for i in q.images if i not in opened))
            results = pool.map(lambda i: _open(i, data), new)
            # Bytes held in memory are not kept as keys: one image of a Parquet file belongs to one row.
            opened.update(zip(new, results, strict=True))
            for q in batch:
                found, sizes, digests = _check_question(q, opened, answers_needed, rule)
                key = (q.question, q.choices, digests)
                if None not in digests and (other := seen.setdefault(key, q)) is not q:
                    cause = f"same question and images as {other.id} at {other.origin}"
                    cause += " but another answer" if other.answer != q.answer else ""
                    found.append(RowProblem("duplicate content", q.origin, q.id, cause, "warning"))
                if count_tokens is not None and None not in sizes:
                    try:
                        prompt, image = count_tokens(q, [s for s in sizes if s is not None])
                    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as e:
                        found.append(
                            RowProblem("processor", q.origin, q.id, f"the student's processor refuses it: {e}")
                        )
                    else:
                        prompt_tokens.append(prompt)
                        image_tokens.append(image)
                        if prompt > data.max_prompt_length:
                            cause = (
                                f"the prompt has {prompt:,} tokens ({image:,} of images), data.max_prompt_length is "
                                f"{data.max_prompt_length:,}; raise it, lower student.max_pixels, or leave the row out"
                            )
                            found.append(RowProblem("too long", q.origin, q.id, cause))
                report.num_images += len(q.images)
                report.num_text_only += not q.images
                report.num_usable += not any(p.level == "error" for p in found)
                report.num_stripped += bool(q.metadata.get("special_tokens_removed"))
                report.dropped_turns += int(q.metadata.get("dropped_turns", 0))
                report.problems += found
                pixels += [s[0] * s[1] for s in sizes if s is not None]
            for image_source in new:
                if image_source.data is not None:
                    del opened[image_source]
            if progress is not None:
                progress(min(start + _BATCH, len(questions)), len(questions))
    report.answer_chars = Quantiles.of(len(q.answer) for q in questions)
    report.image_pixels = Quantiles.of(pixels)
    if count_tokens is not None:
        report.prompt_tokens, report.image_tokens = Quantiles.of(prompt_tokens), Quantiles.of(image_tokens)
    return report


def _open(source: ImageSource, data: DataConfig) -> tuple[Size, str] | str:
    """(size, digest of the content), or why the image cannot be used."""
    try:
        content = read_bytes(source, data.allow_urls)
        size = load_image(ImageSource(data=content), data.max_image_pixels).size
    except DataError as e:
        # The content was read under no name of its own: give it back the one it has in the data.
        return re.sub(r"^image <\d+ bytes>", lambda _: f"image {source.name}", str(e))
    return size, hashlib.sha256(content).hexdigest()[:32]


def _image_kind(cause: str) -> str:
    for words, kind in (
        ("does not exist", "missing image"),
        ("bomb", "decompression bomb"),
        ("on the network", "image on the network"),
        ("cannot be fetched", "missing image"),
        ("the server answered", "missing image"),
    ):
        if words in cause:
            return kind
    return "corrupt image"


def _check_question(
    q: Question, opened: dict[ImageSource, tuple[Size, str] | str], answers_needed: bool, rule: str
) -> tuple[list[RowProblem], list[Size | None], tuple[str | None, ...]]:
    found: list[RowProblem] = []
    sizes: list[Size | None] = []
    digests: list[str | None] = []
    for image in q.images:
        result = opened[image]
        if isinstance(result, str):
            found.append(RowProblem(_image_kind(result), q.origin, q.id, result))
            sizes.append(None)
            digests.append(None)
        else:
            sizes.append(result[0])
            digests.append(result[1])
    if not q.answer:
        cause = "the answer is empty, so no response can be scored"
        found.append(RowProblem("empty answer", q.origin, q.id, cause, "error" if answers_needed else "warning"))
    if q.rule is not None and q.rule not in ANSWER_RULES:
        cause = f"no answer rule is named {q.rule!r}; there are {', '.join(ANSWER_RULES)}"
        found.append(RowProblem("unknown rule", q.origin, q.id, cause))
    if (q.rule or rule) == "choice" and not q.choices and not re.fullmatch(r"\(?[A-Za-z]\)?\.?", q.answer):
        cause = f"the rule is choice, but there are no choices and the answer {q.answer[:40]!r} is no letter"
        found.append(RowProblem("no choices", q.origin, q.id, cause, "warning"))
    if q.choices and q.answer and not _among(q.answer, q.choices):
        cause = f"the answer {q.answer[:40]!r} is neither one of the {len(q.choices)} choices nor a letter of one"
        found.append(RowProblem("answer not among choices", q.origin, q.id, cause))
    return found, sizes, tuple(digests)


def _among(answer: str, choices: Sequence[str]) -> bool:
    """The text of a choice, its letter, or both as in "B. cat" or "(B) cat"."""
    wanted = {c.strip().casefold() for c in choices}
    if answer.strip().casefold() in wanted:
        return True
    match = re.fullmatch(r"\(?([A-Za-z])\)?(?:[.:)]?\s*(.*))", answer.strip(), re.DOTALL)
    if match is None or ord(match[1].upper()) - ord("A") >= len(choices):
        return False
    return not match[2] or match[2].strip().casefold() == choices[ord(match[1].upper()) - ord("A")].strip().casefold()
