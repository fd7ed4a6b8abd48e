"""Jobs run in order, one at a time or several, fail visibly, and end with the process that started them."""

import io
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# isort: split
from rich.console import Console

from openril.errors import OpenRILError
from playground.runner import Clock, Job, Runner, seconds_left
from support.waiting import wait_until


@dataclass(kw_only=True)
class Touch(Job):
    """Prints a file; the job is done when its log holds the content."""

    logs: Path

    def seconds(self) -> float | None:
        log = self.logs / f"{self.name}.log"
        return 0.0 if log.is_file() and "{" in log.read_text() else None


def jobs_of(tmp_path: Path, *needs: tuple[str, tuple[str, ...]], file: str = "note.json") -> list[Touch]:
    (tmp_path / "note.json").write_text('{"a": 1}')
    arguments = ("json.tool", str(tmp_path / file))
    return [Touch(name=name, arguments=arguments, needs=after, logs=tmp_path / "logs") for name, after in needs]


def runner_of(tmp_path: Path, jobs: list, **settings) -> tuple[Runner, io.StringIO]:
    output = io.StringIO()
    return Runner(jobs, tmp_path / "logs", Console(file=output, width=200), **settings), output


def test_jobs_run_after_what_they_need_and_write_logs(tmp_path):
    jobs = jobs_of(tmp_path, ("last", ("first", "second", "unknown")), ("first", ()), ("second", ("first",)))
    runner, output = runner_of(tmp_path, jobs)
    assert runner.run() == {}
    lines = output.getvalue().splitlines()
    assert [line.split("] ")[1].split(":")[0] for line in lines if "done" in line] == ["first", "second", "last"]
    assert f"  $ python -m json.tool {tmp_path / 'note.json'}" in lines
    assert json.loads((tmp_path / "logs" / "last.log").read_text()) == {"a": 1}
    assert runner_of(tmp_path, jobs)[0].next_job() is None  # All of them are recognized.


def test_a_failed_command_is_named_with_the_end_of_its_log(tmp_path):
    runner, _ = runner_of(tmp_path, jobs_of(tmp_path, ("broken", ()), file="missing.json"))
    with pytest.raises(OpenRILError, match=r"(?s)broken .*exit code \d.*No such file.*broken\.log"):
        runner.run()


def test_jobs_that_need_a_failed_job_are_left_out_and_the_others_run(tmp_path):
    jobs = [
        *jobs_of(tmp_path, ("broken", ()), file="missing.json"),
        *jobs_of(tmp_path, ("needs it", ("broken",)), ("other", ())),
    ]
    runner, output = runner_of(tmp_path, jobs, keep_going=True)
    failed = runner.run()
    assert list(failed) == ["broken", "needs it"]
    assert "broken" in failed["needs it"]
    assert list(runner.finished) == ["other"]
    assert "broken FAILED" in output.getvalue()


def test_a_job_that_leaves_nothing_has_failed(tmp_path):
    runner, _ = runner_of(tmp_path, [Job(name="empty", arguments=("this",))])
    with pytest.raises(OpenRILError, match=r"empty .*exit code 0"):
        runner.run()


def test_no_command_outlives_a_killed_runner(tmp_path):
    script = f"""
from pathlib import Path
from rich.console import Console
from playground.runner import Job, Runner
Runner([Job(name="sleep", arguments=("asyncio",))], Path({str(tmp_path)!r}), Console()).run()
"""
    # `python -m asyncio` waits for its input, a pipe that stays open.
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_until(lambda: children.read_text(), 20)
    child = Path(f"/proc/{children.read_text().split()[0]}/stat")
    parent.kill()
    parent.wait()
    wait_until(lambda: not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z", 10)


def test_minutes_are_added_over_calls_and_not_between_them(tmp_path):
    now = 100.0
    first = Clock(tmp_path / "clock.json", lambda: now)
    now = 130.0
    first.tick()
    now = 131.5  # Killed before the next tick.
    now = 500.0
    second = Clock(tmp_path / "clock.json", lambda: now)
    now = 512.0
    second.tick(every=20.0)
    assert Clock(tmp_path / "clock.json", lambda: now).seconds == 30.0
    second.tick()
    assert second.seconds == 42.0
    third = Clock(tmp_path / "clock.json", lambda: now)
    third.stop()
    now = 900.0
    third.tick()
    assert Clock(tmp_path / "clock.json", lambda: now).seconds == 42.0


def test_time_left_follows_what_was_measured():
    jobs = [
        Job(name="a", arguments=(), expected=30, kind="train"),
        Job(name="b", arguments=(), expected=30, kind="train"),
        Job(name="c", arguments=(), expected=10, kind="eval"),
    ]
    assert seconds_left(jobs, {}, {}, 1) == 70
    assert seconds_left(jobs, {}, {}, 4) == 30  # No faster than the longest job.
    # a took twice its seconds. Left: half of 30 x 2 of b, and 10 x 2 of c, which takes the overall factor.
    assert seconds_left(jobs, {"a": 60}, {"b": 0.5}, 1) == 50
    jobs.append(Job(name="d", arguments=(), expected=10, kind="eval"))
    assert seconds_left(jobs, {"a": 60, "d": 5}, {}, 1) == 65  # c now has the factor of its kind.
    assert seconds_left(jobs, dict.fromkeys("abcd", 1.0), {}, 1) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_says_how_to_go_on(number: int):
    code = (
        "import os, signal, sys, time; from playground.runner import exit_code\n"
        f"sys.exit(exit_code('demo', lambda: os.kill(os.getpid(), {int(number)}) or time.sleep(20) or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "demo: interrupted; the same command continues\n"
