"""A recipe may use fewer of the cached responses than there are, and groups may hold more of them or fewer than G."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openril.recipe.checks import require
from openril.recipe.schema import Recipe
from openril.records import Question, Response
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
    return write_cache(tmp_path / "cache", questions, teacher_responses(questions, TEACHERS, 16))


def write_cache(path: Path, questions: list[Question], responses: dict[str, list[Response]]) -> Path:
    cache = ResponseCache.create(path)
    for source in TEACHERS:
        cache.register(source, model=source, revision=None, sampling={})
        with cache.writer(source) as writer:
            for q in questions:
                for r in responses[q.id]:
                    if r.source == source:
                        writer.append(q, r)
    return path


def recipe_with(tmp_path: Path, checkpoint: Path, cache_dir: Path, **overrides: Any) -> Recipe:
    return tiny_recipe(tmp_path / "run", checkpoint, **{"cache_dir": str(cache_dir), **overrides})


@pytest.mark.parametrize(
    ("cached", "in_a_group", "over_epochs"),
    [(1, 1, 1), (4, 2, 4), (16, 2, 8)],  # 2 of each teacher in a group; over four epochs 8 are drawn
)
def test_the_first_n_are_used_and_all_of_them(
    cached: int, in_a_group: int, over_epochs: int, questions: list[Question], cache_dir: Path, tmp_path: Path
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
        assert len(set(indices)) == over_epochs and max(indices) < cached
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


def test_what_would_be_learned_in_part_is_not_drawn(tiny_qwen: Path, questions: list[Question], tmp_path: Path):
    """Judge and discriminator see whole texts, so a group holds no teacher response that the student's limit would cut."""
    # One to eight words; of one question all of teacher b's are longer than the limit, which is four words.
    words = {
        (q.id, t): [20 if (n, t) == (1, "b") else 1 + (n + i) % 8 for i in range(16)]
        for n, q in enumerate(questions)
        for t in TEACHERS
    }
    responses = {
        q.id: [Response(q.id, t, i, "red " * words[q.id, t][i]) for t in TEACHERS for i in range(16)] for q in questions
    }
    write_cache(tmp_path / "long", questions, responses)
    recipe = recipe_with(tmp_path, tiny_qwen, tmp_path / "long", train__num_generations=4, train__max_steps=1)
    trainer = make_trainer(recipe, tmp_path / "data")
    everything = ResponseCache.open(tmp_path / "long").load(questions, TEACHERS)
    count = lambda r: len(trainer.policy.encoder.completion_ids(r, 1000))  # noqa: E731
    lengths = {(q.id, t): [count(r) for r in everything.responses_for(q.id, t)] for q in questions for t in TEACHERS}
    limit = count(Response("q0", "a", 0, "red " * 4))
    trainer.policy.settings.max_completion_length = limit
    trainer.teacher_responses = cached_teacher_responses(recipe, questions, fits=trainer.policy.fits)
    some, none = 0, 0
    for epoch in range(4):
        for q in questions:
            group = trainer.teacher_responses(q, epoch)
            assert group == trainer.teacher_responses(q, epoch)  # a function of its arguments, as resuming needs
            for t in TEACHERS:
                mine = [r for r in group if r.source == t]
                fitting = sum(n <= limit for n in lengths[q.id, t])
                assert all(count(r) <= limit for r in mine)
                assert len(mine) == (2 if fitting else 0)
                assert len({r.index for r in mine}) == min(2, fitting)
                some, none = some + (0 < fitting < 16), none + (not fitting)
    assert some and none
    # A step counts what its questions have that does not fit, and the update cuts nothing.
    groups, metrics = trainer.step(trainer.batch_at(0))
    over = sum(n > limit for g in groups for t in TEACHERS for n in lengths[g.question.id, t])
    assert metrics["train/teacher_too_long"] == over > 0
    learned = sum(count(r.response) for g in groups for r in g.teachers)
    learned += sum(len(r.response.token_ids or ()) for g in groups for r in g.students)
    assert metrics["train/update_tokens"] == learned
    messages: list[str] = []
    trainer.warn = messages.append
    recipe.train.max_steps = 2
    trainer.train()
    [message] = messages  # once, however many steps leave some out
    assert message.startswith("train.max_completion_length:") and f"{over} cached" in message
    # Responses that only train the discriminator are never cut.
    trainer.policy.settings.teacher_responses_in_update = False
    assert all(len(trainer.teacher_responses(q, 0)) == 4 for q in questions)
