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
        def get(name: str) -> Scores | None:
            return self.results.get(student, "contenders", name)

        def rows(group: Group, **pairs: Callable[[str, Scores], tuple[Scores | None, Scores | None]]) -> dict[str, Any]:
            return {
                name: self.row(scores) | {key: _plain(self.between(*pair(name, scores))) for key, pair in pairs.items()}
                for name, scores in self.results.cells[student].get(group, {}).items()
            }

        return {
            "contenders": rows(
                "contenders",
                over_start=lambda _, scores: (get(START), scores),
                over_baseline=lambda _, scores: (get(BASELINE), scores),
                reference_over=lambda _, scores: (scores, get(REFERENCE)),
            ),
            "ablations": rows("ablations", over_reference=lambda _, scores: (get(REFERENCE), scores)),
            "compute": rows(
                "compute",
                over_equal_steps=lambda name, scores: (get(name), scores),
                reference_over=lambda _, scores: (scores, get(REFERENCE)),
            ),
            "single": self.better_single(student),
            "passes": self.passes(student),
            "goals": self.goals(student),
        }

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

    def singles(self, student: str) -> dict[str, Scores]:
        """Return the scores of RIL with each single teacher, or nothing until both are finished."""
        found = {name: s for name in SINGLE if (s := self.results.get(student, "contenders", name)) is not None}
        return found if len(found) == len(SINGLE) else {}

    def better_single(self, student: str) -> str | None:
        """Return the single-teacher RIL with the higher mean."""
        found = self.singles(student)
        return max(found, key=lambda name: self.resampling.mean(found[name].values).value, default=None)

    # Goals

    def goals(self, student: str) -> list[dict[str, Any]]:
        """Return the table of goals: what was measured, in points of 100, and whether the goal is reached (None: not
        measured yet)."""

        def get(name: str, group: Group = "contenders") -> Scores | None:
            return self.results.get(student, group, name)

        start, baseline, both = get(START), get(BASELINE), get(REFERENCE)
        single = list(self.singles(student).values())
        one = None  # The mean of the two single-teacher students.
        if single and single[0].seeds == single[1].seeds:
            one = Scores(single[0].seeds, (single[0].values + single[1].values) / 2)
        differences = [
            ("Dr.GRPO over the starting student", "+1.8", 0.0, self.between(start, baseline)),
            ("RIL, one teacher, over Dr.GRPO", "+4.0", 4.0, self.between(baseline, one)),
            ("RIL, both, over Dr.GRPO", "+5.1", 5.1, self.between(baseline, both)),
            (
                "both over the better single teacher", "+1.1", 0.0,
                self.between(get(self.better_single(student) or ""), both),
            ),
            (f"the skill {SKILL}, both over Dr.GRPO", "+10.2", 10.0, self.between(baseline, both, SKILL)),
            ("RIL, both, over SFT on teacher text", "not shown", 0.0, self.between(get("sft_teacher_text"), both)),
            ("RIL, both, over rejection sampling", "not shown", 0.0, self.between(get("rejection_sampling"), both)),
        ]  # fmt: skip
        rows = [
            {
                "goal": goal,
                "paper": paper,
                "required": f"at least +{at_least:g}" if at_least else "above 0",
                "found": e and points(e),
                "reached": None if e is None else e.above_zero and 100 * e.value >= at_least,
            }
            for goal, paper, at_least, e in differences
        ]
        zero = self.between(both, get("beta_0", "ablations"))
        beta = {"goal": "beta 0 against 0.01", "paper": "collapse", "required": "", "found": zero and points(zero)}
        return [
            *rows[:5],
            self._passing_goal(student),
            self._similarity_goal(both),
            *rows[5:],
            beta | {"reached": None},
        ]

    def passes(self, student: str) -> dict[str, Any] | None:
        """Return the skills on which the reference student is better than each teacher and than all teachers, and the
        number of skills on which it is better than at least one, with its interval."""
        both, teachers = self.results.get(student, "contenders", REFERENCE), self.results.teachers
        if both is None or not teachers:
            return None
        mine, drawn = self.resampling.by_skill(both.values), self.resampling.drawn_by_skill(both.values)
        better = {name: mine > self.resampling.by_skill(t.values) for name, t in teachers.items()}
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

    def _similarity_goal(self, both: Scores | None) -> dict[str, Any]:
        row = {"goal": "similarity reward of the student's samples", "paper": "0.2 to 0.65"}
        row |= {"required": f"rises and stays between {AT_CHANCE:g} and {SATURATED:g}"}
        curves = [] if both is None else [series(read_jsonl(f / "metrics.jsonl"), SIMILARITY)[1] for f in both.folders]
        parts = [tenths(c) for c in curves if c]
        if not parts:
            return {**row, "found": None, "reached": None}
        lowest, highest = min(map(min, parts)), max(map(max, parts))
        shown = ", ".join(f"{part[0]:.2f} to {part[-1]:.2f}" for part in parts)
        reached = all(part[-1] > part[0] for part in parts) and lowest >= AT_CHANCE and highest <= SATURATED
        return {**row, "found": f"{shown} by seed; between {lowest:.2f} and {highest:.2f}", "reached": reached}


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
