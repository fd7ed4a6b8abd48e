"""The files of the fourteen skills: splits, determinism, words, pictures, the command and the gallery."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from openril.data.reading import read_questions
from openril.errors import DataError
from openril.recipe.schema import DataConfig
from playground.world import DIFFICULTIES, SKILLS, STYLES, make_questions, write_skills_world
from playground.world.__main__ import Settings, run
from playground.world.bitmap_font import GLYPHS, glyph
from playground.world.gallery import IMAGES, page_text, picture, shown
from playground.world.scenes import CELL, COLORS, NAMES, PIXELS, Scene, Thing, describe, render
from playground.world.skills import ALL_SKILLS, SPLITS, split_of

ROOT = Path(__file__).parents[2]
BENCHMARKS = {
    "AI2D", "ChartQA", "MathVista", "MMBench", "MMBench-CN", "MM-Vet", "MM-Vet-v2", "MMMU", "MMMU-Pro", "MMStar", "BLINK",
    "SEED", "SEED-2+", "RealWorldQA",
}  # fmt: skip


@pytest.fixture(scope="module")
def by_level():
    return {d: make_questions("train", 60 * len(SKILLS), seed=2, difficulty=d) for d in DIFFICULTIES}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skills") / "world"
    return write_skills_world(folder, 84, 28, 28, seed=4, difficulty=DIFFICULTIES)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def words(text):
    return re.findall(r"\w+", text)


def test_each_benchmark_has_a_skill():
    assert {skill.benchmark for skill in SKILLS.values()} == BENCHMARKS
    assert len(SKILLS) == len(BENCHMARKS) == 14


def test_splits_share_no_scene_whatever_the_seed():
    scenes = {
        split: {str(s) for seed in (0, 1) for q in make_questions(split, 112, seed) for s in q.scenes}
        for split in SPLITS
    }
    assert not scenes["train"] & scenes["validation"]
    assert not scenes["train"] & scenes["test"]
    assert not scenes["validation"] & scenes["test"]


def test_all_pictures_of_a_question_belong_to_its_split():
    for split in SPLITS:
        for q in make_questions(split, 20, 0, skills=["open_multi"]):
            assert [split_of(s) for s in q.scenes] == [split, split]


def test_no_question_twice(by_level):
    for made in by_level.values():
        assert len({(q.scenes, q.question, q.choices) for q in made}) == len(made)


def test_a_skills_questions_do_not_depend_on_the_others():
    alone = make_questions("train", 5, seed=3, skills=["charts"])
    assert [q for q in make_questions("train", 70, seed=3) if q.skill == "charts"] == alone


def test_rows_hold_every_column(written):
    for split, path in written.items():
        for i, row in enumerate(rows_of(path)):
            assert row["id"] == f"{split}-{i:05d}-{row['skill']}"
            assert row["benchmark"] == SKILLS[row["skill"]].benchmark
            assert row["difficulty"] == 1 + i // 14 % 3
            assert row["rule"] != "choice" or row["answer"] in "ABCDEFGHIJ"[: len(row["choices"])]
            assert row["wrong_answer"] != row["answer"]
            for style in STYLES:
                assert re.search(rf"{row['direct_answer']}\W*$", row[f"derivation_{style}"])
                assert re.search(rf"{row['wrong_answer']}\W*$", row[f"wrong_derivation_{style}"])


def test_files_are_read_as_questions(written):
    questions = read_questions(DataConfig(train=[str(written["train"])]), "train")
    assert len(questions) == 84
    assert {Image.open(image.path).size for q in questions for image in q.images} == {(PIXELS, PIXELS)}
    assert Counter(len(q.images) for q in questions) == {1: 78, 2: 6}
    taught = read_questions(DataConfig(train=[str(written["train"])], columns={"answer": "derivation_b"}), "train")
    assert taught[0].answer == questions[0].metadata["derivation_b"]


def test_descriptions_name_every_cell_of_the_training_pictures(written):
    rows = rows_of(written["train"].with_name("descriptions.jsonl"))
    scenes: dict[str, str] = {}
    for row in rows_of(written["train"]):
        scenes |= zip(row["images"], row["scenes"], strict=True)
    assert len(rows) == len(set(scenes.values()))
    for row in rows:
        filled = [cell for cell in scenes[row["images"][0]].split(":", 1)[1].split("|") if cell]
        assert len(row["answer"].split(", ")) == len(filled)


def test_description_by_hand():
    texts = {4: "3x", 5: "$9", 8: "AR"}
    scene = Scene.of({0: Thing("car", "red", "7")} | {cell: Thing("text", "", text) for cell, text in texts.items()})
    assert describe(scene) == "top left red car 7, middle center 3 x, middle right price 9, bottom right area"


def test_derivations_end_in_the_answer(by_level):
    for q in by_level[1]:
        for style in STYLES:
            assert q.derivations[style].removesuffix(".").endswith(f" {q.direct_answer}")


@pytest.mark.parametrize(("skills", "most"), [(SKILLS, 200), (ALL_SKILLS, 225)], ids=["fourteen", "all"])
def test_vocabulary_is_small(skills, most):
    texts = []
    for q in make_questions("train", 42 * len(skills), 1, DIFFICULTIES, tuple(skills)):
        texts += [q.question, q.answer, *q.choices, *q.derivations.values(), *map(describe, q.scenes)]
        texts += [q.wrong_derivation(style, slip) for style in STYLES for slip in (0, 1)]
    found = {word for text in texts for word in words(text)}
    assert len(found) <= most
    assert max(int(word) for word in found if word.isdigit()) <= 99
    assert {word for word in found if word != word.lower()} <= set("ABCDEFGHIJ")


def test_texts_are_short(by_level):
    for made in by_level.values():
        assert max(len(words(q.question)) for q in made) <= 20
        assert max(len(words(text)) for q in made for text in q.derivations.values()) <= 42


def test_difficulty_means_more_things_or_more_steps(by_level):
    means = defaultdict(list)
    for made in by_level.values():
        for skill in SKILLS:
            of_skill = [q for q in made if q.skill == skill]
            means[skill].append(
                [sum(getattr(q, n) for q in of_skill) / len(of_skill) for n in ("num_things", "num_steps")]
            )
    for skill, levels in means.items():
        for (things, steps), (more_things, more_steps) in pairwise(levels):
            assert more_things >= things and more_steps >= steps, skill
            assert more_things > things or more_steps > steps, skill


def test_most_skills_take_several_steps(by_level):
    for made in by_level.values():
        steps = [[q.num_steps for q in made if q.skill == skill] for skill in SKILLS]
        assert sum(sum(s) / len(s) >= 2 for s in steps) >= 0.6 * len(SKILLS)


CHANCE = {
    "diagrams": 1 / 9, "charts": 1 / 5, "arithmetic": 1 / 9, "choice": 1 / 4, "choice_cn": 1 / 4, "open": 1 / 24,
    "open_multi": 1 / 24, "disciplines": 1 / 4, "disciplines_pro": 1 / 10, "needs_image": 1 / 4, "perception": 1 / 9,
    "spatial": 1 / 4, "text_rich": 1 / 8, "everyday": 1 / 3,
}  # fmt: skip
"""Chance of a guess that knows everything but the picture, at difficulty 1: letters without the first one; differences of
bars; 10, the most frequent sum of two digits; options; colored things; cells; directions; prices; a driver's actions."""
NUM_GUESSED = 200


