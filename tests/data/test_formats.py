"""Rows as the data sets and training frameworks of the field write them: read in full, or refused with key and fix."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from openril.data.images import load_image
from openril.data.preflight import preflight
from openril.data.question_text import interleave, question_text
from openril.data.reading import RowProblem, read_file, read_questions
from openril.errors import DataError
from openril.recipe.schema import DataConfig
from openril.records import Question


def png(shade: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = base64.b64encode(png()).decode()


def read(folder: Path, row: Any, columns: dict[str, str] | None = None) -> Question:
    (folder / "q.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (question,) = read_file(folder / "q.jsonl", columns)
    return question


def pictures(question: Question, folder: Path) -> list[str]:
    """The names of a question's images: paths relative to the folder, addresses, or "png" for the encoded one."""
    return [
        str(i.path.relative_to(folder)) if i.path else i.url or "png" if i.data in (None, png()) else "other"
        for i in question.images
    ]


def talk(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("human", "gpt") * len(turns)
    return {"conversations": [{"from": r, "value": t} for r, t in zip(roles, turns, strict=False)], **more}


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}], **more}


OPTIONS = {"question": "q", "answer": "B"}
RED_BLUE = (("red", "blue"), "B")
CHOICES: list[tuple[dict[str, Any], dict[str, str], tuple[tuple[str, ...], str]]] = [
    ({"options": ["red", "blue"]}, {}, RED_BLUE),
    ({"options": "['red', 'blue']"}, {}, RED_BLUE),  # MMMU
    ({"options": '["red", "blue"]'}, {}, RED_BLUE),
    ({"options": {"A": "red", "B": "blue", "C": None}}, {}, RED_BLUE),
    ({"options": '{"A": "red", "B": "blue"}'}, {}, RED_BLUE),
    ({"options": ["A. red", "B. blue"]}, {}, RED_BLUE),  # Video-R1
    ({"options": "(A) red\n(B) blue"}, {}, RED_BLUE),
    ({"choices": [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}]}, {}, RED_BLUE),
    ({"choices": {"text": ["red", "blue"], "label": ["A", "B"]}}, {}, RED_BLUE),  # ARC
    ({"choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answer": "2"}, {}, RED_BLUE),
    ({"option1": "red", "option2": "blue", "answer": "2"}, {}, RED_BLUE),  # WinoGrande
    ({"A": "red", "B": "blue", "C": None, "D": float("nan")}, {}, RED_BLUE),  # MMBench
    ({"choice_a": "red", "choice_b": "blue"}, {}, RED_BLUE),  # SEED-Bench
    ({"option_A": 1, "option_B": 2}, {}, (("1", "2"), "B")),
    ({"choices": None, "options": ["red", "blue"]}, {}, RED_BLUE),
    ({"options": []}, {}, ((), "B")),
    ({"options": "[]"}, {}, ((), "B")),
    ({"A": "alone"}, {}, ((), "B")),
    ({"options": {"temperature": 1}}, {"choices": ""}, ((), "B")),
    ({"options": ["x"], "labels": ["red", "blue"]}, {"choices": "labels"}, RED_BLUE),
    ({"meta": {"options": ["red", "blue"]}}, {"choices": "meta.options"}, RED_BLUE),
    ({"choices": ["red", "blue"], "answer": 1}, {"answer_index": "answer"}, RED_BLUE),  # ScienceQA
    ({"choices": ["red", "blue"], "answer": "1"}, {"answer_index": "answer"}, RED_BLUE),
    ({"choices": ["red", "blue"], "answer": 2.0}, {"answer_number": "answer"}, RED_BLUE),
    ({"choices": ["2", "0", "1"], "answer": 2}, {"answer_index": "answer"}, (("2", "0", "1"), "C")),
    ({"choices": ["red", "blue"], "answer": "blue", "answer_index": 1}, {}, (("red", "blue"), "blue")),
    ({"choices": ["red", "blue"], "answer": None, "answer_index": 1}, {}, RED_BLUE),
    ({"choices": ["red", "blue"], "answer": "blue", "answer_idx": "B"}, {}, (("red", "blue"), "blue")),  # MedQA
    ({"choices": ["red", "blue"], "answer": ["B"]}, {}, RED_BLUE),
    ({"choices": ["red", "blue"], "answer": ["B", "blue"]}, {}, RED_BLUE),
]


