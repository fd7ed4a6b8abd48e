"""One process and two (gloo) give the same run, packed or not, with text-only and image questions on different ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openril.records import Response
from openril.responses.cache import ResponseCache
from openril.storage import read_jsonl
from support.launch import launch
from support.tiny import tiny_questions

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def runs(
    tiny_qwen: Path, tiny_internvl: Path, tiny_gemma3_full_attention: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder for each case with its runs, of one process (``run1``) and two (``run2``)."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {
        **{f"qwen_{kind}:{kind}": tiny_qwen for kind in ("mixed", "all", "replay", "retry", "switches", "skipped")},
        **{f"internvl_{kind}:{kind}": tiny_internvl for kind in ("mixed", "all")},
        "gemma3_mixed:mixed": tiny_gemma3_full_attention,
    }
    cache_right_and_wrong(folder / "qwen_switches" / "data")
    for processes, passes in ((1, "plain"), (2, "packed")):
        done = launch(processes, SCRIPT, folder, passes, *(f"{case}={model}" for case, model in cases.items()))
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def cache_right_and_wrong(data: Path) -> None:
    """Write a cache with six responses of each of two teachers to every question, of which the first two are right."""
    questions = tiny_questions(data, 12)
    cache = ResponseCache.create(data / "cache")
    for source in ("a", "b"):
        cache.register(source, model=source, revision=None, sampling={})
        with cache.writer(source) as writer:
            for q in questions:
                for i in range(6):
                    writer.append(q, Response(q.id, source, i, q.answer if i < 2 else "black"))


@pytest.mark.parametrize("kind", ["mixed", "all"])
@pytest.mark.parametrize("family", ["qwen", "internvl"])
def test_two_packed_processes_equal_a_plain_one(
    family: str, kind: str, tiny_qwen: Path, tiny_internvl: Path, runs: Path
):
    compare(tiny_qwen if family == "qwen" else tiny_internvl, runs / f"{family}_{kind}")


def test_two_processes_replay_what_one_does(tiny_qwen: Path, runs: Path):
    """Three earlier groups: each process has its own share of them, and they weigh the same wherever they are."""
    folder = runs / "qwen_replay"
    compare(tiny_qwen, folder)
    rows = [read_jsonl(folder / f"run{n}" / "metrics.jsonl")[1] for n in (1, 2)]
    assert [r["discriminator/replayed_groups"] for r in rows] == [3, 3]
    memories = [(folder / f"run{n}" / "checkpoints/step_000002/replay.jsonl").read_text() for n in (1, 2)]
    assert memories[0] == memories[1]


def test_two_processes_ask_again_what_one_does(tiny_qwen: Path, runs: Path):
    folder = runs / "qwen_retry"
    compare(tiny_qwen, folder, discriminator=False)
    rows = [read_jsonl(folder / f"run{n}" / "metrics.jsonl")[1] for n in (1, 2)]
    for row in rows:
        assert row["retry/groups"] == 2
    assert [{k: v for k, v in r.items() if k.startswith("retry/")} for r in rows[:1]] == [
        {k: v for k, v in r.items() if k.startswith("retry/")} for r in rows[1:]
    ]
    memories = [(folder / f"run{n}" / "checkpoints/step_000002/retry.jsonl").read_text() for n in (1, 2)]
    assert memories[0] == memories[1] != ""


def test_two_processes_share_the_switches(tiny_qwen: Path, runs: Path):
    """One process writes which cached responses are right; both draw from them, packed, as the plain one does."""
    folder = runs / "qwen_switches"
    compare(tiny_qwen, folder)
    rows = [read_jsonl(folder / f"run{n}" / "metrics.jsonl") for n in (1, 2)]
    assert [r["reward/teacher_answer"] for run in rows for r in run] == [1.0] * 4
    entropies = [[r["train/entropy"] for r in run] for run in rows]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-6)
    files = [(folder / f"run{n}" / "right_responses.jsonl").read_text() for n in (1, 2)]
    assert files[0] == files[1] and '"right": {"a": [0, 1], "b": [0, 1]}' in files[0]


def test_two_processes_skip_what_one_does(tiny_qwen: Path, runs: Path):
    """All groups of one process teach nothing in the first step; it still runs as many passes as the other."""
    folder = runs / "qwen_skipped"
    compare(tiny_qwen, folder, discriminator=False)
    for row in [read_jsonl(folder / f"run{n}" / "metrics.jsonl")[0] for n in (1, 2)]:
        assert row["train/frac_reward_zero_std"] == 0.5
        assert row["train/teacher_groups"] == 0.5
    # Two of four groups are learned from, each with two samples.
    learned = [r for r in read_jsonl(folder / "run1" / "rollouts" / "step_000001.jsonl") if r["advantage"]]
    assert {r["source"] for r in learned} == {"student"}


def test_two_processes_fall_back_together(tiny_gemma3_full_attention: Path, runs: Path):
    """One sees text alone, with which packing would be exact, and the other images, with which it would not."""
    compare(tiny_gemma3_full_attention, runs / "gemma3_mixed")


def compare(checkpoint: Path, folder: Path, discriminator: bool = True) -> None:
    one, two = (load_file(folder / f"run{n}" / "final.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    start = load_file(checkpoint / "model.safetensors")
    assert any(k.startswith("discriminator.") for k in one) == discriminator
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=0, atol=1e-6), f"{key}: {(value - two[key]).abs().max()}"
    ends = ("lm_head.weight", "embed_tokens.weight")  # the second where they are tied
    name = next(k for end in ends for k in start if k.endswith(end))
    assert (one["student.model.lm_head.weight"] - start[name]).abs().max() > 1e-4  # it did learn something
    for a, b in zip(*(read_jsonl(folder / f"run{n}" / "metrics.jsonl") for n in (1, 2)), strict=True):
        compared = 0
        for name, value in a.items():
            if name.startswith(("train/", "reward/", "discriminator/")) and not name.endswith("grad_norm"):
                assert b[name] == pytest.approx(value, abs=1e-6), name
                compared += 1
        assert compared > (25 if discriminator else 15)
    # Whole groups, in the same order, whatever the number of processes.
    rows = [read_jsonl(folder / f"run{n}" / "rollouts" / "step_000002.jsonl") for n in (1, 2)]
    assert [(r["question_id"], r["source"], r["text"]) for r in rows[0]] == [
        (r["question_id"], r["source"], r["text"]) for r in rows[1]
    ]
