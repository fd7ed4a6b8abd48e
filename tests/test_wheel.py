"""The built wheel is the whole library: it is small, holds nothing of the laboratory, and works without the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 1_500_000
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".npz", ".npy")

MAKE_INPUTS = """
import json
from PIL import Image
import openril

colors = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
rows = []
for i in range(6):
    name = list(colors)[i % 3]
    Image.new("RGB", (56, 56), colors[name]).save(f"{i}.png")
    rows.append({"id": f"q{i}", "images": [f"{i}.png"], "question": "Which color is the square?", "answer": name})
for file, part in (("train.jsonl", rows[:4]), ("validation.jsonl", rows[4:])):
    open(file, "w").write("".join(json.dumps(row) + "\\n" for row in part))
texts = ["Which color is the square? red green blue"]
openril.build_tiny_model("student", "qwen2_5_vl", texts=texts, hidden_size=32)
openril.build_tiny_model("teacher", "internvl", texts=texts, tokenizer="unigram", hidden_size=32, seed=1)
"""

RECIPE = """
run_dir: run
data: {train: [train.jsonl], validation: [validation.jsonl]}
student: {model: ./student, dtype: float32}
teachers:
  - {name: a, model_path: ./teacher}
collect: {num_responses: 2, max_completion_length: 6}
sft: {batch_size: 2, micro_batch_size: 2, max_steps: 1}
discriminator: {pretraining: {questions_per_step: 2}}
rewards: {answer: {kind: rules}}
train:
  num_generations: 2
  questions_per_step: 2
  max_steps: 1
  max_completion_length: 6
  precision: float32
eval: {max_completion_length: 6}
"""


def run(*command: str | Path, folder: Path) -> str:
    """Run a command in ``folder`` without any setting that could lead back to the checkout, and return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout so that no earlier build's files can get into it."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed in this environment, so the wheel cannot be built")
    folder = tmp_path_factory.mktemp("wheel")

    def left_out(directory: str, names: list[str]) -> list[str]:
        at_root = Path(directory) == ROOT
        hidden = [
            n for n in names if at_root and (n.startswith(".") or n in ("runs", "models", "build", "dist", "site"))
        ]
        return [*hidden, *(n for n in names if n == "__pycache__" or n.endswith(".egg-info"))]

    shutil.copytree(ROOT, folder / "checkout", ignore=left_out)
    build = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder)
    run(sys.executable, *build, folder=folder / "checkout")
    [path] = folder.glob("openril-*.whl")
    return path


def test_wheel_is_small_and_holds_the_library_alone(wheel: Path):
    assert wheel.stat().st_size < MAX_BYTES
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"openril"}
    assert [name for name in names if "playground" in name or name.endswith(WEIGHTS)] == []
    packed = {name for name in names if name.startswith("openril/")}
    kinds = (".py", ".pyi", ".jinja", ".html", ".css", ".js")
    files = {p for p in (ROOT / "src" / "openril").rglob("*") if p.suffix in kinds or p.name == "py.typed"}
    assert {str(p.relative_to(ROOT / "src")) for p in files} <= packed and len({p.suffix for p in files}) == 7


@pytest.mark.slow
def test_wheel_runs_from_an_empty_folder(wheel: Path, tmp_path: Path):
    """Install the wheel into a new environment that borrows only its dependencies, and run the whole method there."""
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", venv, folder=tmp_path)
    python = venv / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        folder=tmp_path,
    )
    # Lines of a .pth file extend sys.path, but .pth files in those folders are not read. The editable installation
    # of the checkout, which is such a file, is therefore not visible.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    borrowed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")

    found = Path(run(python, "-c", "import openril; print(openril.__file__)", folder=work).strip())
    assert found.is_relative_to(venv)
    find = "import importlib.util as u; print(u.find_spec('playground'))"
    assert run(python, "-c", find, folder=work).strip() == "None"

    ril = venv / "bin" / "ril"
    assert "ril COMMAND RECIPE" in run(ril, "--help", folder=work)
    run(python, "-c", MAKE_INPUTS, folder=work)
    (work / "my.yaml").write_text(RECIPE)
    run(ril, "check", "my.yaml", folder=work)
    run(ril, "run", "my.yaml", folder=work)
    assert (work / "run" / "student" / "model.safetensors").is_file()
    assert (work / "run" / "metrics.jsonl").read_text().count("\n") == 1
