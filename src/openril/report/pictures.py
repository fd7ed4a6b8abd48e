"""Pictures of a run's questions for a report: the copies in the run folder, or else the files that the rollouts name."""

from __future__ import annotations

import base64
import hashlib
import io
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from openril.data.images import load_image, read_bytes
from openril.errors import DataError
from openril.records import ImageSource
from openril.report.rollouts import is_hash
from openril.training.pictures import LONGEST_SIDE

THUMB = 192
"""Longest side of a thumbnail in pixels."""


def picture_bytes(
    run_dir: Path, hash: str, size: Literal["thumb", "full"] = "full", name: str = ""
) -> tuple[bytes, str] | None:
    """Return a picture as WebP and its media type, or None if it is neither in the run folder nor at ``name``.

    Args:
        hash: Its content hash. Anything else finds nothing.
        name: Path of the original, which is used only if its content has this hash.
    """
    if not is_hash(hash):
        return None
    copy = run_dir / "pictures" / f"{hash}.webp"
    try:
        if copy.is_file():
            return (_encode(ImageSource(path=copy), THUMB) if size == "thumb" else copy.read_bytes()), "image/webp"
        source = _file(name)
        if source is not None and file_hash(name) == hash:
            return _encode(source, THUMB if size == "thumb" else LONGEST_SIDE), "image/webp"
    except (DataError, OSError):
        return None
    return None


@lru_cache(100_000)
def file_hash(name: str) -> str | None:
    """Return the content hash of a local picture that an earlier version named by its path alone, or None."""
    try:
        source = _file(name)
        return hashlib.sha256(read_bytes(source)).hexdigest()[:32] if source is not None else None
    except (DataError, OSError, ValueError):
        return None


def embedded(run_dir: Path, hash: str, name: str) -> dict[str, Any] | None:
    """Return a picture as the report's ``images`` holds it, or None. ``full`` is None where the thumbnail is as large."""
    found = picture_bytes(run_dir, hash, "full", name)
    if found is None:
        return None
    with Image.open(io.BytesIO(found[0])) as picture:
        width, height = picture.size
    full = _data_url(found[0])
    if max(width, height) <= THUMB:
        return {"thumb": full, "full": None, "width": width, "height": height, "name": Path(name).name}
    thumb = _data_url(_encode(ImageSource(data=found[0]), THUMB))
    return {"thumb": thumb, "full": full, "width": width, "height": height, "name": Path(name).name}


def _file(name: str) -> ImageSource | None:
    path = Path(name)
    return ImageSource(path=path) if "\0" not in name and path.is_absolute() and path.is_file() else None


def _encode(source: ImageSource, longest: int) -> bytes:
    picture = load_image(source)
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, lossless=max(picture.size) <= 96)
    return buffer.getvalue()


def _data_url(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
