"""A trained student has the same score whatever way the data sets of the field write options and ground truths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openril.cli import main
from openril.data.question_text import question_text
from openril.data.reading import read_file
from openril.rewards.answers import score_answers
from openril.storage import read_jsonl, write_jsonl
from playground.models.shipped import find_models
from playground.world import write_skills_world

LETTERS = "ABCDEFGHIJ"
Way = tuple[
    Callable[[str, list[str]], dict[str, Any]],
    Callable[[str, str], dict[str, Any]],
    Callable[[str], dict[str, Any]],
]
"""The columns of (question, options), of (letter, text) of the right option, and of an answer without options."""


def by_letter(options: list[str]) -> dict[str, str]:
    return dict(zip(LETTERS, options, strict=False))


def lines(options: list[str]) -> list[str]:
    return [f"{letter}. {option}" for letter, option in by_letter(options).items()]


WAYS: dict[str, Way] = {
    "letter, list": (
        lambda q, c: {"question": q, "choices": c},
        lambda letter, text: {"answer": letter},
        lambda t: {"answer": t},
    ),
    "text, mapping": (
        lambda q, c: {"question": q, "choices": by_letter(c)},
        lambda letter, text: {"answer": text},
        lambda t: {"answer": f"The answer is {t}."},
    ),
    "index, Python text": (
        lambda q, c: {"question": q, "options": str(c)},
        lambda letter, text: {"answer_index": LETTERS.index(letter)},
        lambda t: {"answer": t.upper()},
    ),
    "(B), columns": (
        lambda q, c: {"question": q} | by_letter(c),
        lambda letter, text: {"answer": f"({letter})"},
        lambda t: {"solution": f"We look closely.\nThe answer is {t}"},
    ),
    "B. text, lettered options": (
        lambda q, c: {"question": q, "options": lines(c)},
        lambda letter, text: {"answer": f"{letter}. {text}"},
        lambda t: {"answer": f" {t}\n"},
    ),
    "boxed, in the question": (
        lambda q, c: {"question": "\n".join([q, *lines(c)])},
        lambda letter, text: {"answer": f"\\boxed{{{letter}}}"},
        lambda t: {"answer": f"\\boxed{{{t}}}"},
    ),
    "tags, JSON text": (
        lambda q, c: {"question": q, "options": json.dumps(by_letter(c))},
        lambda letter, text: {"answer": f"<think>hm</think><answer>{letter}</answer>"},
        lambda t: {"answer": f"<answer>{t}</answer>"},
    ),
    "####, labels and texts": (
        lambda q, c: {"question": q, "choices": {"text": c, "label": list(LETTERS[: len(c)])}},
        lambda letter, text: {"answer": f"We look closely.\n#### {letter}"},
        lambda t: {"answer": f"We look closely.\n#### {t}"},
    ),
    "accepted answers, conversation": (
        lambda q, c: {"conversations": [{"from": "human", "value": q}], "choices": c},
        lambda letter, text: {"answers": [letter, f"{letter}. {text}"]},
        lambda t: {"answers": [t, t, f"{t}."]},
    ),
}


def rewritten(row: dict[str, Any], way: Way) -> dict[str, Any]:
    options, of_choice, of_other = way
    if "choices" not in row:
        return {"id": row["id"], "images": row["images"], "question": row["question"]} | of_other(row["answer"])
    choices, letter = row["choices"], row["answer"]
    truth = of_choice(letter, choices[LETTERS.index(letter)])
    return {"id": row["id"], "images": row["images"]} | options(row["question"], choices) | truth


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, and the shipped student's answers to its test questions with their scores, as ``ril eval`` gives them."""
    folder = tmp_path_factory.mktemp("rewritten")
    world = write_skills_world(folder / "world", 14, 14, 56)["test"]
    rows = [rewritten(row, WAYS["letter, list"]) for row in read_jsonl(world)]
    write_jsonl(folder / "world" / "rows.jsonl", rows)
    student = find_models()["student"]
    settings = {"--run_dir": folder / "run", "--data.validation": folder / "world" / "rows.jsonl"}
    settings |= {"--student.model": student, "--student.dtype": "float32", "--eval.score": "rules"}
    settings |= {"--eval.max_completion_length": 64}
    (folder / "empty.yaml").write_text("{}\n")
    assert main(["eval", str(folder / "empty.yaml"), *(str(x) for pair in settings.items() for x in pair)]) == 0
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_the_score_does_not_depend_on_how_truths_and_options_are_written(scored: Path, name: str) -> None:
    answers = {r["question_id"]: r for r in read_jsonl(scored / "run" / "eval" / "base.jsonl") if "question_id" in r}
    originals = {q.id: q for q in read_file(scored / "world" / "rows.jsonl")}
    path = scored / "world" / "rewritten.jsonl"
    write_jsonl(path, [rewritten(row, WAYS[name]) for row in read_jsonl(scored / "world" / "test.jsonl")])
    questions = read_file(path)
    assert [question_text(q) for q in questions] == [question_text(originals[q.id]) for q in questions]
    assert [q.images for q in questions] == [originals[q.id].images for q in questions]
    scores = score_answers([(q, answers[q.id]["text"]) for q in questions], "rules", "auto")
    right = sum(a["score"] for a in answers.values())
    assert 10 < right < 46, right  # right and wrong answers are both there
    assert {q.id: s.score for q, s in zip(questions, scores, strict=True)} == {
        i: a["score"] for i, a in answers.items()
    }
