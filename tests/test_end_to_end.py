"""`ril run` from questions to a better student: real commands, both architectures, a judge over HTTP, random kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openril.data.reading import read_file
from openril.records import Question
from openril.responses.cache import ResponseCache
from openril.storage import read_jsonl
from openril.testing.tiny_models import build_tiny_model
from support.misbehaving_server import MisbehavingServer, Request, Say
from support.tiny import tiny_questions, write_questions

RECIPE = """
run_dir: {run}
data: {{train: [{data}/train.jsonl], validation: [{data}/validation.jsonl]}}
student: {{model: {models}/student, dtype: float32, freeze: [vision_tower]}}
teachers:
  - {{name: a, model_path: {models}/teacher_a}}
  - {{name: b, model_path: {models}/teacher_b}}
collect: {{num_responses: 2, max_completion_length: 4}}
judge: {{base_urls: ["{judge}"], model: fake, max_retries: 0}}
sft: {{batch_size: 4, micro_batch_size: 2, max_steps: 4, save_every: 2, optimizer: {{learning_rate: 1.0e-3}}}}
discriminator:
  pretraining: {{questions_per_step: 3, epochs: 2, save_every: 1}}
  optimizer: {{learning_rate: 1.0e-4}}
train:
  num_generations: 2
  questions_per_step: 4
  max_steps: 4
  max_completion_length: 16  # what a teacher writes in 4 tokens has more in the student's vocabulary
  precision: float32
  save_every: 1
  eval_every: 2
  optimizer: {{learning_rate: 1.0e-4}}
eval: {{max_completion_length: 8}}
"""


def verdict(request: Request) -> Say:
    """A judge whose verdict is a hash of the request, so that half of all responses are right."""
    even = hashlib.sha256(request.text.encode()).digest()[0] % 2
    return Say(f"I compared both. <answer>{even}</answer>")


def nlvr_questions(count: int) -> list[Question]:
    """Return questions with real images and human sentences, every third one without its image.

    The data is optional: the folder ``shared/data/nlvr`` next to the checkout. The test is skipped where it is missing.
    """
    folder = Path(__file__).parents[2] / "shared/data/nlvr"
    if not (folder / "train.jsonl").exists():
        pytest.skip(f"the optional data set {folder} is missing")
    questions = read_file(str(folder / "train.jsonl"))[:count]
    return [replace(q, images=()) if i % 3 == 2 else q for i, q in enumerate(questions)]


def world_questions(folder: Path, world: str) -> list[Question]:
    return nlvr_questions(12) if world == "nlvr" else tiny_questions(folder / "data", 12)


def make_world(folder: Path, architecture: str, world: str = "drawn") -> None:
    questions = world_questions(folder, world)
    (folder / "data").mkdir(exist_ok=True)
    write_questions(folder / "data/train.jsonl", questions[:8])
    write_questions(folder / "data/validation.jsonl", questions[8:])
    other = "internvl" if architecture == "qwen2_5_vl" else "qwen2_5_vl"
    texts = [f"{q.question} {q.answer}" for q in questions]
    build_tiny_model(folder / "models/student", architecture, texts=texts, hidden_size=32)
    build_tiny_model(folder / "models/teacher_a", architecture, texts=texts, hidden_size=64, seed=1)
    build_tiny_model(folder / "models/teacher_b", other, texts=texts, tokenizer="unigram", hidden_size=64, seed=2)


def recipe(folder: Path, name: str, judge: str) -> Path:
    path = folder / f"{name}.yaml"
    values = {"run": folder / name, "data": folder / "data", "models": folder / "models", "judge": judge}
    path.write_text(RECIPE.format(**values))
    return path


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "openril.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str | Path) -> str:
    process = start(*arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics without the values that depend on the clock and the caches."""
    varying = re.compile(r"^(time|memory)/|seconds$|judge_(asked|cached)$")
    return [{k: v for k, v in row.items() if not varying.search(k)} for row in rows]


