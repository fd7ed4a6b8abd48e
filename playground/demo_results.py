"""What a demo measured, read from the files that its runs left: scores, verdicts, shares of derivations, curves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from openril.data.reading import read_file
from openril.errors import StateError
from openril.evaluation.summary import Evaluation, Row, build_evaluation, compare
from openril.records import STUDENT, Question
from openril.report.curves import series, smooth
from openril.rewards import rules
from openril.rewards.degenerate import is_empty, is_repetitive
from openril.storage import atomic_path, read_jsonl
from playground.world import SKILLS, style_of


@dataclass(frozen=True)
class Contender:
    """title, short: in tables. run: its folder in the demo's. evaluation: name of its evaluation there. colour: of its
    curves."""

    title: str
    short: str
    run: str
    evaluation: str = "final"
    colour: str = ""


CONTENDERS: dict[str, Contender] = {
    "sft": Contender("starting student", "start", "ril", "base"),
    "dr_grpo": Contender("Dr.GRPO", "Dr.GRPO", "dr_grpo", colour="#718096"),
    "ril_one": Contender("RIL, one teacher", "RIL one", "ril_one", colour="#dd6b20"),
    "ril_both": Contender("RIL, both teachers", "RIL both", "ril", colour="#2b6cb0"),
}
TRAINED = [name for name in CONTENDERS if name != "sft"]
BASELINE = "dr_grpo"
TEACHERS = {"teacher_a": "A", "teacher_b": "B"}
"""The teachers, and how tables call them."""


def read_world(out: Path, split: str) -> dict[str, Question]:
    """Questions of a split by id."""
    return {q.id: q for q in read_file(str(out / "world" / f"{split}.jsonl"))}


def evaluation_file(out: Path, name: str) -> Path:
    contender = CONTENDERS[name]
    return out / contender.run / "eval" / f"{contender.evaluation}.jsonl"


def read_evaluation(out: Path, name: str, test_ids: Iterable[str]) -> Evaluation | None:
    """A contender's finished evaluation on exactly these questions; None where there is none."""
    path = evaluation_file(out, name)
    if not path.with_suffix(".json").is_file():
        return None
    rows = [Row(**row) for row in read_jsonl(path) if "question_id" in row]
    if {row.question_id for row in rows} != set(test_ids):
        return None  # made by hand, on other questions
    return build_evaluation(name, "", rows)


def summarise(out: Path, seed: int, agreement: Mapping[str, Any]) -> dict[str, Any]:
    """What ``summary.json`` says of scores, judge, teachers and training.

    agreement: the judge's ``agreement.json``. Means and standard errors are over the test questions, by the exact rule;
    every skill has equally many, so a mean is also that over the skills. ``gain`` is over Dr.GRPO, paired by question.
    """
    test = read_world(out, "test")
    evaluations = {name: read_evaluation(out, name, test) for name in CONTENDERS}
    baseline = evaluations[BASELINE]
    contenders: dict[str, dict[str, Any]] = {}
    for name, evaluation in evaluations.items():
        if evaluation is None or baseline is None:
            raise StateError(f"{evaluation_file(out, name)} is not that of the test questions; run the demo again")
        entry = {
            "mean": evaluation.summary.score,
            "stderr": evaluation.summary.standard_error,
            "skills": {skill: evaluation.groups["skill"][skill].score for skill in SKILLS},
            "title": CONTENDERS[name].title,
        }
        if name != BASELINE:
            gain: dict[str, Any] = asdict(compare(baseline, evaluation))
            entry["gain"] = {"over": BASELINE} | {"stderr" if k == "standard_error" else k: v for k, v in gain.items()}
        contenders[name] = entry
    train = read_world(out, "train")
    return {
        "contenders": contenders,
        "seeds": [seed],
        "judge_agreement": agreement["agreement"],
        "judge": {
            "held_out": {k: v for k, v in agreement.items() if not isinstance(v, dict)},
            "this_run": own_agreement(rollout_rows(out, TRAINED), train),
        },
        "test_questions": len(test),
        "teachers": teachers_right(out, train),
        "training": {name: beginning_and_end(out / CONTENDERS[name].run) for name in TRAINED},
    }


