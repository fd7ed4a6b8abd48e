"""Selection of questions for the loop, with numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from openril.data.selection import Decision, select, share_places, write_selection
from openril.errors import DataError
from openril.recipe.schema import SelectionConfig
from openril.records import Question
from openril.storage import iterate_jsonl


def questions(number: int, file: str = "a.jsonl", first: int = 0) -> list[Question]:
    return [Question(id=f"q{i}", question="q", answer="a", origin=f"{file}:{i}") for i in range(first, first + number)]


def config(number: int, **settings: object) -> SelectionConfig:
    return SelectionConfig.model_validate(
        {"enabled": True, "num_questions": number, "drop_overlong": False, **settings}
    )


def reasons(selection) -> dict[str, str]:  # type: ignore[no-untyped-def]
    return {d.id: d.reason for d in selection.decisions}


def test_reference_keeps_the_largest_gains_and_never_losses() -> None:
    student = {"q0": -2.0, "q1": -2.0, "q2": -0.5, "q3": -1.0}
    reference = {"q0": -0.5, "q1": -1.5, "q2": -0.7, "q3": -1.0}
    # Scores: 1.5, 0.5, -0.2 (the student is better), 0 (no difference).
    selection = select(questions(4), student, reference, None, config(4), seed=0)
    assert selection.ids == ("q0", "q1")
    assert selection.decisions[0].score == pytest.approx(1.5)
    assert reasons(selection)["q2"] == "reference no better: score -0.2"
    assert select(questions(4), student, reference, None, config(1), seed=0).ids == ("q0",)
    assert selection.counts() == {"selected": 2, "reference no better": 2}


def test_every_file_keeps_its_own_best_in_proportion_to_its_size() -> None:
    data = [*questions(6, "a.jsonl"), *questions(3, "b.jsonl", first=6)]
    student = {q.id: -5.0 for q in data}
    # File a gains 4 everywhere, file b only 1: places are still 4 to 2.
    reference = {q.id: -1.0 if q.origin.startswith("a") else -4.0 for q in data}
    chosen = select(data, student, reference, None, config(6), seed=0).ids
    assert [i for i in chosen if int(i[1:]) >= 6] == list(chosen[-2:]) and len(chosen) == 6


@pytest.mark.parametrize(
    ("number", "sizes", "available", "expected"),
    [
        (6, {"a": 6, "b": 3}, {"a": 6, "b": 3}, {"a": 4, "b": 2}),
        (10, {"a": 1, "b": 1, "c": 1}, {"a": 9, "b": 9, "c": 9}, {"a": 4, "b": 3, "c": 3}),
        (6, {"a": 6, "b": 3}, {"a": 1, "b": 9}, {"a": 1, "b": 5}),
        (9, {"a": 5, "b": 5}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        (1, {"a": 1, "b": 9}, {"a": 5, "b": 0}, {"a": 1, "b": 0}),
        (0, {"a": 1}, {"a": 1}, {"a": 0}),
    ],
)
def test_places(number: int, sizes: dict[str, int], available: dict[str, int], expected: dict[str, int]) -> None:
    assert share_places(number, sizes, available) == expected


def test_the_student_alone_draws_by_what_it_does_not_know() -> None:
    data = questions(4000)
    # p = 0.9 for even, 0.5 for odd questions: weights 0.1 and 0.5, so odd ones are drawn about five times as often
    # as long as few are drawn.
    student = {q.id: math.log(0.9 if int(q.id[1:]) % 2 == 0 else 0.5) for q in data}
    chosen = select(data, student, None, None, config(300), seed=1).ids
    odd = sum(int(i[1:]) % 2 for i in chosen)
    assert len(chosen) == 300 and 225 < odd < 275  # mean 250, about 3.5 standard deviations either way


def test_certain_answers_are_left_out() -> None:
    selection = select(questions(2), {"q0": 0.0, "q1": -1.0}, None, None, config(2), seed=0)
    assert selection.ids == ("q1",) and reasons(selection)["q0"].startswith("known")
    assert selection.decisions[1].score == pytest.approx(1 - math.exp(-1))


def test_the_seed_decides_and_other_questions_do_not() -> None:
    data, student = questions(100), {f"q{i}": -1.0 for i in range(100)}
    first = select(data, student, None, None, config(30), seed=5)
    assert first == select(data, student, None, None, config(30), seed=5)
    assert set(first.ids) != set(select(data, student, None, None, config(30), seed=6).ids)
    # Taking away a question that was not drawn leaves the draw as it is.
    gone = next(q for q in data if q.id not in first.ids)
    assert select([q for q in data if q is not gone], student, None, None, config(30), seed=5).ids == first.ids


def test_overlong_questions_go_first() -> None:
    share = {"q0": 0.75, "q1": 0.5, "q2": 0.0}
    student = dict.fromkeys(share, -1.0)
    selection = select(questions(3), student, None, share, config(3, drop_overlong=True), seed=0)
    assert selection.ids == ("q1", "q2")
    assert reasons(selection)["q0"] == "overlong: 75% of its student responses are cut"


def test_questions_without_an_answer_are_not_chosen() -> None:
    selection = select(questions(2), {"q0": None, "q1": -1.0}, None, None, config(2), seed=0)
    assert reasons(selection) == {"q0": "no answer: nothing to score", "q1": ""}


def test_missing_responses_scores_and_nonsense_are_errors() -> None:
    scores: dict[str, float | None] = {"q0": -1.0, "q1": -1.0}
    with pytest.raises(DataError, match=r"drop_overlong: 1 questions .*first: q1"):
        select(questions(2), scores, None, {"q0": 0.0}, config(2, drop_overlong=True), seed=0)
    with pytest.raises(DataError, match="question q2: the student's log-probability"):
        select(questions(3), scores, None, None, config(2), seed=0)
    for wrong in (float("nan"), 0.5):
        with pytest.raises(DataError, match=f"log-probability of the reference .*{wrong}"):
            select(questions(2), scores, {"q0": wrong, "q1": -1.0}, None, config(2), seed=0)


def test_impossible_answers_do_not_break_the_score() -> None:
    impossible = {"q0": -math.inf}
    assert select(questions(1), impossible, None, None, config(1), seed=0).ids == ("q0",)
    assert select(questions(1), impossible, impossible, None, config(1), seed=0).ids == ()


def test_a_line_is_written_for_every_question(tmp_path: Path) -> None:
    selection = select(questions(5), {f"q{i}": -float(i) for i in range(5)}, None, None, config(2), seed=0)
    write_selection(tmp_path / "selection.jsonl", selection)
    assert tuple(Decision(**row) for row in iterate_jsonl(tmp_path / "selection.jsonl")) == selection.decisions
