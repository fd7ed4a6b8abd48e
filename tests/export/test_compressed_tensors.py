"""What is exported to compressed-tensors is compared with the checkpoint, and computed with in another interpreter.

llm-compressor itself needs an environment that the tests do not build: docs/export.md has the command that runs it.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openril.errors import OpenRILError
from openril.export import compressed_tensors
from openril.export.fidelity import answer_logprobs
from openril.export.request import RECORD, ExportRequest
from openril.models.loading import load_model, load_processor
from openril.models.prompts import PromptEncoder
from openril.recipe.overrides import override
from openril.recipe.schema import Recipe
from openril.testing.tiny_models import build_tiny_model

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ask(checkpoint: Path, out: Path, python: str = sys.executable, kind: str = "fp8", recipe: Recipe | None = None):
    return ExportRequest(
        "compressed-tensors",
        str(checkpoint),
        out,
        (kind,),
        recipe,
        check=recipe is not None,
        python=python,
        questions=1,
    )


def quantized(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Store the language model's layers as vLLM's formats do: fp8 values with a scale, or packed integers."""
    found = {}
    for name, value in weights.items():
        layer = name.removesuffix(".weight")
        if "visual" in name or not name.endswith(tuple(f"{part}.weight" for part in LAYERS)):
            found[name] = value
        elif kind == "fp8":
            found |= {name: value.to(torch.float8_e4m3fn), f"{layer}.weight_scale": torch.ones(len(value), 1)}
        else:
            found |= {f"{layer}.weight_{part}": torch.ones(2) for part in ("packed", "scale", "shape")}
    return found


@pytest.mark.parametrize("kind", ["fp8", "w4a16"])
def test_each_weight_is_quantized_or_that_of_the_checkpoint(kind, tiny_qwen, tmp_path):
    model = load_model(str(tiny_qwen), meta=True)
    weights = quantized(load_file(tiny_qwen / "model.safetensors"), kind)
    path, metadata = tmp_path / "model.safetensors", {"format": "pt"}
    save_file(weights, path, metadata)
    linear = 2 * len(LAYERS)
    assert compressed_tensors.compare_weights(model, tmp_path) == (linear, len(model.state_dict()) - linear)

    vision = next(n for n in weights if "visual" in n and n.endswith("attn.qkv.weight"))
    changes = {
        "other values": {**weights, vision: weights[vision] * 1.01},
        "language model": {**weights, vision: weights[vision].to(torch.float8_e4m3fn)},
        "lacks the weight": {n: v for n, v in weights.items() if n != vision},
        r"extra\.bias": {**weights, "extra.bias": torch.ones(1)},
        "none quantized": load_file(tiny_qwen / "model.safetensors"),
    }
    for words, changed in changes.items():
        save_file(changed, path, metadata)
        with pytest.raises(OpenRILError, match=words):
            compressed_tensors.compare_weights(model, tmp_path)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that declares what torchvision lacks next to a CPU torch, as ``openril.hf`` does in this process."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\nimport runpy, sys\nfrom openril import torchvision_compat\ntorchvision_compat.apply()\n"
        'sys.argv = sys.argv[2:]\nrunpy.run_path(sys.argv[0], run_name="__main__")\n'
    )
    path.chmod(0o755)
    return str(path)


def test_a_model_in_another_interpreter_gives_the_same_log_probabilities(tiny_qwen, python):
    model, processor = load_model(str(tiny_qwen)), load_processor(str(tiny_qwen))
    prompt = PromptEncoder(processor, model).encode(
        [{"role": "user", "content": [{"type": "text", "text": "Look"}]}], []
    )
    with compressed_tensors.remote(python, tiny_qwen) as other:
        expected, found = (answer_logprobs(m, prompt, [9, 8, 7]) for m in (model, other))
        assert expected.shape == (3, model.config.text_config.vocab_size)
        torch.testing.assert_close(found, expected)
        folder = other.folder
    assert not folder.exists() and other.process.poll() is not None


def failing(folder: Path) -> str:
    path = folder / "failing"
    path.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_the_command_writes_a_folder_and_checks_it(tiny_qwen, tmp_path, monkeypatch):
    def run_tool(python, command, checkpoint, out, scheme):
        assert (command, scheme) == ("quantize", "FP8_DYNAMIC")
        shutil.copy(Path(checkpoint) / "config.json", out)
        weights = quantized(load_file(Path(checkpoint) / "model.safetensors"), "fp8")
        save_file(weights, Path(out) / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(compressed_tensors, "run_tool", run_tool)
    monkeypatch.setattr(compressed_tensors, "versions", lambda python: "llmcompressor 0")
    row = {"id": "q", "question": "Which colour?", "answer": "red"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    settings = ["--data.validation", str(tmp_path / "q.jsonl"), "--eval.max_completion_length", "3"]
    asked = ask(tiny_qwen, tmp_path / "out", recipe=override(Recipe(), settings, "test"))
    twin = load_model(str(tiny_qwen))
    monkeypatch.setattr(compressed_tensors, "remote", lambda python, out: nullcontext(twin))
    assert compressed_tensors.export(asked)
    found = json.loads((asked.out / RECORD).read_text())
    assert (
        found["tools"] == "llmcompressor 0" and found["check"]["kl_max"] == 0 and found["check"]["same_next_token"] == 1
    )
    with torch.no_grad():
        twin.lm_head.weight.mul_(3)
    assert not compressed_tensors.check(asked)
    found = json.loads((asked.out / RECORD).read_text())
    assert found["check"]["kl_mean"] > 0.01 and not found["check"]["passed"]
    assert (asked.out / "tokenizer.json").exists() and "vllm serve" in (asked.out / "RUN.md").read_text()


def test_an_interpreter_without_the_tools_and_widths_that_cannot_be_grouped_are_refused(
    tiny_qwen, tmp_path, monkeypatch
):
    for python, words in (("", "llm-compressor"), ("./none", "./none"), (sys.executable, "llmcompressor")):
        with pytest.raises(OpenRILError, match=f"--python: .*{words}"):
            compressed_tensors.export(ask(tiny_qwen, tmp_path / "out", python))
    monkeypatch.setattr(compressed_tensors, "versions", lambda python: "llmcompressor 0")
    with pytest.raises(OpenRILError, match=r"multiples of 128.*got 32"):
        compressed_tensors.export(ask(tiny_qwen, tmp_path / "out", kind="w4a16"))
    wide = build_tiny_model(tmp_path / "wide", "qwen2_5_vl", hidden_size=128)
    with pytest.raises(OpenRILError, match=r"llm-compressor failed(.|\n)*no space left"):
        compressed_tensors.export(ask(wide, tmp_path / "out", failing(tmp_path), "w4a16"))
    assert not (tmp_path / "out").exists()
    with (
        pytest.raises(OpenRILError, match=r"--python.*transformers:(.|\n)*no space left"),
        compressed_tensors.remote(failing(tmp_path), wide),
    ):
        pass
