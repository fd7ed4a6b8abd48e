"""Watch the student over the steps of a run: the entropy of its samples, and whether anything tells them apart."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 10
"""Steps that both look back."""
FACTOR = 2.0
LEAST = 0.5
ROUNDING = 1e-9


class EntropyWatch:
    """Warns once per episode when the entropy runs away.

    The rule: the mean entropy of the last ``WINDOW`` steps is more than ``FACTOR`` times that of the first ``WINDOW``
    steps, and more than ``LEAST`` nats per token above it.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self._warned = False

    def see(self, entropy: float | None) -> str | None:
        """Take the entropy of one step in nats per token, and return a warning to show or None."""
        if entropy is None or math.isnan(entropy):
            return None
        self.recent.append(entropy)
        if len(self.first) < WINDOW:
            self.first.append(entropy)
            return None
        start, now = sum(self.first) / WINDOW, sum(self.recent) / WINDOW
        away = now > max(FACTOR * start, start + LEAST)
        warn, self._warned = away and not self._warned, away
        if not warn:
            return None
        return (
            f"train/entropy runs away: {now:.2f} nats per token over {WINDOW} steps, {start:.2f} over the first {WINDOW}."
            " The student's samples become random text. Options: train.negative_scale: 0.5, train.beta: 0.01 with"
            " train.kl_rows: student, train.baseline: students, or a lower train.optimizer.learning_rate."
        )


class AdvantageWatch:
    """Warns once per episode when no response had an advantage in the last ``WINDOW`` steps: the rewards teach nothing."""

    def __init__(self) -> None:
        self.steps = 0
        """How many steps in a row were without."""
        self.unparsed = 0.0
        """Answers of these steps in which the rule found nothing to compare."""

    def see(self, advantage: float | None, gate: float | None = None, unparsed: float | None = None) -> str | None:
        """Take the mean absolute advantage of one step, and return a warning to show or None.

        gate: The factor of the similarity reward's weight, if the recipe has a gate. unparsed: The number of answers in
        which a rule found nothing to compare, if the recipe has one.
        """
        if advantage is None or math.isnan(advantage):
            return None
        flat = advantage <= ROUNDING
        self.steps = self.steps + 1 if flat else 0
        self.unparsed = self.unparsed + (unparsed or 0.0) if flat else 0.0
        if self.steps != WINDOW:
            return None
        found = (
            f"train/advantage_abs is 0 in the last {WINDOW} steps: all responses to a question earn the same, and the student"
            " learns nothing from them."
        )
        if gate == 0:
            return (
                f"{found} The gate of the similarity reward is closed, because the discriminator does not tell student and"
                " teachers apart. Options: another reward next to it (rewards.answer.weight), a lower"
                " rewards.similarity.gate.closed_below, or rewards.similarity.gate.enabled: false."
            )
        if self.unparsed:
            found += (
                f" In {self.unparsed:.0f} answers the rule found nothing to compare (reward/unparsed). Options: another"
                " rewards.answer.rule, rewards.answer.kind: rules_then_judge, or a prompt that names the form of the answer."
            )
        return (
            f"{found} Look at reward/student_answer (1: the questions are too easy; 0: too hard, or the judge or the rule never"
            " agrees) and at train/unknown_reward_share."
        )
