import base64
import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from openril import endpoints
from openril.errors import CacheError, DataError, EndpointError, ModelError, RecipeError
from openril.recipe.schema import Recipe
from openril.records import STUDENT, ImageSource, Question, Response
from openril.responses import collection
from openril.responses.cache import ResponseCache
from openril.responses.chat_requests import chat_messages
from openril.responses.collection import Collected, collect, runs
from openril.responses.manifest import source_entry
from openril.storage import weights_fingerprint
from support.misbehaving_server import Drop, EmptyChoices, Garbage, MisbehavingServer, Refuse, Say, Status

QUESTIONS = [Question(id=f"q{i}", question=f"What is {i}?") for i in range(6)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(collection, "POLL", 0.05)


@pytest.fixture
def recipe(tmp_path):
    return Recipe.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "student": {"model": "some/student"},
            "sft": {"enabled": False},
            "teachers": [{"name": "big", "model": "fake", "base_urls": ["http://127.0.0.1:9/v1"], "max_retries": 1}],
            "collect": {"num_responses": 3, "questions_per_batch": 4, "max_completion_length": 64},
        }
    )


@pytest.fixture
def cache(recipe):
    return ResponseCache.create(recipe.cache_path)


def serve(recipe, *servers, **settings):
    recipe.teachers[0].base_urls = [s.url for s in servers]
    for name, value in settings.items():
        setattr(recipe.teachers[0], name, value)


def test_every_question_gets_its_responses(recipe, cache):
    with MisbehavingServer(then=Say(lambda r: f"{r.text} -> {r.body['seed']}")) as server:
        serve(recipe, server)
        result = collect(recipe, QUESTIONS, "big", cache)
    assert (result.total, result.new, result.failed) == (18, 18, 0)
    loaded = cache.load(QUESTIONS, ["big"], 3)
    for question in QUESTIONS:
        texts = [r.text for r in loaded[question.id]]
        assert all(t.startswith(question.question) for t in texts)
        assert len(set(texts)) == 3  # each has a different seed


def test_request_holds_the_sampling_settings(recipe, cache):
    with MisbehavingServer() as server:
        serve(recipe, server, system_prompt="Be brief.")
        collect(recipe, QUESTIONS[:1], "big", cache)
    body = server.requests[0].body
    expected = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05, "max_tokens": 64}
    assert {k: body[k] for k in expected} == expected
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 0?"},
    ]


def test_fields_of_vllm_can_be_left_out(recipe, cache):
    with MisbehavingServer() as server:
        serve(recipe, server, send_vllm_fields=False, extra_body={"max_completion_tokens": 64})
        collect(recipe, QUESTIONS[:1], "big", cache)
    assert not {"top_k", "repetition_penalty", "max_tokens"} & set(server.requests[0].body)
    assert server.requests[0].body["max_completion_tokens"] == 64
    assert cache.manifest()["sources"]["big"]["sampling"]["top_k"] is None


def test_seeds_do_not_depend_on_what_else_is_collected(recipe, tmp_path):
    seeds = []
    for name, questions in (("a", QUESTIONS), ("b", QUESTIONS[2:3])):
        with MisbehavingServer() as server:
            serve(recipe, server)
            collect(recipe, questions, "big", ResponseCache.create(tmp_path / name))
            seeds.append(sorted(r.body["seed"] for r in server.requests if "What is 2?" in r.text))
    assert seeds[0] == seeds[1]


def test_a_complete_cache_asks_nothing(recipe, cache):
    with MisbehavingServer() as server:
        serve(recipe, server)
        collect(recipe, QUESTIONS, "big", cache)
        before = server.count
        result = collect(recipe, QUESTIONS, "big", ResponseCache.open(cache.folder))
        assert (server.count, result.new, result.already) == (before, 0, 18)


def test_more_responses_keep_the_old_ones_and_fewer_use_the_first(recipe, cache):
    with MisbehavingServer() as server:
        serve(recipe, server)
        collect(recipe, QUESTIONS, "big", cache)
        recipe.collect.num_responses = 5
        assert collect(recipe, QUESTIONS, "big", cache).new == 12
        before = server.count
        recipe.collect.num_responses = 1  # and fewer of them ask nothing: the first are used
        result = collect(recipe, QUESTIONS, "big", cache)
        assert (server.count, result.new) == (before, 0)
    assert [[r.index for r in cache.load(QUESTIONS, ["big"], 1)[q.id]] for q in QUESTIONS] == [[0]] * len(QUESTIONS)


