"""Write the findings as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from playground.study.plan import ABLATIONS, METHODS, REFERENCE

TEACHER_TITLES = {"teacher_a": "teacher A", "teacher_b": "teacher B"}
STUDENT_TITLES = {"student_qwen": "Qwen2.5-VL student", "student_internvl": "InternVL student"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a table whose first ``words`` columns are aligned to the left."""
    rule = [*["---"] * words, *["---:"] * (len(header) - words)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows)) + "\n"


def percent(e: dict[str, Any] | None) -> str:
    """Format as ``71.3 [70.1, 72.4]``."""
    return "-" if e is None else f"{100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"


def difference(e: dict[str, Any] | None) -> str:
    """Format as ``+2.1 [+0.4, +3.9]``, bold where the interval excludes 0."""
    if e is None:
        return "-"
    text = f"{100 * e['value']:+.1f} [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]"
    return f"**{text}**" if e["low"] > 0 or e["high"] < 0 else text


def seeds(row: dict[str, Any]) -> str:
    return "-" if row["seeds"] == [None] else str(len(row["seeds"]))


def judge(row: dict[str, Any]) -> str:
    found = row["judge"]
    if found is None:
        return "-"
    return f"{100 * found['agreement']:.1f} %" + (f" ({found['unknown']} unknown)" if found["unknown"] else "")


def cost(row: dict[str, Any]) -> tuple[str, str]:
    return (str(row["steps"]) if row["steps"] else "-", f"{row['seconds']:.0f}" if row["seconds"] else "-")


NOTHING = "Not measured yet.\n"

Block = Callable[[dict[str, Any]], str]


def each_student(found: dict[str, Any], table: Callable[[dict[str, Any]], str]) -> str:
    """Write a table for each student under its name, except empty ones."""
    parts = []
    for student, results in found["students"].items():
        if text := table(results):
            parts.append(f"**{STUDENT_TITLES.get(student, student)}**\n\n{text}")
    return "\n".join(parts) if parts else NOTHING


def goals(found: dict[str, Any]) -> str:
    words = {True: "yes", False: "**no**", None: "-"}

    def table(results: dict[str, Any]) -> str:
        rows = [
            [g["goal"], g["paper"], g["required"], g["found"] or "-", words[g["reached"]]] for g in results["goals"]
        ]
        return markdown(["", "paper", "goal", "here", "reached"], rows, words=5)

    return each_student(found, table)


def methods(found: dict[str, Any]) -> str:
    header = ["", "mean of the skills", "over the SFT student", "over Dr.GRPO", "RIL, both, over it"]
    header += ["judge agrees", "steps", "seconds", "seeds"]

    def table(results: dict[str, Any]) -> str:
        rows = []
        for name, cell in METHODS.items():
            if (row := results["contenders"].get(name)) is not None:
                over = ["" if name == "sft" else difference(row["over_start"])]
                over += ["" if name == "dr_grpo" else difference(row["over_baseline"])]
                over += ["" if name == REFERENCE else difference(row["reference_over"])]
                rows.append([cell.title, percent(row["mean"]), *over, judge(row), *cost(row), seeds(row)])
        teachers = [
            [TEACHER_TITLES[name], percent(row["mean"]), "", "", "", "-", "-", "-", "-"]
            for name, row in found["teachers"].items()
        ]
        return markdown(header, [*rows, *teachers]) if rows else ""

    return each_student(found, table)


def skills(found: dict[str, Any]) -> str:
    """Write the per cent right by skill, methods across."""

    def table(results: dict[str, Any]) -> str:
        columns = [(METHODS[n].title, results["contenders"][n]) for n in METHODS if n in results["contenders"]]
        columns += [(TEACHER_TITLES[n], row) for n, row in found["teachers"].items()]
        if not columns:
            return ""
        rows = [[s, *(f"{100 * row['skills'][s]['value']:.0f}" for _, row in columns)] for s in found["skills"]]
        rows.append(["**mean**", *(f"{100 * row['mean']['value']:.1f}" for _, row in columns)])
        return markdown(["", *(title for title, _ in columns)], rows)

    return each_student(found, table)


