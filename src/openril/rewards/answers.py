"""Is a response right? One way to find out, by rules or judge, for training and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openril.data.question_text import choice_letter, question_text
from openril.errors import DataError, RecipeError
from openril.records import Question
from openril.rewards import rules
from openril.rewards.choices import truth_index
from openril.rewards.degenerate import is_empty, is_repetitive
from openril.rewards.judge import JudgeHandle, JudgeItem, JudgeService
from openril.rewards.verdict_store import Verdict

AnswerKind = Literal["judge", "rules", "rules_then_judge", "none"]


@dataclass(frozen=True)
class AnswerScore:
    """Whether one response is right.

    score: 1.0, 0.0, or None where it is unknown (no verdict could be had) or nothing was to be scored. parsed: False
    where a rule found no answer to compare; under ``rules`` such a response scores 0. asked_judge: the score is the
    judge's to give (a cached verdict counts). cause: why it is unknown, or 0 without further look. verdict: the
    judge's, with its explanation.
    """

    score: float | None
    parsed: bool = True
    asked_judge: bool = False
    cause: str = ""
    verdict: Verdict | None = None


class AnswersHandle:
    """Scores under way; ``result`` waits for the judge."""

    def __init__(self, scores: list[AnswerScore], judged: list[int], handle: JudgeHandle | None) -> None:
        self._scores = scores
        self._judged = judged
        self._handle = handle

    def result(self) -> list[AnswerScore]:
        if self._handle is not None:
            for index, verdict in zip(self._judged, self._handle.result(), strict=True):
                parsed = self._scores[index].parsed
                self._scores[index] = AnswerScore(verdict.score, parsed, True, verdict.cause, verdict)
            self._handle = None
        return self._scores


def submit_answers(
    items: Sequence[tuple[Question, str]],
    kind: AnswerKind,
    rule: str,
    judge_service: JudgeService | None = None,
    shared: Sequence[bool] | None = None,
) -> AnswersHandle:
    """Start scoring (question, response text) items, in order.

    kind: ``judge``; ``rules``; ``rules_then_judge`` (the judge where a rule finds nothing to compare); ``none``. rule:
    for questions that name none of their own. shared: which responses come from the response cache (their verdicts are
    kept there). Empty and repetitive responses score 0, whatever the kind. Raises DataError for a question without
    ground truth and RecipeError where a judge is needed but not given.
    """
    if kind == "none":
        return AnswersHandle([AnswerScore(None)] * len(items), [], None)
    if judge_service is None and kind != "rules":
        raise RecipeError(
            f"answers are scored by {kind}, but there is no judge; set judge.base_urls or judge.model_path"
        )
    scores: list[AnswerScore] = []
    judged: list[int] = []
    for question, text in items:
        if not question.answer.strip():
            where = f"question {question.id}" + (f" ({question.origin})" if question.origin else "")
            raise DataError(f"{where} has no answer to compare with; give it one, or set rewards.answer.kind none")
        if is_empty(text):
            scores.append(AnswerScore(0.0, cause="empty response"))
        elif is_repetitive(text):
            scores.append(AnswerScore(0.0, cause="repetitive response"))
        elif kind == "judge":
            judged.append(len(scores))
            scores.append(AnswerScore(None, asked_judge=True))
        else:
            score = rules.score(question.rule or rule, question, text)
            if score is None and kind == "rules_then_judge":
                judged.append(len(scores))
                scores.append(AnswerScore(None, parsed=False, asked_judge=True))
            else:
                scores.append(AnswerScore(0.0 if score is None else score, parsed=score is not None))
    handle = None
    if judged:
        assert judge_service is not None
        handle = judge_service.submit(judge_item(*items[i], shared=bool(shared and shared[i])) for i in judged)
    return AnswersHandle(scores, judged, handle)


def score_answers(
    items: Sequence[tuple[Question, str]],
    kind: AnswerKind,
    rule: str,
    judge_service: JudgeService | None = None,
    shared: Sequence[bool] | None = None,
) -> list[AnswerScore]:
    """Scores of (question, response text) items, in order; see ``submit_answers``."""
    return submit_answers(items, kind, rule, judge_service, shared).result()


def judge_item(question: Question, text: str, shared: bool = False) -> JudgeItem:
    """What the judge is given: the question with its options, the truth (with letter and text for a choice)."""
    truth = question.answer
    if question.choices and (index := truth_index(truth, list(question.choices))) is not None:
        truth = f"{choice_letter(index)}. {question.choices[index]}"
    return JudgeItem(question_text(question), truth, text, shared)