def test_finish_reasons_empty_answers_and_refusals_are_kept(recipe, cache):
    recipe.collect.num_responses = 1
    acts = {"0": Say("cut", finish_reason="length"), "1": Say(""), "2": Refuse("no"), "3": Say("fine")}
    with MisbehavingServer(then=lambda r: acts[r.text[8]]) as server:
        serve(recipe, server)
        result = collect(recipe, QUESTIONS[:4], "big", cache)
    assert (result.new, result.cut, result.empty, result.refused, result.failed) == (4, 1, 1, 1, 0)
    loaded = cache.load(QUESTIONS[:4], ["big"])
    assert [(r.text, r.finish_reason) for q in QUESTIONS[:4] for r in loaded[q.id]] == [
        ("cut", "length"),
        ("", "stop"),
        ("no", "refusal"),
        ("fine", "stop"),
    ]


def test_passing_failures_cost_no_response(recipe, cache):
    with MisbehavingServer(Status(500), Garbage(), Drop(), Status(429, headers={"Retry-After": "0.05"})) as server:
        serve(recipe, server, max_retries=4)
        assert collect(recipe, QUESTIONS, "big", cache).failed == 0
        assert server.count == 18 + 4


def test_lasting_failures_stay_missing_and_are_asked_again(recipe, cache):
    broken = {"on": True}
    with MisbehavingServer(
        then=lambda r: Status(500, "poison") if broken["on"] and "What is 3?" in r.text else Say()
    ) as server:
        serve(recipe, server)
        result = collect(recipe, QUESTIONS, "big", cache)
        assert (result.new, result.failed) == (15, 3)
        assert "3 x teacher big: " in result.failure_report() and "(questions q3, ...)" in result.failure_report()
        assert {q.id for q, _ in cache.missing(QUESTIONS, "big", 3)} == {"q3"}
        broken["on"] = False
        assert collect(recipe, QUESTIONS, "big", cache).new == 3
    assert cache.missing(QUESTIONS, "big", 3) == []


def test_a_wrong_key_stops_at_once(recipe, cache):
    with MisbehavingServer(then=Status(401, "bad key")) as server:
        serve(recipe, server, concurrency=2)
        with pytest.raises(EndpointError, match=r"401: .*bad key.*api_key_env"):
            collect(recipe, QUESTIONS, "big", cache)
        assert server.count <= 4


def test_an_api_without_vllm_fields_gets_the_cure(recipe, cache):
    with MisbehavingServer(then=Status(400, "Unrecognized request argument supplied: top_k")) as server:
        serve(recipe, server)
        with pytest.raises(EndpointError, match="set send_vllm_fields: false for teacher big"):
            collect(recipe, QUESTIONS, "big", cache)


def test_an_api_with_another_length_field_gets_the_cure(recipe, cache):
    with MisbehavingServer(then=Status(400, "Use 'max_completion_tokens' instead.")) as server:
        serve(recipe, server)
        with pytest.raises(EndpointError, match="length_field: max_completion_tokens for teacher big"):
            collect(recipe, QUESTIONS, "big", cache)


def test_a_field_that_is_left_out_is_recorded(recipe, cache):
    act = Status(400, "Unrecognized request argument supplied: seed")
    with MisbehavingServer(then=lambda r: act if "seed" in r.body else Say()) as server:
        serve(recipe, server)
        with pytest.raises(EndpointError, match=r"omit: \[seed\] for teacher big"):
            collect(recipe, QUESTIONS, "big", cache)
        serve(recipe, server, omit=["seed"])
        assert source_entry(recipe, recipe.teachers[0])["sampling"]["seed"] is None
        cache.discard("big")
        fresh = ResponseCache.create(recipe.run_path / "fresh")
        assert collect(recipe, QUESTIONS, "big", fresh).new == 18


