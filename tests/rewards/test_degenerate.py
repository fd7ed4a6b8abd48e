"""Which responses count as empty or repetitive, and which ordinary ones must not."""

import pytest

from openril.rewards.degenerate import is_empty, is_repetitive

SENTENCE = (
    "The tower on the left holds two yellow blocks and one black block, and the black one lies at the bottom of it. "
)
SIDES, COLOURS = ["width", "height", "depth", "mass", "price"], ["red", "blue", "green", "grey"]
DERIVATION = " ".join(
    f"Step {i}: we add the {a} of the {b} box, which gives {i * 7 + 3}, and subtract {i}, so {i * 6 + 3} remains."
    for i, (a, b) in enumerate(zip(SIDES * 4, COLOURS * 5, strict=True), 1)
)
TABLE = "| year | sales | cost |\n|------|-------|------|\n" + "\n".join(
    f"| {1990 + i} | {i * 37 % 101} | {i * 53 % 97} |" for i in range(40)
)
NUMBERED = "\n".join(f"{i}. item {i} is a {c} box" for i, c in enumerate(["red", "blue", "grey", "green"] * 6, 1))
CODE = "\n".join(
    f"    if shape == '{s}':\n        total += count_{s}(image)\n        names.append('{s}')"
    for s in ["circle", "square", "triangle", "star", "cross", "line", "dot", "ring"]
)
MULTIPLICATION = "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 11) for b in range(1, 11))


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "yes yes",
        "no no no no",
        "1, 1, 1, 1",
        "The answer is 42.",
        SENTENCE,
        SENTENCE * 2,  # the same text twice
        DERIVATION,
        TABLE,
        NUMBERED,
        CODE,
        MULTIPLICATION,
        " ".join(map(str, range(200))),
        "-" * 30 + "\nTotal: 5\n" + "-" * 30,
        "1/3 = 0." + "3" * 25,
        "图中有三个红色方块和两个蓝色圆形，红色方块在左边，蓝色圆形在右边，所以答案是三。",
        "",
    ],
)
def test_ordinary_texts_are_not_repetitive(text):
    assert not is_repetitive(text)


@pytest.mark.parametrize(
    "text",
    [
        "the answer is " * 20,
        "B " * 40,
        "ha" * 60,
        "0" * 200,
        "!" * 100,
        "Let us see. " + "I think it is red. " * 12,
        SENTENCE * 4,
        DERIVATION * 3,
        "答案是三" * 20,
        "First one word, then a loop: " + "yes no " * 30,
    ],
)
def test_loops_are_repetitive(text):
    assert is_repetitive(text)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\ufeff", "<|im_end|>", "<answer></answer>", "< / ANSWER >"])
def test_nothing_but_marks_is_empty(text):
    assert is_empty(text)


@pytest.mark.parametrize("text", ["0", "no", "√", "是", "<answer>B</answer>", "x < y"])
def test_short_answers_are_not_empty(text):
    assert not is_empty(text)
