"""Pictures of the fourteen skills: three by three cells, each with at most one thing.

One image token of Qwen2.5-VL or InternVL covers one cell, and everything that a question asks about a thing is in its cell.
A label (digit or letter) is in the cell's upper left 14-pixel patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from PIL import Image, ImageDraw

from playground.world.bitmap_font import glyph

CELL = 28
"""Side of a cell in pixels: two by two merged patches of 14 pixels."""
PATCH = CELL // 2
SIDE = 3
"""Number of cells in a row and in a column."""
PIXELS = SIDE * CELL

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

Color = tuple[int, int, int]
COLORS: dict[str, Color] = {
    "red": (220, 30, 30), "green": (20, 150, 50), "blue": (40, 70, 220), "yellow": (240, 190, 0),
}  # fmt: skip
NAMES = ("circle", "square", "triangle", "car", "tree", "house")
"""Names of the colored things."""
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Steps in row and column."""
MOST_BLOCKS = 6
"""Height of the tallest bar, in blocks."""

_INK: Color = (25, 25, 25)
_BROWN: Color = (130, 80, 30)
_WHITE: Color = (255, 255, 255)
_PAPER: Color = (255, 244, 200)
_ROAD: Color = (205, 205, 205)
_LINE: Color = (150, 150, 150)
_FRAME: Color = (110, 60, 140)


@dataclass(frozen=True)
class Thing:
    """The content of a cell.

    name: one of NAMES, or card, bar, box, a direction (a box with an arrow), wide, high, hole, light, sign, person, dog, text.
    label: the digit, letter or short text drawn with it; a bar's height in blocks.
    """

    name: str
    color: str = ""
    label: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.color, self.name, self.label) if part)

    @property
    def kind(self) -> str:
        """Color and name."""
        return f"{self.color} {self.name}"


@dataclass(frozen=True)
class Scene:
    """A picture. cells: SIDE * SIDE cells, row by row from the top left. ground: the background."""

    cells: tuple[Thing | None, ...]
    ground: Literal["", "chart", "table", "road"] = ""

    @staticmethod
    def of(things: dict[int, Thing], ground: Literal["", "chart", "table", "road"] = "") -> Scene:
        """Return the scene with these things, by cell."""
        return Scene(tuple(things.get(cell) for cell in range(SIDE * SIDE)), ground)

    @property
    def things(self) -> dict[int, Thing]:
        """The things by cell, in reading order."""
        return {cell: thing for cell, thing in enumerate(self.cells) if thing is not None}

    def __str__(self) -> str:
        """Return the scene in words, cell by cell. The text identifies the scene."""
        return f"{self.ground}:" + "|".join("" if thing is None else str(thing) for thing in self.cells)


def where(cell: int) -> str:
    """Return the cell's row and column as two words."""
    return f"{ROWS[cell // SIDE]} {COLUMNS[cell % SIDE]}"


def neighbor(cell: int, direction: str) -> int | None:
    """Return the next cell in a direction, or None outside the picture."""
    row, column = cell // SIDE + DIRECTIONS[direction][0], cell % SIDE + DIRECTIONS[direction][1]
    return row * SIDE + column if 0 <= row < SIDE and 0 <= column < SIDE else None


def describe(scene: Scene) -> str:
    """Return everything in the picture, cell by cell: the answer to DESCRIBE, with which models learn to see."""
    return ", ".join(f"{where(cell)} {in_words(thing)}" for cell, thing in scene.things.items())


DRAWN_WORDS = {"area": ("AR", "EA"), "pull": ("PU", "LL"), "legs": ("LE", "GS")}
"""Words that are drawn across two cells."""
_SPELLED = {part: word for word, parts in DRAWN_WORDS.items() for part in parts}


