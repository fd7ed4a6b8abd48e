"""Running this project's commands one after the other and side by side, with their output in log files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openril.errors import OpenRILError
from openril.storage import read_jsonl


@dataclass(frozen=True)
class Command:
    """title: how it is called on the screen. arguments: behind ``python -m``. metrics: a metrics.jsonl to look at while
    it runs, if it writes one."""

    title: str
    arguments: tuple[str, ...]
    metrics: Path | None = None

    @property
    def shown(self) -> str:
        """As a person would type it."""
        module, *rest = self.arguments
        return " ".join(["ril", *rest] if module == "openril.cli" else ["python -m", module, *rest])


Lane = Sequence[Command]
"""Commands that run one after the other."""


def _environment(threads: int) -> dict[str, str]:
    values = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **values}


def run_lanes(lanes: Sequence[Lane], logs: Path, say: Callable[[str], None], threads: int = 1) -> None:
    """Run the lanes side by side. Raises OpenRILError with the end of its log when a command fails; the others are then
    interrupted, as they are by Ctrl-C (they save and end)."""
    logs.mkdir(parents=True, exist_ok=True)
    left = [list(lane) for lane in lanes]
    running: dict[int, tuple[Command, subprocess.Popen[bytes], float]] = {}
    heard = time.monotonic()
    try:
        while running or any(left):
            for number, lane in enumerate(left):
                if number not in running and lane:
                    command = lane.pop(0)
                    say(f"  $ {command.shown}")
                    running[number] = (command, _start(command, logs, threads), time.monotonic())
            time.sleep(0.2)
            for number, (command, process, started) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[number]
                if code:
                    raise OpenRILError(_failure(command, code, logs))
                say(f"  {command.title}: done in {time.monotonic() - started:.0f} s")
            if time.monotonic() - heard > 15 and running:
                heard = time.monotonic()
                news = [line for command, _, _ in running.values() if (line := _news(command))]
                if news:
                    say("    " + "; ".join(news))
    finally:
        for _, process, _ in running.values():
            end(process)


def _log(command: Command, logs: Path) -> Path:
    return logs / f"{command.title.replace(' ', '_')}.log"


def _start(command: Command, logs: Path, threads: int) -> subprocess.Popen[bytes]:
    with open(_log(command, logs), "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command.arguments], stdout=log, stderr=subprocess.STDOUT, env=_environment(threads)
        )


def _failure(command: Command, code: int, logs: Path) -> str:
    path = _log(command, logs)
    tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
    return f"{command.title} failed with exit code {code}: {command.shown}\n{tail}\n(all of it: {path})"


def _news(command: Command) -> str:
    rows = read_jsonl(command.metrics) if command.metrics else []
    if not rows:
        return ""
    loss = next((value for key, value in rows[-1].items() if key.endswith("loss")), None)
    return f"{command.title}: step {rows[-1].get('step', '?')}" + (f", loss {loss:.3f}" if loss is not None else "")


def run_shown(command: Command, say: Callable[[str], None], threads: int) -> int:
    """Run a command on this terminal; returns its exit code."""
    say(f"  $ {command.shown}")
    process = subprocess.Popen([sys.executable, "-m", *command.arguments], env=_environment(threads))
    try:
        return process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reaches the child too, but an interrupt sent to this process alone does not. It saves before it ends;
        # a second interrupt would end it at once, so it is a request to stop instead.
        process.terminate()
        return process.wait()


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process of ours, wait for it to save, and end it if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def judge_server(checkpoint: Path, port: int, logs: Path) -> Iterator[str]:
    """The judge's address while the block runs. A taken port is exchanged for a free one.

    Raises OpenRILError when the server does not come up within two minutes.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            port = 0
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / "judge_server.log"
    arguments = ["openril.playground.serve", str(checkpoint), "--port", str(port), "--with-parent"]
    with open(path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT, env=_environment(1)
        )
    try:
        for _ in range(600):
            address = next((line for line in path.read_text().splitlines() if line.startswith("http://")), "")
            if address:
                yield address
                return
            if process.poll() is not None:
                break
            time.sleep(0.2)
        raise OpenRILError(f"the judge's server did not start; see {path}")
    finally:
        end(process)
