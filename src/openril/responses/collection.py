"""Collection of responses into the cache, from servers with many requests at a time or from a model in this process."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from openril.endpoints import ChatClient, RequestRefusedError
from openril.errors import DataError, EndpointError, OpenRILError, RecipeError
from openril.recipe.schema import Recipe, StudentConfig, TeacherConfig
from openril.records import STUDENT, Question, Response
from openril.responses.cache import ResponseCache
from openril.responses.chat_requests import chat_messages, request_settings, response_seed
from openril.responses.manifest import source_entry
from openril.responses.work_queue import Work, WorkQueue
from openril.responses.writer import Writer
from openril.sampling.protocol import Sampler
from openril.storage import stable_hash

if TYPE_CHECKING:
    from openril.sampling.vllm_engine import VLLMSampler
    from openril.sampling.vllm_engine import Work as Request

POLL = 1.0
"""Seconds between attempts to take blocks of questions that other processes hold."""


class Progress(Protocol):
    """Receives the progress of a collection."""

    def start(self, source: str, total: int, done: int) -> None: ...
    def update(self, source: str, *, done: int, in_flight: int, failed: int) -> None: ...
    def note(self, message: str) -> None: ...


class Silent:
    """A ``Progress`` that shows nothing."""

    def start(self, source: str, total: int, done: int) -> None: ...
    def update(self, source: str, *, done: int, in_flight: int, failed: int) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass
class Collected:
    """What one call of ``collect`` did for one source."""

    source: str
    total: int = 0
    already: int = 0
    """Responses that were in the cache before."""
    new: int = 0
    """Responses that this process wrote. ``cut`` at the length limit, ``empty`` and ``refused`` ones are among them."""
    cut: int = 0
    empty: int = 0
    thoughts_only: int = 0
    """How many of the empty ones came with thoughts, which servers of reasoning models send separately."""
    refused: int = 0
    failed: int = 0
    """Responses that could not be obtained."""
    advice: str = ""
    """What to change if the server refused too many."""
    causes: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    """Number of failed (or refused and kept) responses by cause, each with the first question ids."""

    def count(self, response: Response) -> None:
        self.new += 1
        self.cut += response.finish_reason == "length"
        self.empty += not response.text.strip()
        self.refused += response.finish_reason in ("refusal", "content_filter")

    def fail(self, question_id: str, cause: str, responses: int = 1) -> None:
        self.failed += responses
        self.note(question_id, cause, responses)

    def note(self, question_id: str, cause: str, responses: int = 1) -> None:
        if cause not in self.causes and len(self.causes) >= 20:
            cause = "further causes"
        number, examples = self.causes.get(cause, (0, []))
        if question_id not in examples and len(examples) < 5:
            examples = [*examples, question_id]
        self.causes[cause] = (number + responses, examples)

    def failure_report(self) -> str:
        """Return one line per cause."""
        ranked = sorted(self.causes.items(), key=lambda item: -item[1][0])
        return "\n".join(f"  {n} x {cause} (questions {', '.join(ids)}, ...)" for cause, (n, ids) in ranked)

    def empty_report(self) -> str:
        """Return a warning if most of the new responses are empty, or ""."""
        if self.empty <= self.new / 2:
            return ""
        thoughts = f", {self.thoughts_only} of them because the model used all tokens for its thoughts"
        return (
            f"{self.source}: {self.empty} of {self.new} responses are empty{thoughts * bool(self.thoughts_only)}. Raise"
            " collect.max_completion_length, or turn thinking off (for vLLM: extra_body: {chat_template_kwargs:"
            " {enable_thinking: false}}), then run `ril collect RECIPE --recollect`"
        )


def collect(
    recipe: Recipe,
    questions: Sequence[Question],
    source: str,
    cache: ResponseCache,
    progress: Progress | None = None,
    *,
    make_sampler: Callable[[Recipe, str], Sampler] | None = None,
) -> Collected:
    """Collect what is missing of ``recipe.collect.num_responses`` responses to each question from one source.

    Several processes may do this at once and share the work. A response that fails after the endpoint's retries stays
    missing and is counted in the result; the next call asks for it again.

    Args:
        make_sampler: Builds the engine of the student or of a local teacher from (recipe, source). The default follows the
            recipe.

    Raises:
        CacheError: For stale responses, or if the source's settings have changed.
        EndpointError: If the server refuses every request or fails many in a row. What was collected is kept.
    """
    progress = progress or Silent()
    teacher = teacher_of(recipe, source)
    cache.register(source, **source_entry(recipe, teacher))
    num_responses = recipe.collect.num_responses
    missing = len(cache.missing(questions, source, num_responses))
    total = len(questions) * num_responses
    result = Collected(source, total=total, already=total - missing)
    progress.start(source, total, result.already)
    if not missing:
        return result
    if teacher is None and recipe.student.sampler.engine == "vllm" and int(os.environ.get("RANK", "0")):
        while cache.missing(questions, source, num_responses):  # The first process keeps the servers busy.
            time.sleep(10 * POLL)
        return result
    queue = WorkQueue(cache, questions, source, num_responses)
    with cache.writer(source) as writer:
        try:
            if teacher is not None and not teacher.model_path:
                client = ChatClient(teacher, f"teacher {source}")
                try:
                    client.loop_thread.run(_Served(recipe, queue, writer, progress, result, teacher, client).run())
                finally:
                    client.close()
            else:
                with (
                    nullcontext(make_sampler(recipe, source))
                    if make_sampler
                    else local_sampler(recipe, source, questions) as sampler
                ):
                    _Collection(recipe, queue, writer, progress, result).sample(sampler)
        finally:
            queue.release()
    return result


def teacher_of(recipe: Recipe, source: str) -> TeacherConfig | None:
    """Return the recipe's teacher of that name, or None for the student."""
    if source == STUDENT:
        return None
    for teacher in recipe.teachers:
        if teacher.name == source:
            return teacher
    names = ", ".join([*recipe.teacher_names, STUDENT])
    raise RecipeError(f"sources: expected one of {names}, got {source!r}. Correct the name.")


