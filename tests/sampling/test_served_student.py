"""Sampling from servers of the student, with a scripted server: the order of requests, failures, and who may sync."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path

import pytest

from openril import endpoints
from openril.errors import DataError, EndpointError
from openril.evaluation.evaluate import Journal, evaluate
from openril.models.loading import load_student
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import EvaluationConfig, Recipe, SamplerConfig, SamplingConfig, StudentConfig
from openril.records import STUDENT, ImageSource, Question
from openril.responses.cache import ResponseCache
from openril.responses.collection import collect
from openril.sampling.synced import WeightsFolder
from openril.sampling.vllm_engine import VLLMSampler
from openril.sampling.weight_sync import StaleWeightsError
from openril.storage import read_jsonl
from support.misbehaving_server import Garbage, MisbehavingServer, Request, Status

QUESTIONS = [Question(f"q{i}", f"What is {i}?", "red") for i in range(12)]


@pytest.fixture(scope="module")
def encoder(tiny_qwen):
    model, processor = load_student(StudentConfig(), str(tiny_qwen))
    return PromptEncoder(processor, model)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_BACKOFF", 0.01)


class Student:
    """Answers "red" as a vLLM server of the student does. ``before`` is called with each request."""

    def __init__(self, encoder: PromptEncoder, before=lambda request: None) -> None:
        self.prompts = {q.question: encoder(q).input_ids.tolist() for q in QUESTIONS}
        self.ids = encoder.tokenizer("red")["input_ids"] + encoder.eos_token_ids[:1]
        self.before = before

    def __call__(self, request: Request):
        act = self.before(request)
        if act is not None:
            return act
        prompt = next(ids for text, ids in self.prompts.items() if text in request.text)
        message = {"role": "assistant", "content": "red"}
        choices = [
            {"index": i, "message": message, "finish_reason": "stop", "token_ids": self.ids}
            for i in range(request.body["n"])
        ]
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "student", "choices": choices}
        return Garbage(json.dumps(whole | {"prompt_token_ids": prompt}).encode())


def sampler_for(server: MisbehavingServer, encoder: PromptEncoder, **settings) -> VLLMSampler:
    return VLLMSampler(SamplerConfig(engine="vllm", base_urls=[server.url], **settings), encoder)


def recipe_for(folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "run_dir": str(folder),
            "student": {"model": "m"},
            "sft": {"enabled": False},
            "collect": {"num_responses": 3, "max_completion_length": 5},
        }
    )


def test_a_slow_answer_holds_up_no_other_one(encoder):
    """With batches, the first question would keep the seventh waiting; here it is the last to be answered."""
    others = threading.Event()

    def before(request: Request) -> None:
        if "What is 0?" in request.text:
            others.wait(30)

    with MisbehavingServer(then=Student(encoder, before), model="student") as server:
        sampler = sampler_for(server, encoder, concurrency=3)
        waiting, order = iter([(q, 0, 2) for q in QUESTIONS]), []
        sampling = {"settings": SamplingConfig(), "max_completion_length": 5, "seed": 0}
        with (
            closing(sampler),
            closing(sampler.stream(lambda: next(waiting, None), **sampling, logprobs=False)) as arrived,
        ):
            for answers in arrived:
                order += [question.id for (question, _, _), responses in answers if len(responses) == 2]
                if len(order) == len(QUESTIONS) - 1:
                    others.set()
        assert order[-1] == "q0" and sorted(order) == sorted(q.id for q in QUESTIONS)
        assert server.max_in_flight <= 3
        assert not {"logprobs", "top_logprobs"} & set(server.requests[0].body)


def test_a_collection_goes_on_after_a_failure_and_asks_only_for_what_is_missing(encoder, tmp_path):
    recipe, cache = recipe_for(tmp_path), ResponseCache.create(tmp_path / "cache")
    broken = Student(encoder, lambda request: Status(500, "boom") if "What is 3?" in request.text else None)
    with MisbehavingServer(then=broken, model="student") as server:
        sampler = sampler_for(server, encoder)
        done = collect(recipe, QUESTIONS, STUDENT, cache, make_sampler=lambda *_: sampler)
        assert (done.new, done.failed) == (33, 3) and "boom" in done.failure_report()
        assert len({r.body["seed"] for r in server.requests}) == len(QUESTIONS)
        server.then = Student(encoder)
        before = server.count
        assert collect(recipe, QUESTIONS, STUDENT, cache, make_sampler=lambda *_: sampler).new == 3
        assert [r.text for r in server.requests[before:]] == ["What is 3?"]
        sampler.close()
    kept = cache.load(QUESTIONS, [STUDENT], 3, with_token_ids=True)
    assert {r.token_ids for responses in kept.values() for r in responses} == {tuple(Student(encoder).ids)}


def test_a_collection_ends_if_the_server_reads_prompts_differently(encoder, tmp_path):
    other = Student(encoder)
    other.prompts = {text: [*ids, 5] for text, ids in other.prompts.items()}
    with MisbehavingServer(then=other, model="student") as server, closing(sampler_for(server, encoder)) as sampler:
        cache = ResponseCache.create(tmp_path / "cache")
        with pytest.raises(EndpointError, match="prompt tokens"):
            collect(recipe_for(tmp_path), QUESTIONS, STUDENT, cache, make_sampler=lambda *_: sampler)


def test_a_collection_ends_if_a_server_holds_other_weights(encoder, tmp_path, monkeypatch):
    """The version is read after each completion, from the server that sent it."""
    asked = []

    def check(url: str) -> None:
        asked.append(url)
        if len(server.requests) > 4:
            raise StaleWeightsError("other weights")

    with MisbehavingServer(then=Student(encoder), model="student") as server:
        sampler = sampler_for(server, encoder, concurrency=1)
        with closing(sampler), pytest.raises(StaleWeightsError):
            monkeypatch.setattr(sampler.weights, "check", check)
            cache = ResponseCache.create(tmp_path / "cache")
            collect(recipe_for(tmp_path), QUESTIONS, STUDENT, cache, make_sampler=lambda *_: sampler)
        assert set(asked) == {server.url} and len(asked) >= 2


def test_a_question_that_cannot_be_shown_costs_only_its_responses(encoder, tmp_path):
    lost = Question("lost", "Which?", images=(ImageSource(path=tmp_path / "missing.png"),))
    recipe, cache = recipe_for(tmp_path), ResponseCache.create(tmp_path / "cache")
    cache.content_hash = lambda question: "x"
    with MisbehavingServer(then=Student(encoder), model="student") as server:
        sampler = sampler_for(server, encoder)
        with closing(sampler):
            done = collect(recipe, [*QUESTIONS, lost], STUDENT, cache, make_sampler=lambda *_: sampler)
            assert (done.new, done.failed) == (36, 3) and "missing.png" in done.failure_report()
            with pytest.raises(DataError, match=r"missing\.png"):
                sampler.sample([lost], 1, settings=SamplingConfig(), max_completion_length=5, seed=0)


def test_an_evaluation_keeps_what_arrived_before_an_interrupt(encoder, tmp_path):
    stopped = threading.Event()

    def before(request: Request) -> Status | None:
        return Status(400, "enough") if "What is 7?" in request.text and not stopped.is_set() else None

    settings = EvaluationConfig(max_completion_length=5)
    with (
        MisbehavingServer(then=Student(encoder, before), model="student") as server,
        closing(sampler_for(server, encoder, concurrency=1)) as sampler,
    ):

        def run():
            return evaluate(lambda: sampler, QUESTIONS, settings, journal=Journal(tmp_path / "x.jsonl", "key"))

        with pytest.raises(EndpointError, match="enough"):
            run()
        kept = {row["question_id"] for row in read_jsonl(tmp_path / "x.jsonl")[1:]}
        assert kept and "q7" not in kept
        stopped.set()
        first = server.count
        assert run().summary.score == 1.0
        asked = {r.text for r in server.requests[first:]}
        assert asked == {q.question for q in QUESTIONS if q.id not in kept}
    assert server.requests[0].body["temperature"] == 0.0 and server.requests[0].body["n"] == 1


def test_one_process_at_a_time_gives_weights_to_the_servers(tmp_path):
    settings = SamplerConfig(engine="vllm", weights_dir=str(tmp_path / "shared"))
    first, second = WeightsFolder(settings, tmp_path), WeightsFolder(settings, tmp_path / "other")
    first.hold()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    assert first.put(tmp_path / "checkpoint") == tmp_path / "shared/student"
    assert (tmp_path / "shared/student/model.safetensors").read_bytes() == b"weights"
    with pytest.raises(EndpointError, match=r"weights_dir: .*shared is in use by process \d+ on "):
        second.hold()
    first.close()
    assert not (tmp_path / "shared/student").exists()
    second.hold()
    second.close()


def test_without_a_weights_dir_each_run_has_its_folder(tmp_path):
    folder = WeightsFolder(SamplerConfig(), tmp_path)
    assert folder.student == tmp_path / "rollout_weights" / "student"
    assert folder.put(tmp_path / "checkpoint") == tmp_path / "checkpoint"  # servers read it where it is