def passing(found: dict[str, Any]) -> str:
    def table(results: dict[str, Any]) -> str:
        if (p := results["passes"]) is None:
            return ""
        lines = [f"- {TEACHER_TITLES[name]}: {', '.join(won) or 'none'}" for name, won in p["by_teacher"].items()]
        return "\n".join([*lines, f"- each teacher: {', '.join(p['all']) or 'none'}"]) + "\n"

    return each_student(found, table)


def compute(found: dict[str, Any]) -> str:
    header = ["", "mean of the skills", "over itself at equal steps", "RIL, both, over it", "steps", "seconds", "seeds"]

    def table(results: dict[str, Any]) -> str:
        rows = []
        for name, row in results["compute"].items():
            over = [difference(row["over_equal_steps"]), difference(row["reference_over"])]
            rows.append([METHODS[name].title, percent(row["mean"]), *over, *cost(row), seeds(row)])
        reference = results["contenders"].get(REFERENCE)
        if rows and reference is not None:
            row = [METHODS[REFERENCE].title, percent(reference["mean"]), "", "", *cost(reference), seeds(reference)]
            rows.append(row)
        return markdown(header, rows) if rows else ""

    return each_student(found, table)


def ablations(found: dict[str, Any]) -> str:
    header = ["", "", "mean of the skills", "over RIL, both", "while training", "judge agrees", "seeds"]

    def while_training(row: dict[str, Any]) -> str:
        return "-" if row["on_the_way"] is None else f"{100 * row['on_the_way']:.1f}"

    def table(results: dict[str, Any]) -> str:
        rows = []
        for heading, cells in ABLATIONS.values():
            shown = heading
            for name, cell in cells.items():
                if (row := results["ablations"].get(name)) is not None:
                    over = difference(row["over_reference"])
                    rows.append(
                        [shown, cell.title, percent(row["mean"]), over, while_training(row), judge(row), seeds(row)]
                    )
                    shown = ""
        reference = results["contenders"].get(REFERENCE)
        if rows and reference is not None:
            mean = [percent(reference["mean"]), "", while_training(reference)]
            rows.insert(0, ["RIL, both", "", *mean, judge(reference), seeds(reference)])
        return markdown(header, rows, words=2) if rows else ""

    return each_student(found, table)


def conditions(found: dict[str, Any]) -> str:
    """List what the numbers come from."""
    lines = [f"- {found['questions']} {found['split']} questions, {len(found['skills'])} skills."]
    for student, results in found["students"].items():
        titles = {"contenders": "methods", "ablations": "ablations", "compute": "methods at equal compute"}
        shown = ", ".join(f"{len(results[group])} {title}" for group, title in titles.items() if results[group])
        lines.append(f"- {STUDENT_TITLES.get(student, student)}: {shown} finished.")
    if (cache := found["cache"]) is not None:
        right = ", ".join(f"{TEACHER_TITLES.get(n, n)} {100 * share:.1f} %" for n, share in cache["right"].items())
        lines.append(f"- Cached teacher responses that the exact rule calls right: {right}.")
        if (cached := cache.get("judge", {}).get("cached")) and cached["agreement"] is not None:
            lines.append(
                f"- The judge's verdicts on them agree with the exact rule on {100 * cached['agreement']:.2f} % of"
                f" {cached['verdicts']} ({cached['unknown']} unknown)."
            )
    lines.append(f"- {found['jobs']} jobs, {found['hours']:.1f} hours of work in all.")
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, Block] = {
    "conditions": conditions,
    "goals": goals,
    "contenders": methods,
    "skills": skills,
    "passes": passing,
    "compute": compute,
    "ablations": ablations,
}
"""Generated parts of the page by the name in their markers."""
