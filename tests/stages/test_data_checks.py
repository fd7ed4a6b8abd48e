"""Stages say before their first step what `ril check` says about questions and responses, and stop at its errors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from openril.errors import DataError
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question, Response
from openril.responses.cache import ResponseCache
from openril.stages.check import run_check
from openril.stages.data_checks import check_questions, check_responses
from openril.stages.eval import run_eval, settings_of
from openril.stages.select import run_select
from openril.stages.sft import run_sft
from openril.stages.train import open_trainer
from support.tiny import draw_square


def recipe_for(
    folder: Path, student: Path | str = "x", rows: list[dict[str, Any]] | None = None, **more: Any
) -> Recipe:
    draw_square(folder / "a.png", "red")
    rows = rows or [
        {"id": str(i), "question": f"Which is {i}?", "answer": f"a{i}", "images": ["a.png"]} for i in range(2)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"train": [str(folder / "q.jsonl")], **more.pop("data", {})}
    train = {"algorithm": "dr_grpo", "questions_per_step": 2, "max_steps": 1, "precision": "float32", "beta": 0}
    values = {
        "run_dir": str(folder / "run"),
        "data": data,
        "student": {"model": str(student), "dtype": "float32"},
        "sft": {"enabled": False},
        "rewards": {"answer": {"kind": "rules"}},
        "train": train,
    }
    return Recipe.model_validate(values | more)


def lines(recipe: Recipe, questions: list[Question], stage: str = "train") -> list[str]:
    said: list[str] = []
    check_questions(recipe, stage, questions, said.append)
    return said


def read(recipe: Recipe) -> list[Question]:
    from openril.data.reading import read_questions

    return read_questions(recipe.data, "train")


def test_each_kind_is_one_line_with_its_count_and_first_rows(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "white").save(tmp_path / "white.png")
    Image.new("RGB", (9, 9), "red").save(
        tmp_path / "b.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")]
    )
    rows = [{"question": f"Which is {i}?", "answer": f"a{i}", "images": ["white.png"]} for i in range(5)]
    rows += [{"question": "Which?", "answer": "0.30000000000000004", "images": ["a.png"]}]
    (tmp_path / "v.jsonl").write_text(json.dumps(rows[-1] | {"question": "which? "}) + "\n")
    recipe = recipe_for(tmp_path, rows=rows, data={"validation": [str(tmp_path / "v.jsonl")]})
    noise, white, shared = lines(recipe, read(recipe))
    assert "float noise: 1 of 6 questions" in noise and "q.jsonl:6" in noise
    assert "picture of one color: 5 of 6 questions" in white and white.count("q.jsonl:") == 3 and "(255" in white
    assert "data.validation: also in data.train: 1 of 1 questions" in shared and "v.jsonl:1" in shared


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": ["gone.png"]}, "gone.png does not exist"),
        ({"images": ["cut.png"]}, "damaged"),
        ({"answer": "horse", "choices": ["b", "c"]}, "expected one of the 2 choices"),
        ({"answer": ""}, "answer: expected text"),
    ],
)
def test_rows_that_cannot_be_used_stop_the_stage_by_row(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    draw_square(tmp_path / "cut.png", "red", (300, 300))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    rows = [{"id": "1", "question": "One?", "answer": "x"}, {"id": "2", "question": "Two?", "answer": "a", **row}]
    recipe = recipe_for(tmp_path, rows=rows)
    with pytest.raises(DataError, match=rf"q\.jsonl:2 \(2\): .*{words}"):
        lines(recipe, read(recipe))


def run_open(recipe: Recipe, console: Console) -> None:
    with open_trainer(recipe, console):
        pytest.fail("the trainer was built")


@pytest.mark.parametrize("stage", [run_open, run_sft, run_select, run_eval])
def test_an_image_that_the_processor_refuses_stops_every_stage_by_row(
    tmp_path: Path, tiny_qwen: Path, stage: Callable[[Recipe, Console], Any]
) -> None:
    Image.effect_noise((300, 1), 90).convert("RGB").save(tmp_path / "thin.png")
    rows = [
        {"id": "1", "question": "One?", "answer": "a"},
        {"id": "2", "question": "?2", "answer": "b", "images": ["thin.png"]},
    ]
    more = {"selection": {"enabled": stage is run_select, "num_questions": 1, "drop_overlong": False}}
    recipe = recipe_for(tmp_path, tiny_qwen, rows, data={"validation": [str(tmp_path / "q.jsonl")], **more})
    recipe.sft.batch_size = recipe.sft.micro_batch_size = 1
    recipe.eval.score = "rules"
    with pytest.raises(DataError, match=r"q\.jsonl:2 \(2\): .*processor refuses .*thin\.png of 300 x 1 pixels: .*200"):
        stage(recipe, Console(quiet=True))


def cached(folder: Path, text: Callable[[int], str], reason: str = "stop", number: int = 6) -> list[str]:
    questions = [Question(f"q{i}", f"Which {i}?", f"word{i}", origin=f"q.jsonl:{i}") for i in range(number)]
    cache = ResponseCache.create(folder / "cache")
    for source in ("big", STUDENT):
        cache.register(source, model="m", revision=None, sampling={})
        with cache.writer(source) as writer:
            for i, q in enumerate(questions):
                writer.append(q, Response(q.id, source, 0, text(i), reason))
    said: list[str] = []
    recipe = Recipe.model_validate({"rewards": {"answer": {"kind": "rules"}}})
    check_responses(recipe, questions, cache.load(questions), said.append)
    return said


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        (lambda i: "" if i else "The answer is word0.", "stop", "5 of 6 cached responses looked at are empty"),
        (lambda i: "It is a dog.", "stop", "6 of 6 cached responses looked at are identical ('It is a dog.')"),
        (lambda i: f"The answer is word{i}.", "length", "6 of 6 cached responses looked at are cut"),
        (lambda i: f"I'm sorry, but I can't help with {i}.", "stop", "6 of 6 cached responses looked at are refusals"),
        (
            lambda i: f"Let me look at picture {i}. There are",
            "stop",
            "6 of 6 cached responses looked at state no answer",
        ),
    ],
)
def test_a_teacher_whose_responses_teach_nothing_is_named(
    tmp_path: Path, text: Callable[[int], str], reason: str, words: str
) -> None:
    said = cached(tmp_path, text, reason)
    assert any(f"teacher big: {words}" in line for line in said) and not any(STUDENT in line for line in said)


def test_a_teacher_that_answers_is_not_named(tmp_path: Path) -> None:
    assert cached(tmp_path, lambda i: f"The answer is word{i}.") == []


def test_an_evaluation_is_keyed_by_everything_that_verdicts_depend_on(tmp_path: Path) -> None:
    def key(**judge: Any) -> Any:
        endpoint = {"base_urls": ["http://h/v1"], "model": "j", **judge}
        return settings_of(recipe_for(tmp_path, judge=endpoint, eval={"score": "judge"}), [])["judge"]

    assert key() == key(concurrency=3) and key() != key(extra_body={"top_p": 0.5}) != key(omit=["temperature"])


def test_check_names_shared_questions_and_flat_pictures(tmp_path: Path, tiny_qwen: Path) -> None:
    Image.new("L", (60, 60)).save(tmp_path / "black.png")
    rows = [{"id": str(i), "question": f"Which is {i}?", "answer": f"a{i}", "images": ["black.png"]} for i in range(2)]
    recipe = recipe_for(tmp_path, tiny_qwen, rows, data={"validation": [str(tmp_path / "q.jsonl")]})
    recipe.eval.score = "rules"
    console = Console(file=io.StringIO(), width=300)
    assert run_check(recipe, console) == 0
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert "also in data.train: 2 of 2 questions" in page and "2 warning: picture of one color" in page
