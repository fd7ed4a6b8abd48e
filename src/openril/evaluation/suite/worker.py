"""The process that evaluates one checkpoint on benchmarks: ``python -m openril.evaluation.suite.worker JOB.json``.

A separate process, because lmms-eval's modules read environment variables at import, seed random numbers and replace
library functions. Nothing of that reaches the process that started it. Progress goes to standard output as JSON lines.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from openril.errors import EndpointError, OpenRILError
from openril.evaluation.evaluate import GREEDY, Journal, stream_answers
from openril.evaluation.suite.benchmarks import LMMS_EVAL, Benchmark
from openril.evaluation.suite.judging import SuiteJudge
from openril.evaluation.suite.loading import LazyQuestions, OpenTask, Source, open_tasks
from openril.evaluation.suite.remote import RemoteSampler, keep_alive, say
from openril.evaluation.suite.results import BenchmarkResult, Scored, summarize
from openril.evaluation.suite.scoring import Answer, answer_text, refuse_judge, score_task
from openril.evaluation.summary import TOO_LONG, Row
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.storage import read_jsonl, write_json, write_jsonl

IMAGE_LIMITS = ("min_pixels", "max_pixels", "min_patches", "max_patches", "crop_to_patches", "max_image_size")
"""Settings of image processors that limit pixels and tiles, besides ``size``."""
WAIT = 0.5
"""Seconds between two looks for the answers of other processes."""


@dataclass(frozen=True)
class Job:
    """What the worker does.

    Args:
        action: "evaluate", or "check" to say which data sets are here.
        folder: The checkpoint's folder of results.
        key: What answers depend on besides the question.
        result_key: What scores depend on.
        remote: The process that started the worker answers the questions (``remote.RemoteSampler``).
        rank, world: This worker answers every ``world``-th question from number ``rank``. The one of rank 0 waits for the
            answers of the others, and scores.
    """

    action: str
    recipe: dict[str, Any]
    benchmarks: list[dict[str, Any]]
    checkpoint: str = ""
    folder: str = ""
    key: str = ""
    result_key: str = ""
    use_judge: bool = True
    remote: bool = False
    rank: int = 0
    world: int = 1

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def evaluate(job: Job) -> None:
    """Answer and score the benchmarks one after the other. One that fails does not stop the others."""
    recipe = Recipe.model_validate(job.recipe)
    folder = Path(job.folder)
    with ExitStack() as stack:
        judge = None
        if job.use_judge and job.rank == 0:
            judge = SuiteJudge(recipe.judge, folder / "judge.jsonl")
            stack.callback(judge.close)
        student = _Student(recipe, job, folder, stack)
        for fields in job.benchmarks:
            benchmark = Benchmark(**{**fields, "subtasks": tuple(fields["subtasks"])})
            if job.rank:
                tasks: list[OpenTask] = []
                with suppress(Exception):  # rank 0 meets it too, and reports it
                    tasks = open_tasks(benchmark, _source(recipe), recipe.eval.limit)
                for task in tasks:
                    student.answer(task, len(task.numbers))
                continue
            try:
                result, scored = _one(benchmark, recipe, student, judge)
            except EndpointError:
                raise
            except Exception as e:  # lmms-eval's own errors are of every kind, and must not look like a score
                known = isinstance(e, OpenRILError)
                message = str(e) if known else f"{type(e).__name__}: {e}"
                result, scored = (
                    BenchmarkResult(benchmark.task, benchmark.column, 0, None, None, None, failed=message),
                    [],
                )
                if not known:
                    import traceback

                    traceback.print_exc()
            write_jsonl(folder / f"{benchmark.task}.jsonl", map(asdict, scored))
            write_json(folder / f"{benchmark.task}.json", {"key": job.result_key, **result.as_dict()})
            say(event="result", **result.as_dict())


def _one(
    benchmark: Benchmark, recipe: Recipe, student: _Student, judge: SuiteJudge | None
) -> tuple[BenchmarkResult, list[Scored]]:
    tasks = open_tasks(benchmark, _source(recipe), recipe.eval.limit)
    if not benchmark.metric:  # a task outside the fourteen: its first metric
        refuse_judge(tasks[0])
        benchmark = Benchmark(benchmark.column, benchmark.task, str(tasks[0].task.config.metric_list[0]["metric"]))
        tasks[0].benchmark = benchmark
    started, total = time.monotonic(), sum(len(t.numbers) for t in tasks)
    scored: list[Scored] = []
    figures: dict[str, float] = {}
    cut = 0
    for task in tasks:
        rows = student.answer(task, total)
        cut += sum(row.finish_reason == "length" for row in rows)
        answers = [
            Answer(number, None if row.finish_reason == TOO_LONG else answer_text(task, row.text))
            for number, row in zip(task.numbers, rows, strict=True)
        ]
        units, figures[task.name] = score_task(task, answers, judge if benchmark.judge != "never" else None)
        scored += units
    weights = {task.name: len(task.numbers) if benchmark.strata != "task" else 1 for task in tasks}
    figure = sum(weights[name] * value for name, value in figures.items()) / sum(weights.values())
    details = {
        "questions": total,
        "lmms_eval": importlib.metadata.version(LMMS_EVAL),
        "task_version": tasks[0].version,
        "prompt_variant": "default",
        "max_new_tokens": student.limit(tasks[0]),
        "image_limits": student.image_limits,
        "judge": recipe.judge.model if judge is not None and benchmark.judge != "never" else None,
        "eval_method": ("openai" if judge else "static") if benchmark.judge == "extraction" else None,
        "data": {task.name: task.fingerprint for task in tasks},
        "lmms_eval_scores": figures,
        "seconds": round(time.monotonic() - started, 1),
    }
    shares = recipe.judge.max_unknown_share
    result = summarize(
        benchmark.task, benchmark.column, scored, figure, cut=cut, max_unknown_share=shares, details=details
    )
    return result, scored


def _source(recipe: Recipe) -> Source:
    return Source(Path(recipe.eval.suite_data).expanduser() if recipe.eval.suite_data else None)


class _Student:
    """The student, which is loaded when its first answer is needed. Its answers are kept as they come."""

    def __init__(self, recipe: Recipe, job: Job, folder: Path, stack: ExitStack) -> None:
        self.recipe, self.job, self.stack = recipe, job, stack
        self.journal = Journal(folder / (f"answers.{job.rank}.jsonl" if job.rank else "answers.jsonl"), job.key)
        self.others: dict[str, Row] = {}
        self.sampler: Any = RemoteSampler() if job.remote else None

    @cached_property
    def image_limits(self) -> dict[str, Any]:
        """What the processor's settings say about the size of images and the number of tiles."""
        from openril.models.loading import load_processor

        student = self.recipe.student
        with _as_before():
            processor = load_processor(
                self.job.checkpoint,
                trust_remote_code=student.trust_remote_code,
                min_pixels=student.min_pixels,
                max_pixels=student.max_pixels,
            )
        settings = processor.image_processor.to_dict()
        found = {key: settings.get(key) for key in IMAGE_LIMITS}
        found["grids"] = len(settings.get("image_grid_pinpoints") or ())
        found |= {key: settings["size"][key] for key in settings.get("size") or {} if settings["size"][key]}
        return {key: value for key, value in found.items() if value}

    def limit(self, task: OpenTask) -> int:
        """Return the limit of an answer in tokens."""
        own = task.max_new_tokens or self.recipe.eval.max_completion_length
        return min(own, self.recipe.eval.suite_max_tokens or own)

    def answer(self, task: OpenTask, total: int) -> list[Row]:
        """Return the answers to a task's questions in their order."""
        kept = {"data": task.fingerprint, "max_new_tokens": str(self.limit(task))}
        missing = self._missing(task, kept)
        todo = [n for n in missing if n % self.job.world == self.job.rank]
        if todo:
            questions = LazyQuestions(task, todo)
            options = {
                "settings": GREEDY,
                "max_completion_length": self.limit(task),
                "seed": 0,
                "source": "student",
            }
            size = self.recipe.eval.questions_per_batch
            done = len(task.numbers) - len(missing)
            sampler = self._open(questions)
            with closing(stream_answers(sampler, questions, size, _counted_later, options)) as arrived:
                for batch, drawn in arrived:
                    rows = []
                    for question, responses in zip(batch, drawn, strict=True):
                        row = Row(question.id, "", "", "", TOO_LONG, groups=kept)
                        if responses:
                            first = responses[0]
                            tokens = len(first.token_ids) if first.token_ids is not None else None
                            row = Row(question.id, "", "", first.text, first.finish_reason, tokens, groups=kept)
                        rows.append(row)
                    self.journal.add(rows)
                    done += len(rows)
                    say(event="answers", task=task.name, done=done, total=len(task.numbers), of=total)
        while self.job.rank == 0 and (missing := self._missing(task, kept)):
            done = len(task.numbers) - len(missing)
            say(event="answers", task=task.name, done=done, total=len(task.numbers), of=total)
            time.sleep(WAIT)
        return [found for n in task.numbers if (found := self._row(task, n, kept)) is not None]

    def _row(self, task: OpenTask, number: int, kept: dict[str, str]) -> Row | None:
        """Return the answer, by any process, to the same data with the same limit."""
        rows = (self.journal.rows.get(f"{task.name}/{number}"), self.others.get(f"{task.name}/{number}"))
        return next((found for found in rows if found is not None and found.groups == kept), None)

    def _missing(self, task: OpenTask, kept: dict[str, str]) -> list[int]:
        for path in self.journal.path.parent.glob("answers*.jsonl"):
            head, *rows = read_jsonl(path) or [{}]
            if path != self.journal.path and head.get("key") == self.job.key:
                self.others |= {row["question_id"]: Row(**row) for row in rows if "question_id" in row}
        return [n for n in task.numbers if self._row(task, n, kept) is None]

    def _open(self, questions: LazyQuestions) -> Any:
        if self.sampler is None:
            from openril.sampling.checkpoint_sampler import open_sampler

            with _as_before():
                opened = open_sampler(
                    self.recipe, self.job.checkpoint, questions[:1], self.recipe.eval.questions_per_batch
                )
                self.sampler = self.stack.enter_context(opened)
        return self.sampler


