"""Report the demo: its summary, tables, curves, the page of its runs, and groups of the first and the last step as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openril.data.reading import read_file
from openril.errors import StateError
from openril.evaluation.summary import Evaluation, Row, build_evaluation, compare
from openril.recipe.loading import load_saved_recipe
from openril.records import STUDENT, Question
from openril.report.curves import series
from openril.rewards.degenerate import is_empty, is_repetitive
from openril.stages.report import write_report as write_page
from openril.storage import read_jsonl, write_json, write_text
from playground.runner import Clock
from playground.study.figures import COLORS, Panel, Series, curve_figure, save
from playground.study.metrics import Judged, agreement, cached_responses, exactly_right, rollouts, share, student_styles
from playground.world import SKILLS

if TYPE_CHECKING:
    from rich.console import Console

GROUPS_SHOWN = 5
"""Groups of a step in groups.txt."""


class DemoMethod(NamedTuple):
    """A row of the demo's tables."""

    title: str
    short: str
    """Heading of its column."""
    run: str
    """Its folder."""
    evaluation: str = "final"
    """Name of its evaluation in that folder."""


METHODS = {
    "sft": DemoMethod("starting student", "start", "ril", "base"),
    "dr_grpo": DemoMethod("Dr.GRPO", "Dr.GRPO", "dr_grpo"),
    "rejection_sampling": DemoMethod("rejection sampling", "rejection", "rejection_sampling"),
    "ril": DemoMethod("RIL as published", "RIL", "ril"),
    "ril_plus": DemoMethod("RIL+", "RIL+", "ril_plus"),
}
TRAINED = [name for name in METHODS if name != "sft"]
BASELINE = "dr_grpo"
SHADES = {"dr_grpo": "dr_grpo", "rejection_sampling": "rejection_sampling", "ril": "ril_both", "ril_plus": "ril_b"}
"""Colors of the curves, by the names of the study's figures."""
TEACHERS = {"teacher_a": "A", "teacher_b": "B"}
"""The teachers and their names in tables."""
DERIVATIONS = "share of samples with a derivation"
CURVES = {
    "similarity reward": "reward/student_similarity",
    "answer reward": "reward/student_answer",
    "validation score": "eval/score",
    DERIVATIONS: "",
}
"""Titles of the curves and their metrics. The last comes from the rollouts."""
NOTES = (
    "Scores: greedy answers to {n} held-out questions, by the exact rule, per cent ± standard error over questions; gains "
    "over Dr.GRPO are paired by question. A, B: the teachers' sampled responses to the training questions. One seed."
)


def read_world(out: Path, split: str) -> dict[str, Question]:
    """Return the questions of a split by id."""
    return {q.id: q for q in read_file(str(out / "world" / f"{split}.jsonl"))}


def evaluation_file(out: Path, name: str) -> Path:
    return out / METHODS[name].run / "eval" / f"{METHODS[name].evaluation}.jsonl"


def read_evaluation(out: Path, name: str, test_ids: Iterable[str]) -> Evaluation | None:
    """Return a method's finished evaluation on exactly these questions, or None."""
    path = evaluation_file(out, name)
    if not path.with_suffix(".json").is_file():
        return None
    rows = [Row(**row) for row in read_jsonl(path) if "question_id" in row]
    if {row.question_id for row in rows} != set(test_ids):
        return None  # Made by hand, on other questions.
    return build_evaluation(name, "", rows)


# Summary


