"""`ril eval --suite` with lmms-eval on small copies of all fourteen benchmarks."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
from rich.console import Console

from openril.errors import DataError, OpenRILError
from openril.evaluation.suite.benchmarks import PAPER, suite
from openril.evaluation.suite.process import run_worker
from openril.evaluation.suite.worker import Job
from openril.recipe.schema import Recipe
from openril.stages.eval import run_eval
from openril.storage import read_jsonl, write_jsonl
from support.benchmark_data import write_hub_cache
from support.launch import launch
from support.misbehaving_server import Act, Dribble, Hang, MisbehavingServer, Refuse, Request, Say, Status

sys.path.insert(0, str(Path(__file__).parent))
import scripted

pytestmark = pytest.mark.benchmarks


def recipe(run: Path, mirror: Path, student: Path, judge: str = "", **judging: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run_dir": str(run),
            "student": {"model": str(student), "dtype": "float32"},
            "judge": {"base_urls": [judge], "model": "fake", "timeout": 3, "max_retries": 0, **judging}
            if judge
            else {},
            "eval": {"suite_data": str(mirror), "suite_max_tokens": 3, "questions_per_batch": 32},
        }
    )


def evaluate(settings: Recipe, *, fails: str = "", **options: Any) -> dict[str, Any]:
    """Run the command and return suite.json. fails: what its error must say, which comes after the table is written."""
    with pytest.raises(OpenRILError, match=fails) if fails else nullcontext():
        run_eval(settings, Console(quiet=True), **options)
    return json.loads((settings.run_path / "eval" / "suite.json").read_text())


def script_answers(folder: Path) -> None:
    """Replace the kept answers by scripted ones."""
    key, *rows = read_jsonl(folder / "answers.jsonl")
    for row in rows:
        task, number = row["question_id"].split("/")
        row["text"], row["finish_reason"] = scripted.answer(task, int(number)), "stop"
    write_jsonl(folder / "answers.jsonl", [key, *rows])
    for result in folder.glob("*.json"):
        result.unlink()


@pytest.fixture(scope="module")
def offline(mirror: Path, students: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Both students on the benchmarks without a judge."""
    settings = recipe(tmp_path_factory.mktemp("run"), mirror, students[0])
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    data = evaluate(settings, suite=["offline"], checkpoints=list(map(str, students)), beside=["paper"])
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert "lmms_eval" not in sys.modules  # nothing of it reaches this process
    first, second = data["checkpoints"]
    assert first["name"] == "base"
    for row in data["checkpoints"]:
        assert set(row["results"]) == {b.task for b in suite("offline")}
        assert all(not r["failed"] and r["cut"] for r in row["results"].values())
        assert row["mean"] is not None
    assert second["difference"]["mean"] is not None
    assert len(data["elsewhere"]) == 15
    sizes = [row["results"]["ai2d"]["details"]["image_limits"] for row in data["checkpoints"]]
    assert sizes == [
        {"longest_edge": 12544, "shortest_edge": 784},
        {"min_patches": 1, "max_patches": 4, "crop_to_patches": True, "height": 56, "width": 56},
    ]
    table = (settings.run_path / "eval" / "suite.md").read_text()
    assert "longest_edge 12544, shortest_edge 784" in table and "max_patches 4" in table
    (settings.run_path / "first.json").write_text(json.dumps(data))
    return settings


@pytest.fixture(scope="module")
def results(offline: Recipe) -> dict[str, Any]:
    """The first student's results by task, after its answers were replaced by scripted ones."""
    script_answers(offline.run_path / "eval" / "suite" / "base")
    return evaluate(offline, suite=["offline"], checkpoints=[offline.student.model])["checkpoints"][0]["results"]


def test_scripted_answers_get_the_scores_worked_by_hand(results: dict[str, Any]) -> None:
    found = {task: (r["score"], r["unparsed"]) for task, r in results.items()}
    for task, (score, unparsed) in scripted.EXPECTED.items():
        assert found[task] == (pytest.approx(score), unparsed), task
    details = results["mmbench_cn_dev"]["details"]
    assert details["eval_method"] == "static" and details["judge"] is None and details["lmms_eval"]
    # lmms-eval gives every unparsed question of MMMU a letter; with 3 of 14 drawn from 4 it may only be higher.
    assert results["mmmu_val"]["lmms_eval_score"] >= results["mmmu_val"]["score"]


