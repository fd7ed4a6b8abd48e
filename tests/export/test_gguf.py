"""`ril export --to gguf`: files that llama.cpp answers from like the original, and the faults that its check finds."""

from __future__ import annotations

import errno
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from openril.cli import main
from openril.errors import OpenRILError
from openril.export import gguf_format
from openril.export.fidelity import answer_logprobs, divergences
from openril.export.gguf_file import GGUFFile
from openril.export.gguf_format import load_checkpoint, write_language_model, write_vision_model
from openril.export.gguf_names import Names
from openril.export.gguf_vision import FAMILIES, image_token_limits
from openril.export.image_sizes import internvl_size, qwen_size
from openril.export.request import ExportError, ExportRequest
from openril.export.runtime import MARKER, Runtime, kl_divergence, runtime_version
from openril.hf import submodule
from openril.models.loading import load_model
from openril.testing.tiny_models import build_tiny_model

WEIGHTS = Path(__file__).parents[2] / "playground" / "weights"
STUDENTS = {"qwen2_5_vl": WEIGHTS / "student_qwen" / "sft", "internvl": WEIGHTS / "student_internvl" / "sft"}


def write_questions(folder: Path, *sizes: tuple[int, int]) -> Path:
    """Write a question about a picture of each size."""
    draw = random.Random(0)
    rows = []
    for i, size in enumerate(sizes):
        image = Image.new("RGB", size, "white")
        for color in ("red", "blue", "black"):
            x, y = draw.randrange(size[0] - 20), draw.randrange(size[1] - 20)
            ImageDraw.Draw(image).rectangle((x, y, x + 20, y + 20), fill=color)
        image.save(folder / f"{i}.png")
        rows.append({"id": f"q{i}", "images": [f"{i}.png"], "question": "how many red squares?", "answer": "1"})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ril_export(*arguments: Any) -> int:
    settings = ["--eval.max-completion-length", "12", "--threads", "1"]
    return main(["export", *map(str, arguments), *settings])


def figures(folder: Path) -> dict[str, dict[str, Any]]:
    return {t["type"]: t for t in json.loads((folder / "check.json").read_text())}


