"""The plain data everything else passes around: Question, Response, Rollout, Group. No torch here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDENT = "student"
"""The reserved source name of the student's own responses."""

IMAGE_MARKER = "<image>"
"""Marks in a question's text where an image stands. Without markers all images stand before the text."""


@dataclass(frozen=True)
class ImageSource:
    """One image as the data names it; exactly one of the fields is set.

    path: absolute path of a local file. url: http(s) or data URL. data: encoded bytes (PNG, JPEG, ...).
    """

    path: Path | None = None
    url: str | None = None
    data: bytes | None = None

    def __post_init__(self) -> None:
        assert sum(x is not None for x in (self.path, self.url, self.data)) == 1

    @property
    def name(self) -> str:
        """What an error message calls this image."""
        if self.path is not None:
            return str(self.path)
        if self.url is not None:
            return self.url if len(self.url) <= 80 else self.url[:77] + "..."
        return f"<{len(self.data or b'')} bytes>"


@dataclass(frozen=True)
class Question:
    """One question with its images and its ground truth.

    id: unique within a data set. question: the text, which may hold one ``<image>`` marker per image. answer: the
    ground truth ("" when unknown). choices: options of a multiple-choice question. rule: name of the answer rule
    (rewards/rules.py), or None for the one the recipe sets. metadata: every other column, kept as it was.
    origin: "file:line", for messages.
    """

    id: str
    question: str
    answer: str = ""
    images: tuple[ImageSource, ...] = ()
    choices: tuple[str, ...] = ()
    rule: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    origin: str = field(default="", compare=False)

    def content_hash(self) -> str:
        """SHA-256 (hex, first 32 digits) of everything a teacher is shown: text, choices and image contents.

        Local files enter by content, so a replaced picture makes cached responses stale; URLs enter by name.
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

    source: teacher name, or ``STUDENT``. index: 0-based number among this source's responses to the question.
    finish_reason: "stop" (ended by itself), "length" (cut at the limit), or what the server said.
    token_ids and logprobs: the sampler's own ids (never re-tokenised) and their log-probabilities in nats under the
    unmodified model distribution; None for responses that came as text.
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
    """A response inside a group, with everything the step found out about it.

    student_prob: D's probability that a student wrote it, in [0, 1]; None without a discriminator.
    similarity: similarity reward; None without a discriminator. verdict: answer reward from judge or rules; None
    when unknown or not asked. rewards: every named reward, None where unknown. reward: their weighted sum; None when
    any reward with a weight is unknown. advantage: 0.0 for a response whose reward is unknown.
    """

    response: Response
    student_prob: float | None = None
    similarity: float | None = None
    verdict: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float = 0.0


@dataclass
class Group:
    """One question with its student samples first, then its teacher responses: the unit of a RIL step."""

    question: Question
    rollouts: list[Rollout]

    @property
    def students(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.response.from_student]

    @property
    def teachers(self) -> list[Rollout]:
        return [r for r in self.rollouts if not r.response.from_student]
