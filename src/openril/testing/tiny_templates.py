"""Chat templates that follow each family. A message's content is a string, or a list of image and text parts."""

from pathlib import Path


def _read(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


CHATML = _read("chatml")
"""ChatML of Qwen and InternVL. IMAGE is replaced by the family's mark."""
IMAGES_FIRST = _read("images_first")
"""LLaVA-OneVision's ChatML: all images of a turn first, then each text on its own line, and no line break between turns."""
UTTERANCES = _read("utterances")
"""SmolVLM: one mark for the start of the whole text, then "User:" and "Assistant:"."""
TURNS = _read("turns")
"""Gemma 3: the assistant is "model", and a system message is the beginning of the first user turn."""
