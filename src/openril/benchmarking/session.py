"""Run a plan. The contenders of a cell take turns after each measurement, so that noise affects all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from openril.benchmarking.inputs import draw_pictures
from openril.benchmarking.plan import Cell
from openril.benchmarking.shapes import QUESTIONS, Precision
from openril.benchmarking.worker import Command, Measurement, Part, Spec, Worker, WorkerFailed
from openril.storage import remove

Say = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """A contender failed to measure a shape, or the rest of it."""

    contender: str
    shape: str
    cause: str


@dataclass
class CellResult:
    """The measurements of one cell.

    measurements: contender -> part -> one entry for each round, None where it failed. sweep: group size -> entries of
    ours. limits: one entry for each round. about: contender -> what it reported about itself. fast_path_off: contender ->
    why pieces of its fast path were not used.
    """

    cell: Cell
    measurements: dict[str, dict[str, list[Measurement | None]]] = field(default_factory=dict)
    sweep: dict[int, list[Measurement | None]] = field(default_factory=dict)
    limits: list[dict[str, float]] = field(default_factory=list)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    on_cpu: bool = True
    precision: Precision = "float32"
    fast_path_off: dict[str, list[str]] = field(default_factory=dict)

    def add(self, contender: str, part: str, measurement: Measurement | None) -> None:
        self.measurements.setdefault(contender, {}).setdefault(part, []).append(measurement)


class ContenderWorker(Worker):
    """A contender's process. about: what it reported about itself when it was ready."""

    def __init__(self, spec: Spec, log: Path) -> None:
        module = "peer" if spec.name == "trl" else "ours"
        super().__init__(f"{spec.name} at {spec.shape.name}", module, spec.device, spec.threads, log, spec)
        self.spec = spec
        self.about: dict[str, Any] = {}


class Machine(Worker):
    """The process that builds checkpoints and measures limits. Its failure ends the run."""

    def __init__(self, device: str, threads: int, log: Path) -> None:
        super().__init__("the process that measures the machine", "machine", device, threads, log, device)
        self.about: dict[str, Any] = self.receive()


