"""An index over the groups of run folders in a DuckDB file, which is kept up to date while the runs train.

The index holds what filters and orders need and where each group lies in its file; groups are read from there. Texts are kept
without compression, because a search reads all of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from openril.errors import OpenRILError
from openril.records import STUDENT
from openril.report.document import EarlierRows
from openril.report.rollouts import FLAGS, Row, build_group, build_groups, read_row, split_groups, step_files
from openril.report.run_files import read_recipe

VERSION = 2
"""The version of the index. An index of another version is built again."""
FILES_AT_ONCE = 16
MEMORY = "200MB"
SEPARATOR = "\x1e"
"""Between the searched texts of a group, so that no search finds the end of one and the beginning of the next."""
_BIT = {flag: 1 << i for i, flag in enumerate(FLAGS)}
_TABLES = """
create table if not exists about(value varchar);
create table if not exists files(run integer, step bigint, size bigint, time bigint, problem varchar);
create table if not exists groups(
  run integer, step bigint, position integer, question varchar, skill varchar, flags integer, sources varchar[],
  longest bigint, spread double, advantage double, first bigint, length bigint, search varchar);
"""
_TYPES = {
    "run": pa.int32(), "step": pa.int64(), "position": pa.int32(), "question": pa.string(), "skill": pa.string(),
    "flags": pa.int32(), "sources": pa.list_(pa.string()), "longest": pa.int64(), "spread": pa.float64(),
    "advantage": pa.float64(), "first": pa.int64(), "length": pa.int64(), "search": pa.string(),
}  # fmt: skip
ORDERS = {
    "step": "step, run, position",
    "-step": "step desc, run, position",
    "longest": "longest desc, step, run, position",
    "-spread": "spread desc, step, run, position",
    "advantage": "advantage desc, step, run, position",
}


@dataclass(frozen=True)
class Query:
    """Which groups, in which order. All conditions must hold; None and () are no condition.

    source: some member has this source. flags: the group has all of these. q: is part of the question, its id, a ground
    truth or a response; letters match whatever their case.
    """

    run: int | None = None
    step_min: int | None = None
    step_max: int | None = None
    skill: str | None = None
    source: str | None = None
    question: str | None = None
    flags: tuple[str, ...] = ()
    q: str = ""
    sort: str = "step"


Place = tuple[int, int, int, int, int, int]
"""Where a group lies: run, step, position, flags, first byte, length in bytes."""
Key = tuple[int, int]
"""Run and step of a file."""
Stamp = tuple[int, int]
"""Size and time of change of a file."""


@dataclass
class Progress:
    """How far the index is. problems: what is wrong with files that cannot be read, by path."""

    indexed: int = 0
    steps: int = 0
    groups: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def indexing(self) -> bool:
        return self.indexed < self.steps


class RunIndex:
    """The index of one or several run folders.

    Args:
        run_dirs: The folders; a group's ``run`` is the place of its folder here.
        path: The file of the index. Where another viewer uses it, or it cannot be written, a temporary one is made.
    """

    def __init__(self, run_dirs: Sequence[Path], path: Path | None) -> None:
        self.run_dirs = list(run_dirs)
        self.progress = Progress()
        self.failure = ""
        """Why the index could not be kept up to date at the last attempt."""
        self.changes = 0
        """Rises whenever groups are added or removed."""
        self.pictures: dict[str, tuple[int, str]] = {}
        """The run and the file of each picture of the groups that have been asked for, by its hash."""
        self._earlier: dict[int, EarlierRows] = {}
        self._temporary: Path | None = None
        self._database = self._open(path)
        self._writing = threading.Lock()
        self._found: dict[tuple[Query, int], list[Place]] = {}
        rows = self._database.execute("select run, step, size, time, problem from files").fetchall()
        self._known: dict[Key, Stamp] = {(run, step): (size, time) for run, step, size, time, _ in rows}
        self._problems: dict[Key, str] = {(run, step): problem for run, step, _, _, problem in rows if problem}

    def _open(self, path: Path | None) -> duckdb.DuckDBPyConnection:
        for _ in range(2 if path is not None else 0):
            assert path is not None
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return self._connect(path)
            except (duckdb.Error, OSError) as e:
                if "lock" in str(e).lower():  # another viewer's
                    break
                with contextlib.suppress(OSError):  # damaged, or of another version
                    path.unlink(missing_ok=True)
                    Path(f"{path}.wal").unlink(missing_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix="ril-view-"))
        return self._connect(self._temporary / "index.duckdb")

    def _connect(self, path: Path) -> duckdb.DuckDBPyConnection:
        config: dict[str, Any] = {"memory_limit": MEMORY, "threads": 2, "temp_directory": f"{path}.tmp"}
        database = duckdb.connect(config=config | {"autoinstall_known_extensions": False})
        quoted = str(path).replace("'", "''")
        # Row groups are the units of parallel work; the default of 122,880 rows would leave it to one thread.
        database.execute(f"attach '{quoted}' as i (row_group_size 4096); use i; set force_compression = 'uncompressed'")
        database.execute(_TABLES)
        about = str([VERSION, *map(str, self.run_dirs)])
        if database.execute("select value from about where value != ?", [about]).fetchone():
            database.close()
            raise OSError("an index of another version")
        database.execute("insert into about select ? where not exists (from about)", [about])
        return database

    def close(self) -> None:
        with self._writing:
            self._database.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    # ---- keeping up to date ----------------------------------------------------------------------------------------

    def refresh(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Index the files that are new or have changed, and forget those that are gone."""
        with self._writing:
            files = [(run, *f) for run, folder in enumerate(self.run_dirs) for f in step_files(folder)]
            paths = {(run, step): path for run, step, path in files}
            stamps: dict[Key, Stamp] = {}
            for key, path in paths.items():
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    stamps[key] = (about.st_size, about.st_mtime_ns)
            gone = [key for key in self._known if key not in stamps]
            todo = sorted((key for key in stamps if self._known.get(key) != stamps[key]), key=lambda k: (k[1], k[0]))
            if gone:
                self._write(gone, [], {}, {})
            for i in range(0, len(todo), FILES_AT_ONCE):
                self._report(len(stamps), len(todo) - i)
                if stop():
                    return
                part = todo[i : i + FILES_AT_ONCE]
                groups, problems = [], {}
                for key in part:
                    try:
                        groups += list(self._read(*key, paths[key]))
                    except (OpenRILError, OSError) as e:
                        problems[key] = str(e)
                self._write(part, groups, {key: stamps[key] for key in part}, problems)
            self._report(len(stamps), 0)

    def _report(self, steps: int, left: int) -> None:
        count = self._database.cursor().execute("select count(*) from i.groups").fetchone()
        problems = {f"{self.run_dirs[run]}, step {step}": text for (run, step), text in self._problems.items()}
        self.progress = Progress(steps - left, steps, count[0] if count else 0, problems)

    def _read(self, run: int, step: int, path: Path) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of the table of groups for a step's file."""
        lines = list(io.BytesIO(path.read_bytes()))
        rows = [self._row(run, line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
        groups = build_groups(rows, run)
        first = number = 0
        for position, group in enumerate(groups):
            length = sum(map(len, lines[number : number + len(group["members"])]))
            number += len(group["members"])
            yield (run, step, position, *columns(group), first, length, searched(group))
            first += length

    def _row(self, run: int, line: bytes, where: str, *, hashes: bool = False) -> Row:
        row = read_row(line, where)
        if row["schema"] == 1:
            if run not in self._earlier:
                self._earlier[run] = EarlierRows(read_recipe(self.run_dirs[run]))
            self._earlier[run].complete(row, hashes)
        return row

    def _write(
        self, keys: Sequence[Key], groups: Sequence[tuple[Any, ...]], stamps: dict[Key, Stamp], problems: dict[Key, str]
    ) -> None:
        """Replace what is known of some files in one transaction."""
        cursor = self._database.cursor()
        cursor.execute("use i; begin")
        try:
            if known := [key for key in keys if key in self._known]:
                cursor.executemany("delete from groups where run = ? and step = ?", known)
                cursor.executemany("delete from files where run = ? and step = ?", known)
            if groups:
                columns = [pa.array(c, t) for c, t in zip(zip(*groups, strict=True), _TYPES.values(), strict=True)]
                cursor.register("arrived", pa.table(columns, names=list(_TYPES)))
                cursor.execute("insert into groups select * from arrived")
            if stamps:
                rows = [(*key, *stamp, problems.get(key)) for key, stamp in stamps.items()]
                cursor.executemany("insert into files values (?, ?, ?, ?, ?)", rows)
            cursor.execute("commit")
        finally:
            cursor.close()  # which undoes what is not committed
        self._known = {key: stamp for key, stamp in self._known.items() if key not in keys} | stamps
        self._problems = {key: text for key, text in self._problems.items() if key not in keys} | problems
        self.changes += 1

    def stamps(self) -> list[tuple[Key, Stamp]]:
        """Return the files that are indexed."""
        return sorted(self._known.items())

    # ---- answering --------------------------------------------------------------------------------------------------

    def find(self, query: Query) -> list[Place]:
        """Return the places of all groups of a query, in its order. The last answers are kept."""
        key = (query, self.changes)
        found = self._found.get(key)
        if found is None:
            condition, values = where(query)
            text = f"select run, step, position, flags, first, length from i.groups {condition} order by "
            found = self._database.cursor().execute(text + ORDERS[query.sort], values).fetchall()
            self._found = dict([*self._found.items(), (key, found)][-8:])
        return found

    def groups(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        """Return the groups at some places, read from the rollouts. Those whose file has changed are left out."""
        out = []
        for run, step, position, flags, first, length in places:
            path = self.run_dirs[run] / "rollouts" / f"step_{step:06d}.jsonl"
            with contextlib.suppress(OpenRILError, OSError, StopIteration), open(path, "rb") as file:
                about = os.fstat(file.fileno())
                if self._known.get((run, step)) != (about.st_size, about.st_mtime_ns):
                    continue
                file.seek(first)
                rows = [self._row(run, line, str(path), hashes=True) for line in io.BytesIO(file.read(length))]
                group = build_group(next(split_groups(rows)), run, position)
                images = zip(group["images"], group["image_names"], strict=False)
                self.pictures |= {name: (run, original) for name, original in images}
                out.append(group | {"flags": [flag for flag in FLAGS if flags & _BIT[flag]]})
        return out

    def summary(self, run: int) -> dict[str, Any]:
        """Return the number of steps and groups of a run, its skills and its sources."""
        text = "select count(distinct step), count(*), list(distinct skill), list(distinct sources) from i.groups where run = ?"
        steps, groups, skills, sources = self._database.cursor().execute(text, [run]).fetchone() or (0, 0, None, None)
        names = sorted({name for some in sources or [] for name in some}, key=lambda name: (name != STUDENT, name))
        return {"steps": steps, "groups": groups, "skills": sorted(filter(None, skills or [])), "sources": names}


def columns(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return what filters and orders need of a group, in the order of the table."""
    rewards = [m["reward"] for m in group["members"] if m["reward"] is not None]
    return (
        group["question_id"],
        group["skill"],
        sum(_BIT[flag] for flag in group["flags"]),
        sorted({m["source"] for m in group["members"]}),
        group["longest"],
        max(rewards) - min(rewards) if rewards else 0.0,
        max((abs(m["advantage"]) for m in group["members"]), default=0.0),
    )


def searched(group: dict[str, Any]) -> str:
    """Return the text of a group that ``Query.q`` is looked for in."""
    texts = [group["question"], group["question_id"], *group["truths"], *(m["text"] for m in group["members"])]
    return SEPARATOR.join(folded(text) for text in texts)


def folded(text: str) -> str:
    return text.lower().replace(SEPARATOR, " ").replace("\0", " ")


def where(query: Query) -> tuple[str, list[Any]]:
    """Return a query's conditions in SQL, and their values."""
    bits = sum(_BIT[flag] for flag in query.flags)
    parts: list[tuple[str, Any]] = [
        ("run = ?", query.run),
        ("step >= ?", query.step_min),
        ("step <= ?", query.step_max),
        ("skill = ?", query.skill),
        ("list_contains(sources, ?)", query.source),
        ("question = ?", query.question),
        (f"(flags & {bits}) = ?", bits or None),
        ("contains(search, ?)", folded(query.q.strip()) or None),
    ]
    used = [(text, value) for text, value in parts if value is not None]
    return ("where " + " and ".join(text for text, _ in used) if used else ""), [value for _, value in used]
