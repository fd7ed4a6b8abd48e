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
    def tile_tokens(self) -> int:
        """Image tokens of a tile if the projector joins 2 x 2 patches."""
        return (self.tile_size // (2 * PATCH)) ** 2

    def vision(self, **names: Any) -> dict[str, Any]:
        """Return the settings of a vision transformer over square images of one tile."""
        return {
            "hidden_size": self.vision_hidden_size,
            "intermediate_size": 2 * self.vision_hidden_size,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": max(1, self.vision_hidden_size // 32),
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


def _qwen2(sizes: Sizes) -> tuple[Any, Any]:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes.text)), sizes.tokenizer


def _qwen_ids(sizes: Sizes) -> dict[str, Any]:
    return {
        "image_token_id": sizes.ids["<|image_pad|>"],
        "video_token_id": sizes.ids["<|video_pad|>"],
        "vision_start_token_id": sizes.ids["<|vision_start|>"],
        "vision_end_token_id": sizes.ids["<|vision_end|>"],
    }


def _qwen_vision(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden_size,
        "intermediate_size": 2 * sizes.vision_hidden_size,
        "num_heads": max(1, sizes.vision_hidden_size // 32),
        "out_hidden_size": sizes.text["hidden_size"],
        **more,
    }


def _qwen2_5_vl(sizes: Sizes) -> tuple[Any, Any]:
    # M-RoPE divides a head's rotary pairs between time, height and width, 2 : 3 : 3 as in the real models.
    pairs = sizes.head_dim // 2
    height = 3 * pairs // 8
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **sizes.text,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [pairs - 2 * height, height, height],
            },
            "use_sliding_window": False,
        },
        vision_config=_qwen_vision(sizes, fullatt_block_indexes=[sizes.vision_layers - 1]),
        **_qwen_ids(sizes),
        tie_word_embeddings=False,
    )
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 28 * 28, "longest_edge": sizes.max_pixels}
        ),
        tokenizer=sizes.tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=sizes.tokenizer.chat_template,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl(sizes: Sizes) -> tuple[Any, Any]:
    # M-RoPE deals a head's rotary pairs in turn to time, height and width, about 6 : 5 : 5 in the real models.
    pairs = sizes.head_dim // 2
    height = 5 * pairs // 16
    config = transformers.Qwen3VLConfig(
        text_config={
            **sizes.text,
            "head_dim": sizes.head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [pairs - 2 * height, height, height],
                "mrope_interleaved": True,
            },
        },
        vision_config=_qwen_vision(
            sizes,
            num_position_embeddings=8 * 8,
            # These layers' features are added to the first layers of the language model.
            deepstack_visual_indexes=sorted({0, sizes.vision_layers - 1}),
        ),
        **_qwen_ids(sizes),
        tie_word_embeddings=False,
    )
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 32 * 32, "longest_edge": sizes.max_pixels}
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=half, image_std=half),
        tokenizer=sizes.tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=sizes.tokenizer.chat_template,
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def _internvl(sizes: Sizes) -> tuple[Any, Any]:
    side = sizes.tile_size
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **sizes.text},
        vision_config=sizes.vision(image_size=[side, side], patch_size=[PATCH, PATCH]),
        image_token_id=sizes.ids["<IMG_CONTEXT>"],
        image_seq_length=sizes.tile_tokens,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            crop_to_patches=True,
            min_patches=1,
            max_patches=sizes.max_tiles,
            size={"height": side, "width": side},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=sizes.tokenizer,
        video_processor=transformers.InternVLVideoProcessor(),
        image_seq_length=sizes.tile_tokens,
        chat_template=sizes.tokenizer.chat_template,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def _llava_onevision(sizes: Sizes) -> tuple[Any, Any]:
    """A single image becomes a grid of tiles and a thumbnail; each of several images becomes one tile."""
    side, most = sizes.tile_size, sizes.max_tiles
    grids = [[side * h, side * w] for h in range(1, most + 1) for w in range(1, most + 1) if h * w <= most]
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **sizes.text},
        vision_config=sizes.vision(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=sizes.ids["<image>"],
        video_token_index=sizes.ids["<video>"],
        image_grid_pinpoints=grids,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size={"height": side, "width": side}, image_grid_pinpoints=grids, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=sizes.tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size={"height": side, "width": side}),
        num_image_tokens=(side // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=sizes.tokenizer.chat_template,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _smolvlm(sizes: Sizes) -> tuple[Any, Any]:
    """Images are enlarged to fill a grid of tiles, as wide or high as max_tiles allows, next to a thumbnail."""
    side = sizes.tile_size
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **sizes.text},
        vision_config=sizes.vision(),
        image_token_id=sizes.ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(
            size={"longest_edge": side * math.isqrt(sizes.max_tiles)}, max_image_size={"longest_edge": side}
        ),
        tokenizer=sizes.tokenizer,
        video_processor=transformers.SmolVLMVideoProcessor(),
        image_seq_len=sizes.tile_tokens,
        chat_template=sizes.tokenizer.chat_template,
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def _gemma3(sizes: Sizes) -> tuple[Any, Any]:
    """Every second layer has a sliding window, and an image token attends to all tokens of its image."""
    config = transformers.Gemma3Config(
        text_config={
            **sizes.text,
            "head_dim": sizes.head_dim,
            "query_pre_attn_scalar": sizes.head_dim,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
        },
        vision_config=sizes.vision(model_type="siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=sizes.tile_tokens,
        boi_token_index=sizes.ids["<start_of_image>"],
        eoi_token_index=sizes.ids["<end_of_image>"],
        image_token_index=sizes.ids["<image_soft_token>"],
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": sizes.tile_size, "width": sizes.tile_size}),
        tokenizer=sizes.tokenizer,
        image_seq_length=sizes.tile_tokens,
        chat_template=sizes.tokenizer.chat_template,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    # transformers initializes this projection to zero, which would make all images look the same.
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=sizes.vision_hidden_size**-0.5)
    return model, processor


_CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN = [*_CHAT, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_QWEN_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_TEMPLATE = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
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
