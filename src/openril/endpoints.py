"""Clients of OpenAI-compatible servers: several URLs per model, bounded concurrency, retries, one event loop.

The ``openai`` client implements the protocol. Retries are implemented here, because they go to another server where there
is one, and because an unusable answer (a proxy's HTML page, an answer without choices) is retried too.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ipaddress
import json
import os
import random
import re
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from openril.errors import EndpointError
from openril.recipe.schema import OMITTABLE, EndpointConfig

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

_FILTERED = re.compile(
    r"content[\s_-]?(?:filter|policy|management|moderation)|responsible.?ai|data.?inspection|moderat|flagged"
    r"|inappropriate content|prohibited.?content|sensitive (?:words?|content)|safety (?:system|filter|polic)",
    re.I,
)
"""What servers call the filter that blocked one prompt."""
_TOO_LONG = re.compile(r"too (?:large|long|many)|context (?:length|window)|exceed", re.I)


class RequestRefusedError(EndpointError):
    """The server refused the request itself (a 4xx status), so a retry would fail too."""

    def __init__(self, message: str, status: int, concerns_every_request: bool) -> None:
        super().__init__(message)
        self.status = status
        self.concerns_every_request = concerns_every_request


@dataclass(frozen=True)
class Completion:
    """One answer of a server."""

    text: str
    """The content of the message, the refusal if the server refused, or "" for an answer without content."""
    finish_reason: str
    """The server's value ("stop", "length", "content_filter", ...), or "refusal"."""
    model: str
    reasoning: str = field(default="", compare=False)
    """The thoughts that the server sent separately, in ``reasoning_content`` or ``reasoning``."""
    answer: Any = field(default=None, repr=False, compare=False)
    """The whole answer of the ``openai`` client, for fields that only some servers send."""
    server: str = field(default="", compare=False)
    """URL of the server that answered."""


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
    url: str  # without its query, which may hold a key
    client: AsyncOpenAI
    proxy: str = ""  # what messages add about the proxy that is used
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

        servers = []
        for base_url in self.endpoint.base_urls:
            url, query = split_base_url(base_url)
            azure = {"api-key": self._key} if self._key and "api-version" in query else None
            try:
                # Proxies from the environment are for the internet. A loopback server must be reached directly.
                http_client = openai.DefaultAsyncHttpxClient(trust_env=False) if is_loopback(url) else None
                options: dict[str, Any] = {"http_client": http_client, "default_query": query, "default_headers": azure}
                options |= {"api_key": self._key or "none", "timeout": self.endpoint.timeout, "max_retries": 0}
                client = openai.AsyncOpenAI(base_url=url, **options)
            except (ImportError, ValueError) as e:  # a SOCKS proxy without its package, or no URL
                raise EndpointError(f"{self.what}: cannot connect to {url}{proxy_note(url)} ({e})") from e
            servers.append(_Server(url, client, proxy_note(url)))
        self._servers = servers
        # Without a key, no Authorization header is sent.
        self._headers = None if self._key else {"Authorization": openai.Omit()}
        self._limit = asyncio.Semaphore(self.endpoint.concurrency)

    async def chat(self, messages: list[dict[str, Any]], **settings: Any) -> Completion:
        """Request one completion. Must run on this client's loop: ``client.loop_thread.run(client.chat(...))``.

        Args:
            settings: Fields of the request (max_tokens, temperature, top_p, seed, ...). ``extra_body`` is merged with the
                endpoint's own, and ``length_field`` and ``omit`` of the endpoint apply.

        Raises:
            RequestRefusedError: At once, for a request that the server will never accept.
            EndpointError: If all retries failed or returned something that is not a completion.
        """
        if self._limit is None:
            self._start()
        assert self._limit is not None
        fields = request_fields(self.endpoint, settings)
        async with self._limit:
            return await self._attempts(self._servers, messages, fields, self.endpoint.max_retries)

    async def _attempts(
        self, servers: list[_Server], messages: list[dict[str, Any]], fields: dict[str, Any], max_retries: int
    ) -> Completion:
        failed: list[_Server] = []
        for attempt in range(max_retries + 1):
            server = self._pick(servers, avoid=failed)
            server.in_flight += 1
            try:
                if (pause := server.paused_until - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                return await self._ask(server, messages, fields)
            except RequestRefusedError:
                raise
            except _RetryableError as e:
                failed.append(server)
                if attempt == max_retries:
                    message = f"{e}{f' ({attempt + 1} attempts)' if attempt else ''}"
                    if e.blocked:
                        raise RequestRefusedError(message, 200, False) from e
                    raise EndpointError(message) from e.__cause__
                wait = e.wait
            finally:
                server.in_flight -= 1
            if wait is None:
                wait = min(FIRST_BACKOFF * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.75, 1.0)
            # A server that has not failed this request can be asked without waiting.
            if all(server in failed for server in servers):
                await asyncio.sleep(wait)
                failed.clear()
        raise AssertionError("unreachable")

    def _pick(self, servers: list[_Server], avoid: list[_Server]) -> _Server:
        """Return the least busy server. One that is paused or failed this request is used only if no other is left."""
        now = time.monotonic()
        return min(servers, key=lambda s: (s in avoid, max(s.avoided_until, s.paused_until) > now, s.in_flight))

    async def _ask(self, server: _Server, messages: list[dict[str, Any]], fields: dict[str, Any]) -> Completion:
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
                    **fields,
                )
        except (TimeoutError, openai.APITimeoutError) as e:
            raise _RetryableError(
                f"{self.what}: no answer from {url} within {self.endpoint.timeout:g} s{server.proxy}"
            ) from e
        except openai.APIConnectionError as e:
            server.avoided_until = time.monotonic() + REST_UNREACHABLE
            raise _RetryableError(
                f"{self.what}: cannot reach {url}{server.proxy} ({e.__cause__ or e}). Is the server running?"
            ) from e
        except openai.APIStatusError as e:
            raise self._status_error(server, e, fields) from e
        except (openai.OpenAIError, ValueError) as e:
            raise _RetryableError(f"{self.what}: {url} sent an unusable answer: {_shortened(e)}") from e
        completion = read_completion(answer)
        if completion is None:
            problem = getattr(answer, "error", None)
            blocked = (
                getattr(answer, "choices", None) == [] if problem is None else bool(_FILTERED.search(str(problem)))
            )
            sent = "a completion without choices" if problem is None and blocked else _shortened(problem or answer)
            raise _RetryableError(f"{self.what}: {url} sent no chat completion but {sent}", blocked=blocked)
        return replace(completion, server=url)

    def setting(self, text: str) -> str:
        """Return how messages call a setting of this endpoint."""
        return f"judge.{text}" if self.what == "judge" else f"{text} for {self.what}"

    def _status_error(self, server: _Server, error: openai.APIStatusError, fields: dict[str, Any]) -> EndpointError:
        url, status = server.url, error.status_code
        message = f"{self.what}: {url} answered {status}: {_shortened(error.message).rstrip('.')}"
        if status in (400, 403, 422, 451) and _FILTERED.search(str(error.message)):
            return RequestRefusedError(message, status, False)
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(error.response.headers)
            if wait is not None:
                server.paused_until = time.monotonic() + wait
            return _RetryableError(message + server.proxy * (status >= 500), wait)
        if status in (400, 422) and (fix := self._field_fix(error, fields)):
            return RequestRefusedError(f"{message}. {fix}", status, True)
        fixes = {
            401: f". Check the key in {self.endpoint.api_key_env}" if self._key else ". Set api_key_env",
            403: ". Check that the key may use this model",
            404: f". Check that the server has model {self.endpoint.model!r} and that the URL is complete (/v1)",
        }
        message += fixes.get(status, "") + server.proxy * (status in (403, 407))
        return RequestRefusedError(message, status, status in (401, 403, 404))  # key, model name or address are wrong

    def _field_fix(self, error: openai.APIStatusError, fields: dict[str, Any]) -> str:
        """Return the setting to change if the server does not accept a field that it was sent, or "" for other errors."""
        text, length = str(error.message), self.endpoint.length_field
        sent = {**fields, **(fields["extra_body"] or {})}
        if length in sent and re.search(r"\bmax_(?:completion_|output_|new_)?tokens\b", text):
            if _TOO_LONG.search(text):
                return ""  # this prompt leaves no space for the answer
            other = "max_completion_tokens" if length == "max_tokens" else "max_tokens"
            return f"Set {self.setting(f'length_field: {other}')}"
        name = next((word for word in re.findall(r"\w+", text) if word in OMITTABLE and word in sent), "")
        if name in ("top_k", "repetition_penalty") and getattr(self.endpoint, "send_vllm_fields", False):
            return f"This API accepts only OpenAI's fields: set {self.setting('send_vllm_fields: false')}"
        omit = ", ".join([*self.endpoint.omit, name])
        return f"Set {self.setting(f'omit: [{omit}]')}" if name else ""

    async def probe(
        self, messages: list[dict[str, Any]], **settings: Any
    ) -> list[tuple[str, Completion | EndpointError]]:
        """Request one completion from every server. Returns the URL of each with what came back."""
        if self._limit is None:
            self._start()
        fields = request_fields(self.endpoint, settings)

        async def ask(server: _Server) -> tuple[str, Completion | EndpointError]:
            try:
                return server.url, await self._attempts([server], messages, fields, min(1, self.endpoint.max_retries))
            except EndpointError as e:
                if getattr(e, "status", 0) == 404:
                    with contextlib.suppress(Exception):  # many servers do not list their models
                        models = [m.id async for m in server.client.models.list(extra_headers=self._headers)]
                        return server.url, EndpointError(f"{e}. It serves {', '.join(models[:8]) or 'no model'}")
                return server.url, e

        return await asyncio.gather(*(ask(server) for server in self._servers))

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
    """An attempt that failed but may succeed when repeated.

    wait: seconds that the server asked for. blocked: whether the server is well but gives no answer to this prompt.
    """

    def __init__(self, message: str, wait: float | None = None, *, blocked: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.blocked = blocked


def _shortened(value: Any, length: int = 300) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."


def split_base_url(base_url: str) -> tuple[str, dict[str, Any]]:
    """Return the URL that the client extends by paths, and the query that every request keeps.

    0.0.0.0, which servers print in their logs, is no address to connect to. It becomes 127.0.0.1.
    """
    parts = urlsplit(base_url)
    netloc = re.sub(r"(^|@)0\.0\.0\.0(?=:|$)", r"\g<1>127.0.0.1", parts.netloc).replace("[::]", "[::1]")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urlunsplit((parts.scheme, netloc, path, "", "")), dict(parse_qsl(parts.query, keep_blank_values=True))


def is_loopback(url: str) -> bool:
    host = (urlsplit(url).hostname or "").rstrip(".")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def proxy_note(url: str) -> str:
    """Return what an error says about the proxy through which this URL is requested, or "" if there is none."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    variable = next((name for name in (parts.scheme, "all") if getproxies().get(name)), None)
    if variable is None or is_loopback(url) or proxy_bypass(host):
        return ""
    proxy = getproxies()[variable].rpartition("@")[2]  # without a password
    return f" through the proxy {proxy} (variable {variable}_proxy; add {host} to no_proxy to connect directly)"


def request_fields(endpoint: EndpointConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a request, with the endpoint's ``extra_body``, ``omit`` and ``length_field`` applied."""
    fields = {name: value for name, value in settings.items() if name not in (*endpoint.omit, "extra_body")}
    extra = {name: nested(value) for name, value in endpoint.extra_body.items()}
    length = "" if "max_completion_tokens" in extra else endpoint.length_field
    extra |= {name: value for name, value in (settings.get("extra_body") or {}).items() if name not in endpoint.omit}
    if "max_tokens" in fields and length != "max_tokens":
        limit = fields.pop("max_tokens")
        if length:
            extra.setdefault(length, limit)
    return {**fields, "extra_body": extra or None}


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
    thoughts = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if isinstance(text, list):  # of parts, some of them thoughts
        parts = [part for part in text if isinstance(part, dict)]
        thoughts = thoughts or "".join(str(part["thinking"]) for part in parts if "thinking" in part)
        text = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    if text is not None and not isinstance(text, str):
        return None
    finish_reason = getattr(choices[0], "finish_reason", None) or "stop"
    if not text and isinstance(refusal, str) and refusal:
        text, finish_reason = refusal, "refusal"
    model = str(getattr(answer, "model", "") or "")
    return Completion(text or "", str(finish_reason), model, thoughts if isinstance(thoughts, str) else "", answer)


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
