"""The size that the processor gives an image. A runtime that gets an image of this size does not change it again.

RUN.md of an export shows this file to those who write the application.
"""


def qwen_size(width: int, height: int, *, side: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return multiples of ``side`` with about the same proportions, and an area within the limits."""
    columns, rows = max(1, round(width / side)), max(1, round(height / side))
    if columns * rows * side * side > max_pixels:
        scale = (max_pixels / (width * height)) ** 0.5
        columns, rows = max(1, int(width * scale / side)), max(1, int(height * scale / side))
    elif columns * rows * side * side < min_pixels:
        scale = (min_pixels / (width * height)) ** 0.5
        columns, rows = -int(-width * scale // side), -int(-height * scale // side)
    return columns * side, rows * side


def internvl_size(width: int, height: int, *, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Return the size of the grid of tiles whose proportions are nearest."""
    grids = [
        (c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if min_tiles <= c * r <= max_tiles
    ]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        larger = width * height > 0.5 * tile * tile * columns * rows
        if difference < least or (difference == least and larger):
            best, least = (columns, rows), difference
    return best[0] * tile, best[1] * tile
