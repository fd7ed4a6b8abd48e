"""Rows of every supported format become questions; bad rows are reported with place and cause."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from openril.data import embedded_images
from openril.data.images import load_image
from openril.data.reading import RowProblem, read_file, read_questions
from openril.errors import DataError
from openril.recipe.schema import DataConfig
from openril.records import ImageSource, Question


def png(color: tuple[int, int, int] = (9, 9, 9)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, *rows: Any, name: str = "q.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def one(folder: Path, row: Any, columns: dict[str, str] | None = None) -> Question:
    (question,) = read_file(write(folder, row), columns)
    return question


def cause(folder: Path, row: Any, columns: dict[str, str] | None = None) -> str:
    problems: list[RowProblem] = []
    assert read_file(write(folder, row), columns, problems=problems) == []
    assert problems[0].origin == f"{folder}/q.jsonl:1"
    return problems[0].cause


def test_our_form_with_all_fields(tmp_path: Path) -> None:
    row = {"id": 7, "images": ["a.png", "/b.png"], "question": " Which? ", "answer": "B", "choices": ["x", 2]}
    question = one(tmp_path, {**row, "rule": "choice", "source": "mine", "nothing": None})
    assert question == Question(
        id="7",
        question="Which?",
        answer="B",
        images=(ImageSource(path=tmp_path / "a.png"), ImageSource(path=Path("/b.png"))),
        choices=("x", "2"),
        rule="choice",
    )
    assert question.metadata == {"source": "mine"} and question.origin == f"{tmp_path}/q.jsonl:1"


def test_text_only_rows_and_image_rows_mix(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "image": "x.png"}, {"question": "c", "images": None}]
    assert [len(q.images) for q in read_file(write(tmp_path, *rows))] == [0, 1, 0]


@pytest.mark.parametrize(
    ("answer", "text"), [("é🙂", "é🙂"), (3, "3"), (2.5, "2.5"), (True, "true"), (None, ""), (["x"], "x")]
)
def test_answers_may_be_text_numbers_or_truth_values(tmp_path: Path, answer: Any, text: str) -> None:
    assert one(tmp_path, {"question": "q", "answer": answer}).answer == text


def test_columns_map_other_names(tmp_path: Path) -> None:
    columns = {"question": "query", "answer": "label", "images": "pic"}
    question = one(tmp_path, {"query": "q", "label": "a", "pic": "p.png", "question": "unused"}, columns)
    assert (question.question, question.answer, question.images[0].path) == ("q", "a", tmp_path / "p.png")


def test_a_mapped_column_that_never_appears_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.columns: .*answer: lable"):
        read_file(write(tmp_path, {"question": "q", "label": "a"}), {"answer": "lable"})


@pytest.mark.parametrize("name", ["answer", "solution", "ground_truth"])
def test_trl_prompt_as_text(tmp_path: Path, name: str) -> None:
    question = one(tmp_path, {"prompt": "q", name: "a", "image": "x.png"})
    assert (question.question, question.answer, len(question.images)) == ("q", "a", 1)


def test_trl_prompt_as_messages_with_image_parts(tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "q"}]
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    question = one(
        tmp_path, {"prompt": prompt, "images": ["x.png"], "completion": [{"role": "assistant", "content": "a"}]}
    )
    assert (question.question, question.answer) == ("<image>q", "a")


def test_images_inside_messages(tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": "https://h/x.png"}}, {"type": "text", "text": "q"}]
    question = one(
        tmp_path, {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    )
    assert (question.images, question.answer) == ((ImageSource(url="https://h/x.png"),), "a")


def test_llava_conversation_gives_its_first_question_and_answer(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nq1"},
        {"from": "gpt", "value": "a1"},
        {"from": "human", "value": "q2"},
        {"from": "gpt", "value": "a2"},
    ]
    question = one(tmp_path, {"id": "x", "image": "x.png", "conversations": turns})
    assert (question.question, question.answer) == ("<image>\nq1", "a1")
    assert question.metadata == {"dropped_turns": 2}


BAD_ROWS = [
    ([1, 2], "", "a list"),
    ("some words", "", 'text "some words"'),
    ({"q": "x"}, "", "q"),
    ({"question": "x", "conversations": [{"from": "human", "value": "y"}]}, "", "question and conversations"),
    ({"question": 5}, "question", "int 5"),
    ({"question": "  "}, "question", "nothing"),
    ({"question": "<image>", "images": ["a"]}, "question", "nothing"),
    ({"question": "<image> x"}, "question", "1 for 0 images"),
    ({"question": "<image><image> x", "images": ["a"]}, "question", "2 for 1 images"),
    ({"question": "x", "images": [3]}, "image 1", "int 3"),
    ({"question": "x", "images": ["a", None]}, "image 2", "nothing"),
    ({"question": "x", "images": [""]}, "image 1", "an empty one"),
    ({"question": "x", "images": ["file:///etc/passwd"]}, "image 1", "file://"),
    ({"question": "x", "images": ["a"], "image": "b"}, "images", "images and image"),
    ({"question": "x", "images": 3}, "image 1", "int 3"),
    ({"question": "x", "answer": {"a": 1}}, "answer", "a mapping"),
    ({"question": "x", "choices": "A, B"}, "choices", 'text "A, B"'),
    ({"question": "x", "choices": {"A": 1, "C": 2}}, "choices", "A, C"),
    ({"question": "x", "choices": [None]}, "choice 1", "nothing"),
    ({"question": "x", "rule": 3}, "rule", "int 3"),
    ({"question": "x", "id": [1]}, "id", "a list"),
    ({"conversations": []}, "conversations", "an empty list"),
    ({"conversations": ["x"]}, "conversations: turn 1", 'text "x"'),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "conversations", "'gpt'"),
    ({"conversations": [{"from": r, "value": "x"} for r in ("human", "human")]}, "conversations", "'human'"),
    ({"conversations": [{"from": "human"}]}, "conversations: turn 1", "from"),
    ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "prompt", "'video'"),
    ({"prompt": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]}, "prompt", "3 turns"),
]


@pytest.mark.parametrize(("row", "key", "got"), BAD_ROWS)
def test_bad_rows_name_key_expected_and_got(tmp_path: Path, row: Any, key: str, got: str) -> None:
    found = cause(tmp_path, row)
    assert re.match(rf"{key + ': ' if key else ''}expected .*, got {re.escape(got)}($|\. )", found), found


def test_all_bad_rows_are_found_and_the_good_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "a"}\n{"question": \n\n{"question": ""}\n\xff\xfe\n{"question": "b"}\n')
    problems: list[RowProblem] = []
    assert [q.question for q in read_file(path, problems=problems)] == ["a", "b"]
    assert [(p.origin.rsplit(":", 1)[1], p.kind) for p in problems] == [
        ("2", "unreadable line"),
        ("4", "empty question"),
        ("5", "unreadable line"),
    ]


def test_without_a_list_the_first_bad_rows_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"question": ""}] * 20)
    with pytest.raises(DataError) as caught:
        read_questions(DataConfig(train=[str(path)]))
    assert f"{path}:1: question: " in str(caught.value) and "and 12 more" in str(caught.value)


def test_special_tokens_cannot_enter_through_data(tmp_path: Path) -> None:
    row = {
        "question": "a<|im_end|><|image_pad|> <image>?",
        "images": ["x"],
        "answer": "<|im_start|>b",
        "choices": ["<s>b"],
    }
    question = one(tmp_path, row)
    assert (question.question, question.answer, question.choices) == ("a   <image>?", "b", ("b",))
    assert question.metadata == {"special_tokens_removed": True}


def test_missing_ids_follow_from_the_content(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "1"}]
    first = [q.id for q in read_file(write(tmp_path, *rows))]
    again = [q.id for q in read_file(write(tmp_path, *reversed(rows)))]
    assert first == again[::-1] and len(set(first)) == 2


def test_an_id_used_twice_names_both_places(tmp_path: Path) -> None:
    one_file = write(tmp_path, {"id": "x", "question": "a"}, name="one.jsonl")
    two_file = write(tmp_path, {"id": "y", "question": "a"}, {"id": "x", "question": "b"}, name="two.jsonl")
    with pytest.raises(DataError, match=r"two\.jsonl:2 \(x\): id 'x' .*one\.jsonl:1"):
        read_questions(DataConfig(train=[str(one_file), str(two_file)]))


def test_the_same_row_twice_without_ids_is_called_a_duplicate(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "a"}, {"question": "a"})
    with pytest.raises(DataError, match=r"same question, answer and images as .*:1"):
        read_questions(DataConfig(train=[str(path)]))


def test_limit_cuts_training_questions_only(tmp_path: Path) -> None:
    path = str(write(tmp_path, *[{"question": str(i)} for i in range(5)]))
    data = DataConfig(train=[path], validation=[path], limit=2)
    assert (len(read_questions(data)), len(read_questions(data, "validation"))) == (2, 5)


def test_patterns_read_several_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path, {"question": name}, name=name)
    questions = read_questions(DataConfig(train=[str(tmp_path / "*.jsonl")]))
    assert [q.question for q in questions] == ["a.jsonl", "b.jsonl"]


def test_json_lists_and_json_lines_under_the_wrong_suffix(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"question": "a"}, {"question": "b"}]))
    assert [q.origin for q in read_file(path)] == [f"{path}:1", f"{path}:2"]
    path.write_text('\ufeff{"question": "a"}\n{"question": "b"}\n', encoding="utf-8")
    assert [q.question for q in read_file(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("q.json", b"[{", r"q\.json:1: .*JSON"),
        ("q.json", b'{"a": 1}', "expected a list of rows, got dict"),
        ("q.json", b"\xff", "UTF-8.* 1"),
        ("q.parquet", b"PAR1 not really", r"q\.parquet: damaged"),
        ("q.xlsx", b"a,b", r"\.jsonl, \.json, \.parquet, .*, got \.xlsx"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_file(tmp_path / name)


def test_missing_files_and_names_the_hub_cannot_give(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_file("nowhere/q.jsonl")

    def refuse(*args: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"someone/something: .*hub data set .*reach the hub"):
        read_file("someone/something")


def test_hub_names_use_split_configuration_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"query": ["a"], "label": ["b"]})
    asked = []

    def load(*names: Any) -> datasets.DatasetDict:
        asked.append(names)
        return datasets.DatasetDict(test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (question,) = read_file("me/set:small", {"question": "query", "answer": "label"}, split="test")
    assert (asked, question.question, question.answer) == ([("me/set", "small")], "a", "b")
    with pytest.raises(DataError, match="splits test, got 'train'"):
        read_file("me/set")


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "images": [{"bytes": png(), "path": None}, {"bytes": None, "path": "x.png"}]},
        {"question": "b", "images": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    first, second = read_file(tmp_path / "q.parquet")
    assert first.images == (ImageSource(data=png()), ImageSource(path=tmp_path / "x.png"))
    assert second.images == () and second.origin == f"{tmp_path}/q.parquet:2"


def test_saved_datasets_folder_with_an_image_column(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "image": datasets.Image(),
            "answer": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = {"question": ["a", "b"], "image": [Image.open(io.BytesIO(png((1, 2, 3)))), None], "answer": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    first, second = read_file(tmp_path / "saved")
    assert load_image(first.images[0]).getpixel((0, 0)) == (1, 2, 3)
    assert (second.images, first.answer, second.answer) == ((), "yes", "no")


def test_saved_splits_and_several_images(tmp_path: Path) -> None:
    features = datasets.Features({"question": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    images = [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 5))]
    rows = datasets.Dataset.from_dict({"question": ["a"], "images": [images]}, features=features)
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    (question,) = read_file(tmp_path / "saved")
    assert [load_image(i).size for i in question.images] == [(4, 4), (5, 5)]
    with pytest.raises(DataError, match="splits train, got 'validation'"):
        read_file(tmp_path / "saved", split="validation")


def test_folder_of_images_with_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(png((7, 7, 7)))
    (folder / "metadata.jsonl").write_text('{"file_name": "x.png", "question": "q", "answer": "a"}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (question,) = read_file(tmp_path / "folder")
    assert (question.question, load_image(question.images[0]).getpixel((0, 0))) == ("q", (7, 7, 7))


def test_a_folder_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="datasets folder"):
        read_file(tmp_path)


def test_embedded_images_leave_the_memory_past_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENRIL_IMAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_images, "MEMORY_LIMIT", len(png()))
    monkeypatch.setattr(embedded_images, "_held", 0)
    kept, spooled = embedded_images.keep_bytes(png()), embedded_images.keep_bytes(png((5, 5, 5)))
    assert kept.data == png() and spooled.path is not None and spooled.path.read_bytes() == png((5, 5, 5))
    assert embedded_images.keep_bytes(png((5, 5, 5))) == spooled


def test_the_example_rows_of_the_documentation_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    path = tmp_path / "q.jsonl"
    path.write_text("".join(re.findall(r"```json\n(.*?)```", page, re.S)), encoding="utf-8")
    questions = read_file(path)
    assert [(len(q.images), q.answer) for q in questions] == [
        (1, "red"), (2, "no"), (0, "B"), (1, "red"), (1, "red"), (1, "blue"), (1, "blue")
    ]  # fmt: skip


def test_floats_in_parquet_are_the_shortest_numbers_of_their_type(tmp_path: Path) -> None:
    columns = {
        "question": ["a", "b", "c"],
        "answer": pa.array([0.1, 12.7, 3.0], pa.float32()),
        "choices": pa.array([[0.1, 2.0], [12.7, 1.5], None], pa.list_(pa.float32())),
        "weight": pa.array([0.1, None, 0.30000000000000004], pa.float64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "q.parquet")
    questions = read_file(tmp_path / "q.parquet")
    assert [q.answer for q in questions] == ["0.1", "12.7", "3"]
    assert [q.choices for q in questions] == [("0.1", "2"), ("12.7", "1.5"), ()]
    assert [q.metadata.get("weight") for q in questions] == [0.1, None, 0.30000000000000004]
