"""The folder of an export: refused if it holds other content, written whole or not at all, and used again if complete."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from openril._version import __version__
from openril.export.request import RECORD, ExportError, ExportRequest
from openril.storage import atomic_path, refuse_changed, weights_fingerprint, write_json


def identity(request: ExportRequest) -> dict[str, Any]:
    """Return what decides the content of an export: the checkpoint's files, the format, and its types."""
    folder = Path(request.checkpoint).expanduser()
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix in (".json", ".jinja", ".txt", ".model"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return {
        "to": request.to,
        "types": list(request.types),
        "weights": weights_fingerprint(folder),
        "settings": digest.hexdigest()[:32],
        "openril": __version__,
    }


def only_type(request: ExportRequest, known: Sequence[str]) -> str:
    """Return the type of a format that writes one at a time. Raises ExportError if several are asked for."""
    if len(request.types) != 1:
        raise ExportError(f"--type: expected one of {', '.join(known)}, got {len(request.types)} types. Name one.")
    return request.types[0]


def is_written(request: ExportRequest) -> bool:
    """Return whether ``request.out`` holds this export already. Raises ExportError if it holds anything else."""
    out = request.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        saved = json.loads((out / RECORD).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ExportError(
            f"--out: expected a new folder or an earlier export, got {out}, which holds other files. Name another folder."
        ) from e
    refuse_changed(out, saved, identity(request), fix="name another folder with --out", error=ExportError)
    return True


@contextmanager
def written(request: ExportRequest, record: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``request.out`` with ``record`` as its export.json when the block ends.

    Raises:
        ExportError: The disk is full, or it cannot be written for another reason. Nothing is left of it then.
    """
    try:
        with atomic_path(request.out) as temporary:
            temporary.mkdir()
            yield temporary
            common = {"identity": identity(request), "checkpoint": str(Path(request.checkpoint).expanduser().resolve())}
            common |= {"to": request.to, "types": list(request.types), "recipe": request.recipe_path}
            write_json(temporary / RECORD, common | record)
            for file in temporary.glob("*.safetensors"):  # the library makes them readable by their owner only
                shutil.copymode(temporary / RECORD, file)
    except (OSError, SafetensorError) as e:
        raise ExportError(
            f"--out: {request.out} cannot be written ({e}). What was written is removed. Free disk space, or name another"
            " folder."
        ) from e


def record(folder: Path, **found: Any) -> None:
    """Add to the record of an export."""
    path = folder / RECORD
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | found)
