"""The warm start as a stage: loss, freezing, adapters, and the same weights after a stop of any kind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from rich.console import Console
from safetensors.torch import load_file

from openril.data.reading import read_questions
from openril.errors import DataError, RecipeError, StateError
from openril.models.freezing import module_group
from openril.models.loading import load_model
from openril.recipe.loading import save_recipe
from openril.recipe.schema import Recipe
from openril.stages.sft import run_sft
from openril.storage import read_jsonl
from openril.training.loop import Interrupted
from openril.training.sft import SFTFolder, micro_batches, train_sft
from openril.training.sft_examples import sft_examples
from support.tiny import tiny_questions, write_questions

SCRIPT = """
import sys
from rich.console import Console
from openril.recipe.loading import load_recipe
from openril.stages.sft import run_sft
run_sft(load_recipe(sys.argv[1]), Console())
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_questions(folder / "questions.jsonl", tiny_questions(folder, 12))


def make_recipe(run_dir, model, data, *, precision="float32", student=None, **sft):
    optimizer = {"learning_rate": 1e-3, "schedule": "linear", "final_learning_rate": 1e-4}
    return Recipe.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"train": [str(data)]},
            "student": {"model": str(model), "dtype": "float32", **(student or {})},
            "train": {"precision": precision},
            "sft": {
                "batch_size": 4,
                "micro_batch_size": 2,
                "save_every": 2,
                "epochs": 2,
                "optimizer": optimizer,
                **sft,
            },
        }
    )


def run(recipe):
    return run_sft(recipe, Console(quiet=True))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_dtype(value):
    """A configuration without its dtype, which transformers writes in some parts only once a model was loaded."""
    return {k: without_dtype(v) for k, v in value.items() if k != "dtype"} if isinstance(value, dict) else value


def losses(recipe):
    return [row["loss"] for row in SFTFolder(recipe).metrics()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_qwen, data):
    recipe = make_recipe(tmp_path_factory.mktemp("unbroken"), tiny_qwen, data)
    run(recipe)
    return recipe


def test_what_a_finished_stage_leaves(unbroken, tiny_qwen):
    folder = unbroken.sft_student_path.parent
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "settings.json", "student"]
    for name in ("config.json", "generation_config.json", "processor_config.json"):
        before, after = (json.loads((Path(p) / name).read_text()) for p in (tiny_qwen, folder / "student"))
        assert without_dtype(before) == without_dtype(after), name
    load_model(str(folder / "student"))


def test_settings_that_do_nothing_here_are_named(tiny_qwen, data, tmp_path, capsys):
    recipe = make_recipe(tmp_path / "run", tiny_qwen, data, max_steps=1)
    recipe.train.offload, recipe.train.shard = "swap", True
    run_sft(recipe, Console(width=200))
    out = capsys.readouterr().out
    assert "train.offload" in out and "train.shard" in out and recipe.sft_student_path.is_dir()


def test_metrics_have_one_row_a_step_and_the_recipe_s_learning_rate(unbroken):
    rows = SFTFolder(unbroken).metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # 12 examples x 2 epochs / 4
    # linear from 1e-3 to 1e-4 over 6 steps: 1.8e-4 less each time
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 8.2e-4, 6.4e-4, 4.6e-4, 2.8e-4, 1e-4])
    assert all(row["tokens"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_vision_tower_stays_and_the_rest_moves(unbroken, tiny_qwen):
    before, after = weights(tiny_qwen), weights(unbroken.sft_student_path)
    moved = {module_group(k) for k in before if not torch.equal(before[k], after[k])}
    assert "vision_tower" not in moved and {"projector", "attention", "lm_head"} <= moved


def test_a_finished_stage_is_not_repeated(unbroken):
    modified = (unbroken.sft_student_path / "model.safetensors").stat().st_mtime_ns
    run(unbroken)
    assert (unbroken.sft_student_path / "model.safetensors").stat().st_mtime_ns == modified


def test_globals_of_accelerate_are_left_as_they_were(unbroken):
    assert AcceleratorState._shared_state == {} and PartialState._shared_state == {}
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


def test_accumulation_does_not_change_the_loss(unbroken, tmp_path, tiny_qwen, data):
    # The rows of a batch have answers of different lengths: only a mean over all their tokens is the same however cut.
    recipe = make_recipe(tmp_path, tiny_qwen, data, micro_batch_size=1)
    run(recipe)
    assert losses(recipe) == pytest.approx(losses(unbroken), abs=1e-5)


def test_killed_at_any_moment_and_continued_the_weights_are_the_same(unbroken, tmp_path, tiny_qwen, data):
    recipe = make_recipe(tmp_path / "run", tiny_qwen, data, save_every=1)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    worker = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "recipe.yaml")], stdout=subprocess.DEVNULL)
    metrics = SFTFolder(recipe).metrics_path
    while worker.poll() is None and not metrics.exists():
        time.sleep(0.005)
    time.sleep(random.uniform(0.0, 0.4))  # in a step, a save, a rotation, or after the end
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    run(recipe)
    assert same(weights(recipe.sft_student_path), weights(unbroken.sft_student_path))
    assert [row["step"] for row in SFTFolder(recipe).metrics()] == [1, 2, 3, 4, 5, 6]