def rollout_rows(out: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every response of every logged step of these contenders."""
    for name in names:
        for path in sorted((out / CONTENDERS[name].run / "rollouts").glob("step_*.jsonl")):
            yield from read_jsonl(path)


def own_agreement(rows: Iterable[Mapping[str, Any]], questions: Mapping[str, Question]) -> dict[str, Any]:
    """How often the verdicts that rewarded responses are the exact rule's: ``agreement`` over all of them,
    ``distinct_agreement`` counting a response to a question once, however often it was rewarded.

    Empty and repetitive responses earn 0 without the judge and are left out. Rates are None where nothing could be
    wrong in that way.
    """

    @cache
    def right(question_id: str, text: str) -> bool:
        question = questions[question_id]
        return rules.score(question.rule or "auto", question, text) == 1.0

    counts = {(verdict, truth): 0 for verdict in (False, True) for truth in (False, True)}
    distinct: dict[tuple[str, str], bool] = {}
    for row in rows:
        text = row["text"]
        if row["verdict"] is None or is_empty(text) or is_repetitive(text):
            continue
        verdict, truth = row["verdict"] == 1, right(row["question_id"], text)
        counts[verdict, truth] += 1
        distinct[row["question_id"], text] = verdict == truth
    wrong, rights = counts[True, False] + counts[False, False], counts[True, True] + counts[False, True]
    return {
        "agreement": _share(counts[True, True] + counts[False, False], wrong + rights),
        "num_verdicts": wrong + rights,
        "distinct_agreement": _share(sum(distinct.values()), len(distinct)),
        "num_distinct": len(distinct),
        "false_positive_rate": _share(counts[True, False], wrong),
        "false_negative_rate": _share(counts[False, True], rights),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def teachers_right(out: Path, questions: Mapping[str, Question]) -> dict[str, dict[str, Any]]:
    """Share of each teacher's cached (sampled) responses to the training questions that the exact rule calls right, over
    all and by skill."""
    from openril.recipe.loading import load_recipe
    from openril.responses.cache import ResponseCache

    recipe = load_recipe(out / "recipes" / "ril.yaml")
    asked = list(questions.values())[: recipe.data.limit or None]
    cached = ResponseCache.open(recipe.cache_path).load(
        asked, list(TEACHERS), recipe.collect.num_responses, check_hashes=False
    )
    found: dict[str, dict[str, Any]] = {}
    for name in TEACHERS:
        by_skill: dict[str, list[bool]] = {skill: [] for skill in SKILLS}
        for q in asked:
            by_skill[q.metadata["skill"]] += [
                rules.score(q.rule or "auto", q, r.text) == 1.0 for r in cached.responses_for(q.id, name)
            ]
        every = [r for values in by_skill.values() for r in values]
        found[name] = {
            "mean": _share(sum(every), len(every)),
            "skills": {skill: _share(sum(values), len(values)) for skill, values in by_skill.items() if values},
        }
    return found


def derivation_shares(run: Path) -> tuple[list[int], list[float]]:
    """Steps, and the share of the student's samples that carry a derivation."""
    steps, shares = [], []
    for path in sorted((run / "rollouts").glob("step_*.jsonl")):
        texts = [row["text"] for row in read_jsonl(path) if row["source"] == STUDENT]
        if texts:
            steps.append(int(path.stem.split("_")[1]))
            shares.append(sum(style_of(text) is not None for text in texts) / len(texts))
    return steps, shares


def curves_of(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of a run's four curves, by panel."""
    rows = read_jsonl(run / "metrics.jsonl")
    found = {title: series(rows, metric) for title, metric in PANELS.items() if metric}
    return {**found, DERIVATIONS: derivation_shares(run)}


def beginning_and_end(run: Path, width: int = 5) -> dict[str, Any]:
    """Means of the curves over the first and the last steps; curves without values are left out."""
    found = {title: values for title, (_, values) in curves_of(run).items() if values}
    return {title: {"first": _mean(values[:width]), "last": _mean(values[-width:])} for title, values in found.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


DERIVATIONS = "share of samples with a derivation"
PANELS = {
    "similarity reward": "reward/student_similarity",
    "answer reward": "reward/student_answer",
    "validation score": "eval/score",
    DERIVATIONS: "",
}
"""Titles of the panels and their metrics; the last comes from the rollouts."""


def draw_curves(out: Path, path: Path) -> None:
    """The paper's Fig. 5 for all contenders, and how many of the student's samples carry a derivation, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    curves = {name: curves_of(out / CONTENDERS[name].run) for name in TRAINED}
    for number, title in enumerate(PANELS):
        axes = figure.add_subplot(2, 2, number + 1)
        for name, found in curves.items():
            steps, values = found[title]
            if not steps:
                continue  # Dr.GRPO has no discriminator
            contender = CONTENDERS[name]
            sparse = title == "validation score"
            if not sparse:
                axes.plot(steps, values, color=contender.colour, alpha=0.2, linewidth=0.8)
                values = smooth(values, 2 * (len(values) // 20) + 1)
            marker = "o" if sparse or len(values) == 1 else None
            axes.plot(
                steps, values, color=contender.colour, linewidth=1.8, marker=marker, markersize=4, label=contender.title
            )
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=9, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def read_agreement(models: Path) -> dict[str, Any]:
    """The judge's measurements that lie beside its weights."""
    found: dict[str, Any] = json.loads((models / "judge" / "agreement.json").read_text(encoding="utf-8"))
    return found
