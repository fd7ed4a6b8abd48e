"""Replay of older student responses: what is remembered, what is drawn, and what it weighs in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openril.discriminator.replay import ReplayMemory
from openril.errors import StateError
from openril.records import Group, Question, Response, Rollout
from openril.training.discriminator_update import Discriminator
from openril.training.distributed import make_accelerator
from openril.training.setup import fresh_discriminator
from support.loop import tiny_recipe


def group(name: str, students: list[str], teachers: list[str] | None = None) -> Group:
    sides = (("student", students), ("a", ["I look at the square. It is red."] if teachers is None else teachers))
    return Group(
        Question(name, f"{name}?"), [Rollout(Response(name, s, i, t)) for s, ts in sides for i, t in enumerate(ts)]
    )


def filled(steps: int, kept: int = 50, share: float = 0.5) -> ReplayMemory:
    """Two questions a step; step s has positions 2 s and 2 s + 1."""
    memory = ReplayMemory(share, kept)
    for s in range(steps):
        memory.keep(2 * s, [group(f"q{2 * s + i}", [f"red {s}", f"blue {s}"]) for i in range(2)])
    return memory


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.2, 1), (0.75, 12), (0.05, 1), (0.4, 3)])
def test_as_many_groups_as_make_the_share(share: float, count: int):
    # Of 4 new and n old groups n / (4 + n) is the share: n = 4 share / (1 - share); 2.67 is rounded to 3.
    assert len(filled(20, share=share).draw(4, seed=0)) == count


def test_the_first_step_has_nothing_to_draw_and_the_second_what_there_is():
    assert filled(0).draw(4, seed=0) == []
    assert sorted(p for p, _ in filled(1).draw(4, seed=0)) == [0, 1]


def test_old_steps_are_forgotten():
    memory = filled(9, kept=3)
    assert len(memory) == 6
    assert {p for s in range(50) for p, _ in memory.draw(2, seed=s)} == {12, 13, 14, 15, 16, 17}


def test_a_draw_follows_from_the_seed_and_has_nobody_twice():
    memory = filled(10)
    drawn = memory.draw(8, seed=3)
    assert drawn == memory.draw(8, seed=3) != memory.draw(8, seed=4)
    assert len({p for p, _ in drawn}) == 8


def test_student_responses_alone_are_kept_with_their_question():
    [(position, responses)] = filled(1, share=0.3).draw(1, seed=1)
    assert [(r.question_id, r.source, r.index, r.text) for r in responses] == [
        (f"q{position}", "student", 0, "red 0"),
        (f"q{position}", "student", 1, "blue 0"),
    ]


def test_saved_and_loaded_draws_the_same(tmp_path: Path):
    memory = filled(6, kept=4)
    odd = 'a "b"\nc\u2028d\x85e\x0b größer 红'  # line ends for some readers
    whole = Response("q", "student", 0, odd, "length", (1, 2), (-0.1, -0.2))
    memory.keep(12, [Group(Question("q", "?"), [Rollout(whole)])])
    memory.save(tmp_path / "replay.jsonl")
    again = ReplayMemory(0.5, 4)
    again.keep(0, [group("other", ["x"])])
    again.load(tmp_path / "replay.jsonl")
    assert again.draw(20, seed=0) == memory.draw(20, seed=0)
    assert odd in [r.text for _, rs in again.draw(20, seed=0) for r in rs]
    again.keep(14, [group("q14", ["y"])])
    assert len(again) == 6  # the oldest step has left here too: 2 + 2 + 1 + 1


def test_a_damaged_file_is_an_error(tmp_path: Path):
    with pytest.raises(StateError, match=r"replay\.jsonl: expected .*No such file"):
        ReplayMemory(0.5, 4).load(tmp_path / "replay.jsonl")
    (tmp_path / "replay.jsonl").write_text('{"groups": [{"position": 1}]}\n')
    with pytest.raises(StateError, match="texts"):
        ReplayMemory(0.5, 4).load(tmp_path / "replay.jsonl")


def made(checkpoint: Path, folder: Path, **overrides: Any) -> Discriminator:
    recipe = tiny_recipe(folder / "run", checkpoint, **overrides)
    d = fresh_discriminator(recipe, make_accelerator(recipe), recipe.discriminator.optimizer)
    with torch.no_grad():
        d.accelerator.unwrap_model(d.network).head.weight.mul_(20)
    return d


def learned(d: Discriminator, monkeypatch: pytest.MonkeyPatch, *groups: Any) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics and the gradient of an update that is not taken."""
    found: list[torch.Tensor] = []

    def keep(accelerator: Any, optimizer: Any, parameters: Any, limit: float, what: str) -> float:
        found.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr("openril.training.discriminator_update.take_step", keep)
        return d.update(*groups), found[0]


NEW = [group(f"n{i}", ["red", f"it is blue {i}"], ["I look. It is red.", f"Answer: {i}"]) for i in range(3)]
OLD = [group(f"o{i}", [f"red red {i}", "no"], ["I see the square."]) for i in range(2)]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"discriminator__loss": "bradley_terry", "discriminator__inputs": "question"},
        {"discriminator__match_length": True},
        {"discriminator__max_tokens_per_micro_batch": 120},
    ],
    ids=["bce", "bradley_terry", "match_length", "split"],
)
def test_new_and_old_groups_have_their_shares_of_the_loss(
    overrides: dict[str, Any], tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """0.7 of the mean over three new groups and 0.3 of that over two old ones, in value and gradient (logits are float32)."""
    monkeypatch.setattr("openril.training.setup.master_dtype", lambda recipe: torch.float64)
    d = made(tiny_qwen, tmp_path, discriminator__replay=0.3, **overrides)
    new, of_new = learned(d, monkeypatch, NEW)
    old, of_old = learned(d, monkeypatch, OLD)
    both, of_both = learned(d, monkeypatch, NEW, OLD)
    assert new["loss"] != pytest.approx(old["loss"], abs=1e-4)
    assert both["loss"] == pytest.approx(0.7 * new["loss"] + 0.3 * old["loss"], abs=1e-6)
    expected = 0.7 * of_new + 0.3 * of_old
    assert (of_both - expected).abs().max() < 1e-4 * expected.abs().max()


def test_health_is_about_the_new_groups(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    d = made(tiny_qwen, tmp_path, discriminator__replay=0.3)
    new, _ = learned(d, monkeypatch, NEW)
    both, _ = learned(d, monkeypatch, NEW, OLD)
    d.score(OLD)
    right = [(r.student_prob or 0.0) >= 0.5 for g in OLD for r in g.students]
    assert "replayed_groups" not in new
    assert both.pop("replayed_groups") == 2
    assert both.pop("replayed_accuracy") == sum(right) / 4
    assert new.keys() == both.keys()
    for name in new.keys() - {"loss"}:
        assert both[name] == pytest.approx(new[name], abs=1e-6), name