def stop_at(step):
    def report(done, total, row):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def test_asked_to_stop_it_saves_and_a_torn_checkpoint_is_passed_over(unbroken, tmp_path, tiny_qwen, data):
    recipe = make_recipe(tmp_path, tiny_qwen, data, save_every=0)
    examples = sft_examples(recipe, read_questions(recipe.data))
    with pytest.raises(Interrupted, match="after step 3"):
        train_sft(recipe, examples, report=stop_at(2))  # seen at the end of the next step
    folder = SFTFolder(recipe)
    assert [p.name for p in folder.whole_checkpoints()] == ["checkpoint-3"] and not folder.done
    torn = folder.checkpoints_path / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    steps = []
    train_sft(recipe, examples, report=lambda step, total, row: steps.append(step))
    assert steps == [4, 5, 6]
    assert same(weights(recipe.sft_student_path), weights(unbroken.sft_student_path))


def test_continuing_with_other_settings_is_refused(tmp_path, tiny_qwen, data):
    recipe = make_recipe(tmp_path, tiny_qwen, data, save_every=0)
    examples = sft_examples(recipe, read_questions(recipe.data))
    with pytest.raises(Interrupted):
        train_sft(recipe, examples, report=stop_at(1))
    recipe.sft.optimizer.learning_rate = 1e-2
    with pytest.raises(StateError, match=r"sft\.optimizer\.learning_rate"):
        train_sft(recipe, examples)


def test_adapters_end_as_an_ordinary_checkpoint_and_survive_a_stop(tmp_path, tiny_internvl, data):
    lora = {"lora": {"enabled": True, "r": 2, "dropout": 0.2}}
    whole = make_recipe(tmp_path / "whole", tiny_internvl, data, student=lora)
    broken = make_recipe(tmp_path / "broken", tiny_internvl, data, student=lora, save_every=0)
    examples = sft_examples(whole, read_questions(whole.data))
    train_sft(whole, examples)
    with pytest.raises(Interrupted):
        train_sft(broken, examples, report=stop_at(3))
    train_sft(broken, examples)
    before, after = weights(tiny_internvl), weights(whole.sft_student_path)
    assert before.keys() == after.keys()
    moved = {module_group(k) for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"attention", "mlp_gate", "mlp_up", "mlp_down"}
    assert same(after, weights(broken.sft_student_path))


def test_the_paper_s_precision_and_checkpointing_run_on_this_machine(tmp_path, tiny_internvl, data):
    student = {"gradient_checkpointing": True, "dtype": "bfloat16"}
    recipe = make_recipe(tmp_path, tiny_internvl, data, precision="bfloat16", student=student, max_steps=2)
    run(recipe)
    written = weights(recipe.sft_student_path)
    assert len(losses(recipe)) == 2 and {v.dtype for v in written.values()} == {torch.bfloat16}


def test_when_every_example_is_too_long_there_is_no_student(tmp_path, tiny_qwen, data):
    recipe = make_recipe(tmp_path, tiny_qwen, data, max_steps=3)
    recipe.data.max_prompt_length = 3
    with pytest.raises(DataError, match="max_prompt_length"):
        run(recipe)
    assert not recipe.sft_student_path.exists()


def test_left_out_examples_are_counted_once_and_said(tmp_path, tiny_qwen, data):
    recipe = make_recipe(tmp_path, tiny_qwen, data)
    recipe.data.max_prompt_length = 22  # fits the questions without images alone
    warnings = []
    examples = sft_examples(recipe, read_questions(recipe.data))
    train_sft(recipe, examples, warn=warnings.append)  # two epochs
    listed = read_jsonl(recipe.run_path / "left_out.jsonl")
    assert len(listed) == 8 and {(row["stage"], row["limit"]) for row in listed} == {("sft", 22)}
    assert all(row["tokens"] > 22 and "questions.jsonl:" in row["origin"] for row in listed)
    assert warnings and warnings[0].startswith("8 of 12 examples")


def test_batch_sizes_that_do_not_divide_are_named(tmp_path, tiny_qwen, data):
    recipe = make_recipe(tmp_path, tiny_qwen, data, batch_size=6, micro_batch_size=4)
    with pytest.raises(RecipeError, match=r"sft\.batch_size: .*micro_batch_size 4 .*got 6"):
        micro_batches(recipe, 1)
    assert micro_batches(recipe, 2) == (3, 1)  # a process's share is smaller than the micro batch
    assert micro_batches(make_recipe(tmp_path, tiny_qwen, data, batch_size=128, micro_batch_size=4), 8) == (4, 4)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(unbroken, tmp_path, tiny_qwen, data):
    recipe = make_recipe(tmp_path / "run", tiny_qwen, data)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    (tmp_path / "worker.py").write_text(SCRIPT)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(recipe) == pytest.approx(losses(unbroken), abs=1e-5)
    one, two = weights(unbroken.sft_student_path), weights(recipe.sft_student_path)
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-4
