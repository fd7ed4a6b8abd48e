"""Cached responses in memory: one Arrow table and an index, so that two million responses fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openril.errors import CacheError
from openril.records import Response


class LoadedResponses(Mapping[str, list[Response]]):
    """Responses by question id, ordered by source (in the order of ``sources``) and index. ``ResponseCache.load`` makes it.

    Records are built on access; the texts stay in Arrow memory.

    Args:
        table: Rows in any order. Of several rows for one response, the first is used.
    """

    def __init__(self, table: pa.Table, question_ids: Sequence[str], sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.question_ids = tuple(question_ids)
        self._question_number = {id: i for i, id in enumerate(self.question_ids)}
        self._source_number = {source: i for i, source in enumerate(self.sources)}
        # Keep only the columns that records are built from; the others become numbers.
        kept = [name for name in ("text", "finish_reason", "token_ids") if name in table.column_names]
        self._columns = {name: table[name] for name in kept}
        q = codes(table["question_id"], self.question_ids)
        s = codes(table["source"], self.sources)
        index = table["index"].to_numpy().astype(np.int64)
        rows = np.lexsort((index, s, q))  # stable: the first of several rows for one response stays first
        rows = rows[(q[rows] >= 0) & (s[rows] >= 0)]
        key = q[rows] * len(self.sources) + s[rows]
        index = index[rows]
        first = np.ones(len(rows), bool)
        first[1:] = (key[1:] != key[:-1]) | (index[1:] != index[:-1])
        self._rows, key, self._index = rows[first], key[first], index[first]
        # Slot q * S + s holds the rows of a question and a source: self._rows[starts[slot] : starts[slot + 1]].
        self._starts = np.searchsorted(key, np.arange(len(self.question_ids) * len(self.sources) + 1))
        hashes = table["question_hash"].combine_chunks().dictionary_encode()
        self._hash_values = hashes.dictionary.to_pylist()
        self._hash_codes = hashes.indices.to_numpy()[self._rows]

    def _slot(self, question_id: str, source: str) -> tuple[int, int]:
        """Return start and end of the rows of a question and a source. Raises CacheError if either was not loaded."""
        q, s = self._question_number.get(question_id), self._source_number.get(source)
        if q is None:
            raise CacheError(f"question {question_id!r} was not loaded. Pass it to ResponseCache.load.")
        if s is None:
            known = ", ".join(self.sources)
            raise CacheError(f"source {source!r} was not loaded, only {known}. Pass it to ResponseCache.load.")
        slot = q * len(self.sources) + s
        return int(self._starts[slot]), int(self._starts[slot + 1])

    def _response(self, position: int, question_id: str, source: str) -> Response:
        row = int(self._rows[position])
        ids = self._columns["token_ids"][row].as_py() if "token_ids" in self._columns else None
        return Response(
            question_id,
            source,
            int(self._index[position]),
            self._columns["text"][row].as_py(),
            self._columns["finish_reason"][row].as_py(),
            None if ids is None else tuple(ids),
        )

    def responses_for(self, question_id: str, source: str) -> list[Response]:
        """Return this source's responses to the question, ordered by index."""
        start, end = self._slot(question_id, source)
        return [self._response(i, question_id, source) for i in range(start, end)]

    def count(self, question_id: str, source: str) -> int:
        start, end = self._slot(question_id, source)
        return end - start

    def counts(self) -> np.ndarray:
        """Return the number of responses [questions, sources], in the order of ``question_ids`` and ``sources``."""
        return np.diff(self._starts).reshape(len(self.question_ids), len(self.sources))

    def stale(self, hashes: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return the (question id, source) pairs with a response to other content than that of ``hashes``, in order."""
        if not len(self._rows):
            return []
        number = {value: i for i, value in enumerate(self._hash_values)}
        expected = np.array([number.get(hashes[id], -1) for id in self.question_ids], np.int64)
        slot = np.repeat(np.arange(len(self._starts) - 1), np.diff(self._starts))
        wrong = np.unique(slot[self._hash_codes != expected[slot // len(self.sources)]])
        return [(self.question_ids[i // len(self.sources)], self.sources[i % len(self.sources)]) for i in wrong]

    # Mapping of question id -> all its responses

    def __getitem__(self, question_id: str) -> list[Response]:
        if question_id not in self._question_number:
            raise KeyError(question_id)
        return [r for source in self.sources for r in self.responses_for(question_id, source)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.question_ids)

    def __len__(self) -> int:
        return len(self.question_ids)


def codes(column: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """Return the position in ``values`` of each string of the column, -1 for others. int64 [rows]."""
    if len(column) == 0:
        return np.zeros(0, np.int64)
    found = pc.index_in(column, value_set=pa.array(values, pa.string()))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)
