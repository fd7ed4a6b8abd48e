"""The NLVR sample as question files with the teachers' texts."""

import json
import os
from pathlib import Path

import pytest

from openril.data.reading import read_questions
from openril.errors import DataError
from openril.recipe.schema import DataConfig
from openril.records import Question
from openril.rewards import rules
from playground.nlvr import Settings, mixed, prepare, statement, topic

ROOT = Path(__file__).parents[2]
NLVR = Path(os.environ.get("OPENRIL_NLVR", ROOT.parent / "shared/data/nlvr"))
needs_nlvr = pytest.mark.skipif(not (NLVR / "train.jsonl").is_file(), reason="the NLVR sample is not here")


def test_statement_is_taken_out_of_the_question():
    asked = (
        "Is the following statement true or false about the image? There is a black tower. Answer with true or false."
    )
    assert statement(asked) == "There is a black tower"


def test_topic_names_colours_things_and_a_place():
    assert topic("There are two yellow objects touching the edge") == "yellow objects, touching"
    assert topic("There is a black and a blue block at the base") == "blue and black blocks, the base"
    assert topic("Nothing known here") == "things"


def test_rows_are_spread_and_keep_their_order():
    rows = [{"n": i} for i in range(6)]
    out = mixed(rows, [{"n": "a"}, {"n": "b"}])
    assert [r["n"] for r in out if r["n"] not in ("a", "b")] == [0, 1, 2, 3, 4, 5]
    assert [i for i, r in enumerate(out) if r["n"] in ("a", "b")] == [2, 5]


def test_folder_without_the_sample_is_refused(tmp_path):
    with pytest.raises(DataError, match="name the folder of the NLVR sample"):
        prepare(Settings(tmp_path, tmp_path / "out"))


def test_row_with_another_answer_is_refused_by_line(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "1", "images": ["a.png"], "question": "?", "answer": "no"}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*true or false"):
        prepare(Settings(tmp_path, tmp_path / "out"))


@needs_nlvr
def test_whole_sample_with_rows_without_pictures(tmp_path):
    train, validation = prepare(Settings(NLVR.resolve(), tmp_path / "out", text_rows=20))
    data = DataConfig(train=[str(train)], validation=[str(validation)])
    questions = read_questions(data, "train")
    assert len(questions) == 826 + 20
    assert sum(not q.images for q in questions) == 20
    assert len(read_questions(data, "validation")) == 163 + 4
    assert all(q.images[0].path.is_file() for q in questions if q.images)
    for q in questions:
        plain = Question(q.id, q.question, q.answer, rule=q.rule)
        for style in ("a", "b"):
            assert rules.score(q.rule, plain, q.metadata[f"derivation_{style}"]) == 1.0
