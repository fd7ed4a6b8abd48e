"""Checkpoints that cannot be used are refused with a reason."""

from __future__ import annotations

import shutil
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