FILTER = Status(400, "The response was filtered due to the prompt triggering the content management policy.")


@pytest.mark.parametrize("act", [FILTER, Say("", finish_reason="content_filter"), EmptyChoices()])
def test_a_filtered_question_is_kept_as_a_refusal(recipe, cache, act):
    with MisbehavingServer(then=lambda r: act if "What is 3?" in r.text else Say()) as server:
        serve(recipe, server)
        result = collect(recipe, QUESTIONS, "big", cache)
    assert (result.new, result.refused, result.failed) == (18, 3, 0)
    assert "questions q3" in result.failure_report()
    kept = cache.load(QUESTIONS, ["big"], 3).responses_for("q3", "big")
    assert [(r.text, r.finish_reason) for r in kept] == [("", "content_filter")] * 3


def test_too_many_refusals_stay_missing_and_the_setting_is_named(recipe, cache):
    recipe.collect.max_refused_share = 0.2
    with MisbehavingServer(then=lambda r: FILTER if r.text[8] in "34" else Say()) as server:
        serve(recipe, server)
        result = collect(recipe, QUESTIONS, "big", cache)
        assert (result.new, result.failed) == (12, 6)
        assert "collect.max_refused_share" in result.advice and "6 of 18" in result.advice
        recipe.collect.max_refused_share = 0.4
        result = collect(recipe, QUESTIONS, "big", cache)
        assert (result.new, result.failed) == (6, 0)


def test_mostly_empty_responses_are_reported_with_their_cause(recipe, cache):
    message = {"role": "assistant", "content": None, "reasoning_content": "long thoughts"}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "fake"}
    body["choices"] = [{"index": 0, "finish_reason": "length", "message": message}]
    with MisbehavingServer(then=Garbage(json.dumps(body).encode())) as server:
        serve(recipe, server)
        result = collect(recipe, QUESTIONS, "big", cache)
    assert (result.empty, result.thoughts_only) == (18, 18)
    assert "18 of 18" in result.empty_report() and "collect.max_completion_length" in result.empty_report()


def test_a_dead_server_stops_the_collection_early(recipe, cache):
    recipe.teachers[0].concurrency = 2
    recipe.teachers[0].max_retries = 0
    questions = [Question(id=f"n{i}", question="?") for i in range(200)]
    with pytest.raises(EndpointError, match=r"cannot reach .* Stopped after 20 failures in a row"):
        collect(recipe, questions, "big", cache)


def test_what_came_before_a_stop_is_kept(recipe, cache):
    with MisbehavingServer(*[Say()] * 7, then=Status(401)) as server:
        serve(recipe, server, concurrency=1)
        with pytest.raises(EndpointError):
            collect(recipe, QUESTIONS, "big", cache)
    assert len(ResponseCache.open(cache.folder).missing(QUESTIONS, "big", 3)) == 18 - 7


def test_concurrency_bounds_requests_and_prepared_questions(recipe, cache, monkeypatch):
    prepared, answered = [], []
    real = collection.chat_messages
    monkeypatch.setattr(collection, "chat_messages", lambda q, **k: prepared.append(q.id) or real(q, **k))
    ahead = []

    def act(request):
        ahead.append(len(prepared) - len(answered) / 3)
        answered.append(1)
        return Say(delay=0.02)

    questions = [Question(id=f"n{i}", question="?") for i in range(60)]
    with MisbehavingServer(then=act) as server:
        serve(recipe, server, concurrency=4)
        collect(recipe, questions, "big", cache)
        assert server.max_in_flight == 4
    # 2 x 4 requests outstanding and one question more: 8 / 3 + 1 questions
    assert max(ahead) <= 5


def test_two_servers_share_a_teacher(recipe, cache):
    with MisbehavingServer(then=Say(delay=0.02)) as a, MisbehavingServer(then=Say(delay=0.02)) as b:
        serve(recipe, a, b, concurrency=4)
        collect(recipe, QUESTIONS, "big", cache)
        assert min(a.count, b.count) >= 6


