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
TEACHERS = {"teacher_a": ("^", "#2f855a"), "teacher_b": ("v", "#c53030")}
ORDER = (
    "base", "sft", "sft_teacher_text", "rejection_sampling", "grpo", "dr_grpo", "gail", "gad_like", "ril_a", "ril_b",
    "ril_both",
)  # fmt: skip
DOTS = ("sft", "dr_grpo", "ril_a", "ril_b", "ril_both")
SIMILARITY_KINDS = {
    "ril_both": "binary", "similarity_3": "3 levels", "similarity_11": "11 levels", "similarity_continuous": "continuous",
}  # fmt: skip
RESPONSES = {"cached_1": 1, "cached_4": 4, "ril_both": 16}
CURVES = {
    "reward/student_similarity": "Similarity reward of student samples",
    "reward/student_answer": "Answer reward of student samples",
    "eval/score": "Validation questions, share right",
}
SMOOTHED_OVER = 0.08
"""Share of the steps over which a curve is averaged."""


def draw_figures(results: Results, found: dict[str, Any], folder: Path) -> dict[str, tuple[str, Path | None]]:
    """Draw the figures; returns title and file by the block's name. The file is None while there is nothing to draw."""
    figures: dict[str, tuple[str, Callable[[], Figure | None]]] = {
        "figure_skills": ("Contenders by skill and in the mean", lambda: skills_figure(found)),
        "figure_curves": ("Rewards and validation score over the steps", lambda: curves_figure(results)),
        "figure_styles": ("Response styles of the students' samples", lambda: styles_figure(results)),
        "figure_similarity": ("Kinds of similarity reward", lambda: similarity_figure(found)),
        "figure_responses": ("Cached responses of each teacher", lambda: responses_figure(found)),
    }
    drawn: dict[str, tuple[str, Path | None]] = {}
    for name, (title, make) in figures.items():
        path = folder / f"{name.removeprefix('figure_')}.png"
        figure = make()
        if figure is not None:
            save(figure, path)
        drawn[name] = (title, None if figure is None else path)
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
        names = [n for n in ORDER if n in rows]
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
    return [(n, cells[n]) for n in ORDER if n in MAIN and n in cells and METHODS[n].how == "loop"]


def _student_rows(
    results: Results,
    students: Sequence[str],
    titles: Mapping[str, str],
    series_of: Callable[[Scores, str], list[Series]],
) -> list[list[Panel]]:
    """Return a row of panels for each student, a panel for each key of ``titles``."""
    return [
        [
            Panel(
                title,
                [(METHODS[n].title, COLORS[n], series_of(scores, key)) for n, scores in with_runs(results, student)],
                STUDENT_TITLES[student] if column == 0 else "",
            )
            for column, (key, title) in enumerate(titles.items())
        ]
        for student in students
    ]


def curves_figure(results: Results) -> Figure | None:
    """Draw rewards and validation scores, like the paper's Fig. 5."""

    def series_of(scores: Scores, metric: str) -> list[Series]:
        return [series(read_jsonl(folder / "metrics.jsonl"), metric) for folder in scores.folders]

    students = [s for s in results.cells if with_runs(results, s)]
    rows = _student_rows(results, students, CURVES, series_of)
    return curve_figure("Over the steps (thin: each seed)", rows, 13) if rows else None


STYLE_TITLES = {
    "direct": "answers alone",
    "own": "derivations in a third style",
    "a": "derivations in teacher A's style",
    "b": "derivations in teacher B's style",
}
RARE = 0.02
"""A share of samples that is too small for a panel."""


def styles_figure(results: Results) -> Figure | None:
    """Draw the shares of direct answers and of derivations in the samples, since only sampled styles can be reinforced."""

    def series_of(scores: Scores, style: str) -> list[Series]:
        found = []
        for done in scores.done:
            pairs = [(int(step), shares[style]) for step, shares in done["ways"].items() if style in shares]
            found.append(([step for step, _ in pairs], [value for _, value in pairs]))
        return found

    students = [s for s in results.cells if any(d.get("ways") for _, c in with_runs(results, s) for d in c.done)]
    all_shares = [
        shares
        for student in students
        for _, scores in with_runs(results, student)
        for done in scores.done
        for shares in done["ways"].values()
    ]
    titles = {k: title for k, title in STYLE_TITLES.items() if any(s.get(k, 0.0) > RARE for s in all_shares)}
    rows = _student_rows(results, students, titles, series_of)
    for panel in (panel for row in rows for panel in row):
        panel.share = True
    return curve_figure("Share of the students' samples", rows, 4.4 * len(titles)) if rows else None


def _panels(
    found: dict[str, Any], names: Sequence[str], title: str
) -> tuple[Figure | None, list[tuple[str, Axes, dict[str, dict[str, Any]]]]]:
    """Return a figure with axes for every student that has at least two of the cells, and the rows of these cells."""
    rows = {
        student: {
            n: row for n in names if (row := results["ablations"].get(n) or results["contenders"].get(n)) is not None
        }
        for student, results in found["students"].items()
    }
    shown = {student: of_student for student, of_student in rows.items() if len(of_student) > 1}
    if not shown:
        return None, []
    figure = new_figure(max(6.4, 4.6 * len(shown)), 3.4, f"{title} (mean of the skills, per cent)")
    return figure, [
        (student, figure.add_subplot(1, len(shown), column), of_student)
        for column, (student, of_student) in enumerate(shown.items(), 1)
    ]


def similarity_figure(found: dict[str, Any]) -> Figure | None:
    """Compare the kinds of similarity reward, like the paper's Fig. 6."""
    figure, panels = _panels(found, list(SIMILARITY_KINDS), "Kinds of similarity reward")
    for student, axes, rows in panels:
        for x, row in enumerate(rows.values()):
            mean = row["mean"]
            axes.bar(x, 100 * mean["value"], color="#4299e1" if x else "#2c5282", yerr=error(mean), capsize=3)
        axes.set_xticks(range(len(rows)), [SIMILARITY_KINDS[n] for n in rows])
        tidy(axes, STUDENT_TITLES[student])
    return figure


def responses_figure(found: dict[str, Any]) -> Figure | None:
    """Compare numbers of cached responses, like the paper's Fig. 7."""
    figure, panels = _panels(found, list(RESPONSES), "Cached responses of each teacher")
    for student, axes, rows in panels:
        places = [RESPONSES[n] for n in rows]
        values = [100 * row["mean"]["value"] for row in rows.values()]
        errors = np.hstack([error(row["mean"]) for row in rows.values()])
        axes.errorbar(places, values, yerr=errors, marker="o", color="#2c5282", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(p) for p in places])
        tidy(axes, STUDENT_TITLES[student])
    return figure
