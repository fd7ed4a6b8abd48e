"""The discriminator network: the student's backbone with a linear head d x 1 on the last token (paper, section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from openril.errors import ModelError
from openril.hf import AutoModel
from openril.models.group_attention import CannotPack, enable
from openril.models.loading import PendingWeights, checked, load_model, load_processor
from openril.models.packing import Batch, run_packed
from openril.models.saving import full_tensor, write_model
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.recipe.schema import StudentConfig

HEAD_FILE = "score_head.safetensors"


class DiscriminatorModel(nn.Module):
    """The backbone of a vision-language model and a score head; the logit is of student_prob.

    On disk it is an ordinary checkpoint of the backbone, which ``AutoModel.from_pretrained`` loads, with its processor
    and with the head in ``score_head.safetensors``.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1)
        self.vision = VisionFeatures(backbone, FeatureCache(0))

    @classmethod
    def from_student(
        cls,
        checkpoint: str,
        student: StudentConfig,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        meta: bool = False,
    ):
        """Build it from the student's weights, with a new score head drawn from ``seed`` in place of the LM head.

        meta: See ``load_model``; ``backbone.pending`` are the weights.
        """
        model: Any = load_model(
            checkpoint,
            what="discriminator",
            dtype=dtype,
            revision=student.revision if checkpoint == student.model else None,
            trust_remote_code=student.trust_remote_code,
            attn_implementation=student.attn_implementation,
            meta=meta,
        )
        backbone: Any = model.model
        if meta:
            backbone.pending = model.pending
        hidden = model.config.get_text_config().hidden_size
        made = cls(backbone, hidden)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            made.head.weight.copy_(torch.randn(1, hidden, generator=generator) * hidden**-0.5 * 0.1)
            made.head.bias.zero_()
        return made.eval()

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, student: StudentConfig, *, dtype: torch.dtype = torch.float32, meta: bool = False
    ):
        """Load what ``save`` wrote; meta as for ``from_student``. Raises ModelError if the folder holds no discriminator."""
        folder = Path(folder)
        if not (folder / HEAD_FILE).is_file():
            raise ModelError(
                f"{folder}: expected a discriminator, but {HEAD_FILE} is missing. Run `ril discriminator` first."
            )
        checked(str(folder), "discriminator", weights=True)
        try:
            loaded: Any = AutoModel.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=student.trust_remote_code,
                attn_implementation=student.attn_implementation,
                use_safetensors=True,
                output_loading_info=True,
                device_map={"": "meta"} if meta else None,
            )
        except (OSError, ValueError) as e:
            raise ModelError(f"{folder}: the discriminator cannot be loaded: {e}") from e
        backbone, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ModelError(
                f"{folder}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...) and would be random."
            )
        if meta:
            backbone.pending = PendingWeights(backbone, folder)
        head = load_file(folder / HEAD_FILE)
        made = cls(backbone, head["weight"].shape[1])
        made.head.load_state_dict(head)
        return made.eval()

    def save(self, folder: Path, processor: Any, *, widen: bool = False, main: bool = True) -> None:
        """Write backbone, head and processor atomically, as ``write_model`` does. Every process must call this."""
        head = {name: full_tensor(value).cpu() for name, value in self.head.state_dict().items()}
        write_model(self.backbone, folder, processor, widen=widen, main=main, extra={HEAD_FILE: head})

    def forward(self, rows: Batch) -> Tensor:
        """Return float32 [R]: the logits of student_prob, one for each response of the rows."""
        if rows.layout is None:
            hidden = self.backbone(**rows.model_inputs, use_cache=False).last_hidden_state
        else:
            hidden = run_packed(self.backbone, rows, self.vision)
        state = hidden.flatten(0, 1)[rows.last]
        # The head always computes in float32, whatever autocast does around it.
        with torch.autocast(device_type=state.device.type, enabled=False):
            scores = self.head(state.to(self.head.weight.dtype)).float()
        return scores[:, 0].clone()  # fully_shard warns of views

    def enable_packing(self, store: FeatureCache) -> None:
        """Let the backbone take packed rows, and keep its frozen vision outputs in ``store``. May raise CannotPack."""
        self.vision = VisionFeatures(self.backbone, store)
        if not self.vision.available:
            raise CannotPack("it does not accept precomputed image features")
        enable(self.backbone)


def load_discriminator_processor(folder: str | Path, student: StudentConfig, *, images: bool) -> Any:
    """Load the processor of a discriminator, or of the checkpoint it starts from.

    images: Whether it reads images. Otherwise the student's limits of their size do not apply, which the processor of
    another family may not support.
    """
    return load_processor(
        str(folder),
        what="discriminator",
        revision=student.revision if str(folder) == student.model else None,
        trust_remote_code=student.trust_remote_code,
        min_pixels=student.min_pixels if images else 0,
        max_pixels=student.max_pixels if images else 0,
    )
