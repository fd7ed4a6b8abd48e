"""What `ril export` asks of a format: the checkpoint, the folder, the types, and how to check the result.

A format is a module of this package, named in ``FORMATS``. It has:

- ``TYPES``: the values of ``--type`` that it knows; the first is the default.
- ``export(request) -> bool``: write ``request.out`` and, with ``request.check``, check it. Returns whether it passed.
- ``check(request) -> bool``: check ``request.out``, which an earlier call of ``export`` wrote.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openril.errors import OpenRILError
from openril.recipe.schema import Recipe

FORMATS = {
    "gguf": "openril.export.gguf_format",
    "internvl-original": "openril.export.internvl_original",
    "compressed-tensors": "openril.export.compressed_tensors",
}
"""Value of ``--to`` -> its module."""

RECORD = "export.json"
"""The file in an export's folder that says what it was made from, and what its check has found."""


class ExportError(OpenRILError):
    """A checkpoint cannot be exported exactly, or an export cannot be checked."""


@dataclass(frozen=True)
class ExportRequest:
    """One export, or one check of an export."""

    to: str
    checkpoint: str
    """The checkpoint folder."""
    out: Path
    """The folder that is written."""
    types: tuple[str, ...]
    recipe: Recipe | None = None
    """Its ``data.validation`` holds the questions of the check, and ``student`` limits the images."""
    recipe_path: str = ""
    """The file that ``recipe`` was read from, for the record."""
    check: bool = True
    questions: int = 100
    """The number of questions of the check."""
    max_kl: float | None = None
    """The largest mean KL, in nats, of types without a limit of ours; None only reports it."""
    threads: int = 1
    """CPU threads of the runtime."""
    resize: bool = False
    """Send pictures in the sizes that the model's processor gives them, as the application then must too."""
    python: str = ""
    """The interpreter that writes the export, for formats whose tools need another environment."""
    say: Callable[[str], None] = print


def format_module(to: str) -> Any:
    """Return the module of a format. Raises ExportError for an unknown one."""
    if to not in FORMATS:
        raise ExportError(f"--to: expected {' or '.join(FORMATS)}, got {to!r}.")
    return importlib.import_module(FORMATS[to])