def everything(run_dir: Path, questions: list[Question]) -> dict[str, Any]:
    """Return all results of a run that must not depend on when it was interrupted."""
    out: dict[str, Any] = {}
    for pattern in ("student/*.safetensors", "sft/student/*.safetensors", "discriminator/discriminator/*.safetensors"):
        for path in run_dir.glob(pattern):
            out |= {f"{path.relative_to(run_dir)}:{k}": v for k, v in load_file(path).items()}
    last = max((run_dir / "checkpoints").iterdir())
    for path in last.rglob("*.safetensors"):
        out |= {f"{path.relative_to(run_dir)}:{k}": v for k, v in load_file(path).items()}
    for name in ("metrics.jsonl", "discriminator/metrics.jsonl"):
        out[name] = without_times(read_jsonl(run_dir / name))
    for path in sorted(run_dir.glob("rollouts/*.jsonl")):
        out[path.name] = path.read_text()
    out["pictures"] = sorted(path.name for path in (run_dir / "pictures").iterdir())
    cache = ResponseCache.open(run_dir / "responses")
    loaded = cache.load(questions, ["a", "b", "student"], 2, with_token_ids=True)
    out["responses"] = {q.id: [(r.source, r.index, r.text, r.token_ids) for r in loaded[q.id]] for q in questions}
    rows = [row for path in run_dir.rglob("verdicts/*.jsonl") for row in read_jsonl(path)]
    out["verdicts"] = {row["key"]: row["score"] for row in rows}
    for path in sorted((run_dir / "eval").glob("*.jsonl")):
        out[f"eval/{path.name}"] = sorted(json.dumps(row, sort_keys=True) for row in read_jsonl(path))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "world"), [("qwen2_5_vl", "drawn"), ("internvl", "drawn"), ("qwen2_5_vl", "nlvr")]
)
def test_five_kills_change_nothing(architecture: str, world: str, tmp_path: Path):
    make_world(tmp_path, architecture, world)
    questions = world_questions(tmp_path, world)[:8]
    with MisbehavingServer(then=verdict) as judge:
        began = time.monotonic()
        output = run("run", recipe(tmp_path, "whole", judge.url))
        seconds = time.monotonic() - began
        whole = everything(tmp_path / "whole", questions)
        assert "evaluation" in output
        asked = judge.count
        assert asked == len(
            {row["key"] for row in read_jsonl(tmp_path / "whole/verdicts/rank0.jsonl")}
        )  # all are different

        killed = recipe(tmp_path, "killed", judge.url)
        draw = random.Random(architecture)
        kills = 0
        while kills < 5:
            process = start("run", killed)
            try:
                process.communicate(timeout=draw.uniform(0.15, 0.6) * seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0
            break
        assert kills >= 2, "the run ended before it could be killed"
        run("run", killed)
    again = everything(tmp_path / "killed", questions)
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        same = torch.equal(value, again[key]) if isinstance(value, torch.Tensor) else value == again[key]
        assert same, key

    rows = read_jsonl(tmp_path / "whole/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in (
        "reward/student_answer",
        "reward/teacher_answer",
        "discriminator/accuracy",
        "train/kl",
        "time/sampling",
    ):
        assert all(name in row for row in rows), name
    assert 0 < sum(row["reward/student_answer"] for row in rows) < 4  # verdicts reached the reward
    assert [("eval/score" in row) for row in rows] == [False, True, False, True]
    before = load_file(tmp_path / "whole/sft/student/model.safetensors")
    after = load_file(tmp_path / "whole/student/model.safetensors")
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    assert '"openril.report/1"' in (tmp_path / "whole/report.html").read_text()  # written at the end of training
    assert json.loads((tmp_path / "killed/environment.json").read_text())["processes"] == 1
    warnings = [(row["step"], row["text"]) for row in read_jsonl(tmp_path / "killed/warnings.jsonl")]
    assert len(set(warnings)) == len(warnings)  # each start warns of the same things
    # A finished run returns at once.
    assert "already" in run("run", killed)


def test_a_dead_judge_stops_the_run_and_the_same_command_continues(tmp_path: Path):
    make_world(tmp_path, "qwen2_5_vl")
    with MisbehavingServer(then=verdict) as judge:
        url = judge.url
        path = recipe(tmp_path, "run", url)
        faster = ["--train.max-steps", "2", "--train.eval-every", "0", "--sft.max-steps", "1"]
        for stage in ("sft", "collect", "discriminator"):
            run(stage, path, *faster)
    process = start("train", path, *faster)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "verdicts" in output and "same command" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run/student").exists()
    with MisbehavingServer(then=verdict) as judge:
        run("train", path, *faster, "--judge.base-urls", judge.url)
    assert (tmp_path / "run/student/model.safetensors").exists()


def test_an_interrupt_saves_and_says_so(tmp_path: Path):
    make_world(tmp_path, "internvl")
    with MisbehavingServer(then=verdict) as judge:
        path = recipe(tmp_path, "run", judge.url)
        settings = ["--train.max-steps", "500", "--train.save-every", "0", "--sft.enabled", "false"]
        settings += ["--rewards.answer.kind", "rules", "--discriminator.pretraining.enabled", "false"]
        run("collect", path, *settings)
        process = start("train", path, *settings)
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[0][-2000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 130
        assert "the same command continues" in output
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] >= 1
