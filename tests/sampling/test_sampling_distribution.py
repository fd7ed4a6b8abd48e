"""Frequencies of many draws through the whole sampler against probabilities written out by hand, for two tokens in a row."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch

from openril.models.loading import load_model, load_processor
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import SamplingConfig
from openril.sampling.transformers_engine import TransformersSampler
from support.tiny import tiny_questions

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
COUNT = 20_000
SETTINGS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "repetition penalty": {"repetition_penalty": 1.8},
    "all": {"temperature": 0.8, "top_k": 8, "top_p": 0.85, "repetition_penalty": 1.4},
}


def exact(logits: list[float], allowed: list[int], seen: set[int], settings: SamplingConfig) -> dict[int, float]:
    """The definition: penalty, temperature, the k best, then the fewest that sum to top_p."""
    scores = {}
    for i in allowed:
        score = logits[i]
        if i in seen:
            score = score / settings.repetition_penalty if score > 0 else score * settings.repetition_penalty
        scores[i] = score / settings.temperature
    best = sorted(allowed, key=lambda i: -scores[i])
    if settings.top_k:
        best = best[: settings.top_k]
    total = sum(math.exp(scores[i]) for i in best)
    kept: dict[int, float] = {}
    for i in best:
        if sum(kept.values()) >= settings.top_p:
            break
        kept[i] = math.exp(scores[i]) / total
    return {i: p / sum(kept.values()) for i, p in kept.items()}


def chance(expected: dict[tuple[int, ...], float], drawn: Counter[tuple[int, ...]]) -> float:
    """p-value of Pearson's test; cells that expect fewer than 5 are taken together."""
    assert set(drawn) <= set(expected), "something was drawn that has no probability"
    cells = [(COUNT * p, drawn[key]) for key, p in expected.items()]
    rare = [c for c in cells if c[0] < 5]
    cells = [c for c in cells if c[0] >= 5]
    if rare and sum(e for e, _ in rare) >= 5:
        cells.append((sum(e for e, _ in rare), sum(o for _, o in rare)))
    statistic = sum((o - e) ** 2 / e for e, o in cells)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_tokens_in_a_row_follow_the_exact_distribution(name: str, tiny_qwen: Path, tmp_path: Path):
    settings = SamplingConfig.model_validate(NEUTRAL | SETTINGS[name])
    model = load_model(str(tiny_qwen))
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_(0, 0.25)  # scores of both signs, probabilities far from uniform
    encoder = PromptEncoder(load_processor(str(tiny_qwen)), model)
    [question] = tiny_questions(tmp_path, 1)
    prompt = encoder(question)
    # A vocabulary of twelve: the end, tokens of the prompt and others. The rest is forbidden like any special token.
    inside = [i for i in prompt.input_ids.unique().tolist() if i not in encoder.special_token_ids]
    outside = [i for i in range(len(encoder.tokenizer)) if i not in {*inside, *encoder.special_token_ids}]
    end = encoder.eos_token_ids[0]
    allowed = [end, *inside[:5], *outside[:6]]
    encoder.special_token_ids = encoder.special_token_ids | (set(range(len(encoder.tokenizer))) - set(allowed))

    seen = set(prompt.input_ids.tolist())
    with torch.no_grad():
        rows = torch.stack([torch.cat([prompt.input_ids, torch.tensor([i])]) for i in allowed])
        positions = torch.cat([prompt.position_ids, torch.tensor([prompt.next_position]).expand(3, 1)], dim=1)
        vision = {k: v.repeat(len(rows), *[1] * (v.dim() - 1)) for k, v in prompt.vision.items()}
        logits = model(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            position_ids=positions[:, None].expand(-1, len(rows), -1),
            logits_to_keep=2,
            **vision,
        ).logits.tolist()
    expected: dict[tuple[int, ...], float] = {}
    for first, p in exact(logits[0][0], allowed, seen, settings).items():
        if first == end:
            expected[first,] = p
            continue
        after = logits[allowed.index(first)][1]
        for second, q in exact(after, allowed, seen | {first}, settings).items():
            expected[first, second] = p * q
    assert sum(expected.values()) == pytest.approx(1)

    sampler = TransformersSampler(model, encoder)
    [out] = sampler.sample([question], COUNT, settings=settings, max_completion_length=2, seed=7)
    assert sampler.packing.on
    drawn = Counter(r.token_ids for r in out if r.token_ids is not None)
    assert chance(expected, drawn) > 1e-3
    # The test would notice: without this setting the same draws are impossible.
    if name != "none":
        other = {}
        neutral = SamplingConfig.model_validate(NEUTRAL)
        first_p = exact(logits[0][0], allowed, seen, neutral)
        for first, second in product(allowed, allowed):
            if first == end:
                other[first,] = first_p[first]
                continue
            after = exact(logits[allowed.index(first)][1], allowed, seen, neutral)
            other[first, second] = first_p[first] * after[second]
        assert chance(other, drawn) < 1e-9
