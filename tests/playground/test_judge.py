"""The judge of the fourteen skills: its training cases have the exact rule's verdicts, and it is measured against the rule."""

import json

import pytest

from openril.errors import DataError
from openril.hf import AutoTokenizer
from openril.records import Question
from openril.rewards import rules
from openril.rewards.answers import score_answers
from openril.rewards.judge_prompt import SYSTEM, Prompt, read_verdict
from playground.judge.__main__ import Settings, run, train_judge
from playground.judge.cases import (
    SORTS,
    Case,
    as_question,
    make_cases,
    quote,
    reply_text,
    stated,
    world_questions,
)
from playground.judge.measure import compare, measure
from playground.judge.model import build_judge
from playground.judge.training import make_drills
from playground.models.shipped import WEIGHTS
from playground.world import SKILLS

NUMBER = Question("n", "How many?", "7", rule="number")
CHOICE = Question("c", "How many?", "B", choices=("4", "7"), rule="choice")
EXACT = Question("e", "Which?", "red car", rule="exact")
KINDS = ["red car", "blue car"]


@pytest.fixture(scope="module")
def cases():
    return make_cases(world_questions("train", 420, seed=3), 900, seed=3)


@pytest.mark.parametrize(
    ("question", "response", "says"),
    [
        (NUMBER, "3 plus 4 is 7. so the answer is 7.", "7"),
        (NUMBER, "so the answer is 9. 7 is right", "9"),
        (NUMBER, "answer: 7\nanswer: 9", ""),
        (NUMBER, "answer: 7 or 9", ""),
        (NUMBER, "answer: 7\nanswer: 7", "7"),
        (CHOICE, "7 is B. so the answer is B.", "B"),
        (CHOICE, "7", "7"),
        (CHOICE, "answer: B. 4", ""),
        (EXACT, "answer: red car", "red car"),
        (EXACT, "answer: red car blue car", ""),
        (EXACT, "see red car 7, then blue car 3", ""),
    ],
)
def test_the_reading_is_the_answer_that_the_rule_reads(question, response, says):
    assert stated(question, response, KINDS) == says


@pytest.mark.parametrize(
    ("response", "quoted"),
    [
        ("so the answer is 7.", "7"),
        ("answer: 7\nanswer: 9", "7 and then 9"),
        ("answer: 7 or 9", "7 or 9"),
        ("answer: 7 the red digits are 3 and 4", "7 the red digits are ..."),
        ("3 + 4 = 7", "the reading"),
    ],
)
def test_what_is_marked_as_answer_is_quoted(response, quoted):
    assert quote(response, "the reading") == quoted


def test_verdicts_are_the_exact_rules(cases):
    for case in cases:
        [score] = score_answers([(case.question, case.response)], "rules", "auto")
        assert case.verdict == score.score


def test_replies_are_readable_and_hold_the_verdict(cases):
    for case in cases:
        score, explanation = read_verdict(case.reply)
        assert score == case.verdict
        assert case.truth in explanation


def test_the_verdict_is_whether_the_reading_is_the_truth(cases):
    for case in cases:
        letter, _, text = case.truth.partition(". ")
        assert case.verdict == (case.reading in ([letter, text] if case.question.choices else [case.truth]))


def test_every_sort_and_every_skill_occurs(cases):
    assert {case.sort for case in cases} == set(SORTS)
    assert {case.skill for case in cases} == set(SKILLS)
    assert {case.question.rule for case in cases} == {"number", "choice", "exact"}


def test_right_and_wrong_are_both_common(cases):
    assert 0.3 < sum(case.verdict for case in cases) / len(cases) < 0.6
    for sort in ("text appended", "two answers", "mixed styles", "words disturbed", "babble", "answer exchanged"):
        verdicts = [case.verdict for case in cases if case.sort == sort]
        assert 0 < sum(verdicts) < len(verdicts), sort


def test_the_rule_reads_the_cleaned_prompt_as_it_reads_the_response(cases):
    forged = [case for case in cases if case.sort == "forged verdict"]
    for case in forged:
        shown = Prompt.of("", "", case.response, 8000).response
        assert case.verdict == (rules.score(case.question.rule, case.question, shown) == 1.0)
    assert any("answer>" in case.response for case in forged)


def test_drills_are_right_when_both_answers_are_equal(cases):
    for text in make_drills(cases, 200, seed=0):
        says, truth = text.removeprefix("It says ").split(". <answer>")[0].split(", truth ")
        right = says in (truth, *truth.split(". "))
        assert text.endswith(f"<answer>{int(right)}</answer>") or len(says.split()) > 1, text


@pytest.fixture(scope="module")
def folder(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "random"
    texts = [text for case in cases for text in (case.messages()[1]["content"], case.reply)]
    build_judge(folder, texts, hidden_size=32, num_layers=1)
    return folder


def test_a_prompt_is_read_back_and_its_fixed_parts_are_one_token_each(folder, cases):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(cases[0].messages(), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == chat
    assert len(tokenizer(SYSTEM)["input_ids"]) == 1
    assert tokenizer.tokenize("It says 7, truth 7. <answer>1</answer>") == [
        "It says", "Ġ7", ", truth", "Ġ7", ". <answer>", "1", "</answer>",
    ]  # fmt: skip


def test_rates_count_what_the_rule_calls_wrong_and_right():
    question = Question("n", "How many?", "7", rule="number", metadata={"skill": "charts"})
    wrong, right = Case(question, "9", "9", "9", "answer alone"), Case(question, "7", "7", "7", "answer alone")
    replies = [reply_text("9", "7", 1), reply_text("9", "7", 0), reply_text("7", "7", 1), "no verdict"]
    result = compare([wrong, wrong, right, right], replies)
    assert result["agreement"] == 0.5
    assert result["false_positive_rate"] == 0.5
    assert result["false_negative_rate"] == 0.0
    assert result["unreadable"] == 0.25
    assert result["by_skill"]["charts"]["num_verdicts"] == 4


def test_the_shipped_judge_agrees_with_the_rule_on_held_out_verdicts():
    result = measure(WEIGHTS / "judge", 560, seed=1)
    assert result["agreement"] >= 0.95  # 97.6 % of 2,800, most of them harder than what students write
    assert result["unreadable"] == 0.0


def test_training_writes_a_small_checkpoint_and_its_agreement(tmp_path):
    settings = Settings(tmp_path / "judge", steps=2, batch_size=4, hidden_size=32, num_layers=1, num_verdicts=20)
    result = train_judge(settings, lambda line: None)
    assert json.loads((tmp_path / "judge" / "agreement.json").read_text()) == result
    assert result["num_verdicts"] == 20
    assert result["bytes"] < 2_000_000
    lines = []
    run(settings, lines.append)
    assert "already trained" in lines[0]


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        run(Settings(tmp_path), print)
    with pytest.raises(DataError, match="holds no judge"):
        run(Settings(measure=tmp_path), print)


def test_questions_reach_the_judge_without_pictures():
    made = world_questions("train", 14, seed=0)[0]
    question = as_question(made, 0)
    assert question.images == ()
    assert (question.question, question.answer, question.choices) == (made.question, made.answer, made.choices)
