"""The four skills with headroom: answers recomputed from the scenes in words, and the scores of their texts."""

import re
from collections import Counter

import pytest

from openril.records import Question
from openril.rewards import rules
from playground.world import DIFFICULTIES, STYLES, make_questions, style_of
from playground.world.skills import HEADROOM, SKILLS, SPLITS

WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
CHINESE = {1: "一", 2: "二", 3: "三", 4: "四", 5: "五", 6: "六"}
STEP = {"up": -3, "down": 3, "left": -1, "right": 1}


def solve(skill, question, scene):
    """Return the answer, computed from the question and the scene in words."""
    cells = [part.split() for part in scene.split(":", 1)[1].split("|")]
    match skill:
        case "rest":
            color = question.removesuffix("?").split()[-1]
            return str(sum(bool(words) and words[0] != color for words in cells))
        case "measure":
            color, unit = re.fullmatch(r"how long is the (\w+) line\? answer in (\w+)\.", question).groups()
            (length,) = [int(words[2]) for words in cells if words and words[0] == color]
            return f"{length} cm" if unit == "cm" else f"{10 * length} mm"
        case "form":
            name, form = re.fullmatch(r"how many (\w+)s are there\? answer in (\w+)\.", question).groups()
            number = sum(bool(words) and words[1] == name for words in cells)
            return {"digits": str(number), "words": WORDS[number], "chinese": CHINESE[number]}[form]
    start, number = re.match(r"start at the (\d) and follow (\d) arrows", question).groups()
    (cell,) = [i for i, words in enumerate(cells) if words and words[-1] == start]
    total = int(start)
    for _ in range(int(number)):
        cell += STEP[cells[cell][0]]
        total += int(cells[cell][-1])
    return str(total)


@pytest.fixture(scope="module")
def made():
    return [q for d in DIFFICULTIES for q in make_questions("train", 160, seed=11, difficulty=d, skills=list(HEADROOM))]


@pytest.mark.parametrize(
    ("skill", "question", "scene", "answer"),
    [
        ("rest", "how many things are not red?", ":red car|blue tree|||green car|||red tree|", "2"),
        ("measure", "how long is the red line? answer in mm.", ":red wide 4|blue high 5|||||||", "40 mm"),
        ("measure", "how long is the blue line? answer in cm.", ":red wide 4|blue high 5|||||||", "5 cm"),
        ("form", "how many cars are there? answer in words.", ":red car|blue tree|||green car||||", "two"),
        ("form", "how many cars are there? answer in chinese.", ":red car|blue tree|||green car||||", "二"),
        ("route", "start at the 1 and follow 2 arrows: ...", ":right 1|down 6|||up 3|||box 9|", "10"),
    ],
)
def test_solver_by_hand(skill, question, scene, answer):
    assert solve(skill, question, scene) == answer


def test_answers_are_what_the_scenes_say(made):
    for q in made:
        assert solve(q.skill, q.question, str(q.scenes[0])) == q.answer, (q.question, q.scenes)


def test_right_texts_score_1_and_wrong_ones_0_in_every_style(made):
    for q in made:
        asked = Question("q", q.question, q.answer, rule=q.rule)
        assert rules.score(q.rule, asked, q.answer) == 1.0
        for style in STYLES:
            assert rules.score(q.rule, asked, q.derivations[style]) == 1.0, (q.question, q.derivations[style])
            assert style_of(q.derivations[style]) == style
            for slip in range(len(q.slips)):
                assert rules.score(q.rule, asked, q.wrong_derivation(style, slip)) == 0.0, (q.question, q.answer)


def test_the_same_number_in_another_unit_or_form_is_wrong():
    for truth, other in (("40 mm", "4 cm"), ("40 mm", "40"), ("three", "3"), ("3", "three"), ("三", "3")):
        question = Question("q", "", truth, rule="exact")
        assert rules.score("exact", question, f"so the answer is {other}.") == 0.0
        assert rules.score("exact", question, f"so the answer is {truth}.") == 1.0


def test_no_answer_is_likely_without_the_picture(made):
    """The most frequent answer to the same text is right no more often than chance and three standard errors."""
    chance = {"rest": 1 / 4, "measure": 1 / 9, "form": 1 / 4, "route": 1 / 8}
    for skill, share in chance.items():
        asked = make_questions("train", 300, seed=8, skills=[skill])
        known, held_out = asked[:150], asked[150:]
        by_text = {text: Counter(q.answer for q in known if q.question == text) for text in {q.question for q in known}}
        likeliest = [by_text.get(q.question, Counter("?")).most_common(1)[0][0] == q.answer for q in held_out]
        assert sum(likeliest) / 150 < share + 3 * (share * (1 - share) / 150) ** 0.5, skill


def test_long_derivations(made):
    steps = {d: {q.num_steps for q in made if q.skill == "route" and q.difficulty == d} for d in DIFFICULTIES}
    assert steps == {1: {6}, 2: {8}, 3: {10}}


def test_the_fourteen_stay_as_they_are():
    assert len(SKILLS) == 14 and not SKILLS.keys() & HEADROOM.keys()
    mixed = make_questions("train", 36, seed=3, skills=[*SKILLS, *HEADROOM])
    assert [q for q in mixed if q.skill in SKILLS] == make_questions("train", 28, seed=3)
    scenes = {s: {str(q.scenes[0]) for q in make_questions(s, 80, skills=list(HEADROOM))} for s in SPLITS}
    assert not scenes["train"] & scenes["test"] and not scenes["train"] & scenes["validation"]
