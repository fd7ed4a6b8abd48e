"""`ril run`: every stage that is not done yet, in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rich.console import Console

from openril.recipe.checks import require
from openril.recipe.schema import Recipe
from openril.training.distributed import one_process, release_memory


def stages(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return (title, module of ``openril.stages``, function) of the stages that the recipe needs, in order.

    SFT on cached responses comes after the collection, which then uses the student without the warm start.
    """
    selection = recipe.data.selection
    needs_cache = (
        recipe.teacher_responses_per_question > 0
        or (recipe.sft.enabled and recipe.sft.targets != "answers")
        or (selection.enabled and selection.drop_overlong)
    )
    needs_discriminator = recipe.uses_discriminator and recipe.discriminator.pretraining.enabled
    collect = [("collect", "collect", "run_collect")] if needs_cache or needs_discriminator else []
    sft = [("sft", "sft", "run_sft")] if recipe.sft.enabled else []
    first = [*collect, *sft] if recipe.sft.enabled and recipe.sft.targets != "answers" else [*sft, *collect]
    select = [("select", "select", "run_select")] if selection.enabled else []
    pretrain = [("discriminator", "discriminator", "run_discriminator")] if needs_discriminator else []
    evaluate = [("eval", "eval", "run_eval")] if recipe.data.validation else []
    return [*first, *select, *pretrain, ("train", "train", "run_train"), *evaluate]


def run_all(recipe: Recipe, console: Console) -> int:
    """Run the stages in order, and stop at the first that fails. A stage whose result exists does nothing."""
    one_process("run")
    require(recipe, "run")
    for title, module, name in stages(recipe):
        console.rule(title)
        function: Callable[[Recipe, Console], object] = getattr(
            importlib.import_module(f"openril.stages.{module}"), name
        )
        function(recipe, console)
        release_memory()
    console.rule("done")
    console.print(f"all results of this run are in {recipe.run_path}")
    return 0
