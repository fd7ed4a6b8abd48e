"""Collate image tensors of several prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openril.models.prompts import Prompt


def collate_vision_inputs(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Return what the model's processor would return for the images of all prompts in order; {} without images.

    Tensors are concatenated along dim 0. Other dimensions of different size are padded with zeros at the end, as the
    processors do: LLaVA-OneVision's tiles are [image, tile, 3, H, W], and its model cuts the padding off by image size;
    SmolVLM's and Idefics3's are [prompt, tile, 3, H, W], and their models drop tiles that are all zero.
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