@pytest.mark.parametrize(("row", "columns", "expected"), CHOICES)
def test_choices_and_the_answer_among_them(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], expected: tuple[Any, str]
) -> None:
    question = read(tmp_path, OPTIONS | row, columns)
    assert (question.choices, question.answer, question.other_answers) == (*expected, ())


TRUTHS: list[tuple[dict[str, Any], dict[str, str], tuple[str, ...]]] = [
    ({"answers": ["red", "crimson"]}, {}, ("red", "crimson")),
    ({"answers": ["12 km", "12", "12", ""]}, {}, ("12", "12 km")),  # TextVQA: the most frequent first
    ({"answers": [{"answer": "red", "answer_confidence": "yes"}, {"answer": "red"}]}, {}, ("red",)),  # VQAv2
    ({"answers": {"text": ["red", "crimson"], "answer_start": [1, 2]}}, {}, ("red", "crimson")),  # SQuAD
    ({"answers": []}, {}, ("",)),
    ({"answer": ["red", "crimson"]}, {}, ("red", "crimson")),
    ({"answer": "red", "answers": ["crimson", "red"]}, {}, ("red", "crimson")),
    ({"answer": "['red', 'crimson']"}, {"answers": "answer"}, ("red", "crimson")),  # MMMU, open questions
    ({"label": ["14"]}, {"answer": "label"}, ("14",)),  # ChartQA
    ({"reward_model": {"style": "rule", "ground_truth": "red"}}, {}, ("red",)),  # verl
    ({"reward_model": {"ground_truth": {"target": ["red", "crimson"]}}},
     {"answer": "reward_model.ground_truth.target"}, ("red", "crimson")),
    ({"extra_info": {"answer": 3}}, {"answer": "extra_info.answer"}, ("3",)),
    ({"answer": "red", "solution": "because"}, {}, ("red",)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "expected"), TRUTHS)
def test_ground_truths(tmp_path: Path, row: Any, columns: dict[str, str], expected: tuple[str, ...]) -> None:
    assert read(tmp_path, {"question": "q"} | row, columns).answers == expected


