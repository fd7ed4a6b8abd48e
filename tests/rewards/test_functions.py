"""Reward functions of the user's own: loading, calling, checking."""

import math

import numpy as np
import pytest
import torch

from openril.errors import RecipeError
from openril.recipe.schema import RewardFunctionConfig
from openril.records import Group, Question, Response, Rollout
from openril.rewards.functions import FunctionRewards, LoadedFunction, check_rewards, load_callable, load_functions


def groups():
    one = Question("q1", "How many?", "3", choices=("2", "3"), metadata={"level": 7, "answer_type": "int"})
    mine = Response("q1", "student", 0, "3", token_ids=(5, 6))
    two = Question("q2", "What?", "red", metadata={"color": "dark"})
    return [
        Group(one, [Rollout(mine), Rollout(Response("q1", "big", 0, "two"))]),
        Group(two, [Rollout(Response("q2", "student", 0, "red"))]),
    ]


def call(function, form="text"):
    loaded = LoadedFunction("f", "rewards.functions.0 (m:f)", 1.0, form, function)
    return FunctionRewards([loaded]).score(groups())["f"]


def test_prompts_completions_and_every_column_are_given_per_response():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [1, 0.5, None]

    assert call(reward) == [1.0, 0.5, None]
    assert seen["prompts"] == ["How many?\nA. 2\nB. 3", "How many?\nA. 2\nB. 3", "What?"]
    assert seen["completions"] == ["3", "two", "red"]
    assert seen["question_id"] == ["q1", "q1", "q2"] and seen["source"] == ["student", "big", "student"]
    assert seen["answer"] == ["3", "3", "red"] and seen["choices"] == [("2", "3"), ("2", "3"), ()]
    assert seen["question"] == ["How many?", "How many?", "What?"]
    assert seen["level"] == [7, 7, None] and seen["color"] == [None, None, "dark"]
    assert seen["completion_ids"] == [[5, 6], None, None]
    assert {"images", "rule", "origin"} <= set(seen)


def test_messages_form_gives_what_trl_gives_for_chats():
    def reward(prompts, completions, **kwargs):
        assert prompts[0] == [{"role": "user", "content": "How many?\nA. 2\nB. 3"}]
        return [float(len(completion[0]["content"])) for completion in completions]

    assert call(reward, form="messages") == [1.0, 3.0, 3.0]


def test_one_of_trls_own_rewards_runs():
    [function] = load_functions([RewardFunctionConfig(function="trl.rewards:think_format_reward", form="messages")])
    assert FunctionRewards([function]).score(groups()) == {"think_format_reward": [0.0, 0.0, 0.0]}


def test_functions_without_kwargs_get_the_columns_they_name():
    assert call(lambda completions, answer: [float(c == a) for c, a in zip(completions, answer, strict=True)]) == [
        1,
        0,
        1,
    ]


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(RecipeError, match=r"m:f\): .*answer, .*latitude"):
        call(lambda completions, latitude: [0.0] * 3)


def test_async_functions_are_awaited_together():
    order = []

    async def first(prompts, completions, **kwargs):
        order.append("first starts")
        await event.wait()
        return [1.0] * 3

    async def second(prompts, completions, **kwargs):
        order.append("second starts")
        event.set()
        return [2.0] * 3

    import asyncio

    event = asyncio.Event()
    loaded = [LoadedFunction(f.__name__, f.__name__, 1.0, "text", f) for f in (first, second)]
    assert FunctionRewards(loaded).score(groups()) == {"first": [1.0] * 3, "second": [2.0] * 3}
    assert order == ["first starts", "second starts"]


def test_what_a_function_raises_is_passed_on_with_its_name():
    def broken(prompts, completions, **kwargs):
        raise KeyError("no such key")

    async def broken_later(prompts, completions, **kwargs):
        raise KeyError("no such key")

    for function in (broken, broken_later):
        with pytest.raises(KeyError) as error:
            call(function)
        assert "m:f" in error.value.__notes__[0]


@pytest.mark.parametrize("result", [[1, None, 0.5], (1, None, 0.5), [np.float32(1), None, torch.tensor(0.5)]])
def test_lists_tuples_and_scalars_of_libraries_are_taken(result):
    assert check_rewards(result, 3, "f") == [1.0, None, 0.5]


@pytest.mark.parametrize("result", [np.array([1.0, 0.0]), torch.tensor([1.0, 0.0]), [True, False]])
def test_arrays_tensors_and_booleans_are_taken(result):
    assert check_rewards(result, 2, "f") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "3 .*2"),
        ([1.0, math.nan, 0.0], "reward 1: .*nan"),
        ([math.inf, 0.0, 0.0], "reward 0: .*inf"),
        (["1", 0.0, 0.0], "reward 0: .*'1'"),
        ([[1.0], 0.0, 0.0], r"reward 0: .*\[1.0\]"),
        (None, "list .*NoneType"),
        (1.0, "list .*float"),
        ("abc", "list .*str"),
        ({"a": 1}, "list .*dict"),
    ],
)
def test_anything_else_is_an_error_that_names_the_function(result, message):
    with pytest.raises(RecipeError, match=rf"m:f\).*{message}"):
        call(lambda prompts, completions, **kwargs: result)


def test_a_file_is_loaded_once(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int = 1\n\ndef f(**k): ...\n")
    assert load_callable(f"{path}:f", "w") is load_callable(f"{path}:f", "w")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"rewards.functions.0 .*package.module:name"),
        ("no_colon", r"rewards.functions.0 .*package.module:name"),
        (":f", r"rewards.functions.0 .*package.module:name"),
        ("nowhere.to.be.found:f", r"nowhere.to.be.found"),
        ("missing.py:f", r"missing.py"),
        ("math:sinn", r"acos.*sinn"),
        ("math:pi", r"function, got pi, a float"),
    ],
)
def test_what_cannot_be_loaded_is_named(spec, message):
    with pytest.raises(RecipeError, match=message):
        load_functions([RewardFunctionConfig(function=spec)])


def test_an_error_inside_the_users_module_is_their_own(tmp_path):
    (tmp_path / "bad.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_callable(f"{tmp_path / 'bad.py'}:f", "w")


def test_names_are_unique_and_never_a_built_in_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("def answer(**k):\n    return []\ndef length(**k):\n    return []\n")
    specs = [f"{tmp_path}/one.py:answer", f"{tmp_path}/one.py:length", f"{tmp_path}/two.py:length"]
    names = [f.name for f in load_functions([RewardFunctionConfig(function=s) for s in specs])]
    assert names == [specs[0], "length", specs[2]]
    with pytest.raises(RecipeError, match=r"rewards.functions.2 .*twice"):
        load_functions([RewardFunctionConfig(function=specs[1])] * 3)
