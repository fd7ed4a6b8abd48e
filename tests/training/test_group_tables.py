"""Groups as tables in trackers: what a table holds, how it is bounded, and that no text in it is markup."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image

from openril.records import Group, ImageSource, Question, Response, Rollout
from openril.training.group_tables import COLUMNS, log_groups, markdown, picture_of, plain_cell, table_rows
from support.loop import make_trainer, tiny_recipe

HOSTILE = "<script>alert(1)</script> ![x](http://evil.example/a.png) [l](javascript:alert(1)) | a\nb `c` **d**"


class Recorder(GeneralTracker):
    """A tracker that remembers what it is given. For TensorBoard it is its own writer, for others its own run."""

    requires_logging_directory = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[str, Any, int | None]] = []
        super().__init__()

    @property
    def tracker(self) -> Recorder:
        return self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict) -> None: ...

    def log(self, values: dict, step: int | None, **kwargs: Any) -> None:
        self.calls += [(name, value, step) for name, value in values.items() if not isinstance(value, float)]

    def add_text(self, tag: str, text: str, global_step: int) -> None:
        self.calls.append((tag, text, global_step))

    def add_image(self, tag: str, pixels: Any, global_step: int, dataformats: str) -> None:
        self.calls.append((tag, pixels.shape, global_step))

    def flush(self) -> None: ...


@pytest.fixture
def groups(tmp_path: Path) -> tuple[list[Group], dict[str, Question]]:
    """Six groups of two; all but the last with a picture that only the question knows."""
    Image.new("RGB", (512, 128), "red").save(tmp_path / "red.png")
    groups, questions = [], {}
    for i in range(6):
        images = (ImageSource(path=tmp_path / "red.png"),) if i < 5 else ()
        question = Question(
            id=f"q{i}", question="How many? " + HOSTILE, answer="3", other_answers=("three",), images=images
        )
        questions[question.id] = question
        named = Question(id=question.id, question=question.question, answer="3", other_answers=("three",))
        own = Rollout(
            Response(question.id, "student", 0, f"{HOSTILE} so the answer is 3", token_ids=(1, 2)), 0.25, 1.0, None
        )
        own.explanation, own.reward, own.advantage = HOSTILE, 2.0, 0.5
        groups.append(Group(named, [own, Rollout(Response(question.id, "teacher_a", 0, "x" * 5000, "length"))]))
    return groups, questions


def test_a_row_holds_what_the_step_computed(groups: tuple[list[Group], dict[str, Question]]):
    own, teacher = table_rows(7, groups[0][:1], groups[1])
    assert tuple(sorted(own)) == tuple(sorted(COLUMNS)) == tuple(sorted(teacher))
    assert own["picture"].size == (256, 64) and own["picture"] is teacher["picture"]
    kept = (
        "step",
        "group",
        "question_id",
        "truth",
        "source",
        "extracted",
        "student_prob",
        "verdict",
        "reward",
        "advantage",
        "tokens",
    )
    assert [own[k] for k in kept] == [7, 0, "q0", "3 | three", "student", "3", 0.25, None, 2.0, 0.5, 2]
    assert (teacher["finish_reason"], teacher["tokens"], len(teacher["text"])) == (
        "length",
        None,
        4000 + len(" (1000 more characters)"),
    )


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tables_of_a_bounded_number_of_groups(
    groups: tuple[list[Group], dict[str, Question]], name: str, monkeypatch: pytest.MonkeyPatch
):
    library: Any = types.ModuleType(name)
    library.Image = lambda picture: ("picture", picture.size)
    library.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]
    monkeypatch.setitem(__import__("sys").modules, name, library)
    tracker = Recorder(name)
    log_groups([tracker], 3, groups[0], groups[1])
    ((key, table, step),) = tracker.calls
    assert (key, step, len(table)) == ("groups", 3, 8)  # four groups of two
    assert {row["picture"] for row in table} == {("picture", (256, 64))}
    log_groups([tracker], 4, groups[0][5:], groups[1])
    assert {row["picture"] for row in tracker.calls[1][1]} == {None}


def test_tensorboard_gets_a_text_and_a_picture_for_each_group(groups: tuple[list[Group], dict[str, Question]]):
    tracker = Recorder("tensorboard")
    log_groups([tracker], 3, groups[0][3:], groups[1])
    assert [(name, step) for name, _, step in tracker.calls] == [
        ("groups/0", 3), ("groups/0", 3), ("groups/1", 3), ("groups/1", 3), ("groups/2", 3),
    ]  # fmt: skip
    assert tracker.calls[1][1] == (64, 256, 3)
    lines = tracker.calls[0][1].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 and all(row.count("|") == rows[0].count("|") for row in rows)


def test_no_text_is_markup(groups: tuple[list[Group], dict[str, Question]]):
    text = markdown(table_rows(1, groups[0][:1], groups[1]))
    for dangerous in ("<script", "![", "](", "javascript:", "http:", "`", "**"):
        assert dangerous not in text
    assert plain_cell("a|b<i>\n_c_") == "a&#124;b&lt;i&gt;<br>&#95;c&#95;"
    assert [plain_cell(v) for v in (None, 2, 0.123456)] == ["", "2", "0&#46;123"]


def test_pictures_that_cannot_be_read_are_left_out(tmp_path: Path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    red, gone = ImageSource(path=tmp_path / "red.png"), ImageSource(path=tmp_path / "gone.png")
    away = ImageSource(url="https://example.com/a.png")
    assert picture_of([gone, away]) is None and picture_of([]) is None
    both = picture_of([red, gone, red])
    assert both is not None and both.size == (60, 20) and both.getpixel((45, 10)) == (255, 0, 0)


def test_the_loop_logs_groups_with_the_pictures_of_their_questions(tmp_path: Path, tiny_qwen: Path):
    settings = {"train__log_groups_every": 2, "train__log_to": ["tensorboard"], "train__algorithm": "dr_grpo"}
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen, **settings), tmp_path)
    tracker = Recorder("tensorboard")
    trainer.accelerator.trackers = [tracker]
    trainer.train()
    assert {step for _, _, step in tracker.calls} == {2}  # of three steps
    pictures = sum(bool(question.images) for question, _ in trainer.batch_at(1))
    assert sum(isinstance(value, tuple) for _, value, _ in tracker.calls) == pictures > 0
