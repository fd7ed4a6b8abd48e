"""The tiny judge's training material, its batched reading, and its server."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from openril.recipe.schema import JudgeConfig
from openril.records import Question
from openril.rewards.judge_prompt import read_verdict
from openril.sampling.greedy_batch import GreedyDecoder
from openril.testing.tiny_models import build_tiny_model
from playground.judge import Pair, agreement, exchange_answer, make_pairs
from playground.serve import start_server
from playground.world import make_questions

WORDS = ["red", "blue", "1", "2", "3"]


@pytest.fixture(scope="module")
def questions():
    return [
        Question(
            str(i), w.question, w.answer, choices=w.choices, rule=w.rule,
            metadata={"skill": w.kind, "texts": [w.answer, *w.derivations.values()]},
        )
        for i, w in enumerate(make_questions("train", 80, seed=2))
    ]  # fmt: skip


def wordings(question):
    return question.metadata["texts"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    return build_tiny_model(folder, "qwen2", texts=WORDS, hidden_size=32, num_layers=2, seed=1)


def test_replies_hold_the_rules_verdict(questions):
    for pair in make_pairs(questions, wordings, 200, seed=0):
        score, explanation = read_verdict(pair.reply)
        assert score == pair.verdict
        assert pair.question.answer in explanation


def test_what_a_response_says_decides_the_verdict(questions):
    for pair in make_pairs(questions, wordings, 200, seed=0):
        assert pair.verdict == (pair.says == pair.question.answer)


def test_both_verdicts_are_common(questions):
    verdicts = [p.verdict for p in make_pairs(questions, wordings, 400, seed=0)]
    assert 0.35 < sum(verdicts) / len(verdicts) < 0.65


def test_exchanged_answer_keeps_the_reasons():
    assert exchange_answer("I see 3 and 4. The answer is 7.", "7", "9") == "I see 3 and 4. The answer is 9."
    assert exchange_answer("Answer: blue", "blue", "red") == "Answer: red"


def test_replies_do_not_depend_on_the_batch(checkpoint):
    reader = GreedyDecoder.from_checkpoint(checkpoint)
    chats = [
        [{"role": "system", "content": "You grade answers."}, {"role": "user", "content": text}]
        for text in ("red", "blue and 3", "1 2 3 1 2 3 red blue")
    ]
    together = reader.replies(chats, 12)
    alone = [GreedyDecoder.from_checkpoint(checkpoint).replies([chat], 12)[0] for chat in chats]
    assert together == alone
    assert len(set(together)) > 1


def test_replies_are_those_of_transformers_generate(checkpoint):
    reader = GreedyDecoder.from_checkpoint(checkpoint)
    chat = [{"role": "system", "content": "You grade answers."}, {"role": "user", "content": "blue and 3"}]
    text = reader.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = reader.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = reader.model.generate(**inputs, do_sample=False, max_new_tokens=12)
    wanted = reader.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reader.replies([chat], 12) == [wanted]


class Oracle:
    """Replies what a perfect (or a contrary) judge would."""

    def __init__(self, pairs, contrary=0):
        self.answers = [p.reply if i >= contrary else p.reply.replace("<answer>", "") for i, p in enumerate(pairs)]

    def replies(self, chats):
        return self.answers


def test_agreement_counts_unreadable_replies_as_disagreement(questions):
    pairs = make_pairs(questions, wordings, 40, seed=4)
    assert agreement(Oracle(pairs), pairs)["agreement"] == 1.0
    measured = agreement(Oracle(pairs, contrary=10), pairs)
    assert measured["agreement"] == 0.75
    assert measured["unreadable"] == 0.25


def test_a_response_without_answer_is_wrong():
    pair = Pair(Question("q", "How many?", "3", rule="number"), "red blue", "")
    assert pair.verdict == 0
    assert "gives no answer" in pair.reply


@pytest.fixture
def server(checkpoint):
    server = start_server(checkpoint)
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def post(url, body):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with opener.open(request, timeout=30) as answer:
        return json.loads(answer.read())


def test_server_answers_many_at_once_as_one_by_one(server, checkpoint):
    chats = [[{"role": "system", "content": "Grade."}, {"role": "user", "content": word}] for word in WORDS]
    got = {}

    def ask(i):
        body = {"model": "judge", "messages": chats[i], "max_tokens": 8}
        got[i] = post(f"{server}/chat/completions", body)["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [got[i] for i in range(len(chats))] == GreedyDecoder.from_checkpoint(checkpoint).replies(chats, 8)


def test_server_refuses_what_is_no_chat(server):
    with pytest.raises(urllib.error.HTTPError) as e:
        post(f"{server}/chat/completions", {"messages": [{"role": "user", "content": [1]}]})
    assert e.value.code == 400


def test_the_projects_own_client_can_ask_it(server):
    from openril.endpoints import ChatClient

    client = ChatClient(JudgeConfig(base_urls=[server], model="judge"), "judge")
    try:
        assert client.loop_thread.run(client.probe()) == []
        completion = client.loop_thread.run(client.chat([{"role": "user", "content": "red"}], max_tokens=4))
        assert completion.finish_reason == "stop"
    finally:
        client.close()
