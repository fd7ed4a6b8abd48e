"""The manifest of a response cache: its schema version, and how each source's responses are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openril.errors import CacheError
from openril.responses.files import SCHEMA_VERSION

FORMAT = "openril-responses"
MANIFEST = "manifest.json"


def empty_manifest() -> dict[str, Any]:
    return {"format": FORMAT, "schema_version": SCHEMA_VERSION, "sources": {}}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; ``sources`` maps a name to its model, revision and sampling settings.

    Raises CacheError when there is none, it cannot be read, or a newer OpenRIL made it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError(f"{folder}: no response cache here; run `ril collect RECIPE` or correct cache_dir") from None
    except ValueError as e:
        raise CacheError(f"{path}: not readable JSON ({e}); restore it or collect into another cache_dir") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CacheError(f"{path}: not the manifest of a response cache; set another cache_dir")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CacheError(
            f"{path}: has schema version {manifest.get('schema_version')}, this OpenRIL reads "
            f"{SCHEMA_VERSION}; use the OpenRIL version that made it"
        )
    return manifest


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, old value, new value) wherever two manifest entries differ."""
    same_weights = old["revision"] == new["revision"] and str(new["revision"]).startswith("weights:")
    names = [] if same_weights else ["model", "revision"]
    pairs = [(name, old[name], new[name]) for name in names]
    settings = dict.fromkeys([*old["sampling"], *new["sampling"]])
    pairs += [(name, old["sampling"].get(name), new["sampling"].get(name)) for name in settings]
    return [pair for pair in pairs if pair[1] != pair[2]]
