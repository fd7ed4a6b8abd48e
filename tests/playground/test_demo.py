"""The demo: its recipes, its commands, its report, and all of it end to end on tiny models."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# isort: split
import torch
from rich.console import Console

from openril.errors import DataError, ModelError, RecipeError
from openril.recipe.loading import load_recipe
from openril.records import ImageSource, Question
from openril.storage import read_jsonl, write_json, write_jsonl
from playground.demo import Settings, plan, prepare, run_demo, write_recipe
from playground.demo_report import (
    ShownGroup,
    derivation_shares,
    group_text,
    own_agreement,
    pick,
    read_evaluation,
)
from playground.models.plan import DIFFICULTY
from playground.models.shipped import find_models
from playground.world import SKILLS
from support.playground_models import tiny_playground
from support.waiting import wait_until


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_playground(tmp_path_factory.mktemp("playground"))


SMALL = {"num_train": 28, "num_validation": 14, "num_test": 14}
FEW_STEPS = (
    "train.max_steps=3", "train.questions_per_step=4", "train.eval_every=2", "train.save_every=1",
    "train.max_completion_length=8", "collect.num_responses=4", "collect.max_completion_length=8", "eval.limit=14",
    "eval.max_completion_length=8", "discriminator.pretraining.save_every=1",
)  # fmt: skip

# Models


def test_missing_models_are_named(tmp_path, models):
    with pytest.raises(ModelError, match=r"(?s)student_internvl.*judge.*make playground"):
        find_models("internvl", tmp_path)
    (models / "judge" / "agreement.json").rename(tmp_path / "agreement.json")
    with pytest.raises(ModelError, match=r"judge/agreement\.json"):
        find_models("qwen", models)
    (tmp_path / "agreement.json").rename(models / "judge" / "agreement.json")


def test_students_are_found_warm_started_or_alone(tmp_path, models):
    assert find_models("qwen", models)["student"] == models / "student_qwen" / "sft"
    (tmp_path / "student_qwen").mkdir()
    (tmp_path / "student_qwen" / "config.json").write_text("{}")
    for name in ("teacher_a", "teacher_b", "judge"):
        (tmp_path / name).symlink_to(models / name)
    assert find_models("qwen", tmp_path)["student"] == tmp_path / "student_qwen"


@pytest.mark.parametrize("student", ["qwen", "internvl"])
def test_ready_made_models_load(student):
    from openril.models.loading import load_model, load_processor
    from openril.sampling.greedy_batch import GreedyDecoder

    found = find_models(student)
    for name in ("student", "teacher_a", "teacher_b"):
        load_model(str(found[name]), what=name)
        load_processor(str(found[name]), what=name)
    GreedyDecoder.from_checkpoint(found["judge"])
    assert json.loads((found["judge"] / "agreement.json").read_text())["agreement"] > 0.9


# Recipes and commands


def test_questions_are_as_difficult_as_the_models_know_them():
    assert tuple(Settings().difficulty) == DIFFICULTY


def test_recipes_are_moved_to_the_chosen_folder(tmp_path):
    out = tmp_path / "elsewhere"
    recipe = write_recipe("dr_grpo", Settings(out, seed=7, overrides=("train.max_steps=3",)))
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


def test_a_folder_with_other_settings_is_refused(tmp_path, models):
    prepare(Settings(tmp_path, models=models, **SMALL))
    before = (tmp_path / "world" / "train.jsonl").stat().st_mtime_ns
    with pytest.raises(RecipeError, match=r"seed \(was 0, now 1\).*--out"):
        prepare(Settings(tmp_path, models=models, seed=1, **SMALL))
    prepare(Settings(tmp_path, models=models, **SMALL))
    assert (tmp_path / "world" / "train.jsonl").stat().st_mtime_ns == before


def test_every_skill_gets_equally_many_test_questions(tmp_path, models):
    with pytest.raises(DataError, match=r"num-test.*14.*100"):
        prepare(Settings(tmp_path, models=models, num_test=100))


def test_dr_grpo_trains_while_responses_are_collected(tmp_path, models):
    jobs = {job.name: job for job in plan(tmp_path, prepare(Settings(tmp_path, models=models, **SMALL)))}
    assert list(jobs)[:2] == ["collect", "dr_grpo train"]
    assert jobs["dr_grpo train"].needs == ()
    assert jobs["ril train"].needs == ("ril discriminator",)
    assert jobs["ril discriminator"].needs == ("collect",)
    assert jobs["verdicts"].needs == ("collect",)
    assert jobs["verdicts"].shown == f"ril collect {tmp_path}/recipes/ril_plus.yaml"
    assert jobs["rejection_sampling train"].needs == ("verdicts",)
    assert jobs["dr_grpo train"].shown == f"ril train {tmp_path}/recipes/dr_grpo.yaml"
    assert len(jobs) == 12  # A collection, its verdicts, a discriminator, four trainings, five evaluations.
    assert jobs["collect"].progress() == (0, 672, "responses")  # 28 questions x 8 responses x 3 sources


# Report


def test_share_of_derivations_is_of_the_students_samples(tmp_path):
    rows = [("student", "red"), ("student", "see a; answer = red"), ("teacher_a", "so the answer is red.")]
    write_jsonl(tmp_path / "rollouts" / "step_000004.jsonl", [{"source": s, "text": t} for s, t in rows])
    assert derivation_shares(tmp_path) == ([4], [0.5])


def test_agreement_counts_verdicts_of_the_judge():
    questions = {"q": Question("q", "?", "red", rule="exact")}
    # Two agree and are the same response; one is called right and is not; unknown and empty ones do not count.
    given = [("red", 1.0), ("red", 1.0), ("blue", 1.0), ("green", None), ("", 0.0)]
    rows = [{"question_id": "q", "text": text, "verdict": verdict} for text, verdict in given]
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
    assert read_evaluation(tmp_path, "ril", ["a"]) is None  # Not finished.
    write_json(folder / "final.json", {})
    assert read_evaluation(tmp_path, "ril", ["a", "b"]) is None
    assert read_evaluation(tmp_path, "ril", ["a"]).summary.score == 1.0


EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[2J'


def evil_group() -> ShownGroup:
    row = {
        "question_id": "q", "step": 1, "source": "student", "text": EVIL, "student_prob": 0.25, "similarity": 1.0,
        "verdict": 0.0, "advantage": -0.5,
    }  # fmt: skip
    question = Question("q", f"what? {EVIL}", EVIL, choices=(EVIL,), rule="exact", metadata={"skill": EVIL})
    return ShownGroup(1, question, ("world/images/a b.png",), (row,))


def test_nothing_a_model_writes_steers_the_terminal():
    text = group_text(evil_group())
    assert "\x1b" not in text
    assert "0.25        0  right      -0.50  <script>" in text


def test_groups_with_the_most_outcomes_are_shown_one_a_skill(tmp_path):
    outcomes = [("dull", 0), ("dull", 0), ("mixed", 0), ("mixed", 1), ("other", 1)]
    rows = [
        {"question_id": question, "step": 1, "source": "student", "verdict": verdict, "similarity": None}
        for question, verdict in outcomes
    ]
    picture = ImageSource(path=tmp_path / "world" / "images" / "p.png")
    skills = {"dull": "charts", "mixed": "charts", "other": "open"}
    questions = {i: Question(i, "?", "x", (picture,), metadata={"skill": s}) for i, s in skills.items()}
    shown = pick(tmp_path, rows, questions)
    assert [group.question.id for group in shown] == ["mixed", "other"]
    assert shown[0].pictures == ("world/images/p.png",)


# End to end


@pytest.mark.slow
def test_the_whole_demo_killed_once_and_its_first_steps_again(tmp_path, models, capsys):
    out, again = tmp_path / "demo", tmp_path / "again"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    arguments = ["--out", str(out), "--models", str(models), *flags, "--overrides", *FEW_STEPS]
    killed = subprocess.Popen([sys.executable, "-m", "playground.demo", *arguments], stdout=subprocess.DEVNULL)
    # In the middle of Dr.GRPO's training.
    wait_until(lambda: len(read_jsonl(out / "dr_grpo" / "metrics.jsonl")) >= 1, 100)
    killed.send_signal(signal.SIGKILL)
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
    assert all(f'"name":"{run}"' in (out / "report.html").read_text() for run in ("dr_grpo", "ril_plus", "ril"))
    assert "first step (1)" in (out / "groups.txt").read_text()
    assert "last step (3)" in (out / "groups.txt").read_text()
    # The judge of this test calls everything right.
    own = summary["judge"]["this_run"]
    assert own["num_verdicts"] > 0 and own["false_positive_rate"] == 1.0

    # Nothing is left to do, and looking again takes no minutes.
    def left() -> list[str]:
        return [job.name for job in plan(out, prepare(settings)) if job.seconds() is None]

    assert left() == []
    assert run_demo(settings)["minutes"] == summary["minutes"]
    (out / "ril_plus" / "eval" / "final.json").unlink()
    assert left() == ["ril_plus eval"]

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
    torch.set_num_threads(1)  # As the commands have.
    try:
        for stage in (run_collect, run_discriminator, run_train):
            stage(recipe, Console(quiet=True))
    finally:
        torch.set_num_threads(threads)


def steady(path: Path) -> list[dict]:
    """Return the rows of metrics without what the clock and the caches decide."""
    varying = ("time/", "memory/", "reward/judge_")
    return [
        {k: v for k, v in row.items() if not k.startswith(varying) and not k.endswith("seconds")}
        for row in read_jsonl(path)
    ]


def check_schema(summary: dict) -> None:
    assert set(summary) >= {"contenders", "seeds", "minutes", "judge_agreement"}
    assert list(summary["contenders"]) == ["sft", "dr_grpo", "rejection_sampling", "ril", "ril_plus"]
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
