"""Decode with shared keys and values of the prompts: one packed row of prompts, then one of all newest tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from openril.models.adapters import base_model
from openril.models.group_attention import CannotPack, enable, no_mask
from openril.models.prompts import Prompt
from openril.sampling.plain_rows import PlainRows
from openril.sampling.shared_prefix_cache import SharedPrefixCache

Vision = Callable[[Sequence[Prompt]], dict[str, Any] | None]
"""Returns ``mm_encoder_outputs`` for prompts that follow each other in a row, or None, as ``VisionFeatures`` does."""


class SharedPrefixRows:
    """Rows being decoded: num_generations of each prompt, at most limit tokens each.

    ``logits`` are those after each prompt, [prompts, V]. Attention that cannot share prompts raises CannotPack.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], num_generations: int, limit: int, vision: Vision | None
    ) -> None:
        self.model = base_model(model)
        enable(self.model)
        self._device = next(self.model.parameters()).device
        self._mask = no_mask(self._device)
        self._mrope = prompts[0].position_ids.shape[0] > 1
        self._cache = SharedPrefixCache([p.length for p in prompts], num_generations, limit)
        self.logits = self._prefill(prompts, vision)
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(self._cache.layers) != layers:
            raise CannotPack(f"{len(self._cache.layers)} of its {layers} layers take group_layout")
        self._position = torch.tensor(
            [p.next_position for p in prompts for _ in range(num_generations)], device=self._device
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only these of the running rows (ascending)."""
        self._cache.keep(rows)
        self._position = self._position[torch.tensor(rows, device=self._device)]

    def advance(self, tokens: Tensor) -> Tensor:
        """Return the logits [N, V] after the newest token of each row, int64 [N]."""
        position = self._position[None]
        output = self.model(
            input_ids=tokens[None],
            attention_mask=self._mask,
            position_ids=position.expand(3, 1, -1) if self._mrope else position,
            use_cache=False,
            group_layout=self._cache.decode(),
        )
        self._position = self._position + 1
        return output.logits[0]

    def _prefill(self, prompts: Sequence[Prompt], vision: Vision | None) -> Tensor:
        """Run all prompts in one call, or one by one if the model takes only image tensors, which cannot be joined."""
        features = vision(prompts) if vision is not None else None
        if features is not None or not any(p.vision for p in prompts):
            return self._read(prompts, {"mm_encoder_outputs": features} if features is not None else {})
        return torch.cat([self._read([p], {k: v.to(self._device) for k, v in p.vision.items()}) for p in prompts])

    def _read(self, prompts: Sequence[Prompt], images: dict[str, Any]) -> Tensor:
        lengths = [p.length for p in prompts]
        position = torch.cat([p.position_ids for p in prompts], dim=1).to(self._device)
        output = self.model(
            input_ids=torch.cat([p.input_ids for p in prompts])[None].to(self._device),
            attention_mask=self._mask,
            position_ids=position[:, None] if self._mrope else position,
            logits_to_keep=torch.tensor(lengths, device=self._device).cumsum(0) - 1,
            use_cache=False,
            group_layout=self._cache.read(lengths),
            **images,
        )
        return output.logits[0]


def decoding_difference(model: Any, prompts: Sequence[Prompt], vision: Vision | None, tokens: Sequence[int]) -> float:
    """Return the larger difference of shared and plain decoding after the prompts and after two tokens, in nats a token.

    Args:
        tokens: At least three ids that may occur in a response.

    Raises:
        CannotPack: The model's attention cannot take shared prompts.
    """
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base_model(model).forward).parameters.values()):
        raise CannotPack("it takes no keywords for its attention")
    device = next(model.parameters()).device
    shared, plain = SharedPrefixRows(model, prompts, 2, 3, vision), PlainRows(model, prompts, 2)
    worst = _difference(shared.logits, plain.logits)
    first = torch.tensor([tokens[i % 2] for i in range(2 * len(prompts))], device=device)
    worst = max(worst, _difference(shared.advance(first), plain.advance(first)))
    kept = range(1, 2 * len(prompts))
    shared.keep(kept)
    plain.keep(kept)
    second = torch.tensor([tokens[2 - i % 2] for i in kept], device=device)
    return max(worst, _difference(shared.advance(second), plain.advance(second)))


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the mean over rows of the expected difference in nats, under the distribution of ``b``."""
    expected = b.float().log_softmax(-1)
    return float((expected.exp() * (a.float().log_softmax(-1) - expected).abs()).sum(-1).mean())