@pytest.fixture(scope="module", params=list(STUDENTS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family, the folder of its export in f16 and q8_0, and the questions of its check."""
    folder = tmp_path_factory.mktemp(request.param)
    questions = write_questions(folder, *[(84, 84)] * 3)
    out = folder / "out"
    checked = ("--data.validation", questions, "--out", out)
    assert ril_export(STUDENTS[request.param], "--to", "gguf", "--type", "f16", "q8_0", *checked) == 0
    return request.param, out, questions


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_the_export_answers_like_the_original(exported: tuple[str, Path, Path]):
    family, out, _ = exported
    found = figures(out)
    assert found["f16"]["kl_mean"] <= 1e-4 and found["q8_0"]["kl_mean"] <= 1e-2
    assert found["f16"]["kl_mean"] < found["q8_0"]["kl_mean"]
    for figure in found.values():
        assert figure["passed"] and figure["unequal_prompts"] == 0 and figure["positions"] >= 3
        assert (
            figure["peak_memory"] >= figure["memory"] > 1e6
            and figure["first_token_seconds"] > 0
            and figure["threads"] == 1
        )
        assert figure["runtime"] == f"xllamacpp {runtime_version()}"
        assert figure["bytes"] == sum(
            (out / f"{n}.gguf").stat().st_size for n in (f"model-{figure['type']}", "mmproj-f16")
        )
    assert found["q8_0"]["bytes"] < found["f16"]["bytes"]
    notes = (out / "RUN.md").read_text()
    mark = FAMILIES[family].image + ("\\n" if family == "internvl" else "")
    assert f"user\\n{mark}QUESTION<|im_end|>\\n<|im_start|>assistant\\n" in notes
    assert ("--image-min-tokens 1 --image-max-tokens 9" in notes) == (family == "qwen2_5_vl")
    assert "| q8_0 | yes |" in (out / "check.md").read_text()


def test_the_chat_endpoint_drops_the_newline_after_an_image(exported: tuple[str, Path, Path]):
    family, out, _ = exported
    found = json.loads((out / "export.json").read_text())["chat_endpoint"]
    assert found["expected"] - found["prompt_tokens"] == (1 if family == "internvl" else 0)
    assert ("**does not give** the same prompt" in (out / "RUN.md").read_text()) == (family == "internvl")


def test_a_killed_export_continues(exported: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    family, out, questions = exported
    whole, out = figures(out), copied(out, tmp_path / "out")
    journal = out / "check-q8_0.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    (out / "model-q8_0.gguf").unlink()
    (out / ".model-q8_0.gguf.1.tmp").write_text("cut off")
    written, asked = [], []
    write, complete = GGUFFile.write, Runtime.complete
    monkeypatch.setattr(GGUFFile, "write", lambda self, path: (written.append(path.name), write(self, path))[1])
    monkeypatch.setattr(Runtime, "complete", lambda self, *a, **k: (asked.append(1), complete(self, *a, **k))[1])
    checked = ("--data.validation", questions, "--out", out)
    assert ril_export(STUDENTS[family], "--to", "gguf", "--type", "f16", "q8_0", *checked) == 0
    assert written == ["model-q8_0.gguf"] and len(asked) == 2  # the answer, and the original's answer forced
    assert figures(out)["q8_0"]["kl_mean"] == pytest.approx(whole["q8_0"]["kl_mean"], rel=1e-3)
    assert not list(out.glob(".*"))


def test_wrong_files_and_settings_fail_the_check(exported: tuple[str, Path, Path], tmp_path: Path):
    family, out, questions = exported
    out = copied(out, tmp_path / "out")
    (out / "model-q8_0.gguf").unlink()
    if family == "internvl":  # the table of positions in the order of the checkpoint
        model, encoder = load_checkpoint(ExportRequest("gguf", str(STUDENTS[family]), out, ("f16",)))
        plain = GGUFFile("f16", "clip")
        FAMILIES[family].add_keys(plain, model.config, encoder.processor.image_processor)
        gguf_format._add_weights(plain, model, Names(model.config, False), language=False)
        plain.write(out / "mmproj-f16.gguf")
        wrong = "KL"
    else:  # the limits of image tokens, which are not in the file
        record = json.loads((out / "export.json").read_text())
        (out / "export.json").write_text(json.dumps(record | {"image_token_limits": None}))
        questions = write_questions(tmp_path, (300, 300))
        wrong = "expected 24 tokens, got 136"
    assert ril_export("--check", out, "--data.validation", questions) == 1
    found = figures(out)["f16"]
    assert wrong in found["why"] and not found["passed"]
    assert (found["kl_mean"] or 1) > 1e-4


@pytest.mark.parametrize("family", STUDENTS)
def test_pictures_of_odd_sizes_must_be_resized(family: str, tmp_path: Path):
    questions = write_questions(tmp_path, (250, 170), (100, 160))
    arguments = (STUDENTS[family], "--to", "gguf", "--data.validation", questions, "--out", tmp_path / "out")
    assert ril_export(*arguments) == 1
    found = figures(tmp_path / "out")["f16"]
    assert found["unequal_prompts"] == (2 if family == "internvl" else 0) and not found["passed"]
    assert ril_export(*arguments, "--resize-images") == 0
    assert figures(tmp_path / "out")["f16"]["kl_mean"] <= 1e-4
    assert f"def {'internvl' if family == 'internvl' else 'qwen'}_size" in (tmp_path / "out" / "RUN.md").read_text()


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_further_families_answer_like_the_original(family: str, tmp_path: Path):
    # SmolVLM's prompts need a token of two newlines, and Qwen3-VL more layers than it has deep features.
    folder = build_tiny_model(tmp_path / "model", family, num_layers=3, texts=["x.\n\n"] * 200, max_pixels=128 * 128)
    request = ExportRequest("gguf", str(folder), tmp_path, ("f16",))
    model, encoder = load_checkpoint(request)
    with torch.no_grad():  # random weights hardly look at the image
        for name, weight in model.named_parameters():
            if name == "lm_head.weight":
                weight *= 20
            elif weight.ndim > 1 and not name.startswith(FAMILIES[family].text_prefix):
                weight *= 2
    write_language_model(model, encoder, "f16", tmp_path / "model.gguf")
    write_vision_model(model, encoder, request)
    noise = np.random.default_rng(0)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour is it?"}]}]
    text = encoder.render(chat)
    ids = encoder.tokenizer("The red square is there.", add_special_tokens=False)["input_ids"]
    limits = image_token_limits(model.config, encoder.processor.image_processor)
    seen = []
    with Runtime(
        tmp_path / "model.gguf", tmp_path / "mmproj-f16.gguf", threads=1, context=512, limits=limits
    ) as runtime:
        for _ in range(2):
            image = Image.fromarray(noise.integers(0, 256, (96, 96, 3), dtype=np.uint8))
            prompt = encoder.encode_text(text, [image])
            seen.append(answer_logprobs(model, prompt, ids))
            sent = text.replace(FAMILIES[family].image, MARKER)
            assert runtime.complete(sent, [image], 1).prompt_tokens == prompt.length
            assert np.mean(divergences(runtime, encoder, sent, [image], ids, seen[-1])) < 1e-4
    assert kl_divergence(seen[0][0], torch.arange(seen[0].shape[1]), seen[1][0]) > 0.01  # it looks at the image


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def write_both(checkpoint: Path, out: Path) -> tuple[bytes, bytes]:
    request = ExportRequest("gguf", str(checkpoint), out, ("f16",))
    model, encoder = load_checkpoint(request)
    write_language_model(model, encoder, "f16", out / "model-f16.gguf")
    write_vision_model(model, encoder, request)
    return (out / "model-f16.gguf").read_bytes(), (out / "mmproj-f16.gguf").read_bytes()


@pytest.mark.parametrize("family", STUDENTS)
def test_both_layouts_on_disk_give_the_same_bytes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_format, "_probe", lambda model, encoder, text, mmproj, threads: len(mmproj.name))
    other = copied(STUDENTS[family], tmp_path / "other")
    load_model(str(STUDENTS[family]), dtype=torch.float16).save_pretrained(other, save_original_format=False)
    names = {p: set(json.loads(p.read_bytes()[8:][: int.from_bytes(p.read_bytes()[:8], "little")]))
             for p in (other / "model.safetensors", STUDENTS[family] / "model.safetensors")}  # fmt: skip
    assert len(set(map(frozenset, names.values()))) == 2
    assert write_both(other, tmp_path / "a") == write_both(STUDENTS[family], tmp_path / "b")


def test_tied_embeddings_are_written_once_and_adapters_are_merged(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    base = load_model(str(STUDENTS["qwen2_5_vl"]))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted: Any = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(STUDENTS["qwen2_5_vl"])
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().model.language_model.layers[0].self_attn.q_proj.weight.detach().numpy()
    request = ExportRequest("gguf", str(tmp_path / "adapter"), tmp_path, ("f16",))
    model, encoder = load_checkpoint(request)
    write_language_model(model, encoder, "f16", tmp_path / "untied.gguf")
    untied = tensors(tmp_path / "untied.gguf")
    assert np.array_equal(untied["blk.0.attn_q.weight"], merged.astype(np.float16))
    assert "output.weight" in untied
    model.lm_head.weight = model.get_input_embeddings().weight
    write_language_model(model, encoder, "f16", tmp_path / "tied.gguf")
    assert set(untied) - set(tensors(tmp_path / "tied.gguf")) == {"output.weight"}


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.extra", lambda model, encoder: setattr(model.model, "extra", torch.nn.Parameter(torch.ones(2)))),
        ("text_config.hidden_act", lambda model, encoder: setattr(model.config.text_config, "hidden_act", "gelu")),
        (
            "text_config.rope_parameters.rope_type",
            lambda model, encoder: model.config.text_config.rope_parameters.update(rope_type="yarn"),
        ),
        (
            "tokenizer.pre_tokenizer",
            lambda model, encoder: setattr(
                encoder.tokenizer.backend_tokenizer,
                "pre_tokenizer",
                submodule("tokenizers").pre_tokenizers.Whitespace(),
            ),
        ),
        (
            "blk.0.attn_q.weight: expected values below 65504",
            lambda model, encoder: model.model.language_model.layers[0].self_attn.q_proj.weight.data.fill_(1e5),
        ),
    ],
)
def test_what_the_runtime_would_compute_otherwise_is_refused(key: str, change: Any, tmp_path: Path):
    model, encoder = load_checkpoint(ExportRequest("gguf", str(STUDENTS["qwen2_5_vl"]), tmp_path, ("f16",)))
    change(model, encoder)
    with pytest.raises(ExportError, match=key.replace(".", r"\.")):
        write_language_model(model, encoder, "f16", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
def test_an_unknown_family_is_refused_by_its_name(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = build_tiny_model(tmp_path / "model", family)
    assert main(["export", str(folder), "--to", "gguf", "--no-check"]) == 2
    error = capsys.readouterr().err
    assert "model_type" in error and family in error


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ["export", str(STUDENTS["internvl"]), "--to", "gguf", "--no-check", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    assert main(arguments) == 2
    assert "--out" in capsys.readouterr().err and {p.name for p in (tmp_path / "out").iterdir()} == {"export.json"}
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert main(arguments) == 2
    assert "--out" in capsys.readouterr().err and {p.name for p in (tmp_path / "out").iterdir()} == {"export.json"}


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model-f16.gguf").write_text("somebody's model")
    assert main(["export", str(STUDENTS["internvl"]), "--to", "gguf", "--no-check", "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err and (tmp_path / "model-f16.gguf").read_text() == "somebody's model"


def test_a_wrong_or_missing_runtime_is_refused(
    exported: tuple[str, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    _, out, questions = exported
    monkeypatch.setattr("openril.export.runtime.version", lambda name: "2025.1.1")
    assert ril_export("--check", out, "--data.validation", questions) == 2
    assert "2025.1.1" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_text("no model")
    with pytest.raises(ExportError, match=r"bad\.gguf"):
        Runtime(tmp_path / "bad.gguf", out / "mmproj-f16.gguf", threads=1, context=64)


def test_flags_that_make_no_sense_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    student = str(STUDENTS["qwen2_5_vl"])
    for arguments, telling in {
        (): "CHECKPOINT",
        (student,): "--to",
        (student, "--to", "gguff"): "'gguff'",
        (student, "--to", "gguf", "--type", "q4_k_m"): "'q4_k_m'",
        (student, "--to", "gguf"): "data.validation",
        (student + "s", "--to", "gguf"): "sfts",
        (student, "--to", "gguf", "--no-check", "--sed", "1"): "--sed",
        ("--check", str(tmp_path)): "--check",
        ("--check", str(tmp_path), "--type", "f16"): "--check",
    }.items():
        assert main(["export", *arguments]) == 2
        assert telling in capsys.readouterr().err


def test_sizes_are_those_of_the_processors():
    smart = submodule("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    canvas = submodule("transformers.models.got_ocr2.image_processing_got_ocr2").get_optimal_tiled_canvas
    draw = random.Random(0)
    for _ in range(500):
        width, height = draw.randrange(20, 900), draw.randrange(20, 900)
        if max(width, height) / min(width, height) < 20:
            limits = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
            expected = smart(height, width, factor=28, **limits)
            assert qwen_size(width, height, side=28, **limits) == expected[::-1]
        columns, rows = canvas((height, width), (448, 448), 1, 12)
        assert internvl_size(width, height, tile=448, min_tiles=1, max_tiles=12) == (448 * columns, 448 * rows)


def test_kl_by_hand():
    p = torch.tensor([0.5, 0.25, 0.25]).log()
    q = torch.tensor([0.25, 0.5, 0.25]).log()
    order = torch.tensor([1, 0, 2])
    # 0.5 ln 2 + 0.25 ln 0.5 = 0.25 ln 2
    assert kl_divergence(p, order, q[order]) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert kl_divergence(p, torch.arange(3), p) == pytest.approx(0, abs=1e-6)
    # Only the token 1 is named: 0.25 ln(0.25 / 0.5) + 0.75 ln(0.75 / 0.5)
    merged = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_divergence(p, torch.tensor([1]), q[[1]]) == pytest.approx(merged, abs=1e-6)


def test_every_error_is_one_of_ours():
    assert issubclass(ExportError, OpenRILError)