def test_the_figure_is_the_one_of_simple_evaluate(
    results: dict[str, Any], offline: Recipe, mirror: Path, tmp_path: Path
) -> None:
    folder, out = offline.run_path / "eval" / "suite" / "base", tmp_path / "reference.json"
    script = Path(__file__).with_name("reference.py")
    command = [sys.executable, str(script), str(folder / "answers.jsonl"), str(mirror), str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reference = json.loads(out.read_text())
    # Why it runs in a process of its own: it reseeds, and deletes the modules of the model that it evaluated.
    assert reference.pop("traps") == {"random": True, "numpy": True, "torch": True, "module deleted": True}
    # A timeout is no wrong answer, whichever class it is of. An alarm as math-verify's needs the main thread.
    timeouts = reference.pop("timeouts")
    assert timeouts["scores"] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, None, None]
    assert [cause.split(":")[0] for cause in timeouts["causes"][-2:]] == ["TimeoutException", "TimeoutError"]
    assert timeouts["figure"] == pytest.approx(80.0)
    assert {"ai2d", "chartqa", "mmstar", "blink", "seedbench", "mmbench_en_dev_static"} <= set(reference)
    for task, figure in reference.items():
        assert results[task.removesuffix("_static")]["lmms_eval_score"] == pytest.approx(figure, abs=1e-3), task


def test_a_killed_evaluation_goes_on_with_the_answers_that_it_has(
    mirror: Path, students: list[Path], tmp_path: Path
) -> None:
    settings = recipe(tmp_path, mirror, students[1])
    settings.eval.questions_per_batch = 1
    place = tmp_path / "work"
    benchmarks = [dataclasses.asdict(b) for b in PAPER if b.task == "mmbench_en_dev"]
    job = Job(
        "evaluate", settings.model_dump(mode="json"), benchmarks, str(students[1]), str(place), key="k", use_judge=False
    )
    events = run_worker(job, place)
    assert next(events)["event"] == "answers"
    events.close()  # ends the worker
    kept = read_jsonl(place / "answers.jsonl")
    assert 1 <= len(kept) - 1 < 46
    counts = [e["done"] for e in run_worker(job, place) if e["event"] == "answers"]
    rows = read_jsonl(place / "answers.jsonl")
    assert rows[: len(kept)] == kept
    assert [r["question_id"] for r in rows[1:]] == [f"mmbench_en_dev/{n}" for n in range(46)]
    assert counts[0] > len(kept) - 1 and counts[-1] == 46


def judge_reply(request: Request) -> Act:
    """Judge as the scripts need it: broken replies for answers that ask for them."""
    text = request.text
    if "Correctness" in text:
        said = text.rsplit("|", 2)[1].strip()
        replies = {"good": "0.8", "bad": "0.0", "words": "It seems fine", "five": "5"}
    elif "Extracted answer:" in text:
        said = text.rsplit("Extracted answer:", 1)[0].strip().rsplit("\n", 1)[-1]
        replies = {}
    else:
        said = text.rsplit("Answer: ", 1)[-1].split("\n")[0]
        replies = {"it looks nice": "E", "none of them": "E"}
        if said.startswith("pick "):
            replies[said] = said[-1].upper()
    broken: dict[str, Act] = {
        "FAIL": Status(500),
        "HANG": Hang(30),
        "REFUSE": Refuse(),
        "DRIBBLE": Dribble("0.8", pause=0.2),  # some 60 s for all of it, each byte in time
        "slowly": Dribble("0.8", pause=0.002),  # under a second
    }
    if said in broken:
        return broken[said]
    return Say(replies.get(said, said))


JUDGED_TASKS = list(scripted.JUDGED)


def test_a_failed_judgement_is_unknown_and_a_healed_judge_is_asked_for_it_alone(
    mirror: Path, students: list[Path], tmp_path: Path
) -> None:
    with MisbehavingServer(then=judge_reply) as judge:
        settings = recipe(tmp_path, mirror, students[0], judge.url)
        target = [str(students[0])]
        evaluate(settings, tasks=JUDGED_TASKS, checkpoints=target, fails="have no score")
        folder = tmp_path / "eval" / "suite" / "base"
        script_answers(folder)
        row = evaluate(settings, tasks=JUDGED_TASKS, checkpoints=target, fails="MM-Vet-v2: 4 of 12")["checkpoints"][0]
        results = row["results"]
        found = {t: (r["score"], r["unparsed"], r["unknown"]) for t, r in results.items()}
        for task, (score, unparsed, unknown) in scripted.JUDGED.items():
            expected = None if score is None else pytest.approx(score)
            assert found[task] == (expected, unparsed, unknown), task
        assert row["mean"] is None
        assert "4 of 12" in results["mmvetv2"]["failed"]
        # What lmms-eval makes of it: 0 for a failed verdict; the nearest choice, and no decimal number, in MathVista.
        assert results["mmvet"]["lmms_eval_score"] == pytest.approx(100 * 8 * 0.8 / 12)
        assert results["mathvista_testmini_format"]["lmms_eval_score"] == pytest.approx(41.67)
        assert results["mmvet"]["details"]["judge"] == "fake"
        answers = (folder / "answers.jsonl").read_bytes()

        before = judge.count
        judge.then = lambda request: Say("0.5") if "Correctness" in request.text else Say("A")
        healed = evaluate(settings, tasks=JUDGED_TASKS, checkpoints=target)["checkpoints"][0]["results"]
        assert [r["unknown"] for r in healed.values()] == [0] * len(JUDGED_TASKS)
        assert healed["mmvet"]["score"] == pytest.approx(100 * (8 * 0.8 + 3 * 0.5) / 12)
        assert (folder / "answers.jsonl").read_bytes() == answers
        # 3 of MM-Vet, 4 of MM-Vet-v2 with 3 different prompts at least, 2 of MathVista, 1 of MMBench-CN, and the probe.
        assert judge.count - before <= 3 + 4 + 2 + 2 + 1