PICTURES: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"question": "q", "image": PNG}, "q", ["png"]),
    ({"question": "q", "image": {"bytes": PNG}}, "q", ["png"]),
    ({"question": "q", "image": {"bytes": None, "path": "a.png"}}, "q", ["a.png"]),
    ({"question": "q", "images": '["a.png", "b.png"]'}, "q", ["a.png", "b.png"]),
    ({"question": "<image 1> or <image 2>", "image_1": "a.png", "image_2": "b.png", "image_3": None},
     "<image> or <image>", ["a.png", "b.png"]),  # MMMU
    ({"question": "Is <image 2> like <image 1>?", "images": ["a.png", "b.png"]},
     "Is <image> like <image>?", ["b.png", "a.png"]),
    ({"question": "<image 1> What is in <image 1>?", "image": "a.png"}, "<image> What is in image 1?", ["a.png"]),
    ({"question": "<|image_1|>\nq", "image": "a.png"}, "<image>\nq", ["a.png"]),  # Phi-3.5
    ({"question": "<ImageHere>q", "image": "a.png"}, "<image>q", ["a.png"]),
    ({"question": "<Img><ImageHere></Img>q", "image": "a.png"}, "<image>q", ["a.png"]),  # InternLM-XComposer
    ({"question": "(<image>./</image>)\nq", "image": "a.png"}, "<image>\nq", ["a.png"]),  # MiniCPM-V
    ({"question": "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>q", "image": "a.png"}, "<image>q", ["a.png"]),
    ({"question": "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nq", "image": "a.png"}, "<image>\nq", ["a.png"]),  # InternVL
    ({"question": "<image>a.png</image>q"}, "<image>q", ["a.png"]),
    ({"question": "<img_1> q", "image": "a.png"}, "<image> q", ["a.png"]),
    ({"question": "[IMG]q", "image": "a.png"}, "<image>q", ["a.png"]),
    ({"question": "<Image>q", "image": "a.png"}, "<image>q", ["a.png"]),
    (talk("Picture 1: <img>a.png</img>\nq", "a"), "Picture 1: <image>\nq", ["a.png"]),  # Qwen-VL
    ({"question": "<img> https://h/x.png </img>q"}, "<image>q", ["https://h/x.png"]),
    (chat([{"image": "a.png"}, {"text": "q"}]), "<image>q", ["a.png"]),
    (chat([{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "data:x"}}]), "q<image>", ["data:x"]),
    (chat([{"type": "input_image", "image_url": "https://h/x.png"}, {"type": "input_text", "text": "q"}]),
     "<image>q", ["https://h/x.png"]),
    (chat([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
           {"type": "text", "text": "q"}]), "<image>q", ["png"]),  # Anthropic
    (chat([{"type": "image", "text": None}, {"type": "text", "text": "q", "image": None}], images=["a.png"]),
     "<image>q", ["a.png"]),
    ({"texts": [{"user": "q", "assistant": "a", "source": "x"}], "images": [{"bytes": PNG}]}, "q", ["png"]),  # Cauldron
    ({"texts": [{"system": "s", "input": "<image>q", "output": "a"}], "image": "a.png"}, "<image>q", ["a.png"]),  # XTuner
    ({"messages": json.dumps([{"role": "user", "content": "<image>q"}]), "image": "a.png"}, "<image>q", ["a.png"]),
    (talk("q", "a", "<image>and this?", "b", image="later.png"), "q", []),
    (talk("<image>q", "a", "<image>and this?", "b", image=["a.png", "later.png"]), "<image>q", ["a.png"]),
    (talk("q", "a", "and its size?", "b", image="a.png"), "q", ["a.png"]),
    (talk("<img>a.png</img>q", "a", "<img>later.png</img>and?", "b"), "<image>q", ["a.png"]),
    ({"question": "q", "image": "no.png", "images": []}, "q", ["no.png"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text", "images"), PICTURES)
def test_images_and_their_places(tmp_path: Path, row: dict[str, Any], text: str, images: list[str]) -> None:
    question = read(tmp_path, row, {"question": "texts"} if "texts" in row else None)
    assert (question.question, pictures(question, tmp_path)) == (text, images)
    assert "special_tokens_removed" not in question.metadata


def test_a_mapped_column_of_images_replaces_images_and_image(tmp_path: Path) -> None:
    row = {"question": "q", "image": "path.png", "decoded_image": {"bytes": PNG}}  # MathVista
    question = read(tmp_path, row, {"images": "decoded_image"})
    assert pictures(question, tmp_path) == ["png"] and question.metadata == {"image": "path.png"}


@pytest.mark.parametrize(
    ("choices", "question", "images", "parts"),
    [
        ([{"bytes": PNG}, {"path": "b.png"}], "q", [], ["q\nA. ", 0, "\nB. ", 1]),
        ([{"path": "b.png"}, {"path": "c.png"}], "q", ["a.png"], [0, "q\nA. ", 1, "\nB. ", 2]),
        (["<image 2>", "<image 3>"], "<image 1>q", ["a.png", "b.png", "c.png"], [0, "q\nA. ", 1, "\nB. ", 2]),
        (["<image>", "none"], "q", ["a.png"], ["q\nA. ", 0, "\nB. none"]),
    ],
)
def test_images_as_choices_are_shown_in_their_lines(
    tmp_path: Path, choices: list[Any], question: str, images: list[str], parts: list[Any]
) -> None:
    read_one = read(tmp_path, {"question": question, "choices": choices, "images": images, "answer": "B"})
    shown = interleave(question_text(read_one), [{"image": i} for i in range(len(read_one.images))])
    assert [part.get("text", part.get("image")) for part in shown] == parts


CONTEXTS: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"instruction": "Answer.", "input": "Which color?", "output": "red"}, {}, "Answer.\nWhich color?"),  # Alpaca
    ({"instruction": "Which color?", "input": "", "output": "red"}, {}, "Which color?"),
    ({"instruction": "Answer.", "input": "Which?"}, {"question": "instruction"}, "Answer.\nWhich?"),
    ({"question": "Which?", "hint": "One color.", "A": "red", "B": "blue"}, {}, "One color.\nWhich?"),  # MMBench
    ({"question": "Which?", "hint": "One color.", "choices": ["a", "b"]}, {}, "Which?"),
    ({"question": "Which?", "hint": "One color."}, {"context": "hint"}, "One color.\nWhich?"),
    ({"query": "Which?", "input": "One color."}, {"question": "query", "context": "input"}, "One color.\nWhich?"),
    ({"query": "Which?", "input": "One color."}, {"question": "query", "context": ""}, "Which?"),
    ({"query": "Which?", "history": [["a", "b"]]}, {"question": "query", "history": ""}, "Which?"),
    ({"question": "Which?", "history": [], "videos": [], "audios": None}, {}, "Which?"),
    ({"question": "Which?", "video": "a.mp4"}, {"videos": ""}, "Which?"),
]