def local_sampler(recipe: Recipe, source: str, questions: Sequence[Question]) -> AbstractContextManager[Sampler]:
    """Open the engine of the student or of a local teacher."""
    from openril.sampling.checkpoint_sampler import open_sampler

    teacher, size = teacher_of(recipe, source), recipe.collect.questions_per_batch
    if teacher is None:
        return open_sampler(recipe, recipe.collected_student, questions, size)
    path, trust = teacher.model_path, teacher.trust_remote_code
    settings = StudentConfig(model=path, trust_remote_code=trust, system_prompt=teacher.system_prompt)
    return open_sampler(recipe, path, questions, size, settings)


@dataclass
class _Collection:
    """One collection of a source's responses."""

    recipe: Recipe
    queue: WorkQueue
    writer: Writer
    progress: Progress
    result: Collected
    waiting: bool = field(default=False, kw_only=True)
    failures_in_a_row: int = field(default=0, kw_only=True)

    def keep(self, question: Question, response: Response) -> None:
        self.writer.append(question, response)
        self.result.count(response)
        self.failures_in_a_row = 0

    def fail(self, question: Question, error: OpenRILError, responses: int, concurrency: int) -> EndpointError | None:
        """Count a failed request. Return the error that must end the collection, if the next requests would fail too."""
        self.result.fail(question.id, str(error), responses)
        self.failures_in_a_row += 1
        if isinstance(error, RequestRefusedError) and error.concerns_every_request:
            return error
        if self.failures_in_a_row >= max(20, 2 * concurrency):
            return EndpointError(f"{error}. Stopped after {self.failures_in_a_row} failures in a row")
        return None

    def show(self, in_flight: int = 0) -> None:
        result = self.result
        done = result.already + result.new
        self.progress.update(result.source, done=done, in_flight=in_flight, failed=result.failed)

    def note_waiting(self) -> None:
        """Tell the user, once, that other processes hold the rest of the work."""
        if not self.waiting:
            self.waiting = True
            self.progress.note(
                f"{self.queue.source}: another process is collecting the last {self.queue.questions_elsewhere} questions;"
                " waiting for it, and taking over if it stops"
            )

    def sample(self, sampler: Sampler) -> None:
        """Collect from a model in this process, or from servers that hold the student."""
        from openril.sampling.vllm_engine import VLLMSampler

        collect, source = self.recipe.collect, self.result.source
        seed = stable_hash(self.recipe.seed, "collect", source) % 2**31
        if isinstance(sampler, VLLMSampler):
            self.stream(sampler, seed)
            return
        while True:
            batch = take_batch(self.queue, collect.questions_per_batch)
            if not batch:
                if self.queue.finished:
                    return
                self.note_waiting()
                time.sleep(POLL)
                continue
            # Questions that need the same indices are sampled together. An interrupted batch may have left gaps.
            by_run: dict[tuple[int, int], list[Question]] = {}
            for question, indices in batch:
                for run in runs(indices):
                    by_run.setdefault(run, []).append(question)
            for (first, count), group in by_run.items():
                answers = sampler.sample(
                    group,
                    count,
                    settings=collect.sampling,
                    max_completion_length=collect.max_completion_length,
                    seed=seed,
                    first_index=first,
                    source=source,
                )
                for question, responses in zip(group, answers, strict=True):
                    for response in responses:
                        self.keep(question, response)
                self.show()
            for question, _ in batch:
                self.queue.done(question)

    def stream(self, sampler: VLLMSampler, seed: int) -> None:
        """Keep the student's servers busy, and write every answer when it arrives."""
        collect, settings = self.recipe.collect, self.recipe.student.sampler
        ready: deque[Request] = deque()
        parts: dict[Question, int] = {}  # requests of a question that are not answered yet

        def take() -> Request | None:
            if not ready and (work := self.queue.take()) is not None:
                question, indices = work
                ready.extend((question, first, count) for first, count in runs(indices))
                parts[question] = len(ready)
            return ready.popleft() if ready else None

        def finish(question: Question) -> None:
            parts[question] -= 1
            if not parts[question]:
                del parts[question]
                self.queue.done(question)

        def failed(request: Request, error: OpenRILError) -> None:
            question, _, count = request
            if isinstance(error, DataError):
                self.result.fail(question.id, str(error), count)
            elif fatal := self.fail(question, error, count, settings.concurrency):
                raise fatal
            finish(question)

        while not self.queue.finished:
            arrived = sampler.stream(
                take,
                settings=collect.sampling,
                max_completion_length=collect.max_completion_length,
                seed=seed,
                source=self.result.source,
                logprobs=False,
                failed=failed,
            )
            with closing(arrived):
                for answers in arrived:
                    for (question, _, _), responses in answers:
                        for response in responses:
                            self.keep(question, response)
                        finish(question)
                    self.show(min(len(parts), settings.concurrency))
            if not self.queue.finished:
                self.note_waiting()
                time.sleep(POLL)


