"""Define the families of models that can be built tiny: special tokens, chat templates and processors.

Each family uses the real transformers classes, and marks images in its prompts as its published checkpoints do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, processors

from openril.hf import PreTrainedTokenizerFast, transformers
from openril.testing.tiny_templates import CHATML, IMAGES_FIRST, TURNS, UTTERANCES

PATCH = 14
"""Pixels on each side of a vision patch, unless the family sets another size."""


@dataclass(frozen=True)
class Sizes:
    """The sizes given to ``build_tiny_model``, and the parts made before the model."""

    text: dict[str, Any]
    """Settings that every language model shares."""
    ids: dict[str, int]
    """Id of every special token."""
    tokenizer: PreTrainedTokenizerFast
    vision_hidden_size: int
    vision_layers: int
    max_pixels: int
    tile_size: int
    max_tiles: int

    @property
    def head_dim(self) -> int:
        return self.text["hidden_size"] // self.text["num_attention_heads"]

    @property
    def vision_heads(self) -> int:
        return max(1, self.vision_hidden_size // 32)

    @property
    def tile_tokens(self) -> int:
        """Image tokens of a tile if the projector joins 2 x 2 patches."""
        return (self.tile_size // (2 * PATCH)) ** 2

    def vision(self, **names: Any) -> dict[str, Any]:
        """Return the settings of a vision transformer over square images of one tile."""
        return {
            "hidden_size": self.vision_hidden_size,
            "intermediate_size": 2 * self.vision_hidden_size,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "image_size": self.tile_size,
            "patch_size": PATCH,
            **names,
        }


@dataclass(frozen=True)
class Family:
    """A family of models."""

    tokens: list[str]
    """Special tokens in the order of their ids."""
    template: str
    build: Callable[[Sizes], tuple[Any, Any]]
    """Makes the model, from torch's current random state, and its processor."""
    ends: tuple[str, ...] = ("<|im_end|>",)
    """Tokens that end generation; the first is the tokenizer's end-of-sequence token."""
    pad: str = "<|endoftext|>"
    bos: str | None = None
    writes_bos: bool = False
    """Whether the tokenizer itself puts ``bos`` in front of a text."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Attributes that the processor reads from the tokenizer."""

    def tokenizer(self, backend: Tokenizer) -> PreTrainedTokenizerFast:
        if self.bos and self.writes_bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, backend.token_to_id(self.bos))]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=self.bos,
            eos_token=self.ends[0],
            pad_token=self.pad,
            extra_special_tokens=dict(self.names),
            padding_side="left",
            model_max_length=32768,
        )
        tokenizer.chat_template = self.template
        return tokenizer


_CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN = [*_CHAT, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_QWEN_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_TEMPLATE = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


def _qwen2(sizes: Sizes) -> tuple[Any, Any]:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes.text)), sizes.tokenizer


def _build(name: str, sizes: Sizes, config: dict[str, Any], **processor: Any) -> tuple[Any, Any]:
    """Return the model and the processor of the transformers classes with this name."""
    whole = getattr(transformers, f"{name}Config")(**{"tie_word_embeddings": False, **config})
    return getattr(transformers, f"{name}ForConditionalGeneration")(whole), getattr(transformers, f"{name}Processor")(
        tokenizer=sizes.tokenizer, chat_template=sizes.tokenizer.chat_template, **processor
    )