def in_words(thing: Thing | None) -> str:
    """Return a thing in words. A part of a drawn word becomes the whole word, and "$7" becomes "price 7"."""
    if thing is None:
        return "nothing"
    if thing.name != "text":
        return str(thing)
    return _SPELLED.get(thing.label) or " ".join(thing.label).replace("$", "price")


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of PIXELS x PIXELS."""
    image = _ground(scene.ground, tuple(sorted({cell // SIDE for cell in scene.things}))).copy()
    for cell, thing in scene.things.items():
        tile = _tile(thing)
        image.paste(tile, (cell % SIDE * CELL, cell // SIDE * CELL), tile)
    # Without a frame, a small model cannot tell from a patch where in the picture it is.
    ImageDraw.Draw(image).rectangle((0, 0, PIXELS - 1, PIXELS - 1), outline=_FRAME)
    return image


@cache
def _ground(kind: str, rows: tuple[int, ...]) -> Image.Image:
    """Draw a background. rows: the rows that hold things."""
    image = Image.new("RGB", (PIXELS, PIXELS), _WHITE)
    draw = ImageDraw.Draw(image)
    if kind == "road":
        draw.rectangle((0, 2 * CELL, PIXELS, PIXELS), fill=_ROAD)
        draw.line((0, 2 * CELL, PIXELS, 2 * CELL), fill=_LINE)
    elif kind == "chart":
        for row in rows:  # one axis for each
            draw.line((1, (row + 1) * CELL - 1, PIXELS - 2, (row + 1) * CELL - 1), fill=_INK)
    elif kind == "table":
        for row in range(1, SIDE):
            draw.line((1, row * CELL - 6, PIXELS - 2, row * CELL - 6), fill=_LINE)
    return image


@lru_cache(maxsize=4096)
def _tile(thing: Thing) -> Image.Image:
    """Draw a thing on a transparent cell."""
    tile = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
    draw = ImageDraw.Draw(tile)
    color = COLORS.get(thing.color, _INK)
    if thing.name == "text":
        _write(tile, thing.label)
    elif thing.name == "bar":
        for block in range(int(thing.label)):
            bottom = CELL - 3 - 4 * block
            draw.rectangle((6, bottom - 2, 21, bottom), fill=color)
    elif thing.name == "card":
        draw.rectangle((0, 0, CELL - 3, CELL - 3), fill=_WHITE, outline=_LINE)
        _write(tile, thing.label, color)
        draw.ellipse((PATCH, PATCH, PATCH + 9, PATCH + 9), fill=color)
    elif thing.name == "box" or thing.name in DIRECTIONS:
        draw.rectangle((0, 0, PATCH - 1, PATCH - 1), fill=_PAPER)
        _write(tile, thing.label)
        if thing.name in DIRECTIONS:
            _arrow(draw, thing.name, color)
    elif thing.name in ("wide", "high"):
        _write(tile, thing.label)
        _ruler(draw, thing.name, color)
    elif thing.name == "hole":
        _write(tile, thing.label)
        draw.rectangle((PATCH, PATCH, CELL - 4, CELL - 4), fill=_WHITE, outline=_INK, width=2)
    elif thing.name == "sign":
        draw.rectangle((0, 0, PATCH - 1, PATCH - 1), fill=_PAPER, outline=COLORS["red"])
        draw.rectangle((6, PATCH, 7, CELL - 1), fill=_INK)
        _write(tile, thing.label)
    else:
        box = (PATCH - 3, PATCH - 1, CELL - 2, CELL - 2) if thing.label else (4, 4, CELL - 5, CELL - 5)
        _ICONS[thing.name](draw, box, color)
        _write(tile, thing.label)
    return tile


def _write(tile: Image.Image, text: str, color: Color = _INK) -> None:
    """Write up to two characters into the upper patches of the cell."""
    for i, character in enumerate(text):
        tile.paste((*color, 255), (i * PATCH + 2, 1), glyph(character))


def _arrow(draw: ImageDraw.ImageDraw, direction: str, color: Color) -> None:
    """Draw an arrow in the lower right patch."""
    points = [(0, 4), (6, 4), (6, 0), (12, 6), (6, 12), (6, 8), (0, 8)]  # to the right, in 13 x 13 pixels
    turned: dict[str, Callable[[int, int], tuple[int, int]]] = {
        "right": lambda x, y: (x, y),
        "left": lambda x, y: (12 - x, y),
        "down": lambda x, y: (y, x),
        "up": lambda x, y: (y, 12 - x),
    }
    draw.polygon([_moved(turned[direction](x, y), PATCH) for x, y in points], fill=color)


def _moved(point: tuple[int, int], by: int) -> tuple[int, int]:
    return point[0] + by, point[1] + by


def _ruler(draw: ImageDraw.ImageDraw, name: str, color: Color) -> None:
    """Draw a line with a bar at each end, along the bottom or along the right side."""
    points = ((2, 20), (CELL - 4, 20)) if name == "wide" else ((20, 2), (20, CELL - 4))
    draw.line(points, fill=color, width=3)
    for x, y in points:
        draw.line((x, y - 4, x, y + 4) if name == "wide" else (x - 4, y, x + 4, y), fill=color, width=2)


Box = tuple[int, int, int, int]


def _part(box: Box, left: float, top: float, right: float, bottom: float) -> Box:
    """Return a part of a box, given in fractions of its sides."""
    width, height = box[2] - box[0], box[3] - box[1]
    return (
        round(box[0] + left * width), round(box[1] + top * height),
        round(box[0] + right * width), round(box[1] + bottom * height),
    )  # fmt: skip


def _circle(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.ellipse(box, fill=color)


def _square(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.rectangle(box, fill=color)


def _triangle(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.polygon([((box[0] + box[2]) // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=color)


def _car(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.rectangle(_part(box, 0.2, 0.15, 0.75, 0.5), fill=color)
    draw.rectangle(_part(box, 0.3, 0.22, 0.65, 0.42), fill=_WHITE)
    draw.rectangle(_part(box, 0, 0.45, 1, 0.78), fill=color)
    for left in (0.12, 0.62):
        draw.ellipse(_part(box, left, 0.65, left + 0.28, 0.98), fill=_INK)


def _tree(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.rectangle(_part(box, 0.4, 0.55, 0.6, 1), fill=_BROWN)
    draw.ellipse(_part(box, 0.08, 0, 0.92, 0.68), fill=color)


def _house(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    left, top, right, middle = _part(box, 0, 0, 1, 0.45)
    draw.rectangle(_part(box, 0.1, 0.45, 0.9, 1), fill=color)
    draw.polygon([((left + right) // 2, top), (left, middle), (right, middle)], fill=_INK)
    draw.rectangle(_part(box, 0.4, 0.65, 0.6, 1), fill=_WHITE)


def _person(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.ellipse(_part(box, 0.33, 0, 0.67, 0.32), fill=color)
    lines: Sequence[tuple[float, float, float, float]] = (
        (0.5, 0.3, 0.5, 0.65), (0.18, 0.45, 0.82, 0.45), (0.5, 0.65, 0.25, 1), (0.5, 0.65, 0.75, 1),
    )  # fmt: skip
    for line in lines:
        draw.line(_part(box, *line), fill=color, width=2)


def _dog(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.rectangle(_part(box, 0.1, 0.4, 0.75, 0.65), fill=_BROWN)
    draw.rectangle(_part(box, 0.68, 0.15, 1, 0.45), fill=_BROWN)
    draw.line(_part(box, 0.1, 0.45, 0, 0.15), fill=_BROWN, width=2)
    for left in (0.12, 0.28, 0.52, 0.68):
        draw.line(_part(box, left, 0.6, left, 1), fill=_BROWN, width=2)


def _light(draw: ImageDraw.ImageDraw, box: Box, color: Color) -> None:
    draw.rectangle((8, 1, 19, CELL - 3), fill=_INK)
    lit = 3 if color == COLORS["red"] else 15
    for top in (3, 15):
        draw.ellipse((10, top, 17, top + 7), fill=color if top == lit else (90, 90, 90))


_ICONS: dict[str, Callable[[ImageDraw.ImageDraw, Box, Color], None]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "car": _car, "tree": _tree, "house": _house,
    "person": _person, "dog": _dog, "light": _light,
}  # fmt: skip
