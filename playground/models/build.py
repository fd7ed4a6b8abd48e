"""``python -m playground.models.build``: a tiny random checkpoint whose tokenizer knows the words of given files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from openril.errors import DataError, OpenRILError
from openril.storage import read_jsonl
from openril.testing.tiny_models import Architecture

NOT_TEXT = {"id", "rule", "skill", "benchmark", "split", "origin"}
"""Columns of words that nobody reads or writes."""


@dataclass
class Settings:
    """Write a tiny random model of a real architecture: an ordinary checkpoint, to be trained by `ril sft`."""

    out: Path
    """Folder to write; left alone if it is there."""
    architecture: Architecture = "qwen2_5_vl"
    """qwen2 is a text-only model, for judges."""
    texts: list[Path] = field(default_factory=list)
    """Question files (.jsonl) whose words the tokenizer learns."""
    tokenizer: Literal["bpe", "unigram"] = "bpe"
    """Family of the tokenizer."""
    vocab_size: int = 1200
    """Largest number of tokens."""
    hidden_size: int = 64
    """Width of the language model."""
    num_layers: int = 3
    """Depth of the language model."""
    num_heads: int = 4
    """Attention heads."""
    vision_hidden_size: int = 64
    """Width of the vision tower."""
    vision_layers: int = 2
    """Depth of the vision tower."""
    max_pixels: int = 84 * 84
    """Qwen2.5-VL: largest image area; one image token per 28 x 28 pixels."""
    tile_size: int = 84
    """InternVL: side of its square tiles in pixels, a multiple of 28."""
    max_tiles: int = 1
    """InternVL: most tiles of an image."""
    seed: int = 0
    """Of the random weights."""


def file_texts(path: Path) -> list[str]:
    """What models read and write of a question file, row by row: every text column and the choices, without labels
    (``NOT_TEXT``) and without wrong answers and derivations, which say nothing in other words. Raises DataError when
    there is none."""
    texts: list[str] = []
    for row in read_jsonl(path):
        texts += [
            value
            for key, value in row.items()
            if isinstance(value, str) and key not in NOT_TEXT and not key.startswith("wrong_")
        ]
        choices = row.get("choices")
        texts += [c for c in choices if isinstance(c, str)] if isinstance(choices, list) else []
    if not texts:
        raise DataError(f"{path}: no rows with text; name question files (.jsonl)")
    return texts


def build(settings: Settings) -> Path:
    """Build the checkpoint unless it is there; returns its folder."""
    if (settings.out / "config.json").is_file():
        return settings.out
    from openril.discriminator import prompt
    from openril.testing.tiny_models import build_tiny_model

    # The discriminator has the student's tokenizer: its fixed words should be single tokens too.
    texts: Iterable[str] = [text for path in settings.texts for text in file_texts(path)] + [
        prompt.SYSTEM,
        prompt.USER,
    ] * 50
    sizes = {k: v for k, v in vars(settings).items() if k not in ("out", "architecture", "texts")}
    return build_tiny_model(settings.out, settings.architecture, texts=texts, **sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.models.build")
    try:
        print(build(settings))
    except OpenRILError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
