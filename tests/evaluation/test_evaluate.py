"""Answering and scoring: settings, journal, the judge's failures, and the stage on real checkpoints."""

import io
import json
import shutil

import pytest
from rich.console import Console

from openril.errors import DataError, JudgeError
from openril.evaluation.evaluate import Journal, evaluate
from openril.recipe.schema import EvaluationConfig, Recipe
from openril.records import Question, Response
from openril.rewards.judge import build_judge_service
from openril.sampling.transformers_engine import TransformersSampler
from openril.stages.eval import find_targets, run_eval
from openril.storage import read_jsonl
from support.misbehaving_server import MisbehavingServer, Say, Status
from support.tiny import tiny_questions, write_questions

QUESTIONS = [
    Question(f"q{i}", "Which colour?", "red", metadata={"skill": "colour" if i < 2 else "other"}) for i in range(4)
]
TEXTS = {"q0": "red", "q1": "blue", "q2": "The answer is red.", "q3": "I would rather not say which one it is today."}


class Scripted:
    """A sampler that answers with TEXTS and records the questions; it can be interrupted at one of them."""

    def __init__(self, break_at=None):
        self.asked, self.settings, self.break_at = [], [], break_at

    def sample(
        self, questions, num_generations, *, settings, max_completion_length, seed, first_index=0, source="student"
    ):
        assert num_generations == 1
        self.settings.append((settings, max_completion_length))
        if any(q.id == self.break_at for q in questions):
            raise KeyboardInterrupt
        self.asked += [q.id for q in questions]
        return [
            [Response(q.id, source, 0, TEXTS[q.id], "length" if q.id == "q3" else "stop", (1, 2))] for q in questions
        ]


def settings(**values):
    return EvaluationConfig(questions_per_batch=2, max_completion_length=7, **values)


def test_decoding_is_greedy_and_scoring_by_rules():
    sampler = Scripted()
    result = evaluate(lambda: sampler, QUESTIONS, settings())
    assert {(s.temperature, s.repetition_penalty, length) for s, length in sampler.settings} == {(0.0, 1.0, 7)}
    assert [r.score for r in result.rows] == [1.0, 0.0, 1.0, 0.0]
    assert (result.summary.score, result.summary.unparsed, result.summary.cut) == (0.5, 1, 1)
    assert result.groups["skill"]["colour"].n == 2 and result.group_means["skill"] == 0.5


def test_an_interrupted_evaluation_continues_where_it_was(tmp_path):
    one_by_one = EvaluationConfig(questions_per_batch=1)

    def run(sampler, key="key"):
        return evaluate(lambda: sampler, QUESTIONS, one_by_one, journal=Journal(tmp_path / "x.jsonl", key))

    with pytest.raises(KeyboardInterrupt):
        run(Scripted(break_at="q3"))
    again = Scripted()
    result = run(again)
    assert again.asked == ["q2", "q3"]  # q2 was not scored yet
    assert result == evaluate(Scripted, QUESTIONS, one_by_one)
    third, other = Scripted(), Scripted()
    assert run(third) == result and third.asked == []
    run(other, key="other settings")
    assert len(other.asked) == 4


def judged_recipe(tmp_path, server, **judge):
    endpoint = {"base_urls": [server.url], "model": "fake", "max_retries": 0, "bad_verdict_retries": 0, **judge}
    return Recipe.model_validate({"run_dir": str(tmp_path), "judge": endpoint, "eval": {"score": "judge"}})


def test_without_verdicts_the_score_is_unknown_and_a_second_run_samples_no_answer_again(tmp_path):
    with MisbehavingServer(Status(400), then=Say("Right.\n<answer>1</answer>")) as server:
        judge = build_judge_service(judged_recipe(tmp_path, server, concurrency=1), "eval")
        try:
            first = evaluate(
                Scripted, QUESTIONS, settings(score="judge"), judge, journal=Journal(tmp_path / "x.jsonl", "key")
            )
            assert first.summary.unknown == 1 and first.summary.score == 1.0 and first.rows[0].score is None
            sampler = Scripted()
            journal = Journal(tmp_path / "x.jsonl", "key")
            again = evaluate(lambda: sampler, QUESTIONS, settings(score="judge"), judge, journal=journal)
            assert sampler.asked == [] and again.summary.unknown == 0
        finally:
            judge.close()


