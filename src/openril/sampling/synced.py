"""A sampler on servers that always holds the policy's present weights: what the loop uses in place of a local one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from openril.errors import EndpointError
from openril.recipe.schema import SamplingConfig
from openril.records import STUDENT, Question, Response
from openril.sampling.vllm_engine import VLLMSampler


class SyncedSampler:
    """A ``Sampler`` that gives the servers new weights before it samples, whenever there are new ones.

    folder: where the weights pass through (``train.sampler.weights_dir``). write: writes the policy there as a
    checkpoint; every process calls it. policy: the wrapped ``Policy``. version: changes whenever the weights do, for
    instance the number of the step. probes: questions that a sync is verified on, the same in every process; one with
    images and one without are enough. Every process must sample equally often.
    """

    def __init__(
        self,
        sampler: VLLMSampler,
        *,
        folder: Path,
        write: Callable[[Path], None],
        policy: Any,
        accelerator: Accelerator,
        version: Callable[[], int],
        probes: Sequence[Question],
    ) -> None:
        self.sampler = sampler
        self.folder = folder
        self.write = write
        self.policy = policy
        self.accelerator = accelerator
        self.version = version
        self.probes = list(probes)
        self._synced: int | None = None

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
        """See ``Sampler``. Raises EndpointError, in every process, when a server does not take the new weights."""
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
        self.write(self.folder)
        self.accelerator.wait_for_everyone()
        failure: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                self.sampler.sync(self.folder)
            except EndpointError as e:
                failure = [str(e)]
        broadcast_object_list(failure)  # the others would wait for ever for a process that has raised
        if failure[0] is not None:
            raise EndpointError(failure[0])
        self.sampler.verify(self.policy, self.probes)

    def close(self) -> None:
        """Close connections."""
        self.sampler.close()
