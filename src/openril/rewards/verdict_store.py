"""Verdicts on disk, stored by everything they depend on, so that nothing is judged twice. The files are also a log."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openril.errors import JudgeError
from openril.recipe.schema import Recipe
from openril.rewards.judge_prompt import PROMPT_VERSION, Prompt
from openril.rewards.judge_protocol import Verdict
from openril.storage import append_jsonl, stable_hash

LOGGED_CHARS = 500
"""How much of question, ground truth and response a log row shows."""

# Rows of this version begin with ``v2:``. Earlier keys did not cover the judge's settings and are only counted.
_ROW = re.compile(rb'\{"key": "(v2:)?([0-9a-f]{64})", "score": ([01])\.0, ')


def digest(judge: str | Mapping[str, Any], prompt: Prompt) -> str:
    """Return the SHA-256 of the judge, the version of the prompt, and the three texts as the judge reads them."""
    parts = [judge, PROMPT_VERSION, prompt.question, prompt.truth, prompt.response]
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def verdict_key(judge: Mapping[str, Any], prompt: Prompt) -> str:
    """Return the key of a verdict. judge: ``judge_identity`` of its settings."""
    return f"v2:{digest(judge, prompt)}"


class VerdictStore:
    """Known verdicts by key, read from folders of JSONL files to which any number of processes append.

    Every process writes its own files, a whole line at a time, so a kill loses at most the line being written. Memory
    holds the score of each verdict and where its row is; explanations stay on disk. Safe to use from several threads.

    Args:
        write_file: Receives a row for every verdict, known or not. Its folder is read too.
        read_dirs: Further folders whose ``*.jsonl`` files are read.
        shared_file: Also receives the known verdicts on cached responses, so that other runs find them.
    """

    def __init__(self, write_file: Path, read_dirs: Sequence[Path] = (), shared_file: Path | None = None) -> None:
        self.write_file = write_file
        self.shared_file = shared_file
        self.outdated = False
        """Whether the folders hold verdicts of an earlier version. Their keys match nothing, so they are not used."""
        self._folders = list(dict.fromkeys([*read_dirs, write_file.parent]))
        self._lock = threading.Lock()
        self._ends: dict[Path, int] = {}  # how much of each file has been read
        self._files: list[Path] = []
        self._rows: dict[bytes, int] = {}  # half a key's hash -> file number, offset (40 bits) and score (1 bit)
        self.refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def refresh(self) -> None:
        """Read what this and other processes have appended since the last call."""
        with self._lock:
            for path in (path for folder in self._folders for path in sorted(folder.glob("*.jsonl"))):
                with suppress(FileNotFoundError):
                    self._read(path)

    def _read(self, path: Path) -> None:
        if path not in self._ends:
            self._ends[path] = 0
            self._files.append(path)
        number, start = self._files.index(path), self._ends[path]
        if path.stat().st_size <= start:
            return
        with open(path, "rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing it, or was killed while it did
                    break
                if row := _ROW.match(line):
                    if row[1]:
                        self._rows.setdefault(_short(row[2].decode()), number << 41 | start << 1 | (row[3] == b"1"))
                    else:
                        self.outdated = True
                start += len(line)
        self._ends[path] = start

    def get(self, key: str) -> Verdict | None:
        """Return a known verdict, marked as cached, or None."""
        row = self._rows.get(_short(key))
        if row is None:
            return None
        explanation = ""
        # A row may have been deleted since it was read. The score is still known then.
        with suppress(OSError, ValueError, KeyError), open(self._files[row >> 41], "rb") as file:
            file.seek(row >> 1 & (1 << 40) - 1)
            fields = json.loads(file.readline())
            explanation = fields["explanation"] if fields["key"] == key else ""
        return Verdict(float(row & 1), explanation, cached=True)

    def add(
        self, key: str, verdict: Verdict, *, judge: str, prompt: Prompt, attempts: int, shared: bool = False
    ) -> None:
        """Log a verdict. A known one is found from now on; an unknown one is not, so it will be asked for again."""
        row = {
            "key": key,
            "score": verdict.score,
            "cause": verdict.cause,
            # JSON may carry a lone surrogate, which files cannot hold.
            "explanation": verdict.explanation.encode("utf-8", "replace").decode(),
            "judge": judge,
            "prompt_version": PROMPT_VERSION,
            "attempts": attempts,
            "question": prompt.question[:LOGGED_CHARS],
            "truth": prompt.truth[:LOGGED_CHARS],
            "response": prompt.response[:LOGGED_CHARS],
        }
        with self._lock:
            append_jsonl(self.write_file, row)
            if shared and self.shared_file is not None and not verdict.unknown:
                append_jsonl(self.shared_file, row)
            self._read(self.write_file)


def _short(key: str) -> bytes:
    return bytes.fromhex(key[-64:-32])


def open_verdict_store(recipe: Recipe, name: str = "rank0") -> VerdictStore:
    """Open the store of a run: ``verdicts/`` of the run folder and ``verdicts/`` of the response cache.

    name: of this process's file, unique among the processes that write at the same time ("rank0", "collect", "eval").
    """
    run, cache = recipe.run_path / "verdicts", recipe.cache_path / "verdicts"
    # Runs may share a cache, so files there are named after the run as well.
    shared = cache / f"{recipe.run_path.name}-{stable_hash(str(recipe.run_path)) % 10**6:06d}-{name}.jsonl"
    return VerdictStore(run / f"{name}.jsonl", [run, cache], shared)


OUTDATED = (
    "verdicts of an earlier version do not record everything they depend on and are not used; the judge is asked again"
)
"""The message of a command that finds such verdicts."""


@dataclass(frozen=True)
class UnknownBudget:
    """The share of a step's verdicts that may be unknown, so that a judge that is down stops the run."""

    max_unknown_share: float

    def check(self, required: int, unknown: int, causes: Sequence[str]) -> None:
        """Raise JudgeError if too many of the verdicts that a step needed, over all processes, are unknown."""
        if unknown == 0 or unknown <= self.max_unknown_share * required:
            return
        first = "\n".join(f"  {count} x {cause}" for cause, count in Counter(causes).most_common(3))
        raise JudgeError(
            f"judge.max_unknown_share: expected at most {self.max_unknown_share:g}, but {unknown} of {required} verdicts"
            f" are unknown:\n{first}\nCorrect this, then run the same command: it continues."
        )
