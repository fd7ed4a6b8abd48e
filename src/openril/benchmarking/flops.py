"""Count the floating-point operations that a step needs at least, from a model's sizes. Imports no torch.

A multiplication and an addition are two operations. Only matrix products count: linear layers (2 x weights for each
token) and attention (scores and weighted values, 2 x 2 x heads x head size for every pair of a token and one that it
sees). Every token counts once, however often a program runs it: a prompt once for each question, and its image through
the vision tower once.
"""

from __future__ import annotations

from dataclasses import dataclass

from openril.benchmarking.shapes import MERGE, WINDOW, ModelSize


@dataclass(frozen=True)
class UniqueWork:
    """The operations for one question with its responses, by part."""

    vision_tower: float
    merger: float
    language: float
    attention: float
    lm_head: float
    backward: float

    @property
    def forward(self) -> float:
        return self.vision_tower + self.merger + self.language + self.attention + self.lm_head


def attended_pairs(prompt: int, response: int, group_size: int) -> int:
    """Count the pairs (token, token that it sees) of a group: each response sees the prompt, and itself causally."""
    causal = prompt * (prompt + 1) // 2
    return causal + group_size * (response * prompt + response * (response + 1) // 2)


def window_pairs(patches_down: int, patches_across: int) -> int:
    """Count the pairs of patches in a windowed vision layer: the sum of the squared sizes of its windows."""

    def sizes(n: int) -> list[int]:
        return [min(WINDOW, n - start) for start in range(0, n, WINDOW)]

    return sum((a * b) ** 2 for a in sizes(patches_down) for b in sizes(patches_across))


def unique_work(size: ModelSize, prompt: int, grid: tuple[int, int], response: int, group_size: int) -> UniqueWork:
    """Count the operations of one policy pass over one question. The vision tower is frozen, and everything else trains.

    Logits count where a response token is predicted. The backward pass takes twice the operations of language layers,
    attention and LM head (gradients of inputs and weights). The merger's first layer needs no gradient of its input,
    because the tower is frozen; its second layer needs both. prompt: the tokens of the prompt, including image tokens.
    grid: the image tokens down and across.
    """
    down, across = (MERGE * n for n in grid)
    patches, image_tokens = down * across, grid[0] * grid[1]
    full = len(size.vision_full)
    pairs = full * patches**2 + (size.vision_layers - full) * window_pairs(down, across)
    tower = 2.0 * patches * (size.patch_weights + size.vision_layers * size.vision_layer_weights)
    tower += 4.0 * size.vision_hidden * pairs
    first, second = (2.0 * image_tokens * w for w in size.merger_weights)
    tokens = prompt + group_size * response
    language = 2.0 * tokens * size.layers * size.layer_weights
    attention = 4.0 * size.hidden * size.layers * attended_pairs(prompt, response, group_size)
    lm_head = 2.0 * group_size * response * size.hidden * size.vocab
    return UniqueWork(
        vision_tower=tower,
        merger=first + second,
        language=language,
        attention=attention,
        lm_head=lm_head,
        backward=2 * (language + attention + lm_head) + first + 2 * second,
    )


def update_flops(
    size: ModelSize, prompt: int, grid: tuple[int, int], response: int, group_size: int, questions: int
) -> float:
    """Count the operations of an update with a reference (beta above 0) at mu = 1, where pi_old is pi_theta.

    The frozen vision tower is the same in policy and reference and counts once. The merger trains and counts for each.
    """
    work = unique_work(size, prompt, grid, response, group_size)
    reference = work.forward - work.vision_tower
    return questions * (work.forward + reference + work.backward)


def decode_bytes(
    size: ModelSize, prompt: int, response: int, group_size: int, questions: int, bytes_per_number: int
) -> tuple[float, float]:
    """Return the bytes that an average decoding step has to read, as (weights, keys and values).

    The weights of language layers and LM head are read once for all rows. The prompt's keys and values are read once for
    each question, because its rows can share them, and each row's own tokens are (response - 1) / 2 on average.
    """
    weights = size.layers * size.layer_weights + size.hidden * size.vocab
    per_token = 2 * size.layers * size.kv_heads * size.head_dim
    own = group_size * (response - 1) / 2
    return float(bytes_per_number * weights), float(bytes_per_number * questions * per_token * (prompt + own))
