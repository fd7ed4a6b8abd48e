"""The study's figures, after the paper's 1, 5, 6 and 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openril.report.curves import series, smooth
from openril.storage import atomic_path, read_jsonl
from playground.study.plan import CONTENDERS, MAIN
from playground.study.scores import Results, Scores
from playground.study.tables import STUDENT_TITLES, TEACHER_TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
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
CURVES = (
    ("Similarity reward of student samples", "reward/student_similarity"),
    ("Answer reward of student samples", "reward/student_answer"),
    ("Validation questions, share right", "eval/score"),
)
SMOOTHED_OVER = 0.08
"""Share of the steps over which a curve is averaged."""


def draw_figures(results: Results, found: dict[str, Any], folder: Path) -> dict[str, tuple[str, Path | None]]:
    """Draw what there is something to draw for; returns title and file by the block's name. None: there is nothing yet."""
    figures: dict[str, tuple[str, Callable[[], Figure | None]]] = {
        "figure_skills": ("Contenders by skill and in the mean", lambda: skills_figure(found)),
        "figure_curves": ("Rewards and validation score over the steps", lambda: curves_figure(results)),
        "figure_ways": ("How the students' samples are written", lambda: ways_figure(results)),
        "figure_similarity": ("Kinds of similarity reward", lambda: similarity_figure(found)),
        "figure_responses": ("Cached responses of each teacher", lambda: responses_figure(found)),
    }
    drawn: dict[str, tuple[str, Path | None]] = {}
    for name, (title, make) in figures.items():
        figure = make()
        drawn[name] = (title, None)
        if figure is not None:
            path = folder / f"{name.removeprefix('figure_')}.png"
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=140)
            drawn[name] = (title, path)
    return drawn


def new_figure(width: float, height: float, title: str) -> Figure:
    # Figure without pyplot: no global state, and no display is looked for.
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


def by_step(axes: Axes) -> None:
    """Steps across, a legend where there is anything to name."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, frameon=False)


def error(e: dict[str, Any]) -> list[list[float]]:
    """Distances of the interval's ends, in points, as matplotlib wants them."""
    return [[max(0.0, 100 * (e["value"] - e["low"]))], [max(0.0, 100 * (e["high"] - e["value"]))]]


def skills_figure(found: dict[str, Any]) -> Figure | None:
    """Like the paper's Fig. 1: means with intervals, and beside them every skill."""
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
            axes.bar(
                x, 100 * mean["value"], color=COLOURS[name], yerr=error(mean), capsize=2, error_kw={"linewidth": 1}
            )
        for teacher, row in found["teachers"].items():
            axes.axhline(100 * row["mean"]["value"], color=TEACHERS[teacher][1], linestyle=":", linewidth=1)
        axes.set_xticks(range(len(names)), [CONTENDERS[n].title for n in names], rotation=40, ha="right")
        tidy(axes, STUDENT_TITLES[student] + ": mean of the skills")
        axes = figure.add_subplot(grid[line, 1])
        shown = [n for n in DOTS if n in rows] or names
        for offset, name in enumerate(shown):
            estimates = [rows[name]["skills"][skill] for skill in found["skills"]]
            places = [x + (offset - (len(shown) - 1) / 2) * 0.13 for x in range(len(estimates))]
            axes.errorbar(
                places, [100 * e["value"] for e in estimates], yerr=np.hstack([error(e) for e in estimates]), fmt="o",
                markersize=4, color=COLOURS[name], linewidth=0.8, label=CONTENDERS[name].title,
            )  # fmt: skip
        for teacher, row in found["teachers"].items():
            marker, colour = TEACHERS[teacher]
            values = [100 * row["skills"][s]["value"] for s in found["skills"]]
            axes.plot(
                range(len(values)), values, marker, color=colour, markersize=5, alpha=0.6, label=TEACHER_TITLES[teacher]
            )
        axes.set_xticks(range(len(found["skills"])), found["skills"], rotation=40, ha="right")
        axes.set_ylim(-3, 103)
        tidy(axes, STUDENT_TITLES[student] + ": by skill")
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside lower right", fontsize=8, frameon=False, ncol=len(named)
    )
    return figure


def with_runs(results: Results, student: str) -> list[tuple[str, Scores]]:
    """Main contenders of a student that the loop trained, in the order of the figures."""
    cells = results.cells.get(student, {}).get("contenders", {})
    return [(n, cells[n]) for n in ORDER if n in MAIN and n in cells and CONTENDERS[n].how == "loop"]


