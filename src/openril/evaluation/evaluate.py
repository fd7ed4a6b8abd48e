"""Answer held-out questions greedily and score them by training's rules and judge. A killed evaluation continues."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openril.errors import DataError, OpenRILError, PromptTooLongError
from openril.evaluation.summary import TOO_LONG, Evaluation, Row, build_evaluation, groups_of
from openril.recipe.schema import EvaluationConfig, SamplingConfig
from openril.records import Question, Response
from openril.rewards.answers import AnswersHandle, submit_answers
from openril.rewards.judge import JudgeService
from openril.rewards.verdict_store import UnknownBudget
from openril.sampling.protocol import Sampler, sample_fitting
from openril.sampling.vllm_engine import VLLMSampler, Work
from openril.storage import append_jsonl, read_jsonl, write_jsonl

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
JUDGED_BEFORE_STOPPING = 16
"""Verdicts requested before a large share of unknown ones stops the evaluation."""


class Journal:
    """The answers and scores of an unfinished evaluation, one line each.

    Args:
        key: What the answers depend on. A journal with another key is started again.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        rows = read_jsonl(path)
        self.rows: dict[str, Row] = {}
        if rows and rows[0].get("key") == key:
            for row in rows[1:]:
                if "question_id" in row:
                    self.rows[row["question_id"]] = Row(**row)
        else:
            write_jsonl(path, [{"key": key}])
        self.key = key

    def add(self, rows: Sequence[Row]) -> None:
        append_jsonl(self.path, *(asdict(r) for r in rows))
        self.rows.update((r.question_id, r) for r in rows)

    def close(self, rows: Sequence[Row]) -> None:
        """Write the rows in the order of the questions."""
        write_jsonl(self.path, [{"key": self.key}, *(asdict(r) for r in rows)])


def evaluate(
    make_sampler: Callable[[], Sampler],
    questions: Sequence[Question],
    settings: EvaluationConfig,
    judge: JudgeService | None = None,
    *,
    name: str = "student",
    checkpoint: str = "",
    journal: Journal | None = None,
    max_unknown_share: float = 1.0,
    report: Callable[[int, int, dict[str, Any]], None] = lambda done, total, row: None,
    too_long: Callable[[Question, int], None] = lambda question, tokens: None,
) -> Evaluation:
    """Answer the questions greedily, and score the answers as ``settings`` says.

    Args:
        make_sampler: Called when the first answer is needed, so that a finished journal loads no model.
        journal: Its answers are not sampled again, and those without a verdict are judged again.
        max_unknown_share: The largest share of verdicts that may be missing.
        report: Called with (questions done, questions in all, running score).
        too_long: Called with a question whose prompt is too long, and its tokens. Its score is unknown.

    Raises:
        DataError: If a question has no ground truth.
        JudgeError: If more than ``max_unknown_share`` of the verdicts are missing. The answers stay in the journal.
    """
    if missing := next((q for q in questions if not q.answer.strip()), None):
        raise DataError(
            f"answer: expected a ground truth for question {missing.id}, got none ({missing.origin}). Add one, or leave "
            "the question out."
        )
    run = _Run(questions, settings, judge, journal, UnknownBudget(max_unknown_share), report)
    size = settings.questions_per_batch
    for batch in _batches([q for q in questions if q.id in run.answers], size):
        run.submit(batch, [run.answers[q.id] for q in batch])
    todo = [q for q in questions if q.id not in run.rows and q.id not in run.answers]
    if todo:
        options = {
            "settings": GREEDY,
            "max_completion_length": settings.max_completion_length,
            "seed": 0,
            "source": name,
        }
        with closing(stream_answers(make_sampler(), todo, size, too_long, options)) as answers:
            for batch, drawn in answers:
                run.leave_out([q for q, responses in zip(batch, drawn, strict=True) if not responses])
                answered = [(q, responses[0]) for q, responses in zip(batch, drawn, strict=True) if responses]
                run.submit([q for q, _ in answered], [r for _, r in answered])
    rows = run.finish()
    if journal is not None:
        journal.close(rows)
    return build_evaluation(name, checkpoint, rows)


