import asyncio
import threading
import time

import pytest

from openril import endpoints
from openril.endpoints import ChatClient, Completion, RequestRefusedError, retry_after
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
        assert chat(client(server, timeout=0.3)).text == "late"
        assert time.monotonic() - start < 3


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


def test_probe_tells_a_missing_model_and_a_dead_server(client):
    with MisbehavingServer() as server:
        c = client(server, "http://127.0.0.1:9/v1", model="other")
        problems = c.loop_thread.run(c.probe())
    assert len(problems) == 2
    assert "'other'" in problems[0] and "fake" in problems[0]
    assert "http://127.0.0.1:9/v1" in problems[1]


def test_probe_of_a_healthy_server_finds_nothing(client):
    with MisbehavingServer() as server:
        c = client(server)
        assert c.loop_thread.run(c.probe()) == []


def test_close_ends_the_thread(client):
    with MisbehavingServer() as server:
        c = client(server)
        chat(c)
        c.close()
        assert not c.loop_thread.thread.is_alive()
        c.close()
