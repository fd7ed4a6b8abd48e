"""The process that builds random checkpoints, and measures the peaks of matrix products and of memory bandwidth."""

from __future__ import annotations

import itertools
import json
import os
import platform
from importlib.metadata import version
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch

from openril._version import __version__
from openril.benchmarking.inputs import TEXT
from openril.benchmarking.measuring import Stopwatch
from openril.benchmarking.shapes import MODELS, ModelSize
from openril.benchmarking.worker import next_command
from openril.discriminator.prompt import SYSTEM, USER
from openril.hf import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from openril.testing.tiny_models import build_tiny_model


def serve(pipe: Pipe, device: str) -> None:
    """Answer ("build", dtype, folder, model name) with None, and ("limits", dtype) with the peaks, until ``Finished``."""
    limits: Limits | None = None
    pipe.send(about(device))
    while True:
        task, name, *rest = next_command(pipe)
        dtype = getattr(torch, name)
        if task == "build":
            build_checkpoint(rest[0], MODELS[rest[1]], dtype=dtype, device=device)
            if device == "cuda":
                torch.cuda.empty_cache()
            pipe.send(None)
        else:
            if limits is None or limits.dtype != dtype:
                limits = Limits(device, dtype)
            pipe.send(limits.measure())


class Limits:
    """Measure peaks on request, between the turns of the contenders."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.watch = Stopwatch(device)
        self.dtype = dtype
        sizes = (2048, 4096, 8192) if device == "cuda" else (768, 1024, 2048)
        generator = torch.Generator(device).manual_seed(0)
        self.matrices = [torch.randn(n, n, device=device, dtype=dtype, generator=generator) for n in sizes]
        numbers = (1 << 28) // 4  # far beyond any cache
        self.source, self.other = (torch.ones(numbers, device=device) for _ in range(2))
        self.target = torch.empty(numbers, device=device)

    def measure(self, repeats: int = 2) -> dict[str, float]:
        """Return ``matmul_flops`` (operations per second of the fastest square product), ``matmul_flops_per_cpu_second``
        (of processor time) and ``bandwidth`` (bytes per second, the faster of copy and triad)."""
        best = best_of_cpu = 0.0
        for matrix in self.matrices:
            n = matrix.shape[0]
            out = matrix @ matrix
            for _ in range(repeats):
                started = self.watch.mark()
                torch.matmul(matrix, matrix, out=out)
                seconds, cpu_seconds = self.watch.since(started)
                best = max(best, 2 * n**3 / seconds)
                best_of_cpu = max(best_of_cpu, 2 * n**3 / cpu_seconds)
        moved = 0.0
        size = self.source.numel() * self.source.element_size()
        for _ in range(repeats):
            started = self.watch.mark()
            self.target.copy_(self.source)
            moved = max(moved, 2 * size / self.watch.since(started)[0])
            started = self.watch.mark()
            torch.add(self.source, self.other, alpha=3.0, out=self.target)
            moved = max(moved, 3 * size / self.watch.since(started)[0])
        return {"matmul_flops": best, "matmul_flops_per_cpu_second": best_of_cpu, "bandwidth": moved}


def about(device: str) -> dict[str, Any]:
    """Describe this machine and the versions of the packages that matter."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    machine = {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    packages = ("torch", "transformers", "trl", "accelerate", "datasets")
    versions = {"python": platform.python_version(), "openril": __version__, **{p: version(p) for p in packages}}
    return {"machine": machine | {"system": platform.platform()}, "versions": versions}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pseudo_words(count: int) -> list[str]:
    """Return ``count`` different words of three syllables."""
    syllables = [c + v for c in "bcdfghjklmnpqrstvwyz" for v in "aeiou"]
    assert count <= len(syllables) ** 3
    return list(map("".join, itertools.islice(itertools.product(syllables, repeat=3), count)))


def build_checkpoint(folder: Path, size: ModelSize, *, dtype: torch.dtype, device: str, seed: int = 0) -> None:
    """Write a random model of the real Qwen2.5-VL classes and its processor to ``folder`` as an ordinary checkpoint.

    Every id below ``size.vocab`` is a word of the tokenizer, so that any sample can be decoded to text and encoded again
    with about the same length. The weights are initialized on ``device``.
    """
    # The smallest model of the family provides processor, chat template and special tokens. Its weights are replaced.
    build_tiny_model(
        folder,
        "qwen2_5_vl",
        # The words of the prompt come twice, because the most frequent words always enter the vocabulary.
        texts=[*2 * [TEXT, SYSTEM, USER, "user\nassistant\n"], " " + " ".join(pseudo_words(size.vocab))],
        tokenizer="unigram",
        vocab_size=size.vocab,
        hidden_size=16,
        num_layers=1,
        vision_hidden_size=32,
        vision_layers=1,
        max_pixels=16384 * 28 * 28,
    )
    small = json.loads((folder / "config.json").read_text())
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(model_config(size, small), dtype=dtype)
    model.generation_config.eos_token_id = small["text_config"]["eos_token_id"]
    model.generation_config.pad_token_id = small["text_config"]["pad_token_id"]
    model.save_pretrained(folder)


def model_config(size: ModelSize, small: dict[str, Any]) -> Qwen2_5_VLConfig:
    """Return the configuration of a size. Its token ids come from ``small``, the configuration saved with the tokenizer."""
    height = 3 * size.head_dim // 16  # M-RoPE: time, height and width in the real models' ratio 2 : 3 : 3
    text = small["text_config"]
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": text["rope_parameters"]
            | {"mrope_section": [size.head_dim // 2 - 2 * height, height, height]},
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            **{k: text[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": list(size.vision_full),
        },
        tie_word_embeddings=True,
        **{k: v for k, v in small.items() if k.endswith("_token_id") and k not in text},
    )