def _counted_later(question: Question, tokens: int) -> None:
    """A question that is too long has its own row, and its score is unknown."""


@contextmanager
def _as_before() -> Iterator[None]:
    """Keep what is printed while a model loads away from standard output, which carries the events."""
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        yield


def check(job: Job) -> None:
    """Say for each benchmark how many questions and bytes are here, or what is missing."""
    recipe = Recipe.model_validate(job.recipe)
    for fields in job.benchmarks:
        benchmark = Benchmark(**{**fields, "subtasks": tuple(fields["subtasks"])})
        try:
            tasks = open_tasks(benchmark, _source(recipe), recipe.eval.limit)
            size = sum(int(t.docs.data.nbytes) for t in {id(t.docs): t for t in tasks}.values())
            say(event="data", task=benchmark.task, questions=sum(len(t.numbers) for t in tasks), bytes=size)
        except Exception as e:
            say(event="data", task=benchmark.task, missing=str(e) or type(e).__name__)


def main(path: str) -> int:
    """Run a job and return the exit code. Errors of a user's making are one event."""
    import torch

    from openril import hf

    _ = hf  # declares torchvision's missing operators before lmms-eval imports transformers
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    job = Job.read(Path(path))
    if job.remote:
        keep_alive()
    try:
        {"evaluate": evaluate, "check": check}[job.action](job)
    except OpenRILError as e:
        say(event="error", message=str(e), kind=type(e).__name__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
