"""Let models take turns on the device through host memory (``train.offload``), as the paper did for student and D.

To park a tensor, its storage is copied to host memory and emptied. The tensor remains the same object, so optimizers,
DDP and ``fully_shard`` keep their references, and nothing but the storage moves. Results do not change.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from openril.training.sharding import units

_BLOCK = 2**28
"""Bytes of host memory allocated at a time, because torch rounds pinned allocations up to powers of two."""

_Storages = dict[int, torch.UntypedStorage]


class Offload:
    """The models of a run whose memory is parked while they are not used.

    ``none`` parks nothing. ``optimizer`` parks the states of each optimizer outside its step. ``swap`` parks, besides
    these, the weights of models that are not in use, and the gradient buckets that DDP keeps.

    Args:
        pin: Use page-locked host memory, which a GPU copies faster and on its own.
    """

    def __init__(self, mode: Literal["none", "optimizer", "swap"] = "none", *, pin: bool = False) -> None:
        self.mode = mode
        self.pin = pin
        self.seconds = 0.0
        """Time that moves took; the loop sets it back to 0 after each row of metrics."""
        self._models: dict[str, nn.Module] = {}
        self._optimizers: dict[str, Any] = {}
        self._buckets: dict[str, _Storages] = {}
        self._seen: dict[str, set[int]] = {}
        self._parked: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._host: dict[int, list[Tensor]] = {}
        self._free = torch.empty(0, dtype=torch.uint8)

    def add(self, name: str, model: nn.Module, optimizer: Any = None) -> None:
        """Register a model that is on the device, wrapped as it is used, and its optimizer; park the optimizer's state."""
        self._models[name] = model
        if self.mode == "swap":
            _make_resizable([*model.parameters(), *model.buffers()])
        if optimizer is None or self.mode == "none":
            return
        inner = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        self._optimizers[name] = inner

        def before_step(*_: Any) -> None:
            if isinstance(model, DistributedDataParallel):
                self._find_buckets(name)
            self._fetch(self._states(name))

        inner.register_step_pre_hook(before_step)
        inner.register_step_post_hook(lambda *_: self.park_states(name))
        self.park_states(name)

    def use(self, *names: str) -> None:
        """Put these models on the device, after all others are parked. Names that were not added are ignored."""
        if self.mode != "swap":
            return
        used = [name for name in names if name in self._models]
        others = [name for name in self._models if name not in names]
        needed = {k: v for name in used for k, v in self._weights(name).items()}  # models may share a frozen part
        for name in others:
            for unit in units(self._models[name]):
                unit.reshard()  # the root unit keeps its whole weights after a forward pass
            self._park(self._buckets.get(name, {}), keep=False)
            self._park({k: v for k, v in self._weights(name).items() if k not in needed})
        self._fetch(needed)
        for name in used:
            self._fetch(self._buckets.get(name, {}))

    def park_states(self, name: str) -> None:
        """Park the states of an optimizer, after they were loaded or used."""
        self._park(self._states(name))

    @contextmanager
    def states(self, name: str) -> Iterator[None]:
        """Have the states of an optimizer on the device inside, to read them."""
        self._fetch(self._states(name))
        yield
        self.park_states(name)

    def _weights(self, name: str) -> _Storages:
        return _storages([*self._models[name].parameters(), *self._models[name].buffers()])

    def _states(self, name: str) -> _Storages:
        """Return the storages of an optimizer's tensors but its step counters; none where nothing is parked."""
        if name not in self._optimizers:
            return {}
        entries = [v for state in self._optimizers[name].state.values() for v in state.values()]
        return _storages(v for v in entries if isinstance(v, Tensor) and v.dim())

    def _find_buckets(self, name: str) -> None:
        """Remember DDP's gradient buckets, of which the gradients are views and which DDP keeps between steps.

        DDP replaces its first buckets in the second backward pass, so only those seen twice are kept alive here.
        """
        found = _storages(p.grad for p in self._models[name].parameters() if p.grad is not None)
        self._buckets[name] = {k: v for k, v in found.items() if k in self._seen.get(name, ())}
        self._seen[name] = set(found)

    @torch.no_grad()
    def _park(self, storages: _Storages, *, keep: bool = True) -> None:
        """Empty the storages that are not empty yet. Without ``keep`` their values are dropped."""
        away = {k: v for k, v in storages.items() if k not in self._parked}
        with self._timed(bool(away)):
            for key, storage in away.items():
                if keep and key not in self._host:
                    self._host[key] = self._reserve(storage.size())
                for host, device in _pairs(self._host.get(key, []), storage):
                    host.copy_(device, non_blocking=self.pin)
            self._wait()
            for key, storage in away.items():
                self._parked[key] = (storage, storage.size())
                storage.resize_(0)

    @torch.no_grad()
    def _fetch(self, storages: _Storages) -> None:
        """Fill the storages that are parked."""
        back = [(*self._parked.pop(key), self._host.get(key, [])) for key in storages if key in self._parked]
        with self._timed(bool(back)):
            for storage, size, kept in back:
                storage.resize_(size)
                for host, device in _pairs(kept, storage):
                    device.copy_(host, non_blocking=self.pin)
            self._wait()

    def _reserve(self, size: int) -> list[Tensor]:
        """Return views of host memory with ``size`` bytes in all."""
        pieces: list[Tensor] = []
        while size:
            if not len(self._free):
                self._free = torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=self.pin)
            pieces.append(self._free[:size])
            self._free = self._free[size:]
            size -= len(pieces[-1])
        return pieces

    def _wait(self) -> None:
        if self.pin:
            torch.cuda.synchronize()

    @contextmanager
    def _timed(self, moves: bool) -> Iterator[None]:
        if not moves:
            yield
            return
        self._wait()  # until work in all streams that uses the storages is done
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()).untyped_storage()


def _storages(tensors: Iterable[Tensor]) -> _Storages:
    """Return the storages of tensors by their address in C++, which stays the same while they are parked."""
    found = [_storage(tensor) for tensor in tensors]
    return {storage._cdata: storage for storage in found}


def _make_resizable(tensors: Iterable[Tensor]) -> None:
    """Copy weights that are still memory of the file they were read from, as models loaded on the CPU have them."""
    made: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = _storage(tensor)
        if not storage.resizable():
            copy = made.setdefault(storage._cdata, storage.clone())
            tensor.data = tensor.data.new_empty(0).set_(copy, tensor.storage_offset(), tensor.size(), tensor.stride())


def _pairs(pieces: Iterable[Tensor], storage: torch.UntypedStorage) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each piece of host memory with the part of the storage that it holds, as bytes."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    start = 0
    for piece in pieces:
        yield piece, whole[start : start + len(piece)]
        start += len(piece)
