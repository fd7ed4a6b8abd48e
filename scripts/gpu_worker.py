"""Do one part of the GPU kit in a separate process: ``python scripts/gpu_worker.py machine|train --json FILE ...``.

scripts/gpu_kit.py starts it. The JSON file is written again after everything that was found out, so that a part which
fails, is killed or runs out of time keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets", "pyarrow", "numpy")
TEACHER = "teacher"
SIZES = {  # questions of a step, G, image tokens, tokens of a response, tokens of a micro-batch
    "micro": (2, 2, 16, 8, 512),
    "qwen2_5_vl_3b": (4, 4, 500, 128, 2048),
}
LORA = {"student.lora.enabled": True}
CHECKPOINTING = {"student.gradient_checkpointing": True}
SWAP = {"train.offload": "swap"}
PART = {"discriminator.freeze": ["vision_tower", "projector", "word_embeddings", "mlp_gate", "mlp_up"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "all weights, with a discriminator": {},
    "all weights, with a discriminator, gradient checkpointing": CHECKPOINTING,
    "all weights, with a discriminator, gradient checkpointing, swap": CHECKPOINTING | SWAP,
    "LoRA, with a discriminator, gradient checkpointing, swap": LORA | CHECKPOINTING | SWAP,
    "LoRA, with a discriminator of which a part trains, gradient checkpointing, swap": LORA
    | CHECKPOINTING
    | SWAP
    | PART,
    "LoRA, without a discriminator": LORA | CHECKPOINTING | SWAP | {"train.algorithm": "dr_grpo"},
}
"""Ways to train, from the one that takes most memory to the one that takes least. The first that fits is used."""


class Report:
    """A dictionary that is on disk after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}

    def put(self, **values: Any) -> None:
        self.values |= values
        path = self.path.with_name(self.path.name + ".new")
        path.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        os.replace(path, self.path)


def say(text: str) -> None:
    print(text, flush=True)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- machine --------------------------------------------------------------------------------------------------------


def machine(flags: argparse.Namespace, report: Report) -> None:
    """Describe the device and the packages, import every module of openril, and measure the device's peaks."""
    import torch

    import openril

    about: dict[str, Any] = {"device": "cpu", "cores": os.cpu_count()}
    if flags.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        about |= {"device": found.name, "gib": found.total_memory / 2**30, "cuda": torch.version.cuda}
        about["compute_capability"] = f"{found.major}.{found.minor}"
    versions = {"python": sys.version.split()[0], **{name: installed(name) for name in PACKAGES}}
    report.put(machine=about, versions=versions)
    say(", ".join(f"{name} {number}" for name, number in versions.items()))
    failed = {}
    names = [module.name for module in pkgutil.walk_packages(openril.__path__, "openril.")]
    for name in names:
        try:
            import_module(name)
        except Exception as e:
            failed[name] = f"{type(e).__name__}: {e}"
    report.put(modules=len(names), modules_that_fail=failed)
    say(f"{len(names) - len(failed)} of {len(names)} modules of openril can be imported")
    from openril.benchmarking.machine import Limits

    limits = Limits(flags.device, torch.bfloat16 if flags.device == "cuda" else torch.float32)
    limits.measure()
    peaks = limits.measure()
    report.put(peaks=peaks)
    say(f"{peaks['matmul_flops'] / 1e12:.2f} TFLOP/s, {peaks['bandwidth'] / 1e9:.0f} GB/s")
    if failed:
        raise SystemExit(
            f"{len(failed)} modules of openril cannot be imported, the first: {next(iter(failed.items()))}"
        )


# ---- train ----------------------------------------------------------------------------------------------------------


def make_checkpoint(flags: argparse.Namespace) -> Path:
    """Write a random model of the real shape and its processor, once for all parts."""
    import torch

    from openril.benchmarking.machine import build_checkpoint
    from openril.benchmarking.shapes import MODELS

    folder = flags.work / flags.model
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        dtype = torch.bfloat16 if flags.device == "cuda" else torch.float32
        build_checkpoint(folder, MODELS[flags.model], dtype=dtype, device=flags.device)
        (folder / "complete").touch()
        if flags.device == "cuda":
            torch.cuda.empty_cache()
    return folder