def curves_figure(results: Results) -> Figure | None:
    """Like the paper's Fig. 5: mean over the seeds, each seed behind it."""
    students = [s for s in results.cells if with_runs(results, s)]
    if not students:
        return None
    figure = new_figure(13, 3.0 * len(students) + 0.4, "Over the steps (thin: each seed)")
    for line, student in enumerate(students):
        for column, (title, metric) in enumerate(CURVES):
            axes = figure.add_subplot(len(students), len(CURVES), line * len(CURVES) + column + 1)
            for name, scores in with_runs(results, student):
                curves = [series(read_jsonl(f / "metrics.jsonl"), metric) for f in scores.folders]
                draw_seeds(axes, curves, COLOURS[name], CONTENDERS[name].title)
            tidy(axes, title, STUDENT_TITLES[student] if column == 0 else "")
            by_step(axes)
    return figure


def draw_seeds(axes: Axes, curves: Sequence[tuple[list[int], list[float]]], colour: str, label: str) -> None:
    curves = [c for c in curves if c[0]]
    if not curves:
        return
    drawn = []
    for steps, values in curves:
        width = 2 * int(len(values) * SMOOTHED_OVER / 2) + 1
        drawn.append(smooth(values, width))
        if len(curves) > 1:
            axes.plot(steps, drawn[-1], color=colour, alpha=0.3, linewidth=0.7)
    shortest = min(map(len, drawn))
    mean = np.mean([d[:shortest] for d in drawn], axis=0)
    axes.plot(
        curves[0][0][:shortest], mean, color=colour, linewidth=1.8, label=label, marker="o" if shortest == 1 else None
    )


WAY_TITLES = {
    "direct": "answers alone",
    "own": "derivations in a third manner",
    "a": "derivations in teacher A's manner",
    "b": "derivations in teacher B's manner",
}
RARE = 0.02
"""A share of samples that is not worth a panel."""


def ways_figure(results: Results) -> Figure | None:
    """Shares of direct answers and of derivations in the samples: what decides whether there is anything to reinforce."""
    students = [s for s in results.cells if any(d.get("ways") for _, c in with_runs(results, s) for d in c.done)]
    if not students:
        return None
    shares = [
        share
        for student in students
        for _, scores in with_runs(results, student)
        for done in scores.done
        for share in done["ways"].values()
    ]
    titles = {way: title for way, title in WAY_TITLES.items() if any(s.get(way, 0.0) > RARE for s in shares)}
    figure = new_figure(4.4 * len(titles), 3.0 * len(students) + 0.4, "Share of the students' samples")
    for line, student in enumerate(students):
        for column, (way, title) in enumerate(titles.items()):
            axes = figure.add_subplot(len(students), len(titles), line * len(titles) + column + 1)
            for name, scores in with_runs(results, student):
                curves = []
                for done in scores.done:
                    pairs = [(int(step), ways[way]) for step, ways in done["ways"].items() if way in ways]
                    curves.append(([s for s, _ in pairs], [v for _, v in pairs]))
                draw_seeds(axes, curves, COLOURS[name], CONTENDERS[name].title)
            axes.set_ylim(-0.03, 1.03)
            tidy(axes, title, STUDENT_TITLES[student] if column == 0 else "")
            by_step(axes)
    return figure


def _panels(
    found: dict[str, Any], names: Sequence[str], title: str
) -> tuple[Figure | None, list[tuple[str, Axes, dict[str, dict[str, Any]]]]]:
    """A figure with axes for every student that has at least two of those ablations (or the reference), and their rows by
    name; None where no student has."""
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
    """Like the paper's Fig. 6."""
    figure, panels = _panels(found, list(SIMILARITY_KINDS), "Kinds of similarity reward")
    for student, axes, rows in panels:
        for x, row in enumerate(rows.values()):
            mean = row["mean"]
            axes.bar(x, 100 * mean["value"], color="#4299e1" if x else "#2c5282", yerr=error(mean), capsize=3)
        axes.set_xticks(range(len(rows)), [SIMILARITY_KINDS[n] for n in rows])
        tidy(axes, STUDENT_TITLES[student])
    return figure


def responses_figure(found: dict[str, Any]) -> Figure | None:
    """Like the paper's Fig. 7."""
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
