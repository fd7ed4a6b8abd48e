"""Small copies of the pictures of a run's questions, one for each content, so that a report needs no other folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from openril.data.images import load_image, read_bytes
from openril.errors import DataError
from openril.records import ImageSource, Question
from openril.storage import atomic_path

MOST_BYTES = 2**30
"""Size of the folder above which pictures are hashed but not copied."""
LONGEST_SIDE = 512
"""Longest side of a copy in pixels. Smaller pictures keep their size."""
_LOSSLESS = 160


class Pictures:
    """``pictures/HASH.webp`` of a run folder. HASH: the first 32 hex digits of the SHA-256 of the encoded picture.

    Copies are made in a second thread, so that training does not wait for them. Pictures on the network are not fetched
    again and have no hash.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self.warn: Callable[[str], None] = lambda message: None
        self._hashes: dict[ImageSource, str | None] = {}
        self._size: int | None = None
        self._thread = ThreadPoolExecutor(1, "pictures")
        self._last: Future[None] | None = None

    def keep(self, question: Question) -> list[str | None]:
        """Return the hashes of a question's pictures, None for one that cannot be read, and copy those that are new."""
        return [self._keep(image) for image in question.images]

    def _keep(self, image: ImageSource) -> str | None:
        if image not in self._hashes:
            self._hashes[image] = None
            try:
                data = read_bytes(image)
            except DataError:
                return None
            name = hashlib.sha256(data).hexdigest()[:32]
            self._hashes[image] = name
            if not (self.folder / f"{name}.webp").exists():
                self._last = self._thread.submit(self._copy, data, name)
        return self._hashes[image]

    def _copy(self, data: bytes, name: str) -> None:
        if self._size is None:
            self._size = sum(path.stat().st_size for path in self.folder.glob("*.webp"))
        if self._size >= self.most_bytes:
            self.warn(
                f"{self.folder}: holds {self._size >> 20} MiB of pictures. Further ones are not copied, and a report shows"
                " them only while their files are where they were."
            )
            self.warn = lambda message: None
            return
        try:
            picture = load_image(ImageSource(data=data))
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            with atomic_path(self.folder / f"{name}.webp") as temporary:
                picture.save(temporary, "WEBP", quality=80, method=2, lossless=max(picture.size) <= _LOSSLESS)
                self._size += temporary.stat().st_size
        except (DataError, OSError) as e:
            self.warn(f"{self.folder}: a picture cannot be copied for the report: {e}")

    def wait(self) -> None:
        """Return when all copies are written."""
        if self._last is not None:
            self._last.result()
