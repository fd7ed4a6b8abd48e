"""The one store of verdicts: what a verdict is stored by, who finds it, and what a kill leaves of it."""

import json
import multiprocessing
import shutil
import tracemalloc

import pytest

from openril.recipe.schema import JudgeConfig, Recipe
from openril.records import Question
from openril.rewards.answers import known_answers, score_answers
from openril.rewards.judge import JudgeItem, JudgeService, KnownVerdicts, build_judge_service
from openril.rewards.judge_prompt import Prompt
from openril.rewards.judge_protocol import Verdict, judge_identity
from openril.rewards.verdict_store import VerdictStore, open_verdict_store, verdict_key
from openril.storage import append_jsonl, read_jsonl
from support.misbehaving_server import MisbehavingServer, Say, Status

RIGHT = Say("It says the same. <answer>1</answer>")
WRONG = Say("It says something else. <answer>0</answer>")
QUESTION = Question("q", "How many?", "3", choices=("3", "4"), origin="train.jsonl:1")
ITEM = ("How many?", "3", "It is 3.")
PROMPT = Prompt(*ITEM)


def recipe_for(tmp_path, server, run="run", **judge):
    endpoint = {"base_urls": [server.url], "model": "fake", "max_retries": 0, **judge}
    return Recipe.model_validate(
        {"run_dir": str(tmp_path / run), "cache_dir": str(tmp_path / "responses"), "judge": endpoint}
    )


def ask(recipe, question=QUESTION, text="It is 3.", shared=True):
    """Score one cached response as a new process does."""
    service = build_judge_service(recipe)
    try:
        [score] = score_answers([(question, text)], "judge", "auto", service, [shared])
    finally:
        service.close()
    return score


def test_a_stored_verdict_is_not_asked_for_again(tmp_path):
    with MisbehavingServer(then=RIGHT) as server:
        assert [ask(recipe_for(tmp_path, server)).verdict.asked for _ in range(2)] == [True, False]
        assert server.count == 1


def test_a_corrected_truth_is_asked_again(tmp_path):
    with MisbehavingServer(then=lambda r: RIGHT if "A. 3\n</ground truth>" in r.text else WRONG) as server:
        recipe = recipe_for(tmp_path, server)
        assert ask(recipe).score == 1.0
        assert ask(recipe, Question("q", "How many?", "4", choices=("3", "4"))).score == 0.0
        assert server.count == 2


@pytest.mark.parametrize(
    "question",
    [Question("q", "How many balls?", "3", choices=("3", "4")), Question("q", "How many?", "3", choices=("3", "5"))],
)
def test_another_question_text_or_choice_is_asked_again(tmp_path, question):
    with MisbehavingServer(then=RIGHT) as server:
        recipe = recipe_for(tmp_path, server)
        ask(recipe)
        ask(recipe, question)
        assert server.count == 2


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "2"},
        {"temperature": 0.5},
        {"max_tokens": 99},
        {"extra_body": {"top_k": 1}},
    ],
)
def test_another_judge_is_asked_again_even_if_it_has_the_same_name(tmp_path, change):
    with MisbehavingServer(RIGHT, then=WRONG) as server:
        assert ask(recipe_for(tmp_path, server)).score == 1.0
        assert ask(recipe_for(tmp_path, server, **change)).score == 0.0
        assert ask(recipe_for(tmp_path, server)).score == 1.0  # the first judge's verdict is still stored
        assert server.count == 2


@pytest.mark.parametrize(
    "change", [{"concurrency": 2}, {"timeout": 9.0}, {"max_retries": 3}, {"bad_verdict_retries": 1}, {"batch_size": 2}]
)
def test_settings_that_change_no_verdict_are_no_part_of_its_key(tmp_path, change):
    with MisbehavingServer(then=RIGHT) as server:
        ask(recipe_for(tmp_path, server))
        assert ask(recipe_for(tmp_path, server, **change)).verdict.cached


def test_a_local_judge_is_its_weights(tmp_path):
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    settings = JudgeConfig(model_path=str(folder))
    key = verdict_key(judge_identity(settings), PROMPT)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert verdict_key(judge_identity(JudgeConfig(model_path=str(copy))), PROMPT) == key
    (folder / "model.safetensors").write_bytes(b"two")
    assert verdict_key(judge_identity(settings), PROMPT) != key
    assert judge_identity(JudgeConfig(model_path="hub/a")) != judge_identity(JudgeConfig(model_path="hub/b"))


def test_another_model_is_another_judge():
    keys = {verdict_key(judge_identity(JudgeConfig(base_urls=["http://x"], model=m)), PROMPT) for m in ("a", "b")}
    assert len(keys) == 2


def test_another_version_of_the_prompt_is_asked_again(monkeypatch):
    key = verdict_key({}, PROMPT)
    monkeypatch.setattr("openril.rewards.verdict_store.PROMPT_VERSION", "2")
    assert verdict_key({}, PROMPT) != key


def test_verdicts_on_cached_responses_reach_other_runs_and_others_do_not(tmp_path):
    with MisbehavingServer(then=RIGHT) as server:
        one, two = (build_judge_service(recipe_for(tmp_path, server, run)) for run in ("one", "two"))
        items = [JudgeItem(*ITEM, shared=True), JudgeItem("q", "t", "the student's own")]
        one.judge(items)
        # The second run was open before the first one judged.
        assert [v.cached for v in two.judge(items)] == [True, False]
        assert server.count == 3
    for run, number in (("one", 2), ("two", 1)):
        rows = read_jsonl(tmp_path / run / "verdicts" / "rank0.jsonl")
        assert len(rows) == number and all(row["explanation"] == "It says the same." for row in rows)
    assert len(list((tmp_path / "responses" / "verdicts").glob("*.jsonl"))) == 1


