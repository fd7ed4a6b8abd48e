"""Choose the shapes, parts and contenders that a run of the benchmark measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openril.benchmarking.shapes import Precision, Shape, grid_of
from openril.benchmarking.worker import Part

CONTENDERS = ("trl", "plain", "ours")
"""The contenders in the order of their turns."""

DEFAULT_PRECISION: Precision = "bfloat16"
"""The default of ``train.precision``."""

SWEEP = (4, 8, 16, 32)
"""The group sizes 2G for the cost of an update against 2G."""


@dataclass(frozen=True)
class Cell:
    """One shape, of which every round measures every part with every contender in turn.

    memory: run one more step for its peak. sweep: group sizes for which ours also measures the update. together: whether
    the processes of all contenders run at once; otherwise, where the device cannot hold them, one after the other.
    """

    shape: Shape
    contenders: tuple[str, ...] = CONTENDERS
    parts: tuple[Part, ...] = ("update", "sampling", "step")
    rounds: int = 3
    memory: bool = True
    sweep: tuple[int, ...] = ()
    together: bool = True

    def parts_of(self, contender: str) -> tuple[Part, ...]:
        """Return what a contender measures in each round. Plain and ours share their sampling, so only ours measures it."""
        left_to_ours = {"ours": (), "plain": ("sampling", "prefill"), "trl": ("prefill",)}[contender]
        return tuple(p for p in self.parts if p not in left_to_ours)

    def warm_up(self, contender: str) -> tuple[Part, ...]:
        """Return what a contender runs once before the measurements, so that optimizer states and caches exist."""
        parts = self.parts_of(contender)
        whole = contender != "trl" and self.memory  # our step's own optimizer is the discriminator's
        return ("step",) if "step" in parts or whole else parts

    @property
    def calls(self) -> int:
        """The largest number of measurements of one contender. Each has its own questions."""
        return len(self.warm_up("ours")) + 1 + self.rounds * (len(self.parts) + len(self.sweep)) + self.memory


@dataclass(frozen=True)
class Plan:
    """The cells in order. short, long, wide: the names of the shapes whose figures are the headline."""

    cells: tuple[Cell, ...]
    short: str
    long: str
    wide: str


def make_plan(
    *,
    quick: bool,
    device: str,
    shapes: Sequence[Shape],
    contenders: Sequence[str] = CONTENDERS,
    repeats: int = 0,
    precision: Precision = "float32",
) -> Plan:
    """Choose the cells of a run. shapes: measured with all parts instead of the plan's own. repeats: rounds of each cell,
    0 for the plan's own number. precision: that of the run; unless it is the loop's default, one more cell has that."""
    gpu = device == "cuda"
    model = "qwen2_5_vl_3b" if gpu else "tiny"
    short, long = Shape(model, 200, 32, 8), Shape(model, 1000, 32, 16)
    wide = long if gpu else Shape("wide", 1000, 32, 16)
    everything: tuple[Part, ...] = ("update", "sampling", "prefill", "step")
    widest = [Cell(wide, ("ours",) if quick else CONTENDERS, parts=("update",), memory=False)] if wide != long else []
    if shapes:
        cells = [Cell(s, parts=everything) for s in shapes]
    elif quick:
        updates = Cell(long, ("trl", "ours"), parts=("update",), rounds=2, sweep=SWEEP)
        cells = [Cell(short, memory=False), updates, *widest]
    else:
        cells = [Cell(s, parts=everything, sweep=SWEEP if s == long else ()) for s in grid_of(model)]
        cells += widest
    if not shapes and precision != DEFAULT_PRECISION:
        # Without the whole step there is no discriminator, so that float32 weights of the 3B model fit 80 GB.
        by_default = replace(short, precision=DEFAULT_PRECISION)
        cells.append(Cell(by_default, parts=("update", "sampling"), memory=False, rounds=2))
    chosen = []
    for cell in cells:
        if names := tuple(n for n in cell.contenders if n in contenders):
            together = cell.shape.model != "qwen2_5_vl_3b"
            sweep = cell.sweep if "ours" in names else ()
            rounds = repeats or cell.rounds
            chosen.append(replace(cell, contenders=names, rounds=rounds, together=together, sweep=sweep))
    return Plan(tuple(chosen), short.name, long.name, wide.name)
