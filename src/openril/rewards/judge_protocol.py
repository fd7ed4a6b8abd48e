"""What a verdict is, and what a judge model has to offer. Served and local judges implement ``Judge``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from openril.endpoints import Completion
from openril.recipe.schema import JudgeConfig
from openril.storage import weights_fingerprint


@dataclass(frozen=True)
class Verdict:
    """The outcome of judging one response."""

    score: float | None
    """1.0 for a right response, 0.0 for a wrong one, None when the verdict is unknown."""
    explanation: str = ""
    """The judge's own words."""
    cause: str = ""
    """Why the verdict is unknown, or why it is 0 without asking ("empty response", "repetitive response")."""
    cached: bool = False
    """Whether the verdict was known already, or is shared with an equal item of the same call."""
    asked: bool = False
    """Whether this call asked the judge for it."""

    @property
    def unknown(self) -> bool:
        return self.score is None


Settle = Callable[[], Coroutine[Any, Any, Verdict]]
"""Starts the coroutine that obtains one verdict."""


class Pending(Protocol):
    """A verdict that is being computed."""

    def result(self) -> Verdict: ...

    def cancel(self) -> bool: ...


class Judge(Protocol):
    """A model that judges."""

    name: str
    """What logs call the model. It also seeds the model's sampling."""
    identity: dict[str, Any]
    """Everything about the judge that its verdicts depend on, as plain data. It is part of every verdict's key."""

    async def ask(self, messages: list[dict[str, str]], seed: int) -> Completion:
        """Return the model's reply, whatever it is. Raises EndpointError if the model cannot be reached."""
        ...

    def start(self, settle: Settle) -> Pending:
        """Start to compute a verdict, or arrange that it is computed when its result is requested."""
        ...

    def close(self) -> None: ...


def judge_identity(settings: JudgeConfig) -> dict[str, Any]:
    """Return the identity of the judge that ``settings`` describe, without loading or calling it.

    A local checkpoint is identified by its weights, so a copy in another folder is the same judge. Settings that change
    only speed (``batch_size``, ``concurrency``) or the handling of failures are left out.
    """
    generation = {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
    if settings.base_urls:
        served: dict[str, Any] = {
            "model": settings.model,
            "revision": settings.revision,
            "extra_body": dict(settings.extra_body),
        }
        if settings.omit:
            served["omit"] = sorted(settings.omit)
        if not settings.length_field:
            served["length_field"] = ""
        return served | generation
    if settings.model_path and (weights := weights_fingerprint(Path(settings.model_path))):
        return {"weights": weights, **generation}
    return {"model_path": settings.model_path, "revision": settings.revision, **generation}
