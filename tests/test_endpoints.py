import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from openril import endpoints
from openril.endpoints import (
    ChatClient,
    Completion,
    RequestRefusedError,
    proxy_note,
    read_completion,
    retry_after,
    split_base_url,
)
from openril.errors import EndpointError
from openril.recipe.schema import EndpointConfig
from support.misbehaving_server import Drop, EmptyChoices, Garbage, Hang, MisbehavingServer, Refuse, Say, Status

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_BACKOFF", 0.01)


@pytest.fixture
def client():
    """Builds clients of servers and closes them."""
    made = []

    def build(*servers, **settings):
        urls = [s if isinstance(s, str) else s.url for s in servers]
        made.append(
            ChatClient(EndpointConfig(**{"base_urls": urls, "model": "fake", "max_retries": 2, **settings}), "judge")
        )
        return made[-1]

    yield build
    for c in made:
        c.close()


def chat(client, **settings):
    return client.loop_thread.run(client.chat(HELLO, **settings))


def chat_many(client, count):
    async def all_of_them():
        return await asyncio.gather(*(client.chat(HELLO) for _ in range(count)), return_exceptions=True)

    return client.loop_thread.run(all_of_them())


def test_a_completion_and_what_was_asked(client):
    with MisbehavingServer(then=Say("hi", finish_reason="length")) as server:
        got = chat(client(server, extra_body={"a": 1}), max_tokens=7, seed=5, extra_body={"top_k": 50})
    assert got == Completion("hi", "length", "fake")
    body = server.requests[0].body
    assert body["messages"] == HELLO
    assert (body["max_tokens"], body["seed"], body["top_k"], body["a"]) == (7, 5, 50, 1)


def test_without_key_no_authorization_is_sent(client):
    with MisbehavingServer() as server:
        chat(client(server))
    assert "authorization" not in server.requests[0].headers