def summarize(out: Path, seed: int) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Means and standard errors are over the test questions, by the exact rule. Every skill has equally many questions, so a
    mean is also the mean over the skills. ``gain`` is over Dr.GRPO, paired by question.
    """
    test, train = read_world(out, "test"), read_world(out, "train")
    evaluations = {name: read_evaluation(out, name, test) for name in METHODS}
    baseline = evaluations[BASELINE]
    methods: dict[str, dict[str, Any]] = {}
    for name, evaluation in evaluations.items():
        if evaluation is None or baseline is None:
            raise StateError(
                f"{evaluation_file(out, name)}: expected scores of the test questions. Run the demo again."
            )
        methods[name] = {
            "mean": evaluation.summary.score,
            "stderr": evaluation.summary.standard_error,
            "skills": {skill: evaluation.groups["skill"][skill].score for skill in SKILLS},
            "title": METHODS[name].title,
        }
        if name != BASELINE:
            gain: dict[str, Any] = asdict(compare(baseline, evaluation))
            gain = {"stderr" if key == "standard_error" else key: value for key, value in gain.items()}
            methods[name]["gain"] = {"over": BASELINE} | gain
    held_out = json.loads((out / "models" / "judge" / "agreement.json").read_text(encoding="utf-8"))
    rows = (row for name in TRAINED for _, rows in rollouts(out / METHODS[name].run) for row in rows)
    return {
        "contenders": methods,
        "seeds": [seed],
        "judge_agreement": held_out["agreement"],
        "judge": {
            "held_out": {k: v for k, v in held_out.items() if not isinstance(v, dict)},
            "this_run": own_agreement(rows, train),
        },
        "test_questions": len(test),
        "teachers": teachers_right(out),
        "training": {name: beginning_and_end(out / METHODS[name].run) for name in TRAINED},
    }


def own_agreement(rows: Iterable[Mapping[str, Any]], questions: Mapping[str, Question]) -> dict[str, Any]:
    """Compare the verdicts that rewarded responses with the exact rule.

    ``agreement`` is over all of them; ``distinct_agreement`` counts a response to a question once. Empty and repetitive
    responses are left out, because they earn 0 without the judge.
    """
    items: list[Judged] = [
        (questions[row["question_id"]], row["text"], row["verdict"])
        for row in rows
        if row["verdict"] is not None and not is_empty(row["text"]) and not is_repetitive(row["text"])
    ]
    everything = agreement(items)
    distinct = agreement({(question.id, text): (question, text, verdict) for question, text, verdict in items}.values())
    return {
        "agreement": everything["agreement"],
        "num_verdicts": everything["verdicts"],
        "distinct_agreement": distinct["agreement"],
        "num_distinct": distinct["verdicts"],
        "false_positive_rate": everything["wrongly_right"],
        "false_negative_rate": everything["wrongly_wrong"],
    }


def teachers_right(out: Path) -> dict[str, dict[str, Any]]:
    """Return the share of each teacher's cached responses that the exact rule calls right, over all and by skill."""

    def right(items: Sequence[Judged]) -> float | None:
        return share(sum(exactly_right(question, text) for question, text, _ in items), len(items))

    def of_skill(items: Sequence[Judged], skill: str) -> list[Judged]:
        return [item for item in items if item[0].metadata["skill"] == skill]

    cached = cached_responses(load_saved_recipe(out / "recipes" / "ril.yaml"), list(TEACHERS))
    return {
        name: {"mean": right(items), "skills": {s: right(found) for s in SKILLS if (found := of_skill(items, s))}}
        for name, items in cached.items()
    }


def derivation_shares(run: Path) -> Series:
    """Return the logged steps, and the share of the student's samples that carry a derivation."""
    counts = [(step, student_styles(rows)) for step, rows in rollouts(run)]
    counts = [(step, styles) for step, styles in counts if styles]
    return [step for step, _ in counts], [(c.total() - c["direct"]) / c.total() for _, c in counts]


def curves_of(run: Path) -> dict[str, Series]:
    rows = read_jsonl(run / "metrics.jsonl")
    return {title: series(rows, metric) if metric else derivation_shares(run) for title, metric in CURVES.items()}


def beginning_and_end(run: Path) -> dict[str, dict[str, float]]:
    """Return the means of the curves over the first five and the last five steps, without empty curves."""
    found = {title: values for title, (_, values) in curves_of(run).items() if values}
    parts = {title: {"first": values[:5], "last": values[-5:]} for title, values in found.items()}
    return {title: {which: sum(v) / len(v) for which, v in part.items()} for title, part in parts.items()}


