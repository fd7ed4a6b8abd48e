"""Talking to OpenAI-compatible servers: several URLs for one model, bounded concurrency, retries, one event loop.

Retries, exponential backoff and Retry-After are the ``openai`` client's; spreading over servers, the bound on requests
in flight and errors that say what to do are here.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from openril.errors import EndpointError
from openril.recipe.schema import Endpoint

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """One answer of a server. finish_reason: what the server said ("stop", "length", "content_filter", ...)."""

    text: str
    finish_reason: str
    model: str


class EventLoopThread:
    """An event loop in a thread of its own, so that synchronous code can start requests and fetch answers later."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="openril-endpoints", daemon=True)
        self.thread.start()
        atexit.register(self.close)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the result; an interrupt cancels the coroutine before it is passed on."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        if self.loop.is_running():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=5)


class ChatClient:
    """Chat completions from the servers of one ``Endpoint``.

    Raises EndpointError when the endpoint has no URL or model, or its key's variable is not set.
    """

    def __init__(self, endpoint: Endpoint, what: str) -> None:
        """what: how messages call this endpoint, for instance "judge" or "teacher qwen72b"."""
        if not endpoint.base_urls or not endpoint.model:
            raise EndpointError(f"{what}: set base_urls (for instance http://127.0.0.1:8000/v1) and model")
        self.endpoint = endpoint
        self.what = what
        self.loop_thread = EventLoopThread()
        self._key = "none"
        if endpoint.api_key_env:
            key = os.environ.get(endpoint.api_key_env)
            if not key:
                raise EndpointError(f"{what}: environment variable {endpoint.api_key_env} is not set; export the key there")
            self._key = key
        self._clients: list[AsyncOpenAI] = []
        self._in_flight: list[int] = []
        self._limit: asyncio.Semaphore | None = None

    def _start(self) -> None:
        # Inside the loop's thread: connection pools and the semaphore belong to that loop.
        import httpx
        from openai import AsyncOpenAI

        # Environment proxies are for the internet; a loopback server must be reached directly.
        for url in self.endpoint.base_urls:
            local = any(host in url for host in ("//127.", "//localhost", "//[::1]"))
            self._clients.append(
                AsyncOpenAI(
                    base_url=url,
                    api_key=self._key,
                    timeout=self.endpoint.timeout,
                    max_retries=self.endpoint.max_retries,
                    http_client=httpx.AsyncClient(trust_env=False, timeout=self.endpoint.timeout) if local else None,
                )
            )
            self._in_flight.append(0)
        self._limit = asyncio.Semaphore(self.endpoint.concurrency)

    async def chat(self, messages: list[dict[str, Any]], **settings: Any) -> Completion:
        """One completion. settings: fields of the chat completions request (max_tokens, temperature, top_p, seed, ...);
        ``extra_body`` is merged with the endpoint's own.

        Must run on this client's loop: ``client.loop_thread.run(client.chat(...))`` or ``submit``.
        Raises EndpointError when the request fails for good or the answer holds no text.
        """
        import openai

        if self._limit is None:
            self._start()
        assert self._limit is not None
        extra_body = {**self.endpoint.extra_body, **settings.pop("extra_body", {})}
        async with self._limit:
            server = min(range(len(self._clients)), key=self._in_flight.__getitem__)
            self._in_flight[server] += 1
            url = self.endpoint.base_urls[server]
            try:
                answer = await self._clients[server].chat.completions.create(
                    model=self.endpoint.model, messages=messages, extra_body=extra_body or None, **settings
                )
            except openai.APITimeoutError as e:
                raise EndpointError(f"{self.what}: no answer from {url} within {self.endpoint.timeout:g} s") from e
            except openai.APIConnectionError as e:
                raise EndpointError(f"{self.what}: cannot reach {url} ({e.__cause__ or e}); is the server running?") from e
            except openai.APIStatusError as e:
                raise EndpointError(f"{self.what}: {url} answered {e.status_code}: {str(e.message)[:300]}") from e
            except (openai.OpenAIError, ValueError) as e:
                raise EndpointError(f"{self.what}: {url} sent something unusable: {str(e)[:300]}") from e
            finally:
                self._in_flight[server] -= 1
        choices = getattr(answer, "choices", None)
        if not choices or choices[0].message is None or not isinstance(choices[0].message.content, str):
            raise EndpointError(f"{self.what}: {url} sent an answer without text")
        return Completion(choices[0].message.content, choices[0].finish_reason or "stop", getattr(answer, "model", "") or "")

    async def probe(self) -> list[str]:
        """Ask every server for its models; the list of problems found, empty when all is well."""
        import openai

        if self._limit is None:
            self._start()
        problems = []
        for url, client in zip(self.endpoint.base_urls, self._clients, strict=True):
            try:
                models = [m.id async for m in client.with_options(timeout=10.0, max_retries=0).models.list()]
            except (openai.OpenAIError, ValueError) as e:
                problems.append(f"{self.what}: {url} cannot be asked for its models ({str(e)[:200]}); is the server running?")
                continue
            if self.endpoint.model not in models:
                problems.append(f"{self.what}: {url} has no model {self.endpoint.model!r}; it serves {', '.join(models[:8])}")
        return problems

    def close(self) -> None:
        self.loop_thread.close()
