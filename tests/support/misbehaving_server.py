"""A local OpenAI-compatible server with scripted answers, for tests of its clients.

    with MisbehavingServer(Status(500), Garbage(), then=Say("42")) as server:
        ...                              # first request: 500, second: not JSON, every later one: "42"
        assert server.count == 3         # chat requests that arrived
        server.requests[0].body["model"] # their contents

An act may also be chosen by a function of the request: ``MisbehavingServer(then=lambda request: ...)``.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """A chat request that arrived. number: 0-based. body: its JSON. headers: lower-case names."""

    number: int
    body: dict[str, Any]
    headers: dict[str, str]
    arrived: float
    path: str = ""

    @property
    def text(self) -> str:
        """All text of all messages, one line each."""
        lines = []
        for message in self.body.get("messages", []):
            content = message["content"]
            parts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
            lines.extend(parts)
        return "\n".join(lines)


@dataclass(frozen=True)
class Say:
    """A valid completion. text may be a function of the request."""

    text: str | Callable[[Request], str] = "ok"
    finish_reason: str = "stop"
    delay: float = 0.0


@dataclass(frozen=True)
class Status:
    """An HTTP error with an OpenAI-shaped body."""

    code: int = 500
    message: str = "scripted error"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Garbage:
    """Status 200 and a body that is not a completion."""

    body: bytes = b"<html>not json"
    content_type: str = "application/json"


@dataclass(frozen=True)
class Hang:
    """Wait for this long (or until the server closes), then close the connection without an answer."""

    seconds: float = 60.0


@dataclass(frozen=True)
class Dribble:
    """A valid completion of which one byte arrives every ``pause`` seconds."""

    text: str = "ok"
    pause: float = 0.1


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer."""


@dataclass(frozen=True)
class EmptyChoices:
    """A completion with no choice in it."""


@dataclass(frozen=True)
class Refuse:
    """A completion without content, as OpenAI's API refuses."""

    text: str = "I cannot help with that."
    finish_reason: str = "stop"


Act = Say | Status | Garbage | Hang | Dribble | Drop | EmptyChoices | Refuse
Chooser = Callable[[Request], Act]


class MisbehavingServer:
    """Answers requests with the acts of ``script`` in order of arrival, and every later one with ``then``."""

    def __init__(self, *script: Act, then: Act | Chooser | None = None, model: str = "fake") -> None:
        self.script = list(script)
        self.then: Act | Chooser = Say() if then is None else then
        self.model = model
        self.requests: list[Request] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path.endswith("/models"):
                    model = {"id": server.model, "object": "model", "created": 0, "owned_by": "test"}
                    self.send(200, {"object": "list", "data": [model]})
                else:
                    self.send(404, {"error": {"message": "no such page"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    request = Request(
                        len(server.requests),
                        body,
                        {k.lower(): v for k, v in self.headers.items()},
                        time.monotonic(),
                        self.path,
                    )
                    server.requests.append(request)
                    act = server.script.pop(0) if server.script else server.then
                    server.in_flight += 1
                    server.max_in_flight = max(server.max_in_flight, server.in_flight)
                try:
                    if not isinstance(act, Act):
                        act = act(request)
                    if body.get("model") != server.model:
                        act = Status(404, f"The model `{body.get('model')}` does not exist.")
                    self.perform(act, request)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client has stopped waiting
                finally:
                    with server._lock:
                        server.in_flight -= 1

            def perform(self, act: Act, request: Request) -> None:
                match act:
                    case Say(text, finish_reason, delay):
                        server._closing.wait(delay)
                        content = text if isinstance(text, str) else text(request)
                        self.complete([choice({"role": "assistant", "content": content}, finish_reason)])
                    case Refuse(text, finish_reason):
                        message = {"role": "assistant", "content": None, "refusal": text}
                        self.complete([choice(message, finish_reason)])
                    case EmptyChoices():
                        self.complete([])
                    case Status(code, message, headers):
                        self.send(code, {"error": {"message": message, "type": "scripted", "code": code}}, headers)
                    case Garbage(body, content_type):
                        self.send_bytes(200, body, content_type, {})
                    case Hang(seconds):
                        server._closing.wait(seconds)
                        self.close_connection = True
                    case Dribble(text, pause):
                        self.complete([choice({"role": "assistant", "content": text}, "stop")], pause)
                    case Drop():
                        self.close_connection = True

            def complete(self, choices: list[dict[str, Any]], pause: float = 0.0) -> None:
                self.send(
                    200,
                    {
                        "id": "chatcmpl-test",
                        "object": "chat.completion",
                        "created": 0,
                        "model": server.model,
                        "choices": choices,
                        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                    },
                    pause=pause,
                )

            def send(self, code: int, value: Any, headers: dict[str, str] | None = None, pause: float = 0.0) -> None:
                self.send_bytes(code, json.dumps(value).encode(), "application/json", headers or {}, pause)

            def send_bytes(
                self, code: int, body: bytes, content_type: str, headers: dict[str, str], pause: float = 0.0
            ) -> None:
                self.send_response(code)
                for name, value in {**headers, "Content-Type": content_type, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in [body[i : i + 1] for i in range(len(body))] if pause else [body]:
                    self.wfile.write(part)
                    if pause and server._closing.wait(pause):
                        break

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                # Tests kill clients in the middle of a request.
                if not isinstance(sys.exc_info()[1], ConnectionError | json.JSONDecodeError):
                    super().handle_error(request, client_address)

        self._http = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The base URL, for ``EndpointConfig.base_urls``."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def count(self) -> int:
        """The number of chat requests so far."""
        return len(self.requests)

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> MisbehavingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def choice(message: dict[str, Any], finish_reason: str) -> dict[str, Any]:
    return {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
