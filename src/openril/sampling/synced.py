"""Sample from servers whose weights follow the policy's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from openril.errors import EndpointError
from openril.recipe.schema import SamplingConfig
from openril.records import STUDENT, Question, Response
from openril.sampling.vllm_engine import VLLMSampler


@dataclass(eq=False, repr=False)
class SyncedSampler:
    """A ``Sampler`` that sends new weights to the servers before it samples. Every process must sample equally often.

    Args:
        folder: Folder through which the weights are sent (``train.sampler.weights_dir``).
        write: Writes the policy to the folder as a checkpoint; every process calls it.
        policy: The wrapped ``Policy``.
        version: Returns a number that changes whenever the weights do.
        probes: Questions that verify a sync, the same in every process; one with images and one without are enough.
    """

    sampler: VLLMSampler
    _: KW_ONLY
    folder: Path
    write: Callable[[Path], None]
    policy: Any
    accelerator: Accelerator
    version: Callable[[], int]
    probes: Sequence[Question]
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
        self.write(self.folder)
        self.accelerator.wait_for_everyone()
        failure: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                self.sampler.sync(self.folder)
            except EndpointError as e:
                failure = [str(e)]
        broadcast_object_list(failure)  # otherwise the other processes would wait forever for one that has raised
        if failure[0] is not None:
            raise EndpointError(failure[0])
        self.sampler.verify(self.policy, self.probes)

    def close(self) -> None:
        """Close connections."""
        self.sampler.close()
