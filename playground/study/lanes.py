"""Jobs in two lanes: whatever comes first in their order, has what it needs, and is not done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from openril.errors import OpenRILError
from openril.report.progress import duration, figures
from openril.storage import read_jsonl
from playground.commands import end
from playground.study.jobs import Job

SHOW_EVERY = 20.0
"""Seconds between two looks at what is running."""
METRICS = {"train": "metrics.jsonl", "sft": "sft/metrics.jsonl", "discriminator": "discriminator/metrics.jsonl"}
"""Where a stage writes what it measures."""


class Lanes:
    """Runs jobs, ``number`` at a time, each in a process of its own with one thread.

    A job that fails is named with the end of its log, and what needs it is left out; the others go on.
    """

    def __init__(
        self, jobs: Sequence[Job], logs: Path, say: Callable[[str], None], number: int = 2, poll: float = 0.2
    ) -> None:
        self.jobs = list(jobs)
        self.logs = logs
        self.say = say
        self.number = number
        self.poll = poll
        self.finished = {job.name for job in jobs if job.done is not None}
        self.failed: dict[str, str] = {}
        self.running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}

    def run(self) -> dict[str, str]:
        """Until nothing is left to do; returns what failed, by name. Interrupted, it lets the running jobs save."""
        self.logs.mkdir(parents=True, exist_ok=True)
        shown = time.monotonic()
        try:
            while self._start_what_can() or self.running:
                time.sleep(self.poll)
                for name in list(self.running):
                    self._look_at(name)
                if time.monotonic() - shown > SHOW_EVERY and self.running:
                    shown = time.monotonic()
                    self.say("    " + "; ".join(filter(None, (self._news(job) for job, _, _ in self.running.values()))))
        finally:
            # Ask all of them first: they save side by side.
            for _, process, _ in self.running.values():
                if process.poll() is None:
                    process.terminate()
            for _, process, _ in self.running.values():
                end_gently(process)
        return self.failed

    def next_job(self) -> Job | None:
        """The first job that is not done, begun or doomed, and has what it needs."""
        for job in self.jobs:
            if job.name in self.finished or job.name in self.running or job.name in self.failed:
                continue
            if lost := [name for name in job.needs if name in self.failed]:
                self.failed[job.name] = f"needs {lost[0]}, which failed"
            elif all(name in self.finished for name in job.needs):
                return job
        return None

    def _start_what_can(self) -> bool:
        started = False
        while len(self.running) < self.number and (job := self.next_job()) is not None:
            started = True
            try:
                job.write_recipe()
            except OpenRILError as e:
                self._fail(job, str(e))
                continue
            arguments = ["playground.study.work", "--recipe", str(job.recipe_path), "--stage", job.stage]
            arguments += [*job.arguments, "--parent", str(os.getpid())]
            with open(self.log(job), "ab") as log:
                # A session of its own: Ctrl-C on the terminal reaches this process alone, which then asks once.
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
                )  # fmt: skip
            self.running[job.name] = (job, process, time.monotonic())
        return started

    def _look_at(self, name: str) -> None:
        job, process, began = self.running[name]
        code = process.poll()
        if code is None:
            return
        del self.running[name]
        if code or job.done is None:
            tail = "\n".join(self.log(job).read_text(errors="replace").splitlines()[-12:])
            self._fail(job, f"exit code {code}\n{tail}\n(all of it: {self.log(job)})")
            return
        self.finished.add(name)
        took = duration(time.monotonic() - began)
        self.say(f"  [{len(self.finished)}/{len(self.jobs)}] {name}: done in {took}; {self.left()}")

    def _fail(self, job: Job, why: str) -> None:
        self.failed[job.name] = why
        self.say(f"  {job.name} FAILED: {why}")

    def log(self, job: Job) -> Path:
        return self.logs / f"{job.name.replace('/', '_')}.log"

    def _news(self, job: Job) -> str:
        metrics = METRICS.get(job.stage)
        rows = read_jsonl(job.folder / metrics) if metrics else []
        if not rows:
            return job.name
        shown = [f"{label} {value}" for label, value in figures(rows[-1])[:4]]
        return f"{job.name}: step {rows[-1].get('step', '?')}" + (f", {', '.join(shown)}" if shown else "")

    def left(self) -> str:
        seconds = seconds_left(self.jobs, {*self.finished, *self.failed}, self._elapsed(), self.number)
        return f"about {duration(seconds)} left" if seconds else "nothing left"

    def _elapsed(self) -> dict[str, float]:
        now = time.monotonic()
        return {name: now - began for name, (_, _, began) in self.running.items()}


def end_gently(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was asked to stop; ``end`` it where it does not."""
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        end(process)


def seconds_left(jobs: Sequence[Job], over: set[str], elapsed: dict[str, float], lanes: int) -> float:
    """Expected seconds of the jobs that are not over, by how much the finished ones of their kind took more or less than
    expected (all finished ones, where there is none of a kind), shared by the lanes."""
    expected: dict[str, float] = {}
    measured: dict[str, float] = {}
    for job in jobs:
        done = job.done if job.name in over else None
        if done is not None:
            for kind in (job.kind, ""):
                expected[kind] = expected.get(kind, 0.0) + job.expected
                measured[kind] = measured.get(kind, 0.0) + done["seconds"]
    left = 0.0
    for job in jobs:
        if job.name not in over:
            kind = job.kind if job.kind in expected else ""
            factor = measured[kind] / expected[kind] if kind in expected else 1.0
            left += max(0.0, job.expected * factor - elapsed.get(job.name, 0.0))
    return left / lanes
