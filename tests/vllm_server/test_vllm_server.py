"""Teacher responses and judge verdicts from real ``vllm serve`` processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openril.endpoints import ChatClient, Completion
from openril.errors import EndpointError
from openril.recipe.schema import JudgeConfig, Recipe
from openril.records import Question
from openril.responses.cache import ResponseCache
from openril.responses.chat_requests import chat_messages
from openril.responses.collection import Silent, collect
from openril.rewards.judge import JudgeService
from openril.rewards.verdict_store import VerdictStore
from support.tiny import tiny_questions

pytestmark = pytest.mark.vllm

VERDICT = r"[A-Za-z0-9 ,.']{15,80}<answer>[01]</answer>"
"""The server forces a weak real judge into this form. A strong judge follows it without help."""


def recipe_for(server, folder: Path, **teacher) -> Recipe:
    return Recipe.model_validate(
        {
            "run_dir": str(folder),
            "teachers": [{"name": "t", "base_urls": [server.url], "model": "student", "concurrency": 4, **teacher}],
            "collect": {"num_responses": 4, "max_completion_length": 24, "student": False},
        }
    )


def texts(cache: ResponseCache, questions: list[Question]) -> list[list[str]]:
    loaded = cache.load(questions, ["t"], 4)
    return [[r.text for r in loaded.responses_for(q.id, "t")] for q in questions]


def judge_for(server, folder: Path, **settings) -> JudgeService:
    judge = JudgeConfig(base_urls=[server.url], model=server.name, concurrency=4, max_retries=0, max_tokens=128)
    return JudgeService(judge.model_copy(update=settings), VerdictStore(folder / "rank0.jsonl"))


ITEMS = [
    ("Which colour is the square?", "red", "The square is red."),
    ("Which colour is the square?", "red", "I think that it is blue."),
    ("What is the capital of France?", "Paris", "Paris"),
]


def test_a_probe_finds_the_model_and_names_what_is_served(vlm_server, tmp_path):
    recipe = recipe_for(vlm_server, tmp_path)
    right = ChatClient(recipe.teachers[0], "teacher t")
    wrong = ChatClient(recipe.teachers[0].model_copy(update={"model": "qwen72b"}), "teacher t")
    try:
        hello = [{"role": "user", "content": "Hello"}]
        ((_, answer),) = right.loop_thread.run(right.probe(hello, max_tokens=2))
        assert isinstance(answer, Completion) and answer.finish_reason in ("stop", "length")
        ((_, error),) = wrong.loop_thread.run(wrong.probe(hello, max_tokens=2))
        assert isinstance(error, EndpointError)
        assert "qwen72b" in str(error) and "It serves student" in str(error)
    finally:
        right.close()
        wrong.close()


def test_a_teacher_gets_text_and_images_as_the_student_does(vlm_server, vlm_checkpoint, tmp_path):
    from openril.models.loading import load_student
    from openril.models.prompts import PromptEncoder
    from openril.recipe.schema import StudentConfig

    model, processor = load_student(StudentConfig(), str(vlm_checkpoint))
    encoder = PromptEncoder(processor, model)
    client = ChatClient(recipe_for(vlm_server, tmp_path).teachers[0], "teacher t")
    try:
        for question in tiny_questions(tmp_path / "images", 3):  # one image, two, none
            messages = chat_messages(question, max_pixels=10**6)
            asked = client.chat(messages, max_tokens=1, extra_body={"return_token_ids": True})
            answer = client.loop_thread.run(asked).answer
            assert answer.prompt_token_ids == encoder(question).input_ids.tolist()
    finally:
        client.close()


def test_teacher_responses_are_collected_with_images_and_without(vlm_server, tmp_path):
    questions = tiny_questions(tmp_path / "images", 6)
    recipe = recipe_for(vlm_server, tmp_path)
    cache = ResponseCache.create(recipe.cache_path)
    done = collect(recipe, questions, "t", cache)
    assert (done.total, done.new, done.failed) == (24, 24, 0)
    kept = texts(cache, questions)
    # Every response has its own seed, so samples of a random model differ.
    assert all(len(set(responses)) == 4 for responses in kept)
    assert collect(recipe, questions, "t", cache).new == 0
    # The seeds depend on the recipe, so the cache of another run holds the same responses.
    other = recipe_for(vlm_server, tmp_path / "other")
    collect(other, questions, "t", ResponseCache.create(other.cache_path))
    assert texts(ResponseCache.open(other.cache_path), questions) == kept


class KillAfter(Silent):
    """Kill the server after a number of responses."""

    def __init__(self, server, count: int) -> None:
        self.server, self.count = server, count

    def update(self, source: str, *, done: int, in_flight: int, failed: int) -> None:
        if self.server is not None and done >= self.count:
            self.server.kill()
            self.server = None


def test_a_killed_server_costs_only_the_missing_responses(vlm_server, tmp_path):
    questions = tiny_questions(tmp_path / "images", 5)
    whole = recipe_for(vlm_server, tmp_path / "whole")
    collect(whole, questions, "t", ResponseCache.create(whole.cache_path))
    recipe = recipe_for(vlm_server, tmp_path / "broken", max_retries=0)
    cache = ResponseCache.create(recipe.cache_path)
    judge = judge_for(
        vlm_server, tmp_path / "verdicts", extra_body={"structured_outputs": json.dumps({"regex": VERDICT})}
    )
    try:
        try:
            broken = collect(recipe, questions, "t", cache, KillAfter(vlm_server, 8))
            unknown = judge.judge(ITEMS[:1])[0]
        finally:
            vlm_server.start().wait(timeout=600)
        assert 8 <= broken.new < 20 and broken.new + broken.failed == 20
        assert "cannot reach" in next(iter(broken.causes))
        assert unknown.unknown and "cannot reach" in unknown.cause
        continued = collect(recipe, questions, "t", cache)
        assert (continued.already, continued.new, continued.failed) == (broken.new, broken.failed, 0)
        assert texts(cache, questions) == texts(ResponseCache.open(whole.cache_path), questions)
        # An unknown verdict is not stored, so the judge is asked again.
        assert judge.judge(ITEMS[:1])[0].score in (0.0, 1.0)
    finally:
        judge.close()


def test_verdicts_are_read_from_a_real_models_words_once(judge_server, tmp_path):
    judge = judge_for(judge_server, tmp_path, extra_body={"structured_outputs": json.dumps({"regex": VERDICT})})
    try:
        verdicts = judge.judge(ITEMS)
        assert all(v.score in (0.0, 1.0) and v.asked and len(v.explanation) >= 15 for v in verdicts)
        assert [(v.score, v.cached) for v in judge.judge(ITEMS)] == [(v.score, True) for v in verdicts]
    finally:
        judge.close()


def test_a_judge_that_gives_no_verdict_is_unknown_and_never_wrong(judge_server, tmp_path):
    # Eight tokens are too few for an explanation and a verdict.
    judge = judge_for(judge_server, tmp_path, max_tokens=8, bad_verdict_retries=1)
    try:
        verdicts = judge.judge(ITEMS)
    finally:
        judge.close()
    assert [v.score for v in verdicts] == [None] * 3
    assert all("unreadable verdict" in v.cause and "(2 attempts)" in v.cause and v.explanation for v in verdicts)
    rows = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert sorted(row["response"] for row in rows) == sorted(response for _, _, response in ITEMS)
