"""Every process must run the same forward: a micro-batch without images borrows a tiny one, which earns no gradient.

Otherwise a process with text-only questions would skip the vision side while another waits for its gradients (or, with
sharded weights, for its all-gather), and the run hangs.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import nn

from openril.models.freezing import module_group
from openril.models.prompts import Prompt, PromptEncoder


def dummy_image_prompt(encoder: PromptEncoder, model: nn.Module, num_processes: int) -> Prompt | None:
    """A prompt that is one small grey image, or None where it is not needed (one process, or no vision side)."""
    if num_processes == 1 or not any(
        module_group(name) in ("vision_tower", "projector") for name, _ in model.named_parameters()
    ):
        return None
    message: dict[str, Any] = {"role": "user", "content": [{"type": "image"}]}
    return encoder.encode([message], [Image.new("RGB", (56, 56), (128, 128, 128))], name="borrowed image")


def has_images(prompts: list[Prompt]) -> bool:
    return any(p.vision for p in prompts)
