"""`ril collect`: collect responses of the teachers and the student into the cache, and their verdicts if requested."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from openril.checkpoint_files import require_folder
from openril.errors import CacheError, EndpointError
from openril.recipe.checks import collects_student_last, filters_overlong
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question
from openril.report.progress import ProgressDisplay, say, warn_line
from openril.stages.data_checks import check_questions, check_responses

if TYPE_CHECKING:
    from rich.console import Console

    from openril.responses.cache import ResponseCache
    from openril.sampling.protocol import Sampler

JUDGED_AT_ONCE = 256

T = TypeVar("T")


def run_collect(
    recipe: Recipe,
    console: Console,
    sources: list[str] | None = None,
    *,
    recollect: bool = False,
    make_sampler: Callable[[Recipe, str], Sampler] | None = None,
) -> None:
    """Collect the missing responses. Returns at once when the cache is complete.

    With ``data.selection`` the student is asked the provisional questions and the teachers the chosen ones. Before the
    final choice, only the student is asked unless ``sources`` says otherwise.

    Args:
        sources: Names of teachers, or ``STUDENT``; None for all that the recipe names.
        recollect: First drop cached responses that no longer fit (older questions, another model, other settings).
        make_sampler: See ``responses.collection.collect``.

    Raises:
        DataError: If the questions have not been chosen yet.
        EndpointError: If some responses are missing. The others are kept, and the same call collects the rest.
    """
    from openril.responses.cache import ResponseCache
    from openril.responses.collection import collect, teacher_of
    from openril.stages.questions import selected_questions, selection_file

    names = required_sources(recipe) if sources is None else sources
    partial = sources is None and filters_overlong(recipe) and not selection_file(recipe).exists()
    if partial:
        names = [STUDENT]
    early = sources is None and collects_student_last(recipe) and not recipe.sft_student_path.exists()
    if early:
        names = [name for name in names if name != STUDENT]
    for name in names:
        teacher_of(recipe, name)  # an unknown name is refused before any work
        if make_sampler is None:
            _require_checkpoint(recipe, name)
    asked = {name: selected_questions(recipe, name) for name in names}
    warn = lambda message: warn_line(console, "collect", message)  # noqa: E731
    for questions in {tuple(q.id for q in questions): questions for questions in asked.values()}.values():
        check_questions(recipe, "collect", questions, warn)
    if STUDENT in asked and make_sampler is None:
        from openril.models.prompt_lengths import fitting_questions  # imports torch, which servers do not need

        fitting = {q.id for q in fitting_questions(recipe, asked[STUDENT], "collect", warn)}
        asked = {name: [q for q in questions if q.id in fitting] for name, questions in asked.items()}
    cache = ResponseCache.create(recipe.cache_path, shard_size=recipe.collect.shard_size)
    if recollect:
        for name in names:
            drop_unfitting(recipe, cache, asked[name], name, console)
    problems = []
    with ProgressDisplay(console) as display:
        progress = _SourceBars(display)
        for name in names:
            try:
                result = collect(recipe, asked[name], name, cache, progress, make_sampler=make_sampler)
            except EndpointError as e:
                problems.append(str(e))  # the servers of the other sources may be reachable
                continue
            notes = [(result.new, "new"), (result.cut, f"cut at {recipe.collect.max_completion_length} tokens")]
            notes += [(result.empty, "empty"), (result.refused, "refused")]
            details = ", ".join(f"{n} {what}" for n, what in notes if n)
            progress.note(
                f"{name}: {result.total - result.failed} of {result.total} responses" + f" ({details})" * bool(details)
            )
            if warning := result.empty_report():
                display.warn(warning)
            if result.failed:
                report = f"{result.failure_report()}\n{result.advice}".rstrip()
                problems.append(f"{name}: {result.failed} responses are missing:\n{report}")
            elif result.causes:
                progress.note(f"{name}: refused and kept as empty responses:\n{result.failure_report()}")
            if name != STUDENT and not result.failed and not warning:
                with suppress(CacheError):  # other processes may still collect
                    check_responses(recipe, asked[name], cache.load(asked[name], [name], check_hashes=False), warn)
    if problems:
        raise EndpointError("\n".join(problems) + "\nAll others are kept. The same command collects the missing ones.")
    if recipe.collect.judge_responses and int(os.environ.get("RANK", "0")) == 0:  # processes share only the collecting
        judge_cached(recipe, cache, asked, console)
    if early:
        say(console, "collect: next, `ril sft` warms the student up; then run `ril collect` again for its responses")
    if partial:
        say(console, "collect: next, `ril select` leaves out overlong questions; then run `ril collect` again")


def _require_checkpoint(recipe: Recipe, source: str) -> None:
    """Raise ModelError if a source is a folder without a checkpoint that can be used."""
    from openril.responses.collection import teacher_of

    teacher = teacher_of(recipe, source)
    if teacher is None:
        require_folder("student", recipe.collected_student)
    elif not teacher.base_urls:
        require_folder(f"teacher {source}", teacher.model_path)


def required_sources(recipe: Recipe) -> list[str]:
    """Return all sources that the recipe collects from: its teachers, then the student."""
    return [t.name for t in recipe.teachers] + ([STUDENT] if recipe.collect.student else [])


def drop_unfitting(
    recipe: Recipe, cache: ResponseCache, questions: Sequence[Question], source: str, console: Console
) -> None:
    """Remove a source's responses that belong to other settings, another model or older questions."""
    from openril.responses.collection import teacher_of
    from openril.responses.manifest import may_differ, source_entry
    from openril.storage import changed_keys

    old = cache.manifest()["sources"].get(source)
    if old is None:
        return
    now = source_entry(recipe, teacher_of(recipe, source))
    changed = changed_keys(old, now, ignored=may_differ(old, now).__contains__)
    dropped = cache.discard(source) if changed else cache.discard_stale(questions, source)
    if dropped:
        say(console, f"{source}: dropped {dropped} responses that no longer fit")