def make_questions(flags: argparse.Namespace) -> tuple[Path, list[str]]:
    """Write questions with a different picture each, and return words for the responses of their teacher."""
    from openril.benchmarking.inputs import TEXT, draw_pictures
    from openril.benchmarking.machine import pseudo_words
    from openril.benchmarking.shapes import MODELS, Shape

    per_step, generations, image_tokens, response_tokens, _ = SIZES[flags.model]
    shape = Shape(flags.model, image_tokens, response_tokens, 2 * generations)
    pictures = draw_pictures(flags.work / f"pictures-{shape.name}", shape, per_step * flags.steps)
    words = pseudo_words(min(MODELS[flags.model].vocab, 4096) // 2)
    path = flags.work / f"{shape.name}-{flags.steps}.jsonl"
    rows = [
        {"id": f"q{i}", "question": TEXT, "answer": words[i % len(words)], "images": [str(picture)]}
        for i, picture in enumerate(pictures)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, words


def make_recipe(flags: argparse.Namespace, checkpoint: Path, data: Path, changes: dict[str, Any]) -> Any:
    from openril import Recipe

    per_step, generations, _, response_tokens, micro_batch = SIZES[flags.model]
    values: dict[str, Any] = {
        "run_dir": str(flags.work / f"run-{'plain' if flags.plain else 'packed'}"),
        "data": {"train": [str(data)], "max_prompt_length": 32768},
        "student": {"model": str(checkpoint), "freeze": ["vision_tower"], "sampler": {"engine": "transformers"}},
        "teachers": [{"name": TEACHER, "model_path": str(checkpoint)}],
        "sft": {"enabled": False},
        "collect": {"num_responses": generations, "student": False},
        "discriminator": {"pretraining": {"enabled": False}, "max_tokens_per_micro_batch": micro_batch},
        "rewards": {"answer": {"kind": "rules", "rule": "contains"}},
        "train": {
            "num_generations": generations,
            "questions_per_step": per_step,
            "max_completion_length": response_tokens,
            "max_steps": flags.steps,
            "max_tokens_per_micro_batch": micro_batch,
            "packed": not flags.plain,
            "precision": "pure_bf16" if flags.device == "cuda" else "float32",
            "save_every": 0,
        },
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return Recipe.model_validate(values)


def fill_cache(recipe: Any, words: list[str]) -> None:
    """Write what `ril collect` would: responses of the teacher to every question, of about a sample's length."""
    from openril import Response, ResponseCache, read_questions
    from openril.responses.manifest import source_entry

    cache = ResponseCache.create(recipe.cache_path)
    cache.register(TEACHER, **source_entry(recipe, recipe.teachers[0]))
    length = max(1, recipe.train.max_completion_length - 8)  # words are tokens
    chosen = random.Random(0)
    with cache.writer(TEACHER) as writer:
        for question in read_questions(recipe.data, "train"):
            for i in range(recipe.collect.num_responses):
                text = " ".join([*chosen.choices(words, k=length - i % 2), question.answer][: length - i % 2])
                writer.append(question, Response(question.id, TEACHER, i, text))


def choose(flags: argparse.Namespace, checkpoint: Path, data: Path, report: Report) -> tuple[Any, Any]:
    """Return the recipe of the first variant whose estimate leaves a tenth of the device, and the model's shape."""
    import torch

    from openril.models.loading import load_config
    from openril.models.memory_estimate import checkpoint_parameters, shape_of
    from openril.models.stage_memory import CONTEXT_BYTES, stage_memory

    shape = shape_of(load_config(str(checkpoint)), checkpoint_parameters(checkpoint))
    image_tokens = SIZES[flags.model][2]
    there = torch.cuda.get_device_properties(0).total_memory if flags.device == "cuda" else None
    estimates = {}
    for name, changes in VARIANTS.items():
        recipe = make_recipe(flags, checkpoint, data, changes)
        need = stage_memory(recipe, shape, image_tokens + 64, image_tokens)[-1].total + CONTEXT_BYTES
        estimates[name] = need / 2**30
        say(f"estimate: {need / 2**30:.2f} GiB for {name}")
        if (flags.variant is None and (there is None or need < 0.9 * there)) or flags.variant == name:
            report.put(variant=name, estimates_gib=estimates)
            return recipe, shape
    raise SystemExit(f"no variant fits: the device has {there / 2**30:.1f} GiB")  # type: ignore[operator]


class Peaks:
    """Measure the peak memory of parts of a step on a GPU, above what was held before the models were loaded."""

    def __init__(self, cuda: bool) -> None:
        import torch

        self.cuda = cuda
        self.before = torch.cuda.memory_allocated() if cuda else 0
        self.bytes: dict[str, int] = {}

    def watch(self, phase: str, owner: Any, method: str) -> None:
        """Replace a method by one that notes its peak under the name of a phase of the estimate."""
        import torch

        inner = getattr(owner, method)

        def measured(*arguments: Any, **settings: Any) -> Any:
            torch.cuda.reset_peak_memory_stats()
            try:
                return inner(*arguments, **settings)
            finally:
                peak = torch.cuda.max_memory_allocated() - self.before
                self.bytes[phase] = max(self.bytes.get(phase, 0), peak)

        if self.cuda:
            setattr(owner, method, measured)


def train(flags: argparse.Namespace, report: Report) -> None:
    """Run `ril train`'s own trainer for some steps on a random model, and measure time, memory and operations."""
    from rich.console import Console

    from openril import open_trainer

    started = time.perf_counter()
    checkpoint = make_checkpoint(flags)
    say(f"{time.perf_counter() - started:.1f} s to have the checkpoint")
    data, words = make_questions(flags)
    recipe, shape = choose(flags, checkpoint, data, report)
    shutil.rmtree(recipe.run_path, ignore_errors=True)
    fill_cache(recipe, words)
    peaks = Peaks(flags.device == "cuda")
    with open_trainer(recipe, Console(width=160)) as trainer:
        say(f"{time.perf_counter() - started:.1f} s until the models are loaded")
        # The checkpoint of the end would take tens of GiB of disk. Nothing else differs from `ril train`.
        trainer.save = lambda step: None
        trainer.warn = say
        peaks.watch("sampling", trainer.sampler, "sample")
        peaks.watch("student update", trainer.policy, "update")
        if trainer.discriminator is not None:
            peaks.watch("discriminator update", trainer.discriminator, "update")
        rows: list[dict[str, Any]] = []
        last: list[Any] = []
        inner = trainer.step

        def step(batch: Any) -> Any:
            last[:] = inner(batch)
            return last

        def finished(number: int, total: int, row: dict[str, Any]) -> None:
            rows.append(row)
            parts = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/")}
            say(f"step {number} of {total}: " + ", ".join(f"{k} {v:.2f} s" for k, v in parts.items()))
            report.put(steps=rows, peak_bytes=peaks.bytes)

        trainer.step, trainer.report = step, finished  # type: ignore[method-assign]
        trainer.train()
        report.put(summary=summary(trainer, rows), memory=compared(recipe, shape, trainer, peaks))
        if not flags.plain:
            report.put(profile=profiles(trainer, last[0], flags.device == "cuda"))


def summary(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the steps after the first, which compiles and tries the fast paths, and which paths ran."""
    import torch

    steady = rows[1:] or rows
    recipe, discriminator = trainer.recipe, trainer.discriminator
    names = [k for k in rows[0] if k.startswith("time/")]
    sampled = recipe.train.questions_per_step * recipe.train.num_generations * recipe.train.max_completion_length
    seconds = {k.removeprefix("time/"): median(r[k] for r in steady) for k in names}
    return {
        "steps": len(rows),
        "first_step_seconds": rows[0]["time/step"],
        "seconds": seconds,
        "sampled_tokens_per_second": sampled / max(seconds["sampling"], 1e-9),
        "parameters": sum(p.numel() for p in trainer.policy.unwrapped.parameters()),
        "trainable": sum(p.numel() for p in trainer.policy.trainable),
        "longest_prompt": trainer.policy.encoder.longest,
        "update_is_packed": trainer.policy.packing.on,
        "discriminator_is_packed": discriminator.packing.on if discriminator is not None else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_initialized() else None,
    }


def compared(recipe: Any, shape: Any, trainer: Any, peaks: Peaks) -> dict[str, dict[str, float | None]]:
    """Return estimated and measured GiB by phase. Nothing is measured on a CPU."""
    from openril.models.stage_memory import stage_memory

    longest = trainer.policy.encoder.longest
    memory = stage_memory(recipe, shape, longest, longest)[-1]
    held = sum(memory.held.values())
    found: dict[str, dict[str, float | None]] = {}
    for phase in ("sampling", "discriminator update", "student update"):
        steps = memory.phases.get(phase.replace("update", "step"), {})
        if phase in memory.phases:
            most = max(sum(memory.phases[phase].values()), sum(steps.values()))
            measured = peaks.bytes.get(phase)
            gib = None if measured is None else measured / 2**30
            found[phase] = {"estimated_gib": (held + most) / 2**30, "measured_gib": gib}
    return found


def profiles(trainer: Any, groups: Sequence[Any], cuda: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the heaviest operations of an update of each model on the last step's groups, and of sampling 8 tokens."""
    from torch.profiler import ProfilerActivity, profile

    train = trainer.recipe.train

    def sample() -> None:
        trainer.sampler.sample(
            [g.question for g in groups],
            train.num_generations,
            settings=train.sampling,
            max_completion_length=min(8, train.max_completion_length),
            seed=1,
        )

    parts: dict[str, tuple[Callable[[], Any], Sequence[str]]] = {
        "student update": (lambda: trainer.policy.update(groups, trainer.step_number), ("student", "reference")),
        "sampling of 8 tokens": (sample, ("student",)),
    }
    if trainer.discriminator is not None:
        parts["discriminator update"] = (lambda: trainer.discriminator.update(groups), ("discriminator",))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = {}
    for name, (run, models) in parts.items():
        say(f"profile of {name}")
        trainer.offload.use(*models)
        with profile(activities=activities) as profiler, trainer.accelerator.autocast():
            run()
        events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, key))[:15]
        found[name] = [{"operation": e.key[:100], "calls": e.count, "ms": getattr(e, key) / 1e3} for e in events]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("machine", "train"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=tuple(SIZES), default="qwen2_5_vl_3b")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder for checkpoint, questions and runs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="the way to train; default: the first that fits")
    parser.add_argument("--plain", action="store_true", help="train.packed: false, for comparison")
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    {"machine": machine, "train": train}[flags.part](flags, Report(flags.json))


if __name__ == "__main__":
    main()
