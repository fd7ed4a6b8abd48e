"""The demo's commands: in which order they run, how far each is, and how long all of it will take."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from openril.recipe.schema import Recipe
from openril.report.progress import duration, figures
from openril.storage import read_jsonl, write_json
from playground.commands import Command
from playground.demo_results import CONTENDERS, evaluation_file, read_evaluation, read_world

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Progress = Callable[[], tuple[int, str]]
"""How much is done, and figures worth showing."""


@dataclass(frozen=True)
class Job:
    """cost: seconds it takes on the machine where it was measured, for the time left. total: what ``progress`` counts to."""

    command: Command
    cost: float
    total: int
    progress: Progress


# Seconds on one core of the machine where they were measured; only their proportions matter.
STARTING = 8.0
PER_COLLECTED_RESPONSE = 0.003
PER_DISCRIMINATOR_STEP = 0.55
PER_TRAINING_STEP = {"dr_grpo": 1.2, "ril_one": 3.6, "ril": 3.6}
PER_ANSWER = 0.02


def plan(out: Path, recipes: Mapping[str, Recipe]) -> list[Job]:
    """What is left to do, in the order of its urgency: Dr.GRPO needs no responses, so it trains while they are collected.

    recipes: of the runs ril, ril_one and dr_grpo.
    """
    test = read_world(out, "test")
    jobs = []
    for run, recipe in recipes.items():
        if recipe.uses_discriminator and not (recipe.discriminator_path / "config.json").is_file():
            jobs.append(_discriminator(out, run, recipe))
    trainings = {run: _training(out, run, recipe) for run, recipe in recipes.items() if not _trained(recipe)}
    jobs += [trainings[run] for run in trainings if run != "dr_grpo"]
    for name, contender in CONTENDERS.items():
        if read_evaluation(out, name, test) is None:
            jobs.append(_evaluation(out, name, contender.run, len(test)))
    collect = [_collection(out, recipes["ril"])] if any("collect" in job.command.after for job in jobs) else []
    return [*collect, *(trainings[run] for run in trainings if run == "dr_grpo"), *jobs]


def _recipe(out: Path, run: str) -> str:
    return str(out / "recipes" / f"{run}.yaml")


def _trained(recipe: Recipe) -> bool:
    try:
        finished = json.loads((recipe.run_path / "finished.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return int(finished["step"]) >= recipe.train.max_steps and (recipe.run_path / "student" / "config.json").is_file()


def _collection(out: Path, recipe: Recipe) -> Job:
    questions = len(read_jsonl(out / "world" / "train.jsonl"))
    sources = len(recipe.teachers) + recipe.collect.student
    total = min(questions, recipe.data.limit or questions) * recipe.collect.num_responses * sources
    command = Command("collect", ("openril.cli", "collect", _recipe(out, "ril")))

    def progress() -> tuple[int, str]:
        return collected(recipe.cache_path), "responses"

    return Job(command, STARTING + total * PER_COLLECTED_RESPONSE, total, progress)


def collected(cache: Path) -> int:
    """Responses in a cache, those on their way included."""
    import pyarrow.parquet as pq

    from openril.errors import CacheError

    try:
        lines = sum(max(0, len(p.read_bytes().splitlines()) - 1) for p in (cache / "journals").glob("*.jsonl"))
        return lines + sum(pq.read_metadata(p).num_rows for p in (cache / "shards").glob("*.parquet"))
    except (FileNotFoundError, CacheError):
        return 0  # a journal just turned into a shard; the next look counts it


def _discriminator(out: Path, run: str, recipe: Recipe) -> Job:
    settings = recipe.discriminator.pretraining
    questions = len(read_jsonl(out / "world" / "train.jsonl"))
    learnt = min(questions, recipe.data.limit or questions) * (1 - settings.held_out_share)
    steps = max(1, math.ceil(settings.epochs * learnt / settings.questions_per_step))
    command = Command(f"{run} discriminator", ("openril.cli", "discriminator", _recipe(out, run)), after=("collect",))
    return Job(
        command,
        STARTING + steps * PER_DISCRIMINATOR_STEP,
        steps,
        lambda: _last_row(recipe.run_path / "discriminator" / "metrics.jsonl"),
    )


def _training(out: Path, run: str, recipe: Recipe) -> Job:
    steps = recipe.train.max_steps
    after = (f"{run} discriminator", "collect") if recipe.uses_discriminator else ()
    command = Command(f"{run} train", ("openril.cli", "train", _recipe(out, run)), after=after)
    return Job(
        command,
        STARTING + steps * PER_TRAINING_STEP[run],
        steps,
        lambda: _last_row(recipe.run_path / "metrics.jsonl"),
    )


def _last_row(path: Path) -> tuple[int, str]:
    rows = read_jsonl(path)
    if not rows:
        return 0, ""
    return int(rows[-1].get("step", 0)), ", ".join(f"{label} {value}" for label, value in figures(rows[-1])[:4])


def _evaluation(out: Path, name: str, run: str, questions: int) -> Job:
    """The starting student is scored in the folder of the run with both teachers, as its table's first row."""
    checkpoint = out / "models" / "student" if name == "sft" else out / run / "student"
    arguments = (
        "openril.cli", "eval", _recipe(out, run), "--checkpoints", str(checkpoint),
        "--data.validation", str(out / "world" / "test.jsonl"), "--eval.limit", "0",
    )  # fmt: skip
    # Two evaluations must not write one folder's table at once.
    after = {"sft": (), "ril_both": ("ril train", "sft eval")}.get(name, (f"{run} train",))
    title = f"{'sft' if name == 'sft' else run} eval"
    journal = evaluation_file(out, name)

    def progress() -> tuple[int, str]:
        scores = [row["score"] for row in read_jsonl(journal) if "question_id" in row]
        return len(scores), f"right {sum(s or 0 for s in scores) / len(scores):.0%}" if scores else ""

    return Job(Command(title, arguments, after=after), STARTING + questions * PER_ANSWER, questions, progress)


