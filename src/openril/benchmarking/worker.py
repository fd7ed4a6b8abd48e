"""A contender's process, which receives its commands over a pipe.

Nothing heavy is imported at module level, because threads and devices must be set before torch is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from openril.benchmarking.contender import Command, Finished, Measurement, Spec


class PipeConnection:
    """The child's end: ("ready", about), ("done", measurement) or ("failed", cause, whether memory was short)."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    def ready(self, about: dict[str, Any]) -> None:
        self.pipe.send(("ready", about))

    def next(self) -> Command:
        try:
            command = self.pipe.recv()
        except EOFError as e:  # the parent has ended
            raise Finished from e
        if command is None:
            raise Finished
        return command

    def reply(self, measurement: Measurement) -> None:
        self.pipe.send(("done", measurement))


def run_contender(pipe: Pipe, spec: Spec, log: str) -> None:
    """Run in a contender's process: set up and measure."""
    _settle(spec.device, spec.threads, log)
    connection = PipeConnection(pipe)
    try:
        if spec.limit_memory and spec.device == "cpu":
            _limit_memory()
        if spec.name == "trl":
            from openril.benchmarking.peer import serve
        else:
            from openril.benchmarking.ours import serve
        serve(spec, connection)
    except Finished:
        pass
    except BaseException as e:
        _report(pipe, e)
    _exit()


def run_machine(pipe: Pipe, device: str, dtype: str, threads: int, log: str) -> None:
    """Run in the process that builds checkpoints and measures the machine's limits.

    It receives ("build", folder, model name) or ("limits", dtype), and answers ("done", result) or ("failed", cause, False).
    """
    _settle(device, threads, log)
    try:
        import torch

        from openril.benchmarking.limits import Limits
        from openril.benchmarking.shapes import MODELS

        torch_dtype = getattr(torch, dtype)
        limits: Limits | None = None
        pipe.send(("ready", _about_machine(device)))
        while (request := _received(pipe)) is not None:
            if request[0] == "build":
                from openril.benchmarking.models import build_checkpoint

                build_checkpoint(Path(request[1]), MODELS[request[2]], dtype=torch_dtype, device=device)
                if device == "cuda":
                    torch.cuda.empty_cache()
                pipe.send(("done", None))
            else:
                requested = getattr(torch, request[1])
                if limits is None or limits.dtype != requested:
                    limits = Limits(device, requested)
                pipe.send(("done", limits.measure()))
    except BaseException as e:
        _report(pipe, e)
    _exit()


def _report(pipe: Pipe, error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)
    pipe.send(("failed", f"{type(error).__name__}: {error}", _memory_was_short(error)))


def _exit() -> None:
    """Exit without cleaning up, because the exit handlers of libraries may wait for each other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _received(pipe: Pipe) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None


def _settle(device: str, threads: int, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:  # only one of several, because peers would use all that they see
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    import threading

    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its default lock is shared between processes, and would remain after them
    if threads:
        torch.set_num_threads(threads)


def _about_machine(device: str) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    from openril._version import __version__

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    machine = {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    packages = ("torch", "transformers", "trl", "accelerate", "datasets")
    versions = {"python": platform.python_version(), "openril": __version__, **{p: version(p) for p in packages}}
    return {"machine": machine | {"system": platform.platform()}, "versions": versions}


def _cpu_name() -> str:
    import platform

    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _limit_memory() -> None:
    """Let allocations fail in this process once it has taken most of the memory that is free now."""
    from openril.benchmarking.memory import available_memory

    available = available_memory()
    if available is None or not sys.platform.startswith("linux"):
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    requested = int(0.9 * available)
    if hard == resource.RLIM_INFINITY or requested < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (requested, hard))


def _memory_was_short(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("can't allocate memory", "cannot allocate memory", "not enough memory"))
