"""Stop a long command at a step boundary: Ctrl-C and SIGTERM are noted, the state is saved, then the command ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Raised after a run that was asked to stop has saved its state."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list that receives the number of every SIGINT or SIGTERM. A second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, so the caller handles signals
        yield received
        return
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
