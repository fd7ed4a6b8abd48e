"""Read the small files of a run folder for a report: recipe, metrics, warnings, environment and evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from openril.errors import DataError, OpenRILError
from openril.evaluation.summary import Comparison, Evaluation, Row, build_evaluation, compare
from openril.recipe.loading import load_saved_recipe
from openril.recipe.schema import Recipe
from openril.report.curves import EARLIER_NAMES
from openril.report.rollouts import finite, text
from openril.storage import changed_keys, read_jsonl

MOST_POINTS = 2000
"""Steps whose metrics a report holds. Of a longer run it holds every second, third, ... step."""
_BASE = "base"


def require_run(run_dir: Path) -> None:
    """Raise DataError if a path is no run folder, or if nothing has been logged in it yet."""
    if not run_dir.is_dir():
        what = "a file" if run_dir.exists() else "nothing"
        raise DataError(f"{run_dir}: expected a run folder, got {what}. Pass the run_dir of a recipe.")
    if not (run_dir / "metrics.jsonl").is_file() and not (run_dir / "rollouts").is_dir():
        inner = sorted(p.parent.name for p in run_dir.glob("*/metrics.jsonl"))[:5]
        hint = f" Did you mean {', '.join(str(run_dir / name) for name in inner)}?" if inner else ""
        raise DataError(
            f"{run_dir}: expected a run folder with metrics.jsonl and rollouts/, got neither.{hint} Both appear after the"
            " first step of `ril train`."
        )


def read_recipe(run_dir: Path) -> Recipe | None:
    """Return the saved recipe of a run, or None where there is none that can be read."""
    try:
        return load_saved_recipe(run_dir / "recipe.yaml")
    except (OpenRILError, OSError):
        return None


def recipe_differences(recipe: Recipe | None) -> list[dict[str, Any]]:
    """Return the settings of a recipe that differ from the defaults."""
    if recipe is None:
        return []
    default, own = (r.model_dump(mode="json") for r in (Recipe(), recipe))
    return [
        {"key": text(key), "value": plain(now), "default": plain(old)}
        for key, (old, now) in changed_keys(default, own).items()
    ]


def compare_recipes(recipes: Sequence[Recipe | None]) -> list[dict[str, Any]]:
    """Return the settings in which runs differ, with a value for each run (None where a recipe cannot be read)."""
    dumps = [r.model_dump(mode="json") if r is not None else None for r in recipes]
    known = [d for d in dumps if d is not None]
    keys = dict.fromkeys(key for d in known[1:] for key in changed_keys(known[0], d))

    def value(dump: Any, key: str) -> Any:
        for part in key.split("."):
            dump = dump.get(part) if isinstance(dump, dict) else None
        return plain(dump)

    return [{"key": text(key), "values": [value(d, key) for d in dumps]} for key in keys]


def plain(value: Any, most_chars: int = 300) -> Any:
    """Return a setting as JSON data with short texts and finite numbers."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if finite(value) is not None else str(value)
    if isinstance(value, str):
        return text(value)[:most_chars]
    return text(json.dumps(value, ensure_ascii=False, default=str))[:most_chars]


