"""The protocol of the contenders: the commands they receive and the measurements they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from openril.benchmarking.shapes import Precision, Shape

Part = Literal["update", "sampling", "prefill", "step", "memory"]
"""update: everything after the rewards, on given responses. sampling: 2G responses to each question. prefill: one token
of each (only ours). step: the whole step. memory: the whole step again, for its peak."""

LEARNING_RATE, BETA, EPSILON = 1e-6, 0.01, 0.2
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05}
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Spec:
    """The settings of a contender's process.

    name: trl, plain or ours. checkpoint: the weights that all share. pictures: PNG files in the order of their use.
    micro_batch_rows: rows (responses) per forward pass, for a contender that counts in rows. limit_memory: turn a lack of
    memory into an error of this process, before the system kills a process of its choice.
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
    """A request for one measurement. call: its number, which determines questions and responses alike for all contenders.
    group_size: 0 for the shape's."""

    part: Part
    call: int
    group_size: int = 0


@dataclass
class Measurement:
    """The measurement of one part.

    parts: the seconds of its pieces, as far as they can be separated. tokens: response tokens. cpu_seconds: processor time
    over all threads, to which waiting on a busy machine adds nothing. peak_memory, held_memory: bytes, for ``memory``;
    None where the system does not report them. fast_path_off: why pieces of the contender's fast path were not used.
    """

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
        """Report that the contender is set up. about: what the results repeat (settings, prompt length)."""

    def next(self) -> Command:
        """Wait for the next command. Raises Finished when there are no more."""
        ...

    def reply(self, measurement: Measurement) -> None: ...


class Finished(Exception):
    """The parent has no more commands."""


def exactly(lengths: Sequence[int], expected: int, who: str) -> None:
    """Raise RuntimeError unless every response has the expected number of tokens; else figures are not comparable."""
    if set(lengths) != {expected}:
        raise RuntimeError(f"{who}: expected responses of exactly {expected} tokens, got {sorted(set(lengths))}")


Serve = Callable[[Spec, Connection], None]
