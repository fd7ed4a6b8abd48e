"""Read questions from files, `datasets` folders and the hub. Every bad row is reported with its place and its cause."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import logging
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openril.data.columns import look_up
from openril.data.formats import to_question
from openril.errors import DataError
from openril.recipe.schema import DataConfig
from openril.records import Question

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")
_SHOWN = 8


@dataclass(frozen=True)
class RowProblem:
    """A problem with one row. A row with an error cannot be used; one with a warning can.

    kind: short name, for counting. origin: "file:line", or "file:row" in Parquet files and folders; both start at 1.
    """

    kind: str
    origin: str
    id: str
    cause: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.origin}{f' ({self.id})' if self.id else ''}: {self.cause}."


def read_questions(
    data: DataConfig,
    which: Literal["train", "validation"] = "train",
    problems: list[RowProblem] | None = None,
    used: Counter[str] | None = None,
) -> list[Question]:
    """Return all questions of ``data.train`` or ``data.validation`` in order, with unique ids.

    Args:
        problems: If given, bad rows are appended to it and left out. Otherwise any bad row is an error.
        used: Receives what the columns were read as ("options as choices"), with the number of rows.

    Raises:
        DataError: With file, line and cause of the first bad rows, or for a file that cannot be read at all.
    """
    found: list[RowProblem] = []
    questions: list[Question] = []
    first: dict[str, str] = {}
    limit = data.limit if which == "train" else 0
    split = data.split if which == "train" else data.validation_split
    names = data.train if which == "train" else data.validation
    if not names:
        raise DataError(f"data.{which}: expected question files, datasets folders or hub names, got an empty list.")
    own_ids = data.columns.get("id") != ""
    for question in (question for name in names for question in _questions(name, data.columns, split, found, used)):
        if question.id in first:
            cause = (
                f"id {question.id!r} is already used at {first[question.id]}; ids must be unique over all files. To derive"
                ' ids from the content of the rows instead, set data.columns: {id: ""}'
            )
            if question.id.startswith("auto-"):
                same = f"same question, answer and images as {first[question.id]}"
                cause = f"{same}; remove one, or give both an id" if own_ids else f"{same}, so it is used once"
            level: Literal["error", "warning"] = "error" if own_ids else "warning"
            found.append(
                RowProblem("duplicate id" if own_ids else "repeated row", question.origin, question.id, cause, level)
            )
            continue
        first[question.id] = question.origin
        questions.append(question)
        if limit and len(questions) >= limit:
            break
    _report(found, problems)
    if not questions and problems is None:
        raise DataError(f"data.{which}: no questions in {', '.join(names)}.")
    return questions


def read_file(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    problems: list[RowProblem] | None = None,
) -> list[Question]:
    """Return the questions of one file, folder or hub name; ids may repeat. See ``read_questions`` for ``problems``."""
    found: list[RowProblem] = []
    questions = list(_questions(str(path), columns or {}, split, found))
    _report(found, problems)
    return questions


def _report(found: list[RowProblem], problems: list[RowProblem] | None) -> None:
    if problems is not None:
        problems += found
    elif found:
        errors = [p for p in found if p.level == "error"]
        shown = "\n".join(str(p) for p in (errors or found)[:_SHOWN])
        more = len(errors or found) - _SHOWN
        shown += f"\n... and {more} more; `ril check` lists them all" if more > 0 else ""
        if errors:
            raise DataError(shown)
        logging.getLogger(__name__).warning(shown)


def _questions(
    name: str, columns: Mapping[str, str], split: str, found: list[RowProblem], used: Counter[str] | None = None
) -> Iterator[Question]:
    for source in expand(name):
        missing, rows = {ours: theirs for ours, theirs in columns.items() if theirs}, 0
        for origin, row, folder in _rows(source, split, found):
            rows += 1
            if isinstance(row, Mapping):
                missing = {f: name for f, name in missing.items() if name not in row and look_up(row, name) is None}
            try:
                question = to_question(row, columns=columns, folder=folder, origin=origin, used=used)
            except DataError as e:
                identity = row.get(columns.get("id", "id")) if isinstance(row, Mapping) else None
                found.append(RowProblem(_kind_of(str(e)), origin, str(identity or ""), str(e)))
                continue
            yield question
        if rows and missing:
            pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in missing.items())
            cause = f'data.columns: no row has these columns: {pairs}; correct the names ("" reads none)'
            found.append(RowProblem("unknown column", source, "", cause))


def _kind_of(cause: str) -> str:
    kinds = {"question: expected text, got nothing": "empty question", " marker per image": "image markers"}
    return next((kind for words, kind in kinds.items() if words in cause), "unusable row")


def expand(name: str) -> list[str]:
    """Return the files that match a pattern such as ``shards/*.parquet``, sorted. Other names are returned unchanged."""
    if not any(c in name for c in "*?[") or Path(name).expanduser().exists():
        return [name]
    paths = sorted(glob.glob(str(Path(name).expanduser()), recursive=True))
    if not paths:
        raise DataError(f"{name}: no file matches this pattern.")
    return paths


Row = tuple[str, Any, Path]
"""Origin, content, and the folder at which relative image paths start."""


def _rows(name: str, split: str, found: list[RowProblem]) -> Iterator[Row]:
    path = Path(name).expanduser()
    if path.is_dir():
        yield from _folder_rows(name, path, split)
    elif path.is_file():
        kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
        if path.suffix == ".parquet":
            yield from _parquet_rows(name, path)
        elif kind in ("jsonl", "json", "csv", "tsv") and path.name.endswith(SUFFIXES):
            read = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _table_rows, "tsv": _table_rows}[kind]
            try:
                yield from read(name, path, found)
            except (OSError, EOFError, zlib.error) as e:
                raise DataError(f"{name}: cannot be read ({e}).") from e
        else:
            raise DataError(f"{name}: expected a file with suffix {', '.join(SUFFIXES)}, got {path.suffix or 'none'}.")
    elif name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DataError(
            f"{name}: no such file or folder ({path.resolve()}). Relative paths start at the current directory."
        )
    else:
        yield from _hub_rows(name, split)


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _jsonl_rows(name: str, path: Path, found: list[RowProblem]) -> Iterator[Row]:
    folder = path.resolve().parent
    first = True
    with _open(path) as f:
        for number, line in enumerate(f, start=1):
            origin = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                cause = (
                    f"expected UTF-8, got another byte at position {e.start + 1} of the line; save the file as UTF-8"
                )
                found.append(RowProblem("unreadable line", origin, "", cause))
                continue
            if not text.strip():
                continue
            try:
                yield origin, json.loads(text), folder
            except (ValueError, RecursionError) as e:
                if first and _is_cut(e, text):  # the first line is not whole, so the objects may take several lines
                    here = f.tell()
                    whole = text + f.read().decode("utf-8", "replace")
                    if _begins_with_json(whole):
                        yield from _objects(name, whole, number, folder, found)
                        return
                    f.seek(here)
                if getattr(e, "msg", "") == "Extra data":
                    yield from _objects(name, text, number, folder, found)
                else:
                    found.append(RowProblem("unreadable line", origin, "", f"not valid JSON: {e}"))
            first = False


def _is_cut(error: Exception, text: str) -> bool:
    """Return whether JSON ends before its value does."""
    return isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())


def _begins_with_json(text: str) -> bool:
    with suppress(ValueError, RecursionError):
        json.JSONDecoder().raw_decode(text, _WORD.search(text).start())  # type: ignore[union-attr]
        return True
    return False


def _objects(name: str, text: str, line: int, folder: Path, found: list[RowProblem]) -> Iterator[Row]:
    """Yield JSON values that follow each other, on one line or over several. A list yields its items.

    Args:
        line: The number of the first line of ``text``.
    """
    decoder, end = json.JSONDecoder(), 0
    while word := _WORD.search(text, end):
        line += text.count("\n", end, word.start())
        try:
            value, end = decoder.raw_decode(text, word.start())
        except (ValueError, RecursionError) as e:
            at = line + text.count("\n", word.start(), getattr(e, "pos", word.start()))
            cause = (
                f"expected JSON objects one after another, got one that is not valid JSON at line {at} "
                f"({getattr(e, 'msg', e)}), so the rest of the file is not read. Write one object a line, or a list"
            )
            found.append(RowProblem("unreadable line", f"{name}:{line}", "", cause))
            return
        for row in value if isinstance(value, list) else [value]:
            yield f"{name}:{line}", row, folder
        line += text.count("\n", word.start(), end)


_WORD = re.compile(r"[^\s,]")


def _json_rows(name: str, path: Path, found: list[RowProblem]) -> Iterator[Row]:
    folder = path.resolve().parent
    try:
        with _open(path) as f:
            text = f.read().decode("utf-8-sig")
        rows = json.loads(text)
    except UnicodeDecodeError as e:
        raise DataError(
            f"{name}: expected UTF-8, got another byte at position {e.start + 1}. Save the file as UTF-8."
        ) from e
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":  # JSON lines under the wrong suffix, or objects over several lines
            yield from _jsonl_rows(name, path, found)
            return
        raise DataError(f"{name}:{e.lineno}: not valid JSON: {e.msg}.") from e
    except RecursionError as e:
        raise DataError(f"{name}: too deeply nested JSON.") from e
    if isinstance(rows, dict) and any(k in rows for k in ("question", "prompt", "messages", "conversations")):
        rows = [rows]
    elif isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"id": key, **row} for key, row in rows.items()]  # rows by their ids
    if not isinstance(rows, list):
        got = type(rows).__name__ + (f" with {', '.join(list(rows)[:8])}" if isinstance(rows, dict) else "")
        raise DataError(f"{name}: expected a list of rows, got {got}. Write the list alone.")
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row, folder


def _table_rows(name: str, path: Path, found: list[RowProblem]) -> Iterator[Row]:
    """Yield the rows of a table with a header. Empty cells are missing; every other cell is text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell may hold an image in base64
    with _open(path) as f:
        try:
            lines = (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(f))
            table = csv.DictReader(lines, delimiter="\t" if ".tsv" in path.suffixes else ",")
            for row in table:
                origin = f"{name}:{table.line_num}"
                if None in row or None in row.values():
                    cause = f"expected {len(table.fieldnames or [])} cells as in the header, got another number"
                    found.append(RowProblem("unreadable line", origin, "", cause))
                    continue
                yield origin, {column: cell for column, cell in row.items() if cell != ""}, path.resolve().parent
        except (csv.Error, UnicodeDecodeError) as e:
            raise DataError(f"{name}: not a table in UTF-8 ({e}).") from e


def _parquet_rows(name: str, path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in _python_rows(batch):
                    number += 1
                    yield f"{name}:{number}", row, path.resolve().parent
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{name}: damaged, or not a Parquet file, after row {number} ({e}).") from e


def _python_rows(table: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table, with floats as the shortest numbers that they stand for in their own type.

    A float of 32 bits becomes 0.1 and not 0.10000000149011612, and 3.0 becomes 3: a column of whole numbers with a gap is
    written as floats.
    """
    import pyarrow as pa

    def shorten(value: Any, kind: Any) -> Any:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return value and [shorten(v, kind.value_type) for v in value]
        if isinstance(value, float) and math.isfinite(value):
            value = float(str(kind.to_pandas_dtype()(value)))
            return int(value) if value.is_integer() and abs(value) < 2**53 else value
        return value

    kinds = {f.name: f.type for f in table.schema}
    floats = [name for name, kind in kinds.items() if pa.types.is_floating(getattr(kind, "value_type", kind))]
    for row in table.to_pylist():
        yield row | {name: shorten(row[name], kinds[name]) for name in floats}


def _folder_rows(name: str, path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except Exception as e:  # errors of datasets, pyarrow and the dataset builders
        raise DataError(f"{name}: expected a datasets folder or a folder of data files ({_first_line(e)}).") from e
    yield from _dataset_rows(name, _choose_split(name, loaded, split), path.resolve())


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as e:  # connection, authentication, unknown name, unknown configuration
        raise DataError(
            f"{name}: no such file or folder, and it cannot be loaded as a hub data set ({_first_line(e)}). "
            "Correct the path (it starts at the current directory), or check the connection to the hub."
        ) from e
    yield from _dataset_rows(name, _choose_split(name, loaded, split), Path.cwd())


def _choose_split(name: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        splits = ", ".join(map(str, loaded))
        raise DataError(
            f"{name}: expected one of the splits {splits}, got {split!r}. Set data.split or data.validation_split."
        )
    return loaded[split]


def _dataset_rows(name: str, dataset: Any, folder: Path) -> Iterator[Row]:
    labels = {n: f for n, f in dataset.features.items() if hasattr(f, "int2str")}
    number = 0
    # In Arrow format image columns stay {"bytes", "path"} and are not decoded.
    for table in dataset.with_format("arrow").iter(batch_size=64):
        for row in _python_rows(table):
            number += 1
            for column, feature in labels.items():
                if isinstance(row.get(column), int) and row[column] >= 0:
                    row[column] = feature.int2str(row[column])
            yield f"{name}:{number}", row, folder


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
