"""The names of a model's weights in GGUF files, and the few weights whose values change with them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from openril.export.gguf_file import gguf_package
from openril.export.gguf_text import ARCHITECTURES
from openril.export.gguf_vision import FAMILIES

_PROJECTORS = {
    "internvl": {
        "multi_modal_projector.layer_norm": "mm.model.mlp.0",
        "multi_modal_projector.linear_1": "mm.model.mlp.1",
        "multi_modal_projector.linear_2": "mm.model.mlp.3",
    },
    "qwen3_vl": {
        "visual.merger.norm": "v.post_ln",
        "visual.merger.linear_fc1": "mm.0",
        "visual.merger.linear_fc2": "mm.2",
    },
}
"""Names that the package's own table lacks, or has in the form of another projector."""


class Names:
    """Translate names of a loaded model, which are the same whatever the layout of its files.

    Args:
        config: The model's configuration.
        rolled: Whether the first row of the table of positions becomes its last one.
    """

    def __init__(self, config: Any, rolled: bool) -> None:
        gguf = gguf_package()
        self._config, self._rolled = config, rolled
        self._text = ARCHITECTURES[config.text_config.model_type]
        self._prefix = FAMILIES[config.model_type].text_prefix
        self._projector = _PROJECTORS.get(config.model_type, {})
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._text_map = gguf.get_tensor_name_map(kinds[self._text.name], config.text_config.num_hidden_layers)
        vision = config.vision_config
        # The package's table counts the parts of a projector like layers, so a short one would lack some.
        layers = max(16, getattr(vision, "depth", 0) or vision.num_hidden_layers)
        self._vision_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)

    def __call__(self, name: str, values: np.ndarray) -> tuple[bool, dict[str, np.ndarray]]:
        """Return whether a weight belongs to the language model, and its tensors; none for an unknown weight."""
        if name == "lm_head.weight" or name.startswith(self._prefix):
            return True, self._language(name.replace(self._prefix, "model."), values)
        return False, self._vision(name.removeprefix("model."), values)

    def _language(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        new = self._text_map.get_name(name, try_suffixes=(".weight", ".bias"))
        part, _, ending = (new or "").rpartition(".")
        kind = part.rpartition(".")[2]
        if not new or (ending == "bias" and not (self._text.biased and kind in ("attn_q", "attn_k", "attn_v"))):
            return {}
        if kind in ("attn_q_norm", "attn_k_norm") and not self._text.normed:
            return {}
        if self._text.permuted and kind in ("attn_q", "attn_k"):
            text = self._config.text_config
            heads = text.num_attention_heads if kind == "attn_q" else text.num_key_value_heads
            pairs = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return {new: values}

    def _vision(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        part, _, ending = name.rpartition(".")
        if part in self._projector:
            return {f"{self._projector[part]}.{ending}": values}
        find = self._vision_map.get_name
        suffixes = (".weight", ".bias")
        new = find(name, try_suffixes=suffixes) or find(f"model.{name}", try_suffixes=suffixes)
        if new is None:
            return {}
        if name == "visual.patch_embed.proj.weight":  # [out, 3, 2, height, width]: a convolution for each of two frames
            return {new: values[:, :, 0], f"{new}.1": values[:, :, 1]}
        if new == "v.class_embd":
            return {new: values.reshape(-1)}
        if new == "v.position_embd":  # [1, positions, width]
            return {f"{new}.weight": np.roll(values[0], -1, axis=0) if self._rolled else values[0]}
        if re.fullmatch(r"v\.blk\.\d+\.ls[12]", new):
            return {f"{new}.weight": values}
        if found := re.fullmatch(r"v\.deepstack\.(\d+)\.(.+)", new):  # numbered by their layer
            return {
                f"v.deepstack.{self._config.vision_config.deepstack_visual_indexes[int(found[1])]}.{found[2]}": values
            }
        if self._config.model_type == "qwen2_5_vl" and ".attn_qkv." in new:
            return {new.replace("_qkv", f"_{q}"): third for q, third in zip("qkv", np.split(values, 3), strict=True)}
        return {new: values}
