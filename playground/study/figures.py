"""Draw the study's figures, after the paper's Fig. 1, 5, 6 and 7, and the demo's curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openril.report.curves import series, smooth
from openril.storage import atomic_path, read_jsonl
from playground.study.plan import MAIN, METHODS
from playground.study.scores import Results, Scores
from playground.study.tables import STUDENT_TITLES, TEACHER_TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "base": "#cbd5e0", "sft": "#a0aec0", "sft_teacher_text": "#805ad5", "rejection_sampling": "#b794f4", "grpo": "#f6ad55",
    "dr_grpo": "#dd6b20", "gail": "#4fd1c5", "gad_like": "#81e6d9", "ril_a": "#90cdf4", "ril_b": "#4299e1",
    "ril_both": "#2c5282",
}  # fmt: skip
"""Of the methods, in their order in the figures."""
TEACHERS = {"teacher_a": ("^", "#2f855a"), "teacher_b": ("v", "#c53030")}
DOTS = ("sft", "dr_grpo", "ril_a", "ril_b", "ril_both")
SIMILARITY_KINDS = {
    "ril_both": "binary", "similarity_3": "3 levels", "similarity_11": "11 levels", "similarity_continuous": "continuous",
}  # fmt: skip
RESPONSES = {"cached_1": "1", "cached_4": "4", "ril_both": "16"}
CURVES = {
    "reward/student_similarity": "Similarity reward of student samples",
    "reward/student_answer": "Answer reward of student samples",
    "eval/score": "Validation questions, share right",
}
STYLE_TITLES = {
    "direct": "answers alone", "own": "derivations in a third style", "a": "derivations in teacher A's style",
    "b": "derivations in teacher B's style",
}  # fmt: skip
RARE = 0.02
"""A share of samples that is too small for a panel."""
SMOOTHED_OVER = 0.08
"""Share of the steps over which a curve is averaged."""


def draw_figures(results: Results, found: dict[str, Any], folder: Path) -> dict[str, tuple[str, Path | None]]:
    """Draw the figures; returns title and file by the block's name. The file is None while there is nothing to draw."""
    responses = "Cached responses of each teacher"
    figures: dict[str, tuple[str, Figure | None]] = {
        "figure_skills": ("Methods by skill and in the mean", skills_figure(found)),
        "figure_curves": ("Rewards and validation score over the steps", curves_figure(results)),
        "figure_styles": ("Response styles of the students' samples", styles_figure(results)),
        "figure_similarity": (
            "Kinds of similarity reward", ablation_figure(found, SIMILARITY_KINDS, "Kinds of similarity reward"),
        ),
        "figure_responses": (responses, ablation_figure(found, RESPONSES, responses)),
    }  # fmt: skip
    drawn: dict[str, tuple[str, Path | None]] = {}
    for name, (title, figure) in figures.items():
        drawn[name] = (title, None)
        if figure is not None:
            drawn[name] = (title, folder / f"{name.removeprefix('figure_')}.png")
            save(figure, folder / f"{name.removeprefix('figure_')}.png")
    return drawn


def save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)


def new_figure(width: float, height: float, title: str) -> Figure:
    # Without pyplot there is no global state, and no display is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    return figure


def tidy(axes: Axes, title: str = "", ylabel: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6, axis="y")
    axes.spines[["top", "right"]].set_visible(False)


def error(e: dict[str, Any]) -> list[list[float]]:
    """Return the distances of the interval's ends in points, as matplotlib expects them."""
    return [[max(0.0, 100 * (e["value"] - e["low"]))], [max(0.0, 100 * (e["high"] - e["value"]))]]


def skills_figure(found: dict[str, Any]) -> Figure | None:
    """Draw means with intervals, and next to them every skill, like the paper's Fig. 1."""
    students = [s for s, r in found["students"].items() if r["contenders"]]
    if not students:
        return None
    figure = new_figure(
        13, 3.6 * len(students) + 0.6, f"Right on {found['split']} questions (per cent, 95 % intervals)"
    )
    grid = figure.add_gridspec(len(students), 2, width_ratios=[1, 2])
    named: dict[str, Any] = {}  # label: handle, of all students
    for line, student in enumerate(students):
        rows = found["students"][student]["contenders"]
        axes = figure.add_subplot(grid[line, 0])
        names = [n for n in COLORS if n in rows]
        for x, name in enumerate(names):
            mean = rows[name]["mean"]
            axes.bar(x, 100 * mean["value"], color=COLORS[name], yerr=error(mean), capsize=2, error_kw={"linewidth": 1})
        for teacher, row in found["teachers"].items():
            axes.axhline(100 * row["mean"]["value"], color=TEACHERS[teacher][1], linestyle=":", linewidth=1)
        axes.set_xticks(range(len(names)), [METHODS[n].title for n in names], rotation=40, ha="right")
        tidy(axes, STUDENT_TITLES[student] + ": mean of the skills")
        axes = figure.add_subplot(grid[line, 1])
        shown = [n for n in DOTS if n in rows] or names
        for offset, name in enumerate(shown):
            estimates = [rows[name]["skills"][skill] for skill in found["skills"]]
            places = [x + (offset - (len(shown) - 1) / 2) * 0.13 for x in range(len(estimates))]
            axes.errorbar(
                places, [100 * e["value"] for e in estimates], yerr=np.hstack([error(e) for e in estimates]), fmt="o",
                markersize=4, color=COLORS[name], linewidth=0.8, label=METHODS[name].title,
            )  # fmt: skip
        for teacher, row in found["teachers"].items():
            marker, color = TEACHERS[teacher]
            values = [100 * row["skills"][s]["value"] for s in found["skills"]]
            axes.plot(
                range(len(values)), values, marker, color=color, markersize=5, alpha=0.6, label=TEACHER_TITLES[teacher]
            )
        axes.set_xticks(range(len(found["skills"])), found["skills"], rotation=40, ha="right")
        axes.set_ylim(-3, 103)
        tidy(axes, STUDENT_TITLES[student] + ": by skill")
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside lower right", fontsize=8, frameon=False, ncol=len(named)
    )
    return figure


