"""Answer rules against a table of responses: what is right, wrong, and unparsed (None)."""

import time

import pytest

from openril.errors import DataError
from openril.records import Question
from openril.rewards.extraction import numbers, whole_number
from openril.rewards.rules import choose_rule, score

PETS = ("cat", "dog", "bird")


def ask(answer, choices=(), question="What is shown?"):
    return Question("q1", question, answer, choices=tuple(choices), origin="questions.jsonl:7")


CHOICE = [
    ("B", 1.0),
    ("b", 1.0),
    ("(B)", 1.0),
    ("B.", 1.0),
    ("B. dog", 1.0),
    ("dog", 1.0),
    ("A dog.", 1.0),  # an article, not the letter A
    ("A", 0.0),
    ("C) bird", 0.0),
    ("Let us look closely.\nThe ears hang, so it is (B).", 1.0),
    ("<answer>B</answer>", 1.0),
    ("The answer is B.", 1.0),
    ("**Answer:** B", 1.0),
    ("**Answer:**\nB) dog", 1.0),
    ("The correct option is (B) because cats have other ears.", 1.0),
    ("It is not A. The answer is B", 1.0),
    ("The answer is not A.\nThe answer is B.", 1.0),
    (r"So we get $\boxed{\text{B}}$", 1.0),
    ("Ｂ", 1.0),  # full width
    ("答案是B", 1.0),
    ("答案：（Ｂ）", 1.0),
    ("故选B。", 1.0),
    ("A. cat - the tail is wrong\nB. dog - fits\nC. bird - has no wings\nTherefore B", 1.0),
    ("The animal is a dog.", 1.0),
    ("<think>A cat? Answer: A. No.</think>Answer: B", 1.0),
    ("Answer: B, since A and C have other ears", 1.0),
    # attempts to be right whatever the truth is
    ("A or B or C", 0.0),
    ("B or C", 0.0),
    ("(A) (B) (C)", 0.0),
    ("A/B/C", 0.0),
    ("A, B and C", 0.0),
    ("cat, dog, bird", 0.0),
    ("cat dog bird", 0.0),
    ("A. cat\nC. bird\nB. dog", 0.0),
    ("B. cat", 0.0),
    ("Answer: A\nAnswer: B", 0.0),
    ("<answer>A</answer><answer>B</answer>", 0.0),
    (r"\boxed{B} or maybe \boxed{C}", 0.0),
    ("The answer is not B", None),
    ("not a dog", None),
    ("", 0.0),
    (" \n\u200b", 0.0),
    ("I cannot see any picture here.", None),
    ("Both look alike to me", None),
]


@pytest.mark.parametrize(("response", "expected"), CHOICE)
def test_choice(response, expected):
    assert score("auto", ask("B", PETS), response) == expected


@pytest.mark.parametrize("truth", ["B", "b", "(B)", "B.", "dog", "Dog", "B. dog"])
def test_choice_truth_may_be_letter_or_text(truth):
    assert score("choice", ask(truth, PETS), "I say (B)") == 1.0
    assert score("choice", ask(truth, PETS), "I say (C)") == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Yes", 1.0),
        ("Yes, there is no dog", 1.0),
        ("No, yes would be wrong", 0.0),
        ("Yes or No", 0.0),
        ("yes, no", 0.0),
    ],
)
def test_choice_between_words_that_also_occur_in_sentences(response, expected):
    assert score("auto", ask("Yes", ("Yes", "No")), response) == expected


def test_choice_prefers_the_longer_text():
    colors = ("red", "dark red", "blue")
    assert score("auto", ask("dark red", colors), "The ball is dark red") == 1.0
    assert score("auto", ask("red", colors), "The ball is dark red") == 0.0


def test_choice_between_numbers():
    assert score("auto", ask("3.5", ("3", "3.5", "35")), "It comes to 3.5") == 1.0
    assert score("auto", ask("3", ("3", "3.5", "35")), "It comes to 3.5") == 0.0


def test_more_options_than_letters_are_told_apart_by_text():
    many = [f"item {i}" for i in range(40)]
    assert score("auto", ask("item 33", many), "It is item 33.") == 1.0
    assert score("auto", ask("item 33", many), "It is item 3.") == 0.0


