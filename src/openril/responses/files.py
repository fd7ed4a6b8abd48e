"""The files a response cache is made of: Parquet shards, the journals they grow from, and advisory locks.

A writer appends every response to a journal of its own (one JSON line each) and holds an OS lock on it. A full journal
becomes a shard of the same name and is removed; a journal whose lock is free belongs to a dead writer and becomes a
shard the same way. A kill between the two leaves both, and the shard, being complete, wins.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openril.errors import CacheError
from openril.storage import atomic_path, stable_hash

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("source", pa.string()),
        ("index", pa.int32()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("sampling", pa.string()),
        ("question_hash", pa.string()),
        ("verdict", pa.float32()),
        ("token_ids", pa.list_(pa.int32())),
        ("created", pa.timestamp("us", tz="UTC")),
    ]
)
"""One row is one response. sampling: JSON of the settings it was drawn with. verdict: null until judged. token_ids:
the sampler's own ids, null for responses that came as text."""

HEADER = ("source", "model", "revision", "sampling")
"""Columns that are the same for a whole journal; its first line holds them."""


READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What a folder says that may be read but not written."""


class Lock:
    """An advisory lock on a file, free again when its holder dies. Not re-entrant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, *, wait: bool = True, shared: bool = False) -> bool:
        """Whether the lock is now held; always true with ``wait``."""
        assert self._file is None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not lock_file(file, self.path, wait=wait, shared=shared):
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_file(file: int, path: Path, *, wait: bool, shared: bool = False) -> bool:
    """Lock an open file; false when another holds it and ``wait`` is off. Raises CacheError where locks do not work."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise CacheError(
                f"{path}: this file system has no file locks ({e.strerror}), so collectors could overwrite each other; "
                "put cache_dir on a local disk or mount it with locking"
            ) from e
        raise
    return True


def file_stem(source: str) -> str:
    """A source's name as part of a file name; names with other characters stay apart by a hash."""
    safe = re.sub(r"[^A-Za-z0-9_.]+", "_", source).strip(".")
    return safe if safe == source else f"{safe}_{stable_hash(source) % 16**8:08x}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


# Journals


class Journal:
    """The open journal of a living writer."""

    def __init__(self, folder: Path, source: str, header: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            self.path = folder / f"{file_stem(source)}-{stamp}-{os.urandom(3).hex()}.jsonl"
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            lock_file(self._file, self.path, wait=True)
            if os.fstat(self._file).st_nlink:  # else someone took the still unlocked, empty file for a dead writer's
                break
            os.close(self._file)
        self.header = header
        self.rows: list[dict[str, Any]] = []
        self._write(header)

    def _write(self, row: dict[str, Any]) -> None:
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if os.write(self._file, data) != len(data):
            raise OSError(errno.ENOSPC, "a response could not be written whole", str(self.path))

    def append(self, row: dict[str, Any]) -> None:
        """Hand the row to the operating system: from here it outlives this process."""
        self._write(row)
        self.rows.append(row)

    def sync(self) -> None:
        """Force everything to the disk: from here it outlives the machine."""
        os.fsync(self._file)

    def close(self, shards: Path) -> None:
        """Turn the journal into a shard."""
        try:
            if self.rows:
                write_shard(shard_of(self.path, shards), self.header, self.rows)
            self.path.unlink()
        finally:
            os.close(self._file)


def shard_of(journal: Path, shards: Path) -> Path:
    return shards / f"{journal.stem}.parquet"


def read_journal(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from ``offset`` on, and where they end; a torn last line is passed over.

    Raises FileNotFoundError when the journal has become a shard, CacheError for damage anywhere else.
    """
    with open(path, "rb") as f:
        f.seek(offset)
        data = f.read()
    end = data.rfind(b"\n") + 1
    rows = []
    for line in data[:end].split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise CacheError(
                f"{path}: holds a damaged line ({line[:60]!r}); delete the line or the file and run `ril collect` again"
            )
        rows.append(row)
    return rows, offset + end


def fold_journal(path: Path, shards: Path) -> bool:
    """Turn a dead writer's journal into a shard; false when its writer is alive (or another process was faster)."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not lock_file(file, path, wait=False) or not os.fstat(file).st_nlink:
            return False
        shard = shard_of(path, shards)
        lines, _ = read_journal(path)
        if len(lines) > 1 and not shard.exists():
            write_shard(shard, lines[0], lines[1:])
        path.unlink()
        return True
    finally:
        os.close(file)


# Shards


def rows_to_table(header: dict[str, Any], rows: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [header[name]] * len(rows) for name in HEADER}
    for name in ("question_id", "index", "text", "finish_reason", "question_hash", "token_ids"):
        columns[name] = [row.get(name) for row in rows]
    columns["verdict"] = [None] * len(rows)
    columns["created"] = [datetime.fromisoformat(row["created"]) for row in rows]
    return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)


def write_shard(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write_table(path, rows_to_table(header, rows))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a shard atomically and durably, with checksums."""
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=[
                name for name in SCHEMA.names if pa.types.is_string(SCHEMA.field(name).type) and name != "text"
            ],
            write_statistics=["question_id", "source", "index"],
            write_page_checksum=True,
        )
        file = os.open(temporary, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A shard's table. Raises CacheError naming the file when it is damaged or not a shard."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            missing = set(SCHEMA.names) - set(file.schema_arrow.names)
            if missing:
                raise CacheError(
                    f"{path}: not a response shard, it lacks {', '.join(sorted(missing))}; move it elsewhere"
                )
            return file.read(columns=columns, use_threads=False)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as e:
        reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise CacheError(
            f"{path}: damaged shard ({reason}); delete the file and run `ril collect` again, "
            "which collects its responses anew"
        ) from e


def list_files(folder: Path, suffix: str) -> list[Path]:
    """Finished files of a folder in name order; temporary ones (leading dot) left out."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [folder / name for name in names if name.endswith(suffix) and not name.startswith(".")]