def bound(skill):
    """Return chance plus three standard errors."""
    return CHANCE[skill] + 3 * (CHANCE[skill] * (1 - CHANCE[skill]) / NUM_GUESSED) ** 0.5


@pytest.fixture(scope="module")
def guessed():
    """Return (training questions to learn guesses from, other questions to try them on) by skill."""
    made = [make_questions(split, NUM_GUESSED * len(SKILLS), seed=8) for split in ("train", "validation")]
    return {skill: [[q for q in part if q.skill == skill] for part in made] for skill in SKILLS}


def share_right(guess, questions):
    return sum(guess(q) == q.answer for q in questions) / len(questions)


@pytest.mark.parametrize("skill", SKILLS)
def test_text_alone_does_not_give_the_answer_away(guessed, skill):
    """Guess the most frequent answer to the same text, or over all texts, or the option whose value is right most often."""
    known, asked = guessed[skill]
    overall = Counter(q.answer for q in known)
    by_text = defaultdict(Counter)
    by_value = defaultdict(lambda: [1, 4])
    for q in known:
        by_text[q.question][q.answer] += 1
        for letter, value in zip("ABCDEFGHIJ", q.choices, strict=False):
            by_value[value][0] += letter == q.answer
            by_value[value][1] += 1

    def likeliest(q):
        rates = [by_value[value][0] / by_value[value][1] for value in q.choices]
        return "ABCDEFGHIJ"[rates.index(max(rates))]

    assert share_right(lambda q: (by_text[q.question] or overall).most_common(1)[0][0], asked) < bound(skill)
    assert share_right(lambda q: overall.most_common(1)[0][0], asked) < bound(skill)
    if asked[0].choices:
        assert share_right(likeliest, asked) < bound(skill)


