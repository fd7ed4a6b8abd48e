"""Build the report document of run folders: plain data that a page, or anybody's script, reads (docs/report.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMA = "openril.report/1"
GROUPS = 200
"""Groups that a report shows unless told otherwise."""
MOST_BYTES = 10_000_000
"""Size of a report's file."""


def build_document(
    run_dirs: Sequence[Path],
    *,
    groups: int | None = GROUPS,
    most_bytes: int | None = MOST_BYTES,
    ticks: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the report document of one or several run folders.

    Args:
        groups: The largest number of groups to show; None for all.
        most_bytes: The size in bytes that groups and pictures together may have; None for any.
        ticks: A file of verdicts that a person has checked, as the page exports it.
        seed: Of the sample of groups and of the audit.

    Raises:
        DataError: A folder is no run, has no rollouts, or holds a line that cannot be read.
    """
    raise NotImplementedError
