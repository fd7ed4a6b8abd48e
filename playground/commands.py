"""Running this project's commands one after the other and side by side, with their output in log files."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

from openril.errors import OpenRILError
from openril.storage import read_jsonl


@dataclass(frozen=True)
class Command:
    """title: how it is called on the screen, unique among those that run together. arguments: behind ``python -m``.
    metrics: a metrics.jsonl to look at while it runs, if it writes one. after: titles of commands that have to be done
    before; titles that are not there count as done."""

    title: str
    arguments: tuple[str, ...]
    metrics: Path | None = None
    after: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """As a person would type it."""
        module, *rest = self.arguments
        return " ".join(["ril", *rest] if module == "openril.cli" else ["python -m", module, *rest])


Lane = Sequence[Command]
"""Commands that run one after the other."""

Watch = Callable[[Sequence[Command], Sequence[Command]], None]
"""Told now and then: what runs, and what is done."""


def run_lanes(lanes: Sequence[Lane], logs: Path, say: Callable[[str], None], threads: int = 1) -> None:
    """Run the lanes side by side, each in its order; see ``run_queue``."""
    chained = [
        replace(command, after=(*command.after, *(before.title for before in lane[max(0, place - 1) : place])))
        for lane in lanes
        for place, command in enumerate(lane)
    ]
    run_queue(chained, logs, say, width=len(lanes), threads=threads, watch=_Teller(say), every=15.0)


def run_queue(
    commands: Sequence[Command],
    logs: Path,
    say: Callable[[str], None],
    *,
    width: int = 2,
    threads: int = 1,
    watch: Watch = lambda running, done: None,
    every: float = 1.0,
) -> None:
    """Run all commands, ``width`` at a time: always the first that waits for nothing.

    threads: of each. watch: called every ``every`` seconds. Raises OpenRILError with the end of its log when a command
    fails. Then, and when this process is asked to end (Ctrl-C, SIGTERM, a closed terminal), those that run are
    interrupted once, save, and end; should this process be killed, they are killed with it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    left, done = list(commands), list[Command]()
    running: list[tuple[Command, subprocess.Popen[bytes], float]] = []
    looked = time.monotonic()
    with _signals_interrupt():
        try:
            while running or left:
                waits = {command.title for command in left} | {command.title for command, _, _ in running}
                for command in [c for c in left if not waits.intersection(c.after)][: width - len(running)]:
                    left.remove(command)
                    say(f"  $ {command.shown}")
                    running.append((command, _start(command, logs, threads), time.monotonic()))
                assert running, f"commands wait for each other: {[c.title for c in left]}"
                time.sleep(0.1)
                for entry in list(running):
                    command, process, started = entry
                    code = process.poll()
                    if code is None:
                        continue
                    running.remove(entry)
                    if code:
                        raise OpenRILError(_failure(command, code, logs))
                    done.append(command)
                    say(f"  {command.title}: done in {time.monotonic() - started:.0f} s")
                if time.monotonic() - looked > every:
                    looked = time.monotonic()
                    watch([command for command, _, _ in running], done)
        finally:
            end(*(process for _, process, _ in running))


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt like Ctrl-C while the block runs, so that children are ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _environment(threads: int) -> dict[str, str]:
    values = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **values}


def _log(command: Command, logs: Path) -> Path:
    return logs / f"{command.title.replace(' ', '_')}.log"


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent(parent: int) -> None:
    """In the child: two trainings must never write one run folder, so nothing outlives a killed parent."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def _start(command: Command, logs: Path, threads: int) -> subprocess.Popen[bytes]:
    with open(_log(command, logs), "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(threads),
            # A session of its own: Ctrl-C reaches this process alone, which then asks once. (A second interrupt would
            # end a training without saving.)
            start_new_session=True,
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )


def _failure(command: Command, code: int, logs: Path) -> str:
    path = _log(command, logs)
    tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
    return f"{command.title} failed with exit code {code}: {command.shown}\n{tail}\n(all of it: {path})"


class _Teller:
    """A line about all that runs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def __call__(self, running: Sequence[Command], done: Sequence[Command]) -> None:
        news = [line for command in running if (line := _news(command))]
        if news:
            self.say("    " + "; ".join(news))


def _news(command: Command) -> str:
    rows = read_jsonl(command.metrics) if command.metrics else []
    if not rows:
        return ""
    loss = next((value for key, value in rows[-1].items() if key.endswith("loss")), None)
    return f"{command.title}: step {rows[-1].get('step', '?')}" + (f", loss {loss:.3f}" if loss is not None else "")


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Interrupt processes of ours, wait for them to save, side by side, and end those that do not."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    until = time.monotonic() + 30
    for process in processes:
        try:
            process.wait(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answer(name: str, body: Callable[[], int]) -> int:
    """Exit code of a command that can be stopped and given again: what its body returns, 2 where the user has to do
    something (which is said), 130 for an interrupt."""
    try:
        return body()
    except OpenRILError as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        return 130
