"""Checks of the settings of the export that ends a run. Imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from openril.recipe.problems import Problem
from openril.recipe.schema import ExportConfig, Recipe

EXPORT_TYPES = {
    "gguf": ("f16", "q8_0", "q4_0"),
    "internvl-original": ("stored", "bfloat16", "float16"),
    "compressed-tensors": ("fp8", "w4a16"),
}
"""Format -> its types, the default first."""


def check_export(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    """Yield what would make the export of a run fail, which would show only after its training."""
    export = recipe.export
    if stage != "run":
        return
    if not export.to:
        if changed := [name for name, value in export if value != getattr(ExportConfig(), name)]:
            reason = f"export.to is empty, so {', '.join(changed)} has no effect"
            yield Problem("export.to", reason, f"Name a format: {', '.join(EXPORT_TYPES)}", "warning")
        return
    known = EXPORT_TYPES[export.to]
    for kind in export.type:
        if kind not in known:
            yield Problem("export.type", f"expected {', '.join(known)} for {export.to}, got {kind!r}", "Correct it")
    if len(export.type) > 1 and export.to != "gguf":
        yield Problem("export.type", f"expected one type for {export.to}, got {len(export.type)}", "Name one")
    if export.out and Path(export.out).expanduser().is_file():
        yield Problem("export.out", f"expected a folder, got the file {export.out}", "Name a folder")
    if export.check and not recipe.data.validation:
        fix = "List question files in data.validation, or set it to false"
        yield Problem("export.check", "the comparison needs questions, and data.validation is empty", fix)
    if export.to == "gguf":
        needed = ["gguf", *["xllamacpp"] * export.check]
        if missing := [name for name in needed if find_spec(name) is None]:
            fix = "Run pip install 'openril[export]'"
            yield Problem("export.to", f"gguf needs the package {' and '.join(missing)}, which is not installed", fix)
    elif export.to == "compressed-tensors":
        if not export.python or shutil.which(str(Path(export.python).expanduser())) is None:
            got = repr(export.python) if export.python else "nothing"
            fix = "Make an environment and pip install llmcompressor in it (docs/export.md)"
            yield Problem("export.python", f"expected an interpreter with llm-compressor, got {got}", fix)
    elif (kind := _model_type(recipe.student.model)) not in ("", "internvl"):
        yield Problem("export.to", f"{export.to} expects an InternVL, got a {kind}", "Name another format")


def _model_type(checkpoint: str) -> str:
    """Return the model_type of a checkpoint folder, or "" if it is not known here."""
    try:
        saved = json.loads((Path(checkpoint).expanduser() / "config.json").read_text(encoding="utf-8"))
        return str(saved["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
