"""Stopping and continuing is the same run, bit for bit: weights, optimisers, random states, metrics, rollouts."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openril.errors import StateError
from openril.training.loop import Interrupted
from support.loop import make_trainer, tiny_recipe

TIMES = ("time/", "memory/")


def files(folder: Path) -> dict[str, Any]:
    """Every tensor and every plain value a checkpoint holds."""
    out: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        out |= {f"{path.relative_to(folder)}:{k}": v for k, v in load_file(path).items()}
    for name in ("rng_0.json", "state.json"):
        out[name] = json.loads((folder / name).read_text())
    return out


def assert_same(a: Path, b: Path) -> None:
    left, right = files(a), files(b)
    assert left.keys() == right.keys()
    assert any("optimiser_student" in k for k in left) and any(k.startswith("discriminator/") for k in left)
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key


@pytest.mark.parametrize(
    "overrides",
    [{}, {"student__lora": {"enabled": True, "r": 2, "dropout": 0.2}, "train__num_iterations": 2}],
    ids=["full", "lora"],
)
def test_continuing_equals_never_stopping(overrides: dict[str, Any], tiny_student: Path, tmp_path: Path):
    def recipe(name: str) -> Any:
        return tiny_recipe(tmp_path / name, tiny_student, train__max_steps=4, **overrides)

    whole = make_trainer(recipe("whole"), tmp_path / "data")
    whole.train()
    for _ in range(5):  # stopped after every step, by the signal a person sends
        trainer = make_trainer(
            recipe("stopped"), tmp_path / "data", report=lambda *_: os.kill(os.getpid(), signal.SIGINT)
        )
        if trainer.step_number == 4:
            break
        try:
            trainer.train()
        except Interrupted:
            continue
    assert_same(tmp_path / "whole/checkpoints/step_000004", tmp_path / "stopped/checkpoints/step_000004")
    a, b = whole.folder.metrics(), trainer.folder.metrics()
    strip = lambda rows: [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in rows]  # noqa: E731
    assert strip(a) == strip(b)
    for step in range(1, 5):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "stopped" / name).read_text()


def test_work_after_the_last_checkpoint_is_done_again(tiny_qwen: Path, tmp_path: Path):
    """A kill between checkpoints: rows behind the checkpoint are cut, and come out the same."""

    class Killed(BaseException):
        pass

    def die(step: int, *_: Any) -> None:
        if step == 3:
            raise Killed

    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=4, train__save_every=2)
    with pytest.raises(Killed):
        make_trainer(recipe, tmp_path / "data", report=die).train()
    assert (tmp_path / "run/rollouts/step_000003.jsonl").exists()
    (tmp_path / "run/checkpoints/.step_000004.partial").mkdir()  # and a torn checkpoint
    trainer = make_trainer(recipe, tmp_path / "data")
    assert trainer.step_number == 2
    assert not (tmp_path / "run/checkpoints/.step_000004.partial").exists()
    trainer.train()
    assert [r["step"] for r in trainer.folder.metrics()] == [1, 2, 3, 4]
    whole = make_trainer(tiny_recipe(tmp_path / "whole", tiny_qwen, train__max_steps=4), tmp_path / "data")
    whole.train()
    assert_same(tmp_path / "whole/checkpoints/step_000004", tmp_path / "run/checkpoints/step_000004")


def test_another_recipe_is_not_continued(tiny_qwen: Path, tmp_path: Path):
    make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=1), tmp_path / "data").train()
    with pytest.raises(StateError, match=r"train\.beta"):
        make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=2, train__beta=0.5), tmp_path / "data")
    more = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=2), tmp_path / "data")
    assert more.step_number == 1  # more steps are no other run


def test_old_checkpoints_are_removed(tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(
        tmp_path / "run", tiny_qwen, train__max_steps=3, train__save_every=1, train__keep_checkpoints=2
    )
    make_trainer(recipe, tmp_path / "data").train()
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_a_checkpoint_is_an_ordinary_model(tiny_student: Path, tmp_path: Path):
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    make_trainer(tiny_recipe(tmp_path / "run", tiny_student, train__max_steps=1), tmp_path / "data").train()
    folder = tmp_path / "run/checkpoints/step_000001"
    model, info = AutoModelForImageTextToText.from_pretrained(folder / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoProcessor.from_pretrained(folder / "student").chat_template
    _, info = AutoModel.from_pretrained(folder / "discriminator", output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).__name__.endswith("ForConditionalGeneration")
