"""Compute what the report shows from the scores: methods, differences, ablations, equal compute, and the goals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from openril.report.curves import series
from openril.storage import read_jsonl
from playground.study.bootstrap import Estimate, Resampling, estimate, paired
from playground.study.metrics import mean_validation_score, median, seconds_of
from playground.study.plan import BASELINE, REFERENCE, SKILL, START, Group
from playground.study.scores import Results, Scores

SINGLE = ("ril_a", "ril_b")
TEXT = ("sft_teacher_text", "rejection_sampling")
AT_CHANCE, SATURATED = 0.05, 0.95
"""Outside these bounds a similarity reward carries no information."""
SIMILARITY = "reward/student_similarity"


class Findings:
    """Computes everything that the report shows of a set of results, as plain data."""

    def __init__(self, results: Results, resamples: int = 4000) -> None:
        self.results = results
        self.resampling = Resampling(results.questions.skills, resamples)

    def everything(self) -> dict[str, Any]:
        r = self.results
        return {
            "questions": len(r.questions.ids),
            "skills": r.questions.names,
            "teachers": {name: self.row(scores) for name, scores in r.teachers.items()},
            "cache": r.cache,
            "students": {student: self.student(student) for student in r.cells},
        }

    def student(self, student: str) -> dict[str, Any]:
        groups = self.results.cells[student]

        def rows(group: Group, more: Callable[[str, Scores], dict[str, Any]]) -> dict[str, Any]:
            return {name: self.row(scores) | more(name, scores) for name, scores in groups.get(group, {}).items()}

        def over(name: str, scores: Scores) -> dict[str, Any] | None:
            return _plain(self.between(self._get(student, name), scores))

        def reference_over(scores: Scores) -> dict[str, Any] | None:
            return _plain(self.between(scores, self._get(student, REFERENCE)))

        return {
            "contenders": rows("contenders", lambda _, scores: {
                "over_start": over(START, scores),
                "over_baseline": over(BASELINE, scores),
                "reference_over": reference_over(scores),
            }),
            "ablations": rows("ablations", lambda _, scores: {"over_reference": over(REFERENCE, scores)}),
            "compute": rows("compute", lambda name, scores: {
                "over_equal_steps": over(name, scores), "reference_over": reference_over(scores),
            }),
            "single": self.better_single(student),
            "passes": self.passes(student),
            "goals": self.goals(student),
        }  # fmt: skip

    def _get(self, student: str, name: str, group: Group = "contenders") -> Scores | None:
        return self.results.get(student, group, name)

    def row(self, scores: Scores) -> dict[str, Any]:
        """Return mean, skills and seeds, the judge's agreement, and what the training cost."""
        seconds = [s for done in scores.done if (s := seconds_of(done)) is not None]
        steps = [done["steps"] for done in scores.done if done.get("steps")]
        validation = [v for folder in scores.folders if (v := mean_validation_score(folder)) is not None]
        return {
            "mean": self.resampling.mean(scores.values).as_dict(),
            "by_seed": [float(self.resampling.by_skill(v[None]).mean()) for v in scores.values],
            "seeds": scores.seeds,
            "skills": {s: e.as_dict() for s, e in self.resampling.skill_means(scores.values).items()},
            "judge": judge_of(scores),
            "steps": round(sum(steps) / len(steps)) if steps else None,
            "seconds": median(seconds),
            "on_the_way": sum(validation) / len(validation) if validation else None,
        }

    def between(self, a: Scores | None, b: Scores | None, skill: str = "") -> Estimate | None:
        """Return b - a, paired, over all skills or one of them. None where there is nothing to compare."""
        if a is None or b is None:
            return None
        values, seeds = paired(a.values, b.values, a.seeds, b.seeds)
        if not seeds or (skill and skill not in self.resampling.skills):
            return None
        return self.resampling.skill_means(values)[skill] if skill else self.resampling.mean(values)

    def better_single(self, student: str) -> str | None:
        """Return the single-teacher RIL with the higher mean, or None until both are finished."""
        found = {name: s for name in SINGLE if (s := self._get(student, name)) is not None}
        if len(found) < len(SINGLE):
            return None
        return max(found, key=lambda name: self.resampling.mean(found[name].values).value)

    # Goals

    def goals(self, student: str) -> list[dict[str, Any]]:
        """Return the table of goals: what was measured, in points of 100, and whether the goal is reached (None: not
        measured yet)."""
        get = self._get
        both, baseline = get(student, REFERENCE), get(student, BASELINE)
        single = self.better_single(student)
        rows = [
            self._goal("Dr.GRPO over the starting student", "+1.8", 0.0, self.between(get(student, START), baseline)),
            self._goal("RIL, one teacher, over Dr.GRPO", "+4.0", 4.0, self.one_teacher(student)),
            self._goal("RIL, both, over Dr.GRPO", "+5.1", 5.1, self.between(baseline, both)),
            self._goal(
                "both over the better single teacher", "+1.1", 0.0, self.between(get(student, single or ""), both)
            ),
            self._goal(f"the skill {SKILL}, both over Dr.GRPO", "+10.2", 10.0, self.between(baseline, both, SKILL)),
            self._passing_goal(student),
            self._similarity_goal(student),
        ]
        rows += [
            self._goal(f"RIL, both, over {title}", "not shown", 0.0, self.between(get(student, name), both))
            for name, title in zip(TEXT, ("SFT on teacher text", "rejection sampling"), strict=True)
        ]
        zero = self.between(both, get(student, "beta_0", "ablations"))
        found = None if zero is None else points(zero)
        rows.append(
            {"goal": "beta 0 against 0.01", "paper": "collapse", "required": "", "found": found, "reached": None}
        )
        return rows

    def one_teacher(self, student: str) -> Estimate | None:
        """Return the mean of the two single-teacher students over the baseline."""
        found = [s for name in SINGLE if (s := self._get(student, name)) is not None]
        baseline = self._get(student, BASELINE)
        if len(found) < len(SINGLE) or baseline is None or found[0].seeds != found[1].seeds:
            return None
        return self.between(baseline, Scores(found[0].seeds, (found[0].values + found[1].values) / 2))

    def _goal(self, goal: str, paper: str, at_least: float, measured: Estimate | None) -> dict[str, Any]:
        required = f"at least +{at_least:g}" if at_least else "above 0"
        reached = None if measured is None else measured.above_zero and 100 * measured.value >= at_least
        found = None if measured is None else points(measured)
        return {"goal": goal, "paper": paper, "required": required, "found": found, "reached": reached}

    def passes(self, student: str) -> dict[str, Any] | None:
        """Return the skills on which the reference student is better than each teacher and than all teachers, and the
        number of skills on which it is better than at least one, with its interval."""
        both, teachers = self._get(student, REFERENCE), self.results.teachers
        if both is None or not teachers:
            return None
        mine, drawn = self.resampling.by_skill(both.values), self.resampling.drawn_by_skill(both.values)
        lows = {name: self.resampling.by_skill(t.values) for name, t in teachers.items()}
        better = {name: mine > low for name, low in lows.items()}
        drawn_better = [drawn > self.resampling.drawn_by_skill(t.values) for t in teachers.values()]
        any_of = np.any(list(better.values()), axis=0)
        number = estimate(float(any_of.sum()), np.any(drawn_better, axis=0).sum(1).astype(float), len(both.seeds))
        skills = np.array(self.resampling.skills)
        return {
            "number": number.as_dict(),
            "by_teacher": {name: skills[mask].tolist() for name, mask in better.items()},
            "all": skills[np.all(list(better.values()), axis=0)].tolist(),
        }

    def _passing_goal(self, student: str) -> dict[str, Any]:
        row = {
            "goal": "skills on which the student (RIL, both) passes a teacher",
            "paper": "3",
            "required": "at least 3",
        }
        found = self.passes(student)
        if found is None:
            return {**row, "found": None, "reached": None}
        n = found["number"]
        shown = f"{n['value']:.0f} [{n['low']:.0f}, {n['high']:.0f}]; passes each teacher on {len(found['all'])}"
        return {**row, "found": shown, "reached": bool(n["value"] >= 3 and n["low"] > 0)}

    def _similarity_goal(self, student: str) -> dict[str, Any]:
        row = {"goal": "similarity reward of the student's samples", "paper": "0.2 to 0.65"}
        row |= {"required": f"rises and stays between {AT_CHANCE:g} and {SATURATED:g}"}
        both = self._get(student, REFERENCE)
        curves = [] if both is None else [series(read_jsonl(f / "metrics.jsonl"), SIMILARITY)[1] for f in both.folders]
        curves = [c for c in curves if c]
        if not curves:
            return {**row, "found": None, "reached": None}
        windows = [w for c in curves for w in tenths(c)]
        ends = [(tenths(c)[0], tenths(c)[-1]) for c in curves]
        rises = all(last > first for first, last in ends)
        shown = [f"{first:.2f} to {last:.2f}" for first, last in ends]
        inside = all(AT_CHANCE <= w <= SATURATED for w in windows)
        found = f"{', '.join(shown)} by seed; between {min(windows):.2f} and {max(windows):.2f}"
        return {**row, "found": found, "reached": bool(rises and inside)}


def tenths(values: list[float]) -> list[float]:
    """Return the means of ten equal parts of a curve (its values, if there are fewer)."""
    return [float(part.mean()) for part in np.array_split(np.array(values), min(10, len(values)))]


def judge_of(scores: Scores) -> dict[str, Any] | None:
    """Return the agreement of the cells' own verdicts with the exact rule: on the student's samples where there are any,
    else on the cached responses. None where no judge was asked."""
    rows = [done["judge"] for done in scores.done if done.get("judge")]
    known = [row.get("student") or row.get("cached") or {} for row in rows]
    known = [k for k in known if k.get("verdicts")]
    if not known:
        return None
    total = sum(k["verdicts"] for k in known)
    return {
        "agreement": sum(k["agreement"] * k["verdicts"] for k in known) / total,
        "verdicts": total,
        "unknown": sum(k["unknown"] for k in known),
    }


def points(e: Estimate) -> str:
    """Format as ``+4.2 [+3.0, +5.5]``, in points of 100."""
    return f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def _plain(e: Estimate | None) -> dict[str, Any] | None:
    return None if e is None else e.as_dict()