def _qwen_vl(
    name: str,
    sizes: Sizes,
    *,
    height: int,
    rope: dict[str, Any],
    text: dict[str, Any],
    vision: dict[str, Any],
    smallest: int,
    image_settings: dict[str, Any],
    video_processor: Any,
) -> tuple[Any, Any]:
    """Build a Qwen-VL. M-RoPE divides a head's rotary pairs: ``height`` for height and for width, the rest for time.

    smallest: the smallest image area in pixels.
    """
    rope = {"rope_type": "default", "mrope_section": [sizes.head_dim // 2 - 2 * height, height, height], **rope}
    config = {
        "text_config": {**sizes.text, "rope_parameters": rope, **text},
        "vision_config": {
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": 2 * sizes.vision_hidden_size,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.text["hidden_size"],
            **vision,
        },
        **{f"{attribute}_id": sizes.ids[token] for attribute, token in _QWEN_NAMES.items()},
    }
    size = {"shortest_edge": smallest, "longest_edge": sizes.max_pixels}
    images = transformers.Qwen2VLImageProcessor(size=size, **image_settings)
    return _build(name, sizes, config, image_processor=images, video_processor=video_processor)


def _qwen2_5_vl(sizes: Sizes) -> tuple[Any, Any]:
    return _qwen_vl(
        "Qwen2_5_VL",
        sizes,
        height=3 * (sizes.head_dim // 2) // 8,  # time : height : width are 2 : 3 : 3 as in the real models
        rope={"rope_theta": 1e6},
        text={"use_sliding_window": False},
        vision={"fullatt_block_indexes": [sizes.vision_layers - 1]},
        smallest=28 * 28,
        image_settings={},
        video_processor=transformers.Qwen2VLVideoProcessor(),
    )


def _qwen3_vl(sizes: Sizes) -> tuple[Any, Any]:
    return _qwen_vl(
        "Qwen3VL",
        sizes,
        height=5 * (sizes.head_dim // 2) // 16,  # dealt in turn, about 6 : 5 : 5 in the real models
        rope={"rope_theta": 5e6, "mrope_interleaved": True},
        text={"head_dim": sizes.head_dim},
        vision={
            "num_position_embeddings": 8 * 8,
            # These layers' features are added to the first layers of the language model.
            "deepstack_visual_indexes": sorted({0, sizes.vision_layers - 1}),
        },
        smallest=32 * 32,
        image_settings={"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        video_processor=transformers.Qwen3VLVideoProcessor(),
    )


def _internvl(sizes: Sizes) -> tuple[Any, Any]:
    side = sizes.tile_size
    config = {
        "text_config": {"model_type": "qwen2", **sizes.text},
        "vision_config": sizes.vision(image_size=[side, side], patch_size=[PATCH, PATCH]),
        "image_token_id": sizes.ids["<IMG_CONTEXT>"],
        "image_seq_length": sizes.tile_tokens,
        "downsample_ratio": 0.5,
    }
    images = transformers.GotOcr2ImageProcessor(
        crop_to_patches=True,
        min_patches=1,
        max_patches=sizes.max_tiles,
        size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    videos = transformers.InternVLVideoProcessor()
    tokens = sizes.tile_tokens
    return _build("InternVL", sizes, config, image_processor=images, video_processor=videos, image_seq_length=tokens)


def _llava_onevision(sizes: Sizes) -> tuple[Any, Any]:
    """A single image becomes a grid of tiles and a thumbnail; each of several images becomes one tile."""
    side, most = sizes.tile_size, sizes.max_tiles
    grids = [[side * h, side * w] for h in range(1, most + 1) for w in range(1, most + 1) if h * w <= most]
    config = {
        "text_config": {"model_type": "qwen2", **sizes.text},
        "vision_config": sizes.vision(model_type="siglip_vision_model", vision_use_head=False),
        "image_token_index": sizes.ids["<image>"],
        "video_token_index": sizes.ids["<video>"],
        "image_grid_pinpoints": grids,
    }
    size = {"height": side, "width": side}
    return _build(
        "LlavaOnevision",
        sizes,
        config,
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=grids, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )


def _smolvlm(sizes: Sizes) -> tuple[Any, Any]:
    """Images are enlarged to fill a grid of tiles, as wide or high as max_tiles allows, next to a thumbnail."""
    side = sizes.tile_size
    config = {
        "text_config": {"model_type": "llama", **sizes.text},
        "vision_config": sizes.vision(),
        "image_token_id": sizes.ids["<image>"],
        "scale_factor": 2,
    }
    images = transformers.SmolVLMImageProcessor(
        size={"longest_edge": side * math.isqrt(sizes.max_tiles)}, max_image_size={"longest_edge": side}
    )
    videos = transformers.SmolVLMVideoProcessor()
    return _build(
        "SmolVLM", sizes, config, image_processor=images, video_processor=videos, image_seq_len=sizes.tile_tokens
    )


def _gemma3(sizes: Sizes) -> tuple[Any, Any]:
    """Every second layer has a sliding window, and an image token attends to all tokens of its image."""
    config = {
        "text_config": {
            **sizes.text,
            "head_dim": sizes.head_dim,
            "query_pre_attn_scalar": sizes.head_dim,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
        },
        "vision_config": sizes.vision(model_type="siglip_vision_model", vision_use_head=False),
        "mm_tokens_per_image": sizes.tile_tokens,
        "boi_token_index": sizes.ids["<start_of_image>"],
        "eoi_token_index": sizes.ids["<end_of_image>"],
        "image_token_index": sizes.ids["<image_soft_token>"],
        "tie_word_embeddings": True,
    }
    images = transformers.Gemma3ImageProcessor(size={"height": sizes.tile_size, "width": sizes.tile_size})
    model, processor = _build("Gemma3", sizes, config, image_processor=images, image_seq_length=sizes.tile_tokens)
    # transformers initializes this projection to zero, which would make all images look the same.
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=sizes.vision_hidden_size**-0.5)
    return model, processor


_SMOL_NAMES = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}

FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(_QWEN, _QWEN_TEMPLATE, _qwen2_5_vl, names=_QWEN_NAMES),
    "qwen3_vl": Family(_QWEN, _QWEN_TEMPLATE, _qwen3_vl, names=_QWEN_NAMES),
    "internvl": Family(
        [*_CHAT, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        CHATML.replace("IMAGE", "<IMG_CONTEXT>\\n"),
        _internvl,
        names={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "llava_onevision": Family([*_CHAT, "<image>", "<video>"], IMAGES_FIRST, _llava_onevision),
    "smolvlm": Family(
        [
            *_CHAT,
            *_SMOL_NAMES.values(),
            *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        ],
        UTTERANCES,
        _smolvlm,
        ends=("<end_of_utterance>",),
        pad="<|im_end|>",
        bos="<|im_start|>",
        names=_SMOL_NAMES,
    ),
    "gemma3": Family(
        [
            *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
            *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        ],
        TURNS,
        _gemma3,
        ends=("<eos>", "<end_of_turn>"),
        pad="<pad>",
        bos="<bos>",
        writes_bos=True,
        names={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "qwen2": Family(_CHAT, CHATML.replace("IMAGE", ""), _qwen2),
}
