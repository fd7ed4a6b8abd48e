"""Write the findings as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playground.comparison.findings import PARTS_OF_WORLD, WINNER, goals
from playground.comparison.plan import (
    CONTENDERS,
    CONTROLS,
    EVERYBODY,
    IN_REGIMES,
    RATES,
    REGIMES,
    WITH_SOME_TRUTH,
    WITHOUT_TRUTH,
    Rate,
)  # fmt: skip
from playground.study.tables import NOTHING, STUDENT_TITLES, TEACHER_TITLES, difference, each_student, markdown, percent

Found = dict[str, Any]


def rate(name: str | None) -> str:
    if not name:
        return "-"
    found = Rate.of(name)
    return f"{found.peak:g}" + (" falling" if found.falls else " constant")


def goal_table(found: Found) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        [g["goal"], STUDENT_TITLES[g["student"]], g["required"], difference(g["found"]), words[g["reached"]]]
        for g in goals(found)
    ]
    return markdown(["", "student", "goal", "found", "reached"], rows, words=5) if rows else NOTHING


def tuning(found: Found) -> str:
    """Write the validation score of every tuning run; the chosen one is bold."""
    parts = []
    for student, names in found["tuning"].items():
        rows = []
        for name in (n for n in EVERYBODY if n in names):
            chosen = found["tuned"][student][name]
            scores = [(r.name, names[name].get(r.name)) for r in RATES]
            shown = ["-" if s is None else f"**{s:.1f}**" if r == chosen else f"{s:.1f}" for r, s in scores]
            rows.append([EVERYBODY[name].title, *shown])
        parts.append(f"**{STUDENT_TITLES[student]}**\n\n" + markdown(["", *(rate(r.name) for r in RATES)], rows))
    return "\n".join(parts) or NOTHING


def contenders(found: Found) -> str:
    header = [
        "",
        *PARTS_OF_WORLD.values(),
        "over the start",
        "RIL+ over it",
        "rate",
        "CPU s a step",
        "CPU s in all",
        "seeds",
    ]

    def table(results: Found) -> str:
        rows = []
        if results["start"]["all"] is not None:
            shown = [percent(results["start"][part]) for part in PARTS_OF_WORLD]
            rows.append(["start", *shown, "", "", "", "", "", ""])
        for name in CONTENDERS:
            if (row := results["contenders"].get(name)) is not None:
                shown = [percent(row["parts"][part]) for part in PARTS_OF_WORLD]
                over = [difference(row["over_start"]), "" if name == WINNER else difference(row["winner_over"])]
                cost = [f"{row['seconds_per_step']:.2f}", f"{row['total']:.0f}"]
                rows.append([CONTENDERS[name].title, *shown, *over, rate(row["rate"]), *cost, str(row["seeds"])])
        for name, row in found["teachers"].items():
            rows.append(
                [TEACHER_TITLES[name], *(percent(row["parts"][p]) for p in PARTS_OF_WORLD), "", "", "", "", "", ""]
            )
        return markdown(header, rows) if len(rows) > 1 else ""

    return each_student(found, table)


def seconds(found: Found) -> str:
    def table(results: Found) -> str:
        rows = [
            [CONTENDERS[n].title, str(r["steps"]), percent(r["mean"]), difference(r["winner_over"]), str(r["seeds"])]
            for n, r in results["seconds"].items()
        ]
        if rows and (winner := results["contenders"].get(WINNER)):
            rows.append([CONTENDERS[WINNER].title, "80", percent(winner["mean"]), "", str(winner["seeds"])])
        return markdown(["", "steps", "mean of the skills", "RIL+ over it", "seeds"], rows) if rows else ""

    return each_student(found, table)


def steps(found: Found) -> str:
    """Write the scores after each number of steps, and how far RIL+ is ahead at the largest that it shares with a rival."""

    def table(results: Found) -> str:
        lengths = [n for row in results["steps"].values() for n, e in row["winner_over"].items() if e is not None]
        last = max(lengths, key=int, default="320")
        rows = []
        for name, row in results["steps"].items():
            means = [percent(m) for m in row["means"].values()]
            apart = [difference(row["over_80"].get("320")), difference(row["winner_over"].get(last))]
            rows.append([CONTENDERS[name].title, *means, *apart])
        head = ["", "40 steps", "80", "160", "320", "320 over 80", f"RIL+ over it at {last}"]
        return markdown(head, rows) if rows else ""

    return each_student(found, table)


def controls(found: Found) -> str:
    def table(results: Found) -> str:
        rows = []
        for name, control in CONTROLS.items():
            if (row := results["contenders"].get(name)) is not None:
                of = EVERYBODY[control.tuned_as].title
                rows.append(
                    [control.title, percent(row["mean"]), of, difference(row["without_d_over"]), str(row["seeds"])]
                )
        return markdown(["", "mean of the skills", "changes", "over it", "seeds"], rows) if rows else ""

    return each_student(found, table)


def regimes(found: Found) -> str:
    """Write RIL+ with and without its discriminator in every regime, and then who does what with how much truth."""
    by_truth = {"": "all", "truth_30": "30 %", "truth_10": "10 %", "truth_0": "none"}

    def table(results: Found) -> str:
        rows = []
        for regime, row in results["regimes"].items():
            if WINNER in row["means"]:
                gain = row["with_d_over_without"]
                means = [percent(row["means"].get(n)) for n in IN_REGIMES]
                title = REGIMES.get(regime, "the world as it is")
                lead = difference(row["winner_over_rival"])
                rows.append([title, *means, lead, difference(gain), str(gain["seeds"]) if gain else ""])
        if len(rows) < 2:
            return ""
        header = [
            "",
            *(CONTENDERS[n].title for n in IN_REGIMES),
            "RIL+ over rejection sampling",
            "with the discriminator over without",
            "seeds of the last difference",
        ]
        written = markdown(header, rows)
        truth = {r: results["regimes"][r]["means"] for r in by_truth if r in results["regimes"]}
        if len(truth) > 1:
            names = [n for n in (*WITH_SOME_TRUTH, *WITHOUT_TRUTH) if any(r and n in m for r, m in truth.items())]
            lines = [
                [EVERYBODY[n].title, *(percent(m.get(n)) if n in m else "" for m in truth.values())]
                for n in dict.fromkeys(names)
            ]
            written += "\n" + markdown(["questions with ground truth", *(by_truth[r] for r in truth)], lines)
        return written

    return each_student(found, table)


def same_rate(found: Found) -> str:
    """Write what the discriminator gives over RIL+ at its rate, where that was run, and what the rate alone gives."""

    def table(results: Found) -> str:
        rows = []
        for regime, row in results["regimes"].items():
            if (at := row["at_d_rate"]) is not None:
                title = REGIMES.get(regime, "the world as it is")
                apart = [row["with_d_over_without"], at["over_without"], at["with_d_over"]]
                rows.append([title, *map(difference, apart), str(at["mean"]["seeds"])])
        header = [
            "",
            "with the discriminator, at its rate, over RIL+",
            "RIL+ at that rate over RIL+",
            "with the discriminator over RIL+ at the same rate",
            "seeds",
        ]
        return markdown(header, rows) if rows else ""

    return each_student(found, table)


def distillation(found: Found) -> str:
    """Write what text and logits of one teacher give."""

    def table(results: Found) -> str:
        rows = []
        for name, row in results["distillation"].items():
            truth = "no" if name == "sft_teacher_text" or EVERYBODY[name].logits else "yes"
            over = "" if name == WINNER else difference(row["winner_over"])
            cost = [f"{row['seconds_per_step']:.2f}", f"{row['total']:.0f}"]
            rows.append([EVERYBODY[name].title, truth, percent(row["mean"]), over, *cost, str(row["seeds"])])
        header = ["", "ground truth", "mean of the skills", "RIL+ over it", "CPU s a step", "CPU s in all", "seeds"]
        return markdown(header, rows, words=2) if rows else ""

    return each_student(found, table)


def skills(found: Found) -> str:
    def table(results: Found) -> str:
        columns = [(CONTENDERS[n].title, row["skills"]) for n, row in results["contenders"].items() if n in CONTENDERS]
        columns += [(TEACHER_TITLES[t], row["skills"]) for t, row in found["teachers"].items()]
        if not columns:
            return ""
        names = list(columns[0][1])
        return markdown(
            ["", *(t for t, _ in columns)], [[s, *(f"{100 * c[s]:.0f}" for _, c in columns)] for s in names]
        )

    return each_student(found, table)


def discriminators(found: Found) -> str:
    """Write loss over chance, balanced accuracy and length-only accuracy in four parts of the run."""
    import numpy as np

    def table(results: Found) -> str:
        rows = []
        for name, curves in results["discriminators"].items():
            for key, title in (
                ("loss_minus_chance", "loss over chance"),
                ("balanced_accuracy", "balanced accuracy"),
                ("length_only_accuracy", "accuracy of length alone"),
            ):
                if key in curves:
                    quarters = [
                        f"{part.mean():+.2f}" if key == "loss_minus_chance" else f"{part.mean():.2f}"
                        for part in np.array_split(np.array(curves[key]), 4)
                    ]
                    rows.append([EVERYBODY[name].title, title, *quarters])
        return markdown(["", "", "steps 1-20", "21-40", "41-60", "61-80"], rows, words=2) if rows else ""

    return each_student(found, table)


BLOCKS: dict[str, Callable[[Found], str]] = {
    "goals": goal_table, "tuning": tuning, "contenders": contenders, "seconds": seconds, "steps": steps, "controls": controls,
    "regimes": regimes, "skills": skills, "discriminators": discriminators,
    "distillation": distillation, "same_rate": same_rate,
}  # fmt: skip
"""Generated parts of the page by the name in their markers."""
