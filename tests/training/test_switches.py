"""The switches of the policy update that the paper does not have, through the loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from openril.errors import CacheError, StateError
from openril.models.loading import load_model
from openril.models.packing import LOGITS_BYTES, token_logprobs
from openril.records import Group, Question, Response, Rollout
from openril.responses.cache import ResponseCache
from openril.stages.train import cached_teacher_responses
from openril.training.right_responses import right_responses_file
from support.loop import SubstringRewards, make_trainer, tiny_recipe
from support.tiny import tiny_questions

TEACHERS = ("a", "b")


def test_entropy_by_hand_and_in_parts(monkeypatch: pytest.MonkeyPatch):
    # Probabilities 1/2, 1/4, 1/4: 1/2 log 2 + 2 x 1/4 log 4 = 1.5 log 2. Equal ones: log 3. Temperature 2 on logits
    # 2 log p gives log p.
    logits = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    index, targets = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 1])
    expected = [1.5 * math.log(2), math.log(3), 1.5 * math.log(2)]
    for scale in (1.0, 2.0):
        found, entropies = token_logprobs(scale * logits, index, targets, None, scale, with_entropy=True)
        assert entropies.tolist() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(found, token_logprobs(scale * logits, index, targets, None, scale))
    # One row of logits at a time, each computed again in the backward pass: the same numbers and gradients.
    head, states = torch.nn.Linear(4, 3, bias=False), torch.randn(3, 4, requires_grad=True)
    whole = token_logprobs(states, index, targets, head, 1.0, with_entropy=True)
    monkeypatch.setattr("openril.models.packing.LOGITS_BYTES", 4 * 3)
    assert LOGITS_BYTES > 12
    parts = token_logprobs(states, index, targets, head, 1.0, with_entropy=True)
    assert not parts[1].requires_grad
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(values[0].sum(), states)[0] for values in (whole, parts)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("packed", [True, False])
def test_the_entropy_is_that_of_the_students_tokens(packed: bool, tiny_qwen: Path, tmp_path: Path):
    """Against the model's own logits, one plain row for each student sample."""
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, train__packed=packed), tmp_path / "data")
    groups = trainer.sample_groups(trainer.batch_at(0))
    metrics = trainer.policy.update(groups, 0)
    model, total, tokens = load_model(str(tiny_qwen)).eval(), 0.0, 0
    for group in groups:
        prompt = trainer.policy.encoder(group.question)
        for rollout in group.students:
            ids = torch.tensor(rollout.response.token_ids)
            inputs: dict[str, Any] = {**prompt.vision}
            inputs["input_ids"] = torch.cat([prompt.input_ids, ids])[None]
            if prompt.token_types is not None:
                types = torch.cat([prompt.token_types, torch.zeros(len(ids), dtype=torch.long)])
                inputs[prompt.token_type_key] = types[None]
            with torch.no_grad():
                logits = model(**inputs).logits[0, prompt.length - 1 : -1]
            p = logits.softmax(-1)
            total, tokens = total - float((p * p.log()).sum()), tokens + len(ids)
    assert metrics["entropy"] == pytest.approx(total / tokens, rel=1e-4)


def group_of(*rewards: float, students: int) -> Group:
    rollouts = [
        Rollout(Response("q", "student" if i < students else "a", i, "x"), reward=r, rewards={"answer": r})
        for i, r in enumerate(rewards)
    ]
    return Group(Question("q", "?", "x"), rollouts)


