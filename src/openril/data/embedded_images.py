"""Keep images that are embedded in Parquet or datasets files, without filling the memory.

The first ``MEMORY_LIMIT`` bytes of a process stay in memory. The rest goes to files named by their content, which later
runs reuse. They are in ``$OPENRIL_IMAGE_CACHE``, by default ``~/.cache/openril/images``, and may be deleted between runs.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from openril.records import ImageSource
from openril.storage import atomic_path

MEMORY_LIMIT = 512 * 2**20

_held = 0


def cache_folder() -> Path:
    return Path(os.environ.get("OPENRIL_IMAGE_CACHE") or "~/.cache/openril/images").expanduser()


def keep_bytes(data: bytes) -> ImageSource:
    """Return an image source for encoded bytes: in memory up to the limit, then in a file."""
    global _held
    if _held + len(data) <= MEMORY_LIMIT:
        _held += len(data)
        return ImageSource(data=data)
    name = hashlib.sha256(data).hexdigest()[:40]
    path = (cache_folder() / name[:2] / name).absolute()
    if not path.exists() or path.stat().st_size != len(data):
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return ImageSource(path=path)
