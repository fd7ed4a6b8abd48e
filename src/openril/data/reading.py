"""Questions from files, datasets folders and the hub; every bad row is named with its place and its cause."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openril.data.formats import to_question
from openril.errors import DataError
from openril.recipe.schema import DataConfig
from openril.records import Question

SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN = 8


@dataclass(frozen=True)
class RowProblem:
    """What is wrong with one row. kind: a short name to count by. origin: "file:line" (row number in Parquet and
    folders, both from 1). level: "error" rows cannot be used, "warning" rows can."""

    kind: str
    origin: str
    id: str
    cause: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.origin}{f' ({self.id})' if self.id else ''}: {self.cause}"


def read_questions(
    data: DataConfig, which: Literal["train", "validation"] = "train", problems: list[RowProblem] | None = None
) -> list[Question]:
    """All questions of ``data.train`` or ``data.validation``, in order, ids unique (``data.limit`` cuts train).

    problems: when given, bad rows are added to it and left out; otherwise any bad row is an error.
    Raises DataError naming file, line and cause of the first few bad rows, or a file that cannot be read at all.
    """
    found: list[RowProblem] = []
    questions: list[Question] = []
    first: dict[str, str] = {}
    limit = data.limit if which == "train" else 0
    split = data.split if which == "train" else data.validation_split
    names = data.train if which == "train" else data.validation
    if not names:
        raise DataError(f"data.{which} is empty; list question files, datasets folders or hub names there")
    for name in names:
        for question in _questions(name, data.columns, split, found):
            if question.id in first:
                cause = (
                    f"id {question.id!r} was used before, at {first[question.id]}; ids must be unique over all files"
                )
                if question.id.startswith("auto-"):
                    cause = (
                        f"the same question, answer and images as {first[question.id]}; remove one, or give both an id"
                    )
                found.append(RowProblem("duplicate id", question.origin, question.id, cause))
                continue
            first[question.id] = question.origin
            questions.append(question)
            if limit and len(questions) >= limit:
                break
        if limit and len(questions) >= limit:
            break
    _settle(found, problems)
    if not questions and problems is None:
        raise DataError(f"data.{which}: no questions in {', '.join(names)}")
    return questions


def read_file(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    problems: list[RowProblem] | None = None,
) -> list[Question]:
    """Questions of one file, datasets folder or hub name; ids may repeat. Arguments and errors as in read_questions."""
    found: list[RowProblem] = []
    questions = list(_questions(str(path), columns or {}, split, found))
    _settle(found, problems)
    return questions


def _settle(found: list[RowProblem], problems: list[RowProblem] | None) -> None:
    if problems is not None:
        problems += found
    elif found:
        shown = "\n".join(str(p) for p in found[:_SHOWN])
        more = f"\n... and {len(found) - _SHOWN} more; `ril check` lists them all" if len(found) > _SHOWN else ""
        raise DataError(shown + more)


def _questions(name: str, columns: Mapping[str, str], split: str, found: list[RowProblem]) -> Iterator[Question]:
    for source in expand(name):
        missing, rows = dict(columns), 0
        for origin, row, folder in _rows(source, split, found):
            rows += 1
            if isinstance(row, Mapping):
                missing = {ours: theirs for ours, theirs in missing.items() if theirs not in row}
            try:
                question = to_question(row, columns=columns, folder=folder, origin=origin)
            except DataError as e:
                identity = row.get(columns.get("id", "id")) if isinstance(row, Mapping) else None
                found.append(RowProblem(_kind_of(str(e)), origin, str(identity or ""), str(e)))
                continue
            yield question
        if rows and missing:
            pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in missing.items())
            cause = f"data.columns names columns that no row has ({pairs}); correct the names"
            found.append(RowProblem("unknown column", source, "", cause))


def _kind_of(cause: str) -> str:
    if cause == "the question is empty":
        return "empty question"
    if "marker" in cause:
        return "image markers"
    return "unusable row"


def expand(name: str) -> list[str]:
    """The files a pattern such as ``shards/*.parquet`` stands for, sorted; any other name as it is."""
    if not any(c in name for c in "*?[") or Path(name).expanduser().exists():
        return [name]
    paths = sorted(glob.glob(str(Path(name).expanduser()), recursive=True))
    if not paths:
        raise DataError(f"{name}: no file fits this pattern")
    return paths


Row = tuple[str, Any, Path]
"""Origin, content, and the folder that relative image paths count from."""


def _rows(name: str, split: str, found: list[RowProblem]) -> Iterator[Row]:
    path = Path(name).expanduser()
    if path.is_dir():
        yield from _folder_rows(name, path, split)
    elif path.is_file():
        if path.suffix == ".jsonl":
            yield from _jsonl_rows(name, path, found)
        elif path.suffix == ".json":
            yield from _json_rows(name, path, found)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(name, path)
        else:
            raise DataError(
                f"{name}: {path.suffix or 'a file without a suffix'} is not supported; use {', '.join(SUFFIXES)}"
            )
    elif path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DataError(f"{name}: no such file or folder ({path.resolve()}); paths count from the current directory")
    else:
        yield from _hub_rows(name, split)


def _jsonl_rows(name: str, path: Path, found: list[RowProblem]) -> Iterator[Row]:
    folder = path.resolve().parent
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            origin = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                cause = f"not UTF-8 at byte {e.start + 1} of the line; save the file as UTF-8"
                found.append(RowProblem("unreadable line", origin, "", cause))
                continue
            if not text.strip():
                continue
            try:
                yield origin, json.loads(text), folder
            except (ValueError, RecursionError) as e:
                found.append(RowProblem("unreadable line", origin, "", f"not JSON: {e}"))


def _json_rows(name: str, path: Path, found: list[RowProblem]) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as e:
        raise DataError(f"{name}: not UTF-8 at byte {e.start + 1}; save the file as UTF-8") from e
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":  # one object a line under the wrong suffix
            yield from _jsonl_rows(name, path, found)
            return
        raise DataError(f"{name}:{e.lineno}: not JSON: {e.msg}") from e
    except RecursionError as e:
        raise DataError(f"{name}: nested too deeply to be read") from e
    if isinstance(rows, dict) and any(k in rows for k in ("question", "prompt", "messages", "conversations")):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"{name}: a list of rows is wanted at the top, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row, path.resolve().parent


def _parquet_rows(name: str, path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", row, path.resolve().parent
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{name}: damaged or no Parquet file after row {number} ({e})") from e


def _folder_rows(name: str, path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except Exception as e:  # the library raises its own, pyarrow's and the builders' errors
        raise DataError(f"{name}: not a datasets folder or a folder of data files ({_first_line(e)})") from e
    yield from _dataset_rows(name, _choose_split(name, loaded, split), path.resolve())


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as e:  # connection, authentication, unknown name, unknown configuration
        raise DataError(
            f"{name}: no such file or folder here, and as a hub data set it cannot be loaded ({_first_line(e)}); "
            "correct the path (it counts from the current directory), or see that the hub can be reached"
        ) from e
    yield from _dataset_rows(name, _choose_split(name, loaded, split), Path.cwd())


def _choose_split(name: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        splits = ", ".join(map(str, loaded))
        raise DataError(f"{name}: no split {split!r}; there are {splits} (data.split, data.validation_split)")
    return loaded[split]


def _dataset_rows(name: str, dataset: Any, folder: Path) -> Iterator[Row]:
    labels = {n: f for n, f in dataset.features.items() if hasattr(f, "int2str")}
    number = 0
    # As Arrow: image columns then stay {"bytes", "path"} and are not decoded.
    for table in dataset.with_format("arrow").iter(batch_size=64):
        for row in table.to_pylist():
            number += 1
            for column, feature in labels.items():
                if isinstance(row.get(column), int) and row[column] >= 0:
                    row[column] = feature.int2str(row[column])
            yield f"{name}:{number}", row, folder


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
