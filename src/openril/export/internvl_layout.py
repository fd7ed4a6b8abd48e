"""Names, configuration and chat template of InternVL in the layout of its authors, from those of transformers.

The layout is that of OpenGVLab/InternVL3 and InternVL3.5: an ``InternVLChatModel`` with ``vision_model``, ``mlp1`` and
``language_model``, whose vision attention has one matrix for queries, keys and values. What the runtimes of this layout
compute without reading it from the files (the pixels' mean, the activation of the projector, ...) is compared with the
checkpoint, and another value is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor

from openril.export.request import ExportError
from openril.storage import write_json, write_text

MODEL_TYPE = "internvl_chat"
CODE = {
    "qwen2": ("Qwen2ForCausalLM", "OpenGVLab/InternVL3-1B"),
    "llama": ("LlamaForCausalLM", "OpenGVLab/InternVL3-1B"),
    "qwen3": ("Qwen3ForCausalLM", "OpenGVLab/InternVL3_5-1B"),
}
"""Type of the language model -> its class in the original code, and the repository on the hub with this code."""

IMAGE = "<image>"
"""What the chat template of the original layout writes for an image."""

CONTEXT = "<IMG_CONTEXT>"
"""The token that is repeated for the features of an image."""

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 200

_BLOCK = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_RULES = [
    *(
        (rf"model\.vision_tower\.encoder\.layer\.(\d+)\.{re.escape(a)}\.", rf"vision_model.encoder.layers.\1.{b}.")
        for a, b in _BLOCK.items()
    ),
    (r"model\.vision_tower\.encoder\.layer\.(\d+)\.lambda_([12])$", r"vision_model.encoder.layers.\1.ls\2"),
    (r"model\.vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"model\.vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"model\.vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (r"model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
]
_PART = re.compile(r"model\.vision_tower\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)")


def place(name: str) -> tuple[str, int | None]:
    """Return the original name of a weight, and which third of it the weight is; None if it is the whole.

    Args:
        name: A name of ``InternVLForConditionalGeneration.state_dict()``.

    Raises:
        ExportError: The original layout has no such weight.
    """
    if match := _PART.fullmatch(name):
        layer, part, kind = match.groups()
        return f"vision_model.encoder.layers.{layer}.attn.qkv.{kind}", "qkv".index(part)
    for pattern, replacement in _RULES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed, None
    raise ExportError(f"CHECKPOINT: the original layout of InternVL has no place for the weight {_SHORT.repr(name)}.")


def convert(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the original layout. The projections of a layer are held until all three have come."""
    held: dict[str, dict[int, Tensor]] = {}
    for name, value in weights:
        key, part = place(name)
        if part is None:
            yield key, value
            continue
        held.setdefault(key, {})[part] = value
        if len(held[key]) == 3:
            parts = held.pop(key)
            yield key, torch.cat([parts[i] for i in range(3)])
    if held:
        raise ExportError(f"CHECKPOINT: expected three parts of {min(held)}, got {len(held[min(held)])}.")


def require(key: str, found: Any, *expected: Any) -> None:
    """Raise ExportError unless a setting has a value that the runtimes of the original layout assume."""
    if found not in expected:
        values = " or ".join(repr(e) for e in expected)
        raise ExportError(
            f"{key}: expected {values}, which the original layout of InternVL cannot express otherwise, got"
            f" {_SHORT.repr(found)}. Export to another format."
        )