def test_choice_with_options_in_the_question_text():
    text = "What is it?\nA. cat\nB. dog\nC. bird"
    assert choose_rule(ask("B", question=text)) == "choice"
    assert score("auto", ask("B", question=text), "a dog") == 1.0
    assert score("auto", ask("B", question="Which panel?"), "Panel (B)") == 1.0  # letters alone


NUMBER = [
    ("42", "42", 1.0),
    ("42", "42.0", 1.0),
    ("42", "43", 0.0),
    ("42", "The total is 42 apples.", 1.0),
    ("42", "12 + 30 = 42", 1.0),
    ("42", "There are 12 red and 30 blue ones, so 42 in total.", 1.0),
    ("42", "42, because 12 and 30 are counted.", 1.0),
    ("42", "We see 12 here.\nAnswer: 42", 1.0),
    ("42", r"Thus $\boxed{42}$.", 1.0),
    ("42", "４２", 1.0),
    ("42", "答案是42。", 1.0),
    ("42", "there are forty-two of them", 1.0),
    ("3", "There are three cats.", 1.0),
    ("1000", "1,000", 1.0),
    ("1,000", "1000", 1.0),
    ("1234567.5", "$1,234,567.50", 1.0),
    ("1000", "1\u202f000", 1.0),
    ("1000", r"1{,}000", 1.0),
    ("5000000", "5 million", 1.0),
    ("5 million", "5", 0.0),
    ("2500", "2.5k", 1.0),
    ("-7", "−7", 1.0),
    ("-7", "7", 0.0),
    ("7", "- 7", 1.0),  # a bullet
    ("35%", "35 %", 1.0),
    ("35%", "35", 1.0),
    ("0.35", "35%", 1.0),
    ("35", "35 percent", 1.0),
    ("5 cm", "about 5 cm", 1.0),
    ("5 m", "5", 1.0),
    ("1/2", "0.5", 1.0),
    ("0.5", r"\frac{1}{2}", 1.0),
    ("1/3", "0.33", 1.0),
    ("1/3", "0.3", 0.0),
    ("2.5", "2 1/2", 1.0),
    ("2.5", "2½", 1.0),
    ("1000000", "10⁶", 1.0),
    ("49", "7² = 49", 1.0),
    ("9 m²", "9 m^2", 1.0),
    ("3000000", "3 × 10^6", 1.0),
    ("0.00012", "1.2e-4", 1.0),
    ("3", "3 or 4", 0.0),
    ("3", "1, 2, 3, 4", 0.0),
    ("3", "between 3 and 4", 0.0),
    ("3", "Answer: 3\nAnswer: 4", 0.0),
    ("3", "<answer>2</answer> <answer>3</answer>", 0.0),
    ("3", "Of the 5 shapes only those 3 on top of 1 other count", None),
    ("3", "I do not know", None),
    ("3", "3" * 5000, None),  # a loop, not a number
    ("3", "", 0.0),
]


@pytest.mark.parametrize(("truth", "response", "expected"), NUMBER)
def test_number(truth, response, expected):
    assert choose_rule(ask(truth)) == "number"
    assert score("number", ask(truth), response) == expected


@pytest.mark.parametrize(
    ("truth", "response", "expected"),
    [
        ("100", "105", 1.0),  # exactly 5 %
        ("100", "105.1", 0.0),
        ("100", "95", 1.0),
        ("1,000", "1040", 1.0),
        ("0", "0.01", 0.0),
        ("-20", "-21", 1.0),
        ("42%", "0.43", 1.0),
        ("Germany", "germany", 1.0),
        ("Germany", "France", 0.0),
    ],
)
def test_relaxed_number(truth, response, expected):
    assert score("relaxed_number", ask(truth), response) == expected


def test_years_are_not_relaxed():
    assert score("relaxed_number", ask("2010", question="In which year was it highest?"), "2015") == 0.0
    assert score("relaxed_number", ask("2010", question="How many were sold?"), "2015") == 1.0