class Clock:
    """Wall-clock seconds spent on a demo, over all its calls, kept in a file.

    What a killed call did counts up to the last ``tick`` (every few seconds), and so does what has to be done again for
    it; the time between calls does not.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.path, self._now = path, now
        self._before = float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0
        self._started: float | None = now()
        self._written = now()

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._started is None else self._now() - self._started)

    @property
    def minutes(self) -> float:
        """As the file will say them."""
        return round(round(self.seconds, 1) / 60, 1)

    def tick(self) -> None:
        """Write the file."""
        if self._started is not None:
            self._written = self._now()
            write_json(self.path, {"seconds": round(self.seconds, 1)})

    def tick_sometimes(self, every: float = 3.0) -> None:
        if self._now() - self._written > every:
            self.tick()

    def stop(self) -> None:
        """Leave this call out."""
        self._started = None


class Board:
    """What the screen shows while the commands run: bars on a terminal, a line every quarter of a minute elsewhere."""

    QUIET = 15.0

    def __init__(self, jobs: Sequence[Job], clock: Clock, console: Console, width: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.jobs = {job.command.title: job for job in jobs}
        self.clock, self.console, self.width = clock, console, width
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started = self._said = time.monotonic()
        self._at_start = {title: self._share(job) for title, job in self.jobs.items()}

    def __enter__(self) -> Board:
        self._bars.start()
        self._all = self._bars.add_task("everything", total=100, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self.clock.tick()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _share(self, job: Job) -> float:
        return min(1.0, job.progress()[0] / max(1, job.total))

    def watch(self, running: Sequence[Command], done: Sequence[Command]) -> None:
        self.clock.tick_sometimes()
        if not self.console.is_terminal and time.monotonic() - self._said < self.QUIET:
            return
        self._said = time.monotonic()
        shares = {command.title: 1.0 for command in done}
        lines = []
        for command in running:
            job = self.jobs[command.title]
            number, state = job.progress()
            shares[command.title] = min(1.0, number / max(1, job.total))
            lines.append(f"{command.title} {number}/{job.total}" + f" ({state})" * bool(state))
            self._bar(command.title, number, job.total, state)
        for title in set(self._tasks) - {command.title for command in running}:
            self._bars.remove_task(self._tasks.pop(title))
        left = self.left(shares, time.monotonic() - self._started)
        text = f"{duration(self.clock.seconds)} so far" + (f", about {duration(left)} left" if left is not None else "")
        if self.console.is_terminal:
            self._bars.update(self._all, completed=int(100 * self._part_done(shares)), state=text)
        else:
            self.say(f"    {'; '.join(lines)}; {text}")

    def _bar(self, title: str, number: int, total: int, state: str) -> None:
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=total, state="")
        self._bars.update(self._tasks[title], completed=number, state=state)

    def _part_done(self, shares: Mapping[str, float]) -> float:
        done = sum(job.cost * shares.get(title, self._at_start[title]) for title, job in self.jobs.items())
        return done / sum(job.cost for job in self.jobs.values())

    def left(self, shares: Mapping[str, float], seconds: float) -> float | None:
        """Seconds left, from the planned costs and the pace so far; None before there is a pace. shares: how much of each
        command is done, in [0, 1]; those left out are as they were at the start."""
        done = todo = 0.0
        for title, job in self.jobs.items():
            share = shares.get(title, self._at_start[title])
            done += job.cost * max(0.0, share - self._at_start[title])
            todo += job.cost * (1 - share)
        return todo * seconds / done if done > 0 and seconds > 20 else None
