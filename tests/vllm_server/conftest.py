"""vLLM servers for the tests marked ``vllm``: one environment, one server after the other, shared by all tests.

A start takes half a minute of one core. The servers start in the background, and tests that need only the first of them
run in the meantime.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from support.chat_model import chat_model


@pytest.fixture(scope="session")
def vlm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL. vLLM's CPU attention needs heads of at least 32."""
    from openril.testing.tiny_models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "qwen", "qwen2_5_vl", num_heads=2)


@pytest.fixture(scope="session")
def internvl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from openril.testing.tiny_models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "internvl", "internvl", num_heads=2, seed=1)


def server_of(
    checkpoint: Path,
    log: Path,
    *,
    options: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    **settings: Any,
):
    """Return a server whose engine computes in its own process, on any core.

    By default, vLLM starts a third process for this, binds it to one core, which is the same for all servers, and the
    two processes wait for each other in busy loops.
    """
    from vllm_cpu_server import VLLMServer

    shared = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    options = ("--distributed-executor-backend", "uni", *options)
    return VLLMServer(checkpoint, log=log, options=options, environment=shared | (environment or {}), **settings)


@pytest.fixture(scope="session")
def make_server() -> Callable[..., Any]:
    """Makes a server with the settings of the shared ones."""
    return server_of


@pytest.fixture(scope="session")
def _servers(
    vlm_checkpoint: Path, internvl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future]]:
    logs = tmp_path_factory.mktemp("vllm")
    sync = ["--enable-lora", "--max-lora-rank", "8", "--weight-transfer-config", '{"backend": "nccl"}']
    sync += ["--worker-extension-cls", "support.cpu_transfer.Extension"]
    sync_environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # In the order in which the tests need them.
    servers = {
        "vlm": server_of(vlm_checkpoint, logs / "vlm.log", name="student", dev_mode=True),
        "sync": server_of(
            vlm_checkpoint,
            logs / "sync.log",
            name="student",
            dev_mode=True,
            options=tuple(sync),
            environment=sync_environment,
        ),
        "judge": server_of(chat_model(), logs / "judge.log", name="judge", dtype="bfloat16"),
        "internvl": server_of(internvl_checkpoint, logs / "internvl.log", name="student", dev_mode=True),
    }

    def answering(name: str):
        server = servers[name].start().wait(timeout=600)
        print(f"\nvllm serve, {name}: answered after {server.start_seconds:.0f} s")
        return server

    with ThreadPoolExecutor(1) as background:
        try:
            yield {name: background.submit(answering, name) for name in servers}
        finally:
            background.shutdown(wait=False, cancel_futures=True)
            for server in servers.values():
                server.stop()


@pytest.fixture(scope="session")
def vlm_server(_servers):
    """Serves ``vlm_checkpoint`` as "student". Tests that change its weights or stop it restore it."""
    return _servers["vlm"].result()


@pytest.fixture(scope="session")
def sync_server(_servers):
    """Serves ``vlm_checkpoint`` as "student", for adapters and for weight transfers on the CPU (support/cpu_transfer.py)."""
    return _servers["sync"].result()


@pytest.fixture(scope="session")
def internvl_server(_servers):
    return _servers["internvl"].result()


@pytest.fixture(scope="session")
def judge_server(_servers):
    """Serves the chat model as "judge", without the endpoints that sync weights."""
    return _servers["judge"].result()
