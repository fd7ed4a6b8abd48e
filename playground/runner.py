"""Run commands as jobs: several at a time, each in its own process with a log file, under one progress display."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openril.errors import OpenRILError
from openril.report.progress import duration, figures
from openril.storage import read_jsonl, write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

LINE_EVERY = 15.0
"""Seconds between two lines of progress where the output is not a terminal."""
PATIENCE = 60.0
"""Seconds that an interrupted process has for saving before it is killed."""

Progress = tuple[int, int, str]
"""What is done, what there is to do, and figures to show."""


@dataclass(kw_only=True)
class Job:
    """A command that leaves a result, so that it is not run a second time."""

    name: str
    """Unique among the jobs that run together."""
    arguments: tuple[str, ...]
    """What follows ``python -m``."""
    needs: tuple[str, ...] = ()
    """Names of the jobs that have to be done first. Names that are not among the jobs count as done."""
    expected: float = 20.0
    """Seconds that it takes, roughly."""
    kind: str = ""
    """The expected seconds of all jobs of one kind are assumed to be wrong by the same factor."""

    def seconds(self) -> float | None:
        """Return the seconds that the job took (0 if nobody knows), or None while it is not done."""
        return None

    def prepare(self) -> None:
        """Write what the command reads, just before it starts. May raise OpenRILError."""

    def progress(self) -> Progress:
        return 0, 0, ""

    def share(self) -> float:
        done, total, _ = self.progress()
        return min(1.0, done / total) if total else 0.0

    @property
    def shown(self) -> str:
        """The command as a person types it."""
        module, *rest = self.arguments
        return " ".join(["ril", *rest] if module == "openril.cli" else ["python -m", module, *rest])


def metrics_progress(path: Path, total: int) -> Progress:
    """Return the progress of a training that writes a ``metrics.jsonl``."""
    rows = read_jsonl(path)
    if not rows:
        return 0, total, ""
    return int(rows[-1].get("step", 0)), total, ", ".join(f"{label} {value}" for label, value in figures(rows[-1])[:4])


class Clock:
    """Wall-clock seconds spent in a folder, summed over all calls and kept in a file.

    The seconds of a killed call count up to its last ``tick``. The time between calls does not count.
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
        return round(round(self.seconds, 1) / 60, 1)

    def tick(self, every: float = 0.0) -> None:
        """Write the file, unless it was written less than ``every`` seconds ago."""
        if self._started is not None and self._now() - self._written >= every:
            self._written = self._now()
            write_json(self.path, {"seconds": round(self.seconds, 1)})

    def stop(self) -> None:
        """Leave out the time of this call."""
        self._started = None