@pytest.mark.parametrize(("row", "columns", "text"), CONTEXTS)
def test_text_that_belongs_to_the_question(tmp_path: Path, row: Any, columns: dict[str, str], text: str) -> None:
    question = read(tmp_path, row, columns)
    assert question.question == text and question.answer == row.get("output", "")


REFUSED: list[tuple[dict[str, Any], dict[str, str], str, str, str]] = [
    # row, data.columns, key, what was found, words of the fix
    ({"question": "q", "videos": ["a.mp4"]}, {}, "videos", "a list", 'videos: ""'),
    ({"question": "q", "audio": "a.wav"}, {}, "audio", "a.wav", 'audios: ""'),
    ({"question": "<video>q"}, {}, "question", "<video>", "leave the row out"),
    ({"question": "<|video_pad|>q"}, {}, "question", "<|video_pad|>", "leave the row out"),
    (chat([{"type": "video", "video": "a.mp4"}]), {}, "messages", "'video'", "leave the row out"),
    (chat([{"type": "input_audio", "input_audio": {}}]), {}, "messages", "'input_audio'", "leave the row out"),
    ({"query": "q", "history": [["a", "b"]]}, {"question": "query"}, "history", "a list", 'history: ""'),
    ({"query": "q", "input": "more"}, {"question": "query"}, "input", 'text "more"', "context: input"),
    ({"question": "<image 1>q"}, {}, "question", "1 for 0 images", "marker"),
    ({"question": "<ImageHere>q"}, {}, "question", "1 for 0 images", "marker"),
    ({"question": "<image 1><image 3>", "images": ["a", "b"]}, {}, "question", "nothing", "text"),
    ({"question": "<image 1> <image 3> q", "images": ["a"]}, {}, "question", "2 for 1 images", "marker"),
    ({"question": "<image 2><image 1> is <image 1> q", "images": ["a", "b"]}, {}, "question", "", "order of their numbers"),
    ({"question": "q <img>a.png</img>", "image": "b.png"}, {}, "images", "the text and image", "Keep one"),
    ({"question": "q", "image_1": "a", "image_3": "b"}, {}, "images", "image_1, image_3", "without gaps"),
    ({"question": "q", "image": "/9j/" + "A" * 401}, {}, "image 1", '"/9j/AAAA', "base64"),
    (OPTIONS | {"choices": ["a", "b"], "options": ["c"]}, {}, "choices", "choices and options", "data.columns"),
    (OPTIONS | {"options": {"temperature": 1}}, {}, "options", "temperature", 'choices: ""'),
    (OPTIONS | {"options": "['red' 'blue']"}, {}, "options", "['red' 'blue']", "a list"),  # a printed array
    (OPTIONS | {"A": "red", "B": "blue", "D": "green"}, {}, "choices", "A, B, D", "without gaps"),
    (OPTIONS | {"choices": [{"text": "red", "correct": True}]}, {}, "choice 1", "text, correct", "an image"),
    (OPTIONS | {"choices": ["a.png", "b.png"]}, {}, "choices", "'a.png'", '{"path": ...}'),
    (OPTIONS | {"choices": {"text": ["a", "b"], "label": ["A"]}}, {}, "choices", "1 for 2", "one label per text"),
    ({"question": "q", "choices": ["red", "blue"], "answer": 1}, {}, "answer", "1, which is neither", "answer_index: answer"),
    ({"question": "q", "choices": ["a", "b"], "label": 2}, {"answer_index": "label"}, "label", "2", "from 0 to 1"),
    ({"question": "q", "choices": ["a", "b"], "label": "x1"}, {"answer_index": "label"}, "label", 'text "x1"', "place"),
    ({"question": "q", "label": 1}, {"answer_index": "label"}, "answer_index", "none", "choices"),
    ({"question": "q", "choices": ["a", "b"], "answer": "a", "answer_index": 1}, {}, "answer_index", "1, which is B",
     "answer_number"),
    ({"question": "q", "choices": {"text": ["2", "1"], "label": ["1", "2"]}, "answer": "1"}, {}, "answer", "'1'", "letter"),
    ({"question": "q", "choices": ["a", "b"], "answer": ["A", "B"]}, {}, "answer", "'A', 'B'", "several"),
    ({"question": "q", "answer": "B", "answers": ["red", "blue"]}, {}, "answers", "'B'", "choices: answers"),
    ({"question": "q", "answer": {"target": "a"}}, {}, "answer", "a mapping", "text or a number"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "key", "found", "fix"), REFUSED)
