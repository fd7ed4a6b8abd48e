"""With data.selection, teachers are asked the chosen questions alone; every part can be killed and continued."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from openril.data.reading import read_questions
from openril.errors import DataError, StateError
from openril.models.loading import load_model, load_processor
from openril.models.prompt_lengths import TokenCounter, fitting_questions
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Response
from openril.stages import select as select_stage
from openril.stages.collect import run_collect
from openril.stages.questions import training_questions
from openril.stages.run import run_all, stages
from openril.stages.select import run_select
from openril.storage import read_jsonl
from support.misbehaving_server import MisbehavingServer, Say
from support.tiny import draw_square

COUNT, CHOSEN, PROVISIONAL, N = 20, 6, 9, 2
TOO_LONG = "q7"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    square = draw_square(folder / "square.png", "red")
    rows = []
    for i in range(COUNT):
        row: dict[str, Any] = {
            "id": f"q{i}",
            "question": f"Say the word number {i}.",
            "answer": "red blue"[: 3 + i % 5],
        }
        if i % 3 == 0:
            row["images"] = [str(square)]
        rows.append(row)
    rows[7]["question"] += " word" * 300
    rows[4]["answer"] = ""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = [rows[0] | {"id": "v0"}, rows[7] | {"id": "v1"}]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, data: Path, tiny_qwen: Path) -> Callable[..., Recipe]:
    def build(name: str, url: str = "http://127.0.0.1:9/v1", selection: Any = (), **changes: Any) -> Recipe:
        served = {"base_urls": [url], "model": "fake", "max_retries": 0}
        chosen = {"enabled": True, "num_questions": CHOSEN, "provisional_share": 1.5, "max_overlong_share": 1.0}
        rate = {"learning_rate": 1e-3}
        return Recipe.model_validate(
            {
                "run_dir": str(tmp_path / name),
                "data": {
                    "train": [str(data / "train.jsonl")],
                    "validation": [str(data / "validation.jsonl")],
                    "max_prompt_length": 100,
                    "selection": chosen | dict(selection),
                },
                "student": {"model": str(tiny_qwen), "dtype": "float32"},
                "teachers": [{"name": "a", **served}, {"name": "b", **served}],
                "collect": {"num_responses": N, "max_completion_length": 6},
                "rewards": {"answer": {"kind": "rules"}},
                "sft": {"batch_size": 10, "micro_batch_size": 2, "optimizer": rate},
                "discriminator": {"pretraining": {"questions_per_step": 3, "held_out_share": 0.2}, "optimizer": rate},
                "train": {
                    "num_generations": N,
                    "questions_per_step": 3,
                    "max_completion_length": 6,
                    "precision": "float32",
                    "optimizer": rate,
                },
                "eval": {"max_completion_length": 6},
                **changes,
            }
        )

    return build


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=300)


def ids(path: Path) -> set[str]:
    return {row["id"] for row in read_jsonl(path) if row["selected"]}


def cached(recipe: Recipe) -> dict[str, Counter[str]]:
    """Source -> question id -> number of cached responses."""
    found: dict[str, Counter[str]] = {}
    for row in pq.read_table(recipe.cache_path / "shards", columns=["source", "question_id"]).to_pylist():
        found.setdefault(row["source"], Counter())[row["question_id"]] += 1
    return found


class Parrot:
    """A student whose responses to some questions are cut."""

    def __init__(self, cut: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.cut = cut

    def sample(self, questions, num_generations, *, first_index=0, source, **options):  # type: ignore[no-untyped-def]
        numbers = range(first_index, first_index + num_generations)
        return [
            [Response(q.id, source, i, "red", "length" if q.id in self.cut else "stop", (1,)) for i in numbers]
            for q in questions
        ]


def test_the_order_of_the_stages(make_recipe: Callable[..., Recipe]) -> None:
    def order(recipe: Recipe) -> str:
        return " ".join(title for title, _, _ in stages(recipe))

    rest = "discriminator train eval"
    assert order(make_recipe("x")) == f"sft select collect select collect {rest}"
    assert order(make_recipe("x", selection={"drop_overlong": False})) == f"sft select collect {rest}"
    on_text = {"targets": "teacher_responses"}
    assert order(make_recipe("x", sft=on_text)) == f"select collect select collect sft {rest}"
    assert order(make_recipe("x", selection={"enabled": False})) == f"sft collect {rest}"
    # No teacher is asked where no response of theirs is used.
    alone = {"algorithm": "dr_grpo"}
    assert order(make_recipe("x", train=alone)) == "sft select collect select train eval"
    recipe = make_recipe("x", selection={"enabled": False})
    recipe.export.to = "internvl-original"
    assert order(recipe) == f"sft collect {rest} export"
    assert order(make_recipe("x", train=alone, selection={"drop_overlong": False})) == "sft select train eval"


def test_a_whole_run_asks_teachers_the_chosen_questions_only(
    make_recipe: Callable[..., Recipe], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MisbehavingServer(then=Say("It is red.")) as server:
        whole = make_recipe("whole", server.url)
        assert run_all(whole, console) == 0
        folder = whole.run_path / "selection"
        provisional, chosen = ids(folder / "provisional.jsonl"), ids(folder / "selection.jsonl")
        assert len(provisional) == PROVISIONAL and len(chosen) == CHOSEN and chosen < provisional
        assert cached(whole)[STUDENT] == dict.fromkeys(provisional, N)
        assert cached(whole)["a"] == cached(whole)["b"] == dict.fromkeys(chosen, N)
        asked = Counter(f"q{request.text.split('number ')[1].split('.')[0]}" for request in server.requests)
        assert asked == dict.fromkeys(chosen, 2 * N) and server.count == CHOSEN * 2 * N
        assert [q.id for q in training_questions(whole)] == [f"q{i}" for i in range(COUNT) if f"q{i}" in chosen]
        # 6 questions: 3 a step in the loop. D learns from 5 or fewer of them, since at least one is held out.
        assert [row["step"] for row in read_jsonl(whole.run_path / "metrics.jsonl")] == [1, 2]
        held_out = json.loads((whole.run_path / "discriminator" / "held_out.json").read_text())
        assert 1 <= held_out["questions"] < CHOSEN

        # The overlong question of each file is listed once by every stage that came to it.
        listed = read_jsonl(whole.run_path / "left_out.jsonl")
        assert [(row["stage"], row["question_id"]) for row in listed] == [
            ("sft", TOO_LONG),
            ("select", TOO_LONG),
            ("eval", "v1"),
        ]
        assert all(row["tokens"] > row["limit"] == 100 and ".jsonl:" in row["origin"] for row in listed)
        table = json.loads((whole.run_path / "eval" / "final.json").read_text())
        assert table["n"] == 2 and table["unknown"] == 1

        # Again, part by part, with a kill in the middle of the scores: the same files, and nobody is asked twice.
        parts = make_recipe("parts", server.url)
        write, calls = select_stage.append_jsonl, []

        def killed(path: Path, *rows: dict[str, Any]) -> None:
            calls.append(path)
            if len(calls) == 2:
                raise KeyboardInterrupt
            write(path, *rows)

        parts.sft.enabled = False
        parts.discriminator.init = parts.student.model
        same = parts.model_copy(update={"run_dir": str(parts.run_path) + "-one"})
        run_select(same, console)
        monkeypatch.setattr(select_stage, "append_jsonl", killed)
        with pytest.raises(KeyboardInterrupt):
            run_select(parts, console)
        monkeypatch.undo()
        with pytest.raises(DataError, match="`ril select` first"):
            run_collect(parts, console)
        assert run_select(parts, console) == run_select(parts, console)
        before = server.count
        for recipe in (same, parts):
            run_collect(recipe, console)
            if recipe is parts:  # every part twice
                run_collect(recipe, console)
            assert server.count == before and set(cached(recipe)) == {STUDENT}
            run_select(recipe, console)
            run_select(recipe, console)
        for name in ("provisional.jsonl", "selection.jsonl"):
            files = [(r.run_path / "selection" / name).read_bytes() for r in (same, parts)]
            assert files[0] == files[1]
        run_collect(parts, console)
        run_collect(parts, console)
        assert server.count == before + CHOSEN * 2 * N


def test_overlong_questions_are_replaced_by_other_provisional_ones(
    make_recipe: Callable[..., Recipe], console: Console
) -> None:
    recipe = make_recipe("run", sft={"enabled": False}, selection={"max_overlong_share": 0.5})
    provisional = run_select(recipe, console)
    first = sorted(ids(provisional))
    assert run_select(recipe, console) == provisional  # nothing to do yet
    assert f"{PROVISIONAL * N} of {PROVISIONAL * N} responses of the student are missing" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="ril collect"):
        run_collect(recipe, console, ["a"])
    run_collect(recipe, console, make_sampler=lambda *_: Parrot(set(first[:5])))
    chosen = ids(run_select(recipe, console))
    assert chosen == set(first[5:])  # four are left, so all of them
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "raise provisional_share" in output and "Next: `ril collect`" in output
    recipe.data.selection.num_questions = 5
    with pytest.raises(StateError, match="num_questions"):
        run_select(recipe, console)


def test_two_processes_score_what_one_does(
    make_recipe: Callable[..., Recipe], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_stage, "POLL", 0.05)
    one, two = (make_recipe(name, sft={"enabled": False}) for name in ("one", "two"))
    questions = read_questions(one.data, "train")
    alone = select_stage._choose_by_score(one, questions, 0, 1, console)
    with ThreadPoolExecutor(1) as pool:  # the first process waits for the other
        first = pool.submit(select_stage._choose_by_score, two, questions, 0, 2, console)
        assert select_stage._choose_by_score(two, questions, 1, 2, console) is None
        assert first.result(timeout=60) == alone
    shares = [read_jsonl(path) for path in sorted((two.run_path / "selection").glob("logprobs_*/*.jsonl"))]
    everything = sorted(row["id"] for rows in shares for row in rows)
    assert len(shares) == 2 and everything == sorted(f"q{i}" for i in range(COUNT) if i != 4)


def test_a_reference_with_another_tokenizer_is_compared_by_sums(
    make_recipe: Callable[..., Recipe], console: Console, tmp_path: Path, tiny_internvl: Path, tiny_qwen: Path
) -> None:
    other = make_recipe("other", sft={"enabled": False}, selection={"reference": str(tiny_internvl)})
    path = run_select(other, console)
    assert "another tokenizer" in console.file.getvalue()  # type: ignore[attr-defined]
    same = shutil.copytree(tiny_qwen, tmp_path / "same")
    weights = load_file(same / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, same / "model.safetensors", metadata={"format": "pt"})
    alike = make_recipe(
        "alike", sft={"enabled": False}, selection={"reference": str(tiny_qwen)}, student={"model": str(same)}
    )
    means = run_select(alike, console)

    def scores(file: Path) -> dict[str, dict[str, Any]]:
        [student] = file.parent.glob("logprobs_student_*/0.jsonl")
        return {row["id"]: row for row in read_jsonl(student)}

    for file, per_token in ((path, False), (means, True)):
        rows = [row for row in read_jsonl(file) if row["student_logprob"] is not None]
        assert len(rows) == COUNT - 2  # one has no answer, and one is too long
        for row in rows:
            score = scores(file)[row["id"]]
            value = score["logprob"] / score["tokens"] if per_token else score["logprob"]
            assert row["student_logprob"] == pytest.approx(value)
            assert row["score"] == pytest.approx(row["reference_logprob"] - row["student_logprob"])
    reasons = {row["id"]: row["reason"] for row in read_jsonl(path)}
    assert reasons["q4"].startswith("no answer") and reasons[TOO_LONG].startswith("too long")


def test_without_a_selection_every_stage_leaves_out_the_same_questions(
    make_recipe: Callable[..., Recipe], console: Console
) -> None:
    with MisbehavingServer(then=Say("It is red.")) as server:
        recipe = make_recipe("run", server.url, selection={"enabled": False}, sft={"enabled": False})
        recipe.train.max_steps = 1
        recipe.rewards.answer.kind = "none"  # one question has no answer
        assert run_all(recipe, console) == 0
        assert server.count == (COUNT - 1) * 2 * N
    fitting = {f"q{i}": N for i in range(COUNT) if f"q{i}" != TOO_LONG}
    assert cached(recipe) == dict.fromkeys(("a", "b", STUDENT), fitting)
    listed = [(row["stage"], row["question_id"]) for row in read_jsonl(recipe.run_path / "left_out.jsonl")]
    assert listed == [("collect", TOO_LONG), ("discriminator", TOO_LONG), ("train", TOO_LONG), ("eval", "v1")]
    # Longer prompts fit a higher limit, and all of them are counted again.
    recipe.data.max_prompt_length = 1000
    assert len(training_questions(recipe)) == COUNT


@pytest.mark.parametrize("room", [0, 1])
def test_a_question_at_the_limit_is_decided_by_the_processor(
    room: int, make_recipe: Callable[..., Recipe], tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(f"run{room}", selection={"enabled": False}, student={"model": str(tiny_student)})
    question = read_questions(recipe.data, "train")[0]
    encoder = PromptEncoder(load_processor(str(tiny_student)), load_model(str(tiny_student)))
    recipe.data.max_prompt_length = encoder(question).length - 1 + room
    # Even if the rule of the image tokens is off by one.
    rule = TokenCounter._by_rule
    monkeypatch.setattr(TokenCounter, "_by_rule", lambda self, sizes: rule(self, sizes) + (-1 if room == 0 else 1))
    assert len(fitting_questions(recipe, [question], "train")) == room
