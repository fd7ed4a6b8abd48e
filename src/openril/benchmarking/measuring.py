"""Measure time and peak memory on a device. A GPU finishes its work before the clock is read."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stopwatch:
    """Measure seconds on a device, and sum up those of watched methods by name."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Return the time in seconds after the device has finished all of its work."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self) -> tuple[float, float]:
        """Return the present time and processor time in seconds, for ``since``."""
        return self.now(), time.process_time()

    def since(self, mark: tuple[float, float]) -> tuple[float, float]:
        """Return the seconds and processor seconds since a mark."""
        return self.now() - mark[0], time.process_time() - mark[1]

    def watch(self, name: str, owner: Any, method: str) -> None:
        """Replace a method of an object by one that adds the time of each call to ``seconds[name]``."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started

        setattr(owner, method, timed)


class PeakMemory:
    """Measure memory between ``start``, which frees caches and records what is held, and ``peak``.

    On a GPU the numbers come from torch's allocator. On a Linux CPU they are the resident set and its high-water mark,
    which the kernel resets on request. Elsewhere ``peak`` is None.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._held = 0

    @property
    def source(self) -> str | None:
        if self.cuda:
            return "torch.cuda.max_memory_allocated"
        return "VmHWM of /proc/self/status" if _CLEAR.exists() and _STATUS.exists() else None

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        elif self.source:
            give_back()
            _CLEAR.write_text("5")  # sets the high-water mark to the present resident set
            self._held = _bytes_in(_STATUS, "VmRSS")

    def peak(self) -> int | None:
        """Return the bytes above ``start`` at the highest point since then."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self._held
        return _bytes_in(_STATUS, "VmHWM") - self._held if self.source else None

    @property
    def held(self) -> int | None:
        """The bytes held at ``start``: models, optimizer states and (on a CPU) the libraries."""
        return self._held or None


def give_back() -> None:
    """Return freed heap memory to the system, which glibc would keep."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def limit_memory() -> None:
    """Let allocations fail in this process once it has taken most of the memory that is free now.

    A lack of memory is then an error of this process, before the system kills a process of its choice.
    """
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    requested = int(0.9 * _bytes_in(Path("/proc/meminfo"), "MemAvailable"))
    if hard == resource.RLIM_INFINITY or requested < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (requested, hard))


def _bytes_in(path: Path, key: str) -> int:
    """Return the bytes of the line ``key: N kB`` in a file of /proc."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {key}")
