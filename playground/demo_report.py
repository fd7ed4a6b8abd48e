"""A demo's page: the table, the curves, and groups of the first and the last step, as HTML and as text.

Everything that models wrote is escaped, and the page may load nothing but its own pictures.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from openril.records import STUDENT, Question
from openril.rewards import rules
from openril.storage import read_jsonl
from playground.demo_results import CONTENDERS, TEACHERS
from playground.world import SKILLS

if TYPE_CHECKING:
    from rich.table import Table

GROUPS_SHOWN = 5
"""Groups of a step on the page."""
CURVES = "curves.png"
POLICY = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class ShownGroup:
    """A group as it is shown. pictures: relative to the demo's folder. rows: of the rollout file, students first."""

    step: int
    question: Question
    pictures: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


def shown_groups(out: Path, run: Path, questions: Mapping[str, Question]) -> list[tuple[str, list[ShownGroup]]]:
    """A few groups of the run's first and last logged step: those with the most different outcomes, of different skills."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    picked = {"first": files[:1], "last": files[-1:] if len(files) > 1 else []}
    return [
        (f"{which} step ({int(path.stem.split('_')[1])})", pick(out, read_jsonl(path), questions))
        for which, paths in picked.items()
        for path in paths
    ]


def pick(out: Path, rows: Sequence[dict[str, Any]], questions: Mapping[str, Question]) -> list[ShownGroup]:
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_question.setdefault(row["question_id"], []).append(row)

    def interest(members: Sequence[dict[str, Any]]) -> int:
        return len({(row["source"] == STUDENT, row["verdict"], row["similarity"]) for row in members})

    ordered = sorted(by_question, key=lambda i: (-interest(by_question[i]), i))
    chosen: dict[str, str] = {}
    for question_id in ordered:
        chosen.setdefault(str(questions[question_id].metadata.get("skill")), question_id)
    return [
        ShownGroup(by_question[i][0]["step"], questions[i], tuple(_relative(out, questions[i])), tuple(by_question[i]))
        for i in list(chosen.values())[:GROUPS_SHOWN]
    ]


def _relative(out: Path, question: Question) -> list[str]:
    paths = [image.path for image in question.images if image.path is not None]
    return [path.resolve().relative_to(out.resolve()).as_posix() for path in paths]


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def percent(value: float | None, error: float | None = None, sign: str = "") -> str:
    """``71.3 ± 1.2``, in per cent."""
    if value is None:
        return "-"
    return f"{100 * value:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def exactly_right(question: Question, text: str) -> bool:
    return rules.score(question.rule or "auto", question, text) == 1.0


# Tables


def contender_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Contender, score, gain over Dr.GRPO."""
    rows = []
    for name in CONTENDERS:
        entry = summary["contenders"][name]
        gain = entry.get("gain")
        shown = percent(gain["difference"], gain["stderr"], sign="+") if gain else ""
        rows.append((entry["title"], percent(entry["mean"], entry["stderr"]), shown))
    return rows


def skill_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a skill, per cent; the teachers' columns are of their cached responses."""
    header = ["skill", "stands for", *(c.short for c in CONTENDERS.values()), *TEACHERS.values()]
    found = [summary["contenders"][name] for name in CONTENDERS] + [summary["teachers"][name] for name in TEACHERS]
    rows = [
        [skill, about.benchmark, *(number(e["skills"].get(skill), "{:.0%}").rstrip("%") for e in found)]
        for skill, about in SKILLS.items()
    ]
    rows.append(["mean", "", *(number(e["mean"], "{:.1%}").rstrip("%") for e in found)])
    return header, rows


