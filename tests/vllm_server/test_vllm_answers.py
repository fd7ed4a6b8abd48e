"""Answers that no vLLM server of the student gives."""

from __future__ import annotations

import pytest

from openril.errors import EndpointError
from openril.models.loading import load_student
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import SamplerConfig, SamplingConfig, StudentConfig
from openril.records import Question
from openril.sampling.vllm_engine import VLLMSampler
from support.misbehaving_server import MisbehavingServer, Say


@pytest.fixture(scope="module")
def encoder(tiny_qwen):
    model, processor = load_student(StudentConfig(), str(tiny_qwen))
    return PromptEncoder(processor, model)


def test_a_server_without_token_ids_is_refused(encoder):
    with MisbehavingServer(then=Say("red"), model="student") as server:
        sampler = VLLMSampler(SamplerConfig(engine="vllm", base_urls=[server.url]), encoder)
        try:
            with pytest.raises(EndpointError, match="return_token_ids"):
                sampler.sample([Question("q", "Which?")], 2, settings=SamplingConfig(), max_completion_length=4, seed=0)
        finally:
            sampler.close()
        body = server.requests[0].body
    # The server gets the recipe's settings, and explicit values in place of its own defaults.
    assert (body["n"], body["max_tokens"], body["temperature"], body["top_p"]) == (2, 4, 1.0, 0.95)
    assert (body["top_k"], body["repetition_penalty"], body["min_p"]) == (50, 1.05, 0.0)
    image = encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert body["logit_bias"][str(image)] == -100
    assert str(encoder.eos_token_ids[0]) not in body["logit_bias"]
    assert body["stop_token_ids"] == encoder.eos_token_ids


def test_a_recipe_without_a_server_is_refused(encoder):
    with pytest.raises(EndpointError, match=r"student\.sampler.*base_urls"):
        VLLMSampler(SamplerConfig(engine="vllm"), encoder)
