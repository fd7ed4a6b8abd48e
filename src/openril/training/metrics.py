"""Compute the metrics of a step from its groups of all processes; docs/metrics.md explains every name.

Where a metric has the meaning of one of TRL's ``GRPOTrainer``, it has TRL's name, so that existing dashboards show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import stdev

from openril.records import Group, Rollout


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the means by side, without metrics that have no value in this step (nothing known, or nothing of a side)."""
    out: dict[str, float] = {}
    students = [r for g in groups for r in g.students]
    teachers = [r for g in groups for r in g.teachers]
    for side, rollouts in (("student", students), ("teacher", teachers)):
        put(out, "train/reward" if side == "student" else "reward/teacher", (r.reward for r in rollouts))
        put(out, f"reward/{side}_similarity", (r.similarity for r in rollouts))
        put(out, f"reward/{side}_answer", (r.verdict for r in rollouts))
        put(out, f"reward/{side}_advantage", (r.advantage for r in rollouts))
        names = dict.fromkeys(name for r in rollouts for name in r.rewards)
        for name in names:
            if name not in ("similarity", "answer"):
                put(out, f"reward/{side}_{name}", (r.rewards.get(name) for r in rollouts))
    for source in dict.fromkeys(r.response.source for r in teachers):
        put(out, f"reward/answer_{source}", (r.verdict for r in teachers if r.response.source == source))
    rewards = [r.reward for r in students if r.reward is not None]
    if len(rewards) > 1:
        out["train/reward_std"] = stdev(rewards)
    put(out, "train/completions/mean_length", (_tokens(r) for r in students))
    put(out, "train/completions/clipped_ratio", (float(r.response.finish_reason != "stop") for r in students))
    put(out, "train/advantage_abs", (abs(r.advantage) for r in [*students, *teachers]))
    put(out, "train/unknown_reward_share", (float(r.reward is None) for r in [*students, *teachers]))
    put(out, "train/frac_reward_zero_std", (float(all(r.advantage == 0 for r in g.rollouts)) for g in groups))
    return out


def _tokens(rollout: Rollout) -> float | None:
    ids = rollout.response.token_ids
    return None if ids is None else float(len(ids))


def put(out: dict[str, float], name: str, values: Iterable[float | None]) -> None:
    known = [v for v in values if v is not None]
    if known:
        out[name] = sum(known) / len(known)
