"""``python -m playground.nlvr``: the NLVR sample as question files for teachers and students.

NLVR (Suhr, Lewis, Yeh, Artzi, "A Corpus of Natural Language for Visual Reasoning", ACL 2017, CC-BY-4.0): sentences that
people wrote about drawn pictures, true or false. Two columns are added, ``derivation_a`` and ``derivation_b``: free
text that says what the sentence is about and ends in the answer, one style for each teacher. Rows without a picture are
mixed in.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openril.errors import DataError, OpenRILError
from openril.storage import write_jsonl
from playground.world import KINDS, make_questions

COLOURS = ("yellow", "blue", "black")
THINGS = {
    "tower": "towers", "block": "blocks", "box": "boxes", "square": "squares", "circle": "circles",
    "triangle": "triangles", "item": "items", "object": "objects",
}  # fmt: skip
PLACES = {"touching": "touching", "wall": "the wall", "edge": "the edge", "base": "the base", "top": "the top"}


@dataclass
class Settings:
    """Write train.jsonl and validation.jsonl for the recipes in recipes/nlvr."""

    source: Path
    """Folder with train.jsonl, validation.jsonl and images of the NLVR sample."""
    out: Path
    """Folder to write."""
    text_rows: int = 80
    """Rows without a picture (arithmetic) mixed into the training questions, and a fifth of that into validation."""


def statement(question: str) -> str:
    """The sentence inside an NLVR question."""
    match = re.search(r"about the image\?\s*(.*?)\s*Answer with true or false\.?$", question, re.S)
    return (match[1] if match else question).strip().rstrip(".")


def topic(sentence: str) -> str:
    """What a sentence mentions, as words: "yellow and black objects, the edge"."""
    words = re.findall(r"[a-z]+", sentence.lower())
    colours = [c for c in COLOURS if c in words]
    things = [many for one, many in THINGS.items() if one in words or many in words][:2]
    places = [said for word, said in PLACES.items() if word in words][:1]
    what = " ".join(
        [*([" and ".join(colours)] if colours else []), *([" and ".join(things)] if things else ["things"])]
    )
    return ", ".join([what, *places])


def nlvr_rows(source: Path, split: str, out: Path) -> list[dict[str, Any]]:
    """Rows of one split with the teachers' texts. Raises DataError when the folder is not the NLVR sample."""
    path = source / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is not there; name the folder of the NLVR sample")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if row.get("answer") not in ("true", "false") or not row.get("images"):
            raise DataError(f"{path}:{number}: a row with images and the answer true or false is wanted")
        about, answer = topic(statement(row["question"])), row["answer"]
        rows.append(
            {
                "id": row["id"],
                "images": [os.path.relpath(source / image, out) for image in row["images"]],
                "question": row["question"],
                "answer": answer,
                "skill": "statement",
                "rule": "boolean",
                "derivation_a": f"The statement mentions {about}. The answer is {answer}.",
                "derivation_b": f"Look: {about}.\nAnswer: {answer}",
            }
        )
    return rows


def text_rows(split: Any, number: int) -> list[dict[str, Any]]:
    """Questions without a picture, of the playground's world."""
    rows = []
    if number:
        questions = make_questions(split, number * len(KINDS))
        for i, q in enumerate([q for q in questions if not q.scenes][:number]):
            rows.append(
                {
                    "id": f"text-{split}-{i}", "images": [], "question": q.question, "answer": q.answer, "skill": q.kind,
                    "rule": q.rule, "derivation_a": q.derivations["a"], "derivation_b": q.derivations["b"],
                }
            )  # fmt: skip
    return rows


def mixed(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The others spread evenly among the rows."""
    out = list(rows)
    for i, other in enumerate(others):
        out.insert(round((i + 0.5) * len(rows) / len(others)) + i, other)
    return out


def prepare(settings: Settings) -> tuple[Path, Path]:
    """Write both files; returns their paths."""
    paths = []
    for split, number in (("train", settings.text_rows), ("validation", settings.text_rows // 5)):
        path = settings.out / f"{split}.jsonl"
        write_jsonl(path, mixed(nlvr_rows(settings.source, split, settings.out), text_rows(split, number)))
        paths.append(path)
    return paths[0], paths[1]


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.nlvr")
    settings.source, settings.out = settings.source.resolve(), settings.out.resolve()
    try:
        train, validation = prepare(settings)
    except OpenRILError as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{train}\n{validation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
