"""The response cache: every response of the teachers and the student, collected once and kept as plain Parquet.

    folder/
      manifest.json   schema version; model, revision and sampling settings of every source
      shards/         *.parquet, one row per response (files.SCHEMA)
      journals/       responses that are not in a shard yet
      verdicts/       *.jsonl, verdicts of the judge on these responses (rewards/verdict_store.py)
      locks/          empty files that processes lock

Any number of processes may collect into a folder and read it at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openril.errors import CacheError, DataError
from openril.records import Question, Response
from openril.responses import files
from openril.responses.loaded import LoadedResponses, Texts
from openril.responses.manifest import EMPTY, MANIFEST, may_differ, read_manifest
from openril.responses.writer import Writer
from openril.storage import Lock, refuse_changed, write_json


class ResponseCache:
    """A response cache folder. Use ``open`` or ``create`` to make one."""

    def __init__(self, folder: Path, shard_size: int = 8192) -> None:
        self.folder = folder
        self.shard_size = shard_size
        self._seen: dict[str, int] = {}  # journal stem -> bytes read, or -1 once its shard is read
        # source -> question id -> [content hash, bit mask of indices]
        self._index: dict[str, dict[str, list[Any]]] = {}
        self._journal_sources: dict[str, str] = {}  # journal stem -> the source its header names
        self._hashes: dict[Question, str] = {}

    # Opening

    @classmethod
    def create(cls, folder: str | Path, *, shard_size: int = 8192) -> ResponseCache:
        """Open the cache, or make an empty one if there is none. shard_size: responses in a full shard."""
        cache = cls(Path(folder), shard_size)
        if not cache.manifest_path.exists():
            with cache._lock():
                if not cache.manifest_path.exists():
                    write_json(cache.manifest_path, EMPTY)
        return cls.open(folder, shard_size=shard_size)

    @classmethod
    def open(cls, folder: str | Path, *, shard_size: int = 8192) -> ResponseCache:
        """Open an existing cache, and turn the journals of dead writers into shards.

        Raises CacheError if there is no cache, it is damaged, or a newer OpenRIL made it.
        """
        cache = cls(Path(folder), shard_size)
        cache.manifest()
        cache._fold()
        return cache

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST

    @property
    def shard_folder(self) -> Path:
        """Folder of Parquet files that pandas, datasets or DuckDB read as one table."""
        return self.folder / files.SHARDS

    @property
    def journal_folder(self) -> Path:
        return self.folder / files.JOURNALS

    def _lock(self) -> Lock:
        """Return the lock held while files are replaced or removed (shared: while they are read). Never nest it."""
        return Lock(self.folder / "locks" / "folder.lock")

    def _fold(self) -> int:
        """Turn dead writers' journals into shards and return their number. A read-only folder is left as it is."""
        try:
            journals = files.list_files(self.journal_folder, ".jsonl")
            return sum(files.fold_journal(path, self.shard_folder) for path in journals)
        except OSError as e:
            if e.errno in files.READ_ONLY:
                return 0
            raise

    # Manifest

    def manifest(self) -> dict[str, Any]:
        """Read the manifest. ``sources`` maps a name to its model, revision and sampling settings."""
        return read_manifest(self.folder)

    @property
    def sources(self) -> list[str]:
        """Names of the sources collected so far."""
        return list(self.manifest()["sources"])

    def register(self, source: str, *, model: str, revision: str | None, sampling: Mapping[str, Any]) -> None:
        """Record how this source's responses are produced. Every row of it holds this entry.

        Raises CacheError if the cache holds responses of this source from another model or with other settings.
        """
        entry = {"model": model, "revision": revision, "sampling": dict(sampling)}
        with self._lock():
            manifest = self.manifest()
            old = manifest["sources"].setdefault(source, entry)
            if old is entry:
                write_json(self.manifest_path, manifest)
        refuse_changed(
            self.folder,
            {source: old},
            {source: entry},
            fix="set another cache_dir, or drop the old responses with `ril collect --recollect`",
            ignored={f"{source}.{key}" for key in may_differ(old, entry)}.__contains__,
            error=CacheError,
        )

    # Contents

    def refresh(self) -> None:
        """Read what this and other processes have written since the last call."""
        # Journals before shards: a journal that becomes a shard in between is then read at least once.
        for path in files.list_files(self.journal_folder, ".jsonl"):
            offset = self._seen.get(path.stem, 0)
            if offset < 0:
                continue
            try:
                lines, end = files.read_journal(path, offset)
            except FileNotFoundError:
                continue
            if offset == 0 and lines:
                self._journal_sources[path.stem] = lines.pop(0)["source"]
            columns = [[row[k] for row in lines] for k in ("question_id", "index", "question_hash")]
            if lines:
                self._add([self._journal_sources[path.stem]] * len(lines), *columns)
            self._seen[path.stem] = end
        for path in files.list_files(self.shard_folder, ".parquet"):
            if self._seen.get(path.stem) == -1:
                continue
            try:
                table = files.read_shard(path, ["source", "question_id", "index", "question_hash"])
            except FileNotFoundError:
                continue
            self._add(*(table[c].to_pylist() for c in ("source", "question_id", "index", "question_hash")))
            self._seen[path.stem] = -1

    def _add(self, sources: list[str], question_ids: list[str], indices: list[int], hashes: list[str]) -> None:
        for source, question_id, index, content in zip(sources, question_ids, indices, hashes, strict=True):
            entry = self._index.setdefault(source, {}).setdefault(question_id, [content, 0])
            if entry[0] != content:
                entry[0] = ""  # these rows answer different contents, so some of them are stale
            entry[1] |= 1 << index

    def content_hash(self, question: Question) -> str:
        """Return the question's content hash. It reads the images, so it is computed once per process."""
        if question not in self._hashes:
            self._hashes[question] = question.content_hash()
        return self._hashes[question]

    def content_hashes(self, questions: Sequence[Question]) -> dict[str, str]:
        """Return content hashes by question id. Image files are read in parallel."""
        with ThreadPoolExecutor(8) as pool:
            return dict(zip((q.id for q in questions), pool.map(self.content_hash, questions), strict=True))

    def missing(self, questions: Sequence[Question], source: str, num_responses: int) -> list[tuple[Question, int]]:
        """Return the responses that are still to be collected, as (question, index) in the order of the questions.

        Raises CacheError if a cached response answers an older content of its question.
        """
        self.refresh()
        index = self._index.get(source, {})
        known = [q for q in questions if q.id in index]
        hashes = self.content_hashes(known)
        stale = [q for q in known if index[q.id][0] != hashes[q.id]]
        if stale:
            raise self._stale_error([(q, source) for q in stale])
        missing = []
        for question in questions:
            mask = index[question.id][1] if question.id in index else 0
            missing += [(question, i) for i in range(num_responses) if not mask >> i & 1]
        return missing

    def _stale_error(self, stale: Sequence[tuple[Question, str]]) -> CacheError:
        question, source = stale[0]
        others = f", and so have {len(stale) - 1} more" if len(stale) > 1 else ""
        return CacheError(
            f"{self.folder}: question {question.id!r} ({question.origin or 'no file'}) has changed its text, choices or"
            f" image since {source!r} answered it{others}. Restore it, set another cache_dir, or drop the stale responses"
            " with `ril collect --recollect`."
        )

    # Writing

    def writer(self, source: str) -> Writer:
        """Return a writer for a registered source, to be used in ``with``. ``missing`` returns what to write."""
        entry = self.manifest()["sources"].get(source)
        assert entry is not None, "register the source first"
        return Writer(self.folder, source, entry, self.content_hash, self.shard_size)

    def discard(self, source: str, question_ids: Iterable[str] | None = None) -> int:
        """Remove a source's responses to these questions, and return how many there were.

        None removes all responses and the source's manifest entry. Raises CacheError while another process writes
        responses of this source.
        """
        self._fold()
        stem = files.file_stem(source)
        if any(p.stem.rsplit("-", 2)[0] == stem for p in files.list_files(self.journal_folder, ".jsonl")):
            raise CacheError(f"{self.folder}: another process is collecting {source!r}. Stop it first.")
        ids = None if question_ids is None else pa.array(list(question_ids), pa.string())
        removed = 0
        with self._lock():
            for path in files.list_files(self.shard_folder, ".parquet"):
                table = files.read_shard(path)
                hit = pc.equal(table["source"], source)
                if ids is not None:
                    hit = pc.and_(hit, pc.is_in(table["question_id"], value_set=ids))
                count = pc.sum(hit).as_py() or 0
                if count == len(table):
                    path.unlink()
                elif count:
                    files.write_table(path, table.filter(pc.invert(hit)))
                removed += count
            if ids is None:
                manifest = self.manifest()
                manifest["sources"].pop(source, None)
                write_json(self.manifest_path, manifest)
        self._seen.clear()
        self._index.clear()
        return removed

    def discard_stale(self, questions: Sequence[Question], source: str) -> int:
        """Remove this source's responses to older contents of these questions, and return how many there were."""
        self.refresh()
        index = self._index.get(source, {})
        hashes = self.content_hashes([q for q in questions if q.id in index])
        stale = [id for id, content in hashes.items() if index[id][0] != content]
        return self.discard(source, stale) if stale else 0

    # Reading

    def load(
        self,
        questions: Sequence[Question],
        sources: Sequence[str] | None = None,
        num_responses: int | None = None,
        *,
        check_hashes: bool = True,
        with_token_ids: bool = False,
    ) -> LoadedResponses:
        """Index the responses of these sources (None: all) to these questions. Texts are read when they are needed.

        Args:
            num_responses: Exactly this many of each, the first by index. None takes what is there, at least one.
            check_hashes: Compare the questions, including their images, with those that were answered.
            with_token_ids: Load the sampler's token ids too.

        Raises:
            CacheError: For damaged shards, stale questions, unknown sources and too few responses.
            DataError: For two questions with the same id.
        """
        ids = [q.id for q in questions]
        if len(set(ids)) != len(ids):
            double = next(id for i, id in enumerate(ids) if id in ids[:i])
            raise DataError(f"question {double!r}: expected unique ids. Rename one of the two questions.")
        known = self.sources
        sources = known if sources is None else list(sources)
        unknown = [s for s in sources if s not in known]
        if unknown:
            raise CacheError(
                f"{self.folder}: expected responses of {', '.join(known) or 'nobody yet'}, got {', '.join(unknown)}. Run"
                " `ril collect RECIPE`, or correct the names."
            )
        lock = self._lock()
        try:
            lock.acquire(shared=True)
        except OSError as e:
            if e.errno not in files.READ_ONLY:  # nobody can replace files in a read-only folder
                raise
        try:
            table, texts = self._read(ids, sources, num_responses, with_token_ids)
        finally:
            lock.release()
        loaded = LoadedResponses(table, texts, ids, sources)
        if check_hashes:
            present = loaded.counts().sum(axis=1) > 0
            answered = [q for q, p in zip(questions, present, strict=True) if p]
            stale = loaded.stale(dict.fromkeys(ids, "") | self.content_hashes(answered))
            if stale:
                by_id = {q.id: q for q in questions}
                raise self._stale_error([(by_id[id], source) for id, source in stale])
        self._check_counts(loaded, num_responses or 1)
        return loaded

    def _read(
        self, ids: list[str], sources: list[str], num_responses: int | None, with_token_ids: bool
    ) -> tuple[pa.Table, Texts]:
        indexed = ["question_id", "source", "index", "question_hash"]
        texts = ["text", "finish_reason", *(["token_ids"] if with_token_ids else [])]
        value_set = pa.array(ids, pa.string())
        found: dict[str, Path | pa.Table] = {}
        tables: dict[str, pa.Table] = {}

        def index_of(table: pa.Table) -> pa.Table:
            rows = pa.array(np.arange(len(table), dtype=np.int32))
            table = table.select(indexed).append_column("row", rows)
            keep = pc.and_(
                pc.is_in(table["question_id"], value_set=value_set), pc.is_in(table["source"], pa.array(sources))
            )
            if num_responses is not None:
                keep = pc.and_(keep, pc.less(table["index"], num_responses))
            return table.filter(keep)

        # Journals before shards, as in refresh. A shard replaces the journal of the same name.
        for path in files.list_files(self.journal_folder, ".jsonl"):
            try:
                lines, _ = files.read_journal(path)
            except FileNotFoundError:
                continue
            if lines:
                found[path.stem] = files.rows_to_table(lines[0], lines[1:])
                tables[path.stem] = index_of(found[path.stem])
        paths = files.list_files(self.shard_folder, ".parquet")
        with ThreadPoolExecutor(8) as pool:  # texts are read once here, so that damage is found before the work begins
            indices = pool.map(lambda p: index_of(files.read_shard(p, indexed + texts)), paths)
            tables.update(zip((p.stem for p in paths), indices, strict=True))
        found.update((p.stem, p) for p in paths)
        names = sorted(tables)
        empty = index_of(files.SCHEMA.empty_table())
        parts = [
            t.append_column("file", pa.array(np.full(len(t), i, np.int32)))
            for i, t in enumerate([empty, *(tables[name] for name in names)], start=-1)
        ]
        return pa.concat_tables(parts), Texts([found[name] for name in names], texts)

    def _check_counts(self, loaded: LoadedResponses, required: int) -> None:
        counts = loaded.counts()
        short = counts < required
        if not short.any():
            return
        parts = []
        for s, source in enumerate(loaded.sources):
            if short[:, s].any():
                example = loaded.question_ids[int(np.argmax(short[:, s]))]
                parts.append(
                    f"{source}: {int(short[:, s].sum())} of {len(counts)} questions have fewer than {required} "
                    f"({int(np.minimum(counts[:, s], required).sum())} of {len(counts) * required} responses are there; "
                    f"for instance question {example!r} has {loaded.count(example, source)})"
                )
        raise CacheError(f"{self.folder}: too few responses. {'; '.join(parts)}. Run `ril collect RECIPE`.")

    def responses_for(self, question: Question, source: str) -> list[Response]:
        """Return a source's responses to one question. This reads the folder; use ``load`` for many questions."""
        return self.load([question], [source]).responses_for(question.id, source)
