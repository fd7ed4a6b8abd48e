"""The comparison of recipes: its plan, its regimes, its costs, and a tiny one that is run, stopped and continued."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openril.cli import main as ril
from openril.errors import DataError, ModelError, StateError
from openril.records import Group, Question, Response, Rollout
from openril.responses.cache import ResponseCache
from openril.rewards import rules
from openril.storage import read_jsonl, write_json, write_jsonl
from playground.comparison.archive import bits, unbits
from playground.comparison.command import Comparison, Settings, main, mean_of_skills
from playground.comparison.costs import preparation, steps_of_equal_seconds
from playground.comparison.distillation import by_logits, divergence
from playground.comparison.lanes import Work, run_lanes
from playground.comparison.plan import (
    CONTENDERS,
    DISTILLATION,
    EVERYBODY,
    IN_REGIMES,
    ONE_TEACHER,
    PARTS,
    RATES,
    REGIMES,
    STUDENTS,
    WITH_SOME_TRUTH,
    WITHOUT_TRUTH,
    WITHOUT_VERDICTS,
    Cell,
    Rate,
    distillation,
    tuning,
)  # fmt: skip
from playground.comparison.plan import (
    regimes as planned_regimes,
)
from playground.comparison.recipes import Recipes
from playground.comparison.regimes import Regime, choose, erring, read_derivations, shuffled_sides, teachers_right
from playground.comparison.rubric import by_rubric, facts
from playground.comparison.tables import BLOCKS
from playground.models.shipped import WEIGHTS
from support.playground_models import tiny_playground


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    return Recipes(tmp_path, WEIGHTS, tmp_path / "world")


def test_every_contender_is_tuned_by_the_same_runs():
    runs = Counter((c.student, c.name) for c in tuning(STUDENTS, list(CONTENDERS)))
    assert set(runs.values()) == {len(RATES)}
    assert len({c.path for c in tuning(STUDENTS, list(CONTENDERS))}) == len(RATES) * len(CONTENDERS) * len(STUDENTS)


def test_no_tuning_run_reads_a_test_question(tmp_path: Path):
    comparison = Comparison(Settings(out=tmp_path))
    assert {c.split for c in comparison.cells("tuning")} == {"validation"}
    scored = [c for part in PARTS if part not in ("tuning", "seconds") for c in comparison.cells(part)]  # type: ignore[arg-type]
    assert {c.split for c in scored} == {"test"}
    assert len({c.path for c in scored}) == len(scored)
    assert 100 not in {c.seed for c in scored}  # the seed of the tuning


def test_a_rate_is_found_again_by_its_name():
    assert [Rate.of(r.name) for r in RATES] == list(RATES)
    falling = Rate(5e-4).settings()
    assert falling["train.optimizer.final_learning_rate"] == pytest.approx(5e-5)
    assert "train.optimizer.final_learning_rate" not in Rate(5e-4, falls=False).settings()


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_contender_is_its_recipe(name: str, recipes: Recipes):
    recipe = recipes.cell(Cell("student_qwen", name), Rate(5e-4))
    assert (recipe.rewards.answer.kind == "rules") == (name not in ("gail", "gad")) or recipe.train.algorithm == "gail"
    assert recipe.train.optimizer.learning_rate == 5e-4
    assert recipe.train.max_steps == 80
    expected = {"ril": (4, 4), "ril_plus": (8, 4), "rejection_sampling": (0, 12), "dr_grpo": (12, 0)}
    if name in expected:
        assert (recipe.train.num_generations, recipe.teacher_responses_per_question) == expected[name]


def test_a_question_without_truth_is_left_to_the_discriminator_alone(recipes: Recipes):
    with_d = recipes.cell(Cell("student_qwen", "ril_plus_d", regime="truth_30"), Rate(1.0))
    without = recipes.cell(Cell("student_qwen", "ril_plus", regime="truth_30"), Rate(1.0))
    assert with_d.rewards.answer.without_truth == "leave_out"
    assert Path(with_d.data.train[0]).name == "train_30.jsonl"
    assert Path(without.data.train[0]).name == "train_30_known.jsonl"


QUESTION = Question("q", "Which color?", "red", rule="auto")


def test_a_judge_errs_in_its_share_and_always_on_the_same_responses():
    texts = [f"It is red. {n}" for n in range(2000)]
    exact = [rules.score("auto", QUESTION, t) for t in texts]
    judged = [erring(rules.score, 0.25, 0)("auto", QUESTION, t) for t in texts]
    share = sum(a != b for a, b in zip(exact, judged, strict=True)) / len(texts)
    assert 0.22 < share < 0.28
    assert judged == [erring(rules.score, 0.25, 0)("auto", QUESTION, t) for t in texts]
    assert judged != [erring(rules.score, 0.25, 1)("auto", QUESTION, t) for t in texts]


@pytest.mark.parametrize(("share", "right"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_teachers_are_right_in_the_share_that_is_asked_for(share: float, right: int):
    responses = [Response("q", "a", i, "It is red." if i % 2 else "It is blue.") for i in range(8)]
    found = choose(QUESTION, responses, share, 4)
    assert len(found) == 4
    assert sum(r.text == "It is red." for r in found) == right


def test_teachers_that_are_never_right_stay_so():
    responses = [Response("q", "a", i, "It is blue.") for i in range(8)]
    assert len(choose(QUESTION, responses, 0.9, 4)) == 4


def test_shuffled_labels_are_the_same_number_and_follow_from_the_texts():
    group = Group(QUESTION, [Rollout(Response("q", "student" if i < 3 else "a", i, f"text {i}")) for i in range(6)])
    first, second = (shuffled_sides(None, group, torch.device("cpu")) for _ in range(2))  # type: ignore[arg-type]
    assert first.tolist() == second.tolist()
    assert int(first.sum()) == 3
    others = [Group(Question(f"q{n}", "?", "a"), group.rollouts) for n in range(20)]
    assert len({tuple(shuffled_sides(None, g, torch.device("cpu")).tolist()) for g in others}) > 5  # type: ignore[arg-type]


ROW = {
    "direct_answer": "7 cm",
    "derivation_a": "the red lines are 3 and 4 cm long. 3 plus 4 is 7. so the answer is 7 cm.",
    "derivation_b": "- red line 3 cm\n- 3 + 4 = 7\nanswer: 7 cm",
    "derivation_c": "see red line 3, then 3 + 4 = 7; answer = 7 cm",
}


def test_facts_are_what_all_styles_of_a_derivation_share():
    assert facts(ROW) == {"red", "line", "3", "4"}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3 and 4 on the red side. It is red.", 1.0),  # three of four facts, in other words
        ("Lines of 3 and 4, so it is red.", 1.0),  # the answer names a fact
        ("Lines. It is red.", 0.0),  # right, with two of four
        ("red line 3 4, answer: blue", 0.0),  # all facts, and wrong
    ],
)
def test_a_rubric_asks_for_the_answer_and_for_three_of_four_facts(text: str, right: float):
    assert by_rubric(rules.score, {"q": facts(ROW)})("auto", QUESTION, text) == right


def test_prism_is_two_runs_of_half_the_steps(recipes: Recipes):
    first, second = recipes.parts(Cell("student_qwen", "prism_like"), Rate(5e-4))
    assert first.train.max_steps == second.train.max_steps == 40
    assert first.uses_discriminator
    assert not second.uses_discriminator
    assert second.student.model == str(first.run_path / "student")
    assert second.train.optimizer.learning_rate == first.train.optimizer.learning_rate == 5e-4
    assert len(recipes.parts(Cell("student_qwen", "ril"), Rate(5e-4))) == 1


def test_all_text_first_and_then_ril_plus_on_what_has_truth(recipes: Recipes):
    cell = Cell("student_qwen", "sft_then_ril_plus", regime="truth_10")
    first, second = recipes.parts(cell, Rate(5e-4))
    assert [Path(r.data.train[0]).name for r in (first, second)] == ["train.jsonl", "train_10_known.jsonl"]
    assert (first.train.num_generations, first.train.teacher_draw, first.rewards.answer.weight) == (0, "any", 0)
    assert second.student.model == str(first.run_path / "student")
    alone = recipes.cell(replace(cell, name="ril_plus"), Rate(5e-4), 40)
    differs = {"run_dir", "student"}  # nothing of the first part stays in the second
    assert second.model_dump(exclude=differs) == alone.model_dump(exclude=differs)


def test_the_divergence_between_two_distributions():
    # Of a coin that is fair and one that shows heads three times of four.
    ours, theirs = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.75, 0.25]])) + 3.0
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert divergence(ours, theirs, "forward").tolist() == pytest.approx([forward])
    assert divergence(ours, theirs, "reverse").tolist() == pytest.approx([reverse])
    assert divergence(ours, ours + 1.0, "reverse").tolist() == pytest.approx([0.0], abs=1e-7)


def test_logits_are_those_of_the_one_teacher_with_the_students_tokenizer(recipes: Recipes, tmp_path: Path):
    cells = [Cell("student_qwen", n, regime=ONE_TEACHER) for n in ("logits_of_text", "sft_teacher_text", "ril_plus")]
    for recipe in (recipes.cell(cell, Rate(1.0)) for cell in cells):
        assert recipe.teacher_names == ["teacher_a"]
    text, sft = (recipes.cell(cell, Rate(1.0)) for cell in cells[:2])
    assert text.train.num_teacher_responses == 8
    assert sft.train.num_teacher_responses == 12
    assert not any(c.student == "student_internvl" for c in distillation(STUDENTS, list(DISTILLATION), 1))
    models = tiny_playground(tmp_path)
    text.student.model = str(models / "student_qwen" / "sft")
    for teacher, fits in (("teacher_a", True), ("teacher_b", False)):
        text.teachers[0].model_path = str(models / teacher)
        with nullcontext() if fits else pytest.raises(ModelError, match=teacher), by_logits(text, "forward"):
            pass


def test_regimes_change_only_what_they_name():
    assert Regime("", 0).contexts("") == []
    assert Regime("truth_30", 0).contexts("") == []
    assert Regime("judge_10", 0).changes_verdicts
    assert Regime("judge_10", 0).share == pytest.approx(0.1)
    assert not Regime("teachers_30", 0).changes_verdicts
    assert Regime("rubric", 0).changes_verdicts
    assert Regime("judge_10", 0).scoring() == []  # a judge that errs does not score the test
    assert {r.partition("_")[0] for r in REGIMES} == {"truth", "judge", "teachers", "rubric", "unjudged"}


@pytest.mark.parametrize("name", WITHOUT_VERDICTS)
def test_without_verdicts_teacher_text_is_drawn_whether_right_or_wrong(recipes: Recipes, name: str):
    plain, unjudged = (recipes.cell(Cell("student_qwen", name, regime=r), Rate(5e-4)) for r in ("", "unjudged"))
    assert (plain.train.teacher_draw, unjudged.train.teacher_draw) == ("judged_right", "any")
    assert [c.name for c in planned_regimes(["student_qwen"], 1, ["unjudged"])] == list(WITHOUT_VERDICTS)


def test_equal_cost_counts_collection_and_pre_training(tmp_path: Path, recipes: Recipes):
    for teacher, seconds in (("teacher_a", 30.0), ("teacher_b", 10.0)):
        write_json(tmp_path / "teachers" / teacher / "done.json", {"cpu_seconds": seconds})
    write_json(tmp_path / "student_qwen" / "collection" / "done.json", {"cpu_seconds": 8.0})
    write_json(tmp_path / "student_qwen" / "discriminators" / "response-bce" / "done.json", {"cpu_seconds": 12.0})
    for name, step in (("ril_plus", 0.5), ("ril", 1.0), ("dr_grpo", 0.4), ("rejection_sampling", 0.2)):
        done = {"steps": 80, "cpu_seconds": 80 * step}
        write_json(tmp_path / Cell("student_qwen", name).path / "done.json", done)

    def steps(name: str) -> int | None:
        return steps_of_equal_seconds(tmp_path, recipes, Cell("student_qwen", name))

    # RIL+ costs 40 for the teachers' responses and 80 x 0.5 for its steps, 80 in all.
    assert steps("rejection_sampling") == 200  # (80 - 40) / 0.2
    assert steps("dr_grpo") == 200  # 80 / 0.4: it needs no teacher
    assert steps("ril") == 20  # (80 - 40 - 8 - 12) / 1
    assert sum(preparation(tmp_path, recipes, Cell("student_qwen", "ril")).values()) == 60
    write_json(tmp_path / Cell("student_qwen", "ril_plus").path / "done.json", {"steps": 80, "cpu_seconds": 1.0})
    assert steps("ril") is None  # its preparation alone costs more
    # A number with which a run has begun stays, whatever cells that come later cost.
    (tmp_path / Cell("student_qwen", "rejection_sampling", steps=200, regime="seconds").path).mkdir(parents=True)
    assert steps("rejection_sampling") == 200


def test_a_mean_gives_every_skill_the_same_weight():
    assert mean_of_skills({"test-00000-charts": 1.0, "test-00001-charts": 0.0, "test-00002-open": 1.0}) == 0.75


def test_lanes_report_what_fails_and_do_nothing_twice(tmp_path: Path):
    ran = tmp_path / "ran"

    def good(name: str) -> None:
        with ran.open("a") as file:
            file.write(name)
        (tmp_path / name).touch()

    def bad() -> None:
        raise RuntimeError("no")

    work = [
        Work("a", tmp_path / "a", lambda: good("a"), tmp_path / "a.log"),
        Work("bad", tmp_path / "b", bad, tmp_path / "b.log"),
        Work("without a result", tmp_path / "c", lambda: None, tmp_path / "c.log"),
    ]
    said: list[str] = []
    assert sorted(run_lanes(work, 2, said.append)) == ["bad", "without a result"]
    assert "RuntimeError: no" in (tmp_path / "b.log").read_text()
    assert run_lanes(work[:1], 2, said.append) == []
    assert ran.read_text() == "a"


SMALL = [
    "--students", "student_qwen", "--num-train", "18", "--num-validation", "18", "--num-test", "18", "--steps", "1",
    "--only", "rejection_sampling", "ril_plus", "--seeds", "2",
    "--overrides", "collect.num_responses=2", "train.questions_per_step=4", "train.questions_per_sampling_batch=4",
    "discriminator.pretraining.responses_per_question=2",
    "train.max_completion_length=8", "collect.max_completion_length=8", "eval.max_completion_length=8",
]  # fmt: skip


def test_a_tiny_comparison_runs_and_a_cell_is_what_the_commands_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny_playground(tmp_path / "models")
    folders = ["--out", str(tmp_path / "out"), "--models", str(tmp_path / "models")]
    with pytest.raises(StateError, match="tuning"):
        Comparison(Settings(out=tmp_path / "none")).rate(Cell("student_qwen", "ril"))
    assert main([*folders, *SMALL, "--parts", "tuning", "contenders", "seconds"]) == 0, capsys.readouterr()
    out = tmp_path / "out"
    tuned = json.loads((out / "tuned.json").read_text())
    assert set(tuned["student_qwen"]) == {"rejection_sampling", "ril_plus"}
    with pytest.raises(StateError, match="--only gail"):
        Comparison(Settings(out=out)).rate(Cell("student_qwen", "gail"))
    cell = out / Cell("student_qwen", "ril_plus", 1).path
    done = json.loads((cell / "done.json").read_text())
    assert done["steps"] == 1
    assert done["cpu_seconds"] > 0
    assert len(done["scores"]) == 18

    # By hand: the same recipe through the commands of a user gives the same scores.
    by_hand = ["--run_dir", str(tmp_path / "by_hand"), "--data.validation", str(out / "world" / "test.jsonl")]
    assert ril(["train", str(cell / "recipe.yaml"), *by_hand]) == 0, capsys.readouterr()
    options = [*by_hand, "--eval.limit", "0", "--eval.score", "rules"]
    assert ril(["eval", str(cell / "recipe.yaml"), *options]) == 0, capsys.readouterr()
    rows = read_jsonl(tmp_path / "by_hand" / "eval" / "final.jsonl")
    assert {r["question_id"]: r["score"] for r in rows if "question_id" in r} == done["scores"]

    capsys.readouterr()
    assert main([*folders, *SMALL, "--parts", "contenders"]) == 0
    assert "steps_80" not in capsys.readouterr().out  # nothing is run twice
    assert main([*folders, "--report"]) == 0
    found = json.loads((out / "results.json").read_text())["students"]["student_qwen"]
    assert found["contenders"]["ril_plus"]["seeds"] == 2
    assert found["seconds"]["rejection_sampling"]["seeds"] == 2
    check_that_scores_restore(out, tmp_path, folders, capsys)
    assert main([*folders, *SMALL, "--world-seed", "3", "--parts", "contenders"]) == 2  # another world, the same folder
    assert "world_seed" in capsys.readouterr().err

    # Another world takes the tuned rates of this one, and no other ones after that.
    second = ["--out", str(tmp_path / "second"), *folders[2:], *SMALL, "--world-seed", "3"]
    assert main([*second, "--tuned", str(out / "tuned.json"), "--parts", "steps", "--lengths", "2"]) == 0
    assert json.loads((tmp_path / "second" / "tuned.json").read_text()) == tuned
    assert {p.parent.parent.name for p in (tmp_path / "second").glob("*/plain/ril_plus/*/*/done.json")} == {"steps_2"}
    write_json(tmp_path / "others.json", {"student_qwen": {"ril_plus": "0.0005"}})
    for parts, found in (("steps", "0.0005"), ("tuning", "tuning")):
        assert main([*second, "--tuned", str(tmp_path / "others.json"), "--parts", parts]) == 2
        assert found in capsys.readouterr().err

    for nothing in (
        ["--parts", "distillation", "--students", "student_internvl"],
        ["--parts", "others", "--only", "ril"],
    ):
        assert main([*folders, *nothing]) == 2
        assert nothing[1] in capsys.readouterr().err
    for mistake in (["--only", "ril_minus"], ["--students", "qwen"], ["--overrides", "train.beta=high"]):
        assert main([*folders, *mistake]) == 2
        assert mistake[1] in capsys.readouterr().err


def check_that_scores_restore(
    out: Path, tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of scores makes the same report elsewhere, and only what it lacks is run there."""
    capsys.readouterr()
    scores, again = out / "scores.jsonl", tmp_path / "again"
    report = ["--out", str(again), "--scores", str(scores), "--report"]
    assert main(report) == 0
    assert main(report) == 0  # a second time it finds its own
    assert json.loads((again / "results.json").read_text()) == json.loads((out / "results.json").read_text())
    assert (again / "scores.jsonl").read_text() == scores.read_text()
    more = ["--out", str(again), *folders[2:], *SMALL, "--scores", str(scores), "--parts", "contenders"]
    more[more.index("--seeds") + 1] = "3"
    capsys.readouterr()
    assert main(more) == 0, capsys.readouterr()
    ran = [line for line in capsys.readouterr().out.splitlines() if "steps_80/seed_" in line]
    assert len(ran) == 2
    assert all("seed_2" in line for line in ran)

    rows = read_jsonl(scores)
    cell = next(r for r in rows[1:] if "plain/ril_plus/" in r["path"])
    cell["right"] = "".join(f"{15 - int(d, 16):x}" for d in cell["right"])
    write_jsonl(tmp_path / "changed.jsonl", rows)
    rows[0]["settings"]["world_seed"] = 4
    write_jsonl(tmp_path / "world.jsonl", rows)
    rows[0] = {"settings": {}}
    write_jsonl(tmp_path / "other.jsonl", rows)
    for name, said in (
        ("changed", cell["path"]),
        ("world", "world_seed"),
        ("other", "other.jsonl"),
        ("none", "none.jsonl"),
    ):
        assert main(["--out", str(again), "--scores", str(tmp_path / f"{name}.jsonl"), "--report"]) == 2
        assert said in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "empty"), "--report"]) == 2
    assert "--scores" in capsys.readouterr().err


