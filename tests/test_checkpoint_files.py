"""Checkpoints that cannot be used are refused by their files, by the settings' check and by every loading function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openril.checkpoint_files import CheckpointError, check_folder, quantization, sampling_defaults
from openril.errors import ModelError
from openril.models import loading
from openril.models.loading import load_config, load_model, load_processor, load_student, sampling_note
from openril.recipe.checks import cross_check
from openril.recipe.schema import JudgeConfig, Recipe, StudentConfig
from openril.rewards.local_judge import load_judge
from openril.testing.tiny_models import build_tiny_model


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def quantized(**config: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "config.json", quantization_config=config)


def nested_quantization(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, "config.json", text_config=text | {"quantization_config": {"quant_method": "fp8"}})


def quantized_tensors(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("down_proj.weight"))
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    edit(folder, "adapter_config.json", base_model_name_or_path="Org/Base")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def gguf_without_config(folder: Path) -> None:
    only_gguf(folder)
    (folder / "config.json").unlink()


def truncated(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as f:
        f.truncate(20_000)


def large_file_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shards_without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")


def run_folder(folder: Path) -> None:
    (folder / "step_9").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.move(folder / file, folder / "step_9" / file)


FLAWS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "awq": (quantized(quant_method="awq", bits=4), ("quantized (awq)", "unquantized")),
    "bitsandbytes": (quantized(load_in_4bit=True), ("quantized (bitsandbytes)",)),
    "fp8 of the text part": (nested_quantization, ("quantized (fp8)",)),
    "old gptq": (lambda folder: edit(folder, "quantize_config.json", bits=4), ("quantize_config.json",)),
    "quantized tensors": (quantized_tensors, ("down_proj.weight is quantized",)),
    "adapter": (adapter, ("LoRA adapter of Org/Base", "merge_and_unload")),
    "pickled": (pickled, (".safetensors", "pytorch_model.bin", "Convert")),
    "gguf": (only_gguf, (".safetensors", "GGUF")),
    "gguf without config": (gguf_without_config, ("GGUF",)),
    "truncated": (truncated, ("model.safetensors", "20000", "again")),
    "git lfs": (large_file_pointer, ("git lfs pull",)),
    "missing shard": (missing_shard, ("1 of 2", "model-00002-of-00002.safetensors")),
    "shards without index": (shards_without_index, ("1 of 3", "index.json")),
    "original layout": (lambda f: edit(f, "config.json", model_type="internvl_chat"), ("internvl_chat", "-hf")),
    "config in a folder inside": (run_folder, ("holds no config.json", "step_9")),
    "broken config": (lambda f: (f / "config.json").write_text("{") and None, ("config.json", "JSON")),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_folder_that_cannot_be_used_is_refused_by_the_settings_and_by_loading(
    flaw: str, tiny_internvl: Path, tmp_path: Path
) -> None:
    break_it, words = FLAWS[flaw]
    folder = Path(shutil.copytree(tiny_internvl, tmp_path / "m"))
    check_folder(str(folder))
    break_it(folder)
    recipe = Recipe.model_validate({"run_dir": str(tmp_path / "run"), "student": {"model": str(folder)}})
    for stage in ("sft", "select", "train", "eval", "run"):
        problem = next(p for p in cross_check(recipe, stage) if p.key == "student.model")
        assert all(word in str(problem) for word in (str(folder), *words)), problem
    with pytest.raises(ModelError) as e:
        load_model(str(folder))
    assert all(word in str(e.value) for word in ("student", str(folder), *words))


def test_the_other_checkpoints_of_a_recipe_are_checked_too(tiny_internvl: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_internvl, tmp_path / "m"))
    truncated(broken)
    values = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": str(tiny_internvl)},
        "teachers": [{"name": "big", "model_path": str(broken)}],
        "judge": {"model_path": str(broken)},
        "discriminator": {"init": str(broken)},
        "data": {"selection": {"enabled": True, "reference": str(broken)}},
    }
    shutil.copytree(broken, tmp_path / "run/sft/student")
    recipe = Recipe.model_validate(values)
    keys = {p.key for stage in ("run", "train") for p in cross_check(recipe, stage) if "cut off" in p.reason}
    assert keys == {
        "teachers.0.model_path", "judge.model_path", "discriminator.init", "data.selection.reference", "sft.enabled",
    }  # fmt: skip


def test_names_that_do_not_exist_are_refused_at_once_with_similar_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/tiny").mkdir(parents=True)
    for name in ("./models/tny", "models/tny/", str(tmp_path / "models/tny")):
        with pytest.raises(CheckpointError, match=r"no such folder: .*models/tny.*models/tiny"):
            check_folder(name)
    check_folder("models/tny")  # it can be a name on the hub, which is asked once

    asked = []

    def unreachable(url: str, timeout: float) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    loading._find_on_hub.cache_clear()
    for load in (load_config, load_processor, load_model):
        with pytest.raises(ModelError, match=r"student: no such folder: .*models/tny, .*not known.*models/tiny"):
            load("models/tny")
    assert len(asked) == 3 and all("models/tny/resolve/main/config.json" in url for url in asked)


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF file .*m\.gguf"):
        check_folder(str(tmp_path / "m.gguf"))


def test_quantization_is_found_wherever_it_is_said() -> None:
    assert quantization({"model_type": "x", "vision_config": {"a": 1}, "quantization_config": None}) == ""
    assert quantization({"compression_config": {"quant_method": "compressed-tensors"}}) == "compressed-tensors"
    assert quantization({"quantization_config": {}}) == ""


@pytest.mark.parametrize("meta", [False, True])
def test_weights_of_another_configuration_are_refused(tiny_internvl: Path, tmp_path: Path, meta: bool) -> None:
    folder = Path(shutil.copytree(tiny_internvl, tmp_path / "m"))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, "config.json", text_config=text | {"intermediate_size": 48})
    with pytest.raises(ModelError, match=r"(?s)config\.json.*expected \[.*48.*\], got \[.*64.*\]"):
        load_model(str(folder), meta=meta)
    edit(folder, "config.json", text_config=text | {"num_hidden_layers": 1, "layer_types": None})
    with pytest.raises(ModelError, match=r"more layers.*layers\.1\."):
        load_model(str(folder), meta=meta)
    edit(folder, "config.json", text_config=text | {"num_hidden_layers": 3, "layer_types": None})
    with pytest.raises(ModelError, match=r"lacks .*layers\.2\."):
        load_model(str(folder), meta=meta)


def test_tokens_beyond_the_embedding_are_refused_where_model_and_tokenizer_meet(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_qwen, tmp_path / "m"))
    processor = load_processor(str(folder))
    processor.tokenizer.add_tokens(["<point>", "</point>"])
    processor.save_pretrained(folder)
    rows = load_model(str(folder)).get_input_embeddings().num_embeddings
    with pytest.raises(ModelError, match=rf"student: .*below {rows}, .*got 2 tokens .*<point>, </point>\. Resize"):
        load_student(StudentConfig(model=str(folder)), str(folder))
    with pytest.raises(ModelError, match=r"judge\.model_path: .*2 tokens"):
        load_judge(JudgeConfig(model_path=str(folder)), torch.float32)


def test_a_judge_with_weights_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "judge", "qwen2", hidden_size=32)
    load_judge(JudgeConfig(model_path=str(folder)), "auto", meta=True)
    edit(folder, "config.json", num_hidden_layers=3, layer_types=None)
    with pytest.raises(ModelError, match=r"judge\.model_path: .*lacks .*layers\.2\."):
        load_judge(JudgeConfig(model_path=str(folder)), "auto", meta=True)


def test_a_checkpoint_without_a_chat_template_is_refused(tiny_qwen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_qwen, tmp_path / "m"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=rf"student: .*chat_template\.jinja.* in {folder}, got none"):
        load_processor(str(folder))


def test_sampling_defaults_of_a_checkpoint_are_said(tiny_qwen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_qwen, tmp_path / "m"))
    assert sampling_note(str(folder)) == "" and sampling_note("Org/Model") == ""
    edit(folder, "generation_config.json", temperature=0.1, top_p=1.0, repetition_penalty=1.05, eos_token_id=3)
    assert sampling_defaults(folder) == {"temperature": 0.1, "repetition_penalty": 1.05}
    assert "temperature 0.1, repetition_penalty 1.05" in sampling_note(str(folder))
