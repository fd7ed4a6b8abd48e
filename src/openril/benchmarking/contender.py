"""What the contenders have in common: how they are told what to do, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from openril.benchmarking.shapes import Precision, Shape

Part = Literal["update", "sampling", "prefill", "step", "memory"]
"""update: everything after the rewards, on given responses. sampling: 2G responses a question. prefill: one token of
them (ours alone). step: the whole step. memory: the whole step again, for its peak."""

LEARNING_RATE, BETA, EPSILON = 1e-6, 0.01, 0.2
TEMPERATURE, TOP_P, TOP_K, REPETITION_PENALTY = 1.0, 0.95, 50, 1.05
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Spec:
    """What a contender's process is set up with.

    name: trl, plain or ours. checkpoint: the weights all share. pictures: PNG files in the order they are used.
    micro_batch_rows: rows (responses) per forward pass where the contender counts in rows. limit_memory: turn a lack of
    memory into an error of this process, before the system ends some process of its choice.
    """

    name: str
    shape: Shape
    checkpoint: str
    pictures: tuple[str, ...]
    folder: str
    device: Literal["cpu", "cuda"]
    precision: Precision
    parts: tuple[Part, ...]
    threads: int = 0
    micro_batch_rows: int = 0
    limit_memory: bool = True

    @property
    def picture_paths(self) -> list[Path]:
        return [Path(p) for p in self.pictures]


@dataclass(frozen=True)
class Command:
    """One measurement. call: its number, the same for all contenders, from which questions and responses follow.
    group_size: 0 for the shape's own."""

    part: Part
    call: int
    group_size: int = 0


@dataclass
class Measurement:
    """seconds: of the part. parts: seconds of what it consists of, as far as it can be told apart. tokens: response
    tokens. cpu_seconds: processor time over all threads, which a busy machine does not lengthen by waiting.
    peak_memory, held_memory: bytes, for ``memory``, None where the system does not report them. fast_path_off: why parts
    of the contender's fast path were not used, one sentence each."""

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    held_memory: int | None = None
    fast_path_off: tuple[str, ...] = ()


class Connection(Protocol):
    """The contender's end of the pipe."""

    def ready(self, about: dict[str, Any]) -> None:
        """Set up; about: what the results should say about this contender (settings, prompt length)."""

    def next(self) -> Command:
        """Blocks until there is something to do. Raises Finished when there will be nothing more."""
        ...

    def reply(self, measurement: Measurement) -> None: ...


class Finished(Exception):
    """The parent wants nothing more."""


def exactly(lengths: Sequence[int], wanted: int, who: str) -> None:
    """Raises RuntimeError unless every response has the wanted number of tokens: the figures would not compare."""
    if set(lengths) != {wanted}:
        raise RuntimeError(f"{who} drew responses of {sorted(set(lengths))} tokens instead of exactly {wanted}")


Serve = Callable[[Spec, Connection], None]