VALUES = [
    ("<answer> 6 </answer>", "<think>I count</think><answer>6</answer>", 1.0),
    ("<answer> 6 </answer>", "6", 1.0),
    (r"\boxed{42}", r"\boxed{42}", 1.0),
    (r"$\boxed{\frac{3}{4}}$", "3/4", 1.0),
    ("3+4=7 apples.\n#### 7", "The answer is 7", 1.0),
    (r"Adding gives $3+4=7$, so the answer is $\boxed{7}$.", r"\boxed{7}", 1.0),
    (r"Adding gives $3+4=7$, so the answer is $\boxed{7}$.", r"\boxed{8}", 0.0),
    ("solution: <answer>yes</answer>", "Yes", 1.0),
    ("9 am", "9 pm", 0.0),
    ("9 am", "The answer is 9 p.m.", 0.0),
    ("5 March", "5 April", 0.0),
    ("300 BC", "300 AD", 0.0),
    ("9 am", "9 am", 1.0),
    ("12π", "12", 0.0),
    ("5x^2", "5", 0.0),
    ("5x", "5y", 0.0),
    ("3x", "3", 0.0),
    ("12\\pi", "12π", 1.0),
    ("12π", "12\\pi", 1.0),
    ("3\\frac{1}{2}", "3.5", 1.0),
    ("3\\frac{1}{2}", "15.5", 0.0),
    ("3\\frac{1}{2}", "7/2", 1.0),
    ("3.5", "\\boxed{3\\frac{1}{2}}", 1.0),
    ("\\frac12", "0.5", 1.0),
    ("0.5", "\\boxed{\\frac12}", 1.0),
    ("7", "I first thought the answer is 5. Wait, that is wrong.\n</think>\nThe answer is 7.", 1.0),
    ("7", "<answer>5</answer> would forget two.\n</think>\n<answer>7</answer>", 1.0),
    ("7", "<think>maybe the answer is 7", None),
    ("0.10000000149011612", "0.1", 1.0),
    ("12.699999809265137", "12.7", 1.0),
    ("0.30000000000000004", "0.3", 1.0),
    ("33.333333333333336", "33.33", 1.0),
    ("7", '{"answer": 7, "confidence": 0.95}', 1.0),
    ("Yes", "Yes, no doubt.", 1.0),
    ("9 am", "9:00 AM", 1.0),
    ("9 am", "9", None),
    ("9 am", "It is 9 o'clock in the morning.", None),
    ("9:30", "half past nine", None),
    ("下午3点", "15:00", 1.0),
    ("3 pm", "15:00", 1.0),
    ("三点半", "3:30", 1.0),
    ("三点半", "3点30分", 1.0),
    ("5 March", "March 5th", 1.0),
    ("March 5, 2019", "2019-03-05", 1.0),
    ("2019年3月5日", "March 5, 2019", 1.0),
    ("5 March", "15 March", 0.0),
    ("3月5日", "三月五日", 1.0),
    ("300 BC", "公元前300年", 1.0),
    ("300 BC", "300", None),
    ("300 BC", "300 BCE", 1.0),
    ("5x", "5*x", 1.0),
    ("2x+1", "1+2x", 1.0),
    ("x=5", "5", 1.0),
    ("5", "x=5", 1.0),
    ("x=5", "x=6", 0.0),
    ("x=5", "y=5", 0.0),
    ("5", "y=5", 1.0),
    ("y=2x+1", "y = 1 + 2x", 1.0),
    ("y=2x+1", "2x - y = -1", 1.0),
    ("y=2x+1", "y=2x-1", 0.0),
    ("(2,3)", "(2, 3)", 1.0),
    ("(2,3)", "(3,2)", 0.0),
    ("(2,3)", "[2,3]", None),
    ("[1,2)", "(1,2)", None),
    ("[0, ∞)", "[0,\\infty)", 1.0),
    ("1, 2, 3", "1,2,3", 1.0),
    ("1, 2, 3", "1, 2 and 3", 1.0),
    ("1, 2, 3", "3, 2, 1", None),
    ("1, 2", "1, 3", 0.0),
    ("1, 2, 3", "1, 2", 0.0),
    ("{1,2}", "{2,1}", 1.0),
    ("3-5", "3 to 5", 1.0),
    ("3-5", "between 3 and 5", 1.0),
    ("3-5", "-2", None),
    ("3-5", "4-6", 0.0),
    ("3 to 5", "3", None),
    ("√2", "\\sqrt{2}", 1.0),
    ("√2", "-√2", 0.0),
    ("√2", "2√2", 0.0),
    ("√2", "1.414", None),
    ("√4", "2", None),
    ("\\sqrt{3}/2", "\\frac{\\sqrt{3}}{2}", 1.0),
    ("\\frac{\\pi}{4}", "π/4", 1.0),
    ("45°", "45 degrees", 1.0),
    ("45°", "45", 1.0),
    ("45°", "46°", 0.0),
    ("45°C", "45°F", None),
    ("45°C", "45 degrees Celsius", 1.0),
    ("5 km", "5000 m", 1.0),
    ("5 km", "5 m", 0.0),
    ("5 km", "5 miles", 0.0),
    ("5 km", "5", 1.0),
    ("5 kg", "5 m", None),
    ("$5", "5 dollars", 1.0),
    ("$5", "€5", None),
    ("$0.50", "50 cents", 1.0),
    ("5 apples", "5 apples", 1.0),
    ("5 apples", "5", None),
    ("5 apples", "5 oranges", None),
    ("5 apples", "6 apples", 0.0),
    ("5 apples", "There are five apples.", 1.0),
    ("12 pi", "12", 0.0),
    ("12 pi", "12π", 1.0),
    ("12", "12 pi", None),
    ("12", "5x", None),
    ("5", "5x", None),
    ("5", "5 x", None),
    ("5", "9 am", None),
    ("9", "9 am", None),
    ("5", "5th", None),
    ("5", "12 + 30", None),
    ("12", "12 + 30", None),
    ("42", "12 + 30", None),
    ("3", "3-5", None),
    ("2019", "2019-05-01", None),
    ("10", "10:30", None),
    ("1,234", "1234", 1.0),
    ("1234", "1,234", 1.0),
    ("1.2e-4", "0.00012", 1.0),
    ("6.02×10^23", "6.02e23", 1.0),
    ("one hundred and five", "105", 1.0),
    ("105", "one hundred and five", 1.0),
    ("一百零五", "105", 1.0),
    ("105", "一百零五个", 1.0),
    ("三分之二", "2/3", 1.0),
    ("2/3", "two thirds", 1.0),
    ("half", "0.5", 1.0),
    ("0.5", "half", 1.0),
    ("百分之五", "5%", 1.0),
    ("100 km/h", "100 kilometers per hour", 1.0),
    ("100 km/h", "27.8 m/s", None),
    ("9 m^2", "9 平方米", 1.0),
    ("9 m²", "9 m", None),
    ("2 hours 30 minutes", "150 min", 1.0),
    ("2小时30分钟", "2.5 hours", 1.0),
    ("3:4", "3 : 4", 1.0),
    ("3:4", "6:8", None),
    ("3:4", "4:3", 0.0),
    ("car", "automobile", None),
    ("Route 66", "Route 67", None),
    ("Route 66", "It is Route 66.", 1.0),
    ("iPhone 12", "iPhone 12 Pro", 1.0),
    ("12C", "Seat 12C", 1.0),
    ("12C", "12", None),
    ("12C", "12A", None),
    ("x > 5", "x>5", 1.0),
    ("x > 5", "5 < x", 1.0),
    ("x > 5", "x >= 5", 0.0),
    ("x > 5", "x < 5", 0.0),
    ("2<x<5", "2 < x < 5", 1.0),
    ("x^2+2x", "x(x+2)", 1.0),
    ("2", "\\boxed{2}", 1.0),
    ("2", "**2**", 1.0),
    ("2", "Answer:\n2", 1.0),
    ("2", "**Final Answer**\n2", 1.0),
    ("2", "#### 2", 1.0),
    ("2", "So the answer is $2$.", 1.0),
    ("1/2", "\\dfrac{1}{2}", 1.0),
    ("-1/2", "-\\frac{1}{2}", 1.0),
    ("3.5", "3,5", None),
    ("1000", "1.000", 0.0),
    ("5", "5.0", 1.0),
    ("5%", "5", 1.0),
    ("5%", "0.05", 1.0),
    ("12:00", "noon", None),
    ("12 pm", "noon", 1.0),
    ("Monday", "Tuesday", 0.0),
    ("A4", "4A", None),
    ("5 + 3i", "5+3i", 1.0),
    ("5!", "5", None),
    ("2^10", "1024", 1.0),
    ("10^2", "100", 1.0),
    ("2010", "2010年", 1.0),
    ("5", "5个", 1.0),
    ("5个", "5", 1.0),
    ("H2O", "H2O", 1.0),
    ("H2O", "H2O2", None),
    ("CO2", "CO", None),
    ("-3", "3", 0.0),
    ("x=2 or x=3", "x = 2, x = 3", 1.0),
    ("f(x)=2x", "2x", None),
    ("about 5", "5", 1.0),
    ("~5", "5", 1.0),
    ("5 m", "5m", 1.0),
    ("5m", "5", None),
    ("10K", "10,000", 1.0),
    ("10%", "10 percent", 1.0),
    ("1.5 million", "1,500,000", 1.0),
    ("150万", "1500000", 1.0),
    ("150万", "一百五十万", 1.0),
    ("$3.5M", "3.5 million dollars", 1.0),
    ("7 o'clock", "7:00", 1.0),
    ("7 o'clock", "7", None),
    ("noon", "12 pm", 1.0),
    ("2020-01", "2020", None),
    ("(A)", "A", 1.0),
    ("3 cm by 4 cm", "3 cm × 4 cm", None),
    ("3/4 cup", "3/4", None),
    ("Yes", "No, yes", 0.0),
    ("No", "No, no dog.", 1.0),
    ("5 years old", "5 years old", 1.0),
    ("5 years old", "5", None),
    ("20 years", "20 year", 1.0),
    ("20年", "20 years", 1.0),
    ("3 3/4", "3.75", 1.0),
    ("5 min", "5 minutes", 1.0),
    ("2 feet", "2 ft", 1.0),
    ("5'", "5 ft", None),
    ("1st", "first", None),
    ("1st", "2nd", None),
    ("1st", "1st", 1.0),
]


