"""`ril view` as a user runs it: a live run, Ctrl-C, mistakes, and its speed on a small run."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from openril.cli import main
from openril.report.rollouts import step_files
from openril.report.serving.background import Viewer
from openril.stages.view import bind, tunnel
from support.synthetic_run import write_run
from support.view_speed import Server, measure


def test_a_run_is_shown_while_it_trains(tmp_path: Path):
    run = tmp_path / "run"
    write_run(run, 2, groups=2, members=4, words=5)
    server = Server(run, tmp_path / "cache")
    try:
        server.wait(lambda about: about["steps"] == 2 and about["report"])
        first = server.json("/api/report")
        assert first["schema"] == "openril.report/1" and first["shown"] == first["total"] == 4 and not first["groups"]
        write_run(run, 1, groups=2, members=4, words=5, first_step=3)
        server.wait(lambda about: about["steps"] == 3)
        groups = server.json("/api/groups")["groups"]
        assert [g["id"] for g in groups][4:] == ["0-3-0", "0-3-1"]
        name = next(name for g in groups for name in g["images"])
        assert server.get(f"/api/image/{name}", size="full")[:4] == b"RIFF"
        step_files(run)[0][1].write_text("no JSON\n")
        server.wait(lambda about: about["problems"])
        assert server.json("/api/groups")["total"] == 4
    finally:
        code = server.interrupt()
    assert code == 0


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert main(["view", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    write_run(tmp_path, 1, groups=1, members=2, words=5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["view", str(tmp_path), "--port", str(port)]) == 2
        assert f"--port: expected a free port, got {port}" in capsys.readouterr().err
    assert main(["view", str(tmp_path), "--port", "70000"]) == 2
    assert "70000" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert main(["view", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "duckdb" in error and "pip install 'openril[view]'" in error
    assert main(["view"]) == 2 and main(["view", "--help"]) == 0
    assert "--no-browser" in capsys.readouterr().out


def test_the_next_free_port_is_taken():
    with bind(None) as first, bind(None) as second:
        assert second.getsockname()[1] > first.getsockname()[1]
        assert first.getsockname()[0] == "127.0.0.1"


def test_the_tunnel_names_the_machine_that_the_user_came_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 50000 10.0.0.2 22")
    monkeypatch.setenv("USER", "ann")
    assert tunnel(8642) == "ssh -N -L 8642:127.0.0.1:8642 ann@10.0.0.2"


def test_the_document_is_stored_until_something_changes(tmp_path: Path):
    run, cache = tmp_path / "run", tmp_path / "cache" / "index.duckdb"
    write_run(run, 1, groups=1, members=2, words=5)
    built: list[int] = []

    def build(run_dirs: object) -> dict[str, int]:
        built.append(1)
        return {"number": len(built)}

    def open_once() -> dict[str, int]:
        with Viewer([run], cache, 0.01, build) as viewer:  # type: ignore[arg-type]
            while not viewer.source.report_version():
                time.sleep(0.01)
        return viewer.report()

    assert [open_once(), open_once()] == [{"number": 1}, {"number": 1}]
    write_run(run, 1, groups=1, members=2, words=5, first_step=2)
    assert open_once() == {"number": 2}


def test_a_small_run_opens_quickly_and_answers_quickly(tmp_path: Path):
    """The bounds are several times what this takes; tests/support/view_speed.py measures the large run."""
    write_run(tmp_path / "run", 40, groups=12)
    figures = measure(tmp_path / "run", tmp_path / "cache")
    assert figures["opening_s"] < 20 and figures["slowest_filter_ms"] < 2000 and figures["peak_mib"] < 500, figures
