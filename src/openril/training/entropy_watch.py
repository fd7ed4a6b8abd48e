"""Watch the entropy of the student's samples over the steps of a run."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 10
FACTOR = 2.0
LEAST = 0.5


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
