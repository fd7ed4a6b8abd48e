"""``python -m examples.easy_vqa.prepare``: write easy-VQA in OpenRIL's format, and build the tiny models.

The data comes from the package easy-vqa (``pip install -e ".[examples]"``), whose pictures are used where they are. Each
shows one shape in one color.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from openril.errors import DataError
from openril.storage import write_jsonl
from openril.testing.tiny_models import Architecture, build_tiny_model
from playground.runner import exit_code

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
HELD_OUT = 0.05
"""Share of the training pictures whose questions are for validation."""
CAPTIONS = {
    "what is in the image?": "a {color} {shape}",
    "describe the shape.": "The shape is a {shape}.",
}
"""What the student learns of every picture before any question: how to see, and a few words to say so."""
TILE = {"tile_size": 112, "max_tiles": 1}
"""Pictures are enlarged from 64 x 64 to 112 x 112 pixels, which are 16 image tokens. Four do not show a shape well."""
MODELS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "student": ("internvl", {"tokenizer": "bpe", **TILE}),
    "teacher_shape": ("internvl", {"tokenizer": "unigram", **TILE}),
    "teacher_color": ("qwen2_5_vl", {"tokenizer": "bpe"}),
}
"""Architecture and arguments of ``build_tiny_model``. The teachers are of two families and have two kinds of tokenizers."""


@dataclass
class Settings:
    """Write the question files and the untrained models."""

    out: Path = Path("runs/easy_vqa")
    """Folder for everything; the recipes expect this one."""
    num_train: int = 1000
    """Questions of the loop."""
    num_validation: int = 300
    """Questions for tuning, about pictures that nothing is trained on."""
    num_test: int = 1000
    """Questions of the package's own test split, drawn at random; 0 takes all 9,673."""


class Row(NamedTuple):
    """A question of the package. picture: the path of its picture."""

    id: str
    question: str
    answer: str
    picture: str

    @property
    def about(self) -> str:
        """What the question asks for: "shape" or "color"."""
        words = (self.answer, *_words(self.question))
        if self.answer in COLORS or (self.answer in ("yes", "no") and any(word in COLORS for word in words)):
            return "color"
        return "shape"

    @property
    def kind(self) -> str:
        return f"{self.about}, {'yes or no' if self.answer in ('yes', 'no') else 'which'}"


def _words(text: str) -> list[str]:
    return text.strip("?").split()


def read_split(split: str) -> list[Row]:
    """Read a split of the package, "train" or "test".

    Raises:
        DataError: The package is missing.
    """
    try:
        import easy_vqa
    except ImportError:
        raise DataError('the package easy-vqa is not installed. Run: pip install -e ".[examples]"') from None
    texts, answers, pictures = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    rows = enumerate(zip(texts, answers, pictures, strict=True))
    return [Row(f"{split}-{i}", text, answer, str(paths[picture])) for i, (text, answer, picture) in rows]


def shown(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return the color and the shape that each picture shows, from the words of its questions.

    "what is the blue shape?" says that it is blue, and the answer says the shape. Yes-or-no questions are not read.
    Pictures of which only one of the two is asked are left out.
    """
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.question.startswith("what"):
            for word in (row.answer, *_words(row.question)):
                for what, words in (("color", COLORS), ("shape", SHAPES)):
                    if word in words:
                        found.setdefault(row.picture, {})[what] = word
    return {picture: (facts["color"], facts["shape"]) for picture, facts in found.items() if len(facts) == 2}


def teacher_text(row: Row, color: str, shape: str) -> str:
    """Return the response that a teacher learns: what it looks at, and the answer. The teachers' styles differ."""
    if row.about == "shape":
        return f"The shape is a {shape}. The answer is {row.answer}."
    return f"color: {color}\nanswer: {row.answer}"


def commonest(rows: Sequence[Row], test: Sequence[Row]) -> float:
    """Return the share of test questions that the commonest answer to their wording in ``rows`` answers."""
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        answers.setdefault(row.question, Counter())[row.answer] += 1
    right = [answers[row.question].most_common(1)[0][0] == row.answer for row in test if row.question in answers]
    return sum(right) / len(test)


def record(row: Row, answer: str | None = None) -> dict[str, Any]:
    return {
        "id": row.id,
        "images": [row.picture],
        "question": row.question,
        "answer": row.answer if answer is None else answer,
        # Without it words would be looked for anywhere in a response, and a student that is rewarded for them learns to
        # name several.
        "rule": "boolean" if row.answer in ("yes", "no") else "exact",
    }


def prepare(settings: Settings) -> dict[str, int]:
    """Write ``data/*.jsonl`` and ``models/*`` of ``settings.out``, and return the number of rows by file.

    Files that exist are written again with the same content. Models that exist stay.
    """
    rng = random.Random(0)
    rows, test = read_split("train"), read_split("test")
    pictures = sorted({row.picture for row in rows})
    rng.shuffle(pictures)
    held_out = set(pictures[: max(1, round(HELD_OUT * len(pictures)))])
    validation = [row for row in rows if row.picture in held_out]
    rows = [row for row in rows if row.picture not in held_out]
    for part in (rows, validation, test):
        rng.shuffle(part)
    facts = shown(rows)
    # 1 % of the questions for the warm start, others for the loop. The teachers learn from all that say what is shown.
    warm = rows[: max(1, len(rows) // 100)]
    taught = [row for row in rows if row.picture in facts]
    files: dict[str, list[dict[str, Any]]] = {
        "captions": [
            record(Row(f"caption-{i}-{n}", prompt, caption.format(color=color, shape=shape), picture))
            for i, (picture, (color, shape)) in enumerate(sorted(facts.items()))
            for n, (prompt, caption) in enumerate(CAPTIONS.items())
        ],
        "warm_start": [
            *(record(row) for row in warm),
            *(
                record(row._replace(id=f"{row.id}-explained"), teacher_text(row, *facts[row.picture]))
                for row in warm
                if row.picture in facts
            ),
        ],
        "train": [record(row) for row in rows[len(warm) :][: settings.num_train]],
        "validation": [record(row) for row in validation[: settings.num_validation]],
        "test": [record(row) for row in test[: settings.num_test or None]],
    }
    for about in ("shape", "color"):
        mine = [row for row in taught if row.about == about]
        files[f"teacher_{about}"] = [record(row, teacher_text(row, *facts[row.picture])) for row in mine]
    for name, records in files.items():
        write_jsonl(settings.out / "data" / f"{name}.jsonl", records)
    texts = [f"{row['question']} {row['answer']}" for name in files if name != "test" for row in files[name]]
    for name, (architecture, arguments) in MODELS.items():
        if not (settings.out / "models" / name / "config.json").is_file():
            build_tiny_model(settings.out / "models" / name, architecture, texts=texts, sees=True, **arguments)
    return {name: len(records) for name, records in files.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m examples.easy_vqa.prepare")

    def body() -> int:
        for name, count in prepare(settings).items():
            print(f"  {settings.out / 'data' / name}.jsonl: {count} rows")
        share = commonest(read_split("train"), read_split("test"))
        print(f"  The commonest answer to each wording is right on {share:.1%} of all test questions.")
        print(f"  {settings.out / 'models'}: {', '.join(MODELS)}")
        return 0

    return exit_code("easy_vqa", body)


if __name__ == "__main__":
    sys.exit(main())