def draw_curves(out: Path, path: Path) -> None:
    """Draw the paper's Fig. 5 for all methods, and how many of the student's samples carry a derivation."""
    colors = {name: COLORS[shade] for name, shade in SHADES.items()}
    curves = {name: curves_of(out / METHODS[name].run) for name in colors}
    panels = [
        Panel(
            title, [(METHODS[n].title, colors[n], [found[title]]) for n, found in curves.items() if found[title][0]],
            share=True,
        )
        for title in CURVES
    ]  # fmt: skip
    save(curve_figure("", [panels[:2], panels[2:]], 11), path)


# Groups


@dataclass(frozen=True)
class ShownGroup:
    """A group of responses to one question."""

    step: int
    question: Question
    pictures: tuple[str, ...]
    """Paths relative to the demo's folder."""
    rows: tuple[dict[str, Any], ...]
    """Rows of the rollout file, the student's samples first."""


def shown_groups(out: Path) -> list[tuple[str, list[ShownGroup]]]:
    """Return some groups of the first and the last logged step of RIL."""
    questions, steps = read_world(out, "train"), list(rollouts(out / METHODS["ril"].run))
    titled = [("first", *steps[0]), ("last", *steps[-1])] if len(steps) > 1 else [("first", *step) for step in steps]
    return [(f"{which} step ({step})", pick(out, rows, questions)) for which, step, rows in titled]


def pick(out: Path, rows: Sequence[dict[str, Any]], questions: Mapping[str, Question]) -> list[ShownGroup]:
    """Choose the groups with the most different outcomes, one a skill."""
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_question.setdefault(row["question_id"], []).append(row)

    def outcomes(question_id: str) -> int:
        return len({(r["source"] == STUDENT, r["verdict"], r["similarity"]) for r in by_question[question_id]})

    def pictures(question: Question) -> tuple[str, ...]:
        paths = [image.path for image in question.images if image.path is not None]
        return tuple(path.resolve().relative_to(out.resolve()).as_posix() for path in paths)

    chosen: dict[str, str] = {}
    for question_id in sorted(by_question, key=lambda i: (-outcomes(i), i)):
        chosen.setdefault(str(questions[question_id].metadata.get("skill")), question_id)
    return [
        ShownGroup(by_question[i][0]["step"], questions[i], pictures(questions[i]), tuple(by_question[i]))
        for i in list(chosen.values())[:GROUPS_SHOWN]
    ]


