"""The user's reward functions, with TRL's signature ``(prompts, completions, **columns) -> list[float | None]``.

What they raise is passed on with a note that names the function. A broken reward never becomes a 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from openril.data.question_text import question_text
from openril.endpoints import EventLoopThread
from openril.errors import RecipeError
from openril.recipe.schema import RewardFunctionConfig
from openril.records import Group, Question, Rollout

BUILT_IN = ("similarity", "answer")
"""Names of rewards that are not functions."""


@dataclass(frozen=True)
class LoadedFunction:
    """A reward function that is ready to be called."""

    name: str
    """Its key in ``Rollout.rewards``."""
    where: str
    """What errors call it."""
    weight: float
    form: str
    call: Callable[..., Any]


def load_functions(settings: Sequence[RewardFunctionConfig]) -> list[LoadedFunction]:
    """Import every function of a recipe. Raises RecipeError if one is missing or not callable."""
    loaded: list[LoadedFunction] = []
    for i, function in enumerate(settings):
        where = f"rewards.functions.{i} ({function.function or 'no function'})"
        call = load_callable(function.function, where)
        name = function.function.rpartition(":")[2]
        if name in BUILT_IN or any(name == other.name for other in loaded):
            name = function.function
        if any(name == other.name for other in loaded):
            raise RecipeError(f"{where}: listed twice. Remove one, and give the other the weight.")
        loaded.append(LoadedFunction(name, where, function.weight, function.form, call))
    return loaded


def load_callable(spec: str, where: str) -> Callable[..., Any]:
    """Return the object that ``package.module:name`` or ``path/to/file.py:name`` names."""
    # The user's module may import transformers, which openril.hf must precede.
    importlib.import_module("openril.hf")
    module_name, separator, attribute = spec.rpartition(":")
    if not separator or not module_name or not attribute:
        raise RecipeError(f"{where}: expected package.module:name or path/to/file.py:name, got {spec!r}")
    if module_name.endswith(".py"):
        module = _load_file(Path(module_name).expanduser().resolve(), where)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as e:
            if e.name is None or not (module_name == e.name or module_name.startswith(f"{e.name}.")):
                raise  # the module exists, but something that it imports does not
            raise RecipeError(f"{where}: no module {module_name}. Install it, or name a file, path/to/file.py:f") from e
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RecipeError(f"{where}: {module_name} has {', '.join(sorted(there)[:10]) or 'nothing'}, got {attribute}")
    if not callable(found):
        raise RecipeError(f"{where}: expected a function, got {attribute}, a {type(found).__name__}")
    return found


def _load_file(path: Path, where: str) -> Any:
    if not path.is_file():
        raise RecipeError(f"{where}: no file {path}. Paths are relative to the folder in which the command runs.")
    # The module is registered, because dataclasses and pickling need that, under a name that is unique to its path.
    name = f"openril_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def columns_of(rollouts: Sequence[tuple[Question, Rollout]]) -> dict[str, list[Any]]:
    """Return one list per column, with one value per response.

    The columns are those of the metadata, the fields of Question, ``question_id``, ``source`` and ``completion_ids`` (None
    for responses that came as text). Rows without a column hold None.
    """
    names = dict.fromkeys(name for q, _ in rollouts for name in q.metadata)
    columns: dict[str, list[Any]] = {name: [q.metadata.get(name) for q, _ in rollouts] for name in names}
    for field in fields(Question):
        if field.name not in ("id", "metadata"):
            columns[field.name] = [getattr(q, field.name) for q, _ in rollouts]
    columns["question_id"] = [q.id for q, _ in rollouts]
    columns["source"] = [r.response.source for _, r in rollouts]
    columns["completion_ids"] = [None if (ids := r.response.token_ids) is None else list(ids) for _, r in rollouts]
    columns.pop("prompts", None)
    columns.pop("completions", None)
    return columns


class FunctionRewards:
    """Calls all functions once per step. Async functions run concurrently."""

    def __init__(self, functions: Sequence[LoadedFunction]) -> None:
        self.functions = list(functions)
        self._loop: EventLoopThread | None = None

    def score(self, groups: Sequence[Group]) -> dict[str, list[float | None]]:
        """Return rewards by function name, one for each rollout of all groups in order.

        Raises RecipeError, which names the function, for a result that is not one finite number or None per completion.
        """
        rollouts = [(group.question, rollout) for group in groups for rollout in group.rollouts]
        if not rollouts or not self.functions:
            return {f.name: [] for f in self.functions}
        columns = columns_of(rollouts)
        prompts = [question_text(q) for q, _ in rollouts]
        completions = [r.response.text for _, r in rollouts]
        results: dict[str, Any] = {}
        for function in self.functions:
            arguments: dict[str, Any] = {"prompts": prompts, "completions": completions, **columns}
            if function.form == "messages":
                arguments["prompts"] = [[{"role": "user", "content": text}] for text in prompts]
                arguments["completions"] = [[{"role": "assistant", "content": text}] for text in completions]
            with _noted(function):
                results[function.name] = function.call(**_accepted(function, arguments))
        self._await(results)
        return {f.name: check_rewards(results[f.name], len(rollouts), f.where) for f in self.functions}

    def _await(self, results: dict[str, Any]) -> None:
        """Replace the results of async functions by the values they resolve to."""
        waiting = {f.name: f for f in self.functions if inspect.isawaitable(results[f.name])}
        if not waiting:
            return
        self._loop = self._loop or EventLoopThread()

        async def resolve(function: LoadedFunction) -> Any:
            with _noted(function):
                return await results[function.name]

        async def resolve_all() -> list[Any]:
            return await asyncio.gather(*(resolve(f) for f in waiting.values()))

        for name, result in zip(waiting, self._loop.run(resolve_all()), strict=True):
            results[name] = result


@contextmanager
def _noted(function: LoadedFunction) -> Iterator[None]:
    """Add the function's name to whatever it raises."""
    try:
        yield
    except BaseException as e:
        e.add_note(f"raised by the reward function {function.where}")
        raise


def _accepted(function: LoadedFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function accepts: all of them with ``**kwargs``, otherwise those that it names."""
    try:
        parameters = inspect.signature(function.call).parameters.values()
    except (TypeError, ValueError):
        return arguments
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in arguments
    ]
    if missing:
        raise RecipeError(f"{function.where}: expected {', '.join(sorted(arguments))}, got {', '.join(missing)}")
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def check_rewards(result: Any, count: int, where: str) -> list[float | None]:
    """Return ``result``, which may be an array or a tensor, as a list of finite floats and None, one per completion."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise RecipeError(f"{where}: expected a list with one number per completion, got a {type(result).__name__}")
    if len(values) != count:
        raise RecipeError(f"{where}: expected {count} rewards, one per completion, got {len(values)}")
    rewards: list[float | None] = []
    for i, value in enumerate(values):
        value = value.item() if hasattr(value, "item") else value
        if value is not None and not isinstance(value, int | float):
            raise RecipeError(f"{where}: reward {i}: expected a number or None, got {value!r}")
        if value is not None and not math.isfinite(value):
            raise RecipeError(f"{where}: reward {i}: expected a finite number, got {value}. Return None for no reward.")
        rewards.append(None if value is None else float(value))
    return rewards
