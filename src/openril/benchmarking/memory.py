"""Measure the peak memory of a piece of work above what was held before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measure memory between ``start``, which frees caches and records what is held, and ``peak``.

    On a GPU the numbers come from torch's allocator. On a Linux CPU they are the resident set and its high-water mark,
    which the kernel resets on request. Elsewhere ``peak`` is None.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._held = 0

    @property
    def source(self) -> str | None:
        if self.device == "cuda":
            return "torch.cuda.max_memory_allocated"
        return "VmHWM of /proc/self/status" if _CLEAR.exists() and _STATUS.exists() else None

    def start(self) -> None:
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        elif self.source:
            give_back()
            _CLEAR.write_text("5")  # sets the high-water mark to the present resident set
            self._held = _status("VmRSS")

    def peak(self) -> int | None:
        """Return the bytes above ``start`` at the highest point since then."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() - self._held
        return _status("VmHWM") - self._held if self.source else None

    @property
    def held(self) -> int | None:
        """The bytes held at ``start``: models, optimizer states and (on a CPU) the libraries."""
        return self._held or None


def give_back() -> None:
    """Return freed heap memory to the system, which glibc would keep."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


def available_memory() -> int | None:
    """Return the bytes that this machine has available, or None where it does not report them."""
    path = Path("/proc/meminfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
