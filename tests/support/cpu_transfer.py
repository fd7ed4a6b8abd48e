"""A stand-in for NCCL between the trainer and a vLLM server on the CPU.

``Extension`` is loaded into the worker (``--worker-extension-cls support.cpu_transfer.Extension``). There, tensors that
vLLM's own engine for NCCL receives come through a ``TCPStore``. Everything else is vLLM's: the endpoints, the parsing of
their bodies, and the loading of weights. ``StoreGroup`` is the trainer's end, in place of ``NcclGroup``.

The extension also switches off the packing of linear weights for the CPU, which leaves empty tensors in their places,
so that ``/weight_checker`` sees every weight.
"""

from __future__ import annotations

import sys

import torch


class StoreGroup:
    """The trainer's end: see ``NcclGroup``."""

    def __init__(self, device: torch.device) -> None:
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.sent = 0

    def unique_id(self) -> bytes:
        return str(self.store.port).encode().ljust(128, b" ")

    def join(self, unique_id: bytes, world_size: int) -> None:
        self.store.wait([f"joined {rank}" for rank in range(1, world_size)])

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.store.set(f"tensor {self.sent}", tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        self.sent += 1

    def wait(self) -> None:
        pass


class WorkerGroup:
    """The worker's end, with the methods of ``PyNcclCommunicator`` that vLLM's engine calls."""

    def __init__(self, init_info, parallel_config) -> None:
        port = int(init_info.nccl_unique_id_bytes)
        self.store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
        self.store.set(f"joined {init_info.rank_offset + parallel_config.rank}", b"")
        self.received = 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream) -> None:
        data = bytearray(self.store.get(f"tensor {self.received}"))
        self.received += 1
        tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape))

    def destroy(self) -> None:
        del self.store


class Extension:
    """Nothing to add to the worker's class: vLLM imports this module with it."""


def transfers_on_the_cpu(patch) -> None:
    """Use the stand-in in this process; ``patch`` sets an attribute of a module."""
    from openril.sampling import weight_sync, weight_transfer

    def make(settings, servers):
        return weight_transfer.NcclTransfer(settings, servers, torch.device("cpu"))

    patch(weight_transfer, "NcclGroup", StoreGroup)
    patch(weight_sync, "make_transfer", make)


if __name__ == "__main__":  # the command line of OpenRIL with the stand-in
    from openril.cli import main

    transfers_on_the_cpu(setattr)
    sys.exit(main(sys.argv[1:]))

if "vllm" in sys.modules:  # in the server's worker, not in the trainer
    from vllm import _custom_ops
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *args: False
    nccl_engine.worker_init_process_group = WorkerGroup
    torch.cuda.current_stream = lambda *args: None
    torch.accelerator.synchronize = lambda *args: None
