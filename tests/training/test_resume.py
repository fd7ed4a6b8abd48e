"""Stopping and continuing is the same run, bit for bit: weights, optimizers, random states, metrics, rollouts."""

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
from openril.models.loading import load_processor
from openril.models.saving import write_model
from openril.storage import write_json
from openril.training.distributed import make_accelerator
from openril.training.loop import Interrupted
from openril.training.setup import TrainingComponents, check_pretrained, pretraining_settings, pretraining_settings_file
from support.checkpoints import TIMES, assert_same, files
from support.loop import make_trainer, tiny_recipe


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"student__lora": {"enabled": True, "r": 2, "dropout": 0.2}, "train__num_iterations": 2},
        # Four steps of 4 on 8 questions, two of which are remembered: the memory is lived out, and questions come again.
        {"discriminator__replay": 0.5, "discriminator__replay_steps": 2, "train__num_iterations": 2},
        {
            "discriminator__ema_decay": 0.9,
            "discriminator__gradient_penalty": 0.1,
            "discriminator__label_smoothing": 0.1,
            "discriminator__update_below": 0.95,
            "rewards__similarity__gate": {"enabled": True},
        },
    ],
    ids=["full", "lora", "replay", "regularized"],
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
    replays = "discriminator__replay" in overrides
    assert ("replay.jsonl" in files(tmp_path / "whole/checkpoints/step_000004")) == replays
    a, b = whole.folder.metrics(), trainer.folder.metrics()
    assert [r.get("discriminator/replayed_groups") for r in a] == ([None, 4, 4, 4] if replays else [None] * 4)
    strip = lambda rows: [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in rows]  # noqa: E731
    assert strip(a) == strip(b)
    for step in range(1, 5):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "stopped" / name).read_text()


def test_work_after_the_last_checkpoint_is_done_again(tiny_qwen: Path, tmp_path: Path):
    """A kill between checkpoints: rows after the checkpoint are cut, and the next run writes the same ones."""

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


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("which", ["train", "discriminator"])
def test_the_number_of_steps_stays_where_a_learning_rate_follows_from_it(
    schedule: str, which: str, tiny_qwen: Path, tmp_path: Path
):
    optimizer = {"learning_rate": 1e-3, "schedule": schedule}

    def recipe(**overrides: Any) -> Any:
        values = {"train__max_steps": 1, f"{which}__optimizer": optimizer, **overrides}
        return tiny_recipe(tmp_path / "run", tiny_qwen, **values)

    make_trainer(recipe(), tmp_path / "data").train()
    with pytest.raises(
        StateError, match=rf"train\.max_steps \(was 1, now 2\).*{which}\.optimizer\.schedule is {schedule}"
    ):
        make_trainer(recipe(train__max_steps=2), tmp_path / "data")
    with pytest.raises(StateError, match=r"train\.max_steps \(was 1, now 0\), train\.epochs"):
        make_trainer(recipe(train__max_steps=0, train__epochs=2.0), tmp_path / "data")
    assert make_trainer(recipe(train__epochs=2.0), tmp_path / "data").step_number == 1  # max_steps decides
    if which == "discriminator":  # a fixed one has no learning rate
        with pytest.raises(StateError) as caught:
            make_trainer(recipe(train__max_steps=2, discriminator__mode="fixed"), tmp_path / "data")
        assert "discriminator.mode" in str(caught.value) and "max_steps" not in str(caught.value)


def test_bfloat16_weights_go_on_with_what_rounding_took(tiny_qwen: Path, tmp_path: Path):
    """At 1e-6 hardly a bfloat16 weight moves in a step, so that all of it is in the optimizer's states."""
    from openril.training.optimization import CompensatedAdamW

    slow = {"learning_rate": 1e-6}
    overrides = {"train__precision": "pure_bf16", "train__optimizer": slow, "discriminator__optimizer": slow}
    whole = make_trainer(tiny_recipe(tmp_path / "whole", tiny_qwen, train__max_steps=2, **overrides), tmp_path / "data")
    assert isinstance(whole.policy.optimizer.optimizer, CompensatedAdamW)
    assert whole.discriminator is not None
    assert isinstance(whole.discriminator.optimizer.optimizer, CompensatedAdamW)
    whole.train()
    for steps in (1, 2):
        recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=steps, **overrides)
        make_trainer(recipe, tmp_path / "data").train()
    left = tmp_path / "whole/checkpoints/step_000002"
    assert_same(left, tmp_path / "run/checkpoints/step_000002")
    for name in ("student", "discriminator"):
        states = load_file(left / f"optimizer_{name}.safetensors")
        assert any(v.dtype == torch.int16 and v.count_nonzero() > 0 for v in states.values()), name