def test_key_comes_from_its_variable(client, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret\n")
    with MisbehavingServer() as server:
        chat(client(server, api_key_env="SOME_KEY"))
    assert server.requests[0].headers["authorization"] == "Bearer secret"


def test_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(EndpointError, match=r"judge: api_key_env: SOME_KEY"):
        ChatClient(EndpointConfig(base_urls=["http://127.0.0.1:1/v1"], model="m", api_key_env="SOME_KEY"), "judge")


@pytest.mark.parametrize("settings", [{"base_urls": []}, {"model": ""}, {"base_urls": ["127.0.0.1:8000/v1"]}])
def test_unusable_endpoint_is_refused_at_once(settings):
    with pytest.raises(EndpointError, match=r"judge: .*(base_urls.*model|http://)"):
        ChatClient(EndpointConfig(**{"base_urls": ["http://h/v1"], "model": "m", **settings}), "judge")


@pytest.mark.parametrize(
    "failure",
    [Status(500), Status(503), Status(429), Status(408), Garbage(), Garbage(content_type="text/html"),
     Garbage(b"[1, 2]"), Garbage(b'"text"'), EmptyChoices(), Drop()],
    ids=lambda f: repr(f)[:40],
)  # fmt: skip
def test_passing_failures_are_retried(client, failure):
    with MisbehavingServer(failure, failure, then=Say("third")) as server:
        assert chat(client(server)).text == "third"
        assert server.count == 3


def test_retries_end(client):
    with MisbehavingServer(then=Status(500, "broken inside")) as server:
        with pytest.raises(EndpointError, match=r"answered 500: .*broken inside.*\(3 attempts\)"):
            chat(client(server))
        assert server.count == 3


def test_garbage_to_the_end_names_what_came(client):
    with MisbehavingServer(then=Garbage()) as server, pytest.raises(EndpointError, match=r"unusable|no chat compl"):
        chat(client(server))


def test_backoff_grows(client, monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_BACKOFF", 0.2)
    with MisbehavingServer(then=Status(500)) as server:
        with pytest.raises(EndpointError):
            chat(client(server))
        first, second = (b.arrived - a.arrived for a, b in zip(server.requests, server.requests[1:], strict=False))
    # 0.2 s and 0.4 s, each shortened by up to a quarter at random
    assert 0.15 <= first < 0.3 <= second


def test_retry_after_is_obeyed(client):
    with MisbehavingServer(Status(429, headers={"Retry-After": "0.4"})) as server:
        chat(client(server))
        assert server.requests[1].arrived - server.requests[0].arrived >= 0.4


def test_retry_after_holds_back_other_requests_too(client):
    with MisbehavingServer(Status(429, headers={"Retry-After": "0.5"})) as server:
        c = client(server)
        first = c.loop_thread.submit(c.chat(HELLO))
        while server.count == 0:
            time.sleep(0.005)
        time.sleep(0.1)
        chat(c)
        first.result()
        assert min(r.arrived for r in server.requests[1:]) - server.requests[0].arrived >= 0.5


def test_retry_after_in_its_three_forms():
    assert retry_after({"retry-after": "3"}) == 3.0
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0  # long past
    assert retry_after({"retry-after": "99999"}) == endpoints.LONGEST_RETRY_AFTER
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("status", "fix"), [(400, ""), (401, "(?i:set api_key_env)"), (403, "may use this model"), (422, "")]
)
def test_refused_requests_are_not_repeated(client, status, fix):
    with MisbehavingServer(then=Status(status, "no, because")) as server:
        with pytest.raises(RequestRefusedError, match=f"{status}: .*no, because.*{fix}") as caught:
            chat(client(server))
        assert server.count == 1
    assert caught.value.status == status


def test_wrong_model_is_named(client):
    with MisbehavingServer() as server, pytest.raises(RequestRefusedError, match=r"404: .*'other'"):
        chat(client(server, model="other"))


def test_timeout(client):
    with MisbehavingServer(Hang(), then=Say("late")) as server:
        start = time.monotonic()
        assert chat(client(server, timeout=2)).text == "late"
        assert time.monotonic() - start < 20


def test_timeout_to_the_end(client):
    with MisbehavingServer(then=Hang()) as server, pytest.raises(EndpointError, match=r"no answer .* within 0.2 s"):
        chat(client(server, timeout=0.2))


def test_connection_refused(client):
    with pytest.raises(EndpointError, match=r"cannot reach http://127.0.0.1:9/v1.*(?i:is the server running)"):
        chat(client("http://127.0.0.1:9/v1"))


def test_refusal_is_an_answer(client):
    with MisbehavingServer(then=Refuse("I will not")) as server:
        assert chat(client(server)) == Completion("I will not", "refusal", "fake")


def test_no_content_is_an_empty_answer(client):
    with MisbehavingServer(then=Refuse("", finish_reason="length")) as server:
        assert chat(client(server)) == Completion("", "length", "fake")


def test_servers_share_the_load(client):
    with MisbehavingServer(then=Say(delay=0.05)) as a, MisbehavingServer(then=Say(delay=0.05)) as b:
        answers = chat_many(client(a, b, concurrency=8), 40)
    assert all(isinstance(x, Completion) for x in answers)
    assert a.count + b.count == 40
    assert min(a.count, b.count) >= 14


def test_a_dead_server_costs_no_answer(client):
    with MisbehavingServer(then=Say(delay=0.02)) as alive:
        answers = chat_many(client("http://127.0.0.1:9/v1", alive, concurrency=4), 20)
    assert all(isinstance(x, Completion) for x in answers)
    assert alive.count == 20


def test_a_retry_goes_to_the_other_server(client):
    with MisbehavingServer(then=Status(500)) as bad, MisbehavingServer() as good:
        assert chat(client(bad, good)).text == "ok"
        assert (bad.count, good.count) == (1, 1)


def test_concurrency_is_bounded(client):
    with MisbehavingServer(then=Say(delay=0.05)) as server:
        chat_many(client(server, concurrency=3), 15)
        assert server.max_in_flight == 3


def test_more_than_a_hundred_requests_at_once(client):
    # httpx alone would hold at 100 connections, and time out waiting for one.
    # Long enough for a busy machine to have sent all of them before the first is answered.
    with MisbehavingServer(then=Say(delay=2.0)) as server:
        answers = chat_many(client(server, concurrency=120), 120)
        assert all(isinstance(x, Completion) for x in answers)
        assert server.max_in_flight > 100


def test_interrupt_cancels_what_runs(client):
    with MisbehavingServer(then=Hang()) as server:
        c = client(server)
        cleaned = threading.Event()

        async def work():
            try:
                await c.chat(HELLO)
            finally:
                await asyncio.sleep(0.05)
                cleaned.set()

        real = c.loop_thread.submit

        def interrupted(coroutine):
            future = real(coroutine)
            while server.count == 0:
                time.sleep(0.005)

            class Interrupted:
                cancel = staticmethod(future.cancel)

                def result(self):
                    raise KeyboardInterrupt

            return Interrupted()

        c.loop_thread.submit = interrupted
        with pytest.raises(KeyboardInterrupt):
            c.loop_thread.run(work())
        assert cleaned.is_set()  # the coroutine had ended before the interrupt was passed on
        c.loop_thread.submit = real


def probe(client, **settings):
    return client.loop_thread.run(client.probe(HELLO, **settings))


def test_probe_tells_a_missing_model_and_a_dead_server(client):
    with MisbehavingServer() as server:
        (url, first), (dead_url, second) = probe(client(server, "http://127.0.0.1:9/v1", model="other"))
    assert url == server.url and "'other'" in str(first) and "It serves fake" in str(first)
    assert dead_url == "http://127.0.0.1:9/v1" and "cannot reach" in str(second)


def test_probe_asks_every_server_with_the_settings_of_the_run(client):
    with MisbehavingServer(then=Say("a")) as one, MisbehavingServer(then=Say("b")) as two:
        answers = probe(client(one, two), max_tokens=5)
        assert [(url, answer.text) for url, answer in answers] == [(one.url, "a"), (two.url, "b")]
        assert [s.requests[0].body["max_tokens"] for s in (one, two)] == [5, 5]


def test_the_length_field_is_renamed_or_left_out(client):
    fields = []
    for settings in (
        {},
        {"length_field": "max_completion_tokens"},
        {"length_field": ""},
        {"extra_body": {"max_completion_tokens": 9}},
    ):
        with MisbehavingServer() as server:
            chat(client(server, **settings), max_tokens=7)
        fields.append({k: v for k, v in server.requests[0].body.items() if k.startswith("max_")})
    assert fields == [{"max_tokens": 7}, {"max_completion_tokens": 7}, {}, {"max_completion_tokens": 9}]


def test_omitted_fields_are_not_sent(client):
    with MisbehavingServer() as server:
        c = client(server, omit=["seed", "temperature", "top_k"], extra_body={"a": 1})
        chat(c, seed=1, temperature=0.5, top_p=0.9, extra_body={"top_k": 3, "repetition_penalty": 1.1})
    body = server.requests[0].body
    assert {k: v for k, v in body.items() if k not in ("model", "messages")} == {
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "a": 1,
    }


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
         "Set judge.length_field: max_completion_tokens"),
        ("Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
         "Set judge.omit: [temperature]"),
        ("Unrecognized request argument supplied: seed", "Set judge.omit: [seed]"),
        ("`temperature` and `top_p` cannot both be specified for this model.", "Set judge.omit: [temperature]"),
        ("[{'type': 'extra_forbidden', 'loc': ['body', 'top_k'], 'msg': 'Extra inputs are not permitted'}]",
         "Set judge.omit: [top_k]"),
        ("'max_tokens' or 'max_completion_tokens' is too large: 7. This model's maximum context length is 4.", None),
        ("The messages are invalid.", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_field_names_the_setting_to_change(client, message, fix, status):
    with MisbehavingServer(then=Status(status, message)) as server, pytest.raises(RequestRefusedError) as caught:
        chat(client(server), max_tokens=7, temperature=0.0, top_p=0.9, seed=3, extra_body={"top_k": 5})
    assert caught.value.concerns_every_request == (fix is not None)
    if fix:
        assert str(caught.value).endswith(fix)
    else:
        assert "Set " not in str(caught.value)


def test_a_content_filter_concerns_one_request(client):
    for act in (
        Status(400, "The response was filtered due to the prompt triggering the content management policy."),
        Status(403, "Your input was flagged"),
        EmptyChoices(),
    ):
        with MisbehavingServer(then=act) as server, pytest.raises(RequestRefusedError) as caught:
            chat(client(server))
        assert not caught.value.concerns_every_request


def test_an_error_with_status_200_is_named(client):
    act = Garbage(b'{"error": {"message": "Provider returned error", "code": 502}}')
    with MisbehavingServer(then=act) as server, pytest.raises(EndpointError, match="Provider returned error"):
        chat(client(server))


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "hi", "reasoning_content": "hm"}, "hi", "hm"),
        ({"content": None, "reasoning": "hm"}, "", "hm"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab", ""),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]}, "b", "hm"),
    ],
)
def test_thoughts_are_kept_apart_from_the_text(message, text, reasoning):
    answer = SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(**message))], model="m")
    completion = read_completion(answer)
    assert (completion.text, completion.reasoning) == (text, reasoning)


