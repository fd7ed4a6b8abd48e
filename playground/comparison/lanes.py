"""Run pieces of work in forked processes, several at a time, with a line of progress for each that ends."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from openril.report.progress import duration


@dataclass(frozen=True)
class Work:
    """A piece of work that leaves a file, so that it is not done twice."""

    name: str
    done: Path
    """The file that it leaves."""
    run: Callable[[], None]
    log: Path


def run_lanes(work: Sequence[Work], lanes: int, say: Callable[[str], None], deadline: float | None = None) -> list[str]:
    """Do what is not done, ``lanes`` at a time, in order. Return the names of what failed.

    The pieces run in forks of this process, each on one thread: a fork of a process that has used several waits for ever
    when it asks for them again. An interrupt ends them too; what was begun is
    begun again by the next call, or continued, if it saves.

    Args:
        deadline: ``time.time()`` from which no further piece is begun.
    """
    todo = deque(w for w in work if not w.done.exists())
    running: dict[int, tuple[Work, float]] = {}
    failed: list[str] = []
    began, total, ended = time.time(), len(todo), 0
    while (todo and not (deadline and time.time() > deadline)) or running:
        while todo and len(running) < lanes and not (deadline and time.time() > deadline):
            piece = todo.popleft()
            running[_fork(piece)] = (piece, time.time())
        pid, status = os.wait()
        piece, started = running.pop(pid)
        ended += 1
        if status or not piece.done.exists():
            failed.append(piece.name)
            say(f"  FAILED: {piece.name}, see {piece.log}")
            continue
        left = (time.time() - began) / ended * (total - ended)
        say(f"  [{ended}/{total}] {piece.name}: {duration(time.time() - started)}, about {duration(left)} left")
    return failed


def _fork(piece: Work) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        piece.log.parent.mkdir(parents=True, exist_ok=True)
        log = piece.log.open("w", encoding="utf-8", buffering=1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        torch.set_num_threads(1)
        piece.run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