@pytest.mark.parametrize(("truth", "response", "expected"), VALUES)
def test_forms_of_truths_and_answers(truth, response, expected):
    assert score("auto", ask(truth), response) == expected


WORDED_CHOICES = [
    ("B", "B\n\nOption A is wrong because cats meow.", ("cat", "dog"), "?", 1.0),
    ("B", "A\n\nOption B is wrong because dogs bark.", ("cat", "dog"), "?", 0.0),
    ("B", "A\nB", ("cat", "dog"), "?", 0.0),
    ("<answer>D</answer>", "D", ("a", "b", "c", "d"), "?", 1.0),
    ("C", "The answer is 5.", (), "What is x? (A) 3 (B) 4 (C) 5 (D) 6", 1.0),
    ("5", "C", (), "What is x? (A) 3 (B) 4 (C) 5 (D) 6", 1.0),
    ("C", "B", (), "What is x? A. 3 B. 4 C. 5 D. 6", 0.0),
    ("B", "45°", (), "下图中∠A是多少度？\nA、30°\nB、45°\nC、60°", 1.0),
]


@pytest.mark.parametrize(("truth", "response", "choices", "question", "expected"), WORDED_CHOICES)
def test_wordings_of_choices_and_options(truth, response, choices, question, expected):
    assert score("auto", ask(truth, choices, question), response) == expected


