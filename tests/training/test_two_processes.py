"""One process and two (gloo) give the same run, packed or not, with text-only and image questions on different ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openril.records import Response
from openril.responses.cache import ResponseCache
from openril.storage import read_jsonl
from support.tiny import tiny_questions

SCRIPT = Path(__file__).with_name("two_processes.py")


def run(processes: int, checkpoint: Path, run_dir: Path, data: Path, kind: str, passes: str) -> None:
    command = [sys.executable, str(SCRIPT)]
    if processes > 1:
        port = 20000 + os.getpid() % 20000
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}",
            "--master_addr=127.0.0.1", str(SCRIPT),
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(checkpoint), str(run_dir), str(data), kind, passes],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)


@pytest.mark.parametrize("kind", ["mixed", "all"])
def test_two_packed_processes_equal_a_plain_one(kind: str, tiny_student: Path, tmp_path: Path):
    compare(tiny_student, tmp_path, kind)


def test_two_processes_replay_what_one_does(tiny_qwen: Path, tmp_path: Path):
    """Three earlier groups: each process has its own share of them, and they weigh the same wherever they are."""
    compare(tiny_qwen, tmp_path, "replay")
    rows = [read_jsonl(tmp_path / f"run{n}" / "metrics.jsonl")[1] for n in (1, 2)]
    assert [r["discriminator/replayed_groups"] for r in rows] == [3, 3]
    memories = [(tmp_path / f"run{n}" / "checkpoints/step_000002/replay.jsonl").read_text() for n in (1, 2)]
    assert memories[0] == memories[1]


def test_two_processes_ask_again_what_one_does(tiny_qwen: Path, tmp_path: Path):
    compare(tiny_qwen, tmp_path, "retry", discriminator=False)
    rows = [read_jsonl(tmp_path / f"run{n}" / "metrics.jsonl")[1] for n in (1, 2)]
    for row in rows:
        assert row["retry/groups"] == 2
    assert [{k: v for k, v in r.items() if k.startswith("retry/")} for r in rows[:1]] == [
        {k: v for k, v in r.items() if k.startswith("retry/")} for r in rows[1:]
    ]
    memories = [(tmp_path / f"run{n}" / "checkpoints/step_000002/retry.jsonl").read_text() for n in (1, 2)]
    assert memories[0] == memories[1] != ""


def test_two_processes_share_the_switches(tiny_qwen: Path, tmp_path: Path):
    """One process writes which cached responses are right; both draw from them, packed, as the plain one does."""
    questions = tiny_questions(tmp_path / "data", 12)
    cache = ResponseCache.create(tmp_path / "data" / "cache")
    for source in ("a", "b"):
        cache.register(source, model=source, revision=None, sampling={})
        with cache.writer(source) as writer:
            for q in questions:
                for i in range(6):
                    writer.append(q, Response(q.id, source, i, q.answer if i < 2 else "black"))
    compare(tiny_qwen, tmp_path, "switches")
    rows = [read_jsonl(tmp_path / f"run{n}" / "metrics.jsonl") for n in (1, 2)]
    assert [r["reward/teacher_answer"] for run in rows for r in run] == [1.0] * 4
    entropies = [[r["train/entropy"] for r in run] for run in rows]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-6)
    files = [(tmp_path / f"run{n}" / "right_responses.jsonl").read_text() for n in (1, 2)]
    assert files[0] == files[1] and '"right": {"a": [0, 1], "b": [0, 1]}' in files[0]


def test_two_processes_fall_back_together(tiny_gemma3_full_attention: Path, tmp_path: Path):
    """One sees text alone, with which packing would be exact, and the other images, with which it would not."""
    compare(tiny_gemma3_full_attention, tmp_path, "mixed")


def compare(checkpoint: Path, tmp_path: Path, kind: str, discriminator: bool = True) -> None:
    for processes, passes in ((1, "plain"), (2, "packed")):
        run(processes, checkpoint, tmp_path / f"run{processes}", tmp_path / "data", kind, passes)
    one, two = (load_file(tmp_path / f"run{n}" / "final.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    start = load_file(checkpoint / "model.safetensors")
    assert any(k.startswith("discriminator.") for k in one) == discriminator
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=0, atol=1e-6), f"{key}: {(value - two[key]).abs().max()}"
    ends = ("lm_head.weight", "embed_tokens.weight")  # the second where they are tied
    name = next(k for end in ends for k in start if k.endswith(end))
    assert (one["student.model.lm_head.weight"] - start[name]).abs().max() > 1e-4  # it did learn something
    for a, b in zip(*(read_jsonl(tmp_path / f"run{n}" / "metrics.jsonl") for n in (1, 2)), strict=True):
        compared = 0
        for name, value in a.items():
            if name.startswith(("train/", "reward/", "discriminator/")) and not name.endswith("grad_norm"):
                assert b[name] == pytest.approx(value, abs=1e-6), name
                compared += 1
        assert compared > (25 if discriminator else 15)
    # Whole groups, in the same order, whatever the number of processes.
    rows = [read_jsonl(tmp_path / f"run{n}" / "rollouts" / "step_000002.jsonl") for n in (1, 2)]
    assert [(r["question_id"], r["source"], r["text"]) for r in rows[0]] == [
        (r["question_id"], r["source"], r["text"]) for r in rows[1]
    ]
