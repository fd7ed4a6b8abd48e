"""The response cache: what every teacher and the student answered, kept once, as plain Parquet.

    folder/
      manifest.json   schema version; model, revision and sampling settings of every source
      shards/         *.parquet, one row a response (files.SCHEMA)
      journals/       responses on their way into a shard
      verdicts.jsonl  verdicts on their way into the shards
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
from openril.responses.files import Lock
from openril.responses.loaded import LoadedResponses
from openril.responses.manifest import MANIFEST, differences, empty_manifest, read_manifest
from openril.responses.writer import Writer
from openril.storage import append_jsonl, read_jsonl, write_json, write_jsonl


class ResponseCache:
    """A response cache folder. Make one with ``open`` or ``create``."""

    def __init__(self, folder: Path, shard_size: int = 8192) -> None:
        self.folder = folder
        self.shard_size = shard_size
        self._seen: dict[str, int] = {}  # journal stem -> bytes read, or -1 once its shard is read
        self._index: dict[
            str, dict[str, list[Any]]
        ] = {}  # source -> question id -> [content hash, bit mask of indices]
        self._journal_sources: dict[str, str] = {}  # journal stem -> the source its header names
        self._hashes: dict[Question, str] = {}

    # Opening

    @classmethod
    def create(cls, folder: str | Path, *, shard_size: int = 8192) -> ResponseCache:
        """Open the cache, making an empty one when there is none. shard_size: responses in a full shard."""
        cache = cls(Path(folder), shard_size)
        if not cache.manifest_path.exists():
            with cache._lock():
                if not cache.manifest_path.exists():
                    write_json(cache.manifest_path, empty_manifest())
        return cls.open(folder, shard_size=shard_size)

    @classmethod
    def open(cls, folder: str | Path, *, shard_size: int = 8192) -> ResponseCache:
        """Open an existing cache and turn journals that dead writers left into shards.

        Raises CacheError when there is no cache, it is damaged, or a newer OpenRIL made it.
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
        return self.folder / "shards"

    @property
    def journal_folder(self) -> Path:
        return self.folder / "journals"

    @property
    def verdict_path(self) -> Path:
        return self.folder / "verdicts.jsonl"

    def _lock(self) -> Lock:
        """Held while files are replaced or removed (shared: while they are read). Never nest."""
        return Lock(self.folder / "locks" / "folder.lock")

    def _fold(self) -> int:
        """Turn dead writers' journals into shards; their number. A read-only folder is left as it is."""
        try:
            return sum(
                files.fold_journal(p, self.shard_folder) for p in files.list_files(self.journal_folder, ".jsonl")
            )
        except OSError as e:
            if e.errno in files.READ_ONLY:
                return 0
            raise

    # Manifest

    def manifest(self) -> dict[str, Any]:
        """The manifest: ``sources`` maps a name to its model, revision and sampling settings."""
        return read_manifest(self.folder)

    @property
    def sources(self) -> list[str]:
        """Names of the sources collected so far."""
        return list(self.manifest()["sources"])

    def register(self, source: str, *, model: str, revision: str | None, sampling: Mapping[str, Any]) -> None:
        """Say how this source's responses are made; every one of its rows holds this.

        Raises CacheError when the cache holds responses of this source made by another model or with other settings.
        A revision that starts with "weights:" is a fingerprint: equal weights are one model wherever they lie.
        """
        entry = {"model": model, "revision": revision, "sampling": dict(sampling)}
        with self._lock():
            manifest = self.manifest()
            old = manifest["sources"].get(source)
            if old is None:
                manifest["sources"][source] = entry
                write_json(self.manifest_path, manifest)
                return
        different = differences(old, entry)
        if different:
            was = ", ".join(f"{name} {a!r}" for name, a, _ in different)
            now = ", ".join(f"{name} {b!r}" for name, _, b in different)
            raise CacheError(
                f"{self.folder}: responses of {source!r} were made with {was}; now it is {now}. Restore that, set "
                "another cache_dir, or drop the old responses with `ril collect --recollect`"
            )

    # What is there

    def refresh(self) -> None:
        """Take in what this and other processes have written since the last look."""
        # Journals before shards: a journal that turns into a shard in between is then met at least once.
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
                entry[0] = ""  # rows to different contents: whatever the question is now, some are stale
            entry[1] |= 1 << index

    def content_hash(self, question: Question) -> str:
        """The question's content hash, computed once per process (its images are read)."""
        if question not in self._hashes:
            self._hashes[question] = question.content_hash()
        return self._hashes[question]

    def content_hashes(self, questions: Sequence[Question]) -> dict[str, str]:
        """Content hashes by question id; image files are read in parallel."""
        with ThreadPoolExecutor(8) as pool:
            return dict(zip((q.id for q in questions), pool.map(self.content_hash, questions), strict=True))

    def missing(self, questions: Sequence[Question], source: str, num_responses: int) -> list[tuple[Question, int]]:
        """Responses still to be collected, as (question, index) in the order of the questions.

        Raises CacheError when a cached response belongs to an older content of its question.
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
        others = f", and {len(stale) - 1} more like it" if len(stale) > 1 else ""
        return CacheError(
            f"{self.folder}: question {question.id!r} ({question.origin or 'no file'}) has changed (text, choices or "
            f"image) since {source!r} answered it{others}; restore it, set another cache_dir, or drop the stale "
            "responses with `ril collect --recollect`"
        )

    # Writing

    def writer(self, source: str) -> Writer:
        """A writer for a registered source; use it in ``with``. Ask ``missing`` what to write, under a claim."""
        entry = self.manifest()["sources"].get(source)
        assert entry is not None, "register the source first"
        return Writer(self, source, entry)

    def discard(self, source: str, question_ids: Iterable[str] | None = None) -> int:
        """Remove a source's responses (to some questions, or all of them with its manifest entry); their number.

        Raises CacheError while another process writes responses of this source.
        """
        self._fold()
        stem = files.file_stem(source)
        if any(p.stem.rsplit("-", 2)[0] == stem for p in files.list_files(self.journal_folder, ".jsonl")):
            raise CacheError(
                f"{self.folder}: another process is collecting {source!r}; stop it before dropping responses"
            )
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
        """Remove this source's responses to older contents of these questions; their number."""
        self.refresh()
        index = self._index.get(source, {})
        hashes = self.content_hashes([q for q in questions if q.id in index])
        stale = [id for id, content in hashes.items() if index[id][0] != content]
        return self.discard(source, stale) if stale else 0

    # Verdicts

    def record_verdicts(self, verdicts: Mapping[tuple[str, str, int], float]) -> None:
        """Keep verdicts by (question id, source, index), durably; a later verdict replaces an earlier one."""
        rows = [{"question_id": q, "source": s, "index": i, "verdict": float(v)} for (q, s, i), v in verdicts.items()]
        if rows:
            with self._lock():
                append_jsonl(self.verdict_path, *rows)

    def merge_verdicts(self) -> None:
        """Write recorded verdicts into the shards' verdict column, for readers of the Parquet files alone."""
        self._fold()
        with self._lock():
            rest = self._pending_verdicts()
            if not rest:
                return
            for path in files.list_files(self.shard_folder, ".parquet"):
                table = files.read_shard(path)
                keys = zip(*(table[c].to_pylist() for c in ("question_id", "source", "index")), strict=True)
                new = [rest.pop(key, None) for key in keys]
                if any(v is not None for v in new):
                    column = pc.coalesce(pa.array(new, pa.float32()), table["verdict"].combine_chunks())
                    files.write_table(
                        path, table.set_column(table.schema.get_field_index("verdict"), "verdict", column)
                    )
            # Verdicts of responses that still lie in a living writer's journal wait here for the next merge.
            rows = [{"question_id": q, "source": s, "index": i, "verdict": v} for (q, s, i), v in rest.items()]
            write_jsonl(self.verdict_path, rows)

    def _pending_verdicts(self) -> dict[tuple[str, str, int], float]:
        rows = read_jsonl(self.verdict_path)
        return {(r["question_id"], r["source"], r["index"]): r["verdict"] for r in rows if "verdict" in r}

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
        """Responses of these sources (None: all) to these questions, in memory.

        num_responses: exactly this many of each (the first by index); None takes what is there, at least one.
        check_hashes: compare the questions, their images included, with those that were answered.
        with_token_ids: load sampler ids too. Raises CacheError for damaged shards, stale questions, unknown sources and
        too few responses.
        """
        ids = [q.id for q in questions]
        if len(set(ids)) != len(ids):
            double = next(id for i, id in enumerate(ids) if id in ids[:i])
            raise DataError(f"two questions have the id {double!r}; ids must be unique")
        known = self.sources
        sources = known if sources is None else list(sources)
        unknown = [s for s in sources if s not in known]
        if unknown:
            raise CacheError(
                f"{self.folder}: no responses of {', '.join(unknown)}; it holds {', '.join(known) or 'none yet'}. "
                "Run `ril collect RECIPE`, or correct the names"
            )
        lock = self._lock()
        try:
            lock.acquire(shared=True)
        except OSError as e:
            if e.errno not in files.READ_ONLY:  # where we cannot lock, we could not be disturbed by our own kind either
                raise
        try:
            table = self._read(ids, sources, num_responses, with_token_ids)
            verdicts = self._pending_verdicts()
        finally:
            lock.release()
        loaded = LoadedResponses(table, ids, sources)
        for key, value in verdicts.items():
            loaded.set_verdict(*key, value)
        if check_hashes:
            present = loaded.counts().sum(axis=1) > 0
            hashes = dict.fromkeys(ids, "") | self.content_hashes(
                [q for q, p in zip(questions, present, strict=True) if p]
            )
            stale = loaded.stale(hashes)
            if stale:
                by_id = {q.id: q for q in questions}
                raise self._stale_error([(by_id[id], source) for id, source in stale])
        self._check_counts(loaded, num_responses or 1)
        return loaded

    def _read(self, ids: list[str], sources: list[str], num_responses: int | None, with_token_ids: bool) -> pa.Table:
        columns = ["question_id", "source", "index", "text", "finish_reason", "question_hash", "verdict"]
        columns += ["token_ids"] if with_token_ids else []
        tables: dict[str, pa.Table] = {}
        # Journals before shards, as in refresh; a shard replaces the journal of its name.
        for path in files.list_files(self.journal_folder, ".jsonl"):
            try:
                lines, _ = files.read_journal(path)
            except FileNotFoundError:
                continue
            if lines:
                tables[path.stem] = files.rows_to_table(lines[0], lines[1:]).select(columns)
        paths = files.list_files(self.shard_folder, ".parquet")
        with ThreadPoolExecutor(8) as pool:
            tables.update(
                zip((p.stem for p in paths), pool.map(lambda p: files.read_shard(p, columns), paths), strict=True)
            )
        value_set = pa.array(ids, pa.string())
        kept = []
        for name in sorted(tables):
            table = tables.pop(name)
            keep = pc.and_(
                pc.is_in(table["question_id"], value_set=value_set), pc.is_in(table["source"], pa.array(sources))
            )
            if num_responses is not None:
                keep = pc.and_(keep, pc.less(table["index"], num_responses))
            kept.append(table if pc.all(keep).as_py() else table.filter(keep))
        empty = files.SCHEMA.empty_table().select(columns)
        return pa.concat_tables([empty, *kept])

    def _check_counts(self, loaded: LoadedResponses, wanted: int) -> None:
        counts = loaded.counts()
        short = counts < wanted
        if not short.any():
            return
        parts = []
        for s, source in enumerate(loaded.sources):
            if short[:, s].any():
                example = loaded.question_ids[int(np.argmax(short[:, s]))]
                parts.append(
                    f"{source}: {int(short[:, s].sum())} of {len(counts)} questions have fewer than {wanted} "
                    f"({int(np.minimum(counts[:, s], wanted).sum())} of {len(counts) * wanted} responses are there; "
                    f"for instance question {example!r} has {loaded.count(example, source)})"
                )
        raise CacheError(
            f"{self.folder}: too few responses. {'; '.join(parts)}. Run `ril collect RECIPE` to collect the rest"
        )

    def responses_for(self, question: Question, source: str) -> list[Response]:
        """A source's responses to one question. Reads the folder: for many questions use ``load``."""
        return self.load([question], [source]).responses_for(question.id, source)
