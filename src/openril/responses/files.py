"""The files of a response cache: Parquet shards, the journals they are made from, and advisory locks.

Each writer appends its responses to its own journal, one JSON line each, and holds an OS lock on it. A full journal is
written as a shard of the same name and then removed. A journal whose lock is free was left by a dead writer and becomes
a shard in the same way. A kill between the two steps leaves both files; the shard is complete, so it is the one used.
"""

from __future__ import annotations

import errno
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openril.errors import CacheError
from openril.storage import atomic_path, lock_file, stable_hash

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
        ("token_ids", pa.list_(pa.int32())),
        ("created", pa.timestamp("us", tz="UTC")),
    ]
)
"""One row is one response. sampling: JSON of the settings it was sampled with. token_ids: the sampler's own ids, null
for responses that came as text. Shards of earlier versions have a further column, ``verdict``, which is not read."""

SHARDS, JOURNALS = "shards", "journals"
"""Names of the folders in a cache."""

HEADER = ("source", "model", "revision", "sampling")
"""Columns that are constant within a journal. Its first line holds them."""

ROW_GROUP = 256
"""Rows of a shard that are read together when a few of them are needed."""

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of a folder that may be read but not written."""


def file_stem(source: str) -> str:
    """Return a source's name as part of a file name. A hash keeps names with special characters distinct."""
    safe = re.sub(r"[^A-Za-z0-9_.]+", "_", source).strip(".")
    return safe if safe == source else f"{safe}_{stable_hash(source) % 16**8:08x}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


# Journals


class Journal:
    """The open journal of a live writer."""

    def __init__(self, folder: Path, source: str, header: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            self.path = folder / f"{file_stem(source)}-{stamp}-{os.urandom(3).hex()}.jsonl"
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            lock_file(self._file, self.path, wait=True)
            if os.fstat(self._file).st_nlink:  # otherwise a process mistook it for a dead writer's
                break
            os.close(self._file)
        self.header = header
        self.rows: list[dict[str, Any]] = []
        self._write(header)

    def _write(self, row: dict[str, Any]) -> None:
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if os.write(self._file, data) != len(data):
            raise OSError(errno.ENOSPC, "a response was only partly written", str(self.path))

    def append(self, row: dict[str, Any]) -> None:
        """Write a row. Once this returns, the row survives a kill of this process."""
        self._write(row)
        self.rows.append(row)

    def sync(self) -> None:
        """Flush everything to the disk. Once this returns, the rows survive a power failure."""
        os.fsync(self._file)

    def close(self, shards: Path) -> None:
        """Turn the journal into a shard."""
        try:
            if self.rows:
                write_table(shard_of(self.path, shards), rows_to_table(self.header, self.rows))
            self.path.unlink()
        finally:
            os.close(self._file)


def shard_of(journal: Path, shards: Path) -> Path:
    return shards / f"{journal.stem}.parquet"


def read_journal(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines from ``offset`` on, and the offset at which they end. A torn last line is ignored.

    Raises FileNotFoundError if the journal has become a shard, and CacheError for damage in any other line.
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
            raise CacheError(f"{path}: expected JSON, got {line[:60]!r}. Delete the line and run `ril collect`.")
        rows.append(row)
    return rows, offset + end


def fold_journal(path: Path, shards: Path) -> bool:
    """Turn a dead writer's journal into a shard. Return False if its writer is alive or another process did it."""
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
            write_table(shard, rows_to_table(lines[0], lines[1:]))
        path.unlink()
        return True
    finally:
        os.close(file)


# Shards


def rows_to_table(header: dict[str, Any], rows: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [header[name]] * len(rows) for name in HEADER}
    for name in ("question_id", "index", "text", "finish_reason", "question_hash", "token_ids"):
        columns[name] = [row.get(name) for row in rows]
    columns["created"] = [datetime.fromisoformat(row["created"]) for row in rows]
    return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a shard atomically and durably, with page checksums."""
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=[f.name for f in SCHEMA if pa.types.is_string(f.type) and f.name != "text"],
            write_statistics=["question_id", "source", "index"],
            write_page_checksum=True,
            row_group_size=ROW_GROUP,
        )
        file = os.open(temporary, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a shard. Raises CacheError, which names the file, if it is damaged or not a shard."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            missing = set(SCHEMA.names) - set(file.schema_arrow.names)
            if missing:
                raise CacheError(f"{path}: expected a response shard, it lacks {', '.join(sorted(missing))}. Move it.")
            return file.read(columns=columns, use_threads=False)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as e:
        reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise CacheError(f"{path}: damaged shard ({reason}). Delete the file and run `ril collect` again.") from e


def has_old_verdicts(folder: Path) -> bool:
    """Return whether an earlier version kept verdicts in this cache: in ``verdicts.jsonl`` or in a column of its shards."""

    def has_some(path: Path) -> bool:
        with pq.ParquetFile(path) as file:
            columns = file.read(["verdict"] if "verdict" in file.schema_arrow.names else []).columns
        return any(column.null_count < len(column) for column in columns)

    return (folder / "verdicts.jsonl").exists() or any(map(has_some, list_files(folder / SHARDS, ".parquet")))


def list_files(folder: Path, suffix: str) -> list[Path]:
    """List the finished files of a folder by name. Temporary ones start with a dot and are left out."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [folder / name for name in names if name.endswith(suffix) and not name.startswith(".")]
