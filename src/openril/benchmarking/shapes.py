"""The models of the benchmark, with the proportions of the real 3B, and the shapes of a step. Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from openril.errors import OpenRILError

Precision = Literal["float32", "bfloat16", "pure_bf16"]
"""float32; bfloat16 autocast over float32 weights (the default of ``train.precision``); bfloat16 weights."""

PATCH = 14
"""Pixels along a side of a vision patch."""
MERGE = 2
"""Patches along a side of an image token."""
WINDOW = 8
"""Patches along a side of a window of the vision tower's windowed layers (112 pixels)."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a Qwen2.5-VL. vision_full: the layers of the vision tower that attend over the whole image."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int
    vision_full: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of the linear layers of one language layer: q, k, v, o, gate, up, down."""
        kv = self.kv_heads * self.head_dim
        return 2 * self.hidden * self.hidden + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate

    @property
    def vision_layer_weights(self) -> int:
        """Weights of the linear layers of one vision layer: q, k, v, o, gate, up, down."""
        return 4 * self.vision_hidden**2 + 3 * self.vision_hidden * self.vision_intermediate

    @property
    def merger_weights(self) -> tuple[int, int]:
        """Weights of the two linear layers that make an image token of MERGE x MERGE patches."""
        wide = self.vision_hidden * MERGE**2
        return wide * wide, wide * self.hidden

    @property
    def patch_weights(self) -> int:
        """Weights of the patch embedding: two frames of 3 x PATCH x PATCH numbers to vision_hidden."""
        return 3 * 2 * PATCH * PATCH * self.vision_hidden

    @property
    def vision_share(self) -> float:
        """Linear work of the vision side for one image token over the language layers' for one token."""
        tower = MERGE**2 * (self.patch_weights + self.vision_layers * self.vision_layer_weights)
        return (tower + sum(self.merger_weights)) / (self.layers * self.layer_weights)


MODELS = {
    # Only for tests of the benchmark: too small for its speed to mean anything.
    "micro": ModelSize(32, 2, 2, 1, 64, 600, 32, 1, 1, 64, (0,)),
    "tiny": ModelSize(256, 3, 4, 1, 1376, 4096, 160, 2, 5, 352, (1,)),
    "wide": ModelSize(512, 4, 8, 1, 2752, 4096, 320, 3, 10, 856, (2,)),
    "qwen2_5_vl_3b": ModelSize(2048, 36, 16, 2, 11008, 151936, 1280, 32, 16, 3420, (7, 15, 23, 31)),
}
"""Models by name. tiny and wide have the 3B's ratio of intermediate to hidden size (5.375) and of vision to language
work per image token (0.92 to 0.97), at sizes that a CPU can train."""

QUESTIONS = 2
"""The number of questions in a step."""


@dataclass(frozen=True)
class Shape:
    """One step: QUESTIONS questions with one image of about image_tokens, and group_size (2G) responses to each of
    exactly response_tokens. precision: None for that of the run."""

    model: str
    image_tokens: int
    response_tokens: int
    group_size: int
    precision: Precision | None = None

    @property
    def name(self) -> str:
        numbers = f"{self.model}-{self.image_tokens}-{self.response_tokens}-{self.group_size}"
        return f"{numbers}-{self.precision}" if self.precision else numbers

    @property
    def size(self) -> ModelSize:
        return MODELS[self.model]

    @property
    def grid(self) -> tuple[int, int]:
        """The image tokens down and across, of a picture of about 3 : 4."""
        down = max(1, round((self.image_tokens * 0.75) ** 0.5))
        return down, max(1, self.image_tokens // down)

    @property
    def rows(self) -> int:
        return QUESTIONS * self.group_size

    @property
    def words(self) -> str:
        numbers = f"{self.image_tokens} image tokens, responses of {self.response_tokens}, 2G = {self.group_size}"
        return f"{self.model}, {numbers}" + (f", {self.precision}" if self.precision else "")


def grid_of(model: str) -> list[Shape]:
    """Return the whole grid of one model."""
    return [Shape(model, n, t, g) for n in (200, 500, 1000) for t in (32, 128) for g in (8, 16)]


def parse_shape(name: str) -> list[Shape]:
    """Read MODEL (its whole grid) or MODEL-IMAGETOKENS-RESPONSETOKENS-GROUPSIZE[-PRECISION]. Raises OpenRILError."""
    if name in MODELS:
        return grid_of(name)
    match = re.fullmatch(r"(\w+)-(\d+)-(\d+)-(\d+)(?:-(\w+))?", name)
    model = match[1] if match else name.split("-")[0]
    if model not in MODELS:
        near = difflib.get_close_matches(model, MODELS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise OpenRILError(f"--shape: expected a model of {', '.join(MODELS)}, got {model!r}{hint}")
    if match is None:
        raise OpenRILError(
            "--shape: expected MODEL or MODEL-IMAGETOKENS-RESPONSETOKENS-GROUPSIZE, for example tiny-200-32-8, "
            f"got {name!r}"
        )
    if match[5] not in (None, *get_args(Precision)):
        raise OpenRILError(f"--shape: expected a precision of {', '.join(get_args(Precision))}, got {match[5]!r}")
    image, response, group = (int(match[i]) for i in (2, 3, 4))
    shape = Shape(match[1], image, response, group, cast("Precision | None", match[5]))
    if not (4 <= shape.image_tokens <= 16384 and 1 <= shape.response_tokens <= 4096):
        raise OpenRILError(f"--shape: expected 4 to 16384 image tokens and 1 to 4096 response tokens, got {name!r}")
    if shape.group_size < 2 or shape.group_size % 2:
        raise OpenRILError(f"--shape: expected an even group size 2G of at least 2, got {shape.group_size} in {name!r}")
    return [shape]
