"""Write the table of estimated memory in docs/sharding.md: ``python scripts/memory_table.py [--check] [FILE]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from openril.models.memory_estimate import GIB, Shape
from openril.models.published_shapes import published_shape
from openril.models.stage_memory import CONTEXT_BYTES, stage_memory
from openril.recipe.loading import load_recipe
from openril.recipe.schema import Recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STUDENTS = ("qwen2_5_vl_3b", "qwen2_5_vl_7b", "internvl3_1b", "internvl3_2b", "internvl3_8b")
PROCESSES = (1, 2, 4, 6, 8)
OFFLOADS = ("none", "optimizer", "swap")
BEGIN, END = "<!-- begin: python scripts/memory_table.py -->", "<!-- end -->"


def most(recipe: Recipe, shape: Shape, processes: int) -> float:
    """Return the GiB of the stage that needs most, with prompts of the longest length and an image that fills them."""
    prompt = recipe.data.max_prompt_length
    return (max(m.total for m in stage_memory(recipe, shape, prompt, prompt, processes)) + CONTEXT_BYTES) / GIB


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| student | trains | {' | '.join(map(str, PROCESSES))} |"
    yield "|---|---|" + "---|" * len(PROCESSES)
    for student in STUDENTS:
        recipe = load_recipe(RECIPES / "paper" / f"{student}_two_teachers.yaml")
        shape = published_shape(recipe.student.model)
        assert shape is not None
        recipe.train.shard = True
        for lora in (False, True):
            recipe.student.lora.enabled = lora
            cells = []
            for processes in PROCESSES:
                values = []
                for recipe.train.offload in OFFLOADS:
                    values.append(f"{most(recipe, shape, processes):.0f}")
                cells.append(" / ".join(values))
            name = recipe.student.model.split("/")[-1]
            yield f"| {name} | {'LoRA' if lora else 'all'} | {' | '.join(cells)} |"


def updated(page: str) -> str:
    """Return the page with a current table between the markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n" + "\n".join(rows()) + f"\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write the table, or with ``--check`` return 1 if the page's differs."""
    parser = argparse.ArgumentParser(prog="python scripts/memory_table.py", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/sharding.md"))
    parser.add_argument("--check", action="store_true", help="only check that the table is current")
    options = parser.parse_args(arguments)
    page = options.file.read_text(encoding="utf-8")
    if not options.check:
        options.file.write_text(updated(page), encoding="utf-8")
    elif updated(page) != page:
        print(f"{options.file}: the table is not current. Run python scripts/memory_table.py.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
