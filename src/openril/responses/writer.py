"""Writing responses into a cache so that each survives whatever happens next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openril.records import Question, Response
from openril.responses import files
from openril.responses.files import Journal

if TYPE_CHECKING:
    from openril.responses.cache import ResponseCache


class Writer:
    """Appends one source's responses; each survives a kill as soon as ``append`` returns. For one thread."""

    SYNC_EVERY = 64

    def __init__(self, cache: ResponseCache, source: str, entry: Mapping[str, Any]) -> None:
        self.cache = cache
        self.source = source
        self.header = {
            "source": source,
            "model": entry["model"],
            "revision": entry["revision"],
            "sampling": json.dumps(entry["sampling"], sort_keys=True),
        }
        self._journal: Journal | None = None

    def append(self, question: Question, response: Response) -> None:
        """Write a response to this question."""
        assert response.source == self.source and response.question_id == question.id
        if self._journal is None:
            self._journal = Journal(self.cache.journal_folder, self.source, self.header)
        self._journal.append(
            {
                "question_id": question.id,
                "index": response.index,
                # A lone surrogate, which JSON may carry, is no text that files can hold.
                "text": response.text.encode("utf-8", "replace").decode(),
                "finish_reason": response.finish_reason,
                "question_hash": self.cache.content_hash(question),
                "token_ids": None if response.token_ids is None else list(response.token_ids),
                "created": files.now(),
            }
        )
        if len(self._journal.rows) % self.SYNC_EVERY == 0:
            self._journal.sync()
        if len(self._journal.rows) >= self.cache.shard_size:
            self.close()

    def close(self) -> None:
        """Turn what was written into a shard; appending again starts the next."""
        if self._journal is not None:
            journal, self._journal = self._journal, None
            journal.close(self.cache.shard_folder)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
