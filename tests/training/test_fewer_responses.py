"""A recipe may use fewer of the cached responses than there are, and groups may hold more of them or fewer than G."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openril.recipe.checks import require
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.responses.cache import ResponseCache
from openril.stages.train import cached_teacher_responses
from support.loop import make_trainer, tiny_recipe
from support.tiny import teacher_responses, tiny_questions, write_questions

TEACHERS = ["a", "b"]


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return tiny_questions(tmp_path / "data", 8)


@pytest.fixture
def cache_dir(questions: list[Question], tmp_path: Path) -> Path:
    """16 responses of each teacher to each question."""
    cache = ResponseCache.create(tmp_path / "cache")
    responses = teacher_responses(questions, TEACHERS, 16)
    for source in TEACHERS:
        cache.register(source, model=source, revision=None, sampling={})
        with cache.writer(source) as writer:
            for q in questions:
                for r in responses[q.id]:
                    if r.source == source:
                        writer.append(q, r)
    return tmp_path / "cache"


def recipe_with(tmp_path: Path, checkpoint: Path, cache_dir: Path, **overrides: Any) -> Recipe:
    return tiny_recipe(tmp_path / "run", checkpoint, **{"cache_dir": str(cache_dir), **overrides})


@pytest.mark.parametrize(
    ("cached", "in_a_group", "over_visits"),
    [(1, 1, 1), (4, 2, 4), (16, 2, 8)],  # 2 of each teacher in a group; over four visits 8 are drawn
)
def test_the_first_n_are_used_and_all_of_them(
    cached: int, in_a_group: int, over_visits: int, questions: list[Question], cache_dir: Path, tmp_path: Path
):
    recipe = recipe_with(
        tmp_path, tmp_path, cache_dir, collect__num_responses=cached, train__num_generations=4, train__epochs=4
    )
    drawn = cached_teacher_responses(recipe, questions)
    for question in questions:
        epochs = [drawn(question, v) for v in range(4)]
        for group in epochs:
            assert [r.source for r in group] == ["a", "a", "b", "b"]
            assert len({r.index for r in group if r.source == "a"}) == in_a_group
        indices = [r.index for group in epochs for r in group if r.source == "a"]
        assert len(set(indices)) == over_visits and max(indices) < cached
        assert max(indices.count(i) for i in set(indices)) - min(indices.count(i) for i in set(indices)) == 0


def test_a_step_takes_groups_in_which_a_response_repeats(
    tiny_qwen: Path, questions: list[Question], cache_dir: Path, tmp_path: Path
):
    """One response of each teacher, four in a group: the recipe is accepted with a warning, and a step's mean counts each
    member."""
    write_questions(tmp_path / "questions.jsonl", questions)
    recipe = recipe_with(
        tmp_path,
        tiny_qwen,
        cache_dir,
        collect__num_responses=1,
        train__num_generations=4,
        train__max_steps=1,
        data__train=[str(tmp_path / "questions.jsonl")],
        rewards__answer={"kind": "rules"},
    )
    warnings = [p for p in require(recipe, "train") if p.key == "train.num_teacher_responses"]
    assert ["2 responses of one teacher" in p.reason and "num_responses is 1" in p.reason for p in warnings] == [True]
    trainer = make_trainer(recipe, tmp_path / "data")
    trainer.teacher_responses = cached_teacher_responses(recipe, questions)
    groups, metrics = trainer.step(trainer.batch_at(0))
    for g in groups:
        assert [(r.response.source, r.response.index) for r in g.teachers] == [("a", 0)] * 2 + [("b", 0)] * 2
        assert g.teachers[0].advantage == g.teachers[1].advantage
        assert sum(r.advantage for r in g.rollouts) == pytest.approx(0, abs=1e-9)
        mean = sum(r.reward or 0.0 for r in g.rollouts) / 8
        assert g.rollouts[0].advantage == pytest.approx((g.rollouts[0].reward or 0.0) - mean)
    assert metrics["train/update_tokens"] > 0


@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("match", [False, True])
def test_teacher_responses_need_not_be_as_many_as_samples(
    number: int, match: bool, tiny_qwen: Path, questions: list[Question], cache_dir: Path, tmp_path: Path
):
    recipe = recipe_with(
        tmp_path,
        tiny_qwen,
        cache_dir,
        train__num_teacher_responses=number,
        train__questions_per_step=2,
        discriminator__match_length=match,
    )
    trainer = make_trainer(recipe, tmp_path / "data")
    trainer.teacher_responses = cached_teacher_responses(recipe, questions)
    groups, metrics = trainer.step(trainer.batch_at(0))
    for g in groups:
        assert (len(g.students), len(g.teachers)) == (2, number)
        assert all(r.student_prob is not None for r in g.rollouts)
    assert 0.5 < metrics["discriminator/loss"] < 3  # each side is a mean: about 2 log 2, whatever their sizes
    assert metrics["discriminator/loss"] == pytest.approx(1.386, abs=0.3)
