"""A dummy image for micro-batches without images, so that every process runs the same forward pass.

Otherwise a process with text-only questions would skip the vision side, and the run would hang while other processes
wait for its gradients or, with sharded weights, for its all-gather. The dummy image has no weight in the loss.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import nn

from openril.models.freezing import module_group
from openril.models.prompts import Prompt, PromptEncoder


def dummy_image_prompt(encoder: PromptEncoder, model: nn.Module, num_processes: int) -> Prompt | None:
    """Return a prompt of one small gray image, or None if it is not needed (one process, or no vision side)."""
    if num_processes == 1 or not any(
        module_group(name) in ("vision_tower", "projector") for name, _ in model.named_parameters()
    ):
        return None
    message: dict[str, Any] = {"role": "user", "content": [{"type": "image"}]}
    return encoder.encode([message], [Image.new("RGB", (56, 56), (128, 128, 128))], name="dummy image")


def has_images(prompts: list[Prompt]) -> bool:
    return any(p.vision for p in prompts)
