"""`ril collect`: collect responses of the teachers and the student into the cache, and their verdicts if requested."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING

from openril.errors import EndpointError
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question, Response
from openril.report.progress import ProgressDisplay

if TYPE_CHECKING:
    from rich.console import Console

    from openril.responses.cache import ResponseCache
    from openril.sampling.protocol import Sampler

JudgeMany = Callable[[Sequence[Question], Sequence[Response]], Sequence[float | None]]
"""Return the verdicts on responses, given each response's question; None where there is no verdict."""

JUDGED_AT_ONCE = 256


def run_collect(
    recipe: Recipe,
    console: Console,
    sources: list[str] | None = None,
    *,
    recollect: bool = False,
    judge_many: JudgeMany | None = None,
    make_sampler: Callable[[Recipe, str], Sampler] | None = None,
) -> None:
    """Collect the missing responses. Returns at once when the cache is complete.

    Args:
        sources: Names of teachers, or ``STUDENT``; None for all that the recipe names.
        recollect: First drop cached responses that no longer fit (older questions, another model, other settings).
        judge_many: Judges the responses if ``collect.judge_responses`` is set; by default the recipe's judge or rules.
        make_sampler: See ``responses.collection.collect``.

    Raises:
        EndpointError: If some responses are missing. The others are kept, and the same call collects the rest.
    """
    from openril.data.reading import read_questions
    from openril.responses.cache import ResponseCache
    from openril.responses.collection import collect, teacher_of

    names = required_sources(recipe) if sources is None else sources
    for name in names:
        teacher_of(recipe, name)  # an unknown name is refused before any work
    questions = read_questions(recipe.data, "train")
    cache = ResponseCache.create(recipe.cache_path, shard_size=recipe.collect.shard_size)
    if recollect:
        for name in names:
            drop_unfitting(recipe, cache, questions, name, console)
    problems = []
    with ProgressDisplay(console) as display:
        progress = _SourceBars(display)
        for name in names:
            try:
                result = collect(recipe, questions, name, cache, progress, make_sampler=make_sampler)
            except EndpointError as e:
                problems.append(str(e))  # the servers of the other sources may be reachable
                continue
            notes = [(result.new, "new"), (result.cut, f"cut at {recipe.collect.max_completion_length} tokens")]
            notes += [(result.empty, "empty"), (result.refused, "refused")]
            details = ", ".join(f"{n} {what}" for n, what in notes if n)
            progress.note(
                f"{name}: {result.total - result.failed} of {result.total} responses" + f" ({details})" * bool(details)
            )
            if result.failed:
                problems.append(f"{name}: {result.failed} responses are missing:\n{result.failure_report()}")
    if problems:
        raise EndpointError("\n".join(problems) + "\nAll others are kept. The same command collects the missing ones.")
    if recipe.collect.judge_responses and int(os.environ.get("RANK", "0")) == 0:  # processes share only the collecting
        with answer_judge(recipe) if judge_many is None else nullcontext(judge_many) as judge:
            judge_cached(cache, questions, names, recipe.collect.num_responses, judge, console)


@contextmanager
def answer_judge(recipe: Recipe) -> Iterator[JudgeMany]:
    """Score responses as training does: by the recipe's judge, by rules, or by both (``rewards.answer``)."""
    from openril.rewards.answers import score_answers
    from openril.rewards.judge import build_judge_service

    settings = recipe.rewards.answer
    kind = "judge" if settings.kind == "none" else settings.kind
    service = build_judge_service(recipe, "collect") if kind != "rules" else None

    def judge_many(questions: Sequence[Question], responses: Sequence[Response]) -> Sequence[float | None]:
        items = [(q, r.text) for q, r in zip(questions, responses, strict=True)]
        shared = [not r.from_student for r in responses]
        return [s.score for s in score_answers(items, kind, settings.rule, service, shared)]

    try:
        yield judge_many
    finally:
        if service is not None:
            service.close()


def required_sources(recipe: Recipe) -> list[str]:
    """Return all sources that the recipe collects from: its teachers, then the student."""
    return [t.name for t in recipe.teachers] + ([STUDENT] if recipe.collect.student else [])


def drop_unfitting(
    recipe: Recipe, cache: ResponseCache, questions: Sequence[Question], source: str, console: Console
) -> None:
    """Remove a source's responses that belong to other settings, another model or older questions."""
    from openril.responses.chat_requests import sampling_record
    from openril.responses.collection import teacher_of
    from openril.responses.fingerprint import model_identity
    from openril.responses.manifest import differences

    old = cache.manifest()["sources"].get(source)
    if old is None:
        return
    teacher = teacher_of(recipe, source)
    model, revision = model_identity(recipe, teacher)
    now = {"model": model, "revision": revision, "sampling": sampling_record(recipe, teacher)}
    dropped = cache.discard(source) if differences(old, now) else cache.discard_stale(questions, source)
    if dropped:
        console.print(f"{source}: dropped {dropped} responses that no longer fit", highlight=False)


def judge_cached(
    cache: ResponseCache,
    questions: Sequence[Question],
    sources: Sequence[str],
    num_responses: int,
    judge_many: JudgeMany,
    console: Console,
) -> None:
    """Judge every cached response that has no verdict yet. The verdicts of each batch are stored at once."""
    loaded = cache.load(questions, sources, num_responses, check_hashes=False)
    by_id = {q.id: q for q in questions}
    todo = (
        response
        for question in questions
        for source in sources
        for response, verdict in zip(
            loaded.responses_for(question.id, source), loaded.verdicts_for(question.id, source), strict=True
        )
        if verdict is None
    )
    judged, unknown = 0, 0
    for batch in batches(todo, JUDGED_AT_ONCE):
        verdicts = judge_many([by_id[r.question_id] for r in batch], batch)
        known = {(r.question_id, r.source, r.index): v for r, v in zip(batch, verdicts, strict=True) if v is not None}
        cache.record_verdicts(known)
        judged += len(known)
        unknown += len(batch) - len(known)
    cache.merge_verdicts()
    note = f", {unknown} verdicts are missing (the same command asks for them again)" if unknown else ""
    console.print(f"judged {judged} responses{note}", highlight=False)


def batches(items: Iterable[Response], size: int) -> Iterator[list[Response]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class _SourceBars:
    """The ``responses.collection.Progress`` of a display: one bar for each source, notes from every process."""

    def __init__(self, display: ProgressDisplay) -> None:
        self.display = display
        self.totals: dict[str, int] = {}

    def start(self, source: str, total: int, done: int) -> None:
        self.totals[source] = total
        self.display.show(source, done, total)

    def update(self, source: str, *, done: int, in_flight: int, failed: int) -> None:
        parts = [f"{in_flight} in flight"] * bool(in_flight) + [f"{failed} failed"] * bool(failed)
        self.display.show(source, done, self.totals[source], state=", ".join(parts))

    def note(self, message: str) -> None:
        self.display.console.print(message, highlight=False, markup=False)
