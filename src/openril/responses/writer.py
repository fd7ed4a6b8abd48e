"""Writing responses into a cache so that a kill loses none that was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openril.records import Question, Response
from openril.responses import files
from openril.responses.files import Journal


class Writer:
    """Appends one source's responses. Each survives a kill as soon as ``append`` returns. Not thread-safe.

    entry: the source's entry in the manifest. content_hash: returns a question's content hash.
    """

    SYNC_EVERY = 64

    def __init__(
        self,
        folder: Path,
        source: str,
        entry: Mapping[str, Any],
        content_hash: Callable[[Question], str],
        shard_size: int,
    ) -> None:
        self.folder = folder
        self.source = source
        self.content_hash = content_hash
        self.shard_size = shard_size
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
            self._journal = Journal(self.folder / files.JOURNALS, self.source, self.header)
        self._journal.append(
            {
                "question_id": question.id,
                "index": response.index,
                # JSON may carry a lone surrogate, which files cannot hold.
                "text": response.text.encode("utf-8", "replace").decode(),
                "finish_reason": response.finish_reason,
                "question_hash": self.content_hash(question),
                "token_ids": None if response.token_ids is None else list(response.token_ids),
                "created": files.now(),
            }
        )
        if len(self._journal.rows) % self.SYNC_EVERY == 0:
            self._journal.sync()
        if len(self._journal.rows) >= self.shard_size:
            self.close()

    def close(self) -> None:
        """Turn what was written into a shard. The next ``append`` starts another."""
        if self._journal is not None:
            journal, self._journal = self._journal, None
            journal.close(self.folder / files.SHARDS)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
