"""What runs next to the server: the index and the report document, kept up to date while runs train."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from openril._version import __version__
from openril.report import run_files
from openril.report.document import SCHEMA, build_document
from openril.report.pictures import picture_bytes
from openril.report.serving.index import RunIndex
from openril.report.serving.server import Source
from openril.storage import stable_hash, write_json

DAYS_KEPT = 30
"""Indexes that were not used for this long are removed."""
REST = 10
"""How many times as long as a document took to build the next one waits, so that building takes little of the time."""


def without_groups(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """Return the document of some runs. Its groups are asked for one page at a time, and lines that cannot be read are in
    ``Progress.problems``."""
    document = build_document(run_dirs, groups=0, warn=lambda message: None)
    return document | {"shown": document["total"]}


class Viewer:
    """Keeps index and document of run folders up to date in a second thread.

    Args:
        cache: The file of the index; the document is stored next to it.
        pause: Seconds between looks at the folders.
        build: Builds the document.
    """

    def __init__(
        self,
        run_dirs: Sequence[Path],
        cache: Path,
        pause: float,
        build: Callable[[Sequence[Path]], dict[str, Any]] = without_groups,
    ) -> None:
        with suppress(OSError):
            os.utime(cache)
        remove_unused(cache.parent)
        self.run_dirs, self.pause, self.build = list(run_dirs), pause, build
        self.index = RunIndex(run_dirs, cache)
        self.source = Source(self.index, self.report, lambda: self._version, self.picture)
        self._stored = cache.with_suffix(".json")
        self._document: dict[str, Any] | None = None
        self._version = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ril view: index", daemon=True)

    def __enter__(self) -> Viewer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=2)  # a document that is being built is not waited for
        self.index.close()

    def _work(self) -> None:
        built, due = 0, 0.0
        while not self._stop.is_set():
            try:
                self.index.refresh(self._stop.is_set)
                now = self._fingerprint()
                if now != built and time.monotonic() >= due and not self._stop.is_set():
                    started = time.monotonic()
                    self._build(now)
                    built, due = now, time.monotonic() + REST * (time.monotonic() - started)
                self.index.failure = ""
            except Exception as e:  # the page shows it, and the next look may succeed
                self.index.failure = f"{type(e).__name__}: {e}"
            self._stop.wait(self.pause)

    def _build(self, fingerprint: int) -> None:
        """Build the document, or read the stored one if nothing has changed since."""
        with suppress(OSError, ValueError, KeyError):
            stored = json.loads(self._stored.read_text(encoding="utf-8"))
            if stored["fingerprint"] == fingerprint:
                self._document, self._version = stored["document"], self._version + 1
                return
        self._document = self.build(self.run_dirs)
        self._version += 1
        with suppress(OSError):
            write_json(self._stored, {"fingerprint": fingerprint, "document": self._document})

    def _fingerprint(self) -> int:
        """Return a number that changes with everything that the document is built from."""
        found = []
        for folder in self.run_dirs:
            for pattern in ("*.json", "*.jsonl", "*.yaml", "eval/*.json*"):
                for path in sorted(folder.glob(pattern)):
                    with suppress(FileNotFoundError):
                        found.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
        return stable_hash(__version__, found, self.index.stamps())

    def report(self) -> dict[str, Any]:
        """Return the document, or what the index knows while the document is being built for the first time."""
        if self._document is not None:
            return self._document
        empty: dict[str, Any] = {name: [] for name in ("recipe", "warnings", "evaluations", "teachers")}
        empty |= {"versions": {}, "device": None, "discriminator": None, "audit": None, "responses": None}
        runs = []
        for run, folder in enumerate(self.run_dirs):
            metrics, seconds = run_files.read_metrics(folder)
            about = {"name": folder.name, "path": str(folder), "metrics": metrics, "seconds": seconds}
            runs.append(about | self.index.summary(run) | empty)
        return {"schema": SCHEMA, "pending": True, "runs": runs, "comparison": None, "groups": [], "images": {}}

    def picture(self, name: str, size: str) -> tuple[bytes, str] | None:
        """Return a picture of the runs by its hash."""
        run, original = self.index.pictures.get(name, (0, ""))
        for folder in (self.run_dirs[run], *self.run_dirs):
            if found := picture_bytes(folder, name, "thumb" if size == "thumb" else "full", original):
                return found
        return None


def remove_unused(folder: Path) -> None:
    """Remove the indexes that nobody has opened for a long time."""
    for path in folder.glob("*"):
        with suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > DAYS_KEPT * 86_400:
                path.unlink()
