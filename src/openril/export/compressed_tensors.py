"""`--to compressed-tensors`: quantized weights for vLLM, by llm-compressor in an environment that ``--python`` names.

llm-compressor needs its own versions of torch and transformers, so ``compressed_tensors_tool.py`` runs in that
environment: it quantizes the linear layers of the language model, and computes with the result for the check.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openril.checkpoint_files import weight_files
from openril.export import compressed_tensors_tool
from openril.export.fidelity import answer_logprobs
from openril.export.folder import is_written, only_type, written
from openril.export.original import conclude, load_original
from openril.export.request import ExportError, ExportRequest
from openril.export.weights import stored_weights
from openril.models.loading import checked, load_model, load_processor, names_in_model
from openril.storage import write_text

SCHEMES = {"fp8": "FP8_DYNAMIC", "w4a16": "W4A16"}
TYPES = tuple(SCHEMES)
LIMITS = {"fp8": 1e-2}
"""Type -> the largest mean KL that passes, in nats. w4a16 is held to --max-kl only."""

INSTALL = "Make one with: python -m venv .venv-quant && .venv-quant/bin/pip install llmcompressor==0.14.0.1"
RUN = """# {scheme} in compressed-tensors

- vLLM: `vllm serve {name}` (on a CPU with `--dtype bfloat16`). The processor and chat template are
  those of the checkpoint.
- The linear layers of the language model are quantized from their weights alone, without calibration data. The vision
  tower, the projector, the embedding and the output layer keep the checkpoint's values.
- Made with {tools}.
"""


def export(request: ExportRequest) -> bool:
    """Quantize, compare what must not have changed with the checkpoint, and check the distributions of answers."""
    kind = only_type(request, TYPES)
    checked(request.checkpoint, "CHECKPOINT", weights=True)
    tools = versions(request.python)
    if is_written(request):
        request.say(f"{request.out} holds this export already")
    else:
        model: Any = load_model(request.checkpoint, what="CHECKPOINT", meta=True)
        if kind == "w4a16":
            require_widths(model)
        with written(request, {"tools": tools}) as folder:
            run_tool(request.python, "quantize", request.checkpoint, str(folder), SCHEMES[kind])
            load_processor(request.checkpoint, what="CHECKPOINT").save_pretrained(folder)
            quantized, same = compare_weights(model, folder)
            run = RUN.format(scheme=SCHEMES[kind], name=request.out, tools=tools)
            write_text(folder / "RUN.md", run)
        request.say(f"wrote {request.out}: {quantized} layers quantized, {same} weights as in the checkpoint")
    return check(request) if request.check else True


def require_widths(model: Any) -> None:
    """Raise ExportError unless the weights of each layer can be divided into groups of 128."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and _in_language_model(name) and layer.in_features % 128:
            raise ExportError(
                f"--type: expected widths that are multiples of 128 for w4a16, got {layer.in_features} of {name}. Use fp8."
            )


def _in_language_model(name: str) -> bool:
    return "language_model." in name or "text_model." in name


def versions(python: str) -> str:
    """Return the versions of the tools in an interpreter. Raises ExportError if it lacks them."""
    if not python:
        raise ExportError(f"--python: expected the interpreter of an environment with llm-compressor. {INSTALL}")
    code = "import importlib.metadata as m; print(', '.join(f'{p} {m.version(p)}' for p in %r))"
    tools = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    try:
        done = subprocess.run([python, "-c", code % (tools,)], capture_output=True, text=True)
    except OSError as e:
        raise ExportError(f"--python: {python} cannot be run ({e.strerror}). Give the path of an interpreter.") from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ExportError(f"--python: expected llm-compressor in {python}, got {last[:200]!r}. {INSTALL}")
    return done.stdout.strip()


def _command(python: str, *arguments: str) -> list[str]:
    # -P keeps the folder of the tool, which has modules of common names, out of the search path.
    return [python, "-P", str(compressed_tensors_tool.__file__), *arguments]


