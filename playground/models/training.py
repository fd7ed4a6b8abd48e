"""A short training loop for very small vision-language models, with thousands of examples a minute on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from playground.models.examples import Batch, image_features
from playground.models.plan import Schedule

MUON = 5.0
"""Learning rate of Muon as a multiple of AdamW's."""


def losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of the responses and the loss of the image tokens' names.

    The first is the cross-entropy in nats, summed over the learned tokens. The second is a mean over image tokens (see
    ``Names``). It makes image features similar to word embeddings, which models of this size otherwise learn late.
    """
    features = image_features(model, batch.pictures)
    # Padding is after the text, which causal attention never sees, so no mask is needed.
    hidden = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions if len(batch.positions) > 1 else batch.positions[0],
        mm_encoder_outputs=features,
        use_cache=False,
    ).last_hidden_state
    learned = batch.learned
    logits = model.lm_head(hidden[:, :-1][learned])
    response = nn.functional.cross_entropy(logits, batch.ids[:, 1:][learned], reduction="sum")
    pictures = features["image"].pooler_output
    tokens = pictures.flatten(0, -2) if isinstance(pictures, Tensor) else torch.cat(list(pictures))
    return response, batch.shown.loss(tokens, model.get_input_embeddings().weight)


def optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside layers and AdamW for the rest.

    Muon learns to copy in a fraction of AdamW's steps.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON * learning_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


class Training:
    """One part of a model's training, in place. It can be saved after any step and continues with the same numbers.

    look: weight of the image tokens' names in the loss. step: number of finished steps.
    """

    def __init__(self, model: Any, schedule: Schedule, look: float = 0.0) -> None:
        self.model, self.schedule, self.look = model, schedule, look
        self.step = 0
        self.optimizers = optimizers(model, schedule.learning_rate)

    def run(self, examples: Iterator[Sequence[Batch]], after: Callable[[float], None] = lambda loss: None) -> None:
        """Train until the end of the schedule.

        Args:
            examples: The parts of each step's batch.
            after: Called after each step with its mean loss for each token.
        """
        bases = [group["initial_lr"] for o in self.optimizers for group in o.param_groups]
        self.model.train()
        with equal_pictures_together(self.model):
            while self.step < self.schedule.steps:
                loss = self._gradients(next(examples))
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                groups = [group for o in self.optimizers for group in o.param_groups]
                for group, base in zip(groups, bases, strict=True):
                    group["lr"] = base * self.schedule.rate(self.step)
                for optimizer in self.optimizers:
                    optimizer.step()
                self.model.zero_grad(set_to_none=True)
                self.step += 1
                after(loss)
        self.model.eval()

    def _gradients(self, parts: Sequence[Batch]) -> float:
        """Compute the gradients of both losses over all parts, and return the mean loss of the responses' tokens."""
        tokens = sum(int(part.learned.sum()) for part in parts)
        total = 0.0
        for part in parts:
            response, shown = losses(self.model, part)
            (response / tokens + self.look * shown / len(parts)).backward()
            total += float(response.detach()) / tokens
        return total

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@contextmanager
def equal_pictures_together(model: Any) -> Iterator[None]:
    """Run Qwen2.5-VL's vision tower on all pictures at once while the block runs. Other models are not changed.

    The architecture computes attention for one picture after the other, and its patch embedding is a convolution over two
    frames, which are equal for a picture. All pictures have the same size here. One call for all pictures and a matrix
    product on one frame give the same numbers in a third of the time.
    """
    visual = getattr(model.model, "visual", None)
    changed: list[Any] = []
    if visual is not None:
        changed = [block.attn for block in visual.blocks]
        for attention in changed:
            attention.forward = _together(attention)
        patches = visual.patch_embed
        patches.forward = _one_frame(patches)
        changed.append(patches)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _one_frame(patches: Any) -> Callable[[Tensor], Tensor]:
    def forward(pixels: Tensor) -> Tensor:
        weight = patches.proj.weight  # [width, channels, frames, height, width]
        frame = pixels.view(len(pixels), weight.shape[1], weight.shape[2], -1)[:, :, 0].flatten(1)
        return nn.functional.linear(frame, weight.sum(2).flatten(1))

    return forward


def _together(attention: Any) -> Callable[..., Tensor]:
    from openril.hf import submodule

    modeling = submodule("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")

    def forward(states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        length, count = states.shape[0], len(cu_seqlens) - 1
        query, key, value = attention.qkv(states).reshape(length, 3, attention.num_heads, -1).unbind(1)
        query, key = modeling.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (
            x.reshape(count, length // count, attention.num_heads, -1).transpose(1, 2) for x in (query, key, value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        return attention.proj(mixed.transpose(1, 2).reshape(length, -1))

    return forward
