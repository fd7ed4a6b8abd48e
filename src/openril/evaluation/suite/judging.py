"""The judge of the benchmarks: one reply for each prompt, kept on disk, and never a guess in place of one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openril.endpoints import ChatClient
from openril.errors import EndpointError, JudgeError
from openril.evaluation.suite.loading import strip_thinking
from openril.recipe.schema import JudgeConfig
from openril.storage import append_jsonl, read_jsonl, stable_hash

WARMER = 0.5
"""Added to the temperature each time an unreadable reply is asked for again, as lmms-eval does."""


class SuiteJudge:
    """Ask the recipe's judge with lmms-eval's own prompts.

    Args:
        path: The file of replies. Failures are not kept, so that the next run asks again.
    """

    def __init__(self, settings: JudgeConfig, path: Path) -> None:
        self.settings = settings
        self.path = path
        self.client = ChatClient(settings, "judge")
        self.replies = {row["key"]: row["reply"] for row in read_jsonl(path) if "reply" in row}
        self.causes: dict[str, str] = {}
        self._lock = threading.Lock()

    def probe(self) -> None:
        """Ask every server one question. Raises JudgeError if none answers."""
        messages = [{"role": "user", "content": "Reply with the number 1."}]
        answers = self.client.loop_thread.run(self.client.probe(messages, max_tokens=8, temperature=0.0))
        failed = [f"{url}: {answer}" for url, answer in answers if isinstance(answer, EndpointError)]
        if len(failed) == len(answers):
            fix = "Start the server, or use --suite offline."
            raise JudgeError(f"judge.base_urls: expected an answer to a test question, got none ({failed[0]}). {fix}")

    def ask(self, prompt: str, max_tokens: int, readable: Callable[[str], bool] = bool) -> str | None:
        """Return a readable reply, or None after all retries; ``cause`` then says why.

        Args:
            readable: Whether a reply can be used. Others are asked for again at a higher temperature.
        """
        identity = self.settings.model, self.settings.revision, self.settings.extra_body
        key = f"{stable_hash('suite', list(map(str, identity)), max_tokens, prompt):016x}"
        if (known := self.replies.get(key)) is not None and readable(known):
            return known
        if prompt in self.causes:  # it has failed after all retries already
            return None
        cause = ""
        for attempt in range(self.settings.bad_verdict_retries + 1):
            settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": WARMER * attempt}
            if attempt:
                settings["seed"] = attempt
            try:
                completion = self.client.loop_thread.run(
                    self.client.chat([{"role": "user", "content": prompt}], **settings)
                )
            except EndpointError as e:
                cause = str(e)
                break
            reply = strip_thinking(completion.text)
            if reply and completion.finish_reason != "refusal" and readable(reply):
                with self._lock:
                    self.replies[key] = reply
                    append_jsonl(self.path, {"key": key, "reply": reply})
                return reply
            cause = f"the judge's reply is unreadable: {reply[:80]!r}"
        self.causes[prompt] = cause
        return None

    def cause(self, prompt: str) -> str:
        """Return why a prompt has no reply."""
        return self.causes.get(prompt, "")

    def close(self) -> None:
        self.client.close()
