"""The places of images in the texts of a question, in the spellings of different data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from openril.data.conversations import NO_MEDIA
from openril.errors import DataError
from openril.records import IMAGE_MARKER

_PATH = re.compile(r"<(img|image)>\s*([^<>\s](?:[^<>]*[^<>\s])?)\s*</\1>", re.I)
"""An image inside the text, as Qwen-VL writes it."""
_WRAPPED = re.compile(r"\(<image>\./</image>\)|<image>\s*</image>|<img>\s*<image>\s*</img>", re.I)
_NUMBERED = re.compile(r"<\|?(?:image|img)[\s_-]?(\d{1,3})\|?>", re.I)
_OTHER = re.compile(
    r"<\|vision_start\|>\s*(?:<\|image_pad\|>\s*)+<\|vision_end\|>|(?:<img_context>\s*)+"
    r"|<img>\s*(?:<imagehere>|(?:<img_context>\s*)*)\s*</img>|\[IMG\]|<image\s?/>"
    r"|<\|(?:image|image_pad|image_placeholder)\|>|<(?:image|imagehere|image_placeholder|start_of_image)>",
    re.I,
)
_MEDIA = re.compile(
    r"<(?:video|audio|sound|speech)(?:[\s_-]?\d{1,3})?\s?/?>|<\|(?:video|audio)(?:_pad|_bos)?(?:_\d{1,3})?\|>", re.I
)


def find_places(pieces: Sequence[str]) -> tuple[list[str], list[Any], list[int]]:
    """Write every place of an image in ``pieces`` (the question and its choices) as ``<image>``.

    Other spellings are places only if the texts hold no ``<image>``, because a control token could otherwise forge one.

    Returns:
        The texts; the images that the text names itself; and, if the places are numbered, the numbers in the order of the
        places. A number that comes a second time becomes the words "image 2".

    Raises:
        DataError: For the place of a video or a sound.
    """
    if not any("<" in piece or "[" in piece for piece in pieces):
        return list(pieces), [], []  # as nearly all texts
    for piece in pieces:
        if media := _MEDIA.search(piece):
            raise DataError(f"question: expected places of images, got {media.group()}. {NO_MEDIA}")
    inline: list[Any] = []
    numbers: list[int] = []

    def named(match: re.Match[str]) -> str:
        inline.append(match[2])
        return IMAGE_MARKER

    def numbered(match: re.Match[str]) -> str:
        if int(match[1]) in numbers:
            return f"image {match[1]}"
        numbers.append(int(match[1]))
        return IMAGE_MARKER

    texts = [_PATH.sub(named, _WRAPPED.sub(IMAGE_MARKER, piece)) for piece in pieces]
    if not any(IMAGE_MARKER in text for text in texts):
        if any(_NUMBERED.search(text) for text in texts):
            texts = [_NUMBERED.sub(numbered, text) for text in texts]
        else:
            texts = [_OTHER.sub(IMAGE_MARKER, text) for text in texts]
    return texts, inline, numbers
