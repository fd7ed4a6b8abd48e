"""FSDP2 around the packed pass: weights spread over two processes, the same log-probabilities and gradients."""

from __future__ import annotations

from pathlib import Path

from support.launch import launch


def test_two_processes_that_share_the_weights_agree_with_one_that_has_them(tiny_student: Path, tmp_path: Path):
    done = launch(2, Path(__file__).with_name("fully_sharded.py"), tiny_student, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