def test_stale_question_is_refused_before_any_request(recipe, cache):
    with MisbehavingServer() as server:
        serve(recipe, server)
        collect(recipe, QUESTIONS, "big", cache)
        before = server.count
        with pytest.raises(CacheError, match="'q0'"):
            collect(recipe, [replace(QUESTIONS[0], question="new")], "big", ResponseCache.open(cache.folder))
        assert server.count == before


def test_other_sampling_settings_are_refused(recipe, cache):
    with MisbehavingServer() as server:
        serve(recipe, server)
        collect(recipe, QUESTIONS[:1], "big", cache)
        recipe.collect.sampling.temperature = 0.7
        with pytest.raises(CacheError, match=r"big.sampling.temperature \(was 1.0, now 0.7\)"):
            collect(recipe, QUESTIONS, "big", cache)


def test_broken_image_fails_its_question_alone(recipe, cache, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    bad = Question(id="bad", question="?", images=(ImageSource(path=tmp_path / "bad.png"),), origin="train.jsonl:9")
    with MisbehavingServer() as server:
        serve(recipe, server)
        result = collect(recipe, [*QUESTIONS, bad], "big", cache)
    assert (result.new, result.failed) == (18, 3)
    assert "train.jsonl:9" in result.failure_report()


def test_unknown_source_lists_the_known(recipe, cache):
    with pytest.raises(RecipeError, match=r"big, student.*'small'"):
        collect(recipe, QUESTIONS, "small", cache)


def test_a_missing_sft_student_names_the_command_to_run(recipe, cache):
    recipe.sft.enabled = True
    with pytest.raises(ModelError, match=r"sft.enabled.*`ril sft`"):
        collect(recipe, QUESTIONS, STUDENT, cache)


# Local models


class FakeSampler:
    """Answers like a local engine and remembers its calls; ``fail_at`` makes that call the last."""

    def __init__(self, fail_at=None):
        self.calls = []
        self.fail_at = fail_at

    def sample(self, questions, num_generations, *, settings, max_completion_length, seed, first_index=0, source):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(([q.id for q in questions], first_index, num_generations))
        return [
            [
                Response(q.id, source, i, f"{seed} {q.id} {i}", token_ids=(i, 7), logprobs=(-1.0, -2.0))
                for i in range(first_index, first_index + num_generations)
            ]
            for q in questions
        ]


def test_local_source_is_sampled_in_batches(recipe, cache):
    sampler = FakeSampler()
    assert collect(recipe, QUESTIONS, STUDENT, cache, make_sampler=lambda *_: sampler).new == 18
    assert [len(ids) for ids, *_ in sampler.calls] == [4, 2]
    loaded = cache.load(QUESTIONS, [STUDENT], 3, with_token_ids=True)
    assert [r.token_ids for r in loaded["q0"]] == [(0, 7), (1, 7), (2, 7)]


def test_interrupted_local_collection_continues_with_equal_texts(recipe, cache, tmp_path):
    def texts(cache):
        return {id: [r.text for r in rs] for id, rs in cache.load(QUESTIONS, [STUDENT], 3).items()}

    with pytest.raises(KeyboardInterrupt):
        collect(recipe, QUESTIONS, STUDENT, cache, make_sampler=lambda *_: FakeSampler(fail_at=1))
    second = FakeSampler()
    collect(recipe, QUESTIONS, STUDENT, ResponseCache.open(cache.folder), make_sampler=lambda *_: second)
    assert [len(ids) for ids, *_ in second.calls] == [2]
    whole = ResponseCache.create(tmp_path / "whole")
    collect(recipe, QUESTIONS, STUDENT, whole, make_sampler=lambda *_: FakeSampler())
    assert texts(cache) == texts(whole)


def test_no_engine_is_built_for_a_complete_cache(recipe, cache):
    collect(recipe, QUESTIONS, STUDENT, cache, make_sampler=lambda *_: FakeSampler())
    collect(recipe, QUESTIONS, STUDENT, cache, make_sampler=lambda *_: pytest.fail("built an engine for nothing"))


def test_gaps_are_filled_and_nothing_else(recipe, cache):
    cache.register(STUDENT, **source_entry(recipe, None))
    with cache.writer(STUDENT) as writer:
        writer.append(QUESTIONS[0], Response("q0", STUDENT, 1, "kept"))
    sampler = FakeSampler()
    collect(recipe, QUESTIONS[:1], STUDENT, cache, make_sampler=lambda *_: sampler)
    assert sampler.calls == [(["q0"], 0, 1), (["q0"], 2, 1)]
    assert cache.load(QUESTIONS[:1], [STUDENT], 3)["q0"][1].text == "kept"


def test_runs_of_indices():
    assert list(runs([0, 1, 3])) == [(0, 2), (3, 1)]
    assert list(runs([2])) == [(2, 1)]
    assert list(runs([])) == []


def test_fingerprint_follows_the_weights(tmp_path):
    assert weights_fingerprint(tmp_path / "hub-name") is None
    (tmp_path / "config.json").write_text("{}")
    assert weights_fingerprint(tmp_path) is None
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 100)
    first = weights_fingerprint(tmp_path)
    assert first.startswith("weights:")
    weights.write_bytes(b"a" * 99 + b"b")
    assert weights_fingerprint(tmp_path) != first