def test_unknown_verdicts_are_logged_and_never_stored(tmp_path):
    with MisbehavingServer(then=Status(400)) as server:
        recipe = recipe_for(tmp_path, server)
        assert [ask(recipe).score for _ in range(2)] == [None, None]
        assert server.count == 2
    assert [row["score"] for row in read_jsonl(tmp_path / "run" / "verdicts" / "rank0.jsonl")] == [None, None]
    assert not (tmp_path / "responses" / "verdicts").exists()
    assert len(open_verdict_store(recipe)) == 0


def test_known_verdicts_ask_nobody(tmp_path):
    with MisbehavingServer(then=RIGHT) as server:
        recipe = recipe_for(tmp_path, server)
        store = open_verdict_store(recipe)
        known = KnownVerdicts(recipe.judge, store)
        assert [(v.score, v.asked) for v in known.judge([ITEM])] == [(None, False)]
        JudgeService(recipe.judge, store).judge([ITEM])
        assert [(v.score, v.explanation) for v in known.judge([ITEM])] == [(1.0, "It says the same.")]
        assert server.count == 1
    score = known_answers(recipe)
    assert [s.score for s in score([(Question("q", "How many?", "3"), text) for text in ("It is 3.", "4", " ")])] == [
        1.0,  # stored
        None,  # never judged
        0.0,  # empty
    ]


def test_scores_by_rules_need_no_store(tmp_path):
    recipe = Recipe.model_validate(
        {"run_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path), "rewards": {"answer": {"kind": "rules"}}}
    )
    assert [s.score for s in known_answers(recipe)([(QUESTION, "The answer is A."), (QUESTION, "4")])] == [1.0, 0.0]
    assert not list(tmp_path.iterdir())


def old_row(**fields):
    return {"key": "0" * 64, "score": 1.0, "cause": "", "explanation": "Right.", "judge": "fake", **fields}


def test_verdicts_of_an_earlier_version_are_noticed_and_not_used(tmp_path):
    append_jsonl(tmp_path / "rank0.jsonl", old_row(score=None))
    assert not VerdictStore(tmp_path / "rank0.jsonl").outdated  # an unknown verdict is no loss
    append_jsonl(tmp_path / "rank0.jsonl", old_row())
    store = VerdictStore(tmp_path / "rank0.jsonl")
    assert store.outdated and len(store) == 0


@pytest.mark.parametrize("torn", ['{"key": "v2:', '{"key": "v2:' + "1" * 64 + '", "score": 1.0, "cau', "", "\x00\x00"])
def test_a_kill_in_the_middle_of_a_row_loses_that_row_alone(tmp_path, torn):
    def add(store, text, score):
        key = verdict_key({}, Prompt("q", "t", text))
        store.add(key, Verdict(score, f"About {text}."), judge="j", prompt=Prompt("q", "t", text), attempts=1)
        return key

    path = tmp_path / "rank0.jsonl"
    first = add(VerdictStore(path), "one", 1.0)
    with open(path, "a") as file:
        file.write(torn)
    store = VerdictStore(path)
    second = add(store, "two", 0.0)
    for opened in (store, VerdictStore(path)):
        assert opened.get(first) == Verdict(1.0, "About one.", cached=True)
        assert opened.get(second) == Verdict(0.0, "About two.", cached=True)


def test_a_deleted_log_costs_the_explanation_and_not_the_score(tmp_path):
    store = VerdictStore(tmp_path / "rank0.jsonl")
    key = verdict_key({}, PROMPT)
    store.add(key, Verdict(1.0, "Same."), judge="j", prompt=PROMPT, attempts=1)
    (tmp_path / "rank0.jsonl").unlink()
    store.refresh()
    assert store.get(key) == Verdict(1.0, "", cached=True)


def test_a_lone_surrogate_in_an_explanation_can_be_stored(tmp_path):
    store = VerdictStore(tmp_path / "rank0.jsonl")
    store.add("v2:" + "1" * 64, Verdict(1.0, "a\ud800b"), judge="j", prompt=PROMPT, attempts=1)
    assert store.get("v2:" + "1" * 64) == Verdict(1.0, "a?b", cached=True)


def write_some(folder, worker):
    store = VerdictStore(folder / f"worker{worker}.jsonl", shared_file=folder / "shared.jsonl")
    for i in range(50):
        prompt = Prompt("q", "t", f"{worker} {i}")
        store.add(
            verdict_key({}, prompt),
            Verdict(float(i % 2), "x" * 3000),
            judge="j",
            prompt=prompt,
            attempts=1,
            shared=True,
        )


def test_several_processes_may_write_at_once_even_into_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_some, args=(tmp_path, worker)) for worker in range(3)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    # An append may see another one half done, and then begins with an empty line.
    rows = [json.loads(line) for line in (tmp_path / "shared.jsonl").read_text().splitlines() if line]
    assert len(rows) == 150
    store = VerdictStore(tmp_path / "mine.jsonl")
    assert len(store) == 150
    for worker in range(3):
        for i in range(50):
            verdict = store.get(verdict_key({}, Prompt("q", "t", f"{worker} {i}")))
            assert verdict is not None and verdict.score == i % 2 and len(verdict.explanation) == 3000


def test_memory_does_not_grow_with_explanations(tmp_path):
    def size_of(length):
        path = tmp_path / str(length) / "rank0.jsonl"
        append_jsonl(path, *(old_row(key=f"v2:{i:032x}" + "0" * 32, explanation="x" * length) for i in range(500)))
        tracemalloc.start()
        store = VerdictStore(path)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(store) == 500
        return size

    assert size_of(5000) < size_of(5) + 20_000
