"""Select the questions for the loop: log-probability sampling and the overlong filter (arXiv 2510.19307, section 4).

The paper names the two methods without their settings. This is the implementation:

Overlong filter (after DAPO, arXiv 2503.14476): a question is left out if more than ``max_overlong_share`` of the student's
cached responses were cut at the length limit, because such groups train the student to stop and not to answer.

With a reference model (after NVILA's DeltaLoss, arXiv 2412.04468): score = mean over the answer's tokens of
log p_reference - log p_student; with another tokenizer, the difference of the sums over the answer's tokens. It is near 0
if both models know the answer or neither does, and below 0 if the student is better. Only questions above 0 are kept, the
highest first. As in NVILA every subset (here: data file) keeps its own best questions, in proportion to its size; places
that a subset cannot fill go to the others. The mean over tokens is our choice, because a sum favors long answers; but means
over unlike numbers of tokens cannot be compared.

With the student alone: sampling without replacement with weight 1 - exp(mean log p_student). Answers that the student
already gives are rarely selected, and a wrong label counts little more than any other difficult question.

The result depends only on the arguments and the seed. The order of the questions is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from openril import storage
from openril.errors import DataError
from openril.recipe.schema import SelectionConfig
from openril.records import Question


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision about one question. score: see the module; None if not scored. reason: "" if it was selected."""

    id: str
    selected: bool
    reason: str
    score: float | None = None
    student_logprob: float | None = None
    reference_logprob: float | None = None
    overlong_share: float | None = None


@dataclass(frozen=True)
class Selection:
    """ids: selected questions in the order of the data. decisions: one for every question, in the same order."""

    ids: tuple[str, ...]
    decisions: tuple[Decision, ...]

    def counts(self) -> dict[str, int]:
        """Return the number of selected questions, and of those left out for each kind of reason."""
        return Counter("selected" if d.selected else d.reason.split(":")[0] for d in self.decisions)


def select(
    questions: Sequence[Question],
    student_logprobs: Mapping[str, float | None],
    reference_logprobs: Mapping[str, float | None] | None,
    overlong_share: Mapping[str, float] | None,
    config: SelectionConfig,
    seed: int,
    not_scored: Mapping[str, str] = MappingProxyType({}),
) -> Selection:
    """Select up to ``config.num_questions`` questions.

    Args:
        student_logprobs: Question id -> mean log-probability per token of the ground-truth answer under the student, in
            nats (<= 0); None where there is no answer.
        reference_logprobs: The same under the reference model, or None to use the student alone.
        overlong_share: Share of each question's student responses that were cut; required if ``config.drop_overlong``.
        not_scored: Question id -> why it has no log-probability, where there is another reason than a missing answer.

    Raises:
        DataError: For invalid or missing log-probabilities, and for missing student responses.
    """
    if config.drop_overlong:
        lacking = [q.id for q in questions if overlong_share is None or q.id not in overlong_share]
        if lacking:
            raise DataError(
                f"data.selection.drop_overlong: {len(lacking)} questions have no cached student responses (first: "
                f"{lacking[0]}). Run `ril collect` with collect.student on, or set drop_overlong to false."
            )
    left_out: dict[str, str] = {}
    scores: dict[str, float] = {}
    for q in questions:
        share = overlong_share.get(q.id) if config.drop_overlong and overlong_share is not None else None
        student = _logprob(student_logprobs, q.id, "student")
        reference = _logprob(reference_logprobs, q.id, "reference") if reference_logprobs is not None else None
        if student is None or (reference_logprobs is not None and reference is None):
            left_out[q.id] = not_scored.get(q.id, "no answer: nothing to score")
        elif reference is not None:
            scores[q.id] = 0.0 if reference == student else reference - student
        else:
            scores[q.id] = -math.expm1(student)
        if share is not None and share > config.max_overlong_share:
            left_out[q.id] = f"overlong: {share:.0%} of its student responses are cut"
        elif q.id in scores and scores[q.id] <= 0 and reference_logprobs is not None:
            left_out[q.id] = f"reference no better: score {scores[q.id]:.4g}"
        elif q.id in scores and scores[q.id] <= 0:
            left_out[q.id] = "known: the student is already certain of the answer"

    open_ids = [q.id for q in questions if q.id not in left_out]
    if reference_logprobs is not None:
        chosen = _best_of_each_subset(questions, open_ids, scores, config.num_questions, seed)
    else:
        chosen = _weighted_draw(open_ids, scores, config.num_questions, seed)
    decisions = tuple(
        Decision(
            id=q.id,
            selected=q.id in chosen,
            reason="" if q.id in chosen else left_out.get(q.id, "not drawn: others came first"),
            score=scores.get(q.id),
            student_logprob=student_logprobs.get(q.id),
            reference_logprob=reference_logprobs.get(q.id) if reference_logprobs is not None else None,
            overlong_share=overlong_share.get(q.id) if overlong_share is not None else None,
        )
        for q in questions
    )
    return Selection(tuple(d.id for d in decisions if d.selected), decisions)


