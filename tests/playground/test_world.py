"""The world's answers, recomputed from the scenes by other means, and its files."""

import json
import re
from collections import Counter

import pytest
from PIL import Image

from openril.data.reading import read_questions
from openril.recipe.schema import DataConfig
from openril.records import Question
from openril.rewards import rules
from playground.scenes import CELL, COLOURS, SHAPES, SIDE, Thing, render, things
from playground.world import KINDS, make_questions, write_world


@pytest.fixture(scope="module")
def made():
    return make_questions("train", 240, seed=3)


def cells(scene_text):
    return [tuple(cell.split()) for cell in scene_text.split("|") if cell]


def recomputed(row):
    """The answer, read off the question's words and the scene's own description."""
    scenes = [cells(scene) for scene in row["scenes"]]
    seen = scenes[0] if scenes else []
    digits = [int(name) for _, name in seen if name.isdigit()]
    question, kind = row["question"], row["skill"]
    if kind == "count":
        colour = re.search(r"many (\w+) shapes", question)[1]
        return str(sum(c == colour and n in SHAPES for c, n in seen))
    if kind == "colour":
        name = re.search(r"is the (\w+)\?", question)[1]
        (colour,) = {c for c, n in seen if n == name}
        return colour
    if kind == "shape":
        colour = re.search(r"is (\w+)\?", question)[1]
        (name,) = {n for c, n in seen if c == colour}
        return name
    if kind == "sum":
        assert len(digits) == 2
        return str(sum(digits))
    if kind == "statement":
        name, said = re.search(r"number of (\w+)s is (\d)", question).groups()
        return str(sum(n == name for _, n in seen) == int(said)).lower()
    if kind == "choice":
        (colour,) = {c for c, n in seen if n.isdigit()}
        return "ABCD"[row["choices"].index(colour)]
    if kind == "text":
        return str(sum(map(int, re.findall(r"\d+", question))))
    first, second = ([int(n) for _, n in scene if n.isdigit()] for scene in scenes)
    assert len(first) == len(second) == 1
    return "first" if first > second else "second"


def test_answers_are_what_the_scenes_say(tmp_path):
    train, validation = write_world(tmp_path / "world", 160, 40, seed=1)
    for path in (train, validation):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert recomputed(row) == row["answer"], row


def test_every_derivation_ends_in_the_answer_the_rules_read(made):
    for q in made:
        question = Question("q", q.question, q.answer, choices=q.choices, rule=q.rule)
        for text in (q.answer, *q.derivations.values()):
            assert rules.score(q.rule, question, text) == 1.0, (q.question, text)


def test_derivations_of_another_answer_are_wrong(made):
    by_kind = {kind: [q for q in made if q.kind == kind] for kind in KINDS}
    for q in made:
        other = next(o for o in by_kind[q.kind] if o.answer != q.answer)
        question = Question("q", q.question, q.answer, choices=q.choices, rule=q.rule)
        assert rules.score(q.rule, question, other.derivations["b"]) == 0.0


def test_all_kinds_with_zero_one_and_two_pictures(made):
    assert set(Counter(q.kind for q in made).values()) == {240 // len(KINDS)}
    assert {len(q.scenes) for q in made} == {0, 1, 2}


def test_splits_share_no_scene_and_no_text(made):
    train = {part for q in made for part in q.parts}
    held_out = {part for q in make_questions("validation", 160, seed=3) for part in q.parts}
    assert not train & held_out


def test_no_question_twice(made):
    assert len({(q.parts, q.question) for q in made}) == len(made)


def test_pictures_show_the_scene(made):
    for q in made[:40]:
        for scene in q.scenes:
            image = render(scene)
            assert image.size == (SIDE * CELL, SIDE * CELL)
            for number, thing in enumerate(scene):
                x, y = (number % SIDE) * CELL, (number // SIDE) * CELL
                colours = Counter(image.crop((x, y, x + CELL, y + CELL)).get_flattened_data())
                drawn = [name for name, rgb in COLOURS.items() if colours[rgb]]
                assert drawn == ([thing.colour] if thing else [])


def test_all_things_look_different():
    seen = set()
    for name in (*SHAPES, *"123456789"):
        for colour in COLOURS:
            seen.add(render((Thing(name, colour), *[None] * (SIDE * SIDE - 1))).tobytes())
    assert len(seen) == (len(SHAPES) + 9) * len(COLOURS)


def test_same_seed_same_files(tmp_path):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_world(tmp_path / folder, 24, 8, seed=seed)
    files = [p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*")) if p.is_file()]
    assert len(files) > 24
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a/train.jsonl").read_text() != (tmp_path / "c/train.jsonl").read_text()


def test_files_are_read_as_questions(tmp_path):
    train, _ = write_world(tmp_path / "world", 16, 8)
    questions = read_questions(DataConfig(train=[str(train)]), "train")
    assert len(questions) == 16
    with_images = next(q for q in questions if q.images)
    assert Image.open(with_images.images[0].path).size == (84, 84)
    taught = read_questions(DataConfig(train=[str(train)], columns={"answer": "derivation_b"}), "train")
    assert taught[0].answer == questions[0].metadata["derivation_b"]
    assert things(()) == []