def test_fingerprint_of_a_large_file_sees_its_middle(tmp_path, monkeypatch):
    from openril import storage

    monkeypatch.setattr(storage, "_CHUNK", 8)
    monkeypatch.setattr(storage, "_CHUNKS", 4)
    seen = set()
    for place in (None, 0, 1000, 2000, 2999):  # pieces start at 0, 997, 1994, 2992
        data = bytearray(3000)
        if place is not None:
            data[place] = 1
        (tmp_path / "m.safetensors").write_bytes(data)
        seen.add(weights_fingerprint(tmp_path))
    assert len(seen) == 5


# Messages


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, format="PNG")
    return ImageSource(data=buffer.getvalue())


def shape(messages):
    return [p["text"] if p["type"] == "text" else "IMG" for p in messages[-1]["content"]]


def test_images_stand_where_the_markers_are():
    question = Question(id="q", question="Compare <image> with <image>.", images=(png("red"), png("blue")))
    messages = chat_messages(question, max_pixels=1000)
    assert shape(messages) == ["Compare ", "IMG", " with ", "IMG", "."]
    urls = [p["image_url"]["url"] for p in messages[0]["content"] if p["type"] == "image_url"]
    colors = [Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))).getpixel((0, 0)) for u in urls]
    assert colors == [(255, 0, 0), (0, 0, 255)]


def test_without_markers_images_come_first():
    question = Question(id="q", question="What?", images=(png("red"),))
    assert shape(chat_messages(question, max_pixels=1000)) == ["IMG", "What?"]


def test_markers_without_images_vanish():
    messages = chat_messages(Question(id="q", question="<image>\nWhat?"), max_pixels=1000)
    assert messages[0]["content"] == "What?"


def test_choices_are_lettered():
    question = Question(id="q", question="Which?", choices=("red", "blue"))
    assert chat_messages(question, max_pixels=10)[0]["content"] == "Which?\nA. red\nB. blue"


def test_an_image_that_cannot_be_used_names_its_question():
    question = Question(id="q7", question="?", images=(ImageSource(data=b"junk"),), origin="a.jsonl:3")
    with pytest.raises(DataError, match=r"question 'q7' \(a.jsonl:3\)"):
        chat_messages(question, max_pixels=1000)


def test_failures_are_grouped_by_cause():
    result = Collected("big")
    for i in range(7):
        result.fail(f"q{i}", "time-out")
    result.fail("q9", "refused", 3)
    assert result.failed == 10
    assert result.failure_report().splitlines() == [
        "  7 x time-out (questions q0, q1, q2, q3, q4, ...)",
        "  3 x refused (questions q9, ...)",
    ]


def test_sft_on_cached_text_collects_from_the_student_as_it_is(tmp_path):
    """The SFT student cannot answer before it has been made from those very answers."""
    from openril.recipe.schema import Recipe

    recipe = Recipe.model_validate({"run_dir": str(tmp_path), "student": {"model": "a/student"}})
    recipe.sft.targets = "teacher_responses"
    assert source_entry(recipe, None)["model"] == "a/student"
    recipe.sft.targets = "answers"
    with pytest.raises(ModelError, match="ril sft"):
        source_entry(recipe, None)
