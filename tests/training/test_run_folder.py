"""Rollouts schema 2, pictures and warnings of a run folder."""

from __future__ import annotations

import hashlib
import json

from PIL import Image

from openril.records import Group, ImageSource, Question, Response, Rollout
from openril.rewards.answers import AnswerScore
from openril.rewards.combine import RewardSystem
from openril.rewards.judge_protocol import Verdict
from openril.storage import read_jsonl
from openril.training.pictures import Pictures
from openril.training.run_folder import RunFolder, rollout_rows


def picture(path, color=(200, 10, 10), size=(40, 20)):
    Image.new("RGB", size, color).save(path)
    return ImageSource(path=path)


def group(question, texts, **fields):
    return Group(question, [Rollout(Response(question.id, "student", i, t), **fields) for i, t in enumerate(texts)])


def test_a_row_holds_the_question_the_judges_words_and_what_the_rule_says():
    question = Question(
        "q1", "2 + 2?", "4", choices=(), rule=None, other_answers=("four",),
        metadata={"skill": "sums", "long": "x" * 41, "list": [1], "bad": float("nan"), "level": 3},
    )  # fmt: skip
    judged = {"verdict": 0.0, "judged": True, "explanation": "It says 4.", "learned": 2}
    rows = rollout_rows(7, [group(question, ["The answer is 4", "blue sky over there"], **judged)], {}, "number")
    first, second = rows
    assert first["schema"] == 2 and first["step"] == 7 and first["group"] == 0
    assert first["answers"] == ["4", "four"] and first["answer"] == "4 | four" and first["rule"] == "number"
    assert first["metadata"] == {"skill": "sums", "level": 3}
    assert first["extracted"] == "4" and first["explanation"] == "It says 4." and first["learned"] == 2
    assert second["rule_score"] is None  # the rule finds no number
    by_rule = rollout_rows(7, [group(question, ["The answer is 4"], verdict=1.0)], {}, "number")
    assert by_rule[0]["rule_score"] is None  # nothing to compare: no judge was asked


def test_the_rule_disagrees_with_the_judge():
    rows = rollout_rows(1, [group(Question("q", "2+2?", "4"), ["4", "5"], verdict=0.0, judged=True)])
    assert [row["rule_score"] for row in rows] == [1.0, 0.0]


def test_a_picture_is_stored_once_and_a_lone_surrogate_does_not_stop_the_run(tmp_path):
    image = picture(tmp_path / "a.png")
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()[:32]
    folder = RunFolder(tmp_path / "run")
    question = Question("q", "what?", "red", images=(image, ImageSource(url="https://example.com/b.png")))
    for step in (1, 2):
        folder.log_rollouts(step, [group(question, ["bad \ud800 text"])], {"q": question})
    folder.pictures.wait()
    assert [p.name for p in (tmp_path / "run" / "pictures").iterdir()] == [f"{digest}.webp"]
    with Image.open(tmp_path / "run" / "pictures" / f"{digest}.webp") as copy:
        assert copy.size == (40, 20) and copy.convert("RGB").getpixel((5, 5)) == (200, 10, 10)
    row = read_jsonl(tmp_path / "run" / "rollouts" / "step_000002.jsonl")[0]
    assert row["image_hashes"] == [digest, None] and row["text"] == "bad ? text"


def test_pictures_end_at_the_limit_with_one_warning(tmp_path):
    pictures, said = Pictures(tmp_path / "p", most_bytes=1), []
    pictures.warn = said.append
    for name, color in (("a", (1, 1, 1)), ("b", (2, 2, 2)), ("c", (3, 3, 3))):
        assert pictures.keep(Question(name, "?", images=(picture(tmp_path / f"{name}.png", color),)))[0]
    pictures.wait()
    assert len(list((tmp_path / "p").iterdir())) == 1 and len(said) == 1


def test_resuming_cuts_rollouts_and_warnings_but_no_pictures(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log_rollouts(step, [])
        folder.log_metrics({"step": step})
        folder.log_warning(f"warning {step}", step)
    for _ in range(2):  # a run that starts twice warns twice of its recipe
        folder.log_warning("of the recipe")
    folder.cut_after(2)
    assert [p.name for p in sorted(folder.rollouts_path.iterdir())] == ["step_000001.jsonl", "step_000002.jsonl"]
    assert [(r["step"], r["text"]) for r in read_jsonl(folder.warnings_path)] == [
        (1, "warning 1"), (2, "warning 2"), (None, "of the recipe"),
    ]  # fmt: skip


def test_the_reward_system_keeps_the_judges_words(monkeypatch):
    from openril.recipe.schema import Recipe

    scores = [
        AnswerScore(1.0, True, True, "", Verdict(1.0, "It says so.", asked=True)),
        AnswerScore(0.0, cause="empty response"),
    ]
    system = RewardSystem(Recipe.model_validate({"train": {"algorithm": "dr_grpo"}}), judge_service=object())
    monkeypatch.setattr(system, "_submit", lambda groups: type("Handle", (), {"result": lambda self: scores})())
    groups = [group(Question("q", "?", "a"), ["a", ""])]
    system.score(groups)
    right, empty = groups[0].rollouts
    assert (right.judged, right.explanation, right.cause) == (True, "It says so.", "")
    assert (empty.judged, empty.explanation, empty.cause) == (False, "", "empty response")
    assert json.dumps(rollout_rows(1, groups))
