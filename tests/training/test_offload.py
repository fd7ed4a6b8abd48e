"""Parked models give their memory back, and every number of a run stays the same. Sharded: test_shard_files.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openril.training.offload import Offload
from support.checkpoints import TIMES, assert_same
from support.loop import SubstringRewards, make_trainer, tiny_recipe


def held(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().size() for t in tensors)


def states(optimizer: Any) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if v.dim()]


class Watching(SubstringRewards):
    """Rewards are computed while the discriminator has its turn; notes what then has memory."""

    trainer: Any

    def score(self, groups: Any) -> dict[str, float]:
        policy, discriminator = self.trainer.policy, self.trainer.discriminator
        reference = [] if policy.reference is None else list(policy.reference.parameters())
        self.seen = {
            "student": held(policy.unwrapped.parameters()),
            "reference": held(reference),
            "discriminator": held(discriminator.network.parameters()),
            "states": held([*states(policy.optimizer), *states(discriminator.optimizer)]),
        }
        return super().score(groups)


@pytest.mark.parametrize(
    ("overrides", "modes"),
    [({}, ("optimizer", "swap")), ({"student__lora": {"enabled": True, "r": 2}}, ("swap",))],
    ids=["full", "lora"],
)
def test_a_run_that_swaps_is_the_same_run(overrides: Any, modes: Any, tiny_qwen: Path, tmp_path: Path):
    rows = {}
    for mode in ("none", *modes):
        rewards = Watching()
        for steps in (1, 2):  # stopped once and continued
            values = {"train__max_steps": steps, "train__offload": mode, **overrides}
            recipe = tiny_recipe(tmp_path / mode, tiny_qwen, **values)
            trainer = rewards.trainer = make_trainer(recipe, tmp_path / "data", rewards=rewards)
            trainer.train()
        assert (rewards.seen["student"] == 0) == (mode == "swap")
        assert (rewards.seen["reference"] == 0) == (mode == "swap" or bool(overrides))
        assert rewards.seen["discriminator"] > 0
        assert (rewards.seen["states"] == 0) == (mode != "none")
        rows[mode] = trainer.folder.metrics()
        assert [row.get("time/offload", 0) > 0 for row in rows[mode]] == [mode != "none"] * 2
        rows[mode] = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows[mode]]
    for mode in modes:
        assert rows[mode] == rows["none"]
        for step in (1, 2):
            assert_same(*(tmp_path / m / f"checkpoints/step_00000{step}" for m in ("none", mode)))


def test_a_part_that_two_models_share_is_parked_only_if_neither_is_used():
    shared, one, two = (torch.nn.Linear(3, 3) for _ in range(3))
    offload = Offload("swap")
    offload.add("one", torch.nn.Sequential(shared, one))
    offload.add("two", torch.nn.Sequential(shared, two))
    before = [p.clone() for m in (shared, one, two) for p in m.parameters()]
    sizes = []
    for names in (("one",), ("two",), (), ("one", "two")):
        offload.use(*names)
        sizes.append([held(m.parameters()) for m in (shared, one, two)])
    assert sizes == [[48, 48, 0], [48, 0, 48], [0, 0, 0], [48, 48, 48]]
    after = [p for m in (shared, one, two) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_host_memory_comes_in_blocks_that_a_tensor_may_cross(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("openril.training.offload._BLOCK", 64)
    layers = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Linear(5, 7))
    before = [p.clone() for p in layers.parameters()]
    offload = Offload("swap")
    offload.add("model", layers)
    for _ in range(2):
        offload.use()
        assert held(layers.parameters()) == 0
        offload.use("model")
    assert all(torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True))
    # 180 + 20 + 140 + 28 = 368 bytes in 6 blocks of 64, which the second round used again.
    assert len({piece.untyped_storage().data_ptr() for pieces in offload._host.values() for piece in pieces}) == 6