def judge_lines(summary: Mapping[str, Any]) -> list[str]:
    held_out, own = summary["judge"]["held_out"], summary["judge"]["this_run"]
    return [
        f"judge: agrees with the exact rule on {number(held_out['agreement'], '{:.2%}')} of {held_out['num_verdicts']} "
        "hard held-out cases (measured when it was trained)",
        f"judge: agreed with it on {number(own['agreement'], '{:.2%}')} of the {own['num_verdicts']} responses it rewarded "
        f"in these runs; on {number(own['distinct_agreement'], '{:.2%}')} of the {own['num_distinct']} different ones",
    ]


def training_lines(summary: Mapping[str, Any]) -> list[str]:
    """Each curve's beginning and end, a line a run."""
    lines = []
    for name, curves in summary["training"].items():
        parts = [f"{title} {ends['first']:.2f} to {ends['last']:.2f}" for title, ends in curves.items()]
        lines.append(f"{CONTENDERS[name].title}: " + ", ".join(parts))
    return lines


NOTES = (
    "Scores: greedy answers to {n} held-out questions, by the exact rule, per cent ± standard error over questions; gains "
    "over Dr.GRPO are paired by question. A, B: the teachers' sampled responses to the training questions. "
    "RIL's one teacher is B (recipes/demo/ril_one.yaml). One seed."
)


def rich_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The two tables for a terminal."""
    from rich.table import Table

    scores = Table(title="held-out questions, per cent")
    for column, justify in (("contender", "left"), ("score", "right"), ("over Dr.GRPO", "right")):
        scores.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in contender_rows(summary):
        scores.add_row(*row)
    header, rows = skill_rows(summary)
    skills = Table(title="by skill")
    for i, column in enumerate(header):
        skills.add_column(column, justify="left" if i < 2 else "right")
    for cells in rows:
        skills.add_row(*cells, end_section=cells[0] == list(SKILLS)[-1])
    return [scores, skills]


# Text


def plain(line: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def group_text(group: ShownGroup) -> str:
    """A group for reading in a terminal."""
    question = group.question
    lines = [f"step {group.step}: {question.metadata.get('skill', '')} ({', '.join(group.pictures)})"]
    lines += [f"  {line}" for line in question.question.splitlines()]
    if question.choices:
        lines.append("  " + "  ".join(f"{'ABCDEFGHIJ'[i]}. {c}" for i, c in enumerate(question.choices)))
    lines.append(f"  truth: {question.answer}")
    lines.append(f"  {'source':<11}{'student_prob':>12}{'verdict':>9}{'exact':>7}{'advantage':>11}  response")
    for row in group.rows:
        exact = "right" if exactly_right(question, row["text"]) else "wrong"
        lines.append(
            f"  {row['source']:<11}{number(row['student_prob']):>12}{number(row['verdict'], '{:.0f}'):>9}{exact:>7}"
            f"{number(row['advantage'], '{:+.2f}'):>11}  {' / '.join(row['text'].splitlines())}"
        )
    return "\n".join(plain(line) for line in lines)


def groups_text(sections: Sequence[tuple[str, Sequence[ShownGroup]]]) -> str:
    parts = []
    for title, groups in sections:
        parts.append(f"== RIL, both teachers: {title} ==\n")
        parts += [group_text(group) + "\n" for group in groups]
    return "\n".join(parts)


# HTML

STYLE = """
:root { --ink: #1a202c; --soft: #64748b; --line: #e2e8f0; --good: #2f855a; --bad: #c53030; --accent: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f8fafc; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 12px; } p { margin: 6px 0; }
.soft { color: var(--soft); }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px; }
table { border-collapse: collapse; width: 100%; } 
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; } tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.mean td { font-weight: 600; border-top: 2px solid var(--line); } tr.ours td { color: var(--accent); font-weight: 600; }
.curves { width: 100%; height: auto; display: block; }
.group { display: grid; grid-template-columns: 190px 1fr; gap: 20px; margin: 14px 0; }
.group img { width: 168px; height: auto; image-rendering: pixelated; border: 1px solid var(--line);
  display: block; margin: 0 0 8px; }
