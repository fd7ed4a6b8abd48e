"""``python -m playground.study.work``: run one job of the study.

It runs the stages of a recipe as `ril` does, and leaves ``done.json`` in the recipe's folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openril.recipe.loading import load_recipe
from openril.recipe.schema import Recipe
from openril.storage import Lock, atomic_path, write_json
from playground.runner import exit_code

DONE = "done.json"
Stage = Literal["collect", "discriminator", "sft", "train", "none"]


@dataclass
class Settings:
    """Run one job of the study."""

    recipe: Path
    """Its recipe; the folder of this file receives everything that the job makes."""
    stage: Stage = "train"
    """The stage that makes its result."""
    score: Path | None = None
    """Question file on which the result is scored at the end."""
    name: str = "final"
    """What `ril eval` calls the result."""
    copy_from: Path | None = None
    """collect: a response cache whose responses are copied first."""
    sources: tuple[str, ...] = ()
    """collect: only these."""
    discriminator: Path | None = None
    """train: folder of the pre-trained discriminator (`discriminator/` of the run that trained it), linked into ours."""


def run(settings: Settings) -> int:
    """Run the job unless it is done. Raises what the stages raise."""
    from rich.console import Console

    folder = settings.recipe.parent
    started = time.monotonic()
    with Lock(folder / ".lock"):
        if (folder / DONE).is_file():
            return 0
        recipe = load_recipe(settings.recipe)
        console = Console(width=100)
        done = _stage(recipe, settings, console)
        if settings.score is not None:
            _score(recipe, settings, console)
        write_json(folder / DONE, {"result": settings.name, "seconds": time.monotonic() - started, **done})
    return 0


def _stage(recipe: Recipe, settings: Settings, console: Any) -> dict[str, Any]:
    from playground.study import metrics

    match settings.stage:
        case "collect":
            from openril.stages.collect import run_collect

            if settings.copy_from is not None and not recipe.cache_path.exists():
                with atomic_path(recipe.cache_path) as temporary:
                    shutil.copytree(settings.copy_from, temporary)
            run_collect(recipe, console, list(settings.sources) or None)
            return metrics.measure_cache(recipe, settings.sources)
        case "discriminator":
            from openril.stages.discriminator import run_discriminator

            run_discriminator(recipe, console)
            return {}
        case "sft":
            from openril.stages.sft import run_sft

            run_sft(recipe, console)
            return metrics.measure_sft(recipe)
        case "train":
            from openril.stages.train import run_train

            if settings.discriminator is not None:
                link(recipe.discriminator_path.parent, settings.discriminator)
            run_train(recipe, console)
            return metrics.measure_loop(recipe)
    return {}


def link(path: Path, target: Path) -> None:
    """Make a relative link, so that the study's folder can be moved. What is already there stays."""
    if not path.exists():
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))


def _score(recipe: Recipe, settings: Settings, console: Any) -> None:
    """Do what `ril eval RECIPE --data.validation FILE --eval.limit 0 --checkpoints RESULT` does."""
    from openril.stages.eval import find_targets, run_eval

    recipe = recipe.model_copy(deep=True)
    recipe.data.validation, recipe.eval.limit = [str(settings.score)], 0
    checkpoint = next(t.checkpoint for t in find_targets(recipe) if t.name == settings.name)
    run_eval(recipe, console, [checkpoint])


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.study.work")
    return exit_code("study", lambda: run(settings))


if __name__ == "__main__":
    sys.exit(main())
