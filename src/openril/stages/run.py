"""`ril run`: every stage that is not done yet, in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rich.console import Console

from openril.recipe.checks import collects_all, collects_student_last, filters_overlong, require
from openril.recipe.schema import Recipe
from openril.report.progress import say
from openril.training.distributed import one_process, release_memory


def stages(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return (title, module of ``openril.stages``, function) of the stages that the recipe needs, in order.

    The overlong filter needs the student's responses, so the selection and the collection have two parts each: teachers
    are asked the final choice alone. SFT on cached responses comes after them, which then use the student without the
    warm start; with `collect.student_after_sft` a second collection from the student follows.
    """
    needs_discriminator = recipe.uses_discriminator and recipe.discriminator.pretraining.enabled
    collect, select = ("collect", "collect", "run_collect"), ("select", "select", "run_select")
    sft = [("sft", "sft", "run_sft")] if recipe.sft.enabled else []
    choose = [select, collect, select] if filters_overlong(recipe) else [select] * recipe.data.selection.enabled
    responses = [*choose, *[collect] * collects_all(recipe)]
    first = [*responses, *sft] if recipe.sft.targets != "answers" else [*sft, *responses]
    if collects_student_last(recipe):
        first.append(collect)
    pretrain = [("discriminator", "discriminator", "run_discriminator")] if needs_discriminator else []
    evaluate = [("eval", "eval", "run_eval")] if recipe.data.validation else []
    export = [("export", "export", "run_recipe")] if recipe.export.to else []
    return [*first, *pretrain, ("train", "train", "run_train"), *evaluate, *export]


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
    say(console, f"all results of this run are in {recipe.run_path}")
    return 0