def original_config(config: Any, processor: Any, dtype: str) -> dict[str, Any]:
    """Return the config.json of the original layout. Raises ExportError for a setting that it cannot express.

    Args:
        config: An ``InternVLConfig``.
        dtype: Name of the type of the weights, for instance ``bfloat16``.
    """
    require("config.model_type", config.model_type, "internvl")
    require("config.projector_hidden_act", config.projector_hidden_act, "gelu")
    require("config.vision_feature_layer", config.vision_feature_layer, -1)
    require("config.vision_feature_select_strategy", config.vision_feature_select_strategy, "default")
    for key, token in {"start_image_token": "<img>", "end_image_token": "</img>", "image_token": CONTEXT}.items():
        require(f"processor.{key}", getattr(processor, key), token)
    images = processor.image_processor
    side = config.vision_config.image_size[0]
    count = int((side // config.vision_config.patch_size[0]) ** 2 * config.downsample_ratio**2)
    require("processor.image_seq_length", processor.image_seq_length, count)
    for key, expected in {
        "size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }.items():
        found = getattr(images, key)
        plain = found if key == "resample" else dict(found) if key == "size" else list(found)
        require(f"image_processor.{key}", plain, expected)
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        require(f"image_processor.{key}", getattr(images, key), True)
    require("image_processor.rescale_factor", images.rescale_factor, 1 / 255)
    tiles = bool(images.crop_to_patches)
    llm = _language_config(config.text_config, dtype)
    code = CODE[config.text_config.model_type][1]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": f"{code}--configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": f"{code}--modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": f"{code}--modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": tiles,
        "force_image_size": side,
        "hidden_size": config.text_config.hidden_size,
        "llm_config": llm,
        "max_dynamic_patch": images.max_patches if tiles else 1,
        "min_dynamic_patch": images.min_patches if tiles else 1,
        "model_type": MODEL_TYPE,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": tiles,
        "vision_config": _vision_config(config.vision_config, dtype),
    }


def _vision_config(vision: Any, dtype: str) -> dict[str, Any]:
    for key in ("image_size", "patch_size"):
        require(f"vision_config.{key}", len(set(getattr(vision, key))), 1)
    require("vision_config.hidden_act", vision.hidden_act, "gelu")
    require("vision_config.num_channels", vision.num_channels, 3)
    require("vision_config.use_absolute_position_embeddings", vision.use_absolute_position_embeddings, True)
    require("vision_config.use_mean_pooling", vision.use_mean_pooling, True)  # else a norm follows the last layer
    require("vision_config.norm_type", vision.norm_type, "layer_norm", "rms_norm")
    if vision.use_qk_norm:  # transformers computes its norms with this value whatever layer_norm_eps says
        require("vision_config.layer_norm_eps", vision.layer_norm_eps, 1e-6)
    return {
        "architectures": ["InternVisionModel"],
        "attention_dropout": vision.attention_dropout,
        "drop_path_rate": 0.0,
        "dropout": vision.hidden_dropout_prob,
        "hidden_act": vision.hidden_act,
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size[0],
        "initializer_factor": vision.layer_scale_init_value,
        "initializer_range": vision.initializer_range,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "model_type": "intern_vit_6b",  # the name of the class, for vision towers of every size
        "norm_type": vision.norm_type,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": vision.num_channels,
        "num_hidden_layers": vision.num_hidden_layers,
        "patch_size": vision.patch_size[0],
        "qk_normalization": vision.use_qk_norm,
        "qkv_bias": vision.attention_bias,
        "torch_dtype": dtype,
        "use_flash_attn": False,
    }


def _language_config(text: Any, dtype: str) -> dict[str, Any]:
    """Return the language model's configuration under the keys that transformers 4 reads."""
    require("text_config.model_type", text.model_type, *CODE)
    saved = text.to_dict()
    layers = set(saved.pop("layer_types", None) or ["full_attention"])
    require("text_config.layer_types", layers, {"full_attention"})
    rope = dict(saved.pop("rope_parameters"))
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    for key in ("dtype", "torch_dtype", "transformers_version", "_name_or_path"):
        saved.pop(key, None)
    return {
        **saved,
        "architectures": [CODE[text.model_type][0]],
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, "rope_type": kind, **rope},
        "tie_word_embeddings": False,  # a tied output layer is written too, so that no runtime has to tie it
        "torch_dtype": dtype,
    }


def original_template(processor: Any) -> str:
    """Return the chat template with the original image marker. Raises ExportError if it is not that of InternVL.

    The original code has fixed texts around a turn, so a checkpoint that was trained with others is refused.
    """
    owner = processor if getattr(processor, "chat_template", None) else processor.tokenizer
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROBE"}]}]

    def render(template: str) -> str:
        return str(
            processor.tokenizer.apply_chat_template(
                probe, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )

    before = render(owner.chat_template)
    template = owner.chat_template.replace(processor.image_token, IMAGE)
    expected = f"<|im_start|>user\n{IMAGE}\nPROBE<|im_end|>\n<|im_start|>assistant\n"
    after = render(template)
    if not after.endswith(expected) or after != before.replace(processor.image_token, IMAGE):
        raise ExportError(
            f"chat_template: expected a turn of the original InternVL, {expected!r}, got {_SHORT.repr(before)}."
            " Export to another format."
        )
    return template


def write_tokenizer(processor: Any, folder: Path) -> None:
    """Write the tokenizer and the settings of images in the form that transformers 4 and 5 read."""
    tokenizer, path = processor.tokenizer, folder / "tokenizer_config.json"
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["chat_template"] = original_template(processor)
    if saved.get("tokenizer_class") == "TokenizersBackend":  # the name in transformers 5 of the same class
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Transformers 4 expects a mapping here, and tokenizer.json lists the special tokens in any case.
    for key in ("extra_special_tokens", "backend", "processor_class", "is_local", "local_files_only"):
        saved.pop(key, None)
    write_json(path, saved)
    write_text(folder / "chat_template.jinja", saved["chat_template"])
    images = processor.image_processor
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": images.size["height"],
            "do_center_crop": False,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
            "resample": 3,
            "size": images.size["height"],
        },
    )
