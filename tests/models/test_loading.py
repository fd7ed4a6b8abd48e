"""Checkpoints that cannot be used are refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from openril.errors import ModelError
from openril.models.loading import load_model, load_processor
from openril.testing.tiny_models import build_tiny_model


def test_missing_folder_is_named():
    with pytest.raises(ModelError, match="no/such/folder"):
        load_model("./no/such/folder")


def test_a_text_model_is_no_student(tmp_path: Path):
    folder = build_tiny_model(tmp_path / "text", "qwen2", hidden_size=32)
    with pytest.raises(ModelError, match="vision-language"):
        load_model(str(folder))


def test_missing_weights_are_an_error(tiny_qwen: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen, tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    gone = next(k for k in weights if "down_proj" in k and "visual" not in k)
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="down_proj"):
        load_model(str(folder))


def test_pickled_weights_are_refused(tiny_qwen: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder))


def test_an_attention_whose_package_is_missing_is_refused(tiny_qwen: Path):
    with pytest.raises(ModelError, match=r"student\.attn_implementation.*flash_attention_2"):
        load_model(str(tiny_qwen), attn_implementation="flash_attention_2")


def test_max_pixels_bounds_the_image_tokens(tiny_qwen: Path):
    processor = load_processor(str(tiny_qwen), max_pixels=28 * 28 * 4)
    assert processor.image_processor.size["longest_edge"] == 28 * 28 * 4


# SmolVLM's longest_edge is the length of a side, not an area.
@pytest.mark.parametrize("model", ["tiny_internvl", "tiny_llava_onevision", "tiny_smolvlm", "tiny_gemma3"])
def test_max_pixels_where_it_means_nothing_is_refused(model: str, request: pytest.FixtureRequest):
    with pytest.raises(ModelError, match="max_pixels"):
        load_processor(str(request.getfixturevalue(model)), max_pixels=1000)


def test_an_unknown_architecture_lists_the_known(tmp_path: Path):
    with pytest.raises(ModelError, match="llava_onevision"):
        build_tiny_model(tmp_path / "m", "llava", hidden_size=32)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llava_onevision", "gemma3"])
def test_tiny_models_can_have_tokenizers_of_another_kind(architecture: str, tmp_path: Path):
    from openril.models.prompts import PromptEncoder

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
    from openril.hf import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    for text in ("Which colour is it?", "  two  spaces\nand ünïcödé 你好 🙂", "x" * 50):
        assert loaded.decode(loaded(text)["input_ids"]) == text
