"""train.shard on two processes (gloo) gives the run of one process that holds everything, and the bits of DDP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openril.recipe.loading import save_recipe
from openril.recipe.schema import Recipe
from openril.storage import read_jsonl
from support.launch import launch
from support.tiny import tiny_questions, write_questions

SCRIPT = Path(__file__).with_name("sharded.py")
CASES = ["mixed", "all", "paper", "replay", "lora", "tied", "clipped", "bradley_terry", "bfloat16"]
# Adam makes steps of the rounding noise in the gradient of Bradley-Terry's bias, which is 0.
NOISE = "discriminator.head.bias"


def begin(processes: int, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, start_new_session=True, **streams)


def end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(processes: int, *arguments: Any, timeout: int = 300) -> tuple[int, str]:
    """Return exit status and standard error of a command under torchrun. It must end within the time limit."""
    process = begin(processes, *arguments)
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        end(process)
    return process.returncode, errors


@pytest.fixture(scope="module")
def tied(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2.5-VL with one matrix as embeddings and LM head."""
    folder = tmp_path_factory.mktemp("tied")
    for file in tiny_qwen.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def runs(tiny_qwen: Path, tiny_internvl: Path, tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of every case with one process (``1``) and with two (``2``), which must all end within the time limit."""
    folder = tmp_path_factory.mktemp("runs")
    checkpoints = {"mixed": tiny_internvl, "tied": tied}
    for processes in (1, 2):
        cases = [f"{c}={checkpoints.get(c, tiny_qwen)}" for c in CASES if processes > 1 or c != "bfloat16"]
        done = launch(processes, SCRIPT, folder / str(processes), *cases)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", [c for c in CASES if c != "bfloat16"])
def test_sharded_runs_equal_those_of_one_process(runs: Path, case: str):
    folders = runs / "1" / f"{case}-False", runs / "2" / f"{case}-True"
    one, two = (load_file(f / "final.safetensors") for f in folders)
    assert one.keys() == two.keys()
    assert any(k.startswith("discriminator.") for k in one)
    for key, value in one.items():
        if (case, key) != ("bradley_terry", NOISE):
            assert torch.allclose(value, two[key], rtol=0, atol=1e-6), f"{key}: {(value - two[key]).abs().max()}"
    assert [found(f)["packing"] for f in folders] == [
        ["on for images", "on for images", found(folders[0])["packing"][2]]
    ] * 2
    for a, b in zip(*(read_jsonl(f / "metrics.jsonl") for f in folders), strict=True):
        compared = 0
        for name, value in a.items():
            if name.startswith(("train/", "reward/", "discriminator/")):
                assert b[name] == pytest.approx(value, abs=1e-6), name
                compared += 1
        assert compared > 20
    texts = [(f / "rollouts" / "step_000002.jsonl").read_text() for f in folders]
    rows = [[(r["question_id"], r["source"], r["text"]) for r in map(json.loads, t.splitlines())] for t in texts]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("case", ["mixed", "all", "lora", "bradley_terry"])
def test_sharded_runs_equal_ddp_bit_for_bit(runs: Path, case: str):
    ddp, sharded = (load_file(runs / "2" / f"{case}-{shard}" / "final.safetensors") for shard in (False, True))
    assert ddp.keys() == sharded.keys()
    for key, value in ddp.items():
        assert torch.equal(value, sharded[key]), key


def test_learning_happened(runs: Path, tiny_qwen: Path):
    end = load_file(runs / "2" / "all-True" / "final.safetensors")
    start = load_file(tiny_qwen / "model.safetensors")
    assert (end["student.model.lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-4


def test_a_layer_is_a_unit_and_a_frozen_tower_is_whole(runs: Path):
    seen = found(runs / "2" / "mixed-True")
    assert seen["whole"] == ["vision_tower"]
    own, of_reference, of_discriminator = seen["shared"]
    assert own == of_reference == of_discriminator > 10
    assert seen["sharded gradients"]
    assert seen["layouts"] == 1 and seen["layers"] == 2  # every layer shares the masks of the pass
    assert seen["gathered"] == ["torch.float64"]


def test_bfloat16_gathers_layers_in_16_bits_packs_and_keeps_the_score_head_whole(runs: Path):
    seen = found(runs / "2" / "bfloat16-True")
    assert seen["gathered"] == ["torch.bfloat16"]
    assert seen["head"] == ["torch.float32"]
    assert seen["layouts"] == 1
    assert seen["packing"] == ["on for images", "on for images", "on for text"]
    end = load_file(runs / "2" / "bfloat16-True" / "final.safetensors")
    assert {v.dtype for v in end.values()} == {torch.float32}


def test_a_process_that_fails_ends_the_others_with_its_message(tiny_qwen: Path, tmp_path: Path):
    status, errors = finish(2, SCRIPT, tmp_path, f"failing={tiny_qwen}", timeout=200)
    assert status != 0
    assert "questions.jsonl:7: no such image" in errors


@pytest.mark.parametrize("lora", [False, True])
def test_sharded_sft_killed_and_continued_equals_one_process(lora: bool, tiny_qwen: Path, tmp_path: Path):
    data = write_questions(tmp_path / "questions.jsonl", tiny_questions(tmp_path, 12))
    command = "-m", "openril.cli", "sft"
    folders = {}
    for processes in (1, 2):
        recipe = Recipe.model_validate(
            {
                "run_dir": str(tmp_path / str(processes)),
                "data": {"train": [str(data)]},
                "student": {"model": str(tiny_qwen), "dtype": "float32", "lora": {"enabled": lora}},
                "train": {"precision": "float32", "shard": True},
                "sft": {"batch_size": 4, "micro_batch_size": 2, "save_every": 2, "epochs": 2},
            }
        )
        save_recipe(recipe, tmp_path / f"{processes}.yaml")
        folders[processes] = recipe.sft_student_path.parent
    status, errors = finish(1, *command, tmp_path / "1.yaml")
    assert status == 0, errors[-4000:]
    first = begin(2, *command, tmp_path / "2.yaml")
    try:
        until = time.monotonic() + 200
        while not (folders[2] / "checkpoints/checkpoint-2/whole").exists():
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        end(first)
    status, errors = finish(2, *command, tmp_path / "2.yaml")
    assert status == 0, errors[-4000:]
    one, two = (load_file(folders[n] / "student/model.safetensors") for n in (1, 2))
    start = load_file(tiny_qwen / "model.safetensors")
    assert one.keys() == two.keys()
    assert max(float((one[k] - start[k]).abs().max()) for k in one if k in start) > 1e-6
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=0, atol=1e-6), key
    rows = [read_jsonl(folders[n] / "metrics.jsonl") for n in (1, 2)]
    assert [r["step"] for r in rows[1]] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(*rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], abs=1e-5)
