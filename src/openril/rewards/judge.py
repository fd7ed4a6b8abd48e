"""The judge service: asks a model whether responses are right, and never twice for the same verdict.

A verdict that cannot be obtained is *unknown*: its score is None, never 0, and its ``cause`` gives the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

from openril.endpoints import ChatClient, Completion
from openril.errors import EndpointError, RecipeError
from openril.recipe.schema import JudgeConfig, Recipe
from openril.rewards.degenerate import is_repetitive
from openril.rewards.judge_prompt import Prompt, read_reply
from openril.rewards.judge_protocol import Judge, Pending, Settle, Verdict, judge_identity
from openril.rewards.verdict_store import VerdictStore, digest, open_verdict_store, verdict_key
from openril.storage import stable_hash


def judge_request_settings(settings: JudgeConfig, seed: int) -> dict[str, Any]:
    """Return the fields of a request to a served judge."""
    fields: dict[str, Any] = {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
    if settings.temperature > 0:
        fields["seed"] = seed  # greedy decoding needs none, and some servers refuse the field
    return fields


class EndpointJudge:
    """A judge on OpenAI-compatible servers. Requests run while the caller does something else."""

    def __init__(self, settings: JudgeConfig) -> None:
        self.settings = settings
        self.client = ChatClient(settings, "judge")
        self.name = settings.model + (f"@{settings.revision}" if settings.revision else "")
        self.identity = judge_identity(settings)

    async def ask(self, messages: list[dict[str, str]], seed: int) -> Completion:
        return await self.client.chat(messages, **judge_request_settings(self.settings, seed))

    def start(self, settle: Settle) -> Future[Verdict]:
        return self.client.loop_thread.submit(settle())

    def close(self) -> None:
        self.client.close()


class JudgeItem(NamedTuple):
    """A response to judge."""

    question: str
    truth: str
    response: str
    shared: bool = False
    """Whether the response comes from the response cache, so that its verdict is stored there for other runs."""


class JudgeHandle:
    """Verdicts that are being computed. ``result`` waits for all of them and returns them in the order of the items."""

    def __init__(self, slots: Sequence[tuple[Verdict | Pending, bool]]) -> None:
        self._slots = slots

    def result(self) -> list[Verdict]:
        verdicts = []
        try:
            for slot, first in self._slots:
                if isinstance(slot, Verdict):
                    verdicts.append(slot)
                else:
                    verdict = slot.result()
                    verdicts.append(verdict if first else replace(verdict, cached=True, asked=False))
        except BaseException:
            for slot, _ in self._slots:
                if not isinstance(slot, Verdict):
                    slot.cancel()
            raise
        return verdicts


class KnownVerdicts:
    """Looks up verdicts in a store and asks nobody. A verdict that is not stored is unknown."""

    def __init__(self, settings: JudgeConfig, store: VerdictStore, judge: Judge | None = None) -> None:
        self.settings = settings
        self.store = store
        self.identity = judge_identity(settings) if judge is None else judge.identity

    def submit(self, items: Iterable[JudgeItem | tuple[str, str, str]]) -> JudgeHandle:
        """Start to judge items of (question text, ground truth, response text). Returns at once with a handle."""
        self.store.refresh()  # other runs may have judged the same responses meanwhile
        return JudgeHandle([self._submit(JudgeItem(*item)) for item in items])

    def judge(self, items: Iterable[JudgeItem | tuple[str, str, str]]) -> list[Verdict]:
        """Return the verdicts on items of (question text, ground truth, response text), in order."""
        return self.submit(items).result()

    def _submit(self, item: JudgeItem) -> tuple[Verdict | Pending, bool]:
        """Return a verdict and whether this item, rather than an equal one before it, asked for it."""
        prompt = Prompt.of(item.question, item.truth, item.response, self.settings.max_response_chars)
        if not prompt.response:
            return Verdict(0.0, cause="empty response"), True
        key = verdict_key(self.identity, prompt)
        if known := self.store.get(key):
            return known, True
        if is_repetitive(item.response):
            return Verdict(0.0, cause="repetitive response"), True
        return self._unknown(key, prompt, item.shared)

    def _unknown(self, key: str, prompt: Prompt, shared: bool) -> tuple[Verdict | Pending, bool]:
        return Verdict(None, cause="not judged yet"), True


class JudgeService(KnownVerdicts):
    """Judges responses with one model and one store.

    Empty and repetitive responses score 0 without a request. Equal items are asked for once, within a call and across
    calls. A reply that cannot be read is asked for again, up to ``bad_verdict_retries`` times, with another wording and
    another seed.
    """

    def __init__(self, settings: JudgeConfig, store: VerdictStore, judge: Judge | None = None) -> None:
        self.judge_model = make_judge(settings) if judge is None else judge
        super().__init__(settings, store, self.judge_model)
        self._in_flight: dict[str, Pending] = {}
        self._lock = threading.Lock()

    def _unknown(self, key: str, prompt: Prompt, shared: bool) -> tuple[Verdict | Pending, bool]:
        with self._lock:
            if known := self.store.get(key):  # another thread may have stored it since
                return known, True
            if pending := self._in_flight.get(key):
                return pending, False
            pending = self.judge_model.start(lambda: self._settle(key, prompt, shared))
            self._in_flight[key] = pending
        return pending, True

    async def _settle(self, key: str, prompt: Prompt, shared: bool) -> Verdict:
        try:
            verdict, attempts = await self._ask(prompt)
            name = self.judge_model.name
            self.store.add(key, verdict, judge=name, prompt=prompt, attempts=attempts, shared=shared)
        finally:
            with self._lock:
                self._in_flight.pop(key, None)
        return verdict

    async def _ask(self, prompt: Prompt) -> tuple[Verdict, int]:
        """Return the verdict and the number of attempts it took."""
        cause, reply = "", Completion("", "stop", "")
        seed = digest(self.judge_model.name, prompt)
        attempts = 1 + self.settings.bad_verdict_retries
        for attempt in range(attempts):
            try:
                reply = await self.judge_model.ask(prompt.messages(attempt), stable_hash(seed, attempt) % 2**31)
            except EndpointError as e:  # the client has already retried
                return Verdict(None, cause=str(e), asked=True), attempt + 1
            read = read_reply(reply, self.settings.max_tokens)
            if isinstance(read, tuple):
                return Verdict(*read, asked=True), attempt + 1
            cause = f"unreadable verdict: {read}"
        if attempts > 1:
            cause += f" ({attempts} attempts)"
        return Verdict(None, reply.text, cause, asked=True), attempts

    def close(self) -> None:
        self.judge_model.close()


def make_judge(settings: JudgeConfig) -> Judge:
    """Build the judge a recipe describes: served, or from a local checkpoint."""
    if settings.base_urls:
        return EndpointJudge(settings)
    if settings.model_path:
        from openril.rewards.local_judge import LocalJudge

        return LocalJudge(settings)
    raise RecipeError(
        "judge: expected judge.base_urls and judge.model, or judge.model_path, got neither. Set them, or score answers"
        " by rules (rewards.answer.kind: rules, eval.score: rules)."
    )


def build_judge_service(recipe: Recipe, name: str = "rank0") -> JudgeService:
    """Build the judge and open the store of a run. name: of this process's file in ``verdicts/``."""
    return JudgeService(recipe.judge, open_verdict_store(recipe, name))