@dataclass
class _Served(_Collection):
    """One collection from a teacher's servers. All methods run on the client's event loop."""

    teacher: TeacherConfig
    client: ChatClient
    outstanding: int = 0
    fatal: Exception | None = None

    def __post_init__(self) -> None:
        self.settings = request_settings(self.recipe, self.teacher)
        self.refused: list[tuple[Question, int, str]] = []
        self.stop = asyncio.Event()

    async def run(self) -> None:
        running: set[asyncio.Task[None]] = set()
        stopped = asyncio.create_task(self.stop.wait())
        try:
            while self.fatal is None:
                # A question is prepared only shortly before its requests are sent, so concurrency bounds the memory.
                ready = self.outstanding < 2 * self.teacher.concurrency
                work = await asyncio.to_thread(self.queue.take) if ready else None
                if work is not None:
                    self.outstanding += len(work[1])
                    running.add(asyncio.create_task(self.answer_question(*work)))
                elif running:
                    await asyncio.wait({stopped, *running}, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
                    for task in [t for t in running if t.done()]:
                        running.remove(task)
                        task.result()
                elif self.queue.finished:
                    return self.settle_refused()
                else:
                    self.note_waiting()
                    await asyncio.sleep(POLL)
            raise self.fatal
        finally:
            for pending in (stopped, *running):
                pending.cancel()
            await asyncio.gather(stopped, *running, return_exceptions=True)

    async def answer_question(self, question: Question, indices: list[int]) -> None:
        try:
            messages = await asyncio.to_thread(
                chat_messages,
                question,
                system_prompt=self.teacher.system_prompt,
                max_pixels=self.recipe.data.max_image_pixels,
                allow_urls=self.recipe.data.allow_urls,
            )
        except DataError as e:
            self.result.fail(question.id, str(e), len(indices))
            self.outstanding -= len(indices)
        else:
            await asyncio.gather(*(self.answer(question, messages, i) for i in indices))
        finally:
            self.queue.done(question)
            self.show(min(self.outstanding, self.teacher.concurrency))

    async def answer(self, question: Question, messages: list[dict[str, Any]], index: int) -> None:
        """Collect one response. Raises nothing but cancellation; an error that must end the collection is put in ``fatal``."""
        source = self.result.source
        try:
            seed = response_seed(self.recipe.seed, source, question.id, index)
            completion = await self.client.chat(messages, seed=seed, **self.settings)
            if completion.finish_reason == "content_filter" and not completion.text.strip():
                self.refused.append((question, index, f"{self.client.what}: finish reason content_filter"))
                return
            response = Response(question.id, source, index, completion.text, completion.finish_reason)
            self.keep(question, response)
            self.result.thoughts_only += bool(completion.reasoning and not completion.text.strip())
        except EndpointError as e:
            if isinstance(e, RequestRefusedError) and not e.concerns_every_request:
                self.refused.append((question, index, str(e)))
                if self.result.new or self.result.already:
                    return  # the server answers others
            else:
                self.result.fail(question.id, str(e))
            self.failures_in_a_row += 1
            if isinstance(e, RequestRefusedError) and e.concerns_every_request:
                self.end(e)
            elif self.failures_in_a_row >= max(20, 2 * self.teacher.concurrency):
                self.end(EndpointError(f"{e}. Stopped after {self.failures_in_a_row} failures in a row"))
        except Exception as e:  # run() raises it
            self.end(e)
        finally:
            self.outstanding -= 1
            self.show(min(self.outstanding, self.teacher.concurrency))

    def end(self, error: Exception) -> None:
        """Make ``run`` stop all requests and raise the first such error."""
        self.fatal = self.fatal or error
        self.stop.set()

    def settle_refused(self) -> None:
        """Keep the refused responses if they are few, empty and with the finish reason "content_filter"."""
        result, share = self.result, self.recipe.collect.max_refused_share
        few = len(self.refused) <= max(self.recipe.collect.num_responses, share * result.total)
        for question, index, cause in self.refused:
            if few:
                self.keep(question, Response(question.id, result.source, index, "", "content_filter"))
                result.note(question.id, cause)
            else:
                result.fail(question.id, cause)
        if self.refused and not few:
            result.advice = (
                f"collect.max_refused_share: expected at most {share:g}, but {len(self.refused)} of {result.total}"
                " responses were refused. Remove these questions, or raise it."
            )
        self.show()


def take_batch(queue: WorkQueue, size: int) -> list[Work]:
    """Take up to ``size`` pieces of work; fewer if no more are available now."""
    batch: list[Work] = []
    while len(batch) < size and (work := queue.take()) is not None:
        batch.append(work)
    return batch


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each run of consecutive indices: [0, 1, 3] -> (0, 2), (3, 1)."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[start], i - start
            start = i
