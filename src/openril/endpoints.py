"""Clients of OpenAI-compatible servers: several URLs per model, bounded concurrency, retries, one event loop.

The ``openai`` client implements the protocol. Retries are implemented here, because they go to another server where there
is one, and because an unusable answer (a proxy's HTML page, an answer without choices) is retried too.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from openril.errors import EndpointError
from openril.recipe.schema import EndpointConfig

if TYPE_CHECKING:
    import openai
    from openai import AsyncOpenAI

T = TypeVar("T")

FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
"""Seconds before the first retry, doubled for each further one up to the second number."""
LONGEST_RETRY_AFTER = 300.0
"""A server's Retry-After is obeyed up to this many seconds."""
REST_UNREACHABLE = 10.0
"""Seconds for which a server that could not be reached gets no work if others can do it."""


class RequestRefusedError(EndpointError):
    """The server refused the request itself (a 4xx status), so a retry would fail too."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        self.concerns_every_request = status in (401, 403, 404)  # key, model name or address are wrong


@dataclass(frozen=True)
class Completion:
    """One answer of a server."""

    text: str
    """The content of the message, the refusal if the server refused, or "" for an answer without content."""
    finish_reason: str
    """The server's value ("stop", "length", "content_filter", ...), or "refusal"."""
    model: str
    answer: Any = field(default=None, repr=False, compare=False)
    """The whole answer of the ``openai`` client, for fields that only some servers send."""


class EventLoopThread:
    """An event loop in its own thread, so that synchronous code can start requests and fetch the answers later."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="openril-endpoints", daemon=True)
        self.thread.start()
        atexit.register(self.close)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the result. An interrupt cancels the coroutine and is raised once the coroutine has ended."""
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = self.submit(watched())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            ended.wait(timeout=10)
            raise

    def close(self) -> None:
        atexit.unregister(self.close)
        if self.loop.is_running():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=5)
        if not self.loop.is_running() and not self.loop.is_closed():
            self.loop.close()


@dataclass(eq=False)
class _Server:
    url: str
    client: AsyncOpenAI
    in_flight: int = 0
    avoided_until: float = 0.0  # after it could not be reached
    paused_until: float = 0.0  # because it asked for a pause


