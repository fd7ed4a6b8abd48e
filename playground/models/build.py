"""``python -m playground.models.build``: write a tiny random checkpoint whose tokenizer knows the words of given files."""

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
"""Columns whose words no model reads or writes."""


@dataclass
class Settings:
    """Write a tiny random model of a real architecture: an ordinary checkpoint that `ril sft` can train."""

    out: Path
    """Folder to write. An existing checkpoint is left alone."""
    architecture: Architecture = "qwen2_5_vl"
    """qwen2 is a text-only model, for judges."""
    texts: list[Path] = field(default_factory=list)
    """Question files (.jsonl) whose words the tokenizer learns."""
    tokenizer: Literal["bpe", "unigram"] = "bpe"
    """Family of the tokenizer."""
    vocab_size: int = 1200
    """Largest size of the vocabulary."""
    hidden_size: int = 64
    """Width of the language model."""
    num_layers: int = 3
    """Number of layers of the language model."""
    num_heads: int = 4
    """Number of attention heads."""
    vision_hidden_size: int = 64
    """Width of the vision tower."""
    vision_layers: int = 2
    """Number of layers of the vision tower."""
    max_pixels: int = 84 * 84
    """Qwen2.5-VL: largest image area; one image token per 28 x 28 pixels."""
    tile_size: int = 84
    """InternVL: side of its square tiles in pixels, a multiple of 28."""
    max_tiles: int = 1
    """InternVL: most tiles of an image."""
    seed: int = 0
    """Seed of the random weights."""


def file_texts(path: Path) -> list[str]:
    """Return the texts that models read and write in a question file: text columns and choices.

    Labels (``NOT_TEXT``) are left out, and so are wrong answers and derivations, which hold no other words.

    Raises:
        DataError: If there is no text.
    """
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
        raise DataError(f"{path}: expected rows with text, got none. Name question files (.jsonl).")
    return texts


def build(settings: Settings) -> Path:
    """Write the checkpoint unless it exists, and return its folder."""
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
