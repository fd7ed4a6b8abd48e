"""The plain data that all other modules exchange: Question, Response, Rollout, Group. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDENT = "student"
"""The reserved source name of the student's own responses."""

IMAGE_MARKER = "<image>"
"""Marks the place of an image in a question's text. Without markers, all images come before the text."""


@dataclass(frozen=True)
class ImageSource:
    """One image as the data names it. Exactly one of the fields is set."""

    path: Path | None = None
    """The absolute path of a local file."""
    url: str | None = None
    """An http(s) or data URL."""
    data: bytes | None = None
    """The encoded bytes (PNG, JPEG, ...)."""

    def __post_init__(self) -> None:
        assert sum(x is not None for x in (self.path, self.url, self.data)) == 1

    @property
    def name(self) -> str:
        """The name of this image in error messages."""
        if self.path is not None:
            return str(self.path)
        if self.url is not None:
            return self.url if len(self.url) <= 80 else self.url[:77] + "..."
        return f"<{len(self.data or b'')} bytes>"


@dataclass(frozen=True)
class Question:
    """One question with its images and its ground truth.

    id: unique within a data set. question: the text, which may hold one ``<image>`` marker for each image. answer: the
    ground truth ("" when unknown). choices: the options of a multiple-choice question. rule: the name of the answer rule
    (rewards/rules.py), or None for the recipe's. metadata: every other column, unchanged. origin: "file:line", for
    error messages. other_answers: further ground truths; a response that matches any of them is right.
    """

    id: str
    question: str
    answer: str = ""
    images: tuple[ImageSource, ...] = ()
    choices: tuple[str, ...] = ()
    rule: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    origin: str = field(default="", compare=False)
    other_answers: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """All ground truths, the main one first."""
        return (self.answer, *self.other_answers)

    def content_hash(self) -> str:
        """Return the first 32 hex digits of the SHA-256 of all that a teacher sees: text, choices and images.

        Local files are hashed by content, so that a replaced picture makes cached responses stale. URLs are hashed by
        name.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps([self.question, list(self.choices)], ensure_ascii=False).encode())
        for image in self.images:
            if image.path is not None:
                content = image.path.read_bytes()
            elif image.url is not None:
                content = image.url.encode()
            else:
                content = image.data or b""
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Response:
    """One answer to one question, from the student or from a teacher.

    source: the name of a teacher, or ``STUDENT``. index: the 0-based number among this source's responses to the
    question. finish_reason: "stop" (complete), "length" (cut at the limit), or the server's own reason. token_ids,
    logprobs: the sampler's ids, which are never tokenized again, and their log-probabilities in nats under the
    unmodified distribution of the model; None for responses that came as text.
    """

    question_id: str
    source: str
    index: int
    text: str
    finish_reason: str = "stop"
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None

    @property
    def from_student(self) -> bool:
        return self.source == STUDENT


@dataclass
class Rollout:
    """A response in a group, with everything that the step computed for it.

    student_prob: the discriminator's probability that the student wrote the response, in [0, 1]; None without a
    discriminator. similarity: the similarity reward; None without a discriminator. verdict: the answer reward of judge or
    rules; None when unknown or not requested. rewards: every reward by name, None where unknown. reward: their weighted
    sum; None when any reward with a weight is unknown. advantage: 0.0 where the reward is unknown.

    judged: whether the judge decides the verdict. explanation: the judge's own words. cause: why the verdict is unknown, or
    why it is 0 without a comparison. learned: tokens in the student's update, also where its group has no advantage and
    needs no pass; 0 for a response outside the update; None before it.
    """

    response: Response
    student_prob: float | None = None
    similarity: float | None = None
    verdict: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float = 0.0
    judged: bool = False
    explanation: str = ""
    cause: str = ""
    learned: int | None = None


@dataclass
class Group:
    """One question with the student's samples first and the teachers' responses after them: the unit of a RIL step.

    without_teachers: its teacher responses are not in the update (``train.teacher_responses_below``).
    """

    question: Question
    rollouts: list[Rollout]
    without_teachers: bool = False

    @property
    def students(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.response.from_student]

    @property
    def teachers(self) -> list[Rollout]:
        return [r for r in self.rollouts if not r.response.from_student]

    @property
    def right_share(self) -> float | None:
        """The share of right samples among the student's, over known verdicts; None if none is known."""
        known = [r.verdict for r in self.students if r.verdict is not None]
        return sum(verdict == 1.0 for verdict in known) / len(known) if known else None