def _logprob(values: Mapping[str, float | None], question_id: str, whose: str) -> float | None:
    if question_id not in values:
        raise DataError(f"question {question_id}: the {whose}'s log-probability is missing. Score all questions again.")
    value = values[question_id]
    if value is None:
        return None
    if math.isnan(value) or value > 1e-4:  # slightly above 0 is a rounding error
        raise DataError(f"question {question_id}: expected a log-probability of the {whose} (<= 0), got {value}.")
    return min(value, 0.0)


def _uniform(seed: int, question_id: str) -> float:
    """Return a number in (0, 1) that depends only on the question and the seed."""
    return (storage.stable_hash("selection", seed, question_id) + 0.5) / 2.0**63


def _weighted_draw(ids: Sequence[str], weights: Mapping[str, float], number: int, seed: int) -> set[str]:
    """Sample without replacement in proportion to the weights (Efraimidis and Spirakis: smallest -log(u) / weight)."""
    return set(sorted(ids, key=lambda i: (-math.log(_uniform(seed, i)) / weights[i], i))[:number])


def _best_of_each_subset(
    questions: Sequence[Question], open_ids: Sequence[str], scores: Mapping[str, float], number: int, seed: int
) -> set[str]:
    subset = {q.id: q.origin.rpartition(":")[0] for q in questions}
    sizes: dict[str, int] = {}
    for name in subset.values():
        sizes[name] = sizes.get(name, 0) + 1
    ranked: dict[str, list[str]] = {name: [] for name in sizes}
    for i in sorted(open_ids, key=lambda i: (-scores[i], _uniform(seed, i))):
        ranked[subset[i]].append(i)
    chosen: set[str] = set()
    for name, places in share_places(number, sizes, {n: len(r) for n, r in ranked.items()}).items():
        chosen.update(ranked[name][:places])
    return chosen


def share_places(number: int, sizes: Mapping[str, int], available: Mapping[str, int]) -> dict[str, int]:
    """Share ``number`` places in proportion to ``sizes``, at most ``available`` each; the rest goes to the others."""
    given = dict.fromkeys(sizes, 0)
    left = min(number, sum(available.values()))
    while left:
        taking = {n: s for n, s in sizes.items() if given[n] < available[n]}
        whole = sum(taking.values())
        exact = {n: left * s / whole for n, s in taking.items()}
        step = {n: min(int(e), available[n] - given[n]) for n, e in exact.items()}
        if not any(step.values()):  # only fractions are left: the largest first
            for n in sorted(taking, key=lambda n: (-exact[n], n))[:left]:
                step[n] = 1
        for n, places in step.items():
            given[n] += places
            left -= places
    return given


def write_selection(path: Path, selection: Selection) -> None:
    """Write one JSON line per question: id, selected, reason, score and the values it was computed from."""
    storage.write_jsonl(path, (asdict(d) for d in selection.decisions))