.say { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
.q { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; }
.student { color: var(--accent); } .good { color: var(--good); } .bad { color: var(--bad); }
@media (max-width: 700px) { .group { grid-template-columns: 1fr; } }
"""


def escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def page(summary: Mapping[str, Any], sections: Sequence[tuple[str, Sequence[ShownGroup]]], curves: str = CURVES) -> str:
    """The whole page. curves: its picture, relative to the page."""
    header, rows = skill_rows(summary)
    parts = [
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>RIL on a laptop</title>
<style>{STYLE}</style></head><body><main>
<h1>RIL on a laptop</h1>
<p class="soft">{escape(NOTES.format(n=summary["test_questions"]))} {escape(f"{summary['minutes']:.1f} minutes.")}</p>
<h2>Contenders</h2><div class="card"><table>
<tr><th>contender</th><th class="n">score</th><th class="n">over Dr.GRPO</th></tr>"""
    ]
    for name, cells in zip(CONTENDERS, contender_rows(summary), strict=True):
        parts.append(f"<tr{' class=ours' if name == 'ril_both' else ''}>{_cells(cells, left=1)}</tr>")
    parts.append("</table></div>")
    lines = [*judge_lines(summary), *training_lines(summary)]
    parts += [f'<p class="soft">{escape(line)}</p>' for line in lines]
    parts.append(
        f'<h2>While training</h2><div class="card"><img class="curves" alt="curves" src="{quote(curves)}"></div>'
    )
    parts.append('<h2>By skill</h2><div class="card"><table><tr>')
    parts += [f"<th{' class=n' if i > 1 else ''}>{escape(column)}</th>" for i, column in enumerate(header)]
    parts.append("</tr>")
    for row in rows:
        parts.append(f"<tr{' class=mean' if row[0] == 'mean' else ''}>{_cells(row, left=2)}</tr>")
    parts.append("</table></div>")
    for title, groups in sections:
        parts.append(f"<h2>RIL, both teachers: {escape(title)}</h2>")
        parts += [_group(group) for group in groups]
    parts.append("</main></body></html>")
    return "\n".join(parts) + "\n"


def _cells(cells: Sequence[str], left: int) -> str:
    return "".join(f"<td{' class=n' if i >= left else ''}>{escape(cell)}</td>" for i, cell in enumerate(cells))


def _group(group: ShownGroup) -> str:
    question = group.question
    pictures = "".join(f'<img alt="picture {i + 1}" src="{quote(p)}">' for i, p in enumerate(group.pictures))
    choices = "".join(
        f'<div class="soft">{"ABCDEFGHIJ"[i]}. {escape(choice)}</div>' for i, choice in enumerate(question.choices)
    )
    rows = []
    for row in group.rows:
        who = "student" if row["source"] == STUDENT else ""
        right = exactly_right(question, row["text"])
        advantage = row["advantage"] or 0.0
        tone = "good" if advantage > 0 else "bad" if advantage < 0 else "soft"
        rows.append(
            f'<tr><td class="{who}">{escape(row["source"])}</td><td class="say">{escape(row["text"])}</td>'
            f'<td class="n">{number(row["student_prob"])}</td><td class="n">{number(row["verdict"], "{:.0f}")}</td>'
            f'<td class="{"good" if right else "bad"}">{"right" if right else "wrong"}</td>'
            f'<td class="n {tone}">{number(row["advantage"], "{:+.2f}")}</td></tr>'
        )
    return (
        f'<div class="card group"><div>{pictures}<div class="soft">{escape(question.metadata.get("skill", ""))}</div></div>'
        f'<div><div class="q">{escape(question.question)}</div>{choices}<p>truth: <b>{escape(question.answer)}</b></p>'
        '<table><tr><th>source</th><th>response</th><th class="n">student_prob</th><th class="n">verdict</th>'
        f'<th>exact rule</th><th class="n">advantage</th></tr>{"".join(rows)}</table></div></div>'
    )
