"""What every test needs: helpers of tests/support importable, and nothing fetched from the hub."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

_TEXTS = [
    "Which colour is the square? Look at and at. Which colour has the first square? Say the word red green blue yellow.",
    "I look at the square. Its colour is black. The answer is red. Answer: blue",
]


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random Qwen2.5-VL."""
    from openril.models.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "qwen", "qwen2_5_vl", texts=_TEXTS, hidden_size=32)


@pytest.fixture(scope="session")
def tiny_internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random InternVL with another kind of tokenizer."""
    from openril.models.tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "internvl"
    return build_tiny_model(folder, "internvl", texts=_TEXTS, tokenizer="unigram", hidden_size=32, seed=1)


@pytest.fixture(params=["qwen2_5_vl", "internvl"])
def tiny_student(request: pytest.FixtureRequest, tiny_qwen: Path, tiny_internvl: Path) -> Path:
    """Both architectures, one after the other."""
    return tiny_qwen if request.param == "qwen2_5_vl" else tiny_internvl
