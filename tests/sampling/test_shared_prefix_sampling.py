"""Decoding with shared prefixes against plain decoding, through the whole sampler: equal tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openril.models.loading import load_model, load_processor
from openril.models.prompts import Prompt, PromptEncoder
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.recipe.schema import SamplingConfig
from openril.records import Question, Response
from openril.sampling.transformers_engine import TransformersSampler
from openril.testing.tiny_models import build_tiny_model
from support.tiny import tiny_questions


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four query heads on two key-value heads."""
    folder = tmp_path_factory.mktemp("shared_prefix") / request.param
    return build_tiny_model(folder, request.param, hidden_size=32, num_heads=4)


@pytest.fixture
def sampler(checkpoint: Path) -> TransformersSampler:
    return open_sampler(load_model(str(checkpoint)), checkpoint)


def open_sampler(model: Any, checkpoint: Path, **options: Any) -> TransformersSampler:
    encoder = PromptEncoder(load_processor(str(checkpoint)), model)
    # Every tenth token ends a response, so that rows finish at different times.
    ordinary = [i for i in range(len(encoder.tokenizer)) if i not in encoder.special_token_ids]
    encoder.eos_token_ids = [*encoder.eos_token_ids, *ordinary[::10]]
    return TransformersSampler(model, encoder, **options)


def questions_of_different_lengths(folder: Path) -> list[Question]:
    """No, one and two images; prompts from a few tokens to several times as many."""
    questions = tiny_questions(folder, 4)
    return [*questions, replace(questions[2], id="long", question="Say the word red. " * 12)]


def sample(sampler: TransformersSampler, questions: Sequence[Question], count: int, **other: Any) -> list[Response]:
    options = {"settings": SamplingConfig(), "max_completion_length": 40, "seed": 4} | other
    return [r for rs in sampler.sample(questions, count, **options) for r in rs]


def assert_same(ours: Sequence[Response], plain: Sequence[Response]) -> None:
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprobs is not None and b.logprobs is not None
        assert list(a.logprobs) == pytest.approx(list(b.logprobs), abs=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_shared_prefixes_decode_as_plain_rows_do(sampler: TransformersSampler, tmp_path: Path, count: int):
    questions = questions_of_different_lengths(tmp_path)
    ours = sample(sampler, questions, count)
    assert sampler.packing.on
    lengths = {len(r.token_ids or ()) for r in ours}
    assert len(lengths) >= 4, "rows must finish at different times"
    sampler.packing.state = "off"
    assert_same(ours, sample(sampler, questions, count))


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 1.7, "top_k": 0, "top_p": 1.0}])
def test_shared_prefixes_decode_as_plain_rows_do_with_other_settings(
    sampler: TransformersSampler, tmp_path: Path, setting: dict[str, float]
):
    settings = SamplingConfig.model_validate({"repetition_penalty": 1.3, **setting})
    questions = questions_of_different_lengths(tmp_path)
    ours = sample(sampler, questions, 2, settings=settings)
    sampler.packing.state = "off"
    assert_same(ours, sample(sampler, questions, 2, settings=settings))


def test_the_batch_split_does_not_matter(sampler: TransformersSampler, tmp_path: Path):
    questions = questions_of_different_lengths(tmp_path)
    together = sample(sampler, questions, 3)
    for size in (1, 2, 3):
        sampler.questions_per_batch = size
        assert_same(together, sample(sampler, questions, 3))


def test_features_come_from_whoever_keeps_them(checkpoint: Path, tmp_path: Path):
    model = load_model(str(checkpoint))
    model.requires_grad_(False)
    store = FeatureCache(2**20)
    sampler = open_sampler(model, checkpoint, vision=VisionFeatures(model, store))
    questions = questions_of_different_lengths(tmp_path)
    first = sample(sampler, questions, 2)
    misses = store.misses
    assert misses > 0
    assert_same(first, sample(sampler, questions, 2))
    assert store.misses == misses
    assert_same(first, sample(open_sampler(load_model(str(checkpoint)), checkpoint), questions, 2))


def test_without_features_prompts_are_read_one_at_a_time(checkpoint: Path, tmp_path: Path):
    def nothing(prompts: Sequence[Prompt]) -> None:
        return None

    questions = questions_of_different_lengths(tmp_path)
    model = load_model(str(checkpoint))
    sampler = open_sampler(model, checkpoint, vision=nothing)
    rows = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    ours = sample(sampler, questions, 2)
    assert sampler.packing.on
    assert {sampler.encoder(q).length for q in questions} <= set(rows)
    assert_same(ours, sample(open_sampler(load_model(str(checkpoint)), checkpoint), questions, 2))


def test_the_model_is_left_as_it_was(sampler: TransformersSampler, tmp_path: Path):
    questions = tiny_questions(tmp_path, 2)
    model: Any = sampler.model
    model.train()
    model.get_decoder().layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    prompt = sampler.encoder(questions[0])
    inputs = {"input_ids": prompt.input_ids[None], **prompt.vision}
    if prompt.token_types is not None:
        inputs[prompt.token_type_key] = prompt.token_types[None]
    logits = model(**inputs).logits
    sample(sampler, questions, 2)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model(**inputs).logits, logits)
    logits.sum().backward()  # nothing of sampling's inference sticks to what training needs
    assert model.get_decoder().layers[0].self_attn.q_proj.weight.grad is not None


# Models that cannot share prefixes


@pytest.fixture
def warnings_told() -> list[str]:
    return []


def test_sliding_windows_fall_back_and_say_so(tiny_qwen: Path, tmp_path: Path, warnings_told: list[str]):
    model: Any = load_model(str(tiny_qwen))
    for layer in model.get_decoder().layers:
        layer.self_attn.sliding_window = 4096
    sampler = open_sampler(model, tiny_qwen, warn=warnings_told.append)
    questions = questions_of_different_lengths(tmp_path)
    drawn = sample(sampler, questions, 2)
    sample(sampler, questions, 2, seed=5)
    assert not sampler.packing.on
    assert len(warnings_told) == 1  # once, not at every call
    assert "Qwen2_5_VLForConditionalGeneration" in warnings_told[0] and "sliding_window" in warnings_told[0]
    assert_same(sample(open_sampler(load_model(str(tiny_qwen)), tiny_qwen), questions, 2), drawn)


def test_an_attention_of_another_kind_falls_back(tiny_qwen: Path, tmp_path: Path, warnings_told: list[str]):
    model: Any = load_model(str(tiny_qwen))
    model.get_decoder().config.attention_dropout = 0.1
    sampler = open_sampler(model, tiny_qwen, warn=warnings_told.append)
    sample(sampler, tiny_qwen_questions(tmp_path), 1)
    assert not sampler.packing.on and "dropout" in warnings_told[0]


def test_a_model_that_looks_along_the_row_falls_back(tiny_qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Something other than attention mixes tokens: only the comparison finds it. Said in the log by default."""

    class Mixing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x + 0.5 * x.roll(1, dims=1))

    model: Any = load_model(str(tiny_qwen))
    layer = model.get_decoder().layers[1]
    layer.mlp = Mixing(layer.mlp)
    sampler = open_sampler(model, tiny_qwen)
    sample(sampler, tiny_qwen_questions(tmp_path), 2)
    assert not sampler.packing.on
    assert "nats a token" in caplog.text


def tiny_qwen_questions(folder: Path) -> list[Question]:
    return tiny_questions(folder, 3)
