"""`ril discriminator`: pre-train the discriminator on the response cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console

from openril.errors import DataError
from openril.recipe.checks import require
from openril.recipe.loading import save_recipe
from openril.recipe.schema import Recipe
from openril.records import STUDENT
from openril.report.progress import ProgressDisplay, say, warn_line
from openril.responses.cache import ResponseCache
from openril.stages.data_checks import check_questions, check_responses
from openril.stages.questions import training_questions
from openril.storage import write_json
from openril.training.checkpoint import Checkpoints, Saver, read_progress, refuse_changed_recipe
from openril.training.distributed import make_accelerator, shards
from openril.training.pretraining import DiscriminatorPretraining
from openril.training.run_folder import RunFolder
from openril.training.setup import (
    check_pretrained,
    fresh_discriminator,
    make_offload,
    pretraining_settings,
    pretraining_settings_file,
    saved_discriminator,
)


def run_discriminator(recipe: Recipe, console: Console) -> Path:
    """Pre-train, or continue, and return the discriminator's folder. Does nothing if that folder exists.

    Writes ``run_dir/discriminator/``: ``discriminator/`` (the checkpoint), ``metrics.jsonl`` and ``held_out.json``.
    """
    target = recipe.discriminator_path
    if target.is_dir():
        check_pretrained(recipe)
        say(console, f"discriminator: already pre-trained in {target}")
        return target
    accelerator = make_accelerator(recipe)
    shards(recipe, accelerator, lambda message: say(console, f"discriminator: {message}"))
    require(recipe, "discriminator", accelerator.num_processes)
    warn = partial(warn_line, console, "discriminator")
    questions = training_questions(recipe, "discriminator", accelerator, warn)
    check_questions(recipe, "discriminator", questions, warn)
    responses = ResponseCache.open(recipe.cache_path).load(
        questions,
        [STUDENT, *recipe.teacher_names],
        recipe.collect.num_responses,
        check_hashes=accelerator.is_main_process,
    )
    check_responses(recipe, questions, responses, warn)
    folder = RunFolder(target.parent)
    checkpoints = Checkpoints(folder.checkpoints_path)
    latest = checkpoints.latest()
    step = 0
    if accelerator.is_main_process:
        checkpoints.sweep()
        save_recipe(recipe, recipe.run_path / "recipe.yaml")
    optimizer = recipe.discriminator.pretraining.optimizer
    if latest is None:
        discriminator = fresh_discriminator(recipe, accelerator, optimizer)
    else:
        refuse_changed_recipe(latest, latest / "recipe.yaml", recipe, fix=f"remove {folder.path}")
        step = int(read_progress(latest)["step"])
        discriminator = saved_discriminator(recipe, accelerator, latest / "discriminator", optimizer)
    offload = make_offload(recipe, accelerator)
    offload.add("discriminator", discriminator.network, discriminator.optimizer)
    saver = Saver(
        checkpoints,
        accelerator,
        recipe,
        network=discriminator.network,
        discriminator_processor=discriminator.encoder.processor,
        optimizers={"discriminator": discriminator.optimizer},
        offload=offload,
    )
    if latest is not None:
        saver.restore(latest)
    if accelerator.is_main_process:
        folder.cut_after(step)
    with ProgressDisplay(console, "discriminator") as progress:
        discriminator.warn = progress.warn
        training = DiscriminatorPretraining(
            recipe,
            questions,
            responses,
            discriminator=discriminator,
            folder=folder,
            saver=saver,
            step_number=step,
            report=progress.report,
            warn=progress.warn,
        )
        if not training.questions:
            raise DataError(
                "discriminator.pretraining.held_out_share: no question of the loop is left to learn from. Lower it."
            )
        held_out = training.train()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(folder.path / "held_out.json", held_out)
        if held_out:
            text = f"held-out accuracy {held_out['accuracy']:.3f} on {int(held_out['questions'])} questions"
            if "length_only_accuracy" in held_out:
                text += f" (length alone: {held_out['length_only_accuracy']:.3f})"
            say(console, f"discriminator: {text}")
        write_json(pretraining_settings_file(recipe), pretraining_settings(recipe))
    saver.write_discriminator(target)
    accelerator.wait_for_everyone()
    return target