@pytest.mark.parametrize(
    ("base_url", "url", "query"),
    [
        ("http://h:8000/v1/", "http://h:8000/v1", {}),
        ("https://a.example/openai/deployments/d?api-version=2024-02-01", "https://a.example/openai/deployments/d",
         {"api-version": "2024-02-01"}),
        ("http://0.0.0.0:8000/v1", "http://127.0.0.1:8000/v1", {}),
        ("http://[::]:8000/v1", "http://[::1]:8000/v1", {}),
        ("http://10.0.0.0:8000/v1/chat/completions", "http://10.0.0.0:8000/v1", {}),
    ],
)  # fmt: skip
def test_base_urls(base_url, url, query):
    assert split_base_url(base_url) == (url, query)


def test_the_query_of_a_base_url_is_kept_but_not_printed(client, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with MisbehavingServer(then=Status(400, "no")) as server:
        with pytest.raises(RequestRefusedError) as caught:
            chat(client(f"{server.url}?api-version=1&x=hidden", api_key_env="SOME_KEY"))
        assert "hidden" not in str(caught.value)
    assert server.requests[0].path.endswith("/chat/completions?api-version=1&x=hidden")
    assert server.requests[0].headers["api-key"] == "secret"


def test_loopback_addresses_need_no_proxy_and_others_name_theirs(client, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://user:word@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "inside.example")
    with MisbehavingServer(then=Say("hi")) as server:
        assert chat(client(server.url.replace("127.0.0.1", "0.0.0.0"))).text == "hi"
    with pytest.raises(EndpointError, match=r"proxy .*127.0.0.1:9 .*http_proxy.*no_proxy") as caught:
        chat(client("http://model.example:8000/v1", max_retries=0))
    assert "word" not in str(caught.value)
    assert proxy_note("http://inside.example/v1") == "" and proxy_note("http://127.0.0.2:1/v1") == ""


def test_close_ends_the_thread(client):
    with MisbehavingServer() as server:
        c = client(server)
        chat(c)
        c.close()
        assert not c.loop_thread.thread.is_alive()
        c.close()
