"""Properties of the answer rules over generated pairs: restated truths are right, other truths are never right."""

import random
from fractions import Fraction

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from openril.records import Question
from openril.rewards.rules import score

PAIRS = 5_000
"""Generated truths of each rule. Each is compared with itself and with another one in other words."""
WORDINGS = [
    "{}",
    "{}.",
    "<answer>{}</answer>",
    "<think>It could be 99.\nAnswer: no</think>\n<answer> {} </answer>",
    "I first thought of 98.\n</think>\n\\boxed{{{}}}",
    "The answer is {}.",
    "**Answer:** {}",
    "We look closely.\n#### {}",
    "答案：{}",
    "所以答案是{}。",
    '{{"answer": "{}", "confidence": 0.9}}',
    "**Final Answer**\n{}",
]

CHINESE = "零一二三四五六七八九"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WORDS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_english(n):
    for size, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = f" {'and ' if size == 100 else ''}{in_english(n % size)}" if n % size else ""
            return f"{in_english(n // size)} {name}{rest}"
    return WORDS[n] if n < 20 else TENS[n // 10] + (f"-{WORDS[n % 10]}" if n % 10 else "")


def in_chinese(n):
    for size, name in ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if n >= size:
            rest = n % size
            gap = "零" if rest and rest < size // 10 else ""
            return f"{in_chinese(n // size)}{name}{gap}{in_chinese(rest) if rest else ''}"
    return CHINESE[n]


def number_forms(n):
    return [str(n), f"{n:,}", f"{n}.0", in_english(n), in_chinese(n), f"{n}×10^0", f"${n}$"]


def fraction_forms(f):
    top, bottom = f.numerator, f.denominator
    whole, rest = divmod(top, bottom)
    forms = [f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{top}}}{{{bottom}}}"]
    forms += [f"{in_chinese(bottom)}分之{in_chinese(top)}"]
    if whole and rest:
        forms += [f"{whole} {rest}/{bottom}", rf"{whole}\frac{{{rest}}}{{{bottom}}}"]
    return forms


UNITS = [
    ("km", "kilometers", "公里"), ("kg", "kilograms", "千克"), ("cm", "centimeters", "厘米"),
    ("°C", "degrees Celsius", "摄氏度"), ("m^2", "square meters", "平方米"), ("min", "minutes", "分钟"),
    ("km/h", "kilometers per hour", "公里/小时"), ("$", "dollars", "美元"), ("L", "liters", "升"), ("°", "degrees", "度"),
]  # fmt: skip
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September"]
MONTHS += ["October", "November", "December"]


def quantity_forms(value):
    number, names = value
    forms = [f"{number} {name}" for name in names[:2] if name != "$"] + [
        f"{number}{names[2]}",
        f"{number:,} {names[1]}",
    ]
    return [*forms, f"${number}"] if names[0] == "$" else forms


def date_forms(value):
    y, m, d = value
    name = MONTHS[m - 1]
    return [f"{d} {name} {y}", f"{name} {d}, {y}", f"{y}-{m:02}-{d:02}", f"{y}年{m}月{d}日", f"{name[:3]} {d}, {y}"]


def time_forms(value):
    h, m = value
    twelve, half = (h - 1) % 12 + 1, "pm" if h >= 12 else "am"
    forms = [f"{twelve}:{m:02} {half}", f"{twelve}:{m:02} {half[0].upper()}.M.", f"{twelve}:{m:02}{half.upper()}"]
    return [*forms, f"{'下午' if h >= 12 else '上午'}{twelve}点{m}分"] + ([f"{twelve} {half}"] if m == 0 else [])


def algebra_forms(value):
    factor, symbol = value
    spoken = {"π": [rf"{factor}\pi", f"{factor} pi"]}.get(symbol, [])
    return [f"{factor}{symbol}", f"{factor} * {symbol}", f"${factor}{symbol}$", *spoken]


def list_forms(values):
    words = [str(value) for value in values]
    return [", ".join(words), ",".join(words), "、".join(words), f"{', '.join(words[:-1])} and {words[-1]}"]


KINDS = {
    "numbers": (lambda r: r.choice([r.randint(0, 120), r.randint(0, 10**10)]), number_forms),
    "fractions": (lambda r: r.randint(0, 20) + Fraction(1, r.randint(2, 40)), fraction_forms),
    "units": (lambda r: (r.randint(1, 5000), r.choice(UNITS)), quantity_forms),
    "dates": (lambda r: (r.randint(1000, 2100), r.randint(1, 12), r.randint(1, 28)), date_forms),
    "times": (lambda r: (r.randint(0, 23), r.randint(0, 59)), time_forms),
    "algebra": (lambda r: (r.randint(2, 400), r.choice(["π", "x", "y", "x^2", "xy", "√2"])), algebra_forms),
    "lists": (lambda r: tuple(r.randint(0, 99) for _ in range(r.randint(2, 5))), list_forms),
}
RULES = {
    "numbers": ("auto", "number", "relaxed_number"),
    "fractions": ("auto", "number"),
    "units": ("auto", "number"),
}