def read_metrics(run_dir: Path) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """Return the metrics of a run by name, with a value or None for each step, and the seconds of each part in all."""
    rows = [row for row in read_jsonl(run_dir / "metrics.jsonl") if isinstance(row.get("step"), int)]
    seconds: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("time/") and (known := finite(value)) is not None:
                part = text(name.removeprefix("time/"))
                seconds[part] = seconds.get(part, 0.0) + known
    every = -(-len(rows) // MOST_POINTS) or 1
    kept = rows[every - 1 :: every]
    out: dict[str, list[Any]] = {"step": [row["step"] for row in kept]}
    earlier = {old: new for new, old in EARLIER_NAMES.items()}
    for name in dict.fromkeys(name for row in kept for name in row if name != "step"):
        values = [None if (v := finite(row.get(name))) is None else float(f"{v:.6g}") for row in kept]
        if any(v is not None for v in values):
            out[text(earlier.get(name, name))] = values
    return out, {name: round(value, 3) for name, value in seconds.items()}


def teachers_too_long(metrics: Mapping[str, list[Any]]) -> dict[str, int]:
    """Return how many cached responses of each teacher were too long for a group, summed over the steps."""
    prefix = "train/teacher_too_long_"
    return {
        name.removeprefix(prefix): int(sum(v or 0 for v in values))
        for name, values in metrics.items()
        if name.startswith(prefix)
    }


def read_warnings(run_dir: Path) -> list[dict[str, Any]]:
    """Return the warnings that a run printed, those before the first step first."""
    rows = [
        {"step": row.get("step") if isinstance(row.get("step"), int) else None, "text": text(row.get("text"))[:2000]}
        for row in read_jsonl(run_dir / "warnings.jsonl")
    ]
    return sorted(rows, key=lambda row: row["step"] or 0)


def read_environment(run_dir: Path) -> tuple[dict[str, str], str | None]:
    """Return the versions of packages and the device of a run; runs of earlier versions know the versions alone."""
    files = [run_dir / "environment.json", *sorted(run_dir.glob("checkpoints/step_*/state.json"), reverse=True)]
    for path in files:
        try:
            about = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            versions = {text(k): text(v) for k, v in dict(about["versions"]).items()}
            return versions, text(about["device"]) if about.get("device") else None
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}, None


def read_evaluations(run_dir: Path) -> dict[str, Evaluation]:
    """Return the finished evaluations of a run by name, ``base`` first. Damaged ones are left out."""
    found: dict[str, Evaluation] = {}
    names = {f.name for f in fields(Row)}
    for path in sorted(run_dir.glob("eval/*.json"), key=lambda p: (p.stem != _BASE, p.stem)):
        try:
            about = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            if not isinstance(about, dict) or "score" not in about:
                continue  # the table
            rows = [r for r in read_jsonl(path.with_suffix(".jsonl")) if "question_id" in r]
            kept = [Row(**{k: v for k, v in row.items() if k in names}) for row in rows]
            found[path.stem] = build_evaluation(text(path.stem), "", kept)
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return found


def evaluation_rows(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Return the report's ``evaluations``; each is compared with ``base`` on the same questions."""
    out = []
    for name, evaluation in evaluations.items():
        about = evaluation.as_dict()
        about = {"name": name, **_figures(about), "groups": about["groups"], "paired": None}
        about["groups"] = {
            text(column): {text(value): _figures(figures) for value, figures in by_value.items()}
            for column, by_value in about["groups"].items()
        }
        if name != _BASE and _BASE in evaluations:
            difference = interval(compare(evaluations[_BASE], evaluation))
            about["paired"] = difference and {"to": _BASE, **difference}
        out.append(about)
    return out


def compare_evaluations(runs: Sequence[Mapping[str, Evaluation]]) -> list[dict[str, Any]]:
    """Return the paired differences of every evaluation that two runs share, later run minus earlier run."""
    out = []
    for a, first in enumerate(runs):
        for b in range(a + 1, len(runs)):
            for name in first:
                difference = interval(compare(first[name], runs[b][name])) if name in runs[b] else None
                if difference:
                    out.append({"evaluation": text(name), "a": a, "b": b, **difference})
    return out


def interval(comparison: Comparison) -> dict[str, Any] | None:
    """Return a paired difference with its 95 % interval, or None below two common questions."""
    if comparison.difference is None or comparison.standard_error is None:
        return None
    half = 1.959964 * comparison.standard_error
    difference = comparison.difference
    return {"difference": difference, "low": difference - half, "high": difference + half, "questions": comparison.n}


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "score": finite(summary["score"]),
        "standard_error": finite(summary["standard_error"]),
        "questions": summary["n"],
        "unknown": summary["unknown"],
    }
