"""The stage as the command runs it, in this process and in real ones that are killed."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from io import StringIO

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from openril import endpoints
from openril.data.reading import read_questions
from openril.errors import EndpointError, RecipeError
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Response
from openril.responses.cache import ResponseCache
from openril.rewards.answers import known_answers
from openril.stages.collect import run_collect
from openril.storage import append_jsonl
from support.misbehaving_server import MisbehavingServer, Say, Status

RIGHT = "It says the same. <answer>1</answer>"
COMMAND = """
import sys
from pathlib import Path
from rich.console import Console
from openril.recipe.schema import Recipe
from openril.responses import collection
from openril.stages.collect import run_collect
collection.POLL = 0.05
run_collect(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Console(width=300))
"""


@pytest.fixture
def make_recipe(tmp_path):
    def build(url, num_questions=24, **collect):
        lines = [
            json.dumps({"id": f"q{i}", "question": f"What is {i}?", "answer": str(i)}) for i in range(num_questions)
        ]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        return Recipe.model_validate(
            {
                "run_dir": str(tmp_path / "run"),
                "data": {"train": [str(tmp_path / "train.jsonl")]},
                "student": {"model": "some/student"},
                "sft": {"enabled": False},
                "teachers": [{"name": "big", "model": "fake", "base_urls": [url], "max_retries": 1, "concurrency": 4}],
                "collect": {"num_responses": 4, "student": False, "shard_size": 20, **collect},
            }
        )

    return build


def start(recipe):
    path = recipe.run_path / "recipe.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(recipe.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None or condition(), process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows_on_disk(recipe):
    """How often each response is in the shards."""
    table = pq.read_table(recipe.cache_path / "shards", columns=["question_id", "source", "index"])
    return Counter((r["question_id"], r["index"]) for r in table.to_pylist())


def test_killed_again_and_again_it_ends_with_everything_once(make_recipe):
    rng = random.Random(0)
    with MisbehavingServer(then=Say(lambda r: r.text, delay=0.01)) as server:
        recipe = make_recipe(server.url)
        kept = set()
        for _ in range(4):
            process = start(recipe)
            goal = server.count + rng.randrange(3, 22)
            wait_for(lambda goal=goal: server.count >= goal, process)
            time.sleep(rng.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            cache = ResponseCache.open(recipe.cache_path)
            loaded = rows_on_disk(recipe) if any(cache.shard_folder.glob("*.parquet")) else Counter()
            assert kept <= set(loaded)  # nothing lost
            kept = set(loaded)
        assert 0 < len(kept) < 96
        process = start(recipe)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
        assert rows_on_disk(recipe) == Counter({(f"q{i}", n): 1 for i in range(24) for n in range(4)})
        # Only requests in flight at a kill were sent twice.
        assert server.count <= 96 + 4 * 4


def test_two_collectors_share_one_source(make_recipe):
    with MisbehavingServer(then=Say(delay=0.03)) as server:
        recipe = make_recipe(server.url)
        pair = [start(recipe), start(recipe)]
        outputs = [p.communicate(timeout=60)[0] for p in pair]
        assert [p.returncode for p in pair] == [0, 0], outputs
        assert rows_on_disk(recipe) == Counter({(f"q{i}", n): 1 for i in range(24) for n in range(4)})
        assert server.count == 96  # no request was sent twice
        assert sum(int(n) for o in outputs for n in re.findall(r"\((\d+) new", o)) == 96


def test_a_collector_takes_over_from_a_killed_one(make_recipe):
    with MisbehavingServer(then=Say(delay=0.03)) as server:
        recipe = make_recipe(server.url)
        first = start(recipe)
        wait_for(lambda: server.count >= 8, first)
        second = start(recipe)
        time.sleep(0.3)
        first.kill()
        first.wait()
        output = second.communicate(timeout=60)[0]
        assert second.returncode == 0, output
        ResponseCache.open(recipe.cache_path)  # folds the first one's journal
        assert rows_on_disk(recipe) == Counter({(f"q{i}", n): 1 for i in range(24) for n in range(4)})


def test_ctrl_c_keeps_what_is_done(make_recipe):
    with MisbehavingServer(then=Say(delay=0.02)) as server:
        recipe = make_recipe(server.url)
        process = start(recipe)
        wait_for(lambda: server.count >= 20, process)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=20)[0]
        assert "KeyboardInterrupt" in output
        assert sum(rows_on_disk(recipe).values()) >= 12
        assert not list((recipe.cache_path / "journals").iterdir())  # closed properly


# In this process


@pytest.fixture
def console():
    return Console(file=StringIO(), width=300)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_BACKOFF", 0.01)


class Parrot:
    def sample(self, questions, num_generations, *, settings, max_completion_length, seed, first_index=0, source):
        numbers = range(first_index, first_index + num_generations)
        return [[Response(q.id, source, i, q.question, token_ids=(1, 2)) for i in numbers] for q in questions]


def test_all_sources_are_collected_and_summed_up(make_recipe, console):
    with MisbehavingServer(then=Say("x", finish_reason="length")) as server:
        recipe = make_recipe(server.url, num_questions=3, student=True)
        run_collect(recipe, console, make_sampler=lambda *_: Parrot())
    output = console.file.getvalue()
    assert "big: 12 of 12 responses (12 new, 12 cut at 512 tokens)" in output
    assert "student: 12 of 12 responses (12 new)" in output


def test_one_source_alone(make_recipe, console):
    recipe = make_recipe("http://127.0.0.1:9/v1", num_questions=3, student=True)
    run_collect(recipe, console, [STUDENT], make_sampler=lambda *_: Parrot())
    assert ResponseCache.open(recipe.cache_path).sources == [STUDENT]


def test_unknown_source_is_refused_before_any_work(make_recipe, console):
    recipe = make_recipe("http://127.0.0.1:9/v1")
    with pytest.raises(RecipeError, match="'bigger'"):
        run_collect(recipe, console, ["big", "bigger"])
    assert not recipe.cache_path.exists()


def test_failures_end_the_stage_after_the_other_sources(make_recipe, console):
    with MisbehavingServer(then=lambda r: Status(500, "boom") if "What is 1?" in r.text else Say()) as server:
        recipe = make_recipe(server.url, num_questions=3, student=True)
        with pytest.raises(EndpointError, match=r"(?s)big: 4 responses.*4 x .*boom.*questions q1.*same command"):
            run_collect(recipe, console, make_sampler=lambda *_: Parrot())
    cache = ResponseCache.open(recipe.cache_path)
    assert cache.sources == ["big", STUDENT]


def test_recollect_drops_what_no_longer_fits(make_recipe, console):
    with MisbehavingServer(then=Say(lambda r: str(r.body["temperature"]))) as server:
        recipe = make_recipe(server.url, num_questions=3)
        run_collect(recipe, console)
        recipe.collect.sampling.temperature = 0.5
        run_collect(recipe, console, recollect=True)
        assert server.count == 24
    table = pq.read_table(recipe.cache_path / "shards")
    assert set(table["text"].to_pylist()) == {"0.5"}


def test_recollect_of_what_fits_asks_nothing(make_recipe, console):
    with MisbehavingServer() as server:
        recipe = make_recipe(server.url, num_questions=3)
        run_collect(recipe, console)
        run_collect(recipe, console, recollect=True)
        assert server.count == 12


def test_responses_are_judged_once(make_recipe, console):
    texts, available = [f"It is {i}." for i in range(12)], []

    def act(request):
        if "<generated text>" not in request.text:
            return Say(texts.pop())
        return Say(RIGHT) if available or "What is 1?" not in request.text else Status(400)

    with MisbehavingServer(then=act) as server:
        recipe = make_recipe(server.url, num_questions=3, judge_responses=True)
        recipe.judge.base_urls, recipe.judge.model = [server.url], "fake"
        for judged in (
            "judged 12 of 12 responses, of which 4 verdicts are unknown",
            "judged 4 of 12",
            "judged 0 of 12",
        ):
            run_collect(recipe, console)
            assert judged in console.file.getvalue().splitlines()[-1]
            available.append(True)
        assert server.count == 12 + 12 + 4 + 0  # only the unknown ones were asked for again
    assert [s.score for s in scores_of(recipe)] == [1.0] * 12


def scores_of(recipe):
    questions = read_questions(recipe.data, "train")
    loaded = ResponseCache.open(recipe.cache_path).load(questions)
    return known_answers(recipe)([(q, r.text) for q in questions for r in loaded[q.id]])


def test_a_corrected_truth_is_judged_again(make_recipe, console):
    def act(request):
        if "<generated text>" not in request.text:
            return Say("It is 0.")
        return Say(f"Compared. <answer>{int('0</ground truth>' in ''.join(request.text.split(chr(10))))}</answer>")

    with MisbehavingServer(then=act) as server:
        recipe = make_recipe(server.url, num_questions=1, judge_responses=True, num_responses=1)
        recipe.judge.base_urls, recipe.judge.model = [server.url], "fake"
        run_collect(recipe, console)
        assert [s.score for s in scores_of(recipe)] == [1.0]
        path = recipe.run_path.parent / "train.jsonl"
        path.write_text(path.read_text().replace('"answer": "0"', '"answer": "7"'))
        assert [s.score for s in scores_of(recipe)] == [None]
        run_collect(recipe, console)
        assert [s.score for s in scores_of(recipe)] == [0.0]
        assert server.count == 3  # the response itself was not asked for again


def test_verdicts_of_an_earlier_version_are_asked_again_and_the_console_says_so(make_recipe, console):
    with MisbehavingServer(then=lambda r: Say(RIGHT) if "<generated text>" in r.text else Say("It is 0.")) as server:
        recipe = make_recipe(server.url, num_questions=1, judge_responses=True, num_responses=1)
        recipe.judge.base_urls, recipe.judge.model = [server.url], "fake"
        recipe.collect.judge_responses = False
        run_collect(recipe, console)
        recipe.collect.judge_responses = True
        row = {"question_id": "q0", "source": "big", "index": 0, "verdict": 0.0}
        append_jsonl(recipe.cache_path / "verdicts.jsonl", row)
        for _ in range(2):
            run_collect(recipe, console)
        assert server.count == 2
    assert [s.score for s in scores_of(recipe)] == [1.0]
    assert console.file.getvalue().count("verdicts of an earlier version") == 1


def test_rules_store_nothing(make_recipe, console):
    with MisbehavingServer(then=Say("The answer is 0.")) as server:
        recipe = make_recipe(server.url, num_questions=2, judge_responses=True, num_responses=1)
        recipe.rewards.answer.kind = "rules"
        run_collect(recipe, console)
        assert server.count == 2
    assert [s.score for s in scores_of(recipe)] == [1.0, 0.0]
    assert not list(recipe.run_path.rglob("verdicts*"))
