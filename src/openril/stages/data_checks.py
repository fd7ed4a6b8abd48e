"""What every stage says about its questions and cached responses before it begins, and `ril check` with it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from openril.data.preflight import REFUSALS, Opened, image_problems, open_image, question_problems, refusal
from openril.data.reading import RowProblem, read_questions
from openril.data.row_checks import also_in_train, row_warnings, set_problems, summaries
from openril.data.unread import unread_warnings
from openril.errors import DataError
from openril.recipe.schema import DataConfig, Recipe
from openril.records import STUDENT, ImageSource, Question

if TYPE_CHECKING:
    from openril.responses.loaded import LoadedResponses

IMAGES = 10_000
"""Images that a stage opens, spread evenly over its questions. `ril check` opens all."""
RESPONSES = 512
"""Responses of a teacher that are looked at, spread evenly over the questions."""
_SHOWN = 8
_REFUSAL = re.compile(
    r"\s*(?:i['’]?m (?:very )?sorry|sorry|i apologi[sz]e|unfortunately,? i|i (?:cannot|can['’]?t|am unable|'m unable)"
    r"|as an ai\b|抱歉|对不起|很抱歉|我无法|无法)",
    re.IGNORECASE,
)
_Say = Callable[[str], None]


def check_questions(
    recipe: Recipe,
    stage: str,
    questions: Sequence[Question],
    warn: _Say,
    which: Literal["train", "validation"] = "train",
    *,
    processed: bool = False,
) -> None:
    """Refuse questions that cannot be used, and warn about those that probably do not say what they mean.

    Under a launcher the first process does it.

    Args:
        processed: Whether to ask the student's processor about the sizes of the images too.

    Raises:
        DataError: Naming the first rows and causes.
    """
    if int(os.environ.get("RANK") or 0):
        return
    refused = recipe.answer_kind != "none" and recipe.rewards.answer.without_truth == "refuse"
    needed = stage == "eval" or (stage == "train" and refused)
    rule = recipe.rewards.answer.rule
    problems = [p for q in questions for p in [*question_problems(q, needed, rule), *row_warnings(q)]]
    images = sum(len(q.images) for q in questions)
    looked_at = questions[:: max(1, -(-images // IMAGES))]
    opened = _open_images(looked_at, recipe.data)
    problems += [p for q in looked_at for p in image_problems(q, opened)]
    if processed:
        problems += _refused(recipe, looked_at, opened)
    if errors := [str(p) for p in problems if p.level == "error"]:
        more = f"\n... and {len(errors) - _SHOWN} more; `ril check` lists them all" if len(errors) > _SHOWN else ""
        raise DataError("\n".join(errors[:_SHOWN]) + more)
    problems += [*unread_warnings(questions, recipe.data.columns), *set_problems(questions)]
    for line in summaries(problems, which, len(questions)):
        warn(line)
    if which == "train":
        warn_of_shared_questions(recipe, warn, train=questions)
    else:
        warn_of_shared_questions(recipe, warn, validation=questions)


def warn_of_shared_questions(
    recipe: Recipe,
    warn: _Say,
    train: Sequence[Question] | None = None,
    validation: Sequence[Question] | None = None,
) -> int:
    """Warn of validation questions that are also in data.train, and return their number. None: read them."""
    if not (recipe.data.train and recipe.data.validation):
        return 0
    try:
        train = read_questions(recipe.data, "train", []) if train is None else train
        validation = read_questions(recipe.data, "validation", []) if validation is None else validation
    except DataError:  # of the questions that this stage does not use
        return 0
    found = list(also_in_train(train, validation, lambda qs: _digests(qs, recipe.data)))
    for line in summaries(found, "validation", len(validation)):
        warn(line)
    return len(found)


def _open_images(questions: Sequence[Question], data: DataConfig) -> dict[ImageSource, Opened]:
    sources = list(dict.fromkeys(i for q in questions for i in q.images if i.url is None or i.url.startswith("data:")))
    with ThreadPoolExecutor(4) as pool:
        opened: dict[ImageSource, Opened] = dict(
            zip(sources, pool.map(lambda i: open_image(i, data), sources), strict=True)
        )
    # Images on the network are opened when they are needed, and each of those requests may fail.
    return {i: ((0, 0), "", "") for q in questions for i in q.images} | opened


def _digests(questions: Sequence[Question], data: DataConfig) -> dict[str, tuple[str | None, ...]]:
    opened = _open_images(questions, data)
    named = {source: (None if isinstance(r, str) else r[1] or source.name) for source, r in opened.items()}
    return {q.origin: tuple(named[i] for i in q.images) for q in questions}


def _refused(recipe: Recipe, questions: Sequence[Question], opened: Mapping[ImageSource, Opened]) -> list[RowProblem]:
    """Return an error for each question with images of sizes that the student's processor refuses."""
    from openril.models.loading import load_processor
    from openril.models.prompt_lengths import TokenCounter

    student = recipe.student
    trained = recipe.sft_student_path
    processor = load_processor(
        str(trained) if trained.is_dir() else student.model,
        revision=None if trained.is_dir() else student.revision,
        trust_remote_code=student.trust_remote_code,
        min_pixels=student.min_pixels,
        max_pixels=student.max_pixels,
    )
    count = TokenCounter(processor, student.system_prompt)
    causes: dict[Any, Exception | None] = {}
    found = []
    for q in questions:
        sizes = tuple(result[0] for i in q.images if not isinstance(result := opened[i], str))
        if len(sizes) != len(q.images) or not all(w and h for w, h in sizes):
            continue
        if sizes not in causes:
            causes[sizes] = None
            try:
                count(q, sizes)
            except REFUSALS as e:
                causes[sizes] = e
        if error := causes[sizes]:
            found.append(RowProblem("processor", q.origin, q.id, refusal(q, sizes, error)))
    return found


def check_responses(recipe: Recipe, questions: Sequence[Question], loaded: LoadedResponses, warn: _Say) -> None:
    """Warn where most of a teacher's cached responses teach nothing: empty, identical, cut, refusals, without an answer.

    Under a launcher the first process does it.
    """
    from openril.rewards.answers import score_answers

    if int(os.environ.get("RANK") or 0):
        return
    for source in loaded.sources:
        if source == STUDENT:
            continue
        spread = questions[:: max(1, len(questions) // RESPONSES)]
        answers = [(q, r) for q in spread for r in loaded.responses_for(q.id, source)[: 1 + RESPONSES // len(spread)]]
        texts = [r.text.strip() for _, r in answers]
        several = len({q.id for q, _ in answers}) >= 4
        most, same = Counter(texts).most_common(1)[0] if texts else ("", 0)
        counts = {
            "are empty": texts.count(""),
            "are cut at the length limit": sum(r.finish_reason == "length" for _, r in answers),
            "are refusals": sum(
                r.finish_reason in ("refusal", "content_filter") or bool(_REFUSAL.match(r.text)) for _, r in answers
            ),
            f"are identical ({most[:40]!r})": same if several and most and same > 0.9 * len(texts) else 0,
        }
        scored = [(q, r.text) for q, r in answers if q.answer and r.text.strip()]
        if recipe.answer_kind == "rules" and scored:
            results = score_answers(scored, "rules", recipe.rewards.answer.rule)
            counts["state no answer that the rule can read"] = sum(not s.parsed for s in results)
        for what, n in counts.items():
            if 2 * n > len(answers):
                warn(
                    f"teacher {source}: {n} of {len(answers)} cached responses looked at {what}."
                    " `ril check RECIPE` shows what its server answers."
                )
