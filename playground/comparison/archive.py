"""Keep the scores of finished cells in one small file, from which the tables are made again, and to which seeds are added.

A file is JSON lines. The first row holds what all cells share: ``settings`` (as in comparison.json), ``tuned`` and ``tuning``
(rates and their validation scores) and ``ids`` of the test questions. Every other row is a finished piece of work: ``path``
(its folder), ``cpu_seconds``, and for a scored one ``steps``, ``seconds``, ``right`` (one bit for each test question, in
hexadecimal) and the curves of its discriminator.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openril.errors import DataError, StateError
from openril.report.curves import series
from openril.storage import read_jsonl, refuse_changed, write_json, write_jsonl
from playground.comparison.cells import DONE

RESTORED = "restored"
"""Folder of what is restored besides cells: the costs of shared work, and the ids of the questions."""
CURVES = ("loss_minus_chance", "balanced_accuracy", "length_only_accuracy")
"""Of a discriminator, by step."""
FIRST = ("settings", "tuned", "tuning", "ids")


def question_ids(out: Path) -> list[str]:
    """Return the ids of the test questions. Raises StateError if the folder has none."""
    if (path := out / "world" / "test.jsonl").is_file():
        return [row["id"] for row in read_jsonl(path)]
    if (path := out / RESTORED / "ids.json").is_file():
        ids: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return ids
    raise StateError(f"{out}: expected a comparison, found no world/test.jsonl. Run its parts first, or give --scores.")


def pack(out: Path, path: Path) -> None:
    """Write the finished work of the comparison in ``out`` to the file ``path``."""
    ids = question_ids(out)
    first = {"settings": _read(out / "comparison.json"), "ids": ids}
    first |= {"tuned": _read(out / "tuned.json"), "tuning": _read(out / "tuning_scores.json")}
    rows: dict[str, dict[str, Any]] = {}
    for done in sorted(out.rglob(DONE)):
        folder = done.parent.relative_to(out)
        if folder.parts[0] == RESTORED:
            folder = folder.relative_to(RESTORED)
        found = _read(done)
        row = {"path": folder.as_posix(), **{k: found[k] for k in ("steps", "cpu_seconds", "seconds") if k in found}}
        if (scores := found.get("scores")) is not None:
            if set(scores) != set(ids):
                continue  # a tuning run, which validation questions score
            row["right"] = bits([scores[i] for i in ids])
            if curves := _curves(done.parent / "metrics.jsonl"):
                row["discriminator"] = curves
        rows.setdefault(row["path"], row)
    write_jsonl(path, [first, *(rows[name] for name in sorted(rows))])


def unpack(path: Path, out: Path) -> int:
    """Put the finished work of the file ``path`` into ``out``, and return the number of scored cells.

    Raises:
        DataError: The file is not one that ``pack`` wrote, or its rates are not those of the folder.
        StateError: The folder belongs to another comparison, or has another score of one of the cells.
    """
    rows = read_jsonl(path) if path.is_file() else []
    if not rows or any(key not in rows[0] for key in FIRST):
        raise DataError(
            f"--scores {path}: expected a file of scores as --report writes it (scores.jsonl of its folder)"
        )
    first, ids = rows[0], rows[0]["ids"]
    own = _read(out / "comparison.json")
    if own:
        refuse_changed(out, {**own, "models": {}}, {**first["settings"], "models": {}}, fix="name another --out")
    else:
        write_json(out / "comparison.json", first["settings"])
        write_json(out / RESTORED / "ids.json", ids)
    if question_ids(out) != ids:
        raise StateError(f"--scores {path}: expected the questions of {out}, found others. Name another --out.")
    for name, value in (("tuned.json", first["tuned"]), ("tuning_scores.json", first["tuning"])):
        if (has := _read(out / name)) and has != value:
            raise DataError(f"--scores {path}: expected the rates of {out / name}, {has}; got {value}")
        if value:
            write_json(out / name, value)
    cells = 0
    for row in rows[1:]:
        folder = out / row["path"]
        done: dict[str, Any] = {k: row[k] for k in ("steps", "cpu_seconds", "seconds") if k in row}
        if "right" not in row:
            write_json(out / RESTORED / row["path"] / DONE, done)
            continue
        cells += 1
        done["scores"] = dict(zip(ids, unbits(row["right"], len(ids)), strict=True))
        if (folder / DONE).is_file():
            if _read(folder / DONE)["scores"] != done["scores"]:
                raise StateError(f"--scores {path}: {folder / DONE} has other scores of this cell. Name another --out.")
            continue
        curves = row.get("discriminator", {})
        steps = range(max(map(len, curves.values()), default=0))
        metrics = [
            {"step": n + 1, **{f"discriminator/{k}": c[n] for k, c in curves.items() if n < len(c)}} for n in steps
        ]
        write_jsonl(folder / "metrics.jsonl", metrics)
        write_json(folder / DONE, done)
    return cells


def bits(right: list[float]) -> str:
    """Return scores of 0.0 and 1.0 as hexadecimal digits, the first question first, with zeros at the end."""
    padded = right + [0.0] * (-len(right) % 4)
    return "".join(f"{int(''.join(str(int(r)) for r in padded[n : n + 4]), 2):x}" for n in range(0, len(padded), 4))


def unbits(digits: str, number: int) -> list[float]:
    """Return ``number`` scores of their hexadecimal digits. Raises DataError for another number of digits."""
    if len(digits) != -(-number // 4):
        raise DataError(f"expected the scores of {number} questions in {-(-number // 4)} digits, found {len(digits)}")
    return [float(bit) for bit in "".join(f"{int(d, 16):04b}" for d in digits)[:number]]


def _curves(path: Path) -> dict[str, list[float]]:
    rows = read_jsonl(path) if path.is_file() else []
    curves = {name: series(rows, f"discriminator/{name}")[1] for name in CURVES}
    return {name: [round(v, 4) for v in values] for name, values in curves.items() if values}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
