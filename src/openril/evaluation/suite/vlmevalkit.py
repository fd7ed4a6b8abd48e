"""Read the scores that VLMEvalKit wrote, so that they appear in the same table, marked."""

from __future__ import annotations

import csv
from pathlib import Path

from openril.errors import DataError
from openril.evaluation.suite.benchmarks import PAPER
from openril.evaluation.suite.table import OtherRow

DATASETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "AI2D_TEST": ("AI2D", ("Overall",)),
    "ChartQA_TEST": ("ChartQA", ("Overall",)),
    "MathVista_MINI": ("MathVista", ("acc",)),
    "MMBench_DEV_EN": ("MMB", ("Overall",)),
    "MMBench_DEV_CN": ("MMB-CN", ("Overall",)),
    "MMVet": ("MM-Vet", ("acc",)),
    "MMVet_v2": ("MM-Vet-v2", ("acc",)),
    "MMMU_DEV_VAL": ("MMMU", ("Overall",)),
    "MMStar": ("MMStar", ("Overall",)),
    "BLINK": ("BLINK", ("Overall",)),
    "SEEDBench_IMG": ("SEED", ("Overall",)),
    "SEEDBench2_Plus": ("SEED2+", ("Overall",)),
    "RealWorldQA": ("RealWorldQA", ("Overall",)),
    "MMMU_Pro_10c": ("MMMU-Pro", ("Overall",)),
    "MMMU_Pro_V": ("MMMU-Pro", ("Overall",)),
}
"""VLMEvalKit's data set -> column and the names under which its score files keep the total."""


def read_vlmevalkit(folder: Path) -> list[OtherRow]:
    """Return one row for each model with score files (``MODEL_DATASET_acc.csv`` or ``_score.csv``) in ``folder``.

    MMMU-Pro is the mean of its two parts, and is left out if one is missing.

    Raises:
        DataError: If there is no such file, or one holds no total.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for file in sorted(folder.rglob("*.csv")) if folder.is_dir() else []:
        if not file.stem.endswith(("_acc", "_score")):
            continue
        for dataset, (column, totals) in sorted(DATASETS.items(), key=lambda item: -len(item[0])):
            before, middle, _ = file.stem.partition(f"_{dataset}_")
            if middle and before:
                found.setdefault(before, {}).setdefault(column, {})[dataset] = _total(file, totals)
                break
    if not found:
        raise DataError(
            f"--import: expected score files of VLMEvalKit (MODEL_DATASET_acc.csv) in {folder}, found none. Name the folder "
            "that its --work-dir wrote."
        )
    rows = []
    for model, columns in found.items():
        scores = {
            column: sum(parts.values()) / len(parts)
            for column, parts in columns.items()
            if column != "MMMU-Pro" or len(parts) == 2
        }
        complete = len(scores) == len(PAPER)
        rows.append(OtherRow(model, "VLMEvalKit", scores, sum(scores.values()) / len(scores) if complete else None))
    return rows


def _total(file: Path, names: tuple[str, ...]) -> float:
    """Return a file's total in percent. Shares are multiplied by 100, as VLMEvalKit's own tables do."""
    with open(file, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    # Files with one row for each category keep the total in the row "Overall".
    rows = [r for r in rows if "Overall" in r.values()] or [r for r in rows if r.get("split") != "dev"] or rows
    for row in rows:
        for name in names:
            if (text := row.get(name)) not in (None, ""):
                try:
                    value = float(str(text))
                except ValueError:
                    continue
                return value * 100 if value <= 1.0 else value
    raise DataError(f"--import: expected a column {' or '.join(names)} with the total in {file}, found none.")
