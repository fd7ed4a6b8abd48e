"""Draw what the discriminators know over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from openril.report.curves import smooth
from playground.comparison.plan import EVERYBODY
from playground.study.figures import new_figure, save, tidy
from playground.study.tables import STUDENT_TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"ril": "#2c5282", "ril_shuffled": "#a0aec0", "ril_plus_d": "#dd6b20", "ril_plus_d_fast": "#38a169"}
"""Of the contenders that the figure shows."""
PANELS = {
    "loss_minus_chance": ("loss over that of chance", 0.0),
    "balanced_accuracy": ("balanced accuracy (dotted: length alone)", 0.5),
}
"""Title, and the value of a discriminator that knows nothing."""
LENGTH = "length_only_accuracy"
SMOOTHED_OVER = 0.05
"""Share of the steps over which a curve is averaged."""


def discriminators(found: dict[str, Any]) -> Figure | None:
    """Return the curves of each student's discriminators, means over the seeds, or None while there are none."""
    curves = {s: {n: c for n, c in r["discriminators"].items() if n in COLORS} for s, r in found["students"].items()}
    curves = {student: names for student, names in curves.items() if names}
    if not curves:
        return None
    figure = new_figure(11, 3.2 * len(curves) + 0.6, "What the discriminator knows, by step")
    grid = figure.add_gridspec(len(curves), len(PANELS))
    for line, (student, names) in enumerate(curves.items()):
        for column, (key, (title, chance)) in enumerate(PANELS.items()):
            axes = figure.add_subplot(grid[line, column])
            for name, series in names.items():
                shown = {key: "-", **({LENGTH: ":"} if key == "balanced_accuracy" else {})}
                for curve, style in shown.items():
                    if values := series.get(curve):
                        steps = list(range(1, len(values) + 1))
                        label = EVERYBODY[name].title if style == "-" else None
                        smoothed = smooth(values, max(1, round(SMOOTHED_OVER * len(values))))
                        axes.plot(steps, smoothed, style, color=COLORS[name], linewidth=1.4, label=label)
            axes.axhline(chance, color="black", linewidth=0.8, linestyle="--")
            tidy(axes, f"{STUDENT_TITLES[student]}: {title}")
            axes.set_xlabel("step", fontsize=8)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def draw(found: dict[str, Any], folder: Path) -> str:
    """Draw the figure into ``folder`` and return its Markdown; "" while there is nothing to draw."""
    figure = discriminators(found)
    if figure is None:
        return ""
    path = folder / "discriminators.png"
    save(figure, path)
    return f"![What the discriminator knows](images/{folder.name}/{path.name})\n"