BOOLEAN = [
    ("yes", "Yes.", 1.0),
    ("yes", "True", 1.0),
    ("true", "yes, there is a black box", 1.0),
    ("false", "No, all boxes are yellow.", 1.0),
    ("false", "The statement is not true.", 1.0),
    ("true", "There are no circles, so the statement is true.", 1.0),
    ("true", "False", 0.0),
    ("true", "Looking at each tower.\nThe statement is false.", 0.0),
    ("true", "The answer is: true", 1.0),
    ("true", "<answer>True</answer>", 1.0),
    ("true", "是的", 1.0),
    ("false", "答案：错误", 1.0),
    ("yes", "yes or no", 0.0),
    ("yes", "true/false", 0.0),
    ("yes", "Yes and no.", 0.0),
    ("yes", "Yes, it is.\nThe statement is false.", 0.0),
    ("yes", "Nothing can be said", None),
    ("yes", "", 0.0),
]


@pytest.mark.parametrize(("truth", "response", "expected"), BOOLEAN)
def test_boolean(truth, response, expected):
    assert choose_rule(ask(truth)) == "boolean"
    assert score("auto", ask(truth), response) == expected


CONTAINS = [
    ("red", "Red", 1.0),
    ("red", "The color of the ball is red.", 1.0),
    ("red", "It is not red.", 0.0),
    ("red", "hundred", None),  # part of a word
    ("red", "red, green or blue", 0.0),
    ("red", "red, green, blue", 0.0),
    ("red", "red or blue", 0.0),
    ("red", "blue", 0.0),
    ("red", "The ball that lies on the left side looks crimson to me", None),
    ("red", "The answer is crimson", None),  # perhaps a synonym
    ("red", "The answer is blue", 0.0),
    ("Paris", "Paris, France", 1.0),
    ("red and blue", "The flags are red and blue.", 1.0),
    ("東京", "答案是東京。", 1.0),
    ("café", "cafe\u0301", 1.0),
]


