"""InternVL in its original layout gives the logits of the checkpoint, in a plain program that follows the original code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from openril.errors import OpenRILError
from openril.export import internvl_original
from openril.export import weights as weights_module
from openril.export.request import RECORD, ExportRequest
from openril.hf import AutoProcessor, PreTrainedTokenizerFast, transformers
from openril.models.loading import load_model
from openril.recipe.overrides import override
from openril.recipe.schema import Recipe
from openril.stages.export import run_export, run_recipe
from openril.testing.tiny_models import build_tiny_model

SIDE = 56
VARIANTS = {
    "internvl3": {},
    "internvl3_5": {  # every setting that the small published models leave at its default
        "text": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
        "vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True},
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request, tmp_path_factory) -> Path:
    """A tiny InternVL, every weight of which is random: most of a fresh model's are 0 or 1 and would hide mistakes."""
    folder = build_tiny_model(tmp_path_factory.mktemp("m") / request.param, "internvl", hidden_size=32, tile_size=SIDE)
    saved = json.loads((folder / "config.json").read_text())
    saved["text_config"] |= VARIANTS[request.param].get("text", {})
    saved["vision_config"] |= VARIANTS[request.param].get("vision", {})
    saved["tie_word_embeddings"] = saved["text_config"]["tie_word_embeddings"]
    saved["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(saved))
    torch.manual_seed(7)
    model = transformers.InternVLForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def ask(checkpoint: Path, out: Path, *types: str, recipe: Recipe | None = None, **others) -> ExportRequest:
    return ExportRequest(
        "internvl-original", str(checkpoint), out, types or ("stored",), recipe, check=recipe is not None, **others
    )


def logits_of_the_original(folder: Path, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Compute what modeling_internvl_chat.py and modeling_intern_vit.py of OpenGVLab do, [P, V].

    Args:
        pixels: [tiles, 3, side, side].
    """
    config, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    vision, unread = config["vision_config"], set(w)

    def take(name: str) -> torch.Tensor:
        unread.discard(name)
        return w[name].float()

    def linear(x: torch.Tensor, name: str, bias: bool = True) -> torch.Tensor:
        return F.linear(x, take(f"{name}.weight"), take(f"{name}.bias") if bias else None)

    def norm(x: torch.Tensor, name: str, kind: str = vision["norm_type"], eps: float = vision["layer_norm_eps"]):
        if kind == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], take(f"{name}.weight"), take(f"{name}.bias"), eps)
        return take(f"{name}.weight") * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    e = "vision_model.embeddings."
    x = F.conv2d(
        pixels, take(f"{e}patch_embedding.weight"), take(f"{e}patch_embedding.bias"), stride=vision["patch_size"]
    )
    n, c, height, width = x.shape
    x = torch.cat([take(f"{e}class_embedding").expand(n, 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + take(f"{e}position_embedding")
    heads = vision["num_attention_heads"]
    for i in range(vision["num_hidden_layers"]):
        p = f"vision_model.encoder.layers.{i}."
        qkv = linear(norm(x, f"{p}norm1"), f"{p}attn.qkv", vision["qkv_bias"])
        q, k, v = qkv.reshape(n, -1, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        if vision["qk_normalization"]:
            flat = (t.transpose(1, 2).flatten(-2, -1) for t in (q, k))
            q, k = (
                norm(t, f"{p}attn.{name}", "rms_norm").view(n, -1, heads, c // heads).transpose(1, 2)
                for t, name in zip(flat, ("q_norm", "k_norm"), strict=True)
            )
        attention = ((q * (c // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).reshape(n, -1, c), f"{p}attn.proj") * take(f"{p}ls1")
        x = x + linear(F.gelu(linear(norm(x, f"{p}norm2"), f"{p}mlp.fc1")), f"{p}mlp.fc2") * take(f"{p}ls2")
    assert config["select_layer"] == -1 and config["ps_version"] == "v2"
    r = config["downsample_ratio"]
    x = x[:, 1:].reshape(n, height, width, c).view(n, height, int(width * r), int(c / r)).permute(0, 2, 1, 3)
    x = x.contiguous().view(n, int(width * r), int(height * r), int(c / r**2)).permute(0, 2, 1, 3)
    x = norm(x.reshape(n, -1, x.shape[-1]), "mlp1.0", "layer_norm", 1e-5)
    x = linear(F.gelu(linear(x, "mlp1.1")), "mlp1.3")

    llm = config["llm_config"]
    language = getattr(transformers, llm["architectures"][0])(getattr(transformers, LLM[llm["model_type"]])(**llm))
    prefix = "language_model."
    language.load_state_dict({k.removeprefix(prefix): take(k) for k in w if k.startswith(prefix)}, strict=True)
    assert not unread, "weights that the original code does not read"
    image = PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids("<IMG_CONTEXT>")
    embedded = language.get_input_embeddings()(input_ids).clone()
    embedded[input_ids == image] = x.reshape(-1, x.shape[-1])
    return language.eval()(inputs_embeds=embedded[None]).logits[0]


LLM = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


def original_tiles(config: dict, width: int, height: int) -> int:
    """Return the tiles of an image, thumbnail included, as ``dynamic_preprocess`` of the original code counts them."""
    low, high, side = config["min_dynamic_patch"], config["max_dynamic_patch"], config["force_image_size"]
    assert config["dynamic_image_size"] and config["use_thumbnail"] and not config["pad2square"]
    ratios = {
        (i, j) for n in range(low, high + 1) for i in range(1, n + 1) for j in range(1, n + 1) if low <= i * j <= high
    }
    best, smallest = (1, 1), float("inf")
    for ratio in sorted(ratios, key=lambda r: r[0] * r[1]):
        difference = abs(width / height - ratio[0] / ratio[1])
        bigger = width * height > 0.5 * side * side * ratio[0] * ratio[1]
        if difference < smallest or (difference == smallest and bigger):
            best, smallest = ratio, difference
    blocks = best[0] * best[1]
    return blocks + (blocks != 1)


@torch.inference_mode()
def test_the_original_code_computes_the_same_logits_and_tiles(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert internvl_original.export(ask(checkpoint, out))
    config = json.loads((out / "config.json").read_text())
    processor, model = AutoProcessor.from_pretrained(checkpoint), load_model(str(checkpoint))
    generator = torch.Generator().manual_seed(0)
    counts = []
    for width, height in [(56, 56), (120, 60), (57, 170), (300, 299), (20, 31)]:
        image = Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=generator).byte().numpy())
        content = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[[image]], return_tensors="pt")
        counts.append(len(inputs["pixel_values"]))
        assert counts[-1] == original_tiles(config, width, height), (width, height)
        expected = model(**inputs).logits[0]
        found = logits_of_the_original(out, inputs["input_ids"][0], inputs["pixel_values"])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert len(set(counts)) > 2
    assert expected.std() > 0.5, "logits that hardly differ would hide mistakes"


def test_weights_are_counted_and_the_tokenizer_and_the_template_are_those_of_the_checkpoint(checkpoint, tmp_path):
    out = tmp_path / "out"
    internvl_original.export(ask(checkpoint, out))
    model = load_model(str(checkpoint))
    state = model.state_dict()  # a tied output layer has a name of its own in it
    written = load_file(out / "model.safetensors")
    projections = [name for name in state if ".q_proj." in name and "vision_tower" in name]
    assert len(written) == len(state) - 2 * len(projections)
    assert sum(v.numel() for v in written.values()) == sum(v.numel() for v in state.values())
    old, new = AutoProcessor.from_pretrained(checkpoint).tokenizer, PreTrainedTokenizerFast.from_pretrained(out)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "image"}]}]
    before, after = (t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (old, new))
    assert before.count("<IMG_CONTEXT>") == 1
    assert after == before.replace("<IMG_CONTEXT>", "<image>")
    assert (
        new("<img><IMG_CONTEXT></img>Say the word")["input_ids"]
        == old("<img><IMG_CONTEXT></img>Say the word")["input_ids"]
    )
    saved = json.loads((out / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast" and not isinstance(
        saved.get("extra_special_tokens"), list
    )


def questions(folder: Path) -> Recipe:
    Image.new("RGB", (90, 40), "red").save(folder / "red.png")
    row = {"id": "q", "question": "Which colour?", "answer": "red", "images": ["red.png"]}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    settings = ["--data.validation", str(folder / "questions.jsonl"), "--eval.max_completion_length", "6"]
    return override(Recipe(), settings, "test")


def test_the_check_loads_the_export_back_and_finds_a_changed_weight_and_another_template(
    tiny_internvl, tmp_path, capfd
):
    asked = ask(tiny_internvl, tmp_path / "out", recipe=questions(tmp_path))
    assert internvl_original.export(asked)
    found = json.loads((asked.out / RECORD).read_text())
    assert found["check"]["passed"] and found["check"]["questions"] == 1 and found["check"]["kl_max"] < 1e-6
    assert found["to"] == "internvl-original" and found["types"] == ["stored"]
    assert "run the custom code" not in capfd.readouterr().out

    file = asked.out / "model.safetensors"
    weights = load_file(file)
    weights["mlp1.1.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert not internvl_original.check(asked)
    found = json.loads((asked.out / RECORD).read_text())["check"]
    assert found["kl_mean"] > found["kl_limit"] and not found["passed"] and not found["other_prompts"]

    template = asked.out / "chat_template.jinja"
    config = asked.out / "tokenizer_config.json"
    changed = template.read_text().replace(r"<image>\n", "<image>")
    assert changed != template.read_text()
    template.write_text(changed)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": changed}))
    internvl_original.check(asked)
    assert json.loads((asked.out / RECORD).read_text())["check"]["other_prompts"] == 1


@pytest.mark.parametrize(
    ("file", "keys", "value", "named"),
    [
        ("config.json", ("projector_hidden_act",), "relu", "projector_hidden_act"),
        ("config.json", ("vision_config", "use_mean_pooling"), False, "use_mean_pooling"),
        ("config.json", ("vision_feature_layer",), -2, "vision_feature_layer"),
        ("config.json", ("text_config", "model_type"), "gemma2", "text_config.model_type"),
        ("processor_config.json", ("image_processor", "image_mean"), [0.5, 0.5, 0.5], "image_mean"),
    ],
)
def test_a_setting_that_the_layout_cannot_express_is_refused_before_anything_is_written(
    file, keys, value, named, tiny_internvl, tmp_path
):
    folder = Path(shutil.copytree(tiny_internvl, tmp_path / "changed"))
    saved = json.loads((folder / file).read_text())
    inner = saved
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / file).write_text(json.dumps(saved))
    with pytest.raises(OpenRILError, match=named) as error:
        internvl_original.export(ask(folder, tmp_path / "out"))
    assert str(value).strip("[]") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_template_of_another_form_and_a_model_of_another_kind_are_refused(tiny_internvl, tiny_qwen, tmp_path):
    folder = Path(shutil.copytree(tiny_internvl, tmp_path / "changed"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<IMG_CONTEXT>\\n", "<IMG_CONTEXT>"))
    with pytest.raises(OpenRILError, match=r"chat_template: .*PROBE"):
        internvl_original.export(ask(folder, tmp_path / "out"))
    with pytest.raises(OpenRILError, match=r"internvl.*qwen2_5_vl"):
        internvl_original.export(ask(tiny_qwen, tmp_path / "out"))


def test_a_weight_left_over_or_missing_is_refused_and_leaves_nothing(tiny_internvl, tmp_path):
    folder = Path(shutil.copytree(tiny_internvl, tmp_path / "changed"))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "extra.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpenRILError, match=r"extra\.weight"):
        internvl_original.export(ask(folder, tmp_path / "out"))
    name = next(n for n in weights if n.endswith("linear_2.bias"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpenRILError, match=r"linear_2\.bias"):
        internvl_original.export(ask(folder, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["changed"]


def test_a_full_disk_leaves_nothing_and_a_second_call_writes_the_same_files(tiny_internvl, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"begun")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(weights_module, "save_file", full)
        with pytest.raises(OpenRILError, match=r"--out.*No space left"):
            internvl_original.export(ask(tiny_internvl, out))
    assert list(tmp_path.iterdir()) == []
    internvl_original.export(ask(tiny_internvl, out))
    one = load_file(out / "model.safetensors")
    with monkeypatch.context() as patched:  # in several files with an index, as for a large model
        patched.setattr(weights_module, "MAX_FILE_BYTES", 50_000)
        internvl_original.export(ask(tiny_internvl, tmp_path / "parts"))
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    several = {k: v for f in set(index["weight_map"].values()) for k, v in load_file(tmp_path / "parts" / f).items()}
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(one) == set(several)
    assert all(torch.equal(several[name], value) for name, value in one.items())


def test_the_same_command_uses_what_is_there_and_another_is_refused(tiny_internvl, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(tiny_internvl), "--to", "internvl-original", "--out", str(out), "--no-check"]
    assert run_export(command, Console()) == 0
    written = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert run_export(command, Console()) == 0
    assert "already" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == written
    with pytest.raises(OpenRILError, match=r"types \(was.*stored.*bfloat16"):
        run_export([*command, "--type", "bfloat16"], Console())
    (out / RECORD).unlink()
    with pytest.raises(OpenRILError, match=r"--out.*other files"):
        run_export(command, Console())
    assert (out / "config.json").exists()


def test_another_type_is_written_and_one_that_cannot_hold_a_weight_is_refused(tiny_internvl, tmp_path):
    internvl_original.export(ask(tiny_internvl, tmp_path / "out", "bfloat16"))
    assert {v.dtype for v in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    folder = Path(shutil.copytree(tiny_internvl, tmp_path / "changed"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight" if "lm_head.weight" in weights else "language_model.lm_head.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpenRILError, match=r"--type.*infinite.*lm_head"):
        internvl_original.export(ask(folder, tmp_path / "half", "float16"))


def test_a_run_exports_its_student_last_and_fails_if_the_export_answers_otherwise(tiny_internvl, tmp_path, monkeypatch):
    shutil.copytree(tiny_internvl, tmp_path / "run" / "student")
    recipe = questions(tmp_path)
    recipe.run_dir, recipe.export.to, recipe.export.questions = str(tmp_path / "run"), "internvl-original", 1
    recipe.eval.max_completion_length = 4
    run_recipe(recipe, Console())
    out = tmp_path / "run" / "export" / "internvl-original"
    assert json.loads((out / RECORD).read_text())["check"]["passed"]
    written = (out / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setitem(internvl_original.LIMITS, "stored", -1.0)
    with pytest.raises(OpenRILError, match=r"export\.to.*export\.json"):
        run_recipe(recipe, Console())
    assert (out / "model.safetensors").stat().st_mtime_ns == written
