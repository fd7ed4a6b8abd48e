"""What a running stage shows: a live bar with its figures on a terminal, one plain line a step anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


@dataclass(frozen=True)
class Figure:
    """A metric worth a place on the screen. Names as in metrics.jsonl; the first that a row holds is shown."""

    label: str
    names: tuple[str, ...]
    form: str = "{:.3f}"


FIGURES = (
    Figure("loss", ("loss", "train/loss", "discriminator/loss"), "{:.4f}"),
    Figure("token accuracy", ("mean_token_accuracy",)),
    Figure("reward", ("train/reward",)),
    Figure("similarity", ("reward/student_similarity",)),
    Figure("answer", ("reward/student_answer",)),
    Figure("teacher reward", ("reward/teacher",)),
    Figure("D accuracy", ("discriminator/accuracy",)),
    Figure("by length", ("discriminator/length_only_accuracy",)),
    Figure("KL", ("train/kl",), "{:.4f}"),
    Figure("tokens", ("train/completions/mean_length",), "{:.0f}"),
    Figure("unknown", ("train/unknown_reward_share",), "{:.0%}"),
    Figure("score", ("eval/score",)),
)
_QUIET_AT_ZERO = {"unknown"}


def figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of the figures a row of metrics holds, in their order."""
    shown = []
    for figure in FIGURES:
        value = next((row[name] for name in figure.names if isinstance(row.get(name), int | float)), None)
        if value is not None and not (value == 0 and figure.label in _QUIET_AT_ZERO):
            shown.append((figure.label, figure.form.format(value)))
    return shown


def time_parts(row: Mapping[str, Any]) -> str:
    """Seconds of the step and the share of each part, largest first: ``12.3 s (sampling 61%, update 30%)``."""
    total = row.get("time/step", row.get("seconds"))
    if not isinstance(total, int | float) or total <= 0:
        return ""
    parts = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/") and k != "time/step"}
    shares = [f"{name} {v / total:.0%}" for name, v in sorted(parts.items(), key=lambda p: -p[1]) if v / total >= 0.005]
    return f"{total:.1f} s" + (f" ({', '.join(shares)})" if shares else "")


def duration(seconds: float) -> str:
    """``9 s``, ``3 min``, ``2 h 05``, ``1 d 4 h``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d}" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class StageProgress:
    """Shows the steps of one stage; use it in ``with`` and give its ``report`` and ``warn`` to the trainer.

    title: the stage's name. enabled: off in all processes but the first.
    """

    def __init__(self, console: Console, title: str, enabled: bool = True) -> None:
        self.console = console
        self.title = title
        self.enabled = enabled
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._live: Live | None = None
        self._seconds: list[float] = []
        self._clock = self._bar.get_time
        self._last: float | None = None

    def report(self, step: int, total: int, row: Mapping[str, Any]) -> None:
        """Steps done so far, steps in all, and the metrics of the step just done (a row of metrics.jsonl)."""
        if not self.enabled:
            return
        left = self._time_left(total - step)
        if self._live is None:
            values = " ".join(f"{label.replace(' ', '_')}={value}" for label, value in figures(row))
            pieces = [f"{self.title} {step}/{total}", values, time_parts(row), f"left {left}" if left else ""]
            # Plain and unwrapped: this goes into log files, where each step is one line to grep.
            self.console.print("  ".join(p for p in pieces if p), highlight=False, markup=False, soft_wrap=True)
            return
        if self._task is None:
            self._task = self._bar.add_task(self.title, total=total, left="")
        self._bar.update(self._task, completed=step, total=total, left=f"{left} left" if left else "")
        self._live.update(Group(self._bar, self._details(row)))

    def warn(self, message: str) -> None:
        """A line that stays on the screen."""
        if self.enabled:
            self.console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    def _time_left(self, steps: int) -> str:
        # The time between reports counts checkpoints and evaluations too; the first step only starts the clock.
        now = self._clock()
        if self._last is not None:
            self._seconds = [*self._seconds[-49:], now - self._last]
        self._last = now
        if not self._seconds or steps <= 0:
            return ""
        return duration(steps * sum(self._seconds) / len(self._seconds))

    def _details(self, row: Mapping[str, Any]) -> Text:
        text = Text()
        for label, value in figures(row):
            text.append(f"  {label} ", style="dim")
            text.append(value)
        if seconds := time_parts(row):
            text.append("\n  a step ", style="dim")
            text.append(seconds)
        return text

    def __enter__(self) -> StageProgress:
        if self.enabled and self.console.is_terminal:
            self._live = Live(self._bar, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


__all__ = ["StageProgress", "duration", "figures", "time_parts"]
