"""How fast `ril collect` and `ril eval` use a server, next to raw requests of the same lengths.

    make test-vllm ARGS="-k throughput"

prints tokens per second of both and their ratio: medians of rounds that alternate, and the best round of each. Work of
others can make a round several times slower, so the bound is loose. docs/vllm.md has the measured ratios.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from openril.evaluation.evaluate import GREEDY, evaluate
from openril.recipe.schema import Recipe, SamplingConfig
from openril.records import STUDENT, Question
from openril.responses.cache import ResponseCache
from openril.responses.collection import collect
from openril.sampling.checkpoint_sampler import open_sampler
from openril.sampling.vllm_engine import VLLMSampler
from support.tiny import tiny_questions

pytestmark = pytest.mark.vllm

CONCURRENCY, ROUNDS = 32, 3
COLLECTED, SAMPLES, EVALUATED, TOKENS = 32, 4, 64, 64


def raw_tokens_per_second(
    sampler: VLLMSampler, url: str, questions: list[Question], samples: int, settings: SamplingConfig
) -> float:
    """Send the same chats with the same settings, ``CONCURRENCY`` at a time, and only count the tokens."""
    fields = sampler._request(settings, TOKENS, False)
    fields |= fields.pop("extra_body")
    bodies = iter(
        [
            {"model": "student", "messages": sampler._messages(q), "n": samples, "seed": i, **fields}
            for i, q in enumerate(questions)
        ]
    )

    async def worker(client: httpx.AsyncClient) -> int:
        tokens = 0
        for body in bodies:
            answer = await client.post(f"{url}/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            tokens += answer.json()["usage"]["completion_tokens"]
        return tokens

    async def all_workers() -> int:
        limits = httpx.Limits(keepalive_expiry=2)  # the server closes idle connections after five seconds
        async with httpx.AsyncClient(timeout=600, trust_env=False, limits=limits) as client:
            return sum(await asyncio.gather(*(worker(client) for _ in range(CONCURRENCY))))

    started = time.perf_counter()
    return asyncio.run(all_workers()) / (time.perf_counter() - started)


def test_throughput_of_collection_and_evaluation(vlm_server, vlm_checkpoint: Path, tmp_path: Path):
    questions = tiny_questions(tmp_path / "images", EVALUATED)
    servers = {"engine": "vllm", "base_urls": [vlm_server.url], "concurrency": CONCURRENCY}
    recipe = Recipe.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "student": {"model": str(vlm_checkpoint), "dtype": "float32", "sampler": servers},
            "sft": {"enabled": False},
            "collect": {"num_responses": SAMPLES, "max_completion_length": TOKENS},
            "eval": {"max_completion_length": TOKENS},
        }
    )

    def collected(sampler: VLLMSampler, round: int) -> float:
        cache = ResponseCache.create(tmp_path / f"cache{round}")
        started = time.perf_counter()
        collect(recipe, questions[:COLLECTED], STUDENT, cache, make_sampler=lambda *_: sampler)
        seconds = time.perf_counter() - started
        loaded = cache.load(questions[:COLLECTED], [STUDENT], SAMPLES, with_token_ids=True)
        return sum(len(r.token_ids) for q in questions[:COLLECTED] for r in loaded[q.id]) / seconds

    def evaluated(sampler: VLLMSampler, round: int) -> float:
        started = time.perf_counter()
        rows = evaluate(lambda: sampler, questions, recipe.eval).rows
        return sum(row.tokens for row in rows) / (time.perf_counter() - started)

    works: dict[str, Any] = {
        "ril collect": (collected, questions[:COLLECTED], SAMPLES, recipe.collect.sampling),
        "ril eval": (evaluated, questions, 1, GREEDY),
    }
    with open_sampler(recipe, str(vlm_checkpoint), questions, 8) as sampler:
        assert isinstance(sampler, VLLMSampler)
        for name, (ours, asked, samples, settings) in works.items():
            rates: dict[str, list[float]] = {"ours": [], "raw": []}
            for round in range(ROUNDS + 1):
                # The first round only fills the server's caches.
                for kind in ("ours", "raw") if round % 2 else ("raw", "ours"):
                    if kind == "ours":
                        rate = ours(sampler, round)
                    else:
                        rate = raw_tokens_per_second(sampler, vlm_server.url, asked, samples, settings)
                    if round:
                        rates[kind].append(rate)
            mine, raw = statistics.median(rates["ours"]), statistics.median(rates["raw"])
            ratio, best = mine / raw, max(rates["ours"]) / max(rates["raw"])
            print(
                f"\n{name}: {mine:.0f} tokens/s, raw requests {raw:.0f} tokens/s, ratio of medians {ratio:.2f}, of the best"
                f" rounds {best:.2f}"
            )
            assert max(ratio, best) > 0.7