def stream_answers(
    sampler: Sampler,
    questions: Sequence[Question],
    size: int,
    too_long: Callable[[Question, int], None],
    options: dict[str, Any],
) -> Generator[tuple[Sequence[Question], list[list[Response]]]]:
    """Yield questions with their answers (none if too long), in batches of ``size`` or as servers return them."""
    if not isinstance(sampler, VLLMSampler):
        for batch in _batches(questions, size):
            yield batch, sample_fitting(sampler, batch, 1, too_long, **options)
        return
    waiting, left_out = iter(questions), []

    def failed(work: Work, error: OpenRILError) -> None:
        if not isinstance(error, PromptTooLongError):
            raise error
        too_long(work[0], error.tokens)
        left_out.append(work[0])

    take = lambda: next(((q, 0, 1) for q in waiting), None)  # noqa: E731
    with closing(sampler.stream(take, logprobs=False, failed=failed, **options)) as arrived:
        for answers in arrived:
            yield [question for (question, _, _), _ in answers], [responses for _, responses in answers]
    yield left_out, [[] for _ in left_out]


@dataclass
class _Run:
    """Collect rows as they arrive. The judge works on one batch while the student answers the next."""

    questions: Sequence[Question]
    settings: EvaluationConfig
    judge: JudgeService | None
    journal: Journal | None
    budget: UnknownBudget
    report: Callable[[int, int, dict[str, Any]], None]

    def __post_init__(self) -> None:
        known = self.journal.rows if self.journal is not None else {}
        here = {q.id for q in self.questions}
        done = {i: r for i, r in known.items() if r.score is not None or r.finish_reason == TOO_LONG}
        self.rows = {i: r for i, r in done.items() if i in here}
        self.answers = {i: _response(r) for i, r in known.items() if i in here and i not in self.rows}
        self.waiting: tuple[Sequence[Question], Sequence[Response], AnswersHandle] | None = None
        self.asked = 0
        self.causes: list[str] = []

    def leave_out(self, questions: Sequence[Question]) -> None:
        """Keep a row without an answer for questions that are too long."""
        cause = "the prompt is longer than data.max_prompt_length"
        rows = [
            Row(q.id, q.question, " | ".join(q.answers), "", TOO_LONG, cause=cause, groups=groups_of(q.metadata))
            for q in questions
        ]
        if self.journal is not None and rows:
            self.journal.add(rows)
        self.rows.update((r.question_id, r) for r in rows)

    def submit(self, questions: Sequence[Question], responses: Sequence[Response]) -> None:
        items = [(q, r.text) for q, r in zip(questions, responses, strict=True)]
        handle = submit_answers(items, self.settings.score, self.settings.rule, self.judge)
        self._collect()
        self.waiting = (questions, responses, handle)

    def _collect(self) -> None:
        if self.waiting is None:
            return
        (questions, responses, handle), self.waiting = self.waiting, None
        rows = []
        for question, response, score in zip(questions, responses, handle.result(), strict=True):
            row = Row(
                question_id=question.id,
                question=question.question,
                answer=" | ".join(question.answers),
                text=response.text,
                finish_reason=response.finish_reason,
                tokens=len(response.token_ids) if response.token_ids is not None else None,
                score=score.score,
                parsed=score.parsed,
                asked_judge=score.asked_judge,
                cause=score.cause,
                explanation=score.verdict.explanation if score.verdict else "",
                groups=groups_of(question.metadata),
            )
            rows.append(row)
            self.asked += score.asked_judge
            if score.score is None:
                self.causes.append(score.cause)
        if self.journal is not None:
            self.journal.add(rows)
        self.rows.update((r.question_id, r) for r in rows)
        scores = [r.score for r in self.rows.values() if r.score is not None]
        running = {"eval/score": sum(scores) / len(scores)} if scores else {}
        self.report(len(self.rows), len(self.questions), running)
        if self.asked >= JUDGED_BEFORE_STOPPING:
            self.budget.check(self.asked, len(self.causes), self.causes)

    def finish(self) -> list[Row]:
        self._collect()
        self.budget.check(self.asked, len(self.causes), self.causes)
        return [self.rows[q.id] for q in self.questions]


def _response(row: Row) -> Response:
    ids = None if row.tokens is None else tuple(range(row.tokens))  # only their number is used
    return Response(row.question_id, "", 0, row.text, row.finish_reason, ids)


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    return (questions[i : i + size] for i in range(0, len(questions), size))
