"""Send weights from GPU to GPU through the weight-transfer endpoints of vLLM, in chunks and without a file.

The bodies of the requests are those of vLLM 0.30 to 0.32 (its ``distributed/weight_transfer``). Servers are started with
``--weight-transfer-config '{"backend": "nccl"}'`` or ``"ipc"``. A sync is ``/start_weight_update``, one
``/update_weights`` per chunk, and ``/finish_weight_update``; ``weight_sync`` sends the first and the last.
"""

from __future__ import annotations

import base64
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openril.errors import EndpointError
from openril.recipe.schema import SamplerConfig

CHUNK_BYTES = 2**30
"""Bytes of the tensors in one ``/update_weights`` request; a larger tensor has a request to itself."""

Chunk = list[tuple[str, Tensor]]
"""Names, as in checkpoint files, and whole tensors."""
OnMainProcess = Callable[[Callable[[], Any]], None]


class Transfer(ABC):
    """A backend for ``servers``, a ``WeightSync``. ``connect`` runs in the main process, ``send`` in every process."""

    def __init__(self, settings: SamplerConfig, servers: Any, device: torch.device) -> None:
        self.settings, self.servers, self.device = settings, servers, device
        self.connected = False
        backend = f'--weight-transfer-config \'{{"backend": "{settings.sync}"}}\''
        self.fix = f"Start vllm serve with VLLM_SERVER_DEV_MODE=1 in the environment and {backend}"

    def connect(self) -> None:
        """Prepare the servers for the first sync."""
        self.connected = True

    @abstractmethod
    def send(self, chunk: Chunk, on_main: OnMainProcess) -> None:
        """Send a chunk to every server, and return when they have it."""

    def init(self, url: str, info: dict[str, Any]) -> Any:
        return self.servers.post(url, "/init_weight_transfer_engine", "weight transfer", {"init_info": info}, self.fix)

    def update(self, url: str, info: dict[str, Any]) -> Any:
        return self.servers.post(url, "/update_weights", "taking new weights", {"update_info": info}, self.fix)

    def close(self) -> None:
        """Release what the servers hold for this process, if it is the main process."""
        for url in self.servers.urls if self.connected else []:
            with suppress(EndpointError):  # vLLM before 0.32 has no such endpoint, and a server may have ended
                self.servers.post(url, "/shutdown_weight_transfer_engine", "ending weight transfer")
        self.connected = False


