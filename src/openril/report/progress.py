"""The progress display of every command: bars with figures on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


@dataclass(frozen=True)
class Figure:
    """A metric that is shown on the screen. Of its names in metrics.jsonl, the first that a row holds is shown."""

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
    """Return label and value of the figures that a row of metrics holds, in the order of ``FIGURES``."""
    shown = []
    for figure in FIGURES:
        value = next((row[name] for name in figure.names if isinstance(row.get(name), int | float)), None)
        if value is not None and not (value == 0 and figure.label in _QUIET_AT_ZERO):
            shown.append((figure.label, figure.form.format(value)))
    return shown


def time_parts(row: Mapping[str, Any]) -> str:
    """Return the step's seconds and the share of each part, largest first: ``12.3 s (sampling 61%, update 30%)``."""
    total = row.get("time/step", row.get("seconds"))
    if not isinstance(total, int | float) or total <= 0:
        return ""
    parts = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/") and k != "time/step"}
    shares = [f"{name} {v / total:.0%}" for name, v in sorted(parts.items(), key=lambda p: -p[1]) if v / total >= 0.005]
    return f"{total:.1f} s" + (f" ({', '.join(shares)})" if shares else "")


def duration(seconds: float) -> str:
    """Write seconds as ``9 s``, ``3 min``, ``2 h 05`` or ``1 d 4 h``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d}" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def rate_text(per_second: float) -> str:
    """Write a rate as ``2.4/s``, ``12/min`` or ``3.0/h``, in the shortest unit of time in which it is at least one."""
    units = ((1, "s"), (60, "min"), (3600, "h"))
    value, unit = next(((per_second * n, u) for n, u in units if per_second * n >= 1), (per_second * 3600, "h"))
    return f"{value:,.0f}/{unit}" if value >= 10 else f"{value:.1f}/{unit}"


def say(console: Console, text: str) -> None:
    """Print a line as it is: a path or an id may hold [brackets], which rich would take for markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def warn_line(console: Console, stage: str, message: str) -> None:
    """Print a warning of a stage as it is, like ``ProgressDisplay.warn``."""
    console.print(Text(f"{stage}: warning: {message}", style="yellow"), soft_wrap=True)


@dataclass
class _Bar:
    """The state of one named piece of work. marks: (seconds, done) at most once a second, the oldest first."""

    printed: float
    task: TaskID | None = None
    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=50))

    def rate(self, now: float, done: int) -> float | None:
        """Return the units per second over the last marks. The first call only starts the clock, so that resumed work
        does not count; checkpoints and evaluations between two calls do."""
        if self.marks and done < self.marks[-1][1]:
            self.marks.clear()
        rate = None
        if self.marks and now > self.marks[0][0] and done > self.marks[0][1]:
            rate = (done - self.marks[0][1]) / (now - self.marks[0][0])
        if not self.marks or now - self.marks[-1][0] >= 1:
            self.marks.append((now, done))
        return rate


class ProgressDisplay:
    """Show how far named pieces of work are: bars on a terminal, plain lines with the same content anywhere else.

    ``with ProgressDisplay(console) as display: display.show("teacher a", 3, 20)``. The methods may be called from any
    thread. Under a launcher only the first process (``$RANK``) shows anything, because processes share one terminal.

    Args:
        console: Where to draw.
        title: The name of the bar that ``report`` moves.
        enabled: Whether to show anything; None for the first process alone.
        every: Seconds between two plain lines for one name. The first and the last line are always printed.
        transient: Whether the bars disappear when the block ends. Quick work then prints no plain line at all.
    """

    def __init__(
        self,
        console: Console,
        title: str = "",
        *,
        enabled: bool | None = None,
        every: float = 10.0,
        transient: bool = False,
    ) -> None:
        self.console = console
        self.title = title
        self.enabled = int(os.environ.get("RANK") or 0) == 0 if enabled is None else enabled
        self.every = every
        self.transient = transient
        self._columns = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
            console=console,
        )
        self._bars: dict[str, _Bar] = {}
        self._live: Live | None = None
        self._clock = time.monotonic
        self._lock = threading.RLock()

    def show(
        self,
        name: str,
        done: int,
        total: int | None = None,
        *,
        state: str = "",
        left: float | None = None,
        details: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Set how far one piece of work is; the first call adds its bar.

        Args:
            total: How many units there are, or None while that is unknown.
            state: A few words after the numbers, for example ``3 in flight``.
            left: Seconds until the end; None to estimate them from the rate so far.
            details: Labels and values, shown below the bars.
        """
        if not self.enabled:
            return
        with self._lock:
            now = self._clock()
            first = name not in self._bars
            bar = self._bars.setdefault(name, _Bar(printed=now))
            rate = bar.rate(now, done)
            if left is None and rate and total is not None and done < total:
                left = (total - done) / rate
            speed = [rate_text(rate)] if rate else []
            speed += [f"left {duration(left)}"] if left is not None else []
            if self._live is not None:
                if bar.task is None:
                    bar.task = self._columns.add_task(escape(name), total=total, state="", speed="")
                self._columns.update(bar.task, completed=done, total=total, state=state, speed=", ".join(speed))
                self._live.update(Group(self._columns, _below(details)) if details else self._columns)
            elif now - bar.printed >= self.every or ((first or done == total) and not self.transient):
                bar.printed = now
                values = " ".join(f"{label.replace(' ', '_')}={value}" for label, value in details)
                count = f"{name} {done}" + (f"/{total}" if total is not None else "")
                # Plain and unwrapped: this goes into log files, where one line is one thing to grep.
                self._print("  ".join(piece for piece in (count, state, values, *speed) if piece))

    def report(self, step: int, total: int, row: Mapping[str, Any]) -> None:
        """Show the steps done so far, and the metrics of the step just done (a row of metrics.jsonl)."""
        seconds = time_parts(row)
        self.show(self.title, step, total, details=[*figures(row), *[("step", seconds)] * bool(seconds)])

    def remove(self, name: str) -> None:
        """Take a bar off the screen."""
        with self._lock:
            bar = self._bars.pop(name, None)
            if bar is not None and bar.task is not None:
                self._columns.remove_task(bar.task)

    def note(self, message: str) -> None:
        """Print a line that stays on the screen."""
        if self.enabled:
            self._print(message)

    def warn(self, message: str) -> None:
        """Print a warning that stays on the screen."""
        if self.enabled:
            self.console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    def _print(self, text: str) -> None:
        say(self.console, text)

    def __enter__(self) -> ProgressDisplay:
        if self.enabled and self.console.is_terminal:
            self._live = Live(self._columns, console=self.console, refresh_per_second=4, transient=self.transient)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _below(details: Sequence[tuple[str, str]]) -> Text:
    text = Text()
    for label, value in details:
        text.append(f"  {label} ", style="dim")
        text.append(value)
    return text


__all__ = ["ProgressDisplay", "duration", "figures", "rate_text", "say", "time_parts", "warn_line"]
