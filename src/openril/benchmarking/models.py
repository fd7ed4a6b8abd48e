"""Build random checkpoints of a ``ModelSize`` from the real Qwen2.5-VL classes, with a tokenizer of invented words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from openril.benchmarking.questions import TEXT
from openril.benchmarking.shapes import ModelSize
from openril.discriminator.prompt import SYSTEM, USER
from openril.hf import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from openril.testing.tiny_models import build_tiny_model

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwyz", "aeiou"


def pseudo_words(count: int) -> list[str]:
    """Return ``count`` different words of three syllables."""
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    n = len(syllables)
    assert count <= n**3
    return [syllables[i // n**2] + syllables[i // n % n] + syllables[i % n] for i in range(count)]


def build_checkpoint(folder: Path, size: ModelSize, *, dtype: torch.dtype, device: str, seed: int = 0) -> Path:
    """Write a model and its processor to ``folder`` as an ordinary checkpoint.

    Every id below ``size.vocab`` is a word of the tokenizer, so that any sample can be decoded to text and encoded again
    with about the same length. The weights are initialized on ``device``.
    """
    # The smallest model of the family provides processor, chat template and special tokens. Its weights are replaced.
    build_tiny_model(
        folder,
        "qwen2_5_vl",
        # The words of the prompt come twice, because the most frequent words always enter the vocabulary.
        texts=[*2 * [TEXT, SYSTEM, USER, "user\nassistant\n"], " " + " ".join(pseudo_words(size.vocab))],
        tokenizer="unigram",
        vocab_size=size.vocab,
        hidden_size=16,
        num_layers=1,
        vision_hidden_size=32,
        vision_layers=1,
        max_pixels=16384 * 28 * 28,
    )
    small = json.loads((folder / "config.json").read_text())
    config = model_config(size, small)
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                model: Any = Qwen2_5_VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config.eos_token_id = small["text_config"]["eos_token_id"]
    model.generation_config.pad_token_id = small["text_config"]["pad_token_id"]
    model.save_pretrained(folder)
    return folder


def model_config(size: ModelSize, small: dict[str, Any]) -> Qwen2_5_VLConfig:
    """Return the configuration of a size. Its token ids come from ``small``, the configuration saved with the tokenizer."""
    half = size.head_dim // 2
    section = [half // 4, 3 * half // 8, 3 * half // 8]  # time, height, width in the real models' ratio 2 : 3 : 3
    section[0] += half - sum(section)
    ids = {k: v for k, v in small.items() if k.endswith("_token_id")}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            **{k: small["text_config"][k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": list(size.vision_full),
        },
        tie_word_embeddings=True,
        **{k: v for k, v in ids.items() if k not in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