def judge_cached(
    recipe: Recipe, cache: ResponseCache, asked: Mapping[str, Sequence[Question]], console: Console
) -> None:
    """Ask the judge about every cached response whose verdict is not stored yet. Each verdict is stored at once.

    Responses that the answer rules score are not stored, because the rules are run again when they are needed.
    """
    from openril.responses.files import has_old_verdicts
    from openril.rewards.answers import cached_answer_kind, score_answers
    from openril.rewards.judge import JudgeService, KnownVerdicts
    from openril.rewards.verdict_store import OUTDATED, open_verdict_store

    kind, rule = cached_answer_kind(recipe), recipe.rewards.answer.rule
    left_out = recipe.rewards.answer.without_truth == "leave_out"
    store = open_verdict_store(recipe, "collect")
    known, service = KnownVerdicts(recipe.judge, store), None

    def texts() -> Iterator[tuple[Question, str]]:
        for source, questions in asked.items():
            loaded = cache.load(questions, [source], recipe.collect.num_responses, check_hashes=False)
            judged = [q for q in questions if q.answer.strip() or not left_out]
            yield from ((q, r.text) for q in judged for r in loaded.responses_for(q.id, source))

    total, judged, unknown = 0, 0, 0
    try:
        for batch in batches(texts(), JUDGED_AT_ONCE):
            scores = score_answers(batch, kind, rule, known)
            missing = [item for item, score in zip(batch, scores, strict=True) if score.score is None]
            total += len(batch)
            if not missing:
                continue
            if service is None:
                service = JudgeService(recipe.judge, store)
                if store.outdated or has_old_verdicts(cache.folder):
                    say(console, OUTDATED)
            answers = score_answers(missing, kind, rule, service, [True] * len(missing))
            judged += len(missing)
            unknown += sum(answer.score is None for answer in answers)
    finally:
        if service is not None:
            service.close()
    note = f", of which {unknown} verdicts are unknown (the same command asks again)" if unknown else ""
    say(console, f"judged {judged} of {total} responses{note}; the others were known")


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
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
        say(self.display.console, message)