def test_refused_rows_name_key_found_and_fix(
    tmp_path: Path, row: Any, columns: dict[str, str], key: str, found: str, fix: str
) -> None:
    problems: list[RowProblem] = []
    (tmp_path / "q.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert read_file(tmp_path / "q.jsonl", columns, problems=problems) == []
    cause = problems[0].cause
    assert cause.startswith(f"{key}: ") and found in cause and fix in cause and len(cause) < 400, cause


def test_repeated_ids_name_the_way_on(tmp_path: Path) -> None:
    rows = [talk(f"<image>\n{q}", "a", id="1", image="a.png") for q in ("x", "y", "y")]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"id '1' is already used .*data\.columns: \{id: \"\"\}"):
        read_questions(DataConfig(train=[str(path)]))
    problems: list[RowProblem] = []
    questions = read_questions(DataConfig(train=[str(path)], columns={"id": ""}), problems=problems)
    assert [q.question for q in questions] == ["<image>\nx", "<image>\ny"] and questions[0].id != questions[1].id
    assert [(p.kind, p.level) for p in problems] == [("repeated row", "warning")]
    assert len(read_questions(DataConfig(train=[str(path)], columns={"id": ""}))) == 2  # a warning stops nothing


PRETTY = json.dumps({"question": "a"}, indent=2) + "\n" + json.dumps({"question": "b"}, indent=2) + "\n"
ROWS = [{"question": "a"}, {"question": "b"}]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("q.json", PRETTY, ["1", "4"]),
        ("q.jsonl", PRETTY, ["1", "4"]),
        ("q.jsonl", "\ufeff" + PRETTY, ["1", "4"]),
        ("q.jsonl", json.dumps(ROWS, indent=1), ["1", "1"]),
        ("q.jsonl", '{"question":\n "a"}\n{"question": "b"}', ["1", "3"]),
        ("q.json", '{"question": "a"} {"question": "b"}', ["1", "1"]),
        ("q.json", json.dumps({"7": ROWS[0], "9": ROWS[1]}), ["1", "2"]),  # ScienceQA, MathVista: rows by id
        ("q.jsonl.gz", "\n".join(map(json.dumps, ROWS)), ["1", "2"]),
        ("q.json.gz", json.dumps(ROWS), ["1", "2"]),
        ("q.csv", "\ufeffquestion,answer\na,\nb,\n", ["2", "3"]),
        ("q.tsv", "question\tanswer\na\t\nb\t\n", ["2", "3"]),
    ],
)
def test_files(tmp_path: Path, name: str, text: str, lines: list[str]) -> None:
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    questions = read_file(tmp_path / name)
    assert [q.question for q in questions] == ["a", "b"]
    assert [q.origin.rsplit(":", 1)[1] for q in questions] == lines


def test_a_broken_object_over_several_lines_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(PRETTY + '{\n "question": "c",\n "answer" 1\n}\n')
    problems: list[RowProblem] = []
    assert len(read_file(tmp_path / "q.jsonl", problems=problems)) == 2
    assert [p.origin for p in problems] == [f"{tmp_path}/q.jsonl:7"] and "line 9" in problems[0].cause


