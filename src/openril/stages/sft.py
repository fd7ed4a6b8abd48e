"""`ril sft`: the supervised warm start, and the imitation baselines on cached responses."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openril.recipe.schema import Recipe
from openril.report.progress import ProgressDisplay, say, warn_line

if TYPE_CHECKING:
    from rich.console import Console


def run_sft(recipe: Recipe, console: Console) -> Path:
    """Train, or continue, and return the student's folder ``run_dir/sft/student``. Does nothing if that folder exists.

    Raises:
        Interrupted: When asked to stop; the same command continues. Also what ``training.sft.train_sft`` raises.
    """
    target = recipe.sft_student_path
    if target.is_dir():
        say(console, f"sft: already trained in {target}")
        return target
    # Imported here, so that a finished stage does not wait for these imports.
    from openril.data.reading import read_questions
    from openril.models.prompt_lengths import fitting_questions
    from openril.recipe.checks import require
    from openril.recipe.loading import save_recipe
    from openril.stages.data_checks import check_questions, check_responses
    from openril.stages.questions import selected_questions
    from openril.training.sft import train_sft
    from openril.training.sft_examples import sft_examples

    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    require(recipe, "sft", processes)
    if recipe.sft.targets == "answers":
        questions = read_questions(recipe.data, "train")
    else:  # those that have cached responses
        questions = fitting_questions(recipe, selected_questions(recipe), "sft", process_index=rank)
    warn = partial(warn_line, console, "sft")
    if recipe.train.offload != "none":
        warn(
            f"train.offload: {recipe.train.offload} applies to ril discriminator and ril train; the warm start parks nothing."
        )
    if recipe.train.shard and processes == 1:
        warn("train.shard: there is one process, so nothing is sharded. Launch several with torchrun.")
    check_questions(recipe, "sft", questions, warn, processed=True)
    examples = sft_examples(recipe, questions, lambda loaded: check_responses(recipe, questions, loaded, warn))
    if rank == 0:
        save_recipe(recipe, recipe.run_path / "recipe.yaml")
        say(console, f"sft: {len(examples)} examples ({recipe.sft.targets})")
    with ProgressDisplay(console, "sft") as progress:
        return train_sft(recipe, examples, report=progress.report, warn=progress.warn)