def test_check_says_what_is_missing_and_downloads_nothing(
    mirror: Path,
    students: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    part = tmp_path / "part"
    part.mkdir()
    (part / "ai2d").symlink_to(mirror / "ai2d")
    with MisbehavingServer(Status(500), Status(500), then=Say("1")) as judge:
        settings = recipe(tmp_path / "run", Path("part"), students[0], judge.url)
        console = Console(width=300)
        with pytest.raises(DataError, match=r"eval\.suite_data: .*2 benchmarks, 1 "):
            run_eval(settings, console, tasks=["ai2d", "mmvet"], check=True, checkpoints=[str(students[0])])
    said = capsys.readouterr().out
    assert "AI2D: 12 questions" in said
    assert "missing  MM-Vet" in said and str(part / "mmvet") in said
    assert "1 of 2 benchmarks" in said
    assert not (tmp_path / "run" / "eval" / "suite.json").exists()


def test_the_hub_is_asked_only_when_a_download_is_allowed(
    students: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    asked: list[str] = []
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_none")  # tasks of lmms-eval ask for one
    write_hub_cache(tmp_path / "home")
    settings = recipe(tmp_path / "run", tmp_path, students[0])
    settings.eval.suite_data = ""
    options: dict[str, Any] = {"suite": ["offline"], "check": True, "checkpoints": [str(students[0])]}
    with pytest.raises(DataError, match=r"eval\.suite_data"):
        run_eval(settings, Console(width=300), tasks=["ai2d", "realworldqa"], **options)
    said = capsys.readouterr().out
    assert "here     AI2D: 12 questions" in said
    assert "missing  RealWorldQA" in said and "--download" in said and "eval.suite_data" in said
    assert asked == []
    with pytest.raises(DataError, match=r"eval\.suite_data"):
        run_eval(settings, Console(width=300), tasks=["realworldqa"], download=True, **options)
    assert any("RealWorldQA" in path for path in asked)
    hub.shutdown()


def test_processes_share_questions_and_go_on_after_all_were_killed(
    offline: Recipe, mirror: Path, students: list[Path], tmp_path: Path
) -> None:
    settings = recipe(tmp_path / "run", mirror, students[0])
    settings.eval.questions_per_batch = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    arguments = ["-m", "openril.cli", "eval", path, "--suite", "offline", "--tasks", "mmbench_en_dev", "ai2d"]
    arguments += ["--checkpoints", *students]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    first = subprocess.Popen([*launcher, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = [settings.run_path / "eval" / "suite" / "base" / name for name in ("answers.jsonl", "answers.1.jsonl")]
    deadline = time.monotonic() + 300
    while not all(len(read_jsonl(file)) > 1 for file in files):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    family = [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family)
    first.wait()
    kept = [read_jsonl(file) for file in files]
    done = launch(2, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((settings.run_path / "eval" / "suite.json").read_text())
    reference = json.loads((offline.run_path / "first.json").read_text())
    for row, other in zip(data["checkpoints"], reference["checkpoints"], strict=True):
        place = settings.run_path / "eval" / "suite" / row["name"]
        rows = [read_jsonl(place / file.name)[1:] for file in files]
        numbers = [[int(r["question_id"].split("/")[1]) % 2 for r in part] for part in rows]
        assert set(numbers[0]) == {0} and set(numbers[1]) == {1}
        assert len(rows[0]) + len(rows[1]) == 46 + 12
        for task in ("ai2d", "mmbench_en_dev"):
            assert row["results"][task]["score"] == other["results"][task]["score"]
        if row["name"] == "base":
            assert [part[: len(k) - 1] for part, k in zip(rows, kept, strict=True)] == [k[1:] for k in kept]


def test_a_task_outside_the_fourteen_is_scored_by_its_first_metric_and_one_with_a_judge_is_refused(
    mirror: Path, students: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths are those of the command, and the worker runs elsewhere
    more = tmp_path / "more"
    more.mkdir()
    for task, source in (("ai2d_no_mask", "ai2d"), ("mathvista_testmini_cot", "mathvista_testmini_format")):
        (more / task).symlink_to(mirror / source)
    settings = recipe(Path("run"), Path("more"), students[0])
    tasks, student = ["ai2d_no_mask", "mathvista_testmini_cot"], os.path.relpath(students[0])
    row = evaluate(settings, tasks=tasks, checkpoints=[student], fails="asks a judge")["checkpoints"][0]
    assert row["results"]["ai2d_no_mask"]["n"] == 12 and row["results"]["ai2d_no_mask"]["score"] is not None
    refused = row["results"]["mathvista_testmini_cot"]
    assert refused["score"] is None and "asks a judge" in refused["failed"]
