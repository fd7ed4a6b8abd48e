"""Pictures of the playground: three by three cells, each empty or with one coloured shape or digit."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

CELL = 28
"""Side of a cell in pixels: one image token of Qwen2.5-VL and InternVL (14-pixel patches, merged two by two)."""
SIDE = 3
"""Cells in a row and in a column."""

COLOURS = {"red": (220, 30, 30), "green": (20, 150, 50), "blue": (40, 70, 220), "yellow": (235, 190, 0)}
SHAPES = ("circle", "square", "triangle")
DIGITS = tuple(str(d) for d in range(1, 10))
BACKGROUND = (255, 255, 255)


@dataclass(frozen=True)
class Thing:
    """What a cell holds. name: a shape's name or a digit."""

    name: str
    colour: str

    @property
    def is_digit(self) -> bool:
        return self.name in DIGITS

    def __str__(self) -> str:
        return f"{self.colour} {self.name}"


Scene = tuple[Thing | None, ...]
"""SIDE * SIDE cells, row by row from the top left."""


def things(scene: Scene) -> list[Thing]:
    return [thing for thing in scene if thing is not None]


def scene_text(scene: Scene) -> str:
    """The scene in words, cell by cell: what identifies it."""
    return "|".join("" if thing is None else str(thing) for thing in scene)


def place(wanted: list[Thing], rng: random.Random) -> Scene:
    """The things in cells drawn at random."""
    cells: list[Thing | None] = [None] * (SIDE * SIDE)
    for cell, thing in zip(rng.sample(range(SIDE * SIDE), len(wanted)), wanted, strict=True):
        cells[cell] = thing
    return tuple(cells)


# Which of a digit's seven bars are drawn: top, upper left, upper right, middle, lower left, lower right, bottom. Bars
# instead of a font: the same pixels everywhere.
_BARS = {
    "1": "0010010", "2": "1011101", "3": "1011011", "4": "0111010", "5": "1101011",
    "6": "1101111", "7": "1010010", "8": "1111111", "9": "1111011",
}  # fmt: skip
_LEFT, _RIGHT, _TOP, _MIDDLE, _BOTTOM = 8, 19, 4, 13, 23
_BAR_LINES = (
    ((_LEFT, _TOP), (_RIGHT, _TOP)),
    ((_LEFT, _TOP), (_LEFT, _MIDDLE)),
    ((_RIGHT, _TOP), (_RIGHT, _MIDDLE)),
    ((_LEFT, _MIDDLE), (_RIGHT, _MIDDLE)),
    ((_LEFT, _MIDDLE), (_LEFT, _BOTTOM)),
    ((_RIGHT, _MIDDLE), (_RIGHT, _BOTTOM)),
    ((_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)),
)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, SIDE * CELL pixels square."""
    image = Image.new("RGB", (SIDE * CELL, SIDE * CELL), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for cell, thing in enumerate(scene):
        if thing is not None:
            _draw(draw, thing, (cell % SIDE) * CELL, (cell // SIDE) * CELL)
    return image


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, x: int, y: int) -> None:
    colour = COLOURS[thing.colour]
    box = (x + 4, y + 4, x + CELL - 5, y + CELL - 5)
    if thing.name == "circle":
        draw.ellipse(box, fill=colour)
    elif thing.name == "square":
        draw.rectangle(box, fill=colour)
    elif thing.name == "triangle":
        draw.polygon([(x + CELL // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    else:
        for drawn, (start, end) in zip(_BARS[thing.name], _BAR_LINES, strict=True):
            if drawn == "1":
                draw.line([(x + start[0], y + start[1]), (x + end[0], y + end[1])], fill=colour, width=4)
