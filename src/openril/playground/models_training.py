"""A short training loop for very small vision-language models: thousands of examples a minute on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openril.playground.models_examples import Batch, image_features
from openril.playground.models_plan import Schedule

MUON = 10.0
"""Muon's learning rate as a multiple of AdamW's."""


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the tokens of the responses."""
    # Padding stands behind the text, where causal attention never looks: no mask is needed.
    hidden = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions if len(batch.positions) > 1 else batch.positions[0],
        mm_encoder_outputs=image_features(model, batch.pictures),
        use_cache=False,
    ).last_hidden_state
    learnt = batch.learnt
    return nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][learnt]), batch.ids[:, 1:][learnt])


def optimisers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for the rest."""
    inside = (".layers.", ".blocks.", ".layer.")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and any(part in n for part in inside)]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON * learning_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return made


class Training:
    """One part of a model's training, in place. It can be saved after any step and goes on with the same numbers.

    step: how many are done.
    """

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.step = 0
        self.optimisers = optimisers(model, schedule.learning_rate)

    def run(self, examples: Iterator[Batch], after: Callable[[float], None] = lambda loss: None) -> None:
        """Train to the schedule's end. after: called with the loss of each step done."""
        bases = [group["initial_lr"] for o in self.optimisers for group in o.param_groups]
        self.model.train()
        with equal_pictures_together(self.model):
            while self.step < self.schedule.steps:
                loss = loss_of(self.model, next(examples))
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                groups = [group for o in self.optimisers for group in o.param_groups]
                for group, base in zip(groups, bases, strict=True):
                    group["lr"] = base * self.schedule.rate(self.step)
                for optimiser in self.optimisers:
                    optimiser.step()
                self.model.zero_grad(set_to_none=True)
                self.step += 1
                after(float(loss.detach()))
        self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


@contextmanager
def equal_pictures_together(model: Any) -> Iterator[None]:
    """Qwen2.5-VL's vision attention takes one picture after the other, and its patches go through a convolution that
    sees each of them once; here all pictures are equally large and go in one call, and the convolution is the matrix
    product that it amounts to. The same numbers in a third of the time; nothing changes for other models.
    """
    visual = getattr(model.model, "visual", None)
    changed: list[Any] = []
    if visual is not None:
        changed = [block.attn for block in visual.blocks]
        for attention in changed:
            attention.forward = _together(attention)
        patches = visual.patch_embed
        patches.forward = lambda pixels: nn.functional.linear(pixels, patches.proj.weight.flatten(1))
        changed.append(patches)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _together(attention: Any) -> Callable[..., Tensor]:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    def forward(states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        length, count = states.shape[0], len(cu_seqlens) - 1
        query, key, value = attention.qkv(states).reshape(length, 3, attention.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (
            x.reshape(count, length // count, attention.num_heads, -1).transpose(1, 2) for x in (query, key, value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        return attention.proj(mixed.transpose(1, 2).reshape(length, -1))

    return forward
