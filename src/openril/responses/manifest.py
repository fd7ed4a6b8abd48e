"""The manifest of a response cache: its schema version, and how each source's responses are produced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openril.errors import CacheError, ModelError
from openril.recipe.schema import Recipe, TeacherConfig
from openril.responses.files import SCHEMA_VERSION
from openril.storage import weights_fingerprint

FORMAT = "openril-responses"
MANIFEST = "manifest.json"
EMPTY = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "sources": {}}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest. Raises CacheError if there is none, it cannot be read, or a newer OpenRIL made it."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError(
            f"cache_dir: no response cache in {folder}. Run `ril collect RECIPE`, or correct it."
        ) from None
    except ValueError as e:
        raise CacheError(f"{path}: expected JSON ({e}). Restore the file, or collect into another cache_dir.") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CacheError(f"{path}: expected the manifest of a response cache. Set another cache_dir.")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CacheError(f"{path}: expected schema_version {SCHEMA_VERSION}. Use the OpenRIL that made the cache.")
    return manifest


def source_entry(recipe: Recipe, teacher: TeacherConfig | None) -> dict[str, Any]:
    """Return the manifest entry of a teacher, or of the student for None: model, revision and sampling settings.

    A local checkpoint's revision is a fingerprint of its weights. Settings that a server is not sent are None.

    Raises:
        ModelError: If the student's checkpoint does not exist yet.
    """
    sampling: dict[str, Any] = recipe.collect.sampling.model_dump()
    sampling["max_completion_length"] = recipe.collect.max_completion_length
    sampling["system_prompt"] = recipe.student.system_prompt if teacher is None else teacher.system_prompt
    if teacher is None:
        model, revision = recipe.collected_student, recipe.student.revision
        if recipe.sft.enabled and recipe.sft.targets == "answers" and not Path(model).is_dir():
            raise ModelError(f"sft.enabled: {model} does not exist yet. Run `ril sft` first, or set it to false.")
        return {"model": model, "revision": weights_fingerprint(Path(model)) or revision, "sampling": sampling}
    if teacher.model_path:
        revision = weights_fingerprint(Path(teacher.model_path)) or teacher.revision
        return {"model": teacher.model_path, "revision": revision, "sampling": sampling}
    if not teacher.send_vllm_fields:
        sampling |= {"top_k": None, "repetition_penalty": None}
    sampling |= dict.fromkeys(teacher.omit) | ({} if teacher.length_field else {"max_completion_length": None})
    if teacher.extra_body:
        sampling["extra_body"] = dict(teacher.extra_body)
    return {"model": teacher.model, "revision": teacher.revision, "sampling": sampling}


def may_differ(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Return the keys of two entries that may differ: equal weights are the same model in whatever folder they are."""
    return {"model"} if old["revision"] == new["revision"] and str(new["revision"]).startswith("weights:") else set()
