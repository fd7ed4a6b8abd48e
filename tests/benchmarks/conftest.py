"""The small copies of the benchmarks and two tiny students, shared by the tests marked ``benchmarks``."""

from __future__ import annotations

from pathlib import Path

import pytest

from openril.testing.tiny_models import build_tiny_model
from support.benchmark_data import write_benchmarks


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny Qwen2.5-VL and a tiny InternVL."""
    folder = tmp_path_factory.mktemp("students")
    return [
        build_tiny_model(folder / "qwen", "qwen2_5_vl"),
        build_tiny_model(folder / "internvl", "internvl", seed=1),
    ]
