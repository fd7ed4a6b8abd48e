"""The work queue of several processes that collect into one folder.

A source's questions are divided into 64 blocks by id. A process works on a block only while it holds the block's lease, an
OS lock, so no two processes ask for the same response. The leases of a dead process are released at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openril.records import Question
from openril.responses.files import file_stem
from openril.storage import Lock, stable_hash

if TYPE_CHECKING:
    from openril.responses.cache import ResponseCache

BLOCKS = 64

Work = tuple[Question, list[int]]
"""A question and the indices of the responses it still needs."""


class WorkQueue:
    """The missing responses of a source that this process may collect.

    ``take`` returns a piece of work. Call ``done`` once its responses are in the journal or have failed; the last call for
    a block releases the block's lease.
    """

    def __init__(self, cache: ResponseCache, questions: Sequence[Question], source: str, num_responses: int) -> None:
        self.cache = cache
        self.source = source
        self.num_responses = num_responses
        self._folder: Path = cache.folder / "locks" / file_stem(source)
        self._questions: dict[int, list[Question]] = {}
        for question in questions:
            self._questions.setdefault(block_of(question.id), []).append(question)
        blocks = sorted(self._questions)
        # Processes start at different blocks, so that they rarely compete for one.
        start = stable_hash(os.getpid()) % len(blocks) if blocks else 0
        self._waiting = blocks[start:] + blocks[:start]
        self._held: dict[int, Lock] = {}
        self._outstanding: dict[int, int] = {}
        self._work: Iterator[Work] = iter(())

    @property
    def finished(self) -> bool:
        """Whether every block is complete, by this process or by others."""
        return not self._waiting and not self._held

    @property
    def questions_elsewhere(self) -> int:
        """Number of questions in blocks that other processes hold or that are not started."""
        return sum(len(self._questions[block]) for block in self._waiting)

    def take(self) -> Work | None:
        """Return the next piece of work, or None if all is ``finished`` or other processes hold the rest."""
        while True:
            for work in self._work:
                return work
            block = self._lease()
            if block is None:
                return None
            works = list(self._missing(block))
            self._outstanding[block] = len(works)
            self._work = iter(works)
            if not works:
                self._release(block)

    def done(self, question: Question) -> None:
        """Report that a piece of work has succeeded or failed."""
        block = block_of(question.id)
        self._outstanding[block] -= 1
        if self._outstanding[block] == 0:
            self._release(block)

    def release(self) -> None:
        """Release all leases, whether their blocks are complete or not."""
        for block in list(self._held):
            self._release(block)
        self._waiting = []

    def _lease(self) -> int | None:
        for block in self._waiting:
            lock = Lock(self._folder / f"{block:02d}.lock")
            if lock.acquire(wait=False):
                self._held[block] = lock
                self._waiting.remove(block)
                return block
        return None

    def _missing(self, block: int) -> Iterator[Work]:
        # The previous holder wrote all its responses before it released the lease, so only this process collects the rest.
        indices: dict[str, list[int]] = {}
        questions = self._questions[block]
        for question, index in self.cache.missing(questions, self.source, self.num_responses):
            indices.setdefault(question.id, []).append(index)
        yield from ((question, indices[question.id]) for question in questions if question.id in indices)

    def _release(self, block: int) -> None:
        self._held.pop(block).release()


def block_of(question_id: str) -> int:
    return stable_hash(question_id) % BLOCKS
