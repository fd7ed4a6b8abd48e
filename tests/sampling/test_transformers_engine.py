"""The sampler against the trainer's pass, against transformers' generate, and against itself in other batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, pad_rows
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import SamplingConfig
from openril.sampling.transformers_engine import TransformersSampler
from support.tiny import tiny_questions

SETTINGS = SamplingConfig()


@pytest.fixture
def sampler(tiny_student: Path) -> TransformersSampler:
    model = load_model(str(tiny_student))
    return TransformersSampler(model, PromptEncoder(load_processor(str(tiny_student)), model))


def test_a_response_does_not_depend_on_its_batch(sampler: TransformersSampler, tmp_path: Path):
    questions = tiny_questions(tmp_path, 3)  # one image, two images, none
    together = sampler.sample(questions, 3, settings=SETTINGS, max_completion_length=12, seed=5)
    sampler.questions_per_batch = 1
    for question, responses in zip(questions, together, strict=True):
        [alone] = sampler.sample([question], 2, settings=SETTINGS, max_completion_length=12, seed=5, first_index=1)
        assert [r.token_ids for r in alone] == [r.token_ids for r in responses[1:]]
        assert [r.index for r in alone] == [1, 2]


def test_seeds_and_indices_give_other_responses(sampler: TransformersSampler, tmp_path: Path):
    [question] = tiny_questions(tmp_path, 1)

    def ids(seed: int) -> list[tuple[int, ...] | None]:
        [out] = sampler.sample([question], 3, settings=SETTINGS, max_completion_length=12, seed=seed)
        return [r.token_ids for r in out]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert len(set(ids(1))) == 3


def test_logprobs_are_the_trainers(sampler: TransformersSampler, tmp_path: Path):
    questions = tiny_questions(tmp_path, 3)
    drawn = sampler.sample(questions, 2, settings=SETTINGS, max_completion_length=12, seed=3)
    groups = [
        GroupTokens(sampler.encoder(q), [sampler.encoder.completion_ids(r, 12) for r in rs])
        for q, rs in zip(questions, drawn, strict=True)
    ]
    with torch.no_grad():
        logprobs = Policy(sampler.model)(pad_rows(groups, sampler.encoder.pad_token_id))
    for row, response in zip(logprobs, [r for rs in drawn for r in rs], strict=True):
        assert response.logprobs is not None
        assert row[: len(response.logprobs)].tolist() == pytest.approx(list(response.logprobs), abs=1e-4)


def test_special_tokens_are_never_drawn(sampler: TransformersSampler, tmp_path: Path):
    [question] = tiny_questions(tmp_path, 1)
    hot = SamplingConfig(
        temperature=50.0, top_p=1.0, top_k=0, repetition_penalty=1.0
    )  # near uniform over the vocabulary
    [out] = sampler.sample([question], 20, settings=hot, max_completion_length=40, seed=0)
    banned = sampler.encoder.special_token_ids - set(sampler.encoder.eos_token_ids)
    drawn = {i for r in out for i in r.token_ids or ()}
    assert len(drawn) > 100
    assert not drawn & banned
    assert all(
        r.finish_reason == ("stop" if r.token_ids[-1] in sampler.encoder.eos_token_ids else "length") for r in out
    )


def test_greedy_is_transformers_generate(sampler: TransformersSampler, tmp_path: Path):
    for question in tiny_questions(tmp_path, 3):
        greedy = SamplingConfig(temperature=0.0, repetition_penalty=1.0)
        [[ours]] = sampler.sample([question], 1, settings=greedy, max_completion_length=10, seed=0)
        prompt = sampler.encoder(question)
        inputs = {"input_ids": prompt.input_ids[None], **prompt.vision}
        if prompt.token_types is not None:
            inputs["mm_token_type_ids"] = prompt.token_types[None]
        banned = sorted(sampler.encoder.special_token_ids - set(sampler.encoder.eos_token_ids))
        theirs = sampler.model.generate(
            **inputs,
            max_new_tokens=10,
            do_sample=False,
            suppress_tokens=banned,
            attention_mask=torch.ones_like(inputs["input_ids"]),
        )
        assert list(ours.token_ids or ()) == theirs[0, prompt.length :].tolist()
