"""``python -m playground.judge --out FOLDER``: train the judge of the fourteen skills, or measure one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openril.errors import DataError
from openril.hf import AutoModelForCausalLM, AutoTokenizer
from openril.storage import atomic_path, stable_hash, write_json
from playground.judge.cases import make_cases, world_questions
from playground.judge.measure import measure, show
from playground.judge.model import build_judge
from playground.judge.training import DRILLS, fit, make_drills
from playground.models.plan import EMBEDDINGS
from playground.runner import exit_code

NUM_QUESTIONS = 14000
"""Number of training questions that the responses are about."""
NUM_RESPONSES = 48000
"""Largest number of training responses; more steps use them again."""


@dataclass
class Settings:
    """Train a judge for the fourteen skills and measure how often it agrees with the exact rule."""

    out: Path | None = None
    """Folder to write. A folder that holds a judge is left alone. A run that is stopped leaves nothing."""
    measure: Path | None = None
    """Folder of a judge to measure instead."""
    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 32
    """Responses a step."""
    learning_rate: float = 2e-3
    """Learning rate of AdamW, which trains the embeddings. The layers' matrices are trained by Muon."""
    hidden_size: int = 128
    """Width of the model."""
    num_layers: int = 3
    """Number of layers."""
    num_verdicts: int = 2800
    """Number of held-out verdicts to measure on."""
    seed: int = 0
    """Seed of weights and responses."""


def train_judge(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a judge and write it to ``settings.out`` in bfloat16, with ``agreement.json``.

    Returns:
        The content of ``agreement.json``: what ``measure`` returns, with ``training_seconds`` and ``bytes``.
    """
    assert settings.out is not None
    started = time.perf_counter()
    seed = settings.seed
    number = min(NUM_RESPONSES, settings.steps * settings.batch_size)
    cases = make_cases(world_questions("train", NUM_QUESTIONS, seed), number, stable_hash("learn", seed))
    say(f"judge: {number} responses in {time.perf_counter() - started:.0f} s")
    with atomic_path(settings.out) as temporary:
        texts = [text for case in cases[:4000] for text in (case.messages()[1]["content"], case.reply)]
        build_judge(temporary, texts, hidden_size=settings.hidden_size, num_layers=settings.num_layers, seed=seed)
        tokenizer = AutoTokenizer.from_pretrained(temporary)
        model: Any = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(EMBEDDINGS)
        drills = make_drills(cases, settings.steps * DRILLS, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fit(model, tokenizer, cases, drills, settings.steps, settings.batch_size, settings.learning_rate, say)
        seconds = time.perf_counter() - started
        model.to(torch.bfloat16).save_pretrained(temporary)
        result = measure(temporary, settings.num_verdicts, seed)
        size = (temporary / "model.safetensors").stat().st_size
        result |= {"training_seconds": round(seconds, 1), "bytes": size}
        write_json(temporary / "agreement.json", result)
    return result


def run(settings: Settings, say: Callable[[str], None]) -> int:
    """Do what the settings ask for, and return the exit code."""
    if (settings.out is None) == (settings.measure is None):
        raise DataError("expected either --out (a folder for a new judge) or --measure (the folder of a judge)")
    if settings.measure is not None:
        if not (settings.measure / "config.json").is_file():
            raise DataError(f"{settings.measure} holds no judge (no config.json). Train one with --out.")
        show(measure(settings.measure, settings.num_verdicts, settings.seed), say)
        return 0
    assert settings.out is not None
    if (settings.out / "agreement.json").is_file():
        say(f"judge: already trained in {settings.out}")
        return 0
    if settings.out.exists() and any(settings.out.iterdir()):
        raise DataError(f"{settings.out} holds other files, which would be lost. Name a new folder.")
    result = train_judge(settings, say)
    show(result, say)
    say(f"judge: {settings.out}, {result['bytes'] / 1e6:.2f} MB, trained in {result['training_seconds']:.0f} s")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.judge")
    return exit_code("judge", lambda: run(settings, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
