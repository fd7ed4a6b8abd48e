"""The report document: statistics by hand, several runs, the choice of groups, ticks, and mistakes of the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from openril.cli import main
from openril.errors import DataError
from openril.recipe.loading import save_recipe
from openril.recipe.schema import Recipe
from openril.records import Group, ImageSource, Question, Response, Rollout
from openril.report.document import build_document
from openril.report.html import render_page
from openril.report.statistics import Record, Sample, chosen, wilson
from openril.stages.report import TrainingReport
from openril.storage import read_jsonl, write_json, write_jsonl
from openril.training.run_folder import RunFolder

HOSTILE = "</script><script>alert(1)</script>\0 \ud800 \u202e"


def rollout(source: str, index: int, text: str, prob: float, verdict: float | None, advantage: float = 0.0) -> Rollout:
    similarity = round(1 - prob)
    return Rollout(
        Response("q", source, index, text, token_ids=(1,) * len(text) if source == "student" else None), prob, similarity,
        verdict, {"similarity": similarity, "answer": verdict}, None if verdict is None else similarity + verdict, advantage,
        judged=True, explanation="It says so.", learned=len(text),
    )  # fmt: skip


def make_run(path: Path, steps: int = 2, text: str = "4", beta: float = 0.0) -> RunFolder:
    """A run whose every step holds two groups: a question with a picture, and one without."""
    picture = path.parent / "four.png"
    Image.new("RGB", (400, 300), (9, 90, 9)).save(picture)
    seen = Question("seen", "2 + 2?", "4", images=(ImageSource(path=picture),), metadata={"skill": "sums"})
    told = Question("told", "3 + 3?", "6", metadata={"skill": "words"})
    folder = RunFolder(path)
    save_recipe(Recipe.model_validate({"run_dir": str(path), "train": {"beta": beta}}), path / "recipe.yaml")
    folder.log_environment(versions={"openril": "0.1.0"}, device="a device", processes=1)
    for step in range(1, steps + 1):
        folder.log_metrics({"step": step, "train/reward": step / 10, "time/update": 2.0, "discriminator/accuracy": 0.5})
        groups = [
            Group(seen, [
                rollout("student", 0, text, 0.95, 1.0, -0.5), rollout("student", 1, "5", 0.35, 0.0, -0.5),
                rollout("a", 0, "so 4", 0.05, 1.0, 0.5), rollout("b", 0, "5 or so", 0.85, 0.0, 0.0),
            ]),
            Group(told, [rollout("student", 0, "6", 0.95, 0.0, 0.0), rollout("a", 1, "6", 0.15, None, 0.0)]),
        ]  # fmt: skip
        folder.log_rollouts(step, groups, {q.id: q for q in (seen, told)})
    folder.log_warning("a warning", 2)
    folder.pictures.wait()
    return folder


def write_evaluation(run: Path, name: str, scores: list[float]) -> None:
    row = {"question": "?", "answer": "a", "text": "a", "groups": {"skill": "sums"}}
    write_json(run / "eval" / f"{name}.json", {"name": name, "score": 0.5})
    write_jsonl(
        run / "eval" / f"{name}.jsonl", [{"question_id": str(i), "score": s, **row} for i, s in enumerate(scores)]
    )


def test_the_statistics_of_a_run(tmp_path):
    make_run(tmp_path / "run", beta=0.03)
    # base 0 1 0 0, final 1 1 0 1: differences 1 0 0 1, mean 0.5, variance (4 x 0.25) / 3, standard error sqrt(1/12) = 0.2887
    write_evaluation(tmp_path / "run", "final", [1.0, 1.0, 0.0, 1.0])
    write_evaluation(tmp_path / "run", "base", [0.0, 1.0, 0.0, 0.0])
    document = build_document([tmp_path / "run"])
    json.dumps(document, allow_nan=False)
    [run] = document["runs"]
    assert (run["steps"], run["groups"], run["responses"], run["device"]) == (2, 4, 12, "a device")
    assert run["seconds"] == {"update": 4.0} and run["metrics"]["train/reward"] == [0.1, 0.2]
    assert {"key": "train.beta", "value": 0.03, "default": Recipe().train.beta} in run["recipe"]
    assert run["warnings"] == [{"step": 2, "text": "a warning"}] and run["skills"] == ["sums", "words"]
    base, final = run["evaluations"]
    assert (base["name"], base["score"], base["paired"]) == ("base", 0.25, None)
    assert final["paired"]["difference"] == 0.5 and final["paired"]["questions"] == 4
    assert final["paired"]["low"] == pytest.approx(0.5 - 1.959964 * 0.288675, abs=1e-5)
    assert final["groups"]["skill"]["sums"]["score"] == 0.75

    # A step has student_prob 0.95 0.35 0.95 of the student and 0.05 0.85 0.15 of teachers.
    d = run["discriminator"]
    last = d["calibration"][-1]
    assert (last["low"], last["n"], last["student_share"]) == (0.9, 4, 1.0) and last["predicted"] == pytest.approx(0.95)
    assert [(b["low"], b["n"]) for b in d["calibration"]] == [(0.0, 2), (0.1, 2), (0.3, 2), (0.8, 2), (0.9, 4)]
    assert d["confident_and_wrong"] in (["0-2-0/3"], ["0-1-0/3"])  # 0.85 of a teacher is farther from 0.5 than 0.35
    assert d["length_unit"] == "tokens" and len(d["length"]) == 12 and d["over_time"]["accuracy"] == [0.5, 0.5]

    student, a, b = run["teachers"]
    # Rewards in "seen": student 0 + 1 and 1 + 0, a 1 + 1, b 0: a wins. In "told" a's reward is unknown: the student wins.
    assert (student["responses"], student["right"], student["wins"], student["positive_advantage"]) == (
        6,
        1 / 3,
        0.5,
        0.0,
    )
    assert (a["right"], a["wins"], a["positive_advantage"], a["skills"]) == (
        1.0,
        0.5,
        0.5,
        {"sums": {"n": 2, "right": 1.0}},
    )
    assert (b["right"], b["wins"]) == (0.0, 0.0)

    # The judge calls "6" wrong, the rule right. The other verdict on a known response agrees with the rule.
    audit = run["audit"]
    assert audit["sample_total"] == 10 and len(set(audit["sample"])) == 10  # two verdicts are unknown
    [found] = audit["disagreements"]
    assert found == {"member": found["member"], "judge": 0.0, "rule": 1.0, "rule_name": "auto"}
    assert found["member"] in ("0-1-1/0", "0-2-1/0")


def test_a_group_of_the_document(tmp_path):
    make_run(tmp_path / "run", text=HOSTILE)
    document = build_document([tmp_path / "run"])
    assert "<script>alert" not in render_page(document)
    group = document["groups"][0]
    assert (group["id"], group["truths"], group["rule"], group["skill"]) == ("0-1-0", ["4"], "auto", "sums")
    assert group["flags"] == ["d_fooled", "d_judge_disagree", "mixed"]
    [name] = group["images"]
    picture = document["images"][name]
    assert (picture["width"], picture["height"], picture["name"]) == (400, 300, "four.png")
    assert picture["thumb"].startswith("data:image/webp;base64,") and picture["full"] != picture["thumb"]
    assert group["members"][0]["text"] == HOSTILE.replace("\ud800", "?") and group["members"][0]["learned"] == len(
        HOSTILE
    )
    assert "zero_advantage" in document["groups"][1]["flags"] and "verdict_unknown" in document["groups"][1]["flags"]


def test_two_runs_are_compared_on_the_same_questions(tmp_path):
    for name, beta in (("one", 0.01), ("two", 0.02)):
        make_run(tmp_path / name, beta=beta)
        write_evaluation(tmp_path / name, "final", [1.0, 0.0, 1.0, 0.0] if name == "one" else [1.0, 1.0, 1.0, 0.0])
    document = build_document([tmp_path / "one", tmp_path / "two"], groups=3)
    assert [run["name"] for run in document["runs"]] == ["one", "two"]
    assert {"key": "train.beta", "values": [0.01, 0.02]} in document["comparison"]["recipe"]
    [paired] = document["comparison"]["paired"]
    assert (paired["a"], paired["b"], paired["difference"], paired["questions"]) == (0, 1, 0.25, 4)
    assert (document["shown"], document["total"]) == (6, 8) and [g["run"] for g in document["groups"]] == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    again = build_document([tmp_path / "one", tmp_path / "two"], groups=3)
    assert [g["id"] for g in again["groups"]] == [g["id"] for g in document["groups"]]  # seeded


def test_groups_of_the_first_and_last_step_come_first_then_every_flag():
    records = [
        Record(f"0-{s}-{p}", s, 100 * s + p, ("cut",) if s == 5 else ()) for s in range(1, 10) for p in range(10)
    ]
    order = chosen(records, must=["0-7-7", "0-99-0"], per=2)
    assert order[:7] == ["0-1-0", "0-1-1", "0-9-0", "0-9-1", "0-5-0", "0-5-1", "0-7-7"]
    assert len(order) == len(set(order)) == 90


def test_a_page_stays_within_its_size(tmp_path):
    make_run(tmp_path / "run", steps=6, text="x" * 50_000)
    whole = build_document([tmp_path / "run"], groups=None, most_bytes=None)
    assert whole["shown"] == 12 and whole["groups"][0]["members"][0]["cut"] == 46_000
    limit = len(render_page(whole).encode()) - 15_000
    small = build_document([tmp_path / "run"], most_bytes=limit)
    assert 0 < small["shown"] < 12 and small["total"] == 12 and len(render_page(small).encode()) <= limit
    shown = {g["id"] for g in small["groups"]}
    assert all(member.partition("/")[0] in shown for member in small["runs"][0]["audit"]["sample"])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 0, None, None), (9, 10, 0.5958, 0.9821), (10, 10, 0.7225, 1.0)]
)
def test_wilson(right, n, low, high):  # values of R's binom.confint(method="wilson")
    found = wilson(right, n)
    assert (found is None) if n == 0 else found == pytest.approx((low, high), abs=1e-4)


def test_a_sample_does_not_depend_on_the_order():
    forward, backward = Sample(5, 1), Sample(5, 1)
    for i in range(100):
        forward.add(str(i), i)
        backward.add(str(99 - i), 99 - i)
    assert forward.items() == backward.items() and forward.total == 100 and len(forward.items()) == 5


def ticks_of(document, right: int, part: str = "sample"):
    groups = {g["id"]: g for g in document["groups"]}
    for number, member in enumerate(document["runs"][0]["audit"]["sample"]):
        group, index = groups[member.split("/")[0]], int(member.split("/")[1])
        about = {"run": "run", "member": member, "question_id": group["question_id"], "part": part}
        yield {**about, "source": group["members"][index]["source"], "tick": "right" if number < right else "wrong"}


def test_ticks_are_folded_in_with_an_interval(tmp_path):
    make_run(tmp_path / "run")
    ticks = list(ticks_of(build_document([tmp_path / "run"]), 9))
    stale = {**ticks[0], "member": "0-1-0/77"}
    other = {**ticks[0], "part": "disagreements"}  # the last tick of a member counts
    write_jsonl(tmp_path / "ticks.jsonl", [*ticks, stale, other])
    found = build_document([tmp_path / "run"], ticks=tmp_path / "ticks.jsonl")["runs"][0]["audit"]["ticks"]
    assert (found["right"], found["wrong"], found["agreement"]) == (8, 1, 8 / 9)
    assert (found["low"], found["high"]) == pytest.approx((0.5650, 0.9801), abs=1e-4)
    assert found["disagreements"] == {"right": 1, "wrong": 0} and found["unused"] == 1


def test_ticks_of_another_run_are_refused(tmp_path):
    make_run(tmp_path / "run", steps=1)
    write_jsonl(
        tmp_path / "ticks.jsonl",
        [{"run": "else", "member": "0-1-0/0", "question_id": "seen", "source": "a", "tick": "right"}],
    )
    with pytest.raises(DataError, match=r"ticks\.jsonl.*else"):
        build_document([tmp_path / "run"], ticks=tmp_path / "ticks.jsonl")
    (tmp_path / "ticks.jsonl").write_text('\n{"run": 1}\n')
    with pytest.raises(DataError, match=r"ticks\.jsonl:2: expected a tick"):
        build_document([tmp_path / "run"], ticks=tmp_path / "ticks.jsonl")


def test_runs_of_the_first_version_open(tmp_path):
    folder = make_run(tmp_path / "run")
    write_jsonl(tmp_path / "train.jsonl", [
        {"id": "seen", "question": "2 + 2?", "answer": "4", "skill": "sums", "images": ["four.png"]},
        {"id": "told", "question": "3 + 3?", "answer": "6", "skill": "words"},
    ])  # fmt: skip
    recipe = Recipe.model_validate({"data": {"train": [str(tmp_path / "train.jsonl")]}})
    save_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    new = ("schema", "group", "choices", "answers", "rule", "metadata", "image_hashes", "extracted", "learned", "judged",
           "explanation", "cause", "rule_score")  # fmt: skip
    for path in folder.rollouts_path.iterdir():
        write_jsonl(path, [{k: v for k, v in row.items() if k not in new} for row in read_jsonl(path)])
    document = build_document([tmp_path / "run"])
    group = document["groups"][0]
    assert group["skill"] == "sums" and group["members"][1]["extracted"] == "5" and len(group["images"]) == 1
    assert document["runs"][0]["audit"]["disagreements_total"] == 1  # the rule of the question file
    (tmp_path / "train.jsonl").unlink()
    document = build_document([tmp_path / "run"])
    assert document["groups"][0]["skill"] is None and document["runs"][0]["audit"]["disagreements"] == []


def test_the_command(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", str(tmp_path / "run"), "--groups", "3"]) == 0
    assert "showing 3 of 4 groups" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Content-Security-Policy" in page and '"openril.report/1"' in page
    assert main(["report", str(tmp_path / "run"), "--all", "--out", str(tmp_path / "page.html")]) == 0
    assert "showing 4 of 4 groups" in capsys.readouterr().out and (tmp_path / "page.html").exists()


def test_mistakes(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    folder = make_run(tmp_path / "runs" / "run")
    for wrong, said in (
        (tmp_path / "none", "got nothing"),
        (tmp_path / "runs", "runs/run"),
        (tmp_path / "runs" / "four.png", "got a file"),
    ):
        assert main(["report", str(wrong)]) == 2
        assert said in (problem := capsys.readouterr().err) and str(wrong) in problem
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "first step" in capsys.readouterr().err
    RunFolder(tmp_path / "empty").log_metrics({"step": 1})  # a run without rollouts yet
    assert main(["report", str(tmp_path / "empty")]) == 0
    assert "showing 0 of 0 groups" in capsys.readouterr().out
    with open(folder.rollouts_path / "step_000002.jsonl", "a") as file:
        file.write('{"step": 2, "que')
    assert main(["report", str(folder.path)]) == 2
    assert "step_000002.jsonl:7" in capsys.readouterr().err
    assert main(["report"]) == 2 and main(["report", str(folder.path), "--groups", "0"]) == 2


def test_a_mistake_in_the_page_does_not_stop_training(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    said: list[str] = []
    report = TrainingReport(folder.path, 2, said.append)
    report.step(1)
    assert not (folder.path / "report.html").exists()
    with open(folder.rollouts_path / "step_000002.jsonl", "a") as file:
        file.write("broken")
    report.step(2)
    assert (folder.path / "report.html").exists() and "step_000002.jsonl:7" in said[0]  # the line is left out
    monkeypatch.setattr("openril.stages.report.render_page", lambda document: 1 / 0)
    assert report.write() == "" and "ZeroDivisionError" in said[-1]
