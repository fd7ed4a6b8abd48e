"""One pass over the data finds everything that would stop a run later."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from openril.data.preflight import Quantiles, Report, preflight
from openril.recipe.schema import DataConfig
from openril.records import Question
from openril.rewards.answers import truth_problem


def image(folder: Path, name: str, size: tuple[int, int] = (8, 6), color: int = 0) -> str:
    picture = Image.new("RGB", size, (color, 0, 0))
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(folder / name)
    return name


def run(folder: Path, *rows: dict[str, Any], counter: Any = None, settings: Any = None, **options: Any) -> Report:
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return preflight(DataConfig(train=[str(path)], **(settings or {})), "train", counter, **options)


def kinds(report: Report) -> list[tuple[str, str, str]]:
    """(line, kind, level) of every problem."""
    return [(p.origin.rsplit(":", 1)[1], p.kind, p.level) for p in report.problems]


def test_good_rows_are_counted(tmp_path: Path) -> None:
    name = image(tmp_path, "a.png")
    report = run(tmp_path, {"question": "a", "answer": "1", "images": [name, name]}, {"question": "b", "answer": "two"})
    assert (report.num_questions, report.num_usable, report.num_images, report.num_text_only) == (2, 2, 2, 1)
    assert report.problems == [] and report.image_pixels.largest == 48 and report.answer_chars.largest == 3


def test_every_kind_of_problem_is_found_in_one_pass(tmp_path: Path) -> None:
    good = image(tmp_path, "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("hello")
    report = run(
        tmp_path,
        {"question": "fine", "answer": "1", "images": [good]},
        {"question": "q2", "answer": "2", "images": ["missing.png"]},
        {"question": "q3", "answer": "3", "images": ["bad.png", "text.png"]},
        {"question": "q4", "answer": "4", "images": [image(tmp_path, "huge.png", (100, 100))]},
        {"question": "q5", "answer": "5", "images": ["https://example.org/x.png"]},
        {"question": "q6", "answer": " "},
        {"question": "q7", "answer": "1", "rule": "exakt"},
        {"question": "q8", "answer": "dog", "choices": ["cat", "cow"]},
        {"question": "", "answer": "1"},
        settings={"max_image_pixels": 5000},
    )
    assert kinds(report) == [
        ("9", "empty question", "error"),
        ("2", "missing image", "error"),
        ("3", "corrupt image", "error"),
        ("3", "corrupt image", "error"),
        ("4", "decompression bomb", "error"),
        ("5", "image on the network", "error"),
        ("6", "empty answer", "error"),
        ("7", "unknown rule", "error"),
        ("8", "answer not among choices", "error"),
    ]
    assert (report.num_questions, report.num_usable) == (8, 1)
    assert str(tmp_path / "missing.png") in report.problems[1].cause


def test_empty_answers_are_a_warning_where_nothing_compares_them(tmp_path: Path) -> None:
    assert kinds(run(tmp_path, {"question": "a"}, answers_needed=False)) == [("1", "empty answer", "warning")]


@pytest.mark.parametrize("answer", ["Cat", "A", "(b)", "B.", "B. cow", "(B) cow"])
def test_answers_that_are_among_the_choices(tmp_path: Path, answer: str) -> None:
    assert run(tmp_path, {"question": "a", "answer": answer, "choices": ["cat", "cow"]}).problems == []


@pytest.mark.parametrize("answer", ["C", "A. cow", "horse"])
def test_answers_that_are_not(tmp_path: Path, answer: str) -> None:
    report = run(tmp_path, {"question": "a", "answer": answer, "choices": ["cat", "cow"]})
    assert kinds(report) == [("1", "answer not among choices", "error")]


def test_identical_content_is_found_through_copies_of_the_image(tmp_path: Path) -> None:
    names = image(tmp_path, "a.png"), image(tmp_path, "copy.png"), image(tmp_path, "other.png", color=9)
    rows = [{"id": str(i), "question": "q", "answer": f"a{i}", "images": [n]} for i, n in enumerate(names)]
    report = run(tmp_path, *rows)
    assert kinds(report) == [("2", "duplicate content", "warning")]
    assert report.problems[0].cause.endswith("q.jsonl:1 but another answer") and report.num_usable == 3


def test_too_long_prompts_say_how_long(tmp_path: Path) -> None:
    def counter(question: Question, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        tokens = sum(w * h for w, h in sizes)
        return tokens + len(question.question), tokens

    rows = [
        {"question": "abc", "answer": "1", "images": [image(tmp_path, "a.png")]},
        {"question": "abc", "answer": "1"},
    ]
    report = run(tmp_path, *rows, counter=counter, settings={"max_prompt_length": 50})
    assert (
        kinds(report) == [("1", "too long", "warning")]
        and "(50) tokens, got 51 (48 of images)" in report.problems[0].cause
    )
    assert report.num_usable == 1  # the stages leave it out
    assert report.prompt_tokens == Quantiles(3, 3, 51, 51, 54) or report.prompt_tokens == Quantiles(3, 51, 51, 51, 54)
    assert report.image_tokens is not None and report.image_tokens.total == 48


def test_what_the_processor_refuses_is_a_problem_of_the_row(tmp_path: Path) -> None:
    def counter(question: Question, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    assert kinds(run(tmp_path, {"question": "a", "answer": "1"}, counter=counter)) == [("1", "processor", "error")]


def test_each_image_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openril.data.preflight as module

    opened = []
    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda source, data: opened.append(source) or original(source, data))
    name = image(tmp_path, "a.png")
    run(tmp_path, *[{"question": str(i), "answer": "1", "images": [name]} for i in range(600)])
    assert len(opened) == 1


def test_report_prints_and_becomes_json(tmp_path: Path) -> None:
    row = {"question": "[red]a<|im_end|>", "answer": "", "images": ["[bold]missing.png"]}
    report = run(tmp_path, row, counter=lambda q, s: (1, 0))
    console = Console(file=io.StringIO(), width=200)
    report.print(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "[bold]missing.png" in shown and "1 error: missing image" in shown and "1 rows contain chat-template" in shown
    )
    again = json.loads(json.dumps(report.to_json()))
    assert (
        again["counts"] == {"missing image": 1, "empty answer": 1} and again["problems"][0]["kind"] == "missing image"
    )


def test_quantiles() -> None:
    assert Quantiles.of(range(101)) == Quantiles(0, 50, 95, 100, 5050)
    assert Quantiles.of([]) == Quantiles()


def test_answers_that_the_rule_cannot_read_back_are_named(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": "3 + 4 = 7\n#### 7"},
        {"question": "b", "answer": "<answer>B</answer>", "choices": ["cat", "dog"]},
        {"question": "c", "answer": "many", "rule": "number"},
        {"question": "d", "answer": "red or blue", "rule": "contains"},
        {"question": "e", "answer": "First line.\nSecond line that is the end"},
        {"question": "f", "answers": ["7", "First line.\nSecond line that is the end"]},
    ]
    report = run(tmp_path, *rows, truth_problem=truth_problem)
    assert kinds(report) == [(line, "unreadable answer", "warning") for line in ("3", "5", "6")]
    assert "'many'" in report.problems[0].cause and "a sentence" in report.problems[1].cause