def test_scores_are_kept_as_one_bit_for_each_question():
    scores = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert bits(scores) == "b4"  # 1011 01, and two zeros
    assert unbits("b4", 6) == scores
    with pytest.raises(DataError, match="2 digits"):
        unbits("b", 6)


def test_teachers_that_are_always_right_say_what_the_world_does(tmp_path: Path):
    row = {"id": "q", "derivation_a": "It is red.", "derivation_b": "- red\nanswer: red"}
    write_jsonl(tmp_path / "train.jsonl", [row])
    written = read_derivations(tmp_path)
    cache = ResponseCache.create(tmp_path / "cache")
    for source in ("teacher_a", "teacher_b", "student"):
        cache.register(source, model="m", revision=None, sampling={})
        with cache.writer(source) as writer:
            writer.append(QUESTION, Response("q", source, 0, "It is blue."))
    with teachers_right(1.0, written=written):
        loaded = cache.load([QUESTION])
        assert [r.text for r in loaded.responses_for("q", "teacher_a")] == ["It is red."] * 4
        assert [(r.text, r.index) for r in loaded.responses_for("q", "teacher_b")][-1] == ("- red\nanswer: red", 3)
        assert [r.text for r in loaded.responses_for("q", "student")] == ["It is blue."]


def test_the_lead_is_shown_at_the_last_length_that_a_rival_has():
    lead = {"value": 0.02, "low": -0.01, "high": 0.05, "seeds": 3}
    apart = {"means": dict.fromkeys(("40", "80", "160", "320")), "over_80": {}}
    rows = {"rejection_sampling": {**apart, "winner_over": {"80": lead, "160": lead, "320": None}}}
    rows["ril_plus"] = {**apart, "winner_over": {}}
    table = BLOCKS["steps"]({"students": {"student_qwen": {"steps": rows}}})
    assert "RIL+ over it at 160" in table
    assert "+2.0 [-1.0, +5.0]" in table


