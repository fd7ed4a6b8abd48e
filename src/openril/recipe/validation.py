"""Turning a mapping into a Recipe, with every problem said in a recipe's words: key, what was found, what is wanted."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from openril.errors import RecipeError
from openril.recipe.schema import Recipe, Section

KeyPath = tuple[str | int, ...]

RENAMED_KEYS = {
    "sft.on": "sft.targets",
    "sft.optimiser": "sft.optimizer",
    "train.optimiser": "train.optimizer",
    "discriminator.optimiser": "discriminator.optimizer",
    "discriminator.pretraining.optimiser": "discriminator.pretraining.optimizer",
    "discriminator.sees": "discriminator.inputs",
    "discriminator.asleep_accuracy": "discriminator.at_chance_accuracy",
    "discriminator.won_accuracy": "discriminator.saturated_accuracy",
}
"""Earlier names of settings. A user's recipe that has one gets the new name in the message; a recipe that a run saved
itself is read with the new name (``loading.load_saved_recipe``)."""


def setting_names(recipe: Recipe | None = None) -> list[str]:
    """Dotted names of all settings, for instance ``train.optimizer.learning_rate``; list entries as in ``recipe``."""
    return [".".join(map(str, key)) for key, _ in settings(recipe or Recipe(), ())]


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """The choice that ``word`` was probably meant to be, or None."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    if found:
        return found[0]
    folded = {c.lower().replace("-", "_"): c for c in choices}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(folded), n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def settings(value: Any, key: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Every setting under ``value`` with its present value; entries of lists of sections by number."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from settings(getattr(value, name), (*key, name))
    elif isinstance(value, list) and value and isinstance(value[0], Section):
        for i, item in enumerate(value):
            yield from settings(item, (*key, i))
    elif isinstance(value, dict) and value:
        yield from (((*key, name), item) for name, item in value.items())
    else:
        yield key, value


def validate(values: dict[str, Any], file: str, where: Mapping[KeyPath, str]) -> Recipe:
    values = _without_empty(values, Recipe)
    problems: list[tuple[KeyPath, str]] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as e:
        problems = list(translate(e))
    if recipe is not None:
        problems += list(suspicious(values, recipe, ()))
    if problems or recipe is None:
        order = {key: i for i, key in enumerate(where)}
        rows = []
        for key, text in dict(problems).items():
            written = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in where), None)
            place = where[written] if written is not None else file
            rows.append((order.get(written or (), -1), f"{place}: {'.'.join(map(str, key))}: {text}"))
        raise RecipeError("\n".join(text for _, text in sorted(rows)))
    return recipe


def translate(error: ValidationError) -> Iterator[tuple[KeyPath, str]]:
    """pydantic's errors in a recipe's words: (key, what was found and what is wanted)."""
    for e in error.errors(include_url=False):
        key: KeyPath = tuple(e["loc"])
        if e["type"] == "missing":
            yield key, "a value is missing here"
            continue
        found = describe(e["input"])
        kind, ctx = e["type"], e.get("ctx", {})
        if kind == "extra_forbidden":
            yield key, f"unknown key{_did_you_mean_key(key)}"
        elif kind == "literal_error":
            options = re.findall(r"'([^']*)'", str(ctx.get("expected", "")))
            match = nearest(str(e["input"]), options)
            yield (
                key,
                f"{found} found; one of {', '.join(options)} is wanted"
                + (f" (did you mean {match}?)" if match else ""),
            )
        elif kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
            signs = {"greater_than_equal": ">=", "greater_than": ">", "less_than_equal": "<=", "less_than": "<"}
            bound = next(v for k, v in ctx.items() if k in ("ge", "gt", "le", "lt"))
            yield key, f"{found} found; a number {signs[kind]} {bound:g} is wanted"
        else:
            yield key, f"{found} found; {_WANTED.get(kind, e['msg'])}"


_WANTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number is wanted"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number is wanted"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false is wanted"),
    "string_type": "text is wanted; put it in quotes",
    "list_type": "a list is wanted, for instance [a, b]",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a section with keys of its own is wanted"),
    "tuple_type": "a list of fixed length is wanted, for instance [0.9, 0.999]",
}


def describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return str(value)


def _did_you_mean_key(key: KeyPath) -> str:
    word = str(key[-1])
    section = _section_at(key[:-1])
    if section is None:
        return ""
    siblings = list(section.model_fields)
    here = ".".join(map(str, key[:-1]))
    prefix = f"{here}." if here else ""
    renamed = RENAMED_KEYS.get(f"{prefix}{word}")
    if renamed:
        return f"; it is now called {renamed}"
    match = nearest(word, siblings)
    if match:
        return f"; did you mean {prefix}{match}?"
    # The right name in the wrong section is the other common slip.
    elsewhere = sorted(
        (n for n in setting_names() if n.rsplit(".", 1)[-1] == word), key=lambda n: not n.startswith(prefix)
    )
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    return f"; {here or 'a recipe'} takes {', '.join(siblings)}"


def _section_at(key: KeyPath) -> type[Section] | None:
    """The section class that holds ``key``'s entries."""
    section: type[Section] = Recipe
    for part in key:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        inner = inner_section(field.annotation) if field is not None else None
        if inner is None:
            return None
        section = inner
    return section


def inner_section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((s for s in map(inner_section, get_args(annotation)) if s is not None), None)


def _allows_none(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation)


def _without_empty(values: Any, section: type[Section]) -> Any:
    """Drop keys without a value: ``student:`` with everything under it commented out means the defaults."""
    if not isinstance(values, dict):
        return values
    kept: dict[Any, Any] = {}
    for name, value in values.items():
        field = section.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            kept[str(name)] = value
            continue
        if value is None and not _allows_none(field.annotation):
            continue
        inner = inner_section(field.annotation)
        if inner is not None and isinstance(value, list):
            value = [_without_empty(v, inner) for v in value]
        elif inner is not None:
            value = _without_empty(value, inner)
        kept[name] = value
    return kept


def suspicious(values: Any, parsed: Any, key: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """What pydantic lets through: true where a number belongs, and numbers that are not finite."""
    if isinstance(values, dict):
        for name, value in values.items():
            inner = parsed.get(name) if isinstance(parsed, dict) else getattr(parsed, str(name), None)
            yield from suspicious(value, inner, (*key, name))
    elif isinstance(values, list) and isinstance(parsed, list | tuple):
        for i, (value, inner) in enumerate(zip(values, parsed, strict=False)):
            yield from suspicious(value, inner, (*key, i))
    elif isinstance(values, bool) and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        yield key, f"{describe(values)} found; a number is wanted"
    elif isinstance(parsed, float) and not math.isfinite(parsed):
        yield key, f"{describe(values)} found; a finite number is wanted"
