"""Whether responses are right, by rules or by the judge. Training, evaluation and rejection sampling all use this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from openril.data.question_text import choice_letter, question_text
from openril.errors import DataError, RecipeError
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.rewards import rules
from openril.rewards.choices import truth_index
from openril.rewards.degenerate import is_empty, is_repetitive
from openril.rewards.judge import JudgeHandle, JudgeItem, KnownVerdicts
from openril.rewards.judge_protocol import Verdict
from openril.rewards.verdict_store import open_verdict_store

AnswerKind = Literal["judge", "rules", "rules_then_judge", "none"]
WithoutTruth = Literal["refuse", "leave_out"]
NO_TRUTH = "no ground truth"
"""The cause of a score that is not known because the question has no answer to compare with."""


@dataclass(frozen=True)
class AnswerScore:
    """Whether one response is right."""

    score: float | None
    """1.0, 0.0, or None if the verdict is unknown or nothing is scored."""
    parsed: bool = True
    """False where a rule found no answer to compare. Under ``rules`` such a response scores 0."""
    asked_judge: bool = False
    """Whether the judge decides the score. True for cached and unknown verdicts too."""
    cause: str = ""
    """Why the score is unknown, or why it is 0 without a comparison."""
    verdict: Verdict | None = None
    """The judge's verdict with its explanation."""


@dataclass
class AnswersHandle:
    """Scores that are being computed. ``result`` waits for the judge."""

    _scores: list[AnswerScore]
    _judged: list[int]
    _handle: JudgeHandle | None

    def result(self) -> list[AnswerScore]:
        if self._handle is not None:
            for index, verdict in zip(self._judged, self._handle.result(), strict=True):
                parsed = self._scores[index].parsed
                if verdict.cause and not verdict.unknown:  # it was decided without the judge
                    self._scores[index] = AnswerScore(verdict.score, cause=verdict.cause)
                else:
                    self._scores[index] = AnswerScore(verdict.score, parsed, True, verdict.cause, verdict)
            self._handle = None
        return self._scores


def submit_answers(
    items: Sequence[tuple[Question, str]],
    kind: AnswerKind,
    rule: str,
    judge_service: KnownVerdicts | None = None,
    shared: Sequence[bool] | None = None,
    without_truth: WithoutTruth = "refuse",
) -> AnswersHandle:
    """Start to score items of (question, response text). Empty and repetitive responses score 0, whatever the kind.

    Args:
        kind: ``rules_then_judge`` asks the judge where a rule finds no answer to compare.
        rule: The rule of questions that name none themselves.
        judge_service: A ``JudgeService``, or ``KnownVerdicts`` to ask nobody.
        shared: Which responses come from the response cache, so that their verdicts are stored there.
        without_truth: With ``leave_out``, responses to questions without ground truth have no score.

    Raises DataError for a question without ground truth unless it is left out, and RecipeError where a judge is needed but
    not given.
    """
    if kind == "none":
        return AnswersHandle([AnswerScore(None)] * len(items), [], None)
    if judge_service is None and kind != "rules":
        raise RecipeError(f"rewards.answer.kind, eval.score: {kind} needs a judge. Set judge.base_urls or model_path.")
    scores: list[AnswerScore] = []
    judged: list[int] = []
    for question, text in items:
        if not question.answer.strip():
            if without_truth == "leave_out":
                scores.append(AnswerScore(None, cause=NO_TRUTH))
                continue
            where = f" ({question.origin})" if question.origin else ""
            raise DataError(
                f"question {question.id}: expected an answer to compare with, got none{where}. Add it, set"
                " rewards.answer.without_truth: leave_out, or set rewards.answer.kind: none."
            )
        if is_empty(text):
            scores.append(AnswerScore(0.0, cause="empty response"))
        elif kind == "judge":  # which checks for repetition itself, after it has looked for a known verdict
            judged.append(len(scores))
            scores.append(AnswerScore(None, asked_judge=True))
        elif is_repetitive(text):
            scores.append(AnswerScore(0.0, cause="repetitive response"))
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
    judge_service: KnownVerdicts | None = None,
    shared: Sequence[bool] | None = None,
    without_truth: WithoutTruth = "refuse",
) -> list[AnswerScore]:
    """Score items of (question, response text), in order. See ``submit_answers``."""
    return submit_answers(items, kind, rule, judge_service, shared, without_truth).result()


def truth_problem(question: Question, rule: str) -> str:
    """Return why a rule does not give 1 to the ground truths restated in tags, a box and a sentence, or ""."""
    wordings = {"answer tags": "<answer>{}</answer>", "a box": "\\boxed{{{}}}", "a sentence": "The answer is {}."}
    for truth in map(rules.read_truth, question.answers):
        try:
            failed = [
                name
                for name, wording in wordings.items()
                if rules.score(question.rule or rule, question, wording.format(truth)) != 1.0
            ]
        except DataError as e:
            return str(e)
        if failed:
            return f"answer: the rule does not give 1 to {truth[:60]!r} in {' and in '.join(failed)}"
    return ""


def cached_answer_kind(recipe: Recipe) -> AnswerKind:
    """Return how cached responses are scored: as in training, and by the judge where training scores no answers."""
    kind: AnswerKind = recipe.rewards.answer.kind
    return "judge" if kind == "none" else kind


def known_answers(recipe: Recipe) -> Callable[[Sequence[tuple[Question, str]]], list[AnswerScore]]:
    """Return a function that scores cached responses by rules and stored verdicts, without asking the judge."""
    kind = cached_answer_kind(recipe)
    known = KnownVerdicts(recipe.judge, open_verdict_store(recipe)) if kind != "rules" else None
    answer = recipe.rewards.answer
    return lambda items: score_answers(items, kind, answer.rule, known, without_truth=answer.without_truth)


def judge_item(question: Question, text: str, shared: bool = False) -> JudgeItem:
    """Return what the judge reads: the question with its options, the truth (a choice by letter and text), the response."""
    truth = question.answer
    if question.choices and (index := truth_index(truth, list(question.choices))) is not None:
        truth = f"{choice_letter(index)}. {question.choices[index]}"
    elif question.other_answers:
        truth = "\n".join(["Any one of these is right:", *(f"- {answer}" for answer in question.answers)])
    return JudgeItem(question_text(question), truth, text, shared)