def test_a_first_line_that_is_cut_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question":\n{"question": "b"}\n{"question": "c"}\n')
    problems: list[RowProblem] = []
    assert [q.question for q in read_file(tmp_path / "q.jsonl", problems=problems)] == ["b", "c"]
    assert [p.origin for p in problems] == [f"{tmp_path}/q.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("q.json", b'{"version": 1, "data": []}', "dict with version, data"),
        ("q.jsonl.gz", b"not compressed", r"q\.jsonl\.gz: cannot be read"),
        ("q.csv", b"question,answer\na,b,c\n", r"q\.csv:2: expected 2 cells"),
        ("q.csv", b"question\n\xff\n", r"q\.csv: not a table in UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_file(tmp_path / name)


def test_a_table_of_vlmevalkit(tmp_path: Path) -> None:
    with open(tmp_path / "q.tsv", "w", newline="") as f:
        table = csv.writer(f, delimiter="\t")
        table.writerow(["index", "image", "question", "hint", "A", "B", "C", "answer", "category"])
        table.writerow([7, PNG, "Which?", "Look\nhere.", "red", "blue", "", "B", "color"])
    (question,) = read_file(tmp_path / "q.tsv")
    assert (question.question, question.choices, question.answer) == ("Look\nhere.\nWhich?", ("red", "blue"), "B")
    assert question.images[0].data == png() and question.metadata == {"index": "7", "category": "color"}


def test_check_lists_the_columns_and_what_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows: list[dict[str, Any]] = [
        {"question": "a", "options": ["x", "y"], "answer": "A", "source": "s", "image": "a.png"},
        {"question": "b", "answers": ["1", "one"], "hint": "h", "picture": "a.png", "system": "Be brief."},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}], "answer": "['x', 'y']"},
        talk("d", "e", "<image>\nf?", "g", image="a.png"),
        {"question": "![](a.png) g", "answer": "h"},
        {"question": "i", "choices": ["1", "0"], "answer": 0},
        {"question": "j", "answer": "h", "clip": "a.mp4"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = preflight(DataConfig(train=[str(path)]))
    assert report.errors == []
    assert report.columns_read == {
        "question": 5, "options as choices": 1, "choices": 1, "answer": 5, "answers": 1, "image": 2,
        "messages as question": 1, "conversations as question": 1,
    }  # fmt: skip
    assert report.columns_kept == {"source": 1, "hint": 1, "picture": 1, "system": 1, "clip": 1}
    assert (report.dropped_turns, report.dropped_images, report.num_system, report.num_several_answers) == (2, 1, 2, 1)
    warned = Counter((p.kind, p.origin.rsplit(":", 1)[1]) for p in report.warnings)
    assert warned == Counter(
        [("unread column", "2"), ("unread image", "2"), ("unread image", "5"), ("unread video", "7"), ("answer is a list", "3"),
         ("ambiguous answer", "6"), ("picture of one color", "1")]
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    report.print(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "options as choices (1)" in shown and "columns kept as metadata: source (1), hint (1)" in shown
    assert re.search(r"2 rows have a system text", shown) and "1 images of ignored turns" in shown
    assert "1 rows have several accepted answers" in shown
    quiet = {"context": "", "images": "picture", "answers": "", "answer_index": "place"}
    kinds = {p.kind for p in preflight(DataConfig(train=[str(path)], columns=quiet)).warnings}
    assert not kinds & {"unread column"}


@pytest.mark.parametrize(("last", "kinds"), [(["x", "y", "z"], ["answers like choices"]), (["x", "y"], [])])
def test_equally_many_accepted_answers_in_every_row_may_be_choices(
    tmp_path: Path, last: list[str], kinds: list[str]
) -> None:
    rows = [{"question": "q1", "answers": ["a", "b", "c"]}, {"question": "q2", "answer": "x", "answers": last}]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [p.kind for p in preflight(DataConfig(train=[str(path)])).problems] == kinds


def test_numbers_among_the_choices_that_cannot_be_places_are_texts(tmp_path: Path) -> None:
    rows = [{"question": f"q{a}", "choices": ["2", "0", "9"], "answer": a} for a in (2, 9)]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert preflight(DataConfig(train=[str(path)])).problems == []  # 9 is no place among three


def test_a_missing_answer_names_the_columns_that_may_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "q", "choices": ["a", "b"], "correct_choice_idx": 1}))  # A-OKVQA
    (problem,) = preflight(DataConfig(train=[str(path)])).errors
    assert problem.kind == "empty answer" and "correct_choice_idx" in problem.cause
    columns = {"answer_index": "correct_choice_idx"}
    assert preflight(DataConfig(train=[str(path)], columns=columns)).problems == []


def test_long_image_names_are_cut_in_messages(tmp_path: Path) -> None:
    question = read(tmp_path, {"question": "q", "image": "x/" * 2000 + "a.png"})
    with pytest.raises(DataError) as caught:
        load_image(question.images[0])
    assert len(str(caught.value)) < 300 and str(caught.value).count("a.png") == 1
