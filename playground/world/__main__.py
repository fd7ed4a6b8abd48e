"""``python -m playground.world``: write the fourteen skills as question files, or the gallery of the docs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openril.errors import DataError
from playground.runner import exit_code
from playground.world.gallery import write_page
from playground.world.skills import SKILLS, write_skills_world


@dataclass
class Settings:
    """Write questions of the fourteen skills to train, validation and test files that share no scene."""

    out: Path | None = None
    """Folder to write."""
    num_train: int = 4000
    """Number of training questions. The skills take turns."""
    num_validation: int = 280
    """Number of validation questions."""
    num_test: int = 560
    """Number of test questions."""
    difficulty: list[int] = field(default_factory=lambda: [1])
    """1, 2 or 3, or several of them, which take turns."""
    skills: list[str] = field(default_factory=lambda: list(SKILLS))
    """The skills to ask about."""
    seed: int = 0
    """Seed of the questions. The split of a scene does not depend on it."""
    page: Path | None = None
    """Write the gallery to this file instead: the docs page that shows one question of each skill."""


def run(settings: Settings) -> int:
    """Write what the settings ask for, and return the exit code."""
    if (settings.out is None) == (settings.page is None):
        raise DataError("expected either --out (a folder to write) or --page (a page to write)")
    if settings.page is not None:
        write_page(settings.page)
        print(settings.page)
        return 0
    assert settings.out is not None
    if settings.out.exists() and not (settings.out / "train.jsonl").is_file() and any(settings.out.iterdir()):
        raise DataError(f"{settings.out} holds other files, which would be lost. Name a new folder.")
    numbers = (settings.num_train, settings.num_validation, settings.num_test)
    paths = write_skills_world(settings.out, *numbers, settings.seed, settings.difficulty, settings.skills)
    print(*paths.values(), sep="\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.world")
    return exit_code("world", lambda: run(settings))


if __name__ == "__main__":
    sys.exit(main())