def run_tool(python: str, *arguments: str) -> None:
    """Run the tool to its end. Raises ExportError with its last lines if it fails."""
    done = subprocess.run(_command(python, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ExportError("--python: llm-compressor failed:\n" + "\n".join(done.stdout.strip().splitlines()[-8:]))


def compare_weights(model: Any, folder: Path) -> tuple[int, int]:
    """Return the numbers of quantized layers and of unchanged weights of an export.

    Args:
        model: The checkpoint, loaded with ``meta=True``.

    Raises:
        ExportError: A weight is missing, has changed without being quantized, or comes from nowhere; or a layer outside of
            the language model is quantized.
    """
    name_of = names_in_model(model, model.state_dict())
    quantized: set[str] = set()
    kept: dict[str, tuple[Path, str]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no dictionary)
                layer, _, leaf = key.rpartition(".")
                packed = leaf != "weight" and leaf.startswith("weight_")
                if packed or opened.get_slice(key).get_dtype().startswith("F8"):
                    quantized.add(name_of(f"{layer}.weight"))
                else:
                    kept[name_of(key)] = (file, key)
    if outside := [n for n in quantized if not _in_language_model(n)]:
        raise ExportError(f"--python: expected layers of the language model to be quantized, got {min(outside)} too.")
    same = 0
    for name, value in stored_weights(model):
        if name in quantized:
            continue
        if name not in kept:
            if name == "lm_head.weight" and model.config.tie_word_embeddings:  # that of the embedding
                continue
            raise ExportError(f"--python: the export lacks the weight {name}.")
        file, key = kept.pop(name)
        with safe_open(file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(key)
        if not torch.equal(found, value.to(found.dtype)):
            raise ExportError(f"--python: expected {name} as in the checkpoint, got other values.")
        same += 1
    if kept or not quantized:
        raise ExportError(f"--python: expected weights of the checkpoint, got {min(kept, default='none quantized')}.")
    return len(quantized), same


class Remote:
    """A model in another interpreter. It is called like one of transformers, and returns logits of the last positions."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, log: Path) -> None:
        self.process, self.folder, self.log = process, folder, log

    def parameters(self) -> Iterator[Tensor]:
        yield torch.empty(0)

    def expect(self, word: str) -> None:
        """Read lines up to a word. Raises ExportError if the process ends before it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        shown = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-8:])
        raise ExportError(f"--python: the export cannot be loaded and run with transformers:\n{shown}")

    def __call__(self, *, logits_to_keep: int, **inputs: Tensor) -> SimpleNamespace:
        assert self.process.stdin is not None
        path = self.folder / "inputs.safetensors"
        save_file({k: v.contiguous() for k, v in inputs.items()} | {"keep": torch.tensor(logits_to_keep)}, path)
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        self.expect("done")
        return SimpleNamespace(logits=load_file(f"{path}.out")["logits"][None])


@contextmanager
def remote(python: str, export: Path) -> Iterator[Remote]:
    """Load an export in another interpreter, and end the process with the block."""
    folder = Path(tempfile.mkdtemp(prefix="ril-export-"))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            _command(python, "logits", str(export)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        model = Remote(process, folder, folder / "log")
        model.expect("ready")
        yield model
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def check(request: ExportRequest) -> bool:
    """Compare the next-token distributions along the checkpoint's answers with those of the reloaded export."""
    versions(request.python)
    original = load_original(request)
    kls, agree = [], 0
    with remote(request.python, request.out) as model:
        for question in original.questions:
            prompt, ids = original.prompts[question.id], original.answers[question.id]["ids"]
            a, b = (answer_logprobs(m, prompt, ids) for m in (original.model, model))
            kls += (a.exp() * (a - b)).sum(-1).tolist()
            agree += int((a.argmax(-1) == b.argmax(-1)).sum())
    sizes = [sum(f.stat().st_size for f in weight_files(p)) for p in (Path(request.checkpoint), request.out)]
    limit = LIMITS.get(request.types[0], request.max_kl)
    return conclude(request, original, kls, limit, same_next_token=agree / len(kls), bytes=sizes)
