"""Switches of the discriminator in the loop: how often it learns, when it does not, and the gate of its reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.loop import SubstringRewards, make_trainer, tiny_recipe


def calls(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the calls of the discriminator, in order."""
    noted: list[str] = []
    for name in ("update", "score", "measure"):
        whole = getattr(trainer.discriminator, name)
        monkeypatch.setattr(
            trainer.discriminator, name, lambda *a, name=name, whole=whole, **k: noted.append(name) or whole(*a, **k)
        )
    return noted


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"train__num_iterations": 2, "discriminator__num_iterations": 1}, ["update", "score"]),
        ({"discriminator__num_iterations": 3}, ["update", "update", "update", "score"]),
        ({"discriminator__mode": "fixed"}, ["score", "measure"]),
        ({"discriminator__update_below": 0.9}, ["score", "measure", "update", "score"]),
    ],
)
def test_the_order_of_a_step(
    overrides: dict[str, Any], expected: list[str], tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=1, **overrides), tmp_path / "data")
    noted = calls(trainer, monkeypatch)
    if "discriminator__update_below" in overrides:
        measure = trainer.discriminator.measure
        monkeypatch.setattr(trainer.discriminator, "measure", lambda g: {**measure(g), "balanced_accuracy": 0.89})
    trainer.train()
    assert noted == expected
    row = trainer.folder.metrics()[0]
    assert row.get("discriminator/updated") == (1.0 if "discriminator__update_below" in overrides else None)


def test_a_discriminator_that_is_right_enough_does_not_learn(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=1, discriminator__update_below=0.8)
    trainer = make_trainer(recipe, tmp_path / "data")
    noted = calls(trainer, monkeypatch)
    measure = trainer.discriminator.measure  # type: ignore[union-attr]
    monkeypatch.setattr(trainer.discriminator, "measure", lambda g: {**measure(g), "balanced_accuracy": 0.8})
    before = [p.detach().clone() for p in trainer.discriminator.trainable]  # type: ignore[union-attr]
    trainer.train()
    assert noted == ["score", "measure"]
    assert all((p == q).all() for p, q in zip(before, trainer.discriminator.trainable, strict=True))  # type: ignore[union-attr]
    row = trainer.folder.metrics()[0]
    assert (row["discriminator/updated"], row["discriminator/balanced_accuracy"]) == (0.0, 0.8)


class GatedRewards(SubstringRewards):
    """Rewards that note the gate they are computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[float] = []

    def score(self, groups: Any) -> dict[str, float]:
        self.gates.append(self.gate)
        return super().score(groups)


def test_the_gate_uses_the_accuracy_before_the_update(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rewards = GatedRewards()
    gate = {"enabled": True, "closed_below": 0.5, "open_above": 1.0, "smoothing": 0.5}
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, rewards={"similarity": {"gate": gate}})
    trainer = make_trainer(recipe, tmp_path / "data", rewards)
    update, accuracies = trainer.discriminator.update, iter([0.6, 0.8, 0.4])  # type: ignore[union-attr]
    monkeypatch.setattr(
        trainer.discriminator, "update", lambda *a: {**update(*a), "balanced_accuracy": next(accuracies)}
    )
    trainer.train()
    # Averages 0.6, 0.7 and 0.55; the gate rises from 0 at 0.5 to 1 at 1.
    assert rewards.gates == pytest.approx([0.2, 0.4, 0.1])
    assert [r["reward/similarity_gate"] for r in trainer.folder.metrics()] == pytest.approx([0.2, 0.4, 0.1])


def test_without_a_gate_there_is_none(tiny_qwen: Path, tmp_path: Path):
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=1), tmp_path / "data")
    trainer.train()
    assert trainer.gate is None and "reward/similarity_gate" not in trainer.folder.metrics()[0]
    assert not (tmp_path / "run/checkpoints/step_000001/gate.json").exists()