# Tables and text


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def method_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return method, score and gain over Dr.GRPO as text, in per cent."""
    rows = []
    for name in METHODS:
        entry = summary["contenders"][name]
        rows.append([entry["title"], f"{100 * entry['mean']:.1f} ± {100 * entry['stderr']:.1f}", ""])
        if gain := entry.get("gain"):
            rows[-1][2] = f"{100 * gain['difference']:+.1f} ± {100 * gain['stderr']:.1f}"
    return rows


def skill_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row for each skill, in per cent. The teachers' columns are of their cached responses."""
    header = ["skill", "modeled on", *(m.short for m in METHODS.values()), *TEACHERS.values()]
    found = [summary["contenders"][name] for name in METHODS] + [summary["teachers"][name] for name in TEACHERS]
    rows = [
        [skill, about.benchmark, *(number(e["skills"].get(skill), "{:.0%}").rstrip("%") for e in found)]
        for skill, about in SKILLS.items()
    ]
    return header, [*rows, ["mean", "", *(number(e["mean"], "{:.1%}").rstrip("%") for e in found)]]


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return what the summary says about the judge, and the beginning and the end of each curve."""
    held_out, own = summary["judge"]["held_out"], summary["judge"]["this_run"]
    lines = [
        f"judge: agrees with the exact rule on {number(held_out['agreement'], '{:.2%}')} of {held_out['num_verdicts']} "
        "hard held-out cases (measured when it was trained)",
        f"judge: agreed with it on {number(own['agreement'], '{:.2%}')} of the {own['num_verdicts']} responses it rewarded "
        f"in these runs; on {number(own['distinct_agreement'], '{:.2%}')} of the {own['num_distinct']} different ones",
        "student samples, first five steps to last five:",
    ]
    for name, curves in summary["training"].items():
        parts = [f"{title} {ends['first']:.2f} to {ends['last']:.2f}" for title, ends in curves.items()]
        lines.append(f"{METHODS[name].title}: " + ", ".join(parts))
    return lines


def response_rows(group: ShownGroup) -> list[dict[str, Any]]:
    """Return the responses of a group as text, with whether the exact rule calls them right."""
    return [
        {
            "source": row["source"],
            "text": row["text"],
            "student_prob": number(row["student_prob"]),
            "verdict": number(row["verdict"], "{:.0f}"),
            "right": exactly_right(group.question, row["text"]),
            "advantage": number(row["advantage"], "{:+.2f}"),
            "sign": row["advantage"] or 0.0,
        }
        for row in group.rows
    ]


def group_text(group: ShownGroup) -> str:
    """Return a group as text for a terminal, without control characters."""
    question = group.question
    lines = [f"step {group.step}: {question.metadata.get('skill', '')} ({', '.join(group.pictures)})"]
    lines += [f"  {line}" for line in question.question.splitlines()]
    if question.choices:
        lines.append("  " + "  ".join(f"{'ABCDEFGHIJ'[i]}. {c}" for i, c in enumerate(question.choices)))
    lines.append(f"  truth: {question.answer}")
    lines.append(f"  {'source':<11}{'student_prob':>12}{'verdict':>9}{'exact':>7}{'advantage':>11}  response")
    for row in response_rows(group):
        lines.append(
            f"  {row['source']:<11}{row['student_prob']:>12}{row['verdict']:>9}{'right' if row['right'] else 'wrong':>7}"
            f"{row['advantage']:>11}  {' / '.join(row['text'].splitlines())}"
        )
    return "\n".join("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in lines)


# Output


def write_report(out: Path, seed: int, student: str, clock: Clock) -> tuple[dict[str, Any], Sequence[ShownGroup]]:
    """Write summary.json, curves.png, report.html and groups.txt; returns the summary and the groups of the last step."""
    summary = summarize(out, seed)
    sections = shown_groups(out)
    draw_curves(out, out / "curves.png")
    texts = [
        part
        for title, groups in sections
        for part in (f"== RIL: {title} ==\n", *(group_text(group) + "\n" for group in groups))
    ]
    write_text(out / "groups.txt", "\n".join(texts))
    clock.tick()
    summary |= {"minutes": clock.minutes, "student": student}
    write_page([out / METHODS[name].run for name in TRAINED], out / "report.html")
    write_json(out / "summary.json", summary)
    return summary, sections[-1][1]


def show(console: Console, out: Path, summary: Mapping[str, Any], last: Sequence[ShownGroup]) -> None:
    """Print the summary, and one of the groups of the last step."""
    from rich.table import Table

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line("\na group of the last step of RIL:")
    for group in last[:1]:
        line(group_text(group) + "\n")
    tables = [
        ("held-out questions, per cent", ["method", "score", "over Dr.GRPO"], method_rows(summary), 1),
        ("by skill", *skill_rows(summary), 2),
    ]
    for title, header, rows, words in tables:
        table = Table(title=title)
        for i, column in enumerate(header):
            table.add_column(column, justify="left" if i < words else "right")
        for cells in rows:
            table.add_row(*cells, end_section=cells[0] == list(SKILLS)[-1])
        console.print(table)
    for text in (NOTES.format(n=summary["test_questions"]), *summary_lines(summary)):
        console.print(text, markup=False, highlight=False)
    for what, path in {
        "everything on one page: table, curves, groups": "report.html",
        "groups to read here": "groups.txt",
        "curves": "curves.png",
        "these numbers": "summary.json",
        "recipes, to change and run": "recipes",
        "every response of every step": "ril/rollouts",
        "the judge's explanations": "ril/verdicts",
        "the student of RIL+": "ril_plus/student",
    }.items():
        line(f"  {what}: {out / path}")
    line(f"{summary['minutes']} minutes")
