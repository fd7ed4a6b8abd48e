"""Cached responses: an index in memory, and texts that are read from their shards when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from cachetools import LRUCache

from openril.errors import CacheError
from openril.records import Response

KEPT_BYTES = 64 * 2**20
"""Size of the row groups that stay in memory after they were read."""


class Texts:
    """The texts of responses in shards, read by row group, so that memory does not grow with the cache.

    Args:
        files: The path of a shard, or the table of a journal that was no shard yet.
    """

    def __init__(self, files: Sequence[Path | pa.Table], columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self._files = files
        self._starts: dict[int, np.ndarray] = {}
        self._kept: LRUCache[tuple[int, int], pa.Table] = LRUCache(KEPT_BYTES, getsizeof=lambda table: table.nbytes)
        self._lock = Lock()

    def read(self, file: int, row: int) -> dict[str, Any]:
        """Return the columns of one row. Raises CacheError if the shard was removed or changed meanwhile."""
        source = self._files[file]
        if isinstance(source, pa.Table):
            return {name: source[name][row].as_py() for name in self.columns}
        with self._lock:
            try:
                if file not in self._starts:
                    groups = pq.read_metadata(source)
                    sizes = [groups.row_group(g).num_rows for g in range(groups.num_row_groups)]
                    self._starts[file] = np.cumsum([0, *sizes])
                group = int(np.searchsorted(self._starts[file], row, side="right")) - 1
                table = self._kept.get((file, group))
                if table is None:
                    with pq.ParquetFile(source, page_checksum_verification=True) as shard:
                        table = shard.read_row_group(group, columns=self.columns, use_threads=False)
                    if table.nbytes <= KEPT_BYTES:
                        self._kept[file, group] = table
            except (pa.ArrowException, OSError) as e:
                raise CacheError(f"{source}: changed while it was in use ({e}). Run the same command again.") from e
            row -= int(self._starts[file][group])
            return {name: table[name][row].as_py() for name in self.columns}


class LoadedResponses(Mapping[str, list[Response]]):
    """Responses by question id, ordered by source (in the order of ``sources``) and index. ``ResponseCache.load`` makes it.

    Records are built on access.

    Args:
        table: Rows in any order, without texts. Of several rows for one response, the first is used. ``file`` and
            ``row`` say where in ``texts`` the rest of a row is.
    """

    def __init__(self, table: pa.Table, texts: Texts, question_ids: Sequence[str], sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.question_ids = tuple(question_ids)
        self._question_number = {id: i for i, id in enumerate(self.question_ids)}
        self._source_number = {source: i for i, source in enumerate(self.sources)}
        self._texts = texts
        q = codes(table["question_id"], self.question_ids)
        s = codes(table["source"], self.sources)
        index = table["index"].to_numpy().astype(np.int64)
        rows = np.lexsort((index, s, q))  # stable: the first of several rows for one response stays first
        rows = rows[(q[rows] >= 0) & (s[rows] >= 0)]
        key = q[rows] * len(self.sources) + s[rows]
        index = index[rows]
        first = np.ones(len(rows), bool)
        first[1:] = (key[1:] != key[:-1]) | (index[1:] != index[:-1])
        rows, key, self._index = rows[first], key[first], index[first].astype(np.int32)
        self._file, self._row = (table[name].to_numpy()[rows] for name in ("file", "row"))
        # Slot q * S + s holds the rows of a question and a source: starts[slot] : starts[slot + 1].
        self._starts = np.searchsorted(key, np.arange(len(self.question_ids) * len(self.sources) + 1))
        hashes = table["question_hash"].combine_chunks().dictionary_encode()
        self._hash_values = hashes.dictionary.to_pylist()
        self._hash_codes = hashes.indices.to_numpy()[rows]

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
        row: dict[str, Any] = self._texts.read(int(self._file[position]), int(self._row[position]))
        ids = row.get("token_ids")
        return Response(
            question_id,
            source,
            int(self._index[position]),
            row["text"],
            row["finish_reason"],
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
        if not len(self._row):
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
