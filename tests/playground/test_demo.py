"""The demo: its recipes and models, its jobs, what it concludes, and all of it end to end on tiny models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# isort: split
import torch
from rich.console import Console

from openril.errors import DataError, ModelError, OpenRILError, RecipeError
from openril.recipe.loading import load_recipe
from openril.records import ImageSource, Question
from openril.storage import read_jsonl, write_json, write_jsonl
from playground.commands import Command, run_lanes, run_queue
from playground.demo import RECIPES, SOURCES, Settings, prepare, run_demo, write_recipe
from playground.demo_jobs import Board, Clock, Job, plan
from playground.demo_report import NOTES, ShownGroup, group_text, page, pick
from playground.demo_results import (
    CONTENDERS,
    derivation_shares,
    own_agreement,
    read_evaluation,
)
from playground.models.build import Settings as BuildSettings
from playground.models.build import build, file_texts
from playground.models.plan import DIFFICULTY
from playground.models.shipped import WEIGHTS, find_models
from playground.world import SKILLS
from support.playground_models import tiny_playground

# Building blocks


def test_lanes_run_in_order_and_write_logs(tmp_path):
    (tmp_path / "note.json").write_text('{"a": 1}')
    said = []
    commands = [Command(f"look {i}", ("json.tool", str(tmp_path / "note.json"))) for i in (1, 2)]
    run_lanes([commands, []], tmp_path / "logs", said.append)
    assert json.loads((tmp_path / "logs" / "look_2.log").read_text()) == {"a": 1}
    assert [line.split(":")[0].strip() for line in said if "done" in line] == ["look 1", "look 2"]


def test_failed_command_is_named_with_the_end_of_its_log(tmp_path):
    with pytest.raises(OpenRILError, match=r"(?s)broken failed with exit code .*No such file.*broken\.log"):
        run_lanes([[Command("broken", ("json.tool", str(tmp_path / "missing.json")))]], tmp_path, lambda line: None)


def test_a_queue_starts_what_waits_for_nothing_first(tmp_path):
    (tmp_path / "note.json").write_text("{}")
    look = ("json.tool", str(tmp_path / "note.json"))
    said = []
    commands = [
        Command("last", look, after=("first", "second", "of another day")),
        Command("first", look),
        Command("second", look, after=("first",)),
    ]
    run_queue(commands, tmp_path / "logs", said.append, width=2)
    assert [line.split(":")[0].strip() for line in said if "done" in line] == ["first", "second", "last"]


def test_no_command_outlives_a_killed_demo(tmp_path):
    script = f"""
