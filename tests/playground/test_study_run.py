"""The study's command on tiny random models: stopped in the middle, continued and reported."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from openril.storage import read_jsonl
from openril.testing.tiny_models import build_tiny_model
from playground.study.plan import TEACHERS
from playground.world import corpus
from support.waiting import wait_until

STEPS = 6
OVERRIDES = [
    f"train.max_steps={STEPS}", "train.questions_per_step=4", "train.num_generations=2", "train.max_completion_length=6",
    "train.eval_every=3", "train.log_rollouts_every=1", "train.save_every=2", "eval.limit=14",
    "eval.max_completion_length=6", "collect.num_responses=2", "collect.max_completion_length=6",
    "discriminator.pretraining.responses_per_question=2", "rewards.answer.kind=rules",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models; the judge is never asked, because rules score here."""
    folder = tmp_path_factory.mktemp("study_models")
    first = folder / "student_qwen" / "base"
    sizes = {"hidden_size": 32, "num_layers": 2, "max_pixels": 84 * 84, "vocab_size": 400}
    build_tiny_model(first, "qwen2_5_vl", texts=corpus(200), **sizes)
    for name in ("student_qwen/sft", *TEACHERS, "judge"):
        shutil.copytree(first, folder / name)
    return folder


def command(out, models, *more):
    return [
        sys.executable, "-m", "playground.study", "--out", str(out), "--models", str(models),
        "--students", "student_qwen", "--seeds", "1", "--groups", "contenders", "--only", "dr_grpo", "ril_both",
        "--num-train", "14", "--num-validation", "14", "--num-test", "28", "--resamples", "100", "--lanes", "2",
        *more, "--overrides", *OVERRIDES,
    ]  # fmt: skip


def run(out, models, *more):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(out, models, *more), capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_study_continues_where_it_was_stopped(tmp_path, models):
    out = tmp_path / "study"
    cell = out / "student_qwen/contenders/dr_grpo/seed_0"
    first = subprocess.Popen(command(out, models), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: read_jsonl(cell / "metrics.jsonl") or first.poll() is not None, 120)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    before = (cell / "metrics.jsonl").read_text()
    assert not (cell / "done.json").exists()
    assert list((cell / "checkpoints").glob("step_*"))

    output = run(out, models)
    assert "5 of 5 jobs done" in output
    assert (cell / "metrics.jsonl").read_text().startswith(before)  # No step is done twice.
    for name in ("dr_grpo", "ril_both"):
        folder = out / f"student_qwen/contenders/{name}/seed_0"
        assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
        scored = [row for row in read_jsonl(folder / "eval/final.jsonl") if "question_id" in row]
        assert [row["question_id"].split("-")[0] for row in scored] == ["test"] * 28
    assert len(json.loads((cell / "done.json").read_text())["ways"]) == STEPS
    results = json.loads((out / "results.json").read_text())
    assert set(results["students"]["student_qwen"]["contenders"]) == {"dr_grpo", "ril_both"}
    assert "| Dr.GRPO |" in (out / "study.md").read_text()
    assert run(out, models, "--list-jobs").count("done  ") == 5
