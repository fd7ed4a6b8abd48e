"""Questions that the worker sends to the process that started it, and the answers that come back.

Inside training, the student stays where it is: the worker only reads benchmarks and scores answers. A question travels
as one line of JSON with its images in base64, on the worker's standard output; the answers return on standard input.
"""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from openril.errors import OpenRILError
from openril.records import STUDENT, ImageSource, Question, Response

Answerer = Callable[[Sequence[Question], int], list[Response | None]]
"""(questions, most tokens of an answer) -> one answer each, None where the prompt is too long."""

ALIVE = 60.0
"""Seconds between two signs of life of the worker."""


def say(**event: Any) -> None:
    """Write an event in one call, because two threads write."""
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def keep_alive() -> None:
    """Send an event every minute, also while a judge is waited for."""

    def run() -> None:
        while True:
            time.sleep(ALIVE)
            say(event="alive")

    threading.Thread(target=run, daemon=True).start()


class RemoteSampler:
    """A sampler that asks the process that started this one. Prompts that are too long get no response."""

    def sample(
        self, questions: Sequence[Question], num_generations: int, *, max_completion_length: int, **_: Any
    ) -> list[list[Response]]:
        sent = [
            {"id": q.id, "text": q.question, "images": [base64.b64encode(i.data or b"").decode() for i in q.images]}
            for q in questions
        ]
        say(event="questions", questions=sent, limit=max_completion_length)
        line = sys.stdin.readline()
        if not line:
            raise OpenRILError("the process that started this evaluation has ended")
        return [
            [Response(q.id, STUDENT, 0, row["text"], row["finish_reason"], tuple(range(row["tokens"])))] if row else []
            for q, row in zip(questions, json.loads(line), strict=True)
        ]


def answer(event: dict[str, Any], answerer: Answerer) -> str:
    """Return the line that answers an event of ``RemoteSampler``."""
    questions = []
    for sent in event["questions"]:
        images = tuple(ImageSource(data=base64.b64decode(image)) for image in sent["images"])
        questions.append(Question(id=sent["id"], question=sent["text"], images=images, origin=sent["id"]))
    rows = [
        {"text": r.text, "finish_reason": r.finish_reason, "tokens": len(r.token_ids or ())} if r else None
        for r in answerer(questions, event["limit"])
    ]
    return json.dumps(rows) + "\n"
