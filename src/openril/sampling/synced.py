"""Sample from servers that are given the weights first: the policy's, whenever they change, or a checkpoint's."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from openril.errors import EndpointError
from openril.recipe.schema import SamplerConfig, SamplingConfig
from openril.records import STUDENT, Question, Response
from openril.sampling.vllm_engine import VLLMSampler
from openril.sampling.weight_sync import new_version
from openril.storage import Lock, atomic_path, remove


class WeightsFolder:
    """The folder through which servers are given weights (``student.sampler.weights_dir``). One process holds it at a time."""

    def __init__(self, settings: SamplerConfig, run_path: Path) -> None:
        self.path = (
            Path(settings.weights_dir).expanduser() if settings.weights_dir else run_path / "rollout_weights"
        ).resolve()
        self.shared = bool(settings.weights_dir)
        self.student = self.path / "student"
        self.adapter = self.path / "adapter"
        self._lock = Lock(self.path / "lock")
        self._held = False

    def hold(self) -> None:
        """Take the folder. Raise EndpointError if another process has it, whose samples would come from other weights."""
        if self._held:
            return
        if not self._lock.acquire(wait=False):
            owner = self._lock.path.read_text(errors="replace").strip() or "another process"
            raise EndpointError(
                f"student.sampler.weights_dir: {self.path} is in use by {owner}, which gives its weights to the servers."
                " Wait until it has ended, or set another weights_dir and other servers."
            )
        self._held = True
        self._lock.path.write_text(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv[:3])})")

    def put(self, checkpoint: Path) -> Path:
        """Return the folder of a checkpoint for the servers: with a ``weights_dir``, a copy of its weights there."""
        if not self.shared:
            return checkpoint
        with atomic_path(self.student) as temporary:
            temporary.mkdir()
            for file in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.json")]:
                shutil.copyfile(file, temporary / file.name)
        return self.student

    def close(self) -> None:
        """Remove the weights, which the servers have loaded, and let others have the folder."""
        if self._held:
            remove(self.student)
            remove(self.adapter)
            self._lock.release()
            self._held = False


@dataclass(eq=False, repr=False)
class SyncedSampler:
    """A ``Sampler`` that sends new weights to the servers before it samples. Every process must sample equally often.

    Args:
        folder: Folder through which the weights are sent, and whose lock keeps other processes from the servers.
        write: Writes what the servers load to a folder, in every process: the policy as a checkpoint, or its adapter.
        base: For ``sync: adapter``: returns the checkpoint folder of the policy without its adapter, in the main process.
        tensors: For ``nccl`` and ``ipc``: yields the policy's weights as in a checkpoint, whole, in every process.
        policy: The wrapped ``Policy``.
        version: Returns a number that changes whenever the weights do.
        probes: Questions that verify a sync, the same in every process; one with images and one without are enough.
    """

    sampler: VLLMSampler
    _: KW_ONLY
    folder: WeightsFolder
    write: Callable[[Path], None]
    policy: Any
    accelerator: Accelerator
    version: Callable[[], int]
    probes: Sequence[Question]
    base: Callable[[], Path] | None = None
    tensors: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    _synced: int | None = field(default=None, init=False)

    def sample(
        self,
        questions: Sequence[Question],
        num_generations: int,
        *,
        settings: SamplingConfig,
        max_completion_length: int,
        seed: int,
        first_index: int = 0,
        source: str = STUDENT,
    ) -> list[list[Response]]:
        """See ``Sampler``. Raises EndpointError, in every process, if a server does not take the new weights."""
        if self._synced != (version := self.version()):
            self._sync()
            self._synced = version
        return self.sampler.sample(
            questions,
            num_generations,
            settings=settings,
            max_completion_length=max_completion_length,
            seed=seed,
            first_index=first_index,
            source=source,
        )

    def _sync(self) -> None:
        weights, folder, route = self.sampler.weights, self.folder, self.sampler.settings.sync
        self._on_main_process(folder.hold)
        version = new_version()
        if route == "adapter":
            base = self.base
            assert base is not None
            if self._synced is None:
                self._on_main_process(lambda: weights.load(folder.put(base()), version))
            self.write(folder.adapter)
            self.accelerator.wait_for_everyone()
            self._on_main_process(lambda: weights.load_adapter(folder.adapter, version))
        elif route == "file":
            self.write(folder.student)
            self.accelerator.wait_for_everyone()
            self._on_main_process(lambda: weights.load(folder.student, version))
        else:
            assert self.tensors is not None
            weights.send(self.tensors(), version, self._on_main_process)
        told = [(weights.version, weights.unversioned)]
        broadcast_object_list(told)  # every process samples, and checks the version
        weights.version, weights.unversioned = told[0]
        if route == "adapter":
            self.sampler.name_model(weights.adapter_name(weights.version))
        self.sampler.verify(self.policy, self.probes)

    def _on_main_process(self, action: Callable[[], Any]) -> None:
        failure: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                action()
            except EndpointError as e:
                failure = [str(e)]
        broadcast_object_list(failure)  # otherwise the other processes would wait forever for one that has raised
        if failure[0] is not None:
            raise EndpointError(failure[0])

    def close(self) -> None:
        """Close connections, and let others use the servers."""
        self.sampler.close()
        self.folder.close()