class ChatClient:
    """Chat completions from the servers of one endpoint. Raises EndpointError if it has no URL, model or key."""

    def __init__(self, endpoint: EndpointConfig, what: str) -> None:
        """what: how messages name this endpoint, for instance "judge" or "teacher qwen72b"."""
        if not endpoint.base_urls or not endpoint.model:
            raise EndpointError(f"{what}: set base_urls (for instance http://127.0.0.1:8000/v1) and model")
        for url in endpoint.base_urls:
            if not url.startswith(("http://", "https://")):
                raise EndpointError(f"{what}: base_urls: expected http:// or https://, got {url!r}")
        self.endpoint = endpoint
        self.what = what
        self._key = ""
        if endpoint.api_key_env:
            self._key = os.environ.get(endpoint.api_key_env, "").strip()
            if not self._key:
                raise EndpointError(f"{what}: api_key_env: {endpoint.api_key_env} is not set. Export the key there.")
            if not (self._key.isascii() and self._key.isprintable()):
                raise EndpointError(f"{what}: api_key_env: {endpoint.api_key_env} is no key. Export it again.")
        self.loop_thread = EventLoopThread()
        self._servers: list[_Server] = []
        self._headers: dict[str, Any] | None = None
        self._limit: asyncio.Semaphore | None = None

    def _start(self) -> None:
        # Called in the loop's thread, because connection pools and the semaphore belong to that loop.
        import openai

        for url in self.endpoint.base_urls:
            # Proxies from the environment are for the internet. A loopback server must be reached directly.
            local = any(host in url for host in ("//127.", "//localhost", "//[::1]"))
            http_client = openai.DefaultAsyncHttpxClient(trust_env=False) if local else None
            key, timeout = self._key or "none", self.endpoint.timeout
            client = openai.AsyncOpenAI(
                base_url=url, api_key=key, timeout=timeout, max_retries=0, http_client=http_client
            )
            self._servers.append(_Server(url, client))
        # Without a key, no Authorization header is sent.
        self._headers = None if self._key else {"Authorization": openai.Omit()}
        self._limit = asyncio.Semaphore(self.endpoint.concurrency)

    async def chat(self, messages: list[dict[str, Any]], **settings: Any) -> Completion:
        """Request one completion. Must run on this client's loop: ``client.loop_thread.run(client.chat(...))``.

        Args:
            settings: Fields of the request (max_tokens, temperature, top_p, seed, ...). ``extra_body`` is merged with the
                endpoint's own.

        Raises:
            RequestRefusedError: At once, for a request that the server will never accept.
            EndpointError: If all retries failed or returned something that is not a completion.
        """
        if self._limit is None:
            self._start()
        assert self._limit is not None
        extra = {name: nested(value) for name, value in self.endpoint.extra_body.items()}
        settings["extra_body"] = {**extra, **settings.get("extra_body", {})} or None
        async with self._limit:
            failed: list[_Server] = []
            for attempt in range(self.endpoint.max_retries + 1):
                server = self._pick(avoid=failed)
                server.in_flight += 1
                try:
                    if (pause := server.paused_until - time.monotonic()) > 0:
                        await asyncio.sleep(pause)
                    return await self._ask(server, messages, settings)
                except RequestRefusedError:
                    raise
                except _RetryableError as e:
                    failed.append(server)
                    if attempt == self.endpoint.max_retries:
                        raise EndpointError(f"{e}{f' ({attempt + 1} attempts)' if attempt else ''}") from e.__cause__
                    wait = e.wait
                finally:
                    server.in_flight -= 1
                if wait is None:
                    wait = min(FIRST_BACKOFF * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.75, 1.0)
                # A server that has not failed this request can be asked without waiting.
                if all(server in failed for server in self._servers):
                    await asyncio.sleep(wait)
                    failed.clear()
        raise AssertionError("unreachable")

    def _pick(self, avoid: list[_Server]) -> _Server:
        """Return the least busy server. One that is paused or failed this request is used only if no other is left."""
        now = time.monotonic()
        return min(self._servers, key=lambda s: (s in avoid, max(s.avoided_until, s.paused_until) > now, s.in_flight))

    async def _ask(self, server: _Server, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Completion:
        """Make one attempt at one server. Raises RequestRefusedError or _RetryableError."""
        import openai

        url = server.url
        try:
            # The client's timeout applies to each read, so a server that trickles bytes would never trip it.
            async with asyncio.timeout(self.endpoint.timeout):
                answer = await server.client.chat.completions.create(
                    model=self.endpoint.model,
                    messages=messages,  # type: ignore[arg-type]
                    extra_headers=self._headers,
                    **settings,
                )
        except (TimeoutError, openai.APITimeoutError) as e:
            raise _RetryableError(f"{self.what}: no answer from {url} within {self.endpoint.timeout:g} s") from e
        except openai.APIConnectionError as e:
            server.avoided_until = time.monotonic() + REST_UNREACHABLE
            raise _RetryableError(
                f"{self.what}: cannot reach {url} ({e.__cause__ or e}). Is the server running?"
            ) from e
        except openai.APIStatusError as e:
            raise self._status_error(server, e) from e
        except (openai.OpenAIError, ValueError) as e:
            raise _RetryableError(f"{self.what}: {url} sent an unusable answer: {str(e)[:300]}") from e
        completion = read_completion(answer)
        if completion is None:
            raise _RetryableError(f"{self.what}: {url} sent no chat completion but {str(answer)[:200]!r}")
        return completion

    def _status_error(self, server: _Server, error: openai.APIStatusError) -> EndpointError:
        url, status = server.url, error.status_code
        message = f"{self.what}: {url} answered {status}: {str(error.message)[:300]}"
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(error.response.headers)
            if wait is not None:
                server.paused_until = time.monotonic() + wait
            return _RetryableError(message, wait)
        fix = {
            401: f". Check the key in {self.endpoint.api_key_env}" if self._key else ". Set api_key_env",
            403: ". Check that the key may use this model",
            404: f". Check that the server has model {self.endpoint.model!r} and that the URL is complete (/v1)",
        }
        return RequestRefusedError(message + fix.get(status, ""), status)

    async def probe(self) -> list[str]:
        """Ask every server for its models, and return the problems found."""
        import openai

        if self._limit is None:
            self._start()
        problems = []
        for server in self._servers:
            url = server.url
            try:
                async with asyncio.timeout(10.0):
                    models = [m.id async for m in server.client.models.list(extra_headers=self._headers)]
            except (openai.OpenAIError, ValueError, TypeError, AttributeError, TimeoutError) as e:
                reason = str(e)[:200] or "no answer within 10 s"
                problems.append(f"{self.what}: {url} does not list its models ({reason}). Is the server running?")
                continue
            if self.endpoint.model not in models:
                problems.append(
                    f"{self.what}: {url} has no model {self.endpoint.model!r}; it serves {', '.join(models[:8])}"
                )
        return problems

    def close(self) -> None:
        """Close the connections and end the loop's thread."""
        if self._servers and self.loop_thread.loop.is_running():
            self.loop_thread.run(self._close_connections())
        self.loop_thread.close()

    async def _close_connections(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for server in self._servers:
            await server.client.close()


class _RetryableError(EndpointError):
    """An attempt that failed but may succeed when repeated. wait: seconds that the server asked for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def nested(value: Any) -> Any:
    """Return a field of ``extra_body``, parsed if it is the JSON text of an object or a list."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def read_completion(answer: Any) -> Completion | None:
    """Return the first choice of a server's answer, or None if there is none."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        return None
    message = getattr(choices[0], "message", None)
    if message is None:
        return None
    text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    if text is not None and not isinstance(text, str):
        return None
    finish_reason = getattr(choices[0], "finish_reason", None) or "stop"
    if not text and isinstance(refusal, str) and refusal:
        text, finish_reason = refusal, "refusal"
    return Completion(text or "", str(finish_reason), str(getattr(answer, "model", "") or ""), answer)


def retry_after(headers: Any) -> float | None:
    """Return the seconds that the server asks to wait, from Retry-After (seconds or a date) or retry-after-ms."""
    from email.utils import parsedate_to_datetime

    try:
        if "retry-after-ms" in headers:
            wait = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers:
            value = headers["retry-after"]
            try:
                wait = float(value)
            except ValueError:
                wait = parsedate_to_datetime(value).timestamp() - time.time()
        else:
            return None
    except ValueError:
        return None
    return min(max(wait, 0.0), LONGEST_RETRY_AFTER)
