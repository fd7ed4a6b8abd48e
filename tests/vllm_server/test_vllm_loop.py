"""Commands whose student is sampled by a real vLLM server: the weights arrive before the samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from openril.cli import main
from openril.evaluation.evaluate import GREEDY
from openril.models.loading import load_student
from openril.models.prompts import PromptEncoder
from openril.recipe.loading import load_recipe
from openril.recipe.schema import SamplerConfig, StudentConfig
from openril.records import STUDENT
from openril.responses.cache import ResponseCache
from openril.sampling.synced import WeightsFolder
from openril.sampling.transformers_engine import TransformersSampler
from openril.sampling.vllm_engine import VLLMSampler
from openril.storage import read_jsonl
from openril.testing.tiny_models import build_tiny_model
from support import cpu_transfer
from support.tiny import tiny_questions, write_questions

pytestmark = pytest.mark.vllm


def test_the_loop_trains_on_samples_of_the_server(vlm_server, vlm_checkpoint: Path, tmp_path: Path):
    write_questions(tmp_path / "q.jsonl", tiny_questions(tmp_path / "data", 8))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""
run_dir: {tmp_path}/run
data: {{train: [{tmp_path}/q.jsonl]}}
student:
  model: {vlm_checkpoint}
  dtype: float32
  sampler: {{engine: vllm, base_urls: ["{vlm_server.url}"], max_logprob_difference: 0.001}}
sft: {{enabled: false}}
rewards: {{answer: {{kind: rules}}}}
train:
  algorithm: dr_grpo
  questions_per_step: 4
  max_steps: 3
  max_completion_length: 12
  precision: float32
  beta: 0.5
  num_iterations: 2
  optimizer: {{learning_rate: 1.0e-3}}
"""
    )
    try:
        assert main(["train", str(recipe)]) == 0
        rows = read_jsonl(tmp_path / "run/metrics.jsonl")
        assert len(rows) == 3
        for row in rows:  # a step of this size moves the log-probabilities by tenths of a nat
            assert row["train/sampling/sampling_logp_difference/max"] < 1e-3
        assert rows[-1]["train/kl"] > 1e-4
        assert (tmp_path / "run/student/model.safetensors").exists()
    finally:
        restore(vlm_server, vlm_checkpoint)


@pytest.mark.parametrize("sync", ["file", "adapter", "nccl"])
def test_two_sharded_processes_train_on_samples_of_the_server(sync, sync_server, vlm_checkpoint: Path, tmp_path: Path):
    """Weights or adapter come from the shards. Every process samples, and checks what it gets. NCCL has a stand-in."""
    write_questions(tmp_path / "q.jsonl", tiny_questions(tmp_path / "data", 8))
    (tmp_path / "length.py").write_text(
        "def short(prompts, completions, **columns): return [-len(c) for c in completions]"
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""
run_dir: {tmp_path}/run
data: {{train: [{tmp_path}/q.jsonl]}}
student:
  model: {vlm_checkpoint}
  dtype: float32
  lora: {{enabled: {sync == "adapter"}, r: 4}}
  sampler: {{engine: vllm, sync: {sync}, base_urls: ["{sync_server.url}"], max_logprob_difference: 0.001}}
sft: {{enabled: false}}
rewards: {{answer: {{kind: rules}}, functions: [{{function: "{tmp_path}/length.py:short", weight: 0.1}}]}}
train:
  algorithm: dr_grpo
  shard: true
  questions_per_step: 4
  max_steps: 2
  max_completion_length: 12
  precision: float32
  optimizer: {{learning_rate: 1.0e-2}}
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command_line = [cpu_transfer.__file__] if sync == "nccl" else ["-m", "openril.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, *command_line, "train", str(recipe)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 2
    for row in rows:  # a step of this size moves the log-probabilities by more
        assert row["train/sampling/sampling_logp_difference/max"] < 1e-3
    student = load_file(tmp_path / "run/student/model.safetensors")
    start = load_file(vlm_checkpoint / "model.safetensors")
    name = next(name for name in start if name.endswith("layers.1.self_attn.q_proj.weight"))
    assert (student[name] - start[name]).abs().max() > 1e-3


def restore(server, checkpoint: Path) -> None:
    """Give the server its own weights again, which other tests expect."""
    model, processor = load_student(StudentConfig(), str(checkpoint))
    sampler = VLLMSampler(SamplerConfig(engine="vllm", base_urls=[server.url]), PromptEncoder(processor, model))
    sampler.sync(checkpoint)
    sampler.close()


def test_collection_and_evaluation_sample_the_checkpoint_they_name(vlm_server, vlm_checkpoint: Path, tmp_path: Path):
    """Neither is the checkpoint with which the server was started."""
    questions = tiny_questions(tmp_path / "data", 8)
    write_questions(tmp_path / "q.jsonl", questions)
    for seed, name in enumerate(("a", "b"), 7):
        build_tiny_model(tmp_path / name, "qwen2_5_vl", num_heads=2, seed=seed)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""
run_dir: {tmp_path}/run
data: {{train: [{tmp_path}/q.jsonl], validation: [{tmp_path}/q.jsonl]}}
student:
  model: {tmp_path}/a
  dtype: float32
  sampler: {{engine: vllm, base_urls: ["{vlm_server.url}"], weights_dir: {tmp_path}/shared, max_logprob_difference: 0.001}}
sft: {{enabled: false}}
collect: {{num_responses: 3, max_completion_length: 12}}
eval: {{max_completion_length: 12}}
"""
    )
    try:
        assert main(["collect", str(recipe)]) == 0
        assert main(["eval", str(recipe), "--checkpoints", f"{tmp_path}/a", f"{tmp_path}/b"]) == 0
        loaded = load_recipe(recipe)
        cached = ResponseCache.open(loaded.cache_path).load(questions, [STUDENT], 3, with_token_ids=True)
        for name in ("a", "b"):
            pattern = "base.jsonl" if name == "a" else f"*-{name}-*.jsonl"  # "a" is the recipe's student
            [file] = (tmp_path / "run/eval").glob(pattern)
            rows = {row["question_id"]: row["text"] for row in read_jsonl(file)[1:]}
            sampler = TransformersSampler.from_checkpoint(str(tmp_path / name), loaded.student)
            greedy = sampler.sample(questions, 1, settings=GREEDY, max_completion_length=12, seed=0)
            assert [rows[q.id] for q in questions] == [answer.text for [answer] in greedy]
        assert {r.source for q in questions for r in cached[q.id]} == {STUDENT}
        assert len({r.token_ids for r in cached[questions[0].id]}) == 3
        holder = WeightsFolder(loaded.student.sampler, loaded.run_path)
        holder.hold()
        assert main(["eval", str(recipe), "--checkpoints", str(vlm_checkpoint)]) != 0
        holder.close()
    finally:
        restore(vlm_server, vlm_checkpoint)
