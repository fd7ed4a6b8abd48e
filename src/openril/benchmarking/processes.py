"""The parent's side of the workers: start, ask, notice death, end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from openril.benchmarking.contender import Command, Measurement, Spec
from openril.benchmarking.worker import run_contender, run_machine
from openril.errors import OpenRILError

# A child must not inherit threads or a GPU context.
_SPAWN = multiprocessing.get_context("spawn")


class WorkerFailed(OpenRILError):
    """A worker that could not go on. out_of_memory: because memory was short, as far as that can be told."""

    def __init__(self, message: str, out_of_memory: bool) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Worker:
    """A process and the parent's end of its pipe. who: how messages call it."""

    def __init__(self, who: str, target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
        self.who = who
        self.log = log
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=target, args=(theirs, *arguments, str(log)), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """The next message's content. Raises WorkerFailed when the worker says so, or is gone."""
        pipe: Pipe = self.pipe
        try:
            while not pipe.poll(0.5):
                if not self.process.is_alive() and not pipe.poll(0):
                    raise EOFError
            message = pipe.recv()
        except (EOFError, ConnectionError) as e:
            self.process.join(5)
            code = self.process.exitcode
            killed = code is not None and code < 0
            how = f"was killed by signal {-code}" if killed and code else f"ended with exit code {code}"
            hint = "; most likely the system ran out of memory" if code == -9 else ""
            raise WorkerFailed(f"{self.who} {how}{hint}{self._last_words()}", code == -9) from e
        if message[0] == "failed":
            self.process.join(5)
            cause = message[1].strip().splitlines()[0][:300]
            raise WorkerFailed(f"{self.who}: {cause}", message[2])
        return message[1]

    def send(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionError):
            return  # the answer that never comes will say why

    def end(self) -> None:
        """Ask it to stop, and stop it."""
        if self.process.is_alive():
            self.send(None)
            self.process.join(1)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f" (its last line: {lines[-1][:200]})" if lines else ""


class ContenderWorker(Worker):
    """A contender's process; ``about`` is what it said of itself once ``ready``."""

    def __init__(self, spec: Spec, log: Path) -> None:
        super().__init__(f"{spec.name} at {spec.shape.name}", run_contender, (spec,), log)
        self.spec = spec
        self.about: dict[str, Any] = {}

    def ready(self) -> None:
        self.about = self.receive()

    def measure(self, command: Command) -> Measurement:
        self.send(command)
        return self.receive()


class Machine(Worker):
    """Builds checkpoints and measures limits. Its failures are not survived: nothing could be measured."""

    def __init__(self, device: str, dtype: str, threads: int, log: Path) -> None:
        super().__init__("the process that measures the machine", run_machine, (device, dtype, threads), log)
        self.dtype = dtype
        self.about: dict[str, Any] = self.receive()

    def build(self, folder: Path, model: str) -> None:
        self.send(("build", str(folder), model))
        self.receive()

    def limits(self, dtype: str = "") -> dict[str, float]:
        """Measure the peaks of products in ``dtype``, by default that of the checkpoints."""
        self.send(("limits", dtype or self.dtype))
        return self.receive()