class Runner:
    """Runs jobs, ``width`` at a time: always the first one that is not done and has what it needs.

    A job that fails is reported with the end of its log, and the jobs that need it are left out. With ``keep_going`` the
    others still run; without it the first failure raises OpenRILError. An interrupt of this process (Ctrl-C) interrupts
    the running commands once, so that they save and end. When this process is killed, they are killed with it.
    """

    def __init__(
        self, jobs: Sequence[Job], logs: Path, console: Console, *, width: int = 2, clock: Clock | None = None,
        keep_going: bool = False,
    ) -> None:  # fmt: skip
        self.jobs = {job.name: job for job in jobs}
        self.logs, self.console, self.width, self.clock, self.keep_going = logs, console, width, clock, keep_going
        self.finished = {job.name: seconds for job in jobs if (seconds := job.seconds()) is not None}
        """Seconds by job."""
        self.failed: dict[str, str] = {}
        self.running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        """Process and start time by job."""

    def run(self) -> dict[str, str]:
        """Run until nothing is left to do. Returns the reasons of the failures by job."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        terminal = self.console.is_terminal
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        bars = Progress(
            TextColumn("  {task.description}"), *columns, console=self.console, transient=True, disable=not terminal
        )
        self.logs.mkdir(parents=True, exist_ok=True)
        shown = time.monotonic()
        try:
            with bars:
                while self._start() or self.running:
                    time.sleep(0.1)
                    for name in list(self.running):
                        self._look_at(name)
                    if self.clock:
                        self.clock.tick(every=3.0)
                    if self.running and time.monotonic() - shown > (1.0 if terminal else LINE_EVERY):
                        shown = time.monotonic()
                        self._show(bars)
        finally:
            end(*(process for process, _ in self.running.values()))
            if self.clock:
                self.clock.tick()
        return self.failed

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def next_job(self) -> Job | None:
        """Return the first job that can start now."""
        for name, job in self.jobs.items():
            if name in self.finished or name in self.running or name in self.failed:
                continue
            if lost := [need for need in job.needs if need in self.failed]:
                self.failed[name] = f"needs {lost[0]}, which failed"
            elif all(need in self.finished or need not in self.jobs for need in job.needs):
                return job
        return None

    def _start(self) -> bool:
        started = False
        while len(self.running) < self.width and (job := self.next_job()) is not None:
            started = True
            try:
                job.prepare()
            except OpenRILError as e:
                self._fail(job, str(e))
                continue
            self.say(f"  $ {job.shown}")
            with open(self.log(job), "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", *job.arguments],
                    stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
                    # In a separate session, Ctrl-C reaches this process alone, which then interrupts the command once.
                    # A second interrupt would end a training without saving.
                    start_new_session=True,
                    preexec_fn=partial(_die_with_parent, os.getpid()),
                )  # fmt: skip
            self.running[job.name] = (process, time.monotonic())
        return started

    def _look_at(self, name: str) -> None:
        job, (process, began) = self.jobs[name], self.running[name]
        code = process.poll()
        if code is None:
            return
        del self.running[name]
        if code or job.seconds() is None:
            tail = "\n".join(self.log(job).read_text(errors="replace").splitlines()[-15:])
            self._fail(job, f"failed with exit code {code}: {job.shown}\n{tail}\n(complete log: {self.log(job)})")
            return
        self.finished[name] = time.monotonic() - began
        self.say(f"  [{len(self.finished)}/{len(self.jobs)}] {name}: done in {duration(self.finished[name])}")

    def _fail(self, job: Job, why: str) -> None:
        self.failed[job.name] = why
        if not self.keep_going:
            raise OpenRILError(f"{job.name} {why}")
        self.say(f"  {job.name} FAILED: {why}")

    def log(self, job: Job) -> Path:
        return self.logs / f"{job.name.replace('/', '_').replace(' ', '_')}.log"

    def seconds_left(self) -> float:
        shares = {name: self.jobs[name].share() for name in self.running}
        return seconds_left(
            self.jobs.values(), self.finished, {**shares, **dict.fromkeys(self.failed, 1.0)}, self.width
        )

    def _show(self, bars: Bars) -> None:
        for task in bars.task_ids:
            bars.remove_task(task)
        parts = []
        for name in self.running:
            done, total, state = self.jobs[name].progress()
            parts.append(f"{name} {done}/{total}" + (f" ({state})" if state else ""))
            bars.add_task(name, completed=done, total=total, state=state)
        spent = f"{duration(self.clock.seconds)} so far, " if self.clock else ""
        state = f"{spent}about {duration(self.seconds_left())} left"
        bars.add_task("jobs", completed=len(self.finished), total=len(self.jobs), state=state)
        if not self.console.is_terminal:
            self.say(f"    {'; '.join(parts)}; {state}")


def seconds_left(jobs: Iterable[Job], finished: Mapping[str, float], shares: Mapping[str, float], width: int) -> float:
    """Estimate the seconds until all jobs are done.

    Args:
        finished: Seconds of the jobs that are done. The jobs left are expected to be wrong by the same factor as the
            finished ones of their kind, or as all finished ones.
        shares: Share of each running job that is done, in [0, 1].
        width: How many jobs run at a time.
    """
    jobs = list(jobs)

    def factor(kind: str | None) -> float | None:
        measured = [job for job in jobs if finished.get(job.name) and kind in (job.kind, None)]
        return sum(finished[job.name] for job in measured) / sum(job.expected for job in measured) if measured else None

    left = [
        job.expected * (1 - shares.get(job.name, 0.0)) * (factor(job.kind) or factor(None) or 1.0)
        for job in jobs
        if job.name not in finished
    ]
    return max([sum(left) / width, *left])


# Processes


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent(parent: int) -> None:
    """Run in the child: have it killed when its parent dies, because two trainings must never write one run folder."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # The parent died before the call.
            os._exit(1)


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Interrupt processes, wait until all have saved, and kill those that do not end."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    until = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_code(name: str, body: Callable[[], int]) -> int:
    """Run the body of a command that can be stopped and given again.

    Returns:
        What the body returns, 2 for an error that the user can fix, 130 after an interrupt. Both are printed.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return body()
    except OpenRILError as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"{name}: {str(e) or 'interrupted; the same command continues'}", file=sys.stderr)
        return 130
