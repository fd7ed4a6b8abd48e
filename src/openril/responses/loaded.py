"""Cached responses in memory: one Arrow table and an index, so that two million responses stay cheap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openril.errors import CacheError
from openril.records import Response


class LoadedResponses(Mapping[str, list[Response]]):
    """Responses by question id, ordered by source (as asked for) and index. Made by ``ResponseCache.load``.

    Records are built when asked for; texts stay in Arrow memory.
    """

    def __init__(self, table: pa.Table, question_ids: Sequence[str], sources: Sequence[str]) -> None:
        """table: rows in any order, in the order in which duplicates lose to earlier rows."""
        self.sources = tuple(sources)
        self.question_ids = tuple(question_ids)
        self._question_number = {id: i for i, id in enumerate(self.question_ids)}
        self._source_number = {source: i for i, source in enumerate(self.sources)}
        # Only what records are built from stays; the rest becomes numbers.
        kept = [name for name in ("text", "finish_reason", "token_ids") if name in table.column_names]
        self._columns = {name: table[name] for name in kept}
        q = codes(table["question_id"], self.question_ids)
        s = codes(table["source"], self.sources)
        index = table["index"].to_numpy().astype(np.int64)
        rows = np.lexsort((index, s, q))  # stable: of rows with one key, the earliest comes first
        rows = rows[(q[rows] >= 0) & (s[rows] >= 0)]
        key = q[rows] * len(self.sources) + s[rows]
        index = index[rows]
        first = np.ones(len(rows), bool)
        first[1:] = (key[1:] != key[:-1]) | (index[1:] != index[:-1])
        self._rows, key, self._index = rows[first], key[first], index[first]
        # Slot q * S + s holds that question's and source's rows: self._rows[starts[slot] : starts[slot + 1]].
        self._starts = np.searchsorted(key, np.arange(len(self.question_ids) * len(self.sources) + 1))
        self._verdicts = table["verdict"].to_numpy(zero_copy_only=False).astype(np.float32)[self._rows]
        hashes = table["question_hash"].combine_chunks().dictionary_encode()
        self._hash_values = hashes.dictionary.to_pylist()
        self._hash_codes = hashes.indices.to_numpy()[self._rows]

    def _slot(self, question_id: str, source: str) -> tuple[int, int]:
        """Start and end of this question's and source's rows. Raises CacheError for what was not loaded."""
        q, s = self._question_number.get(question_id), self._source_number.get(source)
        if q is None:
            raise CacheError(f"question {question_id!r} was not loaded from the response cache")
        if s is None:
            known = ", ".join(self.sources)
            raise CacheError(f"source {source!r} was not loaded from the response cache; loaded: {known}")
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
        """This source's responses to the question, by index."""
        start, end = self._slot(question_id, source)
        return [self._response(i, question_id, source) for i in range(start, end)]

    def count(self, question_id: str, source: str) -> int:
        start, end = self._slot(question_id, source)
        return end - start

    def counts(self) -> np.ndarray:
        """Number of responses, shape [questions, sources], in the order of ``question_ids`` and ``sources``."""
        return np.diff(self._starts).reshape(len(self.question_ids), len(self.sources))

    def verdicts_for(self, question_id: str, source: str) -> list[float | None]:
        """Verdicts beside ``responses_for``; None where not judged yet."""
        start, end = self._slot(question_id, source)
        return [None if np.isnan(v) else float(v) for v in self._verdicts[start:end]]

    def verdict(self, response: Response) -> float | None:
        """The verdict of one cached response; None where not judged yet."""
        position = self._position(response.question_id, response.source, response.index)
        if position is None:
            return None
        value = self._verdicts[position]
        return None if np.isnan(value) else float(value)

    def set_verdict(self, question_id: str, source: str, index: int, verdict: float) -> None:
        """Remember a verdict in memory; ``ResponseCache.record_verdicts`` makes it last."""
        position = self._position(question_id, source, index)
        if position is not None:
            self._verdicts[position] = verdict

    def _position(self, question_id: str, source: str, index: int) -> int | None:
        if question_id not in self._question_number or source not in self._source_number:
            return None
        start, end = self._slot(question_id, source)
        position = start + int(np.searchsorted(self._index[start:end], index))
        return position if position < end and self._index[position] == index else None

    def stale(self, hashes: Mapping[str, str]) -> list[tuple[str, str]]:
        """(question id, source) pairs that hold a response to another content than ``hashes`` says, in order."""
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
    """Position of each of the column's strings in ``values``, -1 for others. [rows] int64."""
    if len(column) == 0:
        return np.zeros(0, np.int64)
    found = pc.index_in(column, value_set=pa.array(values, pa.string()))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)