def ask(truth, rule, choices=()):
    return Question("q", "What is shown?", truth, choices=choices, rule=rule)


def right(rule, truth, response, choices=()):
    return score(rule, ask(truth, rule, choices), response) == 1.0


def near(a, b):
    """Return whether ``b`` is within ChartQA's 5 % of ``a``."""
    return abs(a - b) * 20 <= a


@pytest.mark.parametrize(("kind", "rule"), [(k, r) for k in KINDS for r in RULES.get(k, ("auto",))])
def test_restated_truths_are_right_and_other_truths_are_not(kind, rule):
    make, forms = KINDS[kind]
    kinds = sum(rule in RULES.get(k, ("auto",)) for k in KINDS)

    @seed(1)
    @settings(max_examples=20, deadline=None, database=None, phases=[Phase.generate])
    @given(st.randoms(use_true_random=True))
    def check(rng):
        for _ in range(PAIRS // 20 // kinds + 1):
            truth, other = make(rng), make(rng)
            stated = rng.choice(forms(truth))
            response = rng.choice(WORDINGS).format(rng.choice(forms(truth)))
            assert right(rule, stated, response), (stated, response)
            if truth != other and not (rule == "relaxed_number" and near(truth, other)):
                response = rng.choice(WORDINGS).format(rng.choice(forms(other)))
                assert not right(rule, stated, response), (stated, response)

    check()


WORDS_OF = {
    "exact": [
        "red ball",
        "a small dog",
        "Route 66",
        "42",
        "5 cm",
        "蓝色的球",
        "the left door",
        "10:30",
        "cat and dog",
        "x + 1",
    ],
    "contains": ["ball", "dog", "tree", "蓝色", "Paris", "New York", "bicycle", "東京", "umbrella", "lamp post"],
    "boolean": [
        ("yes", "Yes", "true", "True", "是", "正确", "Correct"),
        ("no", "No", "false", "False", "否", "错误", "Incorrect"),
    ],
}


@pytest.mark.parametrize("rule", ["exact", "contains", "boolean", "choice", "auto"])
def test_words_booleans_and_choices(rule):
    pick = random.Random(2).choice
    names = ["cat", "dark red", "3", "3.5", "蓝色", "dog", "12 cm", "New York"]
    for _ in range(2 * PAIRS):
        if rule in ("choice", "auto"):
            options = tuple(random.Random(pick(range(10**6))).sample(names, 4))
            a, b = pick(range(4)), pick(range(4))
            forms = [[f"{'ABCD'[i]}", f"({'ABCD'[i]})", options[i], f"{'ABCD'[i]}. {options[i]}"] for i in (a, b)]
        else:
            options, words = (), WORDS_OF[rule]
            a, b = pick(range(len(words))), pick(range(len(words)))
            forms = [words[i] if rule == "boolean" else [words[i], words[i].upper()] for i in (a, b)]
        truth = pick([pick(forms[0]), f"<answer>{pick(forms[0])}</answer>", f"\\boxed{{{pick(forms[0])}}}"])
        response = pick(WORDINGS).format(pick(forms[1]))
        assert right(rule, truth, response, options) == (a == b), (truth, response, options)


INCOMPARABLE = [
    (
        "number",
        "12",
        ["12π", "12x", "12 am", "12C", "12 + 30", "12:30", "12-15", "12th", "12!", "√12", "12 March", "12 BC"],
    ),
    ("auto", "5x", ["five times a quantity", "see above"]),
    ("auto", "9 am", ["9", "nine in the morning"]),
    ("auto", "5 apples", ["5", "5 oranges"]),
    ("auto", "45°C", ["45°F", "45 K"]),
    ("auto", "car", ["automobile"]),
    ("boolean", "yes", ["maybe", "it depends"]),
    ("choice", "B", ["none of these", "I cannot tell"]),
]


@pytest.mark.parametrize(("rule", "truth", "responses"), INCOMPARABLE)
def test_what_cannot_be_compared_is_unparsed(rule, truth, responses):
    for response in responses:
        for wording in WORDINGS:
            assert score(rule, ask(truth, rule), wording.format(response)) is None, wording.format(response)


def test_number_words_of_any_size():
    for n in [*range(1200), *random.Random(3).sample(range(10**11), 1000)]:
        for words in (in_english(n), in_chinese(n)):
            assert right("number", str(n), words), (n, words)
            assert not right("number", str(n + 1), words), (n, words)


def test_fractions_reach_one_value():
    for value in (Fraction(7, 2), Fraction(1, 2), Fraction(15, 4)):
        for form in fraction_forms(value):
            assert right("auto", str(float(value)), form), form
