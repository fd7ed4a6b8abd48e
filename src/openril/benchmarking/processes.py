"""The parent's side of the worker processes: start them, ask them, notice when they die, end them."""

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
    """A worker failed. out_of_memory: whether the cause is a lack of memory, as far as that is known."""

    def __init__(self, message: str, out_of_memory: bool) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Worker:
    """A process and the parent's end of its pipe. who: its name in messages."""

    def __init__(self, who: str, target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
        self.who = who
        self.log = log
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=target, args=(theirs, *arguments, str(log)), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """Return the content of the next message. Raises WorkerFailed when the worker reports an error or is dead."""
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
            return  # receive() reports why

    def end(self) -> None:
        """Ask the process to stop, and kill it if it does not."""
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
    """A contender's process. about: what it reported about itself when it was ready."""

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
    """The process that builds checkpoints and measures limits. Its failure ends the run."""

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
