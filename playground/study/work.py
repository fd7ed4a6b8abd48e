"""``python -m playground.study.work``: one job of the study, in a process of its own.

It runs the stages of a recipe as `ril` does, and leaves ``done.json`` in the recipe's folder. It stops, and saves, when
the process that started it is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openril.errors import OpenRILError
from openril.recipe.loading import load_recipe
from openril.recipe.schema import Recipe
from openril.responses.files import Lock
from openril.storage import atomic_path, write_json

DONE = "done.json"
Stage = Literal["collect", "discriminator", "sft", "train", "none"]


@dataclass
class Settings:
    """One job of the study."""

    recipe: Path
    """Its recipe; everything it makes goes into the folder this lies in."""
    stage: Stage = "train"
    """What makes its result."""
    score: Path | None = None
    """Question file on which the result is scored at the end."""
    name: str = "final"
    """What `ril eval` calls the result."""
    copy_from: Path | None = None
    """collect: a response cache whose responses are taken over first."""
    sources: tuple[str, ...] = ()
    """collect: only these."""
    discriminator: Path | None = None
    """train: folder of the pre-trained discriminator (`discriminator/` of the run that trained it), linked into ours."""
    parent: int = 0
    """Process to stop with; 0 for none."""


def run(settings: Settings) -> None:
    """The job; does nothing twice. Raises what the stages raise."""
    from rich.console import Console

    folder = settings.recipe.parent
    started = time.monotonic()
    # The process of a study that was killed may still be saving.
    with Lock(folder / ".lock"):
        if (folder / DONE).is_file():
            return
        recipe = load_recipe(settings.recipe)
        console = Console(width=100)
        done = _stage(recipe, settings, console)
        if settings.score is not None:
            _score(recipe, settings, console)
        write_json(folder / DONE, {"result": settings.name, "seconds": time.monotonic() - started, **done})


def _stage(recipe: Recipe, settings: Settings, console: Any) -> dict[str, Any]:
    from playground.study import measures

    match settings.stage:
        case "collect":
            from openril.stages.collect import run_collect

            if settings.copy_from is not None and not recipe.cache_path.exists():
                with atomic_path(recipe.cache_path) as temporary:
                    shutil.copytree(settings.copy_from, temporary)
            run_collect(recipe, console, list(settings.sources) or None)
            return measures.of_cache(recipe, list(settings.sources))
        case "discriminator":
            from openril.stages.discriminator import run_discriminator

            run_discriminator(recipe, console)
            return {}
        case "sft":
            from openril.stages.sft import run_sft

            run_sft(recipe, console)
            return measures.of_sft(recipe)
        case "train":
            from openril.stages.train import run_train

            if settings.discriminator is not None:
                link(recipe.discriminator_path.parent, settings.discriminator)
            run_train(recipe, console)
            return measures.of_loop(recipe)
    return {}


def link(path: Path, target: Path) -> None:
    """A relative link, so that the study's folder can be moved; left alone where something is."""
    if not path.exists():
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))


def _score(recipe: Recipe, settings: Settings, console: Any) -> None:
    """`ril eval RECIPE --data.validation FILE --eval.limit 0 --checkpoints RESULT`."""
    from openril.stages.eval import find_targets, run_eval

    recipe = recipe.model_copy(deep=True)
    recipe.data.validation, recipe.eval.limit = [str(settings.score)], 0
    checkpoint = next(t.checkpoint for t in find_targets(recipe) if t.name == settings.name)
    run_eval(recipe, console, [checkpoint])


def watch(parent: int) -> None:
    """Interrupt this process, which then saves, when ``parent``, which started it, is gone."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=look, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.study.work")
    if settings.parent:
        watch(settings.parent)
    try:
        run(settings)
    except OpenRILError as e:
        print(f"study: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"study: {e or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
