"""llama.cpp in a process of ours: answers, next-token distributions, speed and memory of an export."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image
from torch import Tensor

from openril.export.gguf_file import INSTALL
from openril.export.request import ExportError

MARKER = "<__media__>"
MOST_TOKENS = 4096
"""Tokens of a distribution that the runtime returns; the rest of a larger vocabulary counts as one token."""
OLDEST = (2026, 10)


def runtime_version() -> str:
    """Return the version of xllamacpp. Raises ExportError if there is none, or one that was never tested."""
    try:
        found = version("xllamacpp")
    except PackageNotFoundError as e:
        raise ExportError(f"xllamacpp, which runs the check, is missing. {INSTALL} Or give --no-check.") from e
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ExportError(f"xllamacpp: expected version {oldest} or newer, got {found}. Run pip install -U xllamacpp.")
    return found


@dataclass(frozen=True)
class Reply:
    """One answer of the runtime."""

    text: str
    prompt_tokens: int
    tokens: list[int]
    logprobs: list[tuple[Tensor, Tensor]]
    """For each token that was written: ids int64 [K] and log-probabilities float32 [K], the most probable first."""
    first_token_seconds: float
    tokens_per_second: float | None
    """None below two tokens."""


class Runtime:
    """A server with one slot. Use it as a context manager.

    Args:
        limits: The least and most tokens of an image, or None for the runtime's own.
        context: The largest number of tokens of prompt and answer.

    Raises:
        ExportError: The runtime refuses the files.
    """

    def __init__(
        self, model: Path, mmproj: Path, *, threads: int, context: int, limits: tuple[int, int] | None = None
    ) -> None:
        settings: dict[str, Any] = {"marker": MARKER, "model": str(model), "mmproj": str(mmproj), "threads": threads}
        # The tokens of an image are one batch, because those of some models attend to each other.
        settings |= {"n_ctx": context, "n_batch": context, "n_ubatch": context, "n_parallel": 1, "warmup": False}
        settings |= {"fit_params": False, "use_jinja": True, "port": 0, "cache_ram_mib": 0}
        if limits is not None:
            settings |= {"image_min_tokens": limits[0], "image_max_tokens": limits[1]}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        command = [sys.executable, str(Path(__file__).with_name("llama_server.py")), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        assert self._process.stdout is not None
        lines = iter(self._process.stdout.readline, b"")
        address = next((line for raw in lines if (line := raw.decode().strip()).startswith("http")), "")
        if not address:
            message = self._last_lines()
            self.close()
            raise ExportError(f"{model}: expected files that llama.cpp can load, got its refusal: {message}")
        self._client = httpx.Client(base_url=address, timeout=None)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def peak_memory(self) -> int | None:
        """Return the largest memory of the process so far in bytes, or None where the system does not say."""
        path = Path(f"/proc/{self._process.pid}/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", path.read_text()) if path.exists() else None
        return int(found[1]) * 1024 if found else None

    def complete(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        max_tokens: int,
        *,
        forced: Sequence[int] | None = None,
        vocab_size: int = 0,
    ) -> Reply:
        """Answer greedily.

        Args:
            prompt: The rendered chat with ``MARKER`` for each image.
            forced: Write these tokens, after which the answer ends. Distributions are those before tokens are forced.
            vocab_size: Return the distributions too.
        """
        body: dict[str, Any] = {
            "prompt": {"prompt_string": prompt, "multimodal_data": [_png(image) for image in images]},
            "n_predict": max_tokens,
            "temperature": 0.0,
            "return_tokens": True,
            "cache_prompt": forced is not None,
            "n_probs": min(vocab_size, MOST_TOKENS),
        }
        if forced:
            body["grammar"] = "root ::= " + " ".join(f"<[{token}]>" for token in forced)
        data = self._post("/completion", body)
        times = data["timings"]
        count, seconds = times["predicted_n"], times["predicted_ms"] / 1000
        # The time of the first token is in prompt_ms, the others are in predicted_ms.
        speed = (count - 1) / seconds if count > 1 and seconds > 0 else None
        rows = [row["top_logprobs"] for row in data.get("completion_probabilities", [])]
        distributions = [
            (torch.tensor([t["id"] for t in row]), torch.tensor([max(t["logprob"], -1e4) for t in row])) for row in rows
        ]
        first = times["prompt_ms"] / 1000
        return Reply(data["content"], data["tokens_evaluated"], data["tokens"], distributions, first, speed)

    def chat_prompt_tokens(self, messages: list[dict[str, Any]], images: Sequence[Image.Image]) -> int:
        """Return the tokens of a prompt as the chat endpoint writes it, which applies the chat template itself."""
        waiting = iter(images)

        def part(content: dict[str, Any]) -> dict[str, Any]:
            if content["type"] != "image":
                return content
            return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(next(waiting))}"}}

        chat = [{**m, "content": [part(c) for c in m["content"]]} for m in messages]
        body = {"messages": chat, "max_tokens": 1, "temperature": 0.0, "cache_prompt": False}
        return int(self._post("/v1/chat/completions", body)["usage"]["prompt_tokens"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self._client.post(path, json=body)
            data = response.json()
        except (httpx.HTTPError, ValueError) as e:
            raise ExportError(f"the runtime gave no answer ({e!r}); its last lines are: {self._last_lines()}") from e
        if response.status_code != 200:
            raise ExportError(f"the runtime refuses a request: {str(data)[:300]}")
        return data

    def _last_lines(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        telling = [line for line in lines if re.search(r"error|fail|assert", line, re.IGNORECASE)] or lines
        return " | ".join(telling[-3:])[-600:] or "(nothing)"


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG", compress_level=1)
    return base64.b64encode(data.getvalue()).decode()


def kl_divergence(original: Tensor, ids: Tensor, logprobs: Tensor) -> float:
    """Return KL(original || other) in nats.

    Tokens that the other distribution does not name count as one, which makes the result a lower bound. It is exact
    where the other distribution names all of them.

    Args:
        original: log-probabilities, float32 [V].
        ids: int64 [K], the tokens that the other distribution names.
        logprobs: float32 [K], their log-probabilities.
    """
    p, q = original.double().exp(), logprobs.double()
    named = p[ids]
    total = float((named * (original[ids].double() - q)).sum())
    if len(ids) < len(original):
        rest_p, rest_q = max(1.0 - float(named.sum()), 0.0), max(1.0 - float(q.exp().sum()), 1e-12)
        total += rest_p * (math.log(rest_p) - math.log(rest_q)) if rest_p > 1e-12 else 0.0
    return max(total, 0.0)
