"""Measure time on a device. A GPU finishes its work before the clock is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Clock:
    """A clock whose ``now`` returns seconds after the device has finished all of its work."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def elapsed(self) -> Iterator[Elapsed]:
        out = Elapsed()
        started, cpu = self.now(), time.process_time()
        yield out
        out.seconds, out.cpu_seconds = self.now() - started, time.process_time() - cpu


@dataclass
class Elapsed:
    """The seconds and processor seconds of a ``with clock.elapsed() as elapsed`` block after its end."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Stopwatch:
    """Sum up the seconds of watched calls by name."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def reset(self) -> None:
        self.seconds = {}

    def start(self, name: str) -> None:
        self._started[name] = self.clock.now()

    def stop(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock.now() - self._started[name]

    def watch_module(self, name: str, module: nn.Module) -> None:
        """Time the module's forward passes."""
        module.register_forward_pre_hook(lambda *_: self.start(name))
        module.register_forward_hook(lambda *_: self.stop(name))

    def watch_optimizer(self, name: str, optimizer: Any) -> None:
        """Time the steps of a torch optimizer, which accelerate may have wrapped."""
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        inner.register_step_pre_hook(lambda *_: self.start(name))
        inner.register_step_post_hook(lambda *_: self.stop(name))

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that times each call of ``function``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop(name)

        return timed
