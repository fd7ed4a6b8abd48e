"""The worker processes of the benchmark: their messages, the parent's end and the child's end of their pipes.

Nothing heavy is imported at module level, because a child sets its threads and devices before it imports torch.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Literal

from openril.benchmarking.shapes import Precision, Shape
from openril.errors import OpenRILError

Part = Literal["update", "sampling", "prefill", "step", "memory"]
"""update: everything after the rewards, on given responses. sampling: 2G responses to each question. prefill: one token
of each (only ours). step: the whole step. memory: the whole step again, for its peak."""

# A child must not inherit threads or a GPU context.
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Spec:
    """The settings of a contender's process.

    name: trl, plain or ours. checkpoint: the weights that all share. pictures: PNG files in the order of their use.
    micro_batch_rows: rows (responses) per forward pass, for a contender that counts in rows.
    """

    name: str
    shape: Shape
    checkpoint: Path
    pictures: tuple[Path, ...]
    folder: Path
    device: Literal["cpu", "cuda"]
    precision: Precision
    parts: tuple[Part, ...]
    threads: int = 0
    micro_batch_rows: int = 0


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


@dataclass(frozen=True)
class Failed:
    """The last message of a worker that failed. out_of_memory: whether memory was short."""

    cause: str
    out_of_memory: bool


class Finished(Exception):
    """The parent has no more commands."""


class WorkerFailed(OpenRILError):
    """A worker failed. out_of_memory: whether the cause is a lack of memory, as far as that is known."""

    def __init__(self, message: str, out_of_memory: bool) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


def exactly(lengths: Sequence[int], expected: int, who: str) -> None:
    """Raise RuntimeError unless every response has the expected number of tokens; else figures are not comparable."""
    if set(lengths) != {expected}:
        raise RuntimeError(f"{who}: expected responses of exactly {expected} tokens, got {sorted(set(lengths))}")


# ---- the parent's end -----------------------------------------------------------------------------------------------


class Worker:
    """A process that runs ``serve(pipe, *arguments)`` of a module of this package, and the parent's end of its pipe.

    who: its name in messages.
    """

    def __init__(self, who: str, module: str, device: str, threads: int, log: Path, *arguments: Any) -> None:
        self.who = who
        self.log = log
        self.pipe, theirs = _SPAWN.Pipe()
        everything = (theirs, module, device, threads, str(log), arguments)
        self.process = _SPAWN.Process(target=run, args=everything, daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """Return the next message. Raises WorkerFailed when the worker reports an error or is dead."""
        pipe: Pipe = self.pipe
        try:
            while not pipe.poll(0.5):
                if not self.process.is_alive() and not pipe.poll(0):
                    raise EOFError
            message = pipe.recv()
        except (EOFError, ConnectionError) as e:
            self.process.join(5)
            code = self.process.exitcode
            how = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
            hint = "; most likely the system ran out of memory" if code == -9 else ""
            raise WorkerFailed(f"{self.who} {how}{hint}{self._last_words()}", code == -9) from e
        if isinstance(message, Failed):
            self.process.join(5)
            raise WorkerFailed(f"{self.who}: {message.cause.strip().splitlines()[0][:300]}", message.out_of_memory)
        return message

    def send(self, message: Any) -> None:
        with contextlib.suppress(ConnectionError):  # receive() reports why
            self.pipe.send(message)

    def ask(self, message: Any) -> Any:
        """Send a message and return the worker's answer."""
        self.send(message)
        return self.receive()

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


# ---- the child's end ------------------------------------------------------------------------------------------------


def run(pipe: Pipe, module: str, device: str, threads: int, log: str, arguments: Sequence[Any]) -> None:
    """Run in the new process until there are no more commands, or until an error, which is sent to the parent."""
    _prepare(device, threads, log)
    try:
        importlib.import_module(f"openril.benchmarking.{module}").serve(pipe, *arguments)
    except Finished:
        pass
    except BaseException as e:
        traceback.print_exception(e)
        pipe.send(Failed(f"{type(e).__name__}: {e}", _memory_was_short(e)))
    # Exit without cleaning up, because the exit handlers of libraries may wait for each other.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def next_command(pipe: Pipe) -> Any:
    """Wait for the parent's next message. Raises Finished when there are no more."""
    try:
        command = pipe.recv()
    except EOFError:  # the parent has ended
        command = None
    if command is None:
        raise Finished
    return command


def _prepare(device: str, threads: int, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Only one of several GPUs, because peers would use all that they see.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else visible
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its default lock is shared between processes, and would remain after them
    if threads:
        torch.set_num_threads(threads)


def _memory_was_short(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("can't allocate memory", "cannot allocate memory", "not enough memory"))