def test_the_rank_of_an_option_does_not_give_the_answer_away(guessed):
    """The right number has each rank among the options about equally often."""
    for skill in ("choice", "choice_cn", "disciplines", "disciplines_pro"):
        questions = [q for part in guessed[skill] for q in part]
        ranks = Counter(
            sorted(map(int, q.choices)).index(int(q.choices["ABCDEFGHIJ".index(q.answer)])) for q in questions
        )
        assert max(ranks.values()) / len(questions) < CHANCE[skill] + 0.08, (skill, ranks)


def test_pictures_show_things_in_their_cells(by_level):
    for q in by_level[3][:70]:
        for scene in q.scenes:
            empty = render(Scene((None,) * 9, "" if scene.ground == "chart" else scene.ground))
            drawn = ImageChops.difference(render(scene), empty)
            for cell in range(9):
                x, y = cell % 3 * CELL, cell // 3 * CELL
                # The axis of a chart is on the last row of pixels.
                changed = drawn.crop((x, y, x + CELL, y + CELL - 1)).getbbox() is not None
                assert changed == (cell in scene.things)


def test_all_things_look_different():
    things = [Thing(n, c, label) for n in NAMES for c in COLORS for label in ("", *"123456789")]
    things += [Thing("card", c, d) for c in COLORS for d in "123456789"]
    things += [Thing("bar", c, d) for c in COLORS for d in "123456"]
    things += [Thing(n, "", letter) for n in ("up", "down", "left", "right", "box") for letter in "ABCDEFGHIJ"]
    things += [Thing(n, c, d) for n in ("wide", "high", "left", "right") for c in COLORS for d in "123456789"]
    things += [Thing(n, "", d) for n in ("hole", "sign", "dog", "person") for d in "123456789"]
    things += [Thing("light", "red"), Thing("light", "green"), Thing("person")]
    assert len({render(Scene.of({4: thing})).tobytes() for thing in things}) == len(things)


def test_glyphs_differ_and_fit_a_patch():
    assert len({glyph(g).tobytes() for g in GLYPHS}) == len(GLYPHS)
    assert {glyph(g).size for g in GLYPHS} == {(10, 12)}


def test_unknown_difficulty_and_skill_are_refused():
    with pytest.raises(DataError, match=r"difficulty.*1, 2, 3.*4"):
        make_questions("train", 14, difficulty=[1, 4])
    with pytest.raises(DataError, match=r"skills.*diagrams, charts.*maths"):
        make_questions("train", 14, skills=["maths"])


def test_a_skill_without_enough_questions_is_an_error(monkeypatch):
    import dataclasses

    (only,) = make_questions("train", 1, skills=["charts"])
    monkeypatch.setitem(ALL_SKILLS, "charts", dataclasses.replace(SKILLS["charts"], make=lambda rng, difficulty: only))
    with pytest.raises(DataError, match=r"charts.* 1 .*train.*difficulty 1"):
        make_questions("train", 2, skills=["charts"])


def test_command_writes_the_files(tmp_path):
    arguments = ["--out", str(tmp_path / "w"), "--num-train", "14", "--num-validation", "2", "--num-test", "2"]
    command = [sys.executable, "-m", "playground.world", *arguments, "--difficulty", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "w" / f"{split}.jsonl") for split in SPLITS]
    assert [len(rows_of(tmp_path / "w" / f"{split}.jsonl")) for split in SPLITS] == [14, 2, 2]


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        run(Settings(out=tmp_path))
    with pytest.raises(DataError, match=r"--out.*--page"):
        run(Settings())


def test_the_gallery_is_up_to_date():
    message = "run: python -m playground.world --page docs/skills.md"
    assert (ROOT / "docs" / "skills.md").read_text() == page_text(), message
    sizes = 0
    for skill, question in shown().items():
        path = ROOT / "docs" / IMAGES / f"{skill}.png"
        sizes += path.stat().st_size
        assert Image.open(path).convert("RGB").tobytes() == picture(question).convert("RGB").tobytes(), message
    assert sizes < 100_000
