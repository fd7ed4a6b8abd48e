"""Decode with transformers' cache: the reference, and the fallback for attention that cannot share prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openril.errors import ModelError
from openril.hf import DynamicCache
from openril.models.adapters import base_model
from openril.models.prompts import Prompt


class PlainRows:
    """Rows being decoded: num_generations of each prompt, each with a copy of the prompt's cache, padded on the left.

    ``logits`` are those after each prompt, [prompts, V]. Layers without keys and values raise ModelError.
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt], num_generations: int) -> None:
        self.model = model
        device = next(model.parameters()).device
        longest = max(p.length for p in prompts)
        self._cache, self.logits = self._prefill(prompts, num_generations, longest, device)
        self._mrope = prompts[0].position_ids.shape[0] > 1
        lengths = torch.tensor([p.length for p in prompts for _ in range(num_generations)], device=device)
        self._position = torch.tensor([p.next_position for p in prompts for _ in range(num_generations)], device=device)
        self._mask = (torch.arange(longest, device=device)[None] >= longest - lengths[:, None]).long()

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only these of the running rows."""
        index = torch.tensor(rows, device=self._mask.device)
        self._cache.batch_select_indices(index)
        self._mask, self._position = self._mask[index], self._position[index]

    def advance(self, tokens: Tensor) -> Tensor:
        """Return the logits [N, V] after the newest token of each row, int64 [N]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        position = self._position[:, None]
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self._mask,
            position_ids=position[None].expand(3, -1, -1) if self._mrope else position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._position = self._position + 1
        return output.logits[:, -1]

    def _prefill(
        self, prompts: Sequence[Prompt], num_generations: int, longest: int, device: torch.device
    ) -> tuple[Any, Tensor]:
        """Run each prompt alone and unpadded, then make one cache for all rows, padded on the left."""
        states: list[list[tuple[Tensor, Tensor]]] = []  # of each prompt and layer
        logits = []
        for prompt in prompts:
            inputs = {k: v.to(device) for k, v in prompt.vision.items()}
            if prompt.token_types is not None:
                inputs[prompt.token_type_key] = prompt.token_types[None].to(device)
            position_ids = prompt.position_ids[:, None].to(device)
            output = self.model(
                input_ids=prompt.input_ids[None].to(device),
                attention_mask=torch.ones(1, prompt.length, dtype=torch.long, device=device),
                position_ids=position_ids if position_ids.shape[0] > 1 else position_ids[0],
                past_key_values=DynamicCache(config=base_model(self.model).config.get_text_config()),
                use_cache=True,
                logits_to_keep=1,
                **inputs,
            )
            logits.append(output.logits[:, -1])
            layers = output.past_key_values.layers
            if not all(hasattr(layer, "keys") for layer in layers):
                raise ModelError(
                    f"student.sampler.engine: {type(self.model).__name__} has layers without keys and values (linear"
                    " attention), whose states cannot be copied for several samples. Set it to vllm."
                )
            pad = partial(_left_pad, length=longest, rows=num_generations)
            states.append([(pad(layer.keys), pad(layer.values)) for layer in layers])
        merged = DynamicCache()
        for number, layer in enumerate(zip(*states, strict=True)):
            keys, values = (torch.cat(part) for part in zip(*layer, strict=True))
            merged.update(keys, values, number)
        return merged, torch.cat(logits)


def _left_pad(states: Tensor, length: int, rows: int) -> Tensor:
    """[1, H, P, D] -> [rows, H, length, D], zeros on the left."""
    padded = nn.functional.pad(states, (0, 0, length - states.shape[2], 0))
    return padded.expand(rows, -1, -1, -1)
