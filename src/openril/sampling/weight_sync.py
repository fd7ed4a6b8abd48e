"""Give vLLM servers new weights, make them drop what they computed with the old ones, and check what they hold.

``student.sampler.sync`` selects the route. With ``file``, servers load a checkpoint folder; with ``adapter`` they load
the starting student once and then adapters; with ``nccl`` and ``ipc`` weights go from GPU to GPU (``weight_transfer``).

Each sync has a version, a text that no other sync has. It is sent after the weights and read again after completions,
so that samples of a server that was restarted, or given weights by another process, are noticed.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from openril.endpoints import is_loopback, proxy_note, split_base_url
from openril.errors import EndpointError
from openril.recipe.schema import SamplerConfig
from openril.sampling.weight_transfer import OnMainProcess, Transfer, chunks, make_transfer

WHAT = "student.sampler"
TRANSFER_VERSIONS = ((0, 30), (0, 32))
"""The first and the last version of vLLM whose weight-transfer endpoints were read. The last one has been run."""
_DEV_MODE = "Start vllm serve with VLLM_SERVER_DEV_MODE=1 in the environment"


class StaleWeightsError(EndpointError):
    """A server computes with other weights than those of the last sync."""


class WeightSync:
    """The weights of the servers of ``student.sampler``.

    ``version`` is that of the last sync, or "" before the first; ``unversioned`` are servers that keep none.
    """

    def __init__(self, settings: SamplerConfig, warn: Callable[[str], None] = lambda message: None) -> None:
        self.settings = settings
        self.urls = [split_base_url(url)[0] for url in settings.base_urls]
        self.warn = warn
        self.version = ""
        self.transfer: Transfer | None = None
        self._servers: dict[str, httpx.Client] = {}
        self._tensors: dict[str, dict[str, tuple[int, ...]]] = {}
        self.unversioned: set[str] = set()
        self._adapter = ""

    # Routes

    def load(self, folder: Path, version: str) -> None:
        """Make every server load the checkpoint in ``folder``.

        Raises:
            EndpointError: A server refuses, or the checkpoint holds other tensors than the one the server was started
                with; those that are missing would silently keep their old values.
        """
        folder = folder.resolve()
        sent = tensor_shapes(folder)
        if not sent:
            raise EndpointError(f"{WHAT}: {folder} holds no safetensors file to load weights from")
        for url in self.urls:
            self._check_tensors(url, sent, str(folder))
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self.post(url, "/collective_rpc", f"loading {folder}", body)
            self._settle(url, version)
        self.version, self._adapter = version, ""

    def adapter_name(self, version: str) -> str:
        """Return the name that requests for the adapter of a sync give as their model."""
        return f"{self.settings.model}-{version}"

    def load_adapter(self, folder: Path, version: str) -> None:
        """Make every server load a LoRA adapter, and unload the one before.

        The servers must hold the adapter's base model, given by ``load``.
        """
        name, before = self.adapter_name(version), self._adapter
        fix = "Start vllm serve with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in the environment"
        for url in self.urls:
            if before:
                self.post(url, "/v1/unload_lora_adapter", "unloading an adapter", {"lora_name": before}, fix)
            body = {"lora_name": name, "lora_path": str(folder.resolve())}
            self.post(url, "/v1/load_lora_adapter", "loading an adapter", body, fix)
            self._settle(url, version)
        self.version, self._adapter = version, name

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: str, on_main: OnMainProcess) -> None:
        """Send tensors, named as in checkpoint files, from GPU to GPU. Every process must call this.

        Args:
            on_main: Runs a function in the main process, and raises its EndpointError in all of them.
        """
        if self.transfer is None:
            self.transfer = make_transfer(self.settings, self)
            self._on_each(on_main, self._check_transfer_version)
            on_main(self.transfer.connect)
        sent: dict[str, tuple[int, ...]] = {}

        def finish(url: str) -> None:
            self._check_tensors(url, sent, "the student")
            self.post(url, "/finish_weight_update", "ending a weight update", {"weight_version": version})
            self._settle(url, version)

        self._on_each(on_main, lambda url: self.post(url, "/start_weight_update", "starting a weight update"))
        for chunk in chunks(tensors, self.transfer.device):
            sent |= {name: tuple(tensor.shape) for name, tensor in chunk}
            self.transfer.send(chunk, on_main)
        self._on_each(on_main, finish)
        self.version, self._adapter = version, ""

    def _on_each(self, on_main: OnMainProcess, action: Callable[[str], Any]) -> None:
        on_main(lambda: [action(url) for url in self.urls])

    # Checks

    def check(self, url: str) -> None:
        """Raise StaleWeightsError if the server at ``url`` does not hold the weights of the last sync.

        Called after a completion has arrived. vLLM returns no version with chat completions, so it is read separately:
        a version is never used twice, so equality now means that the completion came from these weights.
        """
        if not self.version or url in self.unversioned:
            return
        found = self.get(url, "/weight_info").get("weight_version")
        if found != self.version:
            raise StaleWeightsError(
                f"{WHAT}: {url}: expected the weights with version {self.version!r}, got {found!r}: the server was"
                " restarted, or another process has given it weights. Run the same command again to continue."
            )

    def _settle(self, url: str, version: str) -> None:
        """Empty the caches of a server that has new weights, and set their version."""
        # Workers empty their image caches when they load. These empty the front end's too, which relies on them.
        for store in ("mm", "encoder"):
            self.post(url, f"/reset_{store}_cache", f"emptying its {store} cache")
        for _ in range(50):
            answer = self.post(url, "/reset_prefix_cache", "emptying its prefix cache")
            if _json(answer).get("success", True):
                break
            time.sleep(0.1)  # a canceled request may still hold blocks
        else:
            raise EndpointError(
                f"{WHAT}: {url} cannot empty its prefix cache, which holds states of the old weights. Stop its other"
                " users."
            )
        answer = self._request("POST", url, "/update_weight_version", {"new_version": version})
        if answer.status_code != 404:
            checked(answer, url, "setting the version of its weights")
        elif url not in self.unversioned:
            self.unversioned.add(url)
            self.warn(
                f"{WHAT}: {url} has no endpoint /update_weight_version (vLLM before 0.27): a restart of the server"
                " between two weight syncs would not be noticed."
            )

    def _check_transfer_version(self, url: str) -> None:
        version, route = str(self.get(url, "/version").get("version")), self.settings.sync
        numbers = re.match(r"(\d+)\.(\d+)", version)
        found = (int(numbers[1]), int(numbers[2])) if numbers else TRANSFER_VERSIONS[1]  # a build from source
        if found < TRANSFER_VERSIONS[0]:
            raise EndpointError(
                f"{WHAT}.sync: {route} needs vLLM 0.30 or newer, got {version} at {url}. Update it, or set sync: file."
            )
        if found > TRANSFER_VERSIONS[1]:
            self.warn(f"{WHAT}.sync: {url} runs vLLM {version}; {route} was written for 0.30 to 0.32.")

    def _check_tensors(self, url: str, sent: dict[str, tuple[int, ...]], what: str) -> None:
        if url not in self._tensors:
            models = self.get(url, "/v1/models")["data"]
            roots = [m.get("root") for m in models if m.get("id") == self.settings.model]
            if not roots:
                served = ", ".join(str(m.get("id")) for m in models)
                raise EndpointError(f"{WHAT}.model: expected a model of {url} ({served}), got {self.settings.model!r}")
            # A hub name or a folder of another machine cannot be read; then only verify() checks the weights.
            self._tensors[url] = tensor_shapes(Path(str(roots[0])))
        if not (expected := self._tensors[url]):
            return
        lacking, extra = shape_differences(expected, sent)
        for verb, names in (("lacks", lacking), ("adds", extra)):
            if names:
                raise EndpointError(
                    f"{WHAT}: {what} {verb} {len(names)} tensors compared with the checkpoint of {url}"
                    f" ({', '.join(names[:3])}, ...). Start the server with the checkpoint that the run starts from."
                )

    # Requests

    def post(self, url: str, path: str, what: str, body: dict[str, Any] | None = None, fix: str = "") -> Any:
        """Post to a server and return its answer. Raises EndpointError, with ``what`` and ``fix``, for any but a 200."""
        return checked(self._request("POST", url, path, body), url, what, fix)

    def get(self, url: str, path: str) -> dict[str, Any]:
        """Return the JSON object that a server has at ``path``. Raises EndpointError if there is none."""
        return _json(checked(self._request("GET", url, path), url, path))

    def _request(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        if url not in self._servers:
            key = os.environ.get(self.settings.api_key_env, "").strip() if self.settings.api_key_env else ""
            self._servers[url] = httpx.Client(
                timeout=self.settings.timeout,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                trust_env=not is_loopback(url),
                # A kept connection may be closed by the server just when it is used again.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        try:
            return self._servers[url].request(method, f"{url.rstrip('/').removesuffix('/v1')}{path}", json=body)
        except httpx.HTTPError as e:
            reason = str(e) or type(e).__name__
            raise EndpointError(f"{WHAT}: {method} {path} to {url}{proxy_note(url)} failed ({reason})") from e

    def close(self) -> None:
        """Close connections. Servers may be given weights by another process afterwards."""
        if self.transfer is not None:
            self.transfer.close()
        for client in self._servers.values():
            client.close()


def new_version() -> str:
    """Return a version for the next sync that no other has."""
    return uuid.uuid4().hex[:12]


def folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each tensor of a folder's safetensors files, in CPU memory."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a folder's safetensors files by name."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def shape_differences(old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """Return the tensors of ``old`` that ``new`` lacks, and those that it adds.

    A renamed tensor counts as present if its shape is, because libraries rename tensors when they save. An
    ``lm_head.weight`` in only one of the two is tied to the word embeddings in the other.
    """
    lacking = {k: v for k, v in old.items() if new.get(k) != v and not k.endswith("lm_head.weight")}
    extra = {k: v for k, v in new.items() if old.get(k) != v and not k.endswith("lm_head.weight")}
    renamed = Counter(lacking.values()) & Counter(extra.values())
    for tensors in (lacking, extra):
        for shape, count in renamed.items():
            for name in [k for k, v in tensors.items() if v == shape][:count]:
                del tensors[name]
    return sorted(lacking), sorted(extra)


def checked(answer: Any, url: str, what: str, fix: str = "") -> Any:
    """Return the answer to a request, or raise EndpointError for any status but 200."""
    if answer.status_code == 404:
        raise EndpointError(f"{WHAT}: {url} does not support {what}. {fix or _DEV_MODE}.")
    if answer.status_code != 200:
        sent = answer.text[:300].strip().rstrip(".")
        raise EndpointError(f"{WHAT}: {url} answered {answer.status_code} to {what}: {sent}.{f' {fix}.' * bool(fix)}")
    return answer


def _json(answer: Any) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise EndpointError(f"{WHAT}: {answer.request.url}: expected a JSON object, got {answer.text[:300]!r}")
    return value
