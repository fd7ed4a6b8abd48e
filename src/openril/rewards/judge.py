"""The LLM judge: asks a model whether responses are right, again when it cannot read the answer, and never twice.

A verdict that cannot be had is *unknown* (score None) and says why; it is never turned into a 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from openril.endpoints import ChatClient
from openril.errors import EndpointError, RecipeError
from openril.recipe.schema import JudgeConfig, Recipe
from openril.rewards.degenerate import is_repetitive
from openril.rewards.judge_prompt import Prompt, read_verdict
from openril.rewards.verdict_store import Verdict, VerdictStore, open_verdict_store, verdict_key
from openril.storage import stable_hash

Settle = Callable[[], Coroutine[Any, Any, Verdict]]


class Pending(Protocol):
    """A verdict under way."""

    def result(self) -> Verdict: ...

    def cancel(self) -> bool: ...


class Judge(Protocol):
    """A model that judges. name: what distinguishes its verdicts from other models'."""

    name: str

    async def ask(self, messages: list[dict[str, str]], seed: int) -> str:
        """The model's reply, whatever it says. Raises EndpointError when there is none to be had."""
        ...

    def start(self, settle: Settle) -> Pending:
        """Begin to settle a verdict, or arrange for it to be settled when its result is asked for."""
        ...

    def close(self) -> None: ...


class EndpointJudge:
    """A judge behind OpenAI-compatible servers. Requests run while the caller does something else."""

    def __init__(self, settings: JudgeConfig) -> None:
        self.settings = settings
        self.client = ChatClient(settings, "judge")
        self.name = settings.model + (f"@{settings.revision}" if settings.revision else "")

    async def ask(self, messages: list[dict[str, str]], seed: int) -> str:
        settings: dict[str, Any] = {"max_tokens": self.settings.max_tokens, "temperature": self.settings.temperature}
        if self.settings.temperature > 0:
            settings["seed"] = seed  # greedy decoding needs none, and some servers refuse the field
        return (await self.client.chat(messages, **settings)).text

    def start(self, settle: Settle) -> Future[Verdict]:
        return self.client.loop_thread.submit(settle())

    def close(self) -> None:
        self.client.close()


class JudgeItem(NamedTuple):
    """A response to judge. shared: it comes from the response cache, so its verdict is kept there for other runs."""

    question: str
    truth: str
    response: str
    shared: bool = False


class JudgeHandle:
    """Verdicts under way; ``result`` waits for all of them, in the order of the items."""

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


class JudgeService:
    """Judges responses with one model, one store and no duplicate work.

    Empty and repetitive responses score 0 unasked. Equal items are asked for once, within a call and across calls.
    A reply that cannot be read is asked for again, ``bad_verdict_retries`` times, with another wording and seed.
    """

    def __init__(self, settings: JudgeConfig, store: VerdictStore, judge: Judge | None = None) -> None:
        self.settings = settings
        self.store = store
        self.judge_model = make_judge(settings) if judge is None else judge
        self._in_flight: dict[str, Pending] = {}
        self._lock = threading.Lock()

    def submit(self, items: Iterable[JudgeItem | tuple[str, str, str]]) -> JudgeHandle:
        """Start judging (question text, ground truth, response text) items; returns at once with an endpoint."""
        return JudgeHandle([self._submit(JudgeItem(*item)) for item in items])

    def judge(self, items: Iterable[JudgeItem | tuple[str, str, str]]) -> list[Verdict]:
        """Verdicts of (question text, ground truth, response text) items, in order."""
        return self.submit(items).result()

    def _submit(self, item: JudgeItem) -> tuple[Verdict | Pending, bool]:
        prompt = Prompt.of(item.question, item.truth, item.response, self.settings.max_response_chars)
        if not prompt.response:
            return Verdict(0.0, cause="empty response"), True
        if is_repetitive(item.response):
            return Verdict(0.0, cause="repetitive response"), True
        key = verdict_key(self.judge_model.name, prompt)
        with self._lock:
            if known := self.store.get(key):
                return known, True
            if pending := self._in_flight.get(key):
                return pending, False
            pending = self.judge_model.start(lambda: self._settle(key, prompt, item.shared))
            self._in_flight[key] = pending
        return pending, True

    async def _settle(self, key: str, prompt: Prompt, shared: bool) -> Verdict:
        try:
            verdict, attempts = await self._ask(key, prompt)
            name = self.judge_model.name
            self.store.add(key, verdict, judge=name, prompt=prompt, attempts=attempts, shared=shared)
        finally:
            with self._lock:
                self._in_flight.pop(key, None)
        return verdict

    async def _ask(self, key: str, prompt: Prompt) -> tuple[Verdict, int]:
        """The verdict and the number of attempts it took."""
        cause = reply = ""
        attempts = 1 + self.settings.bad_verdict_retries
        for attempt in range(attempts):
            try:
                reply = await self.judge_model.ask(prompt.messages(attempt), stable_hash(key, attempt) % 2**31)
            except EndpointError as e:  # the client has retried what was worth retrying
                return Verdict(None, cause=str(e), asked=True), attempt + 1
            read = read_verdict(reply)
            if isinstance(read, tuple):
                return Verdict(*read, asked=True), attempt + 1
            cause = f"unreadable verdict: {read}"
        if attempts > 1:
            cause += f" ({attempts} attempts)"
        return Verdict(None, reply, cause, asked=True), attempts

    def close(self) -> None:
        self.judge_model.close()


def make_judge(settings: JudgeConfig) -> Judge:
    """The judge a recipe describes: servers, or a local checkpoint."""
    if settings.base_urls:
        return EndpointJudge(settings)
    if settings.model_path:
        from openril.rewards.local_judge import LocalJudge

        return LocalJudge(settings)
    raise RecipeError(
        "judge: set judge.base_urls and judge.model, or judge.model_path; or score answers by rules"
        " (rewards.answer.kind: rules, eval.score: rules)"
    )


def build_judge_service(recipe: Recipe, name: str = "rank0") -> JudgeService:
    """Judge and store of a run. name: of this process's log file in ``verdicts/``."""
    return JudgeService(recipe.judge, open_verdict_store(recipe, name))
