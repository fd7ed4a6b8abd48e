"""Settings of all tests: the modules of tests/support are importable, and nothing is fetched from the hub."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The background jobs of a shell script ignore Ctrl-C. Commands that tests start and interrupt would inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

_LONGEST = [
    Path(__file__).parent / name
    for name in (
        "test_end_to_end.py",
        "playground/test_demo.py",
        "playground/test_study_run.py",
        "training/test_resume_sharded.py",
        "training/test_sharding.py",
        "training/test_sft.py",
        "test_wheel.py",
        "training/test_two_processes.py",
        "training/test_resume.py",
        "models/test_stage_memory.py",
    )
]
assert all(path.is_file() for path in _LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that no worker is left with one of them when the others have ended."""
    items.sort(key=lambda item: _LONGEST.index(item.path) if item.path in _LONGEST else len(_LONGEST))


_TEXTS = [
    "Which colour is the square? Look at and at. Which colour has the first square? Say the word red green blue yellow.",
    "I look at the square. Its colour is black. The answer is red. Answer: blue",
]


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random Qwen2.5-VL."""
    from openril.testing.tiny_models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "qwen", "qwen2_5_vl", texts=_TEXTS, hidden_size=32)


@pytest.fixture(scope="session")
def tiny_internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random InternVL with a unigram tokenizer."""
    from openril.testing.tiny_models import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "internvl"
    return build_tiny_model(folder, "internvl", texts=_TEXTS, tokenizer="unigram", hidden_size=32, seed=1)


@pytest.fixture(scope="session")
def tiny_llava_onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random LLaVA-OneVision. One image becomes up to five tiles, two images one tile each."""
    from openril.testing.tiny_models import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "llava_onevision"
    return build_tiny_model(folder, "llava_onevision", texts=_TEXTS, hidden_size=32, tile_size=28, seed=2)


@pytest.fixture(scope="session")
def tiny_smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random SmolVLM, which splits every image into three or five tiles."""
    pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    from openril.testing.tiny_models import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "smolvlm"
    return build_tiny_model(folder, "smolvlm", texts=_TEXTS, hidden_size=32, seed=3)


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random Qwen3-VL."""
    from openril.testing.tiny_models import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "qwen3_vl"
    return build_tiny_model(folder, "qwen3_vl", texts=_TEXTS, hidden_size=32, seed=4)


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random Gemma 3, whose sliding window is shorter than any prompt."""
    from openril.testing.tiny_models import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "gemma3"
    return build_tiny_model(folder, "gemma3", texts=_TEXTS, hidden_size=32, seed=5)


@pytest.fixture(scope="session")
def tiny_gemma3_full_attention(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without sliding windows. The tokens of an image still see all of it, which its configuration does not say."""
    folder = tmp_path_factory.mktemp("models") / "gemma3_full_attention"
    shutil.copytree(tiny_gemma3, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention"] * config["text_config"]["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(
    params=["tiny_qwen", "tiny_internvl", "tiny_llava_onevision", "tiny_smolvlm", "tiny_qwen3_vl", "tiny_gemma3"]
)
def tiny_family(request: pytest.FixtureRequest) -> Path:
    """Checkpoint folder of each supported family."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["qwen2_5_vl", "internvl"])
def tiny_student(request: pytest.FixtureRequest, tiny_qwen: Path, tiny_internvl: Path) -> Path:
    """Checkpoint folder of each of two architectures."""
    return tiny_qwen if request.param == "qwen2_5_vl" else tiny_internvl
