"""``python -m playground.serve CHECKPOINT --port N``: a judge behind an OpenAI-compatible address.

For tiny text models on a laptop. Requests that arrive together are answered in one batch, and the part of the prompt
that all of them share (the judge's system text) is run once and kept: ten times the speed of one request at a time.
Greedy only. For a judge of a real size use vLLM.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tyro

Chat = list[dict[str, str]]


class BadRequestError(ValueError):
    """A request that is no chat."""


@dataclass
class Settings:
    """Serve a tiny text model on 127.0.0.1 for /v1/chat/completions."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder of the model."""
    port: int = 8100
    """Port on 127.0.0.1; 0 takes a free one. The address is printed."""
    name: str = "judge"
    """Model name in answers."""
    batch_size: int = 64
    """Most requests answered at a time."""
    with_parent: bool = False
    """Stop when the process that started this one is gone."""


class Batcher:
    """One thread that owns the model and answers whatever has arrived since it last looked."""

    def __init__(self, checkpoint: Path, batch_size: int) -> None:
        from openril.sampling.greedy_batch import GreedyDecoder

        self.reader = GreedyDecoder.from_checkpoint(checkpoint)
        self.batch_size = batch_size
        self.waiting: queue.Queue[tuple[Chat, int, Future[str]]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, chat: Chat, max_tokens: int) -> str:
        future: Future[str] = Future()
        self.waiting.put((chat, max_tokens, future))
        return future.result()

    def _work(self) -> None:
        while True:
            batch = [self.waiting.get()]
            time.sleep(0.003)  # requests of one step arrive together
            while len(batch) < self.batch_size and not self.waiting.empty():
                batch.append(self.waiting.get())
            try:
                limit = max(max_tokens for _, max_tokens, _ in batch)
                replies = self.reader.replies([chat for chat, _, _ in batch], limit)
            except Exception as e:  # whoever asked must hear of it, and the thread must live
                for _, _, future in batch:
                    future.set_exception(e)
            else:
                for (_, _, future), reply in zip(batch, replies, strict=True):
                    future.set_result(reply)


def read_request(body: bytes) -> tuple[Chat, int]:
    """Messages and max_tokens of a chat completions request. Raises BadRequestError."""
    try:
        request = json.loads(body)
        messages = [{"role": str(m["role"]), "content": m["content"]} for m in request["messages"]]
        max_tokens = int(request.get("max_tokens") or request.get("max_completion_tokens") or 128)
    except (ValueError, KeyError, TypeError) as e:
        raise BadRequestError(f"not a chat completions request: {e}") from e
    if not messages or not all(isinstance(m["content"], str) for m in messages):
        raise BadRequestError("messages with text content are wanted")
    return messages, max_tokens


def make_handler(batcher: Batcher, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.rstrip("/") == "/v1/models":
                self._send(200, {"object": "list", "data": [{"id": name, "object": "model"}]})
            else:
                self._send(404, {"error": {"message": f"no such address: {self.path}"}})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/v1/chat/completions":
                self._send(404, {"error": {"message": f"no such address: {self.path}"}})
                return
            try:
                text = batcher.ask(*read_request(body))
            except BadRequestError as e:
                self._send(400, {"error": {"message": str(e)}})
                return
            except Exception as e:
                self._send(500, {"error": {"message": f"{type(e).__name__}: {e}"}})
                return
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._send(
                200,
                {
                    "id": "judge", "object": "chat.completion", "created": int(time.time()), "model": name,
                    "choices": [choice],
                },
            )  # fmt: skip

        def _send(self, status: int, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: one line a request would drown everything else."""

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def start_server(checkpoint: Path, port: int = 0, name: str = "judge", batch_size: int = 64) -> Server:
    """A server in threads of this process; ``server.server_address[1]`` is its port, ``server.shutdown()`` ends it."""
    server = Server(("127.0.0.1", port), make_handler(Batcher(checkpoint, batch_size), name))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(arguments: Sequence[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.serve")
    if not (settings.checkpoint / "config.json").is_file():
        print(f"{settings.checkpoint} holds no checkpoint (no config.json)", file=sys.stderr)
        return 2
    parent = os.getppid()
    server = start_server(settings.checkpoint, settings.port, settings.name, settings.batch_size)
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    try:
        while not settings.with_parent or os.getppid() == parent:
            time.sleep(1.0)
    except KeyboardInterrupt:
        pass
    server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
