"""The vision model and its projector as keys and tensors of a GGUF file (``mmproj``), and how prompts mark images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openril.export.gguf_file import GGUFFile, require


@dataclass(frozen=True)
class Family:
    """How llama.cpp runs one family of vision-language models."""

    text_prefix: str
    """What the names of the language model's weights begin with."""
    image: str
    """How a rendered chat marks an image. The runtime replaces its own marker by the same tokens."""
    add_keys: Callable[[GGUFFile, Any, Any], None]
    """(file, configuration, image processor)."""
    rolls: bool = False
    """The runtime may expect the position of the class token last in the table, while the checkpoint has it first."""


def _common(file: GGUFFile, projector: str, config: Any, images: Any, patch: int, layers: int, heads: int) -> None:
    keys, vision = file.keys, config.vision_config
    scales = [images.do_rescale, images.do_normalize, round(1 / images.rescale_factor)]
    require(scales == [True, True, 255], "image_processor", "values of 0..1 that are normalized", scales)
    keys.add_type("mmproj")
    keys.add_clip_has_vision_encoder(True)
    keys.add_clip_projector_type(projector)
    keys.add_vision_projection_dim(config.text_config.hidden_size)
    keys.add_vision_patch_size(patch)
    keys.add_vision_embedding_length(vision.hidden_size)
    keys.add_vision_feed_forward_length(vision.intermediate_size)
    keys.add_vision_block_count(layers)
    keys.add_vision_head_count(heads)
    keys.add_vision_image_mean([float(v) for v in images.image_mean])
    keys.add_vision_image_std([float(v) for v in images.image_std])


def _square(key: str, value: Any) -> int:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    require(len(set(sides)) == 1, key, "a square", value)
    return int(sides[0])


def _qwen_sizes(vision: Any) -> None:
    require(vision.temporal_patch_size == 2, "vision_config.temporal_patch_size", "2", vision.temporal_patch_size)


def _qwen2_5_keys(file: GGUFFile, config: Any, images: Any) -> None:
    vision = config.vision_config
    _qwen_sizes(vision)
    require(vision.hidden_act == "silu", "vision_config.hidden_act", "silu", vision.hidden_act)
    require(vision.window_size == 112, "vision_config.window_size", "112", vision.window_size)
    whole = list(vision.fullatt_block_indexes)
    step = whole[0] + 1 if whole else 0
    expected = list(range(step - 1, vision.depth, step)) if step else []
    require(bool(whole) and whole == expected, "vision_config.fullatt_block_indexes", "every n-th block", whole)
    _common(file, "qwen2.5vl_merger", config, images, vision.patch_size, vision.depth, vision.num_heads)
    file.keys.add_vision_image_size(
        40 * vision.patch_size
    )  # only for the runtime's first pass; images keep their sizes
    file.keys.add_vision_attention_layernorm_eps(1e-6)
    file.keys.add_vision_use_silu(True)
    file.keys.add_vision_n_wa_pattern(step)
    file.keys.add_vision_spatial_merge_size(vision.spatial_merge_size)


def _qwen3_keys(file: GGUFFile, config: Any, images: Any) -> None:
    vision = config.vision_config
    _qwen_sizes(vision)
    act = vision.hidden_act
    require(act == "gelu_pytorch_tanh", "vision_config.hidden_act", "gelu_pytorch_tanh", act)
    side = round(vision.num_position_embeddings**0.5)
    _common(file, "qwen3vl_merger", config, images, vision.patch_size, vision.depth, vision.num_heads)
    file.keys.add_vision_image_size(side * vision.patch_size)
    file.keys.add_vision_attention_layernorm_eps(1e-6)
    file.keys.add_vision_use_gelu(True)
    file.keys.add_vision_spatial_merge_size(vision.spatial_merge_size)
    deep = set(vision.deepstack_visual_indexes)
    file.keys.add_vision_is_deepstack_layers([i in deep for i in range(vision.depth)])


def _internvl_keys(file: GGUFFile, config: Any, images: Any) -> None:
    vision = config.vision_config
    require(vision.hidden_act == "gelu", "vision_config.hidden_act", "gelu", vision.hidden_act)
    require(config.projector_hidden_act == "gelu", "projector_hidden_act", "gelu", config.projector_hidden_act)
    require(vision.norm_type == "layer_norm", "vision_config.norm_type", "layer_norm", vision.norm_type)
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    require(layer == -1, "vision_feature_layer", "-1", layer)
    require(strategy == "default", "vision_feature_select_strategy", "default", strategy)
    require(images.crop_to_patches, "image_processor.crop_to_patches", "True", images.crop_to_patches)
    _tower(file, "internvl", config, images)
    file.keys.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    file.keys.add_vision_projector_scale_factor(round(1 / config.downsample_ratio))
    file.keys.add_vision_preproc_min_tiles(images.min_patches)
    file.keys.add_vision_preproc_max_tiles(images.max_patches)


def _smolvlm_keys(file: GGUFFile, config: Any, images: Any) -> None:
    vision = config.vision_config
    act = vision.hidden_act
    require(act == "gelu_pytorch_tanh", "vision_config.hidden_act", "gelu_pytorch_tanh", act)
    require(images.do_image_splitting, "image_processor.do_image_splitting", "True", images.do_image_splitting)
    _tower(file, "idefics3", config, images)
    file.keys.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    file.keys.add_vision_projector_scale_factor(config.scale_factor)
    file.keys.add_vision_preproc_image_size(images.size["longest_edge"])


def _tower(file: GGUFFile, projector: str, config: Any, images: Any) -> None:
    """Add the keys of a vision transformer over square tiles."""
    vision = config.vision_config
    patch = _square("vision_config.patch_size", vision.patch_size)
    _common(file, projector, config, images, patch, vision.num_hidden_layers, vision.num_attention_heads)
    file.keys.add_vision_image_size(_square("vision_config.image_size", vision.image_size))
    file.keys.add_vision_use_gelu(True)


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = {
    "qwen2_5_vl": Family("model.language_model.", _QWEN_IMAGE, _qwen2_5_keys),
    "qwen3_vl": Family("model.language_model.", _QWEN_IMAGE, _qwen3_keys),
    "internvl": Family("model.language_model.", "<IMG_CONTEXT>", _internvl_keys, rolls=True),
    "smolvlm": Family("model.text_model.", "<image>", _smolvlm_keys),
}
"""``model_type`` of a checkpoint -> how the runtime runs it."""


def image_token_limits(config: Any, images: Any) -> tuple[int, int] | None:
    """Return the least and most tokens of an image, which GGUF files of this family cannot hold, or None.

    The runtime would use 8 and 4096. Its options --image-min-tokens and --image-max-tokens set them.
    """
    if config.model_type not in ("qwen2_5_vl", "qwen3_vl"):
        return None
    vision, size = config.vision_config, images.size
    area = (vision.patch_size * vision.spatial_merge_size) ** 2
    return max(1, -(-size["shortest_edge"] // area)), max(1, size["longest_edge"] // area)
