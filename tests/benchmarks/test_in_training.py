"""`train.eval_suite`: benchmarks inside training, which change nothing of the run."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from openril.errors import DataError
from openril.recipe.schema import Recipe
from openril.stages.eval import run_eval
from openril.stages.suite_in_training import suite_evaluation
from openril.storage import read_jsonl
from openril.training.interrupts import Interrupted
from openril.training.loop import RILTrainer
from support.checkpoints import TIMES, assert_same
from support.launch import launch
from support.loop import make_trainer, tiny_recipe
from support.tiny import tiny_questions, write_questions

pytestmark = pytest.mark.benchmarks

# The dropout of the adapters draws from the global generator of torch in every step.
LORA = {"enabled": True, "r": 2, "dropout": 0.2}


def recipe(run: Path, student: Path, mirror: Path, suite: list[str], **more: Any) -> Recipe:
    return tiny_recipe(
        run,
        student,
        student__lora=LORA,
        train__max_steps=2,
        train__save_every=1,
        train__keep_checkpoints=2,
        train__eval_every=1,
        train__eval_suite=suite,
        eval={"suite_data": str(mirror), "suite_max_tokens": 3, "limit": 6},
        **more,
    )


def trainer_of(settings: Recipe, data: Path, warnings: list[str], **options: Any) -> RILTrainer:
    trainer = make_trainer(settings, data, **options)
    parts: Any = SimpleNamespace(accelerator=trainer.accelerator, sampler=trainer.sampler)
    trainer.evaluate = suite_evaluation(settings, parts, warnings.append)
    return trainer


def test_evaluating_changes_nothing_of_a_run_that_is_stopped_and_continued(
    mirror: Path, students: list[Path], tmp_path: Path
) -> None:
    """The worker runs lmms-eval, which reseeds and deletes: weights, optimizers and random states must not notice."""
    make_trainer(recipe(tmp_path / "plain", students[0], mirror, []), tmp_path / "data").train()
    settings, warnings = recipe(tmp_path / "run", students[0], mirror, ["ai2d", "mmbench_en_dev"]), []
    stop: Any = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    with pytest.raises(Interrupted):
        trainer_of(settings, tmp_path / "data", warnings, report=stop).train()
    trainer = trainer_of(settings, tmp_path / "data", warnings)
    assert trainer.step_number == 1
    trainer.train()
    assert_same(tmp_path / "plain/checkpoints/step_000002", tmp_path / "run/checkpoints/step_000002")
    plain, run = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    names = {"eval/suite/failed"} | {
        f"eval/suite/{task}{kind}" for task in ("ai2d", "mmbench_en_dev") for kind in ("", "_unparsed", "_unknown")
    }
    assert [row["step"] for row in run] == [1, 2]
    assert all({k for k in row if k.startswith("eval/")} == names for row in run)
    strip = lambda rows: [{k: v for k, v in r.items() if not k.startswith((*TIMES, "eval/"))} for r in rows]  # noqa: E731
    assert strip(plain) == strip(run)
    assert "lmms_eval" not in sys.modules and not warnings
    # The figures are those of the written student, by the command.
    checkpoint = tmp_path / "run/checkpoints/step_000002/student"
    run_eval(settings, Console(quiet=True), [str(checkpoint)], suite=["offline"], tasks=["ai2d", "mmbench_en_dev"])
    data = json.loads((tmp_path / "run/eval/suite.json").read_text())["checkpoints"][0]
    found = {task: result["score"] for task, result in data["results"].items()}
    assert found == {task: pytest.approx(run[-1][f"eval/suite/{task}"]) for task in found}
    name = data["name"]
    texts = [
        {row["question_id"]: row["text"] for row in read_jsonl(folder / "answers.jsonl") if "text" in row}
        for folder in (tmp_path / "run/eval/in_training/step_000002", tmp_path / "run/eval/suite" / name)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 12


def test_processes_share_the_questions_and_a_benchmark_without_a_score_is_counted(
    mirror: Path, students: list[Path], tmp_path: Path
) -> None:
    questions = tiny_questions(tmp_path / "images", 8)
    write_questions(tmp_path / "train.jsonl", questions)
    text = f"""
run_dir: {tmp_path}/run
data: {{train: [{tmp_path}/train.jsonl]}}
student: {{model: {students[0]}, dtype: float32}}
sft: {{enabled: false}}
rewards: {{answer: {{kind: rules}}}}
judge: {{base_urls: ["http://127.0.0.1:9/v1"], model: gone, max_retries: 0, timeout: 2}}
train:
  algorithm: dr_grpo
  num_generations: 2
  questions_per_step: 2
  max_steps: 1
  max_completion_length: 4
  precision: float32
  eval_every: 1
  eval_suite: [ai2d, mmvet]
eval: {{suite_data: {mirror}, suite_max_tokens: 3, limit: 5}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    done = launch(2, "-m", "openril.cli", "train", tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MM-Vet has no score after step 1" in done.stdout
    row = read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert row["eval/suite/failed"] == 1 and row["eval/suite/mmvet_unknown"] == 5
    assert "eval/suite/mmvet" not in row and 0 <= row["eval/suite/ai2d"] <= 100
    answered = read_jsonl(tmp_path / "run/eval/in_training/step_000001/answers.jsonl")[1:]
    assert [r["question_id"] for r in answered] == [f"{t}/{n}" for t in ("ai2d", "mmvet") for n in range(5)]


def test_missing_data_stop_the_run_before_its_first_step(students: list[Path], tmp_path: Path) -> None:
    settings = recipe(tmp_path / "run", students[0], tmp_path, ["ai2d"])
    with pytest.raises(DataError, match=r"train\.eval_suite: eval\.suite_data.*ai2d"):
        trainer_of(settings, tmp_path / "data", [])