def test_the_switches_reach_the_advantages(tiny_qwen: Path, tmp_path: Path):
    # Students 0, 1, teachers 1, 2, 0. Students' mean 1/2; group's mean 0.8.
    rewards = (0.0, 1.0, 1.0, 2.0, 0.0)
    service = SubstringRewards()
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen), tmp_path / "data", service)
    paper = trainer.recipe
    for switches, expected in (
        ({}, [-0.8, 0.2, 0.2, 1.2, -0.8]),
        ({"baseline": "students"}, [-0.5, 0.5, 0.5, 1.5, -0.5]),
        ({"baseline": "none"}, [0.0, 1.0, 1.0, 2.0, 0.0]),
        ({"negative_scale": 0.5}, [-0.4, 0.2, 0.2, 1.2, -0.8]),
        ({"teacher_advantages": "positive"}, [-0.8, 0.2, 0.2, 1.2, 0.0]),
    ):
        trainer.recipe = paper.model_copy(update={"train": paper.train.model_copy(update=switches)})
        group = group_of(*rewards, students=2)
        trainer.set_advantages([group])
        assert [r.advantage for r in group.rollouts] == pytest.approx(expected), switches
    trainer.recipe = paper.model_copy(update={"rewards": paper.rewards.model_copy(update={"combine": "per_reward"})})
    service.weights = {"answer": 2.0, "similarity": 0.0}
    group = group_of(
        0.0, 1.0, students=1
    )  # mean 1/2, unbiased variance 1/2; the reward without weight is not asked for
    trainer.set_advantages([group])
    expected_one = 2 * 0.5 / (math.sqrt(0.5) + 1e-4)
    assert [r.advantage for r in group.rollouts] == pytest.approx([-expected_one, expected_one])


@pytest.mark.parametrize(
    ("below", "verdicts", "advantages"),
    [
        # Students 0, 1, teachers 1, 1. With the teachers the mean is 3/4, without them 1/2.
        (None, (0.0, 1.0), [-0.75, 0.25, 0.25, 0.25]),
        (1.0, (0.0, 1.0), [-0.75, 0.25, 0.25, 0.25]),
        (0.5, (0.0, 1.0), [-0.5, 0.5, 0.0, 0.0]),  # half of the samples are right, which is not below a half
        (0.01, (0.0, 1.0), [-0.5, 0.5, 0.0, 0.0]),
        (0.01, (0.0, 0.0), [-0.5, -0.5, 0.5, 0.5]),  # all of them failed
        (0.5, (None, 1.0), [0.0, 0.0, 0.0, 0.0]),  # the one known sample is right, and alone
        (0.01, (None, None), [0.0, 0.0, 0.0, 0.0]),  # nothing is known: the teachers stay, and have equal rewards
    ],
)
def test_teachers_help_where_samples_fail(
    below: float | None, verdicts: tuple[float | None, ...], advantages: list[float], tiny_qwen: Path, tmp_path: Path
):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__teacher_responses_below=below)
    trainer = make_trainer(recipe, tmp_path / "data")
    group = group_of(*verdicts, 1.0, 1.0, students=2)
    for rollout in group.rollouts:
        rollout.verdict = rollout.reward
    found = trainer.leave_out_teachers([group])
    trainer.set_advantages([group])
    assert [r.advantage for r in group.rollouts] == pytest.approx(advantages)
    left_out = below is not None and group.right_share is not None and group.right_share >= below
    assert trainer.policy.members(group) == (group.students if left_out else group.rollouts)
    assert found == ({} if below is None else {"train/teacher_groups": 0.0 if left_out else 1.0})