@pytest.mark.parametrize(("truth", "response", "expected"), CONTAINS)
def test_contains(truth, response, expected):
    assert choose_rule(ask(truth)) == "contains"
    assert score("auto", ask(truth), response) == expected


@pytest.mark.parametrize(
    ("truth", "response", "expected"),
    [
        ("Red ball", "the red ball.", 1.0),
        ("red ball", "red balls", 0.0),
        ("red ball", "Answer: red ball. It lies left.", 1.0),
        ("red ball", "I looked at it for a long time before I saw the red ball", None),
        ("10:30", "10:30", 1.0),
        ("STRASSE", "Straße", 1.0),
    ],
)
def test_exact(truth, response, expected):
    assert score("exact", ask(truth), response) == expected


def test_long_answers_in_other_words_are_unparsed_under_auto():
    truth = "The man is repairing the roof of his house with a hammer"
    assert choose_rule(ask(truth)) == "exact"
    assert score("auto", ask(truth), "Answer: he mends a roof") is None
    assert score("exact", ask(truth), "Answer: he mends a roof") == 0.0
    assert score("auto", ask(truth), truth.upper() + ".") == 1.0


def test_errors_name_the_question_and_the_value():
    with pytest.raises(DataError, match=r"q1 .*questions.jsonl:7.*relaxed_number.*'numbre'"):
        score("numbre", ask("1"), "1")
    with pytest.raises(DataError, match=r"q1 .*answer"):
        score("auto", ask(" "), "1")
    with pytest.raises(DataError, match=r"number.*'many'"):
        score("number", ask("many"), "1")
    with pytest.raises(DataError, match=r"cat, dog, bird.*'fish'"):
        score("choice", ask("fish", PETS), "A")
    with pytest.raises(DataError, match=r"yes/no/true/false.*'maybe'"):
        score("boolean", ask("maybe"), "yes")


RUNAWAY = ["\\boxed{", "answer is ", "(", "A ", "1,", "9", "so ", "<answer>", "**", " \n", "\n", "  ", "or "]


@pytest.mark.parametrize("bit", RUNAWAY)
def test_runaway_text_does_not_stall_a_rule(bit):
    started = time.process_time()
    for question in (ask("B", PETS), ask("42"), ask("yes"), ask("red ball")):
        assert score("auto", question, bit * (60_000 // len(bit)) + ".") in (None, 0.0)
    assert time.process_time() - started < 5


def test_the_end_of_a_very_long_response_counts():
    assert score("auto", ask("B", PETS), "Let us think. " * 5000 + "\nThe answer is B.") == 1.0


def test_numbers_reads_values():
    assert [float(n.value) for n in numbers("1,000 and -2.5 and 3/4")] == [1000.0, -2.5, 0.75]


@pytest.mark.parametrize("text", ["12 angry men", "10:30", "2019-05-01", "room 5", "1-2", ""])
def test_texts_that_are_not_one_number(text):
    assert whole_number(text) is None


@pytest.mark.parametrize(
    ("rule", "answers", "response", "expected"),
    [
        ("auto", ("red", "crimson"), "It is crimson.", 1.0),
        ("auto", ("red", "crimson"), "<answer>blue</answer>", None),  # blue is not red, but is it crimson?
        ("auto", ("12", "12 km"), "The answer is 12 km.", 1.0),
        ("auto", ("12", "13"), "The answer is 14.", 0.0),
        ("auto", ("12", "13"), "12 or 13", 0.0),  # two answers, although each is right
        ("auto", ("12", "a dozen"), "<answer>twelve</answer>", 1.0),
        ("exact", ("New York", "NYC"), "<answer>nyc</answer>", 1.0),
        ("exact", ("New York", "NYC"), "<answer>Boston</answer>", 0.0),
    ],
)
def test_a_response_is_right_if_it_matches_any_of_several_truths(rule, answers, response, expected):
    question = Question("q", "Which?", answers[0], other_answers=answers[1:])
    assert score(rule, question, response) == expected


@pytest.mark.parametrize(("response", "expected"), [("B", 1.0), ("The answer is (A).", 0.0), ("The image", None)])
def test_choices_that_are_images_are_chosen_by_letter(response, expected):
    question = Question("q", "Which is a cat?", "B", choices=("<image>", "<image>"))
    assert score("auto", question, response) == expected
