"""Replay in the loop: only the discriminator's update meets earlier groups, and each with its own question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openril.records import Group
from openril.storage import read_jsonl
from support.loop import SubstringRewards, make_trainer, tiny_recipe


class Noting(SubstringRewards):
    """Rewards that note which groups they were asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[Group]] = []

    def score(self, groups: Any) -> dict[str, float]:
        self.asked.append(list(groups))
        return super().score(groups)


@pytest.mark.parametrize(
    "overrides",
    [
        {"discriminator__inputs": "image"},
        {"discriminator__loss": "bradley_terry", "discriminator__match_length": True},
    ],
    ids=["bce", "bradley_terry"],
)
def test_the_discriminator_alone_meets_earlier_groups(
    overrides: dict[str, Any], tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rewards = Noting()
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, discriminator__replay=0.5, **overrides)
    trainer = make_trainer(recipe, tmp_path / "data", rewards)
    assert trainer.discriminator is not None
    shown: list[tuple[list[Group], list[Group]]] = []
    learned: list[list[Group]] = []
    update, learn = trainer.discriminator.update, trainer.policy.update
    monkeypatch.setattr(
        trainer.discriminator, "update", lambda g, o, when: shown.append((list(g), list(o))) or update(g, o, when)
    )
    monkeypatch.setattr(trainer.policy, "update", lambda g, step: learned.append(list(g)) or learn(g, step))
    trainer.train()
    assert [(len(new), len(old)) for new, old in shown] == [(4, 0), (4, 4), (4, 4)]
    for (new, _), asked, taught in zip(shown, rewards.asked, learned, strict=True):
        assert [id(g) for g in new] == [id(g) for g in asked] == [id(g) for g in taught]
    earlier = {}
    for step, (new, old) in enumerate(shown):
        for g in old:  # an earlier group, word for word: its question with its images, and both sides' texts
            assert (g.question, [r.response.text for r in g.rollouts]) in earlier.values()
            assert all(r.reward is None and r.advantage == 0.0 and r.student_prob is None for r in g.rollouts)
            assert g.students and g.teachers
        earlier |= {(step, i): (g.question, [r.response.text for r in g.rollouts]) for i, g in enumerate(new)}
    rows = [read_jsonl(tmp_path / f"run/rollouts/step_{s:06d}.jsonl") for s in (1, 2, 3)]
    assert [len(r) for r in rows] == [16, 16, 16]
    assert "discriminator/replayed_accuracy" in trainer.folder.metrics()[-1]


def test_several_updates_of_a_step_draw_anew(tiny_qwen: Path, tmp_path: Path):
    trainer = make_trainer(
        tiny_recipe(tmp_path / "run", tiny_qwen, discriminator__replay=0.2, train__max_steps=2), tmp_path / "data"
    )
    trainer.train()
    ids = [[g.question.id for g in trainer.replayed_groups(i)] for i in range(12)]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) > 1
    assert ids == [[g.question.id for g in trainer.replayed_groups(i)] for i in range(12)]


@pytest.mark.parametrize("overrides", [{"discriminator__mode": "fixed"}, {"train__algorithm": "dr_grpo"}])
def test_nothing_is_remembered_where_nothing_is_learned(overrides: dict[str, Any], tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, discriminator__replay=0.5, train__max_steps=1, **overrides)
    trainer = make_trainer(recipe, tmp_path / "data")
    trainer.train()
    assert trainer.replayed_groups(0) == []
    assert not (tmp_path / "run/checkpoints/step_000001/replay.jsonl").exists()