def test_groups_that_teach_nothing_need_no_pass(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a KL term the update equals one that runs all groups; with one, all of them run."""
    trained, passes = {}, {}
    for way in ("skipped", "all", "kl"):
        beta = 0.1 if way == "kl" else 0.0
        recipe = tiny_recipe(tmp_path / way, tiny_qwen, train__beta=beta, train__max_tokens_per_micro_batch=1)
        trainer = make_trainer(recipe, tmp_path / "data")
        groups = trainer.sample_groups(trainer.batch_at(0))
        for number, group in enumerate(groups):
            for i, rollout in enumerate(group.rollouts):
                rollout.advantage = (1.0, -1.0, 0.5, -0.5)[i] if number in (1, 3) else 0.0
        if way == "all":
            monkeypatch.setattr(type(trainer.policy), "_teaches", lambda self, group: True)
        metrics = trainer.policy.update(groups, 0)
        monkeypatch.undo()
        learned = [sum(r.learned or 0 for r in g.rollouts) for g in groups]
        assert all(learned)  # a response whose advantage is 0 is in Eq. 2 all the same
        passes[way] = metrics["update_tokens"]
        assert passes[way] == (sum(learned[i] for i in (1, 3)) if way == "skipped" else sum(learned))
        trained[way] = {k: v.clone() for k, v in trainer.policy.unwrapped.state_dict().items()}
    for name, value in trained["all"].items():
        torch.testing.assert_close(trained["skipped"][name], value, rtol=0, atol=1e-6)
    assert passes["kl"] == passes["all"] > passes["skipped"] > 0


def test_a_step_without_any_advantage_has_no_ratio(tiny_qwen: Path, tmp_path: Path):
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, train__beta=0.0), tmp_path / "data")
    before = {k: v.clone() for k, v in trainer.policy.unwrapped.state_dict().items()}
    metrics = trainer.policy.update(trainer.sample_groups(trainer.batch_at(0)), 0)
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "update_tokens": 0.0}
    for name, value in trainer.policy.unwrapped.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_shaped_weight_changes_teacher_rows_alone(tiny_qwen: Path, tmp_path: Path):
    """At mu = 1 the loss of a group is -sum of w A over tokens: w = 1 for the student's, p / (p + 0.1) for a teacher's."""
    losses = {}
    for weight in ("ratio", "shaped"):
        recipe = tiny_recipe(tmp_path / weight, tiny_qwen, train__teacher_weight=weight, train__beta=0.0)
        trainer = make_trainer(recipe, tmp_path / "data")
        groups = trainer.sample_groups(trainer.batch_at(0)[:1])
        for r in groups[0].rollouts:
            r.advantage = 1.0
        counts = [len(trainer.policy.encoder.completion_ids(r.response, 8)) for r in groups[0].rollouts]
        losses[weight] = trainer.policy.update(groups, 0)["loss"]
    assert losses["ratio"] == pytest.approx(-sum(counts) / (4 * 8))
    # A fresh model gives a token about 1 / vocabulary: the teachers' tokens then count for almost nothing.
    assert losses["shaped"] == pytest.approx(-sum(counts[:2]) / (4 * 8), rel=0.05)
    assert losses["shaped"] < -sum(counts[:2]) / (4 * 8)


# Teacher responses that are judged right


def cached(tmp_path: Path, questions: list[Question], right: dict[str, dict[str, int]], of: int = 6) -> Path:
    """A cache in which the first ``right[question][teacher]`` of ``of`` responses are right."""
    cache = ResponseCache.create(tmp_path / "cache")
    for source in TEACHERS:
        cache.register(source, model=source, revision=None, sampling={})
        with cache.writer(source) as writer:
            for q in questions:
                for i in range(of):
                    word = q.answer if i < right[q.id][source] else "black"
                    writer.append(q, Response(q.id, source, i, f"The answer is {word}."))
    return tmp_path / "cache"


def plus(tmp_path: Path, checkpoint: Path, **overrides: Any) -> Any:
    values: dict[str, Any] = {
        "cache_dir": str(tmp_path / "cache"), "collect__num_responses": 6, "rewards__answer": {"kind": "rules"},
        "train__num_generations": 8, "train__num_teacher_responses": 4, "train__teacher_draw": "judged_right",
    }  # fmt: skip
    return tiny_recipe(tmp_path / "run", checkpoint, **{**values, **overrides})


RIGHT = {
    "q0": {"a": 6, "b": 2}, "q1": {"a": 0, "b": 5}, "q2": {"a": 0, "b": 0}, "q3": {"a": 1, "b": 0}
}  # fmt: skip


def test_right_responses_are_drawn_in_proportion(tmp_path: Path):
    questions, said = tiny_questions(tmp_path / "data", 4), []
    cached(tmp_path, questions, RIGHT)
    recipe = plus(tmp_path, tmp_path)
    drawn = cached_teacher_responses(recipe, questions, say=said.append)
    assert "14 of 48" in said[0] and "0 have no verdict" in said[0] and "1 of 4" in said[0]
    pairs = {q.id: [drawn(q, epoch) for epoch in (0, 1)] for q in questions}
    assert all(len(responses) == 4 for epochs in pairs.values() for responses in epochs)
    counts = {id: [sum(r.source == t for e in epochs for r in e) for t in TEACHERS] for id, epochs in pairs.items()}
    assert counts["q0"] == [6, 2]  # all eight right ones over two epochs
    assert counts["q1"] == [0, 8] and counts["q3"] == [8, 0]
    assert counts["q2"] == [4, 4]  # none is right: any, balanced
    for id in ("q0", "q1", "q3"):
        assert all(r.index < RIGHT[id][r.source] for e in pairs[id] for r in e)


def test_a_right_response_that_does_not_fit_is_not_drawn(tmp_path: Path):
    questions = tiny_questions(tmp_path / "data", 4)
    cached(tmp_path, questions, RIGHT)
    seen: list[Response] = []

    def fits(response: Response) -> bool:
        seen.append(response)
        return response.source != "a"

    drawn = cached_teacher_responses(plus(tmp_path, tmp_path), questions, fits=fits)
    assert {r.source for r in drawn(questions[0], 0)} == {"b"} and all(r.index < 2 for r in drawn(questions[0], 0))
    seen.clear()
    assert {r.source for r in drawn(questions[3], 0)} == {"b"}  # its right one is too long, so any that fits
    assert len(seen) == 12  # each counted once


def test_what_is_right_stays_as_it_was_when_a_run_continues(tmp_path: Path):
    questions = tiny_questions(tmp_path / "data", 4)
    cached(tmp_path, questions, RIGHT)
    recipe = plus(tmp_path, tmp_path)
    before = cached_teacher_responses(recipe, questions)(questions[0], 0)
    (tmp_path / "run/checkpoints/step_000001").mkdir(parents=True)
    # The rules now call nothing right, as verdicts that have become known meanwhile could.
    changed = [Question(q.id, q.question, "mauve", q.images) for q in questions]
    assert cached_teacher_responses(recipe, changed)(changed[0], 0) == before
    right_responses_file(recipe).unlink()
    with pytest.raises(StateError, match=r"right_responses\.jsonl"):
        cached_teacher_responses(recipe, questions)
    (tmp_path / "run/checkpoints/step_000001").rmdir()
    assert cached_teacher_responses(recipe, changed)(changed[0], 0) != before  # a new run judges them itself


def test_verdicts_that_were_never_made_are_no_wrong_answers(tmp_path: Path):
    questions = tiny_questions(tmp_path / "data", 4)
    cached(tmp_path, questions, RIGHT)
    judge = {"base_urls": ["http://127.0.0.1:1/v1"], "model": "m"}
    recipe = plus(tmp_path, tmp_path, judge=judge, rewards__answer={"kind": "judge"})
    with pytest.raises(CacheError, match=r"judge\.max_unknown_share.*48 of 48.*judge_responses"):
        cached_teacher_responses(recipe, questions)
    recipe.judge.max_unknown_share = 1.0  # then every question draws from all, and the counts say so
    said: list[str] = []
    drawn = cached_teacher_responses(recipe, questions, say=said.append)
    assert "48 have no verdict" in said[0] and "4 of 4" in said[0]
    assert {r.source for r in drawn(questions[1], 0)} == {"a", "b"}


def test_eight_samples_join_four_teacher_responses(tiny_qwen: Path, tmp_path: Path):
    questions = tiny_questions(tmp_path / "data", 4)
    cached(tmp_path, questions, RIGHT)
    recipe = plus(
        tmp_path, tiny_qwen, train__max_steps=1, train__beta=0.0, train__negative_scale=0.5, discriminator__mode="none",
        rewards__similarity={"weight": 0.0}, train__max_completion_length=32,
    )  # fmt: skip
    trainer = make_trainer(recipe, tmp_path / "data", count=4)
    trainer.teacher_responses = cached_teacher_responses(recipe, questions, fits=trainer.policy.fits)
    groups, metrics = trainer.step(trainer.batch_at(0))
    assert [(len(g.students), len(g.teachers)) for g in groups] == [(8, 4)] * 4
    assert metrics["train/entropy"] > 0
    for group in groups:
        if group.question.id != "q2":
            assert all(r.verdict == 1.0 for r in group.teachers)