def chunks(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[Chunk]:
    """Yield tensors in chunks of about ``CHUNK_BYTES``, contiguous and on a device."""
    chunk: Chunk = []
    for name, tensor in tensors:
        tensor = tensor.detach().to(device).contiguous()
        if chunk and sum(t.nbytes for _, t in chunk) + tensor.nbytes > CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append((name, tensor))
    if chunk:
        yield chunk


def make_transfer(settings: SamplerConfig, servers: Any) -> Transfer:
    """Return the transfer of ``student.sampler.sync``. Raises EndpointError if this process has no GPU."""
    if not torch.cuda.is_available():
        raise EndpointError(
            f"student.sampler.sync: {settings.sync} needs a GPU in every process of the trainer, and there is none here."
            " Set it to file."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return {"nccl": NcclTransfer, "ipc": IpcTransfer}[settings.sync](settings, servers, device)


def description(chunk: Chunk) -> dict[str, Any]:
    """Return the fields that describe a chunk in a request."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
        "shapes": [list(tensor.shape) for _, tensor in chunk],
    }


class NcclTransfer(Transfer):
    """The main process broadcasts to the workers of all servers, each of which needs a GPU that no trainer process uses.

    Workers join a group under a unique id of NCCL, which needs no vLLM in the trainer's environment, but the same version
    of NCCL in both.
    """

    def connect(self) -> None:
        super().connect()
        self.group = NcclGroup(self.device)
        sizes = [int(self.servers.get(url, "/get_world_size")["world_size"]) for url in self.servers.urls]
        unique_id, total = self.group.unique_id(), 1 + sum(sizes)
        calls: list[Callable[[], Any]] = [partial(self.group.join, unique_id, total)]
        for i, url in enumerate(self.servers.urls):
            text = base64.b64encode(unique_id).decode()
            ranks = {"rank_offset": 1 + sum(sizes[:i]), "world_size": total}
            calls.append(partial(self.init, url, {"nccl_unique_id_b64": text, **ranks, "packed": False}))
        together(calls, self.settings.timeout, "join")

    def send(self, chunk: Chunk, on_main: OnMainProcess) -> None:
        def broadcast() -> None:
            for _, tensor in chunk:
                self.group.broadcast(tensor)
            self.group.wait()

        calls: list[Callable[[], Any]] = [
            broadcast,
            *(partial(self.update, url, description(chunk)) for url in self.servers.urls),
        ]
        on_main(lambda: together(calls, self.settings.timeout, "take new weights"))


class NcclGroup:
    """A group of this process, with rank 0, and of workers, by way of ``torch.cuda.nccl``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._group: Any = None

    def unique_id(self) -> bytes:
        return torch.cuda.nccl.unique_id()

    def join(self, unique_id: bytes, world_size: int) -> None:
        """Wait for the workers. Like each of them, add up one number, which opens the connections."""
        with torch.cuda.device(self.device):
            self._group = torch.cuda.nccl.init_rank(world_size, unique_id, 0)
            torch.cuda.nccl.all_reduce([torch.zeros(1, device=self.device)], comms=self._group)
            self.wait()

    def broadcast(self, tensor: Tensor) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.nccl.broadcast([tensor], comms=self._group)

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()


class IpcTransfer(Transfer):
    """Workers read the weights in the memory of the GPU that they share with a process of the trainer.

    Every worker's GPU needs such a process. The handle is a pickle, as vLLM expects it, so servers need
    ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``. The trainer and vLLM need versions of torch whose handles agree.
    """

    def connect(self) -> None:
        super().connect()
        self.fix += ", and with VLLM_ALLOW_INSECURE_SERIALIZATION=1 in the environment"
        for url in self.servers.urls:
            self.init(url, {"packed": True})

    def send(self, chunk: Chunk, on_main: OnMainProcess) -> None:
        from accelerate.utils import gather_object

        packed = torch.cat([tensor.view(-1).view(torch.uint8) for _, tensor in chunk])
        handles = dict(gather_object([export(packed)]))
        info = {
            **description(chunk),
            "tensor_sizes": [tensor.nbytes for _, tensor in chunk],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }
        on_main(lambda: [self.update(url, info) for url in self.servers.urls])  # until the workers have copied them
        del packed
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()


def export(tensor: Tensor) -> tuple[str, tuple[Any, ...]]:
    """Return the id of a tensor's GPU, and the arguments with which torch opens its memory in another process."""
    from torch.multiprocessing.reductions import reduce_tensor

    torch.cuda.synchronize(tensor.device)
    return str(torch.cuda.get_device_properties(tensor.device).uuid), reduce_tensor(tensor)[1]


def together(calls: list[Callable[[], Any]], timeout: float, what: str) -> None:
    """Run calls that wait for each other, and raise the first error at once; the other calls may then never return.

    Raises:
        EndpointError: The calls take longer than ``timeout`` seconds.
    """

    def run(call: Callable[[], None], future: Future[None]) -> None:
        try:
            call()
            future.set_result(None)
        except BaseException as e:
            future.set_exception(e)

    futures: list[Future[None]] = [Future() for _ in calls]
    for call, future in zip(calls, futures, strict=True):
        # Not an executor, which would wait at the end of the program for calls that never return.
        threading.Thread(target=run, args=(call, future), daemon=True).start()
    done, waiting = wait(futures, timeout, return_when=FIRST_EXCEPTION)
    for future in done:
        try:
            future.result()
        except RuntimeError as e:  # of NCCL
            raise EndpointError(f"student.sampler.sync: expected the servers to {what}, got {e}") from e
    if waiting:
        raise EndpointError(
            f"student.sampler.timeout: expected the servers to {what} within {timeout:g} s. Restart them, because they may"
            " wait for this process forever."
        )