def test_other_questions_or_another_start_are_not_continued(tiny_qwen: Path, tiny_internvl: Path, tmp_path: Path):
    from openril.training.checkpoint import run_fingerprint
    from support.tiny import tiny_questions

    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=1)
    questions = tiny_questions(tmp_path / "data", 8)
    accelerator = make_accelerator(recipe)
    folder = tmp_path / "run/checkpoints"
    TrainingComponents(recipe, accelerator, folder, questions).saver.save(1)
    again = TrainingComponents(recipe, accelerator, folder, questions)
    assert again.step == 1
    with pytest.raises(StateError, match="questions"):
        TrainingComponents(recipe, accelerator, folder, questions[1:])
    other = recipe.model_copy(deep=True)
    other.student.model = str(tiny_internvl)
    assert run_fingerprint(other, questions) != run_fingerprint(recipe, questions)
    with pytest.raises(StateError, match="starting student"):
        TrainingComponents(other, accelerator, folder, questions)
    smaller = recipe.model_copy(deep=True)
    smaller.train.max_tokens_per_micro_batch = 200  # out of memory: a person may change this and go on
    assert TrainingComponents(smaller, accelerator, folder, questions).step == 1


def test_a_checkpoint_without_what_it_replays_is_refused(tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=1, discriminator__replay=0.5)
    make_trainer(recipe, tmp_path / "data").train()
    recipe.train.max_steps = 2
    memory = tmp_path / "run/checkpoints/step_000001/replay.jsonl"
    whole = memory.read_text()
    memory.write_text(whole[: len(whole) // 2])
    with pytest.raises(StateError, match=r"replay\.jsonl"):
        make_trainer(recipe, tmp_path / "data")
    memory.write_text(whole)
    assert make_trainer(recipe, tmp_path / "data").step_number == 1


def test_old_checkpoints_are_removed(tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(
        tmp_path / "run", tiny_qwen, train__max_steps=3, train__save_every=1, train__keep_checkpoints=2
    )
    make_trainer(recipe, tmp_path / "data").train()
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_a_checkpoint_is_an_ordinary_model(tiny_student: Path, tmp_path: Path):
    from openril.hf import AutoModel, AutoModelForImageTextToText, AutoProcessor

    make_trainer(tiny_recipe(tmp_path / "run", tiny_student, train__max_steps=1), tmp_path / "data").train()
    folder = tmp_path / "run/checkpoints/step_000001"
    model, info = AutoModelForImageTextToText.from_pretrained(folder / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoProcessor.from_pretrained(folder / "student").chat_template
    _, info = AutoModel.from_pretrained(folder / "discriminator", output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).__name__.endswith("ForConditionalGeneration")


def test_the_final_student_has_the_type_the_recipe_names(tiny_student: Path, tmp_path: Path):
    from openril.hf import AutoModelForImageTextToText

    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_student), tmp_path / "data")
    parts_model = trainer.policy.unwrapped.model
    write_model(parts_model, tmp_path / "bf16", trainer.policy.encoder.processor, dtype=torch.bfloat16)
    assert {v.dtype for v in load_file(tmp_path / "bf16/model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "bf16/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16
    assert parts_model.dtype == torch.float32  # the one in memory is as it was


def test_tied_weights_stay_tied(tiny_qwen: Path, tmp_path: Path):
    from openril.hf import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(tiny_qwen)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = AutoModelForImageTextToText.from_config(config)
    processor = load_processor(str(tiny_qwen))
    write_model(model, tmp_path / "same", processor)
    write_model(model, tmp_path / "bf16", processor, dtype=torch.bfloat16)
    same, converted = (load_file(tmp_path / n / "model.safetensors") for n in ("same", "bf16"))
    assert same.keys() == converted.keys()
    assert not any("lm_head" in k for k in converted)


def test_a_discriminator_pretrained_for_something_else_is_refused(tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen)
    write_json(pretraining_settings_file(recipe), pretraining_settings(recipe))
    check_pretrained(recipe)
    recipe.discriminator.match_length = True
    with pytest.raises(StateError, match=r"discriminator\.match_length"):
        check_pretrained(recipe)
    recipe.discriminator.match_length = False
    recipe.discriminator.inputs = "image"
    with pytest.raises(StateError, match=r"discriminator\.inputs"):
        check_pretrained(recipe)
