"""Tiny models are ordinary checkpoints, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import openril
from openril.errors import ModelError
from openril.hf import AutoTokenizer
from openril.models.loading import load_model, load_processor
from openril.models.prompts import PromptEncoder
from openril.testing.tiny_models import build_tiny_model


def test_the_package_exports_the_builder():
    assert openril.build_tiny_model is build_tiny_model


@pytest.mark.parametrize("sizes", [{"hidden_size": 36}, {"hidden_size": 32, "num_heads": 3}, {"tile_size": 30}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], tmp_path: Path):
    with pytest.raises(ModelError, match=f"{next(iter(sizes))}.*{next(iter(sizes.values()))}"):
        build_tiny_model(tmp_path / "m", **sizes)  # type: ignore[arg-type]


def test_an_unknown_architecture_lists_the_known(tmp_path: Path):
    with pytest.raises(ModelError, match="llava_onevision"):
        build_tiny_model(tmp_path / "m", "llava", hidden_size=32)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llava_onevision", "gemma3"])
def test_tiny_models_can_have_tokenizers_of_another_kind(architecture: str, tmp_path: Path):
    folder = build_tiny_model(tmp_path / "m", architecture, tokenizer="unigram", hidden_size=32)  # type: ignore[arg-type]
    encoder = PromptEncoder(load_processor(str(folder)), load_model(str(folder)))
    prompt = encoder.encode([{"role": "user", "content": [{"type": "text", "text": "Which colour?"}]}], [])
    assert "Which colour?" in encoder.decode(prompt.input_ids.tolist())


@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
def test_tiny_models_are_the_same_in_every_process(tokenizer: str, tmp_path: Path):
    texts = [f"Which colour is square {i}? It is {c}." for c in ("red", "blue", "green") for i in range(30)]
    code = (
        "import sys; from openril.testing.tiny_models import build_tiny_model; "
        f"build_tiny_model(sys.argv[1], 'internvl', texts={texts!r}, tokenizer={tokenizer!r}, hidden_size=32, seed=3)"
    )
    for name, seed in (("a", "1"), ("b", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=environment)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert json.loads((tmp_path / "a/config.json").read_text())["model_type"] == "internvl"


@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
def test_tiny_tokenizers_read_back_any_text(tokenizer: str, tmp_path: Path):
    folder = build_tiny_model(
        tmp_path / "m", "qwen2", tokenizer=tokenizer, texts=["Which colour is it?"], hidden_size=32
    )  # type: ignore[arg-type]
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in ("Which colour is it?", "  two  spaces\nand ünïcödé 你好 🙂", "x" * 50):
        assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "gemma3"])
def test_models_that_see_keep_the_scale_of_their_inputs(architecture: str, tmp_path: Path):
    """Weights have a standard deviation of 1 / sqrt(inputs), word embeddings of 15 x 0.02."""
    folder = build_tiny_model(tmp_path / "m", architecture, hidden_size=64, vision_hidden_size=32, sees=True)  # type: ignore[arg-type]
    model = load_model(str(folder))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d) and "lm_head" not in name:
            assert module.weight.detach().std().item() == pytest.approx(module.weight[0].numel() ** -0.5, rel=0.1), name
    assert model.get_input_embeddings().weight.detach().std().item() == pytest.approx(0.3, rel=0.05)
    text = model.config.get_text_config()
    assert text.num_key_value_heads == text.num_attention_heads == 2
    assert text.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_models_that_see_are_the_same_for_a_seed_and_others_are_as_before(tmp_path: Path):
    def weights(name: str, **arguments: Any) -> dict[str, torch.Tensor]:
        return load_file(build_tiny_model(tmp_path / name, hidden_size=32, **arguments) / "model.safetensors")

    first, again, plain = (weights(str(i), sees=i < 2, num_kv_heads=2) for i in range(3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    words = next(name for name in plain if name.endswith("embed_tokens.weight"))
    assert torch.equal(first[words], 15 * plain[words])
