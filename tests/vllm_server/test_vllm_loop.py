"""`ril train` whose student is sampled by a real vLLM server: every step's weights arrive before the next samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from openril.cli import main
from openril.storage import read_jsonl
from support.tiny import tiny_questions, write_questions

pytestmark = pytest.mark.vllm


def test_the_loop_trains_on_samples_of_the_server(vlm_server, vlm_checkpoint: Path, tmp_path: Path):
    from openril.models.loading import load_student
    from openril.models.prompts import PromptEncoder
    from openril.recipe.schema import SamplerConfig, StudentConfig
    from openril.sampling.vllm_engine import VLLMSampler

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
    finally:  # other tests use the server: restore its weights
        model, processor = load_student(StudentConfig(), str(vlm_checkpoint))
        settings = SamplerConfig(engine="vllm", base_urls=[vlm_server.url])
        sampler = VLLMSampler(settings, PromptEncoder(processor, model))
        sampler.sync(vlm_checkpoint)
        sampler.close()