Series = tuple[list[int], list[float]]
"""Steps and values."""


@dataclass
class Panel:
    """Axes with a curve for each method, each with the series of all its seeds."""

    title: str
    curves: list[tuple[str, str, list[Series]]]
    """Label, color, and a series for each seed."""
    ylabel: str = ""
    share: bool = False
    """Whether the values lie in [0, 1]."""


def curve_figure(title: str, rows: Sequence[Sequence[Panel]], width: float) -> Figure:
    """Draw rows of panels: the mean over the seeds, and thinner each seed."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(width, 3.0 * len(rows) + 0.4, title)
    for line, row in enumerate(rows):
        for column, panel in enumerate(row):
            axes = figure.add_subplot(len(rows), len(row), line * len(row) + column + 1)
            for label, color, curves in panel.curves:
                draw_seeds(axes, [c for c in curves if c[0]], color, label)
            if panel.share:
                axes.set_ylim(-0.03, 1.03)
            tidy(axes, panel.title, panel.ylabel)
            axes.set_xlabel("step", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=7, frameon=False)
    return figure


def draw_seeds(axes: Axes, curves: Sequence[Series], color: str, label: str) -> None:
    if not curves:
        return
    smoothed = [smooth(values, 2 * int(len(values) * SMOOTHED_OVER / 2) + 1) for _, values in curves]
    for (steps, values), line in zip(curves, smoothed, strict=True):
        axes.plot(steps, line if len(curves) > 1 else values, color=color, alpha=0.3, linewidth=0.7)
    shortest = min(map(len, smoothed))
    mean = np.mean([line[:shortest] for line in smoothed], axis=0)
    marker = "o" if shortest == 1 else None
    axes.plot(curves[0][0][:shortest], mean, color=color, linewidth=1.8, label=label, marker=marker)


def with_runs(results: Results, student: str) -> list[tuple[str, Scores]]:
    """Return the main methods of a student that the loop trained, in the order of the figures."""
    cells = results.cells.get(student, {}).get("contenders", {})
    return [(n, cells[n]) for n in COLORS if n in MAIN and n in cells and METHODS[n].how == "loop"]


def _student_rows(
    results: Results, titles: Mapping[str, str], series_of: Callable[[Scores, str], list[Series]], share: bool = False
) -> list[list[Panel]]:
    """Return a row of panels for each student that has runs, with a panel for each of the titles."""
    rows = []
    for student in results.cells:
        runs = with_runs(results, student)
        panels = [
            Panel(title, [(METHODS[n].title, COLORS[n], series_of(scores, key)) for n, scores in runs], share=share)
            for key, title in titles.items()
            if runs
        ]
        if panels:
            panels[0].ylabel = STUDENT_TITLES[student]
            rows.append(panels)
    return rows


def curves_figure(results: Results) -> Figure | None:
    """Draw rewards and validation scores, like the paper's Fig. 5."""

    def series_of(scores: Scores, metric: str) -> list[Series]:
        return [series(read_jsonl(folder / "metrics.jsonl"), metric) for folder in scores.folders]

    rows = _student_rows(results, CURVES, series_of)
    return curve_figure("Over the steps (thin: each seed)", rows, 13) if rows else None


def styles_figure(results: Results) -> Figure | None:
    """Draw the shares of direct answers and of derivations in the samples, since only sampled styles can be reinforced."""

    def series_of(scores: Scores, style: str) -> list[Series]:
        by_step = [
            {int(step): shares[style] for step, shares in d.get("ways", {}).items() if shares} for d in scores.done
        ]
        return [(list(shares), list(shares.values())) for shares in by_step]

    def most(style: str) -> float:
        runs = [scores for student in results.cells for _, scores in with_runs(results, student)]
        return max((v for scores in runs for _, values in series_of(scores, style) for v in values), default=0.0)

    titles = {style: title for style, title in STYLE_TITLES.items() if most(style) > RARE}
    rows = _student_rows(results, titles, series_of, share=True)
    return curve_figure("Share of the students' samples", rows, 4.4 * len(titles)) if rows else None


def ablation_figure(found: dict[str, Any], labels: Mapping[str, str], title: str) -> Figure | None:
    """Compare cells (the reference among them) of each student that has several of them, like the paper's Fig. 6 and 7."""
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    for student, results in found["students"].items():
        rows = {label: results["ablations"].get(n) or results["contenders"].get(n) for n, label in labels.items()}
        shown[student] = {label: row["mean"] for label, row in rows.items() if row is not None}
    shown = {student: means for student, means in shown.items() if len(means) > 1}
    if not shown:
        return None
    figure = new_figure(max(6.4, 4.6 * len(shown)), 3.4, f"{title} (mean of the skills, per cent)")
    for column, (student, means) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), column)
        errors = np.hstack([error(mean) for mean in means.values()])
        values = [100 * mean["value"] for mean in means.values()]
        axes.bar(list(means), values, yerr=errors, capsize=3, color="#4299e1", width=0.6)
        tidy(axes, STUDENT_TITLES[student])
    return figure
