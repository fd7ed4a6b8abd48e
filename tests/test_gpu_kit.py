"""The GPU kit up to the last device call: its whole flow on the CPU, what it does when a part fails, and its wheels."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts import gpu_kit

KIT = Path(gpu_kit.__file__)


def test_the_whole_flow(tmp_path: Path) -> None:
    command = [sys.executable, str(KIT), "--device", "cpu", "--model", "micro", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    parts = report["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(gpu_kit.PARTS, "done")
    assert parts["machine"]["result"]["modules_that_fail"] == {}
    assert parts["tests"]["result"]["collected"] >= 10
    packed, plain = (parts[name]["result"] for name in ("packed", "plain"))
    assert packed["summary"]["update_is_packed"] and packed["summary"]["discriminator_is_packed"]
    assert not plain["summary"]["update_is_packed"] and "profile" not in plain
    assert set(packed["profile"]) == {"student update", "discriminator update", "sampling of 8 tokens"}
    assert set(packed["memory"]) == {"student update", "discriminator update", "sampling"}
    assert all(phase["estimated_gib"] > 0 for phase in packed["memory"].values())
    assert len(packed["steps"]) == len(plain["steps"]) == 2
    [shape] = parts["bench"]["result"]["shapes"]
    assert set(shape["contenders"]) == {"trl", "ours"}
    page = (tmp_path / "gpu.md").read_text()
    for heading in (
        "# micro on",
        "## Tests",
        "## Steps",
        "## Peak memory",
        "## Profile: student update",
        "## ril bench",
    ):
        assert heading in page
    assert "failed" not in page


def test_the_way_to_train_of_a_small_gpu(tmp_path: Path) -> None:
    """On a CPU the first way always fits. This one swaps, also while it is profiled."""
    variant = "LoRA, with a discriminator of which a part trains, gradient checkpointing, swap"
    where = ["--json", str(tmp_path / "train.json"), "--work", str(tmp_path / "work"), "--device", "cpu"]
    command = [sys.executable, str(gpu_kit.WORKER), "train", *where, "--model", "micro", "--steps", "1"]
    done = subprocess.run([*command, "--variant", variant], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["variant"] == variant and report["steps"][0]["time/offload"] > 0
    assert report["summary"]["trainable"] < report["summary"]["parameters"] / 2
    assert len(report["profile"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(KIT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "--device cpu" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


def flags(out: Path) -> argparse.Namespace:
    return argparse.Namespace(out=out, device="cuda", model="micro", steps=2, wheels=None)


def run(code: str, out: Path, monkeypatch: pytest.MonkeyPatch, limit: float = 30.0) -> dict:
    monkeypatch.setattr(gpu_kit, "command_of", lambda part, flags, result: [sys.executable, "-c", code, str(result)])
    return gpu_kit.run_part("packed", flags(out), limit)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, subprocess, time; open(sys.argv[1], 'w').write('{\"steps\": [1]}')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    started = time.monotonic()
    found = run(code, tmp_path, monkeypatch, limit=8.0)
    assert found["status"] == "out of time" and found["result"] == {"steps": [1]}
    assert time.monotonic() - started < 40
    # The signal was sent; the kernel ends the process a moment later.
    deadline = time.monotonic() + 10
    while alive(found["last_lines"][0]):
        assert time.monotonic() < deadline, "the child of the part is still alive"
        time.sleep(0.05)


def test_a_part_that_fails_leaves_its_last_lines_and_the_page_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run("raise ValueError('out of memory')", tmp_path, monkeypatch)
    assert found["status"] == "failed" and found["exit_code"] == 1
    report = {
        "model": "micro",
        "device": "cuda",
        "command": "c",
        "revision": "r",
        "date": "d",
        "parts": {"packed": found},
    }
    page = gpu_kit.page(report)
    assert "## packed: failed" in page and "ValueError: out of memory" in page


@pytest.mark.parametrize(("inside", "status"), [("", "done"), ("<failure/>", "done"), ("<skipped/>", "failed")])
def test_a_skipped_gpu_test_is_a_failure(inside: str, status: str, tmp_path: Path) -> None:
    """pytest itself reports failures by its exit code, and skipped tests not at all."""
    xml = tmp_path / "tests.xml"
    xml.write_text(f'<s><testcase classname="a" name="b" time="2">{inside}</testcase></s>')
    found = {"status": "done"} | gpu_kit.tests_result(flags(tmp_path), xml, [])
    assert found["status"] == status and found["result"]["tests"] == 1
    assert found["result"]["failure"] == (["a::b"] if "failure" in inside else [])


def test_a_tests_part_without_tests_is_a_failure(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    xml.write_text("<s/>")
    assert gpu_kit.tests_result(flags(tmp_path), xml, [])["status"] == "failed"


def test_every_file_with_gpu_tests_is_run(tmp_path: Path) -> None:
    command = gpu_kit.command_of("tests", flags(tmp_path), tmp_path / "tests.json")
    named = {Path(word).name for word in command if word.endswith(".py")}
    assert {"test_gpu.py", "test_group_attention.py"} <= named and "test_layout.py" not in named


def test_the_wheels_are_the_packages_of_the_project_without_torch() -> None:
    found = gpu_kit.closure([*gpu_kit.project_requirements(), "pytest"])
    assert {"transformers", "trl", "peft", "pyarrow", "ruamel-yaml", "tokenizers", "pytest"} <= set(found)
    assert not {"torch", "torchvision", "openril", "ruff"} & set(found)


def test_only_wheels_that_are_newer_than_what_is_there_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "pytest-1.0-py3-none-any.whl",
        "pytest_xdist-999.0-py3-none-any.whl",
        "no_such_package-1.0-py3-none-any.whl",
    ):
        (tmp_path / name).touch()
    commands: list[list[str]] = []

    def noted(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_kit.subprocess, "run", noted)
    assert gpu_kit.install(tmp_path, tmp_path / "site") == 0
    [command] = commands
    assert [Path(word).name.split("-")[0] for word in command if word.endswith(".whl")] == [
        "no_such_package",
        "pytest_xdist",
    ]
    assert f"--target={tmp_path / 'site'}" in command
    assert gpu_kit.install(tmp_path / "nothing", tmp_path / "site") == 2
