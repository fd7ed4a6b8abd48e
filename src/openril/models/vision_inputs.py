"""Image tensors of several prompts as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openril.models.prompts import Prompt


def collate_vision_inputs(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """What the model's own processor would return for all of these prompts' images, in order; {} without images.

    Tensors are concatenated along dim 0. Where prompts have unlike sizes behind it, zeros are added at the end: the
    tiles of LLaVA-OneVision ([image, tile, 3, H, W], its model cuts them off by image size) and of SmolVLM and Idefics3
    ([prompt, tile, 3, H, W], its model drops tiles that are all zero) are padded by their processors in the same way.
    """
    keys = dict.fromkeys(key for p in prompts for key in p.vision)
    return {key: _concatenate([p.vision[key] for p in prompts if key in p.vision]) for key in keys}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    common = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = []
    for t in tensors:
        # pad() takes the last dimension first
        missing = [n for most, size in zip(common[::-1], t.shape[:0:-1], strict=True) for n in (0, most - size)]
        padded.append(nn.functional.pad(t, missing) if any(missing) else t)
    return torch.cat(padded)