def test_a_dead_judge_stops_the_evaluation(tmp_path):
    with MisbehavingServer(then=Status(400)) as server:
        judge = build_judge_service(judged_recipe(tmp_path, server), "eval")
        try:
            with pytest.raises(JudgeError, match="4 of 4 verdicts"):
                evaluate(Scripted, QUESTIONS, settings(score="judge"), judge, max_unknown_share=0.25)
        finally:
            judge.close()


def test_a_question_without_ground_truth_is_refused_before_any_answer():
    sampler = Scripted()
    with pytest.raises(DataError, match="q9"):
        evaluate(lambda: sampler, [*QUESTIONS, Question("q9", "?")], settings())
    assert sampler.asked == []


# The stage


@pytest.fixture
def recipe(tmp_path, tiny_qwen, tiny_internvl):
    data = write_questions(tmp_path / "questions.jsonl", tiny_questions(tmp_path / "images", 4))
    shutil.copytree(tiny_internvl, tmp_path / "run/student")
    shutil.copytree(tiny_qwen, tmp_path / "run/checkpoints/step_000002/student")
    return Recipe.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {"validation": [str(data)]},
            "student": {"model": str(tiny_qwen), "dtype": "float32"},
            "eval": {"max_completion_length": 4, "questions_per_batch": 3},
        }
    )


def test_the_stage_evaluates_what_is_there_and_nothing_twice(recipe, tiny_qwen, tmp_path):
    assert [t.name for t in find_targets(recipe)] == ["base", "step_000002", "final"]
    console = Console(file=io.StringIO(), width=120)
    table = run_eval(recipe, console)
    folder = tmp_path / "run/eval"
    assert [line.split(" | ")[0] for line in table.read_text().splitlines()[2:]] == [
        "| base",
        "| step_000002",
        "| final",
    ]
    result = json.loads((folder / "final.json").read_text())
    assert result["n"] == 4 and result["cut"] + result["unparsed"] > 0 and result["versions"] and result["date"]
    assert len([r for r in read_jsonl(folder / "final.jsonl") if "question_id" in r]) == 4
    loaded = []

    def load(recipe, checkpoint):
        loaded.append(checkpoint)
        return TransformersSampler.from_checkpoint(checkpoint, recipe.student)

    run_eval(recipe, console, make_sampler=load)
    assert loaded == []
    # The final student is trained further. Only it is evaluated again, and the removed checkpoint keeps its row.
    shutil.rmtree(tmp_path / "run/student")
    shutil.copytree(tiny_qwen, tmp_path / "run/student")
    shutil.rmtree(tmp_path / "run/checkpoints")
    run_eval(recipe, console, make_sampler=load)
    assert loaded == [str(tmp_path / "run/student")]
    table = json.loads((folder / "table.json").read_text())
    assert [e["name"] for e in table["evaluations"]] == ["base", "step_000002", "final"]
    assert table["evaluations"][1]["gain"]["difference"] == 0.0  # the same weights
    assert table["evaluations"][2]["gain"]["difference"] == 0.0


def test_other_settings_are_another_evaluation(recipe, tmp_path):
    run_eval(recipe, Console(quiet=True), [str(tmp_path / "run/student")])
    recipe.eval.max_completion_length = 5
    run_eval(recipe, Console(quiet=True), [str(tmp_path / "run/student")])
    rows = [r for r in read_jsonl(tmp_path / "run/eval/final.jsonl") if "question_id" in r]
    assert max(r["tokens"] for r in rows) == 5


def test_a_checkpoint_from_elsewhere_gets_its_own_name(recipe, tiny_internvl, tmp_path):
    run_eval(recipe, Console(quiet=True), [str(tiny_internvl)])
    names = [p.stem for p in (tmp_path / "run/eval").glob("*.json") if p.stem != "table"]
    assert len(names) == 1 and names[0].startswith(tiny_internvl.parent.name) and tiny_internvl.name in names[0]