from pathlib import Path
from playground.commands import Command, run_queue
run_queue([Command("sleep", ("asyncio",))], Path({str(tmp_path)!r}), print)
"""
    # `python -m asyncio` waits on its input, a pipe that stays open.
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    child = _first_child(parent.pid)
    parent.kill()
    parent.wait()
    _wait_until(lambda: not _alive(child), 10, "the command lives on")


def _first_child(pid: int) -> int:
    found: list[int] = []

    def look() -> bool:
        found[:] = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return bool(found)

    _wait_until(look, 20, "no command was started")
    return found[0]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(true, seconds: float, complaint: str) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, complaint
        time.sleep(0.05)


def test_minutes_are_added_over_calls_and_not_between_them(tmp_path):
    now = 100.0
    first = Clock(tmp_path / "clock.json", lambda: now)
    now = 130.0
    first.tick()
    now = 131.5  # killed before the next tick
    now = 500.0
    second = Clock(tmp_path / "clock.json", lambda: now)
    now = 512.0
    second.tick()
    assert second.seconds == 42.0
    third = Clock(tmp_path / "clock.json", lambda: now)
    third.stop()
    now = 900.0
    third.tick()
    assert Clock(tmp_path / "clock.json", lambda: now).seconds == 42.0


def test_time_left_follows_the_pace(tmp_path):
    def job(title: str, cost: float, done: int) -> Job:
        return Job(Command(title, ("x",)), cost, 10, lambda: (done, ""))

    board = Board([job("a", 30, 0), job("b", 10, 5)], Clock(tmp_path / "c.json"), Console(file=None, quiet=True), 2)
    # a: 20 of 30 done; b was and is half done. Left: 10 + 5, at 20 in 40 seconds.
    assert board.left({"a": 2 / 3}, 40.0) == pytest.approx(30.0)
    assert board.left({}, 40.0) is None


# Models and recipes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_playground(tmp_path_factory.mktemp("playground"))


SMALL = {"num_train": 28, "num_validation": 14, "num_test": 14}
FEW_STEPS = (
    "train.max_steps=3", "train.questions_per_step=4", "train.eval_every=2", "train.save_every=1",
    "train.max_completion_length=8", "collect.num_responses=4", "collect.max_completion_length=8", "eval.limit=14",
    "eval.max_completion_length=8", "discriminator.pretraining.save_every=1",
)  # fmt: skip


def test_missing_models_are_named_with_the_cure(tmp_path, models):
    with pytest.raises(ModelError, match=r"(?s)no .*student_internvl, no .*judge; .*make playground"):
        find_models("internvl", tmp_path)
    (models / "judge" / "agreement.json").rename(tmp_path / "agreement.json")
    with pytest.raises(ModelError, match=r"models are missing: no .*judge/agreement\.json; train"):
        find_models("qwen", models)
    (tmp_path / "agreement.json").rename(models / "judge" / "agreement.json")


def test_students_are_found_warm_started_or_as_the_package_has_them(tmp_path, models):
    assert find_models("qwen", models)["student"] == models / "student_qwen" / "sft"
    (tmp_path / "student_qwen").mkdir()
    (tmp_path / "student_qwen" / "config.json").write_text("{}")
    for name in ("teacher_a", "teacher_b", "judge"):
        (tmp_path / name).symlink_to(models / name)
    assert find_models("qwen", tmp_path)["student"] == tmp_path / "student_qwen"


@pytest.mark.parametrize("student", ["qwen", "internvl"])
def test_the_package_comes_with_models_that_load(student):
    from openril.models.loading import load_model, load_processor
    from openril.sampling.greedy_batch import GreedyDecoder

    found = find_models(student)
    for name in ("student", "teacher_a", "teacher_b"):
        load_model(str(found[name]), what=name)
        load_processor(str(found[name]), what=name)
    GreedyDecoder.from_checkpoint(found["judge"])
    assert json.loads((found["judge"] / "agreement.json").read_text())["agreement"] > 0.9
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 12e6


def test_questions_are_as_hard_as_the_models_know_them():
    assert tuple(Settings().difficulty) == DIFFICULTY


def test_recipes_are_moved_to_the_folder_asked_for(tmp_path):
    out = tmp_path / "elsewhere"
    settings = Settings(out, seed=7, overrides=("train.max_steps=3",))
    recipe = write_recipe("dr_grpo", settings)
    assert recipe == load_recipe(out / "recipes" / "dr_grpo.yaml")
    assert (recipe.run_path, recipe.cache_path) == (out / "dr_grpo", out / "ril" / "responses")
    assert recipe.data.train == [str(out / "world" / "train.jsonl")]
    assert recipe.student.model == str(out / "models" / "student")
    assert recipe.judge.model_path == str(out / "models" / "judge")
    assert [t.model_path for t in recipe.teachers] == [str(out / "models" / f"teacher_{x}") for x in "ab"]
    assert (recipe.seed, recipe.train.max_steps, recipe.train.algorithm) == (7, 3, "dr_grpo")


def test_a_recipe_that_was_changed_by_hand_stays(tmp_path):
    settings = Settings(tmp_path)
    write_recipe("ril", settings)
    path = tmp_path / "recipes" / "ril.yaml"
    path.write_text(path.read_text().replace("beta: 0.01", "beta: 0.5"))
    assert write_recipe("ril", settings).train.beta == 0.5


def test_another_demo_is_not_mixed_in(tmp_path, models):
    prepare(Settings(tmp_path, models=models, **SMALL))
    before = (tmp_path / "world" / "train.jsonl").stat().st_mtime_ns
    with pytest.raises(RecipeError, match=r"other settings \(seed was 0, now 1\); name another folder with --out"):
        prepare(Settings(tmp_path, models=models, seed=1, **SMALL))
    prepare(Settings(tmp_path, models=models, **SMALL))
    assert (tmp_path / "world" / "train.jsonl").stat().st_mtime_ns == before


def test_every_skill_gets_equally_many_test_questions(tmp_path, models):
    with pytest.raises(DataError, match="num_test is 100; a multiple of 14"):
        prepare(Settings(tmp_path, models=models, num_test=100))


def test_dr_grpo_trains_while_responses_are_collected(tmp_path, models):
    jobs = plan(tmp_path, prepare(Settings(tmp_path, models=models, **SMALL)))
    commands = {job.command.title: job.command for job in jobs}
    assert list(commands)[:2] == ["collect", "dr_grpo train"]
    assert commands["dr_grpo train"].after == ()
    assert commands["ril train"].after == ("ril discriminator", "collect")
    assert commands["dr_grpo train"].shown == f"ril train {tmp_path}/recipes/dr_grpo.yaml"
    assert len(commands) == 10  # a collection, two discriminators, three trainings, four evaluations
    # 28 questions x 8 responses x 3 sources
    assert jobs[0].total == 672


# What it concludes


def test_the_page_names_the_one_teacher_of_the_recipe():
    recipe = load_recipe(RECIPES / SOURCES["ril_one"])
    assert recipe.train.teachers == ["teacher_b"]
    assert "one teacher is B" in NOTES


def test_share_of_derivations_is_of_the_students_samples(tmp_path):
    rows = [("student", "red"), ("student", "see a; answer = red"), ("teacher_a", "so the answer is red.")]
    write_jsonl(tmp_path / "rollouts" / "step_000004.jsonl", [{"source": s, "text": t} for s, t in rows])
    assert derivation_shares(tmp_path) == ([4], [0.5])


def test_agreement_counts_verdicts_that_were_given():
    questions = {"q": Question("q", "?", "red", rule="exact")}

    def row(text: str, verdict: float | None) -> dict:
        return {"question_id": "q", "text": text, "verdict": verdict}

    # Two agree and are the same response; one is called right and is not; unknown and empty ones do not count.
    rows = [row("red", 1.0), row("red", 1.0), row("blue", 1.0), row("green", None), row("", 0.0)]
    assert own_agreement(rows, questions) == {
        "agreement": 2 / 3,
        "num_verdicts": 3,
        "distinct_agreement": 1 / 2,
        "num_distinct": 2,
        "false_positive_rate": 1.0,
        "false_negative_rate": 0.0,
    }
    assert own_agreement([], questions)["agreement"] is None


def test_an_evaluation_on_other_questions_does_not_count(tmp_path):
    row = {"question_id": "a", "question": "?", "answer": "x", "text": "x", "score": 1.0, "groups": {"skill": "charts"}}
    folder = tmp_path / "ril" / "eval"
    write_jsonl(folder / "final.jsonl", [{"key": "1"}, row])
    assert read_evaluation(tmp_path, "ril_both", ["a"]) is None  # not finished
    write_json(folder / "final.json", {})
    assert read_evaluation(tmp_path, "ril_both", ["a", "b"]) is None
    assert read_evaluation(tmp_path, "ril_both", ["a"]).summary.score == 1.0


EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[2J'


def evil_group() -> ShownGroup:
    row = {
        "question_id": "q", "step": 1, "source": "student", "text": EVIL, "student_prob": 0.25, "similarity": 1.0,
        "verdict": 0.0, "advantage": -0.5,
    }  # fmt: skip
    question = Question("q", f"what? {EVIL}", EVIL, choices=(EVIL,), rule="exact", metadata={"skill": EVIL})
    return ShownGroup(1, question, ("world/images/a b.png",), (row,))


def a_summary() -> dict:
    skills = dict.fromkeys(SKILLS, 0.5)
    gain = {"over": "dr_grpo", "difference": 0.051, "stderr": 0.02}
    contender = {"mean": 0.5, "stderr": 0.02, "skills": skills, "title": "x", "gain": gain}
    own = {"agreement": None, "num_verdicts": 0, "distinct_agreement": None, "num_distinct": 0}
    return {
        "contenders": dict.fromkeys(CONTENDERS, contender),
        "test_questions": 14,
        "minutes": 1.0,
        "judge": {"held_out": {"agreement": 0.99, "num_verdicts": 100}, "this_run": own},
        "teachers": {name: {"mean": 0.5, "skills": skills} for name in ("teacher_a", "teacher_b")},
        "training": {"ril_both": {"answer reward": {"first": 0.1, "last": 0.9}}},
    }


def test_nothing_a_model_writes_becomes_markup():
    text = page(a_summary(), [("last step (1)", [evil_group()])])
    assert "<script" not in text and "<img src=x" not in text
    # Question, choice, truth, skill and response.
    assert text.count("&lt;script&gt;") == 5
    assert 'http-equiv="Content-Security-Policy" content="default-src &#x27;none&#x27;' in text
    assert 'src="world/images/a%20b.png"' in text
    assert "+5.1 ± 2.0" in text


def test_nothing_a_model_writes_steers_the_terminal():
    text = group_text(evil_group())
    assert "\x1b" not in text
    assert "0.25        0  right      -0.50  <script>" in text


def test_groups_with_the_most_outcomes_are_shown_one_a_skill(tmp_path):
    def row(question: str, source: str, verdict: float) -> dict:
        return {"question_id": question, "step": 1, "source": source, "verdict": verdict, "similarity": None}

    rows = [
        row("dull", "student", 0),
        row("dull", "student", 0),
        row("mixed", "student", 0),
        row("mixed", "student", 1),
    ]
    rows += [row("other", "student", 1)]
    picture = ImageSource(path=tmp_path / "world" / "images" / "p.png")
    skills = {"dull": "charts", "mixed": "charts", "other": "open"}
    questions = {i: Question(i, "?", "x", (picture,), metadata={"skill": s}) for i, s in skills.items()}
    shown = pick(tmp_path, rows, questions)
    assert [group.question.id for group in shown] == ["mixed", "other"]
    assert shown[0].pictures == ("world/images/p.png",)


# Texts for tokenizers


def test_words_of_the_texts_are_single_tokens(tmp_path):
    from openril.hf import AutoTokenizer

    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "question": "Which zebra is purple?"}) + "\n" for i in range(20))
    )
    folder = build(BuildSettings(tmp_path / "model", "qwen2", texts=[tmp_path / "questions.jsonl"], hidden_size=32))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer(" zebra purple")["input_ids"]) == 2


def test_tokenizers_learn_what_models_read_and_write_alone(tmp_path, models):
    prepare(Settings(tmp_path, models=models, **SMALL))
    path = tmp_path / "world" / "train.jsonl"
    row = next(r for r in read_jsonl(path) if "choices" in r)
    write_jsonl(path, [row])
    derivations = [row[f"derivation_{style}"] for style in "abc"]
    assert sorted(file_texts(path)) == sorted(
        [row["question"], row["answer"], row["direct_answer"], *row["choices"], *derivations]
    )


# End to end


@pytest.mark.slow
def test_the_whole_demo_killed_once_and_its_first_steps_again(tmp_path, models, capsys):
    out, again = tmp_path / "demo", tmp_path / "again"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    arguments = ["--out", str(out), "--models", str(models), *flags, "--overrides", *FEW_STEPS]
    killed = subprocess.Popen([sys.executable, "-m", "playground.demo", *arguments], stdout=subprocess.DEVNULL)
    # In the middle of Dr.GRPO's training.
    _wait_until(lambda: len(read_jsonl(out / "dr_grpo" / "metrics.jsonl")) >= 1, 100, "no training began")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    so_far = json.loads((out / "clock.json").read_text())["seconds"]

    settings = Settings(out, models=models, overrides=FEW_STEPS, **SMALL)
    summary = run_demo(settings)
    assert json.loads((out / "summary.json").read_text()) == summary
    check_schema(summary)
    assert summary["minutes"] * 60 > so_far
    assert "by skill" in capsys.readouterr().out
    for name in ("curves.png", "report.html", "groups.txt"):
        assert (out / name).stat().st_size > 1000
    assert "first step (1)" in (out / "groups.txt").read_text()
    assert "last step (3)" in (out / "groups.txt").read_text()
    # The judge of this test calls everything right.
    own = summary["judge"]["this_run"]
    assert own["num_verdicts"] > 0 and own["false_positive_rate"] == 1.0

    # Nothing is left to do, and looking again takes no minutes.
    assert plan(out, prepare(settings)) == []
    assert run_demo(settings)["minutes"] == summary["minutes"]
    (out / "ril_one" / "eval" / "final.json").unlink()
    assert [job.command.title for job in plan(out, prepare(settings))] == ["ril_one eval"]

    # The same seed gives the same first steps.
    repeat_first_steps(Settings(again, models=models, overrides=FEW_STEPS, **SMALL))
    for name in ("metrics.jsonl", "discriminator/metrics.jsonl"):
        first, second = steady(out / "ril" / name), steady(again / "ril" / name)
        assert second and first[: len(second)] == second


def repeat_first_steps(settings: Settings) -> None:
    from openril.stages.collect import run_collect
    from openril.stages.discriminator import run_discriminator
    from openril.stages.train import run_train

    recipe = prepare(settings)["ril"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the commands have
    try:
        for stage in (run_collect, run_discriminator, run_train):
            stage(recipe, Console(quiet=True))
    finally:
        torch.set_num_threads(threads)


def steady(path: Path) -> list[dict]:
    """Rows of metrics without what the clock and the caches decide."""
    varying = ("time/", "memory/", "reward/judge_")
    return [
        {k: v for k, v in row.items() if not k.startswith(varying) and not k.endswith("seconds")}
        for row in read_jsonl(path)
    ]


def check_schema(summary: dict) -> None:
    assert set(summary) >= {"contenders", "seeds", "minutes", "judge_agreement"}
    assert list(summary["contenders"]) == ["sft", "dr_grpo", "ril_one", "ril_both"]
    for name, entry in summary["contenders"].items():
        assert set(entry) >= {"mean", "stderr", "skills"}
        assert list(entry["skills"]) == list(SKILLS)
        assert all(0.0 <= value <= 1.0 for value in [entry["mean"], *entry["skills"].values()])
        assert entry["mean"] == pytest.approx(sum(entry["skills"].values()) / 14)
        assert entry["stderr"] >= 0.0
        assert ("gain" in entry) is (name != "dr_grpo")
    assert summary["seeds"] == [0]
    assert isinstance(summary["minutes"], float)
    assert 0.0 <= summary["judge_agreement"] <= 1.0
