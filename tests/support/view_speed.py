"""Measure `ril view` on a made-up run: the time to open it, the slowest filter, and the peak memory.

``python tests/support/view_speed.py --steps 1000 --groups 36 --members 8`` prints the figures of docs/report.md. The times are
those of HTTP requests, the memory that of the server's whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
from support.synthetic_run import write_run

QUERIES: dict[str, dict[str, Any]] = {
    "everything": {},
    "last steps first": {"sort": "-step"},
    "longest": {"sort": "longest"},
    "widest spread": {"sort": "-spread"},
    "largest advantage": {"sort": "advantage"},
    "skill": {"skill": "colors"},
    "teacher": {"source": "teacher_b"},
    "one flag": {"flags": "d_judge_disagree"},
    "two flags": {"flags": "all_wrong,d_fooled"},
    "one question": {"question": "q77"},
    "steps": {"step_min": 100, "step_max": 800},
    "no such text": {"q": "no such text anywhere"},
    "rare text": {"q": "question 7. the answer is 3"},
    "frequent text": {"q": "The Answer is 4"},
    "one letter": {"q": "e"},
    "text, flag, skill and order": {"q": "answer is 7", "flags": "d_fooled", "skill": "charts", "sort": "-spread"},
}


class Server:
    """A running `ril view`."""

    def __init__(self, run: Path, cache: Path) -> None:
        command = [sys.executable, "-m", "openril.cli", "view", str(run), "--no-browser", "--port", "0"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        self.started = time.perf_counter()
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = None
        while found is None:
            line = self.process.stdout.readline()
            assert line, "ril view has ended"
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
        self.address = found[0]

    def get(self, path: str, **query: Any) -> bytes:
        with urllib.request.urlopen(f"{self.address}{path}?{urllib.parse.urlencode(query)}") as answer:
            return answer.read()

    def json(self, path: str, **query: Any) -> Any:
        return json.loads(self.get(path, **query))

    def wait(self, ready: Callable[[dict[str, Any]], Any], seconds: float = 600) -> None:
        """Wait until /api/version says what it should."""
        until = time.monotonic() + seconds
        while not ready(about := self.json("/api/version")):
            assert time.monotonic() < until, about
            time.sleep(0.1)

    def cpu_s(self) -> float:
        """Return the CPU time of all threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def interrupt(self) -> int:
        """Press Ctrl-C, and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        return self.process.returncode


def measure(run: Path, cache: Path) -> dict[str, Any]:
    """Open the run twice, ask every query three times, and return the figures."""
    out: dict[str, Any] = {}
    server = Server(run, cache)
    server.get("/")
    out["first_opening_s"] = time.perf_counter() - server.started
    out["first_opening_cpu_s"] = server.cpu_s()
    out["first_groups_s"] = None
    server.wait(lambda about: about["groups"] > 0)
    assert server.json("/api/groups", limit=20)["groups"]
    out["first_groups_s"] = time.perf_counter() - server.started
    server.wait(lambda about: about["steps"] and not about["indexing"])
    out["indexing_s"] = time.perf_counter() - server.started
    out["indexing_cpu_s"] = server.cpu_s()
    server.wait(lambda about: about["report"])
    out["report_s"] = time.perf_counter() - server.started
    out["report_cpu_s"] = server.cpu_s()
    out["first_peak_mib"] = server.peak_mib()
    assert server.interrupt() == 0
    server = Server(run, cache)
    server.get("/")
    assert server.json("/api/groups", limit=20)["groups"]
    out["opening_s"] = time.perf_counter() - server.started
    out["opening_cpu_s"] = server.cpu_s()
    server.wait(lambda about: about["report"])
    times: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for turn in range(3):
        for name, query in QUERIES.items():
            started, before = time.perf_counter(), server.cpu_s()
            # Another offset each time: the server keeps the places of its last queries, but not the groups.
            server.json(
                "/api/groups",
                limit=20,
                offset=turn,
                **query,
                **({} if "step_max" in query else {"step_max": 10**6 + turn}),
            )
            times[name] = max(times.get(name, 0.0), time.perf_counter() - started)
            cpu[name] = max(cpu.get(name, 0.0), server.cpu_s() - before)
    out["filters_ms"] = {name: round(1000 * seconds) for name, seconds in times.items()}
    out["filters_cpu_ms"] = {name: round(1000 * seconds) for name, seconds in cpu.items()}
    out["slowest_filter_ms"] = max(out["filters_ms"].values())
    out["peak_mib"] = max(server.peak_mib(), out["first_peak_mib"])
    assert server.interrupt() == 0
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run folder; default: a made-up run, which is removed again")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=36)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--cache", type=Path, help="keep the index in this folder")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = flags.run or Path(folder) / "run"
        if flags.run is None:
            write_run(run, flags.steps, groups=flags.groups, members=flags.members)
        print(json.dumps(measure(run, flags.cache or Path(folder) / "cache"), indent=2))


if __name__ == "__main__":
    main()
