"""The peak of a known allocation."""

from __future__ import annotations

import pytest

from openril.benchmarking.measuring import PeakMemory

MIB = 2**20


def test_a_known_allocation_is_seen_after_it_is_gone():
    memory = PeakMemory("cpu")
    if memory.source is None:
        pytest.skip("this system does not report its memory")
    for size in (256, 64):  # the second peak is lower, because the mark was reset in between
        memory.start()
        block = bytearray(size * MIB)
        block[::4096] = b"x" * len(block[::4096])
        del block
        peak = memory.peak()
        # The kernel counts resident pages in batches for each processor, so the figures are not exact.
        assert peak is not None and (size - 8) * MIB <= peak < (size + 16) * MIB
    assert memory.held is not None and memory.held > MIB


def test_unknown_is_none_and_not_zero(monkeypatch: pytest.MonkeyPatch):
    from pathlib import Path

    from openril.benchmarking import measuring as module

    monkeypatch.setattr(module, "_CLEAR", Path("/does/not/exist"))
    memory = PeakMemory("cpu")
    memory.start()
    assert memory.source is None and memory.peak() is None and memory.held is None