@dataclass
class Session:
    """A machine, a folder for checkpoints and pictures, and the running processes of the contenders.

    peer_rows: TRL's rows in one forward pass; 0 for one group, as our passes have. All rows of a step at once are no
    faster on a CPU (measured: 5 % slower) and take about twice the memory. Where memory is short, TRL gets fewer.
    """

    folder: Path
    device: Literal["cpu", "cuda"] = field(kw_only=True)
    precision: Precision = field(kw_only=True)
    threads: int = field(kw_only=True)
    peer_rows: int = 0
    say: Say = lambda text: None
    warn: Say = lambda text: None
    workers: list[ContenderWorker] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._started = 0
        self.machine = Machine(self.device, self.threads, self.folder / "machine.log")

    def close(self) -> None:
        """End every process."""
        for worker in [*self.workers, self.machine]:
            worker.end()
        self.workers = []

    def run(self, cell: Cell) -> CellResult:
        result = CellResult(cell, on_cpu=self.device == "cpu", precision=cell.shape.precision or self.precision)
        shape = cell.shape
        checkpoint = self.folder / "models" / shape.model
        if not checkpoint.exists():
            self.say(f"{shape.name}: building the model")
            # Checkpoints are read in any type.
            self.machine.ask(("build", product_dtype(self.precision), checkpoint, shape.model))
        pictures = draw_pictures(self.folder / "pictures" / shape.name, shape, QUESTIONS * cell.calls)
        turns: Sequence[tuple[str, ...]] = [cell.contenders] if cell.together else [(c,) for c in cell.contenders]
        for contenders in turns:
            self._take_turns(cell, contenders, checkpoint, pictures, result)
        remove(self.folder / "pictures" / shape.name)
        return result

    def _take_turns(
        self, cell: Cell, contenders: Sequence[str], checkpoint: Path, pictures: list[Path], result: CellResult
    ) -> None:
        shape = cell.shape
        alive: dict[str, ContenderWorker] = {}
        self.say(f"{shape.name}: setting up {', '.join(contenders)}")
        peer_rows = self.peer_rows or shape.group_size
        for name in contenders:
            spec = Spec(
                name,
                shape,
                checkpoint,
                tuple(pictures),
                self.folder / "runs" / f"{shape.name}-{name}",
                self.device,
                result.precision,
                (*cell.parts_of(name), *(("memory",) if cell.memory else ())),
                self.threads,
                0 if name != "trl" else peer_rows if shape.rows % peer_rows == 0 else shape.rows,
            )
            alive[name] = self._spawn(spec)
        for name in contenders:
            try:
                alive[name] = self._warm_up(alive[name], cell.warm_up(name), result)
                result.about[name] = alive[name].about
            except WorkerFailed as e:
                self._lost(alive.pop(name), e, result)
        call = 1

        def measure(name: str, part: Part, words: str, group_size: int = 0) -> Measurement | None:
            if name not in alive:
                return None
            self.say(f"{shape.name}: {name}, {words}")
            try:
                return self._ask(alive[name], Command(part, call, group_size), result)
            except WorkerFailed as e:
                self._end(alive[name])
                self._lost(alive.pop(name), e, result)
                return None

        for number in range(cell.rounds):
            turn = f", round {number + 1} of {cell.rounds}"
            if "ours" in contenders or "ours" not in cell.contenders:  # the shares of the limits are those of ours
                self.say(f"{shape.name}: the machine's limits{turn}")
                result.limits.append(self.machine.ask(("limits", product_dtype(result.precision))))
            for part in cell.parts:
                for name in contenders:
                    if part in cell.parts_of(name):
                        result.add(name, part, measure(name, part, f"{part}{turn}"))
                call += 1
            for size in cell.sweep if "ours" in contenders else ():
                found = measure("ours", "update", f"update at 2G = {size}{turn}", size)
                result.sweep.setdefault(size, []).append(found)
                call += 1
        if cell.memory:
            for name in contenders:
                result.add(name, "memory", measure(name, "memory", "memory"))
        for worker in alive.values():
            self._end(worker)

    def _spawn(self, spec: Spec) -> ContenderWorker:
        self._started += 1
        worker = ContenderWorker(spec, self.folder / f"{self._started:03d}-{spec.name}.log")
        self.workers.append(worker)
        return worker

    def _ask(self, worker: ContenderWorker, command: Command, result: CellResult) -> Measurement:
        """Return the worker's measurement; what it says about its fast path goes to the result, each thing once."""
        measurement: Measurement = worker.ask(command)
        name, known = worker.spec.name, result.fast_path_off.setdefault(worker.spec.name, [])
        for reason in measurement.fast_path_off:
            if reason not in known:
                known.append(reason)
                self.warn(f"{name} at {result.cell.shape.name} runs without its fast path: {reason}")
        return measurement

    def _warm_up(self, worker: ContenderWorker, parts: Sequence[Part], result: CellResult) -> ContenderWorker:
        """Return the worker after its warm-up. TRL gets half the rows per forward pass whenever memory is short."""
        while True:
            spec = worker.spec
            try:
                self.say(f"{spec.shape.name}: {spec.name} sets up")
                worker.about = worker.receive()
                for part in parts:
                    self.say(f"{spec.shape.name}: {spec.name}, {part} to warm up")
                    self._ask(worker, Command(part, 0), result)
                return worker
            except WorkerFailed as e:
                self._end(worker)
                rows = spec.micro_batch_rows or spec.shape.rows
                if not (spec.name == "trl" and e.out_of_memory and rows % 2 == 0):
                    raise
                self.warn(f"{e}; trying again with {rows // 2} rows per forward pass instead of {rows}")
                worker = self._spawn(replace(spec, micro_batch_rows=rows // 2))

    def _end(self, worker: ContenderWorker) -> None:
        worker.end()
        self.workers.remove(worker)

    def _lost(self, worker: ContenderWorker, error: WorkerFailed, result: CellResult) -> None:
        self.warn(f"{error}; its figures for this shape are left out")
        result.failures.append(Failure(worker.spec.name, worker.spec.shape.name, str(error)))


def product_dtype(precision: Precision) -> str:
    """The torch type in which the matrix products of a precision are computed."""
    return "float32" if precision == "float32" else "bfloat16"
