"""Floating-point operations that a step cannot do without, counted from a model's numbers. No torch here.

A multiplication and an addition are two operations. Counted are matrix products alone: linear layers (2 x weights a
token), and attention (scores and weighted values, 2 x 2 x heads x head size for every pair of a token and one it sees).
Every token is counted once, however often a program runs it: a prompt once a question, its image through the vision
tower once.
"""

from __future__ import annotations

from dataclasses import dataclass

from openril.benchmarking.shapes import MERGE, WINDOW, ModelSize


@dataclass(frozen=True)
class UniqueWork:
    """Operations for one question with its responses, by part."""

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
    """Pairs (token, token it sees) of a group: the prompt causally; each response the whole prompt and itself causally."""
    causal = prompt * (prompt + 1) // 2
    return causal + group_size * (response * prompt + response * (response + 1) // 2)


def window_pairs(patches_down: int, patches_across: int) -> int:
    """Pairs of patches that see each other in a windowed vision layer: the sum of the squared sizes of its windows."""

    def sizes(n: int) -> list[int]:
        return [min(WINDOW, n - start) for start in range(0, n, WINDOW)]

    return sum((a * b) ** 2 for a in sizes(patches_down) for b in sizes(patches_across))


def unique_work(size: ModelSize, prompt: int, grid: tuple[int, int], response: int, group_size: int) -> UniqueWork:
    """Operations of one policy pass over one question; the vision tower is frozen, everything else trains.

    prompt: tokens of the prompt, image tokens included. grid: image tokens down and across. Logits are counted where a
    response token is predicted. Backward: 2 x forward of language layers, attention and LM head (gradients of inputs
    and of weights); the merger's first layer needs no gradient of its input (the tower is frozen), its second both.
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
    """Operations of an update with a reference (beta above 0) at mu = 1, where pi_old is pi_theta and costs nothing.

    The frozen vision tower is the same in policy and reference, so it counts once; the merger trains, so each has its own.
    """
    work = unique_work(size, prompt, grid, response, group_size)
    reference = work.forward - work.vision_tower
    return questions * (work.forward + reference + work.backward)


def decode_bytes(
    size: ModelSize, prompt: int, response: int, group_size: int, questions: int, bytes_per_number: int
) -> tuple[float, float]:
    """Bytes an average decoding step has to read: (weights, keys and values).

    Weights: language layers and LM head once for all rows. Keys and values: the prompt's once a question, since its rows
    can share them, and each row's own tokens so far, (response - 1) / 2 on average.
    """
    weights = size.layers * size.layer_weights + size.hidden * size.vocab
    per_token = 2 * size.layers * size.kv_heads * size.head_dim
    own = group_size * (response - 1) / 2
    return float(bytes_per_number * weights), float(bytes_per_number * questions * per_token * (prompt + own))