def test_the_named_contenders_alone_run_in_a_regime():
    cells = planned_regimes(["student_qwen"], 1, ["truth_30", "unjudged"], ["rejection_sampling", "ril_plus_at_d_rate"])
    assert [(c.regime, c.name) for c in cells] == [
        ("truth_30", "rejection_sampling"),
        ("truth_30", "ril_plus_at_d_rate"),
        ("unjudged", "ril_plus_at_d_rate"),
    ]


def test_the_cells_of_regimes_and_controls_run_with_their_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models, out = tiny_playground(tmp_path / "models"), tmp_path / "out"
    rates = dict.fromkeys((*CONTENDERS, *DISTILLATION), "0.001")
    write_json(out / "tuned.json", {"student_qwen": rates})
    small = [*SMALL[: SMALL.index("--only")], *SMALL[SMALL.index("--overrides") :]]
    names = (
        "truth_0",
        "truth_30",
        "judge_25",
        "teachers_30",
        "teachers_100",
        "rubric",
        "ril_shuffled",
        "ril_fixed_d",
        "prism_like",
    )
    logits = ("logits_of_text", "logits_of_samples")
    command = ["--out", str(out), "--models", str(models), "--parts", "regimes", "controls", "others", "distillation"]
    command += ["--only", *names, *logits]
    command += ["--seeds", "1", *small]
    assert main(command) == 0, capsys.readouterr()
    done = {
        path.parent.relative_to(out / "student_qwen").parts[:2] for path in out.glob("student_qwen/*/*/*/*/done.json")
    }
    regimes = {(r, n) for r in ("judge_25", "teachers_30", "teachers_100", "rubric") for n in IN_REGIMES}
    regimes |= {("truth_30", n) for n in WITH_SOME_TRUTH}
    truthless = {("truth_0", n) for n in WITHOUT_TRUTH}
    plain = {("plain", name) for name in ("ril_shuffled", "ril_fixed_d", "prism_like", "start")}
    assert done == {*regimes, *truthless, *plain, *((ONE_TEACHER, name) for name in logits)}

    world = out / "world"
    assert [row["answer"] != "" for row in read_jsonl(world / "train_30.jsonl")].count(True) == 5  # 30 % of 18
    assert len(read_jsonl(world / "train_30_known.jsonl")) == 5
    assert not any(row["answer"] for row in read_jsonl(world / "train_0.jsonl"))
    (step,) = read_jsonl(out / Cell("student_qwen", "ril_plus_d", regime="truth_0").path / "metrics.jsonl")
    assert step["reward/without_truth"] >= 4 * 8  # every sample, and the teacher responses that are not too long
    assert "reward/student_answer" not in step
    prism = out / Cell("student_qwen", "prism_like").path
    assert json.loads((prism / "done.json").read_text())["steps"] == 2  # one step each
    assert len(read_jsonl(prism / "second" / "metrics.jsonl")) == 1
    assert (out / "student_qwen" / "discriminators" / "response-bce-shuffled" / "done.json").is_file()
    for name in logits:  # the divergence between two random models, in nats a token
        (step,) = read_jsonl(out / Cell("student_qwen", name, regime=ONE_TEACHER).path / "metrics.jsonl")
        assert 0 < step["train/loss"] < 2
        assert step["train/grad_norm"] > 0
