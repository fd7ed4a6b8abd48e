"""Verdicts on disk: every one is kept by content, so that nothing is judged twice, and can be read as a log."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from openril.errors import JudgeError
from openril.recipe.schema import Recipe
from openril.rewards.judge_prompt import PROMPT_VERSION, Prompt
from openril.storage import append_jsonl, read_jsonl, stable_hash

LOGGED_CHARS = 500
"""How much of question, ground truth and response a log row shows."""


@dataclass(frozen=True)
class Verdict:
    """What became of one judgement.

    score: 1.0 right, 0.0 wrong, None unknown. explanation: the judge's own words. cause: why it is unknown, or why it
    is 0 without asking ("empty response", "repetitive response"). cached: known from before, or shared with an equal
    item of the same call. asked: the judge was asked for it in this call.
    """

    score: float | None
    explanation: str = ""
    cause: str = ""
    cached: bool = False
    asked: bool = False

    @property
    def unknown(self) -> bool:
        return self.score is None


def verdict_key(judge: str, prompt: Prompt) -> str:
    """SHA-256 over everything the judge is told and who it is."""
    parts = [judge, PROMPT_VERSION, prompt.question, prompt.truth, prompt.response]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


class VerdictStore:
    """Known verdicts by key, from any number of folders of JSONL files; new ones are appended to files of our own.

    write_file: gets a row for every verdict, known or not; one process owns it. read_dirs: folders whose ``*.jsonl``
    are read at the start; lines torn by a kill are passed over. shared_file: known verdicts on cached responses are
    also appended here (a file of this process in the response cache), so that other runs find them. Safe to use from
    several threads.
    """

    def __init__(self, write_file: Path, read_dirs: Sequence[Path] = (), shared_file: Path | None = None) -> None:
        self.write_file = write_file
        self.shared_file = shared_file
        self._lock = threading.Lock()
        self._known: dict[str, Verdict] = {}
        folders = dict.fromkeys([*read_dirs, write_file.parent])
        for path in (path for folder in folders for path in sorted(folder.glob("*.jsonl"))):
            for row in read_jsonl(path):
                if isinstance(row.get("key"), str) and row.get("score") in (0, 1):
                    verdict = Verdict(float(row["score"]), str(row.get("explanation", "")), cached=True)
                    self._known.setdefault(row["key"], verdict)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Verdict | None:
        """A known verdict, marked as cached."""
        return self._known.get(key)

    def add(
        self, key: str, verdict: Verdict, *, judge: str, prompt: Prompt, attempts: int, shared: bool = False
    ) -> None:
        """Log a verdict. Known ones are found from now on; unknown ones are not, so that they are asked for again."""
        row = {
            "key": key,
            "score": verdict.score,
            "cause": verdict.cause,
            "explanation": verdict.explanation,
            "judge": judge,
            "prompt_version": PROMPT_VERSION,
            "attempts": attempts,
            "question": prompt.question[:LOGGED_CHARS],
            "truth": prompt.truth[:LOGGED_CHARS],
            "response": prompt.response[:LOGGED_CHARS],
        }
        with self._lock:
            append_jsonl(self.write_file, row)
            if verdict.score is None:
                return
            if shared and self.shared_file is not None:
                append_jsonl(self.shared_file, row)
            self._known.setdefault(key, replace(verdict, cached=True, asked=False))


def open_verdict_store(recipe: Recipe, name: str = "rank0") -> VerdictStore:
    """The store of a run: the run folder's ``verdicts/`` and the response cache's. name: of this process's file, unique
    among the processes that write at the same time ("rank0", "collect", "eval")."""
    run, cache = recipe.run_path / "verdicts", recipe.cache_path / "verdicts"
    # Runs may share a cache, so files there are named after the run as well.
    shared = cache / f"{recipe.run_path.name}-{stable_hash(str(recipe.run_path)) % 10**6:06d}-{name}.jsonl"
    return VerdictStore(run / f"{name}.jsonl", [run, cache], shared)


@dataclass(frozen=True)
class UnknownBudget:
    """How many verdicts of a step may be unknown. A dead judge must stop the run, not starve it of rewards."""

    max_unknown_share: float

    def check(self, wanted: int, unknown: int, causes: Sequence[str]) -> None:
        """wanted, unknown: counts of one step over all processes. causes: of the unknown ones, in any order. Raises
        JudgeError when the unknown share is above the maximum."""
        if unknown == 0 or unknown <= self.max_unknown_share * wanted:
            return
        first = "\n".join(f"  {count} x {cause}" for cause, count in Counter(causes).most_common(3))
        raise JudgeError(
            f"{unknown} of {wanted} verdicts could not be had, more than judge.max_unknown_share"
            f" {self.max_unknown_share:g}:\n{first}\nStart the judge, then run the same command: it continues."
        )
