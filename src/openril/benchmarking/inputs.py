"""Questions with pictures of a given size and responses of a given length, the same for every contender."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from openril.benchmarking.shapes import MERGE, PATCH, QUESTIONS, Shape
from openril.records import ImageSource, Question

TEXT = "How many of the squares touch the wall?"


def draw_pictures(folder: Path, shape: Shape, count: int, seed: int = 0) -> list[Path]:
    """Draw ``count`` different PNG files whose size gives ``shape.grid`` image tokens without any resizing."""
    folder.mkdir(parents=True, exist_ok=True)
    down, across = (n * PATCH * MERGE for n in shape.grid)
    paths = []
    for n in range(count):
        rng = random.Random(f"{seed}/{n}")
        noise = Image.frombytes("RGB", (16, 12), rng.randbytes(16 * 12 * 3)).resize((across, down))
        pen = ImageDraw.Draw(noise)
        for _ in range(6):
            x, y, side = rng.randrange(across), rng.randrange(down), rng.randrange(8, 64)
            pen.rectangle((x, y, x + side, y + side), fill=tuple(rng.randbytes(3)))
        path = folder / f"{n:04d}.png"
        noise.save(path, compress_level=1)
        paths.append(path)
    return paths


def questions_of(pictures: Sequence[Path], call: int) -> list[Question]:
    """Return the QUESTIONS questions of a contender's measurement number ``call``, new ones each time as in training."""
    return [
        Question(
            id=f"call{call}-{j}",
            question=TEXT,
            answer="no word a random model would say",
            images=(ImageSource(path=pictures[(call * QUESTIONS + j) % len(pictures)]),),
        )
        for j in range(QUESTIONS)
    ]


def fixed_completions(
    call: int, rows: int, length: int, vocab: int, banned: Collection[int], seed: int = 0
) -> list[list[int]]:
    """Return ``rows`` responses of exactly ``length`` random token ids below ``vocab`` that are not banned."""
    allowed = [i for i in range(vocab) if i not in banned]
    rng = random.Random(f"{seed}/{call}")
    return [rng.choices(allowed, k=length) for _ in range(rows)]
