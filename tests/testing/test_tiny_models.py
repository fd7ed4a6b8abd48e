"""Tiny models are ordinary checkpoints, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
