"""Every skill's answers, recomputed from the scene in words, and the answer rules' scores of its texts."""

import dataclasses
import re
from collections import Counter

import pytest

from openril.records import Question
from openril.rewards import rules
from openril.rewards.degenerate import is_repetitive
from playground.world import DIFFICULTIES, SKILLS, STYLES, make_questions, style_of
from playground.world.questions import Derivation, listed

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
STEP = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
NEXT_TO = {"left of": "left", "right of": "right", "above": "up", "below": "down"}
CHINESE = {"圆": "circle", "方块": "square", "三角": "triangle", "车": "car", "树": "tree", "房子": "house"}


def cells(scene):
    """Return {(row, column): words} of a scene in words."""
    parts = scene.split(":", 1)[1].split("|")
    assert len(parts) == 9
    return {(i // 3, i % 3): part.split() for i, part in enumerate(parts) if part}


def moved(place, direction):
    return place[0] + STEP[direction][0], place[1] + STEP[direction][1]


def place_of(seen, name):
    (place,) = [p for p, words in seen.items() if name in words]
    return place


def solve(skill, question, scenes, choices=()):
    """Return the answer, computed from the question and the scenes in words."""
    value = SOLVERS[skill](question, [cells(scene) for scene in scenes])
    return "ABCDEFGHIJ"[choices.index(value)] if choices else value


def solve_diagrams(question, scenes):
    start, number = re.search(r"start at (\w) and follow (\d)", question).groups()
    (seen,) = scenes
    (place,) = [p for p, words in seen.items() if words[1] == start]
    for _ in range(int(number)):
        place = moved(place, seen[place][0])
    return seen[place][1]


def solve_charts(question, scenes):
    (seen,) = scenes
    if total := re.search(r"sum of the (\w+) bars", question):
        return str(sum(int(w[2]) for w in seen.values() if w[0] == total[1]))
    heights = []
    for color, row in re.findall(r"the (\w+) bar(?: in the (\w+) chart)?", question):
        (height,) = [int(w[2]) for p, w in seen.items() if w[0] == color and (not row or ROWS[p[0]] == row)]
        heights.append(height)
    return str(heights[0] - heights[1])


def solve_arithmetic(question, scenes):
    (seen,) = scenes
    plus, minus = re.search(r"the (\w+) digits(?: minus the (\w+) digit)?\?", question).groups()
    digits = [(w[0], int(w[2])) for w in seen.values()]
    assert minus is None or sum(c == minus for c, _ in digits) == 1
    return str(sum(d for c, d in digits if c == plus) - sum(d for c, d in digits if c == minus))


def solve_choice(question, scenes):
    (seen,) = scenes
    names = [name.removesuffix("s") for name in re.search(r"many (.*) are", question)[1].split(" and ")]
    return str(sum(w[1] in names for w in seen.values()))


def solve_choice_cn(question, scenes):
    (seen,) = scenes
    names = [CHINESE[word] for word in question.rstrip("?").split() if word in CHINESE]
    return str(sum(w[1] in names for w in seen.values()))


def solve_open(question, scenes):
    (seen,) = scenes
    best = max if "largest" in question else min
    return " ".join(best(seen.values(), key=lambda w: int(w[2]))[:2])


def solve_open_multi(question, scenes):
    asked = 0 if "the first picture" in question else 1
    here, there = ({" ".join(w) for w in scenes[i].values()} for i in (asked, 1 - asked))
    (answer,) = here - there
    return answer


def solve_disciplines(question, scenes):
    (seen,) = scenes
    if "picture" in question:  # the question is drawn into the top row
        drawn = "".join(seen[0, column][1] for column in range(3))
        question = {"AREA?": "area", "PULL?": "pull", "LEGS?": "legs"}[drawn]
    seen = {p: w for p, w in seen.items() if w[0] != "text"}
    if "area" in question:
        by_row = {}
        for (row, _), w in seen.items():
            by_row.setdefault(row, {})[w[-2]] = int(w[-1])
        return str(sum(r["wide"] * r["high"] - r.get("hole", 0) for r in by_row.values()))
    if "pull" in question:
        return str(sum(int(w[-1]) * {"right": 1, "left": -1}[w[-2]] for w in seen.values()))
    return str(sum(int(w[1]) * {"dog": 4, "person": 2}[w[0]] for w in seen.values() if w[1] != "tree"))


def solve_needs_image(question, scenes):
    (seen,) = scenes
    if found := re.search(r"thing (.*) the (\w+)\?", question):
        return seen[moved(place_of(seen, found[2]), NEXT_TO[found[1]])][0]
    return seen[place_of(seen, re.search(r"the (\w+)\?", question)[1])][0]


def solve_perception(question, scenes):
    (seen,) = scenes
    for feature in (0, 1):
        counts = Counter(w[feature] for w in seen.values())
        if sorted(counts.values()) == [1, len(seen) - 1]:
            rare = min(counts, key=counts.get)
            (place,) = [p for p, w in seen.items() if w[feature] == rare]
            return f"{ROWS[place[0]]} {COLUMNS[place[1]]}"
    raise AssertionError("nothing is odd")


def solve_spatial(question, scenes):
    (seen,) = scenes
    a, b = (place_of(seen, n) for n in re.search(r"is the (\w+), seen from the (\w+)\?", question).groups())
    words = ["above"] * (a[0] < b[0]) + ["below"] * (a[0] > b[0]) + ["left"] * (a[1] < b[1]) + ["right"] * (a[1] > b[1])
    return " ".join(words)


def solve_text_rich(question, scenes):
    (seen,) = scenes
    lines = {seen[r, 0][1]: (int(seen[r, 1][1][0]), int(seen[r, 2][1][1:])) for r in range(3) if (r, 0) in seen}
    names = re.findall(r"\b[A-J]\b", question)
    return str(sum(lines[n][1] * (1 if "one" in question else lines[n][0]) for n in names))


def solve_everyday(question, scenes):
    (seen,) = scenes
    color = re.search(r"the (\w+) car", question)[1]
    if ["red", "light"] in seen.values():
        return "stop"
    if any(p[0] == 2 and w == ["person"] for p, w in seen.items()):
        return "wait"
    (car,) = [w for w in seen.values() if w[:2] == [color, "car"]]
    limits = [int(w[1]) for w in seen.values() if w[0] == "sign"]
    return "slow" if limits and int(car[2]) > limits[0] else "go"


SOLVERS = {
    "diagrams": solve_diagrams, "charts": solve_charts, "arithmetic": solve_arithmetic, "choice": solve_choice,
    "choice_cn": solve_choice_cn, "open": solve_open, "open_multi": solve_open_multi, "disciplines": solve_disciplines,
    "disciplines_pro": solve_disciplines, "needs_image": solve_needs_image, "perception": solve_perception,
    "spatial": solve_spatial, "text_rich": solve_text_rich, "everyday": solve_everyday,
}  # fmt: skip

# Written and answered by hand. Cells run from the top left, row by row.
BY_HAND = [
    # A right to B, B down to D
    ("diagrams", "start at A and follow 2 arrows: what is at the end?", [":right A|down B||up C|box D||||"], (), "D"),
    # red 5 at the top, blue 2 at the bottom: 5 - 2
    ("charts", "how much larger is the red bar in the top chart than the blue bar in the bottom chart?",
     ["chart:red bar 5|blue bar 1|green bar 1||||red bar 6|blue bar 2|yellow bar 3"], (), "3"),
    # 4 + 1 + 6
    ("charts", "what is the sum of the red bars?", ["chart:red bar 4|||red bar 1|||blue bar 5|red bar 6|"], (), "11"),
    # 7 + 8 - 6
    ("arithmetic", "what is the sum of the red digits minus the blue digit?",
     [":red card 7|||blue card 6|||red card 8||green card 9"], (), "9"),
    # two trees and a car; 3 is the fourth option
    ("choice", "how many trees and cars are there?", [":red tree||blue car|red tree|||red house||"], ("1", "2", "4", "3"), "D"),
    ("choice_cn", "图 里 有 几 个 树?", [":red tree||blue car|red tree|||red house||"], ("1", "2", "4", "3"), "B"),
    ("open", "which thing has the smallest number?", [":red car 7||blue tree 3||green car 9||||"], (), "blue tree"),
    ("open_multi", "which thing in the second picture is not in the first one?",
     [":red car|blue car|||||||", ":blue car|red tree|||||||"], (), "red tree"),
    # 3 x 4 - 2 = 10
    ("disciplines", "maths: how large is the area?", [":|||red wide 3|hole 2|red high 4|||"], ("12", "10", "7", "5"), "B"),
    # 3 dogs with 4 legs each and 2 persons: 12 + 4
    ("disciplines_pro", "answer the question in the picture.",
     [":text LE|text GS|text ?|dog 3|person 2|red tree|||"], tuple(map(str, range(10, 20))), "G"),
    # the thing below the car (middle left) is the yellow house
    ("needs_image", "what colour is the thing below the car?",
     [":|||red car|green tree||yellow house||"], ("blue", "yellow", "red", "green"), "B"),
    # all but one are red, whatever they are
    ("perception", "where is the odd one out?", [":red car|red tree||red car||blue tree|red house||"], (), "middle right"),
    ("spatial", "where is the car, seen from the tree?", [":||blue tree|||||red car|"], (), "below left"),
    # 2 x 3 + 3 x 4
    ("text_rich", "what is the price of all B and D?",
     ["table:text B|text 2x|text $3|text A|text 5x|text $9|text D|text 3x|text $4"], (), "18"),
    # green, nobody on the road (a person is next to it), 4 is not above 4
    ("everyday", "what should the red car do?",
     ["road:green light|person|||sign 4||red car 4||blue car 9"], (), "go"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return [q for d in DIFFICULTIES for q in make_questions("train", 30 * len(SKILLS), seed=11, difficulty=d)]


def asked(question):
    return Question("q", question.question, question.answer, choices=question.choices, rule=question.rule)


@pytest.mark.parametrize(("skill", "question", "scenes", "choices", "answer"), BY_HAND)
def test_solvers_answer_scenes_drawn_by_hand(skill, question, scenes, choices, answer):
    assert solve(skill, question, scenes, choices) == answer


def test_answers_are_what_the_scenes_say(made):
    for q in made:
        assert solve(q.skill, q.question, [str(s) for s in q.scenes], q.choices) == q.answer, (q.question, q.scenes)


def test_right_texts_score_1_in_every_style(made):
    for q in made:
        for text in (q.answer, *(q.derivations[style] for style in STYLES)):
            assert rules.score(q.rule, asked(q), text) == 1.0, (q.question, text)


REWRITTEN = (
    "<answer>{}</answer>",
    "<think>hm</think> <answer> {} </answer>",
    "\\boxed{{{}}}",
    "We look.\n#### {}",
    "We look.\nThe answer is {}.",
    "Answer: {}",
    "答案：{}",
    "solution: $\\boxed{{{}}}$.",
)


def test_truths_rewritten_in_customary_ways_give_the_same_scores(made):
    for q in made[::25]:
        texts = [t for style in STYLES for t in (q.derivations[style], q.wrong_derivation(style, 0))]
        scores = [rules.score(q.rule, asked(q), text) for text in texts]
        for form in REWRITTEN:
            question = dataclasses.replace(asked(q), answer=form.format(q.answer))
            assert [rules.score(q.rule, question, text) for text in texts] == scores, question.answer


def test_wrong_texts_score_0_in_every_style(made):
    for q in made:
        for style in STYLES:
            for slip in (0, 1):
                assert rules.score(q.rule, asked(q), q.wrong_derivation(style, slip)) == 0.0, (q.question, q.answer)
        assert rules.score(q.rule, asked(q), q.slips[0].answer) == 0.0


def test_no_text_counts_as_repetitive(made):
    assert not [text for q in made for text in q.derivations.values() if is_repetitive(text)]


def test_right_derivations_hold_only_right_equations(made):
    found = 0
    for q in made:
        text = q.derivations["b"]
        for a, sign, b, result in re.findall(r"(\d+) ([-+x]) (\d+) = (\d+)", text):
            a, b = int(a), int(b)
            assert int(result) == {"+": a + b, "-": a - b, "x": a * b}[sign], text
            found += 1
    assert found > 300


def test_direct_answers_of_choices_are_the_options_texts(made):
    found = 0
    for q in made:
        if q.rule == "choice":
            text = q.choices["ABCDEFGHIJ".index(q.answer)]
            assert q.direct_answer == text
            assert re.fullmatch(rf"(?s).*(?:answer|答案): {text}", q.derivations["b"])
            assert rules.score(q.rule, asked(q), q.direct_answer) == 1.0
            found += 1
        else:
            assert q.direct_answer == q.answer
    assert found > 50


def test_notes_agree_with_the_scene(made):
    """A note such as "color name place" or "color place digit" describes the scene."""
    checked = 0
    for q in made:
        if q.skill == "arithmetic":
            seen = cells(str(q.scenes[0]))
            for row, column, digit in re.findall(r"(top|middle|bottom) (left|center|right) (\d)", q.derivations["b"]):
                assert seen[ROWS.index(row), COLUMNS.index(column)][2] == digit
                checked += 1
        elif q.skill in ("choice", "spatial"):
            seen = cells(str(q.scenes[0]))
            for line in re.findall(r"- (\w+) ((?:top|middle|bottom) .*)", q.derivations["b"]):
                for row, column in re.findall(r"(top|middle|bottom) (left|center|right)", line[1]):
                    assert line[0] in ("row", "column") or seen[ROWS.index(row), COLUMNS.index(column)][1] == line[0]
                    checked += 1
    assert checked > 500


def test_styles_of_one_derivation():
    derivation = Derivation((("3 plus 4 is 7", "3 + 4 = 7"),), "B", option="7")
    assert derivation.text("a") == "3 plus 4 is 7. so the answer is 7."
    assert derivation.text("b") == "- 3 + 4 = 7\nanswer: 7"
    assert derivation.text("c") == "see 3 + 4 = 7; answer = 7"
    chinese = Derivation((("3 + 4 = 7", "3 + 4 = 7"), ("7", "7")), "B", chinese=True)
    assert chinese.text("a") == "3 + 4 = 7. 7. 所以 答案 是 B."
    assert chinese.text("b") == "- 3 + 4 = 7\n- 7\n答案: B"
    assert chinese.text("c") == "先 3 + 4 = 7, 再 7; 答案 是 B"


def test_words_are_joined_as_in_a_sentence():
    assert [listed(words) for words in (["x"], ["x", "y"], ["x", "y", "z"])] == ["x", "x and y", "x, y and z"]


def test_the_style_of_a_derivation_is_detected_from_its_text() -> None:
    for made in make_questions("train", 280):
        assert {style: style_of(text) for style, text in made.derivations.items()} == {s: s for s in STYLES}
        assert style_of(made.answer) is None
        assert style_of(made.direct_answer) is None


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("7", None),
        ("see red 3, then blue 4; answer = 7", "c"),
        ("先 红 3, 再 蓝 4; 答案 是 7", "c"),
        ("the red cell shows 3. so the answer is 7.", "a"),
        ("红 是 3. 所以 答案 是 7.", "a"),
        ("- red 3\n- blue 4\nanswer: 7", "b"),
        ("- red 3\n- blue", "b"),  # truncated
        ("see red 3, then", "c"),
        ("legs red 3\n- blue 4\nanswer: 7", "b"),  # malformed at its start
    ],
)
def test_styles_are_detected_in_truncated_and_malformed_texts(text: str, style: str | None) -> None:
    assert style_of(text) == style
