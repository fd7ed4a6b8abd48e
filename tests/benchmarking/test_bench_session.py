"""Turns, deaths and lack of memory with fake processes, and one real process that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from openril.benchmarking import session as module
from openril.benchmarking.plan import Cell
from openril.benchmarking.session import Machine, Session
from openril.benchmarking.shapes import Shape
from openril.benchmarking.worker import Command, Measurement, Spec, WorkerFailed

SHAPE = Shape("micro", 16, 4, 4)  # 8 rows


class FakeMachine:
    def __init__(self, *arguments: Any) -> None:
        pass

    def ask(self, request: tuple[Any, ...]) -> dict[str, float] | None:
        if request[0] == "limits":
            return {"matmul_flops": 1.0, "bandwidth": 1.0}
        request[2].mkdir(parents=True)
        return None

    def end(self) -> None:
        pass


class FakeWorker:
    """Records every request. plain dies at its second measurement, and trl cannot hold more than 2 rows."""

    asked: list[tuple[str, str, int]]

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec = spec
        self.about: dict[str, Any] = {}

    def receive(self) -> dict[str, Any]:
        if self.spec.name == "trl" and not 0 < self.spec.micro_batch_rows <= 2:
            raise WorkerFailed(f"trl at {self.spec.shape.name}: not enough memory", True)
        return {"prompt_tokens": 20, "rows": self.spec.micro_batch_rows}

    def ask(self, command: Command) -> Measurement:
        FakeWorker.asked.append((self.spec.name, command.part, command.call))
        if self.spec.name == "plain" and command.call == 2:
            raise WorkerFailed(f"plain at {self.spec.shape.name} was killed by signal 9", True)
        return Measurement(1.0, fast_path_off=("no Triton",) if self.spec.name == "ours" else ())

    def end(self) -> None:
        pass


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    FakeWorker.asked = []
    monkeypatch.setattr(module, "Machine", FakeMachine)
    monkeypatch.setattr(module, "ContenderWorker", FakeWorker)
    return Session(tmp_path, device="cpu", precision="float32", threads=1)


def test_contenders_take_turns_and_one_that_dies_leaves_the_others(session: Session):
    messages: list[str] = []
    session.warn = messages.append
    result = session.run(Cell(SHAPE, parts=("update",), rounds=3, memory=False))
    assert FakeWorker.asked[3:] == [  # the first three are the warm-up
        *(("trl", "update", 1), ("plain", "update", 1), ("ours", "update", 1)),
        *(("trl", "update", 2), ("plain", "update", 2), ("ours", "update", 2)),
        *(("trl", "update", 3), ("ours", "update", 3)),
    ]
    assert [m is not None for m in result.measurements["plain"]["update"]] == [True, False, False]
    assert all(result.measurements["ours"]["update"])
    assert [(f.contender, f.shape) for f in result.failures] == [("plain", SHAPE.name)]
    assert "plain at micro-16-4-4 was killed" in messages[-1]


def test_a_fast_path_that_is_off_is_noted_once(session: Session):
    messages: list[str] = []
    session.warn = messages.append
    result = session.run(Cell(SHAPE, contenders=("ours",), parts=("update",), rounds=2, memory=False))
    assert result.fast_path_off == {"ours": ["no Triton"]}
    assert len(messages) == 1 and "ours" in messages[0] and "no Triton" in messages[0]


def test_trl_gets_fewer_rows_per_pass_when_memory_is_short(session: Session):
    messages: list[str] = []
    session.warn = messages.append
    result = session.run(Cell(SHAPE, contenders=("trl", "ours"), parts=("update",), rounds=1))
    assert result.about["trl"]["rows"] == 2 and not result.failures
    assert ["with 2 rows" in m for m in messages if m.startswith("trl")] == [True]  # from one group, 4


def test_contenders_too_large_to_run_together_run_one_after_the_other(session: Session):
    cell = Cell(SHAPE, contenders=("trl", "ours"), parts=("update",), rounds=2, memory=False, together=False)
    result = session.run(cell)
    assert [name for name, _, _ in FakeWorker.asked] == ["trl"] * 3 + ["ours"] * 3
    assert len(result.measurements["trl"]["update"]) == len(result.measurements["ours"]["update"]) == 2
    assert len(result.limits) == 2  # one for each round of ours


def test_a_killed_process_is_named(tmp_path: Path):
    machine = Machine("cpu", 1, tmp_path / "log")
    try:
        assert machine.ask(("limits", "float32"))["matmul_flops"] > 0
        assert machine.process.pid is not None
        os.kill(machine.process.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match=r"signal 9.*memory") as caught:
            machine.ask(("limits", "float32"))
        assert caught.value.out_of_memory
    finally:
        machine.end()
