"""Draw a run's curves as PNG: those of the paper's Fig. 5, and the health of discriminator and policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openril.storage import atomic_path, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHED_OVER = 0.05
"""The share of the run over which a curve is averaged. The values of the steps stay visible as a pale line."""


@dataclass(frozen=True)
class Line:
    """A metric in a panel. name: its key in metrics.jsonl. sparse: measured at some steps only, and drawn with marks."""

    name: str
    label: str
    color: str
    sparse: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes. share: the values are in [0, 1]. level: a dotted reference line, with its name."""

    title: str
    lines: tuple[Line, ...]
    share: bool = False
    level: tuple[float, str] | None = None


_BLUE, _ORANGE, _GREEN, _GRAY, _RED = "#2b6cb0", "#dd6b20", "#2f855a", "#718096", "#c53030"

FIGURES: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "learning": (
        "Student samples over the run (as in the paper's Fig. 5)",
        (
            Panel("Similarity reward", (Line("reward/student_similarity", "student", _BLUE),), share=True),
            Panel("Answer reward", (Line("reward/student_answer", "student", _ORANGE),), share=True),
            Panel("Evaluation score", (Line("eval/score", "validation", _GREEN, sparse=True),)),
        ),
    ),
    "health": (
        "Discriminator and policy",
        (
            Panel(
                "Discriminator accuracy",
                (
                    Line("discriminator/accuracy", "discriminator", _BLUE),
                    Line("discriminator/length_only_accuracy", "length alone", _GRAY),
                ),
                share=True,
                level=(0.5, "chance"),
            ),
            Panel("Discriminator entropy (nats)", (Line("discriminator/entropy", "entropy", _BLUE),)),
            Panel("Discriminator margin", (Line("discriminator/margin", "margin", _BLUE),), level=(0.0, "")),
            Panel("KL to the SFT student (nats per token)", (Line("train/kl", "k3", _RED),)),
            Panel("Completion length (tokens)", (Line("train/completions/mean_length", "student", _ORANGE),)),
            Panel("Share of samples cut at the limit", (Line("train/completions/clipped_ratio", "student", _RED),)),
        ),
    ),
}


def draw_curves(run_dir: Path, say: Callable[[str], None] = lambda message: None) -> list[Path]:
    """Draw ``run_dir/metrics.jsonl`` into ``run_dir/curves/``, and return the files, each written atomically.

    Panels without values are left out, and figures without panels are not drawn; ``say`` gets a line that names them.
    """
    rows = [row for row in read_jsonl(run_dir / "metrics.jsonl") if isinstance(row.get("step"), int)]
    written = []
    for name, (title, panels) in FIGURES.items():
        present = [p for p in panels if any(series(rows, line.name)[0] for line in p.lines)]
        missing = [p.title for p in panels if p not in present]
        if missing:
            say(f"curves: nothing to draw for {', '.join(missing)}")
        if present:
            path = run_dir / "curves" / f"{name}.png"
            _draw(path, title, present, rows)
            written.append(path)
    return written


EARLIER_NAMES = {
    "train/reward": "reward/student",
    "train/completions/mean_length": "train/completion_length",
    "train/completions/clipped_ratio": "train/cut_share",
}
"""The names that drawn metrics had in runs of earlier versions."""


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and the finite values of a metric, also under its earlier name."""
    found = [(row["step"], row.get(name, row.get(EARLIER_NAMES.get(name, name)))) for row in rows]
    pairs = [(step, value) for step, value in found if isinstance(value, int | float)]
    pairs = [(s, float(v)) for s, v in pairs if v == v and abs(v) != float("inf")]
    return [s for s, _ in pairs], [v for _, v in pairs]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the centered mean over ``width`` values (an odd number), and over those that exist at both ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _draw(path: Path, title: str, panels: Sequence[Panel], rows: Sequence[dict[str, Any]]) -> None:
    # Without pyplot there is no global state, and matplotlib looks for no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * height + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    last = max(row["step"] for row in rows)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(height, columns, number + 1)
        _draw_panel(axes, panel, rows, last)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[dict[str, Any]], last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    if panel.level is not None:
        value, label = panel.level
        axes.axhline(value, color=_GRAY, linestyle=":", linewidth=1, label=label or None)
    for line in panel.lines:
        steps, values = series(rows, line.name)
        if not steps:
            continue
        if line.sparse:
            axes.plot(steps, values, color=line.color, marker="o", markersize=4, linewidth=1.5, label=line.label)
            continue
        width = 2 * int(len(values) * SMOOTHED_OVER / 2) + 1
        if width > 1:
            axes.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, smooth(values, width), color=line.color, linewidth=1.8, marker=marker, label=line.label)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.set_xlim(min(1, last - 1), max(last, 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8, frameon=False)
