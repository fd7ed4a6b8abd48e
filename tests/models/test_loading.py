"""Checkpoints that cannot be used are refused with a reason."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openril.errors import ModelError
from openril.hf import AutoModel
from openril.models import loading
from openril.models.adapters import add_adapters
from openril.models.freezing import round_products
from openril.models.loading import PendingWeights, load_model, load_processor
from openril.recipe.schema import LoraConfig
from openril.testing.tiny_models import build_tiny_model
from openril.training.sharding import fill


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


@pytest.mark.parametrize("kind", ["whole", "parts", "backbone"])
def test_a_model_on_the_meta_device_is_filled_with_what_loading_gives(tiny_family: Path, kind: str, tmp_path: Path):
    folder, model = tiny_family, load_model(str(tiny_family))
    if kind != "whole":  # several files, and the backbone alone as a discriminator has it
        folder = tmp_path / "checkpoint"
        (model if kind == "parts" else model.model).save_pretrained(folder, max_shard_size="100KB")
    if kind == "backbone":
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        empty: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, device_map={"": "meta"})
        pending = PendingWeights(empty, folder)
    else:
        empty = load_model(str(folder), meta=True)
        pending = empty.pending
    assert all(p.is_meta for p in empty.parameters())
    fill(empty, pending, torch.device("cpu"))
    expected, filled = model.state_dict(), empty.state_dict()
    assert expected.keys() == filled.keys()
    assert all(
        torch.equal(value, filled[name]) and value.dtype == filled[name].dtype for name, value in expected.items()
    )
    buffers = dict(empty.named_buffers())  # rotary frequencies are in no file
    assert buffers and all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_a_filled_model_keeps_its_types_and_tied_weights(tiny_qwen: Path, tmp_path: Path):
    model = load_model(str(tiny_qwen), dtype=torch.bfloat16)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    empty: Any = load_model(str(tmp_path), meta=True)
    empty.requires_grad_(False)
    round_products(empty, torch.bfloat16, lossless=True)
    fill(empty, empty.pending, torch.device("cpu"))
    assert empty.lm_head.weight is empty.get_input_embeddings().weight
    assert torch.equal(empty.lm_head.weight, model.lm_head.weight.float())
    layer = empty.model.language_model.layers[0]
    assert (layer.mlp.up_proj.weight.dtype, layer.input_layernorm.weight.dtype) == (torch.bfloat16, torch.float32)
    assert not any(p.requires_grad for p in empty.parameters())


def test_adapters_on_the_meta_device_start_with_the_same_values(tiny_qwen: Path):
    adapted = []
    for meta in (False, True):
        torch.manual_seed(3)
        adapted.append(add_adapters(load_model(str(tiny_qwen), meta=meta), LoraConfig(enabled=True)))
    plain, empty = (dict(model.named_parameters()) for model in adapted)
    assert all(torch.equal(p, empty[name]) for name, p in plain.items() if "lora_" in name)
    assert {name for name, p in empty.items() if not p.is_meta} == {name for name in plain if "lora_" in name}
    assert {name for name, p in empty.items() if p.requires_grad} == {name for name in plain if "lora_" in name}


def test_threads_load_one_after_the_other(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' switch for tied weights is global, and loading in two threads at once could leave it off."""
    inside: list[int] = []
    most = 0
    load = loading.AutoModelForImageTextToText.from_pretrained

    def watched(*arguments: Any, **settings: Any) -> Any:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        time.sleep(0.05)
        try:
            return load(*arguments, **settings)
        finally:
            inside.pop()

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", watched)
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(load_model, [str(tiny_qwen)] * 3))
    assert len(models) == 3 and most == 1
