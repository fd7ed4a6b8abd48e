"""Turn a mapping into a Recipe. Every problem is reported with its key, what was expected and what was found."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

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
    "train.sampler": "student.sampler",
}
"""Earlier names of settings and sections. The error for a user's recipe suggests the new name;
``loading.load_saved_recipe`` renames the keys of a recipe that a run saved."""

_RANGES = {"greater_than_equal": ">=", "greater_than": ">", "less_than_equal": "<=", "less_than": "<"}
_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "string_type": "text in quotes",
    "list_type": "a list, for instance [a, b]",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a section with keys"),
    "tuple_type": "a list, for instance [0.9, 0.999]",
}


class Mistake(NamedTuple):
    """A value that is not valid. text: what was expected and found. hint: a sentence on what to write, or ""."""

    key: KeyPath
    text: str
    hint: str = ""

    def sentence(self, prefix: str = "", place: str = "") -> str:
        """Return ``<prefix><key>: <text> (<place>). <hint>``."""
        message = f"{prefix}{'.'.join(map(str, self.key))}: {self.text}" + (f" ({place})" if place else "")
        return f"{message}. {self.hint}".strip()


def setting_names(recipe: Recipe | None = None) -> list[str]:
    """Return the dotted names of all settings, with the entries of lists as they are in ``recipe``."""
    return [".".join(map(str, key)) for key, _ in settings(recipe or Recipe(), ())]


def new_name(key: str) -> str | None:
    """Return the present name of a dotted key that was renamed, or whose section was moved; otherwise None."""
    return next((new + key[len(old) :] for old, new in RENAMED_KEYS.items() if f"{key}.".startswith(f"{old}.")), None)


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """Return the choice that ``word`` was probably meant to be, or None."""
    folded = {c.lower().replace("-", "_"): c for c in choices}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(folded), n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def settings(value: Any, key: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every setting under ``value`` with its current value. Entries of lists of sections are numbered from 0."""
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
    """Return the recipe with these values.

    Args:
        file: Place to report for a key that is not in ``where``.
        where: "file:line" of every key, in the order of the file.

    Raises:
        RecipeError: With all mistakes, in the order of the file.
    """
    values = _without_empty(values, Recipe)
    try:
        recipe = Recipe.model_validate(values)
        mistakes = list(suspicious(values, recipe, ()))
    except ValidationError as e:
        mistakes = list(translate(e))
    if mistakes:
        order = {key: i for i, key in enumerate(where)}
        rows = []
        for mistake in {m.key: m for m in mistakes}.values():
            key = mistake.key
            written = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in where), None)
            place = where[written] if written is not None else file
            rows.append((order.get(written or (), -1), mistake.sentence(place=place)))
        raise RecipeError("\n".join(text for _, text in sorted(rows)))
    return recipe


def translate(error: ValidationError) -> Iterator[Mistake]:
    """Yield pydantic's errors as mistakes in a recipe."""
    for e in error.errors(include_url=False):
        key: KeyPath = tuple(e["loc"])
        found, kind, ctx = describe(e["input"]), e["type"], e.get("ctx", {})
        if kind == "missing":
            yield Mistake(key, "expected a value, got nothing")
        elif kind == "extra_forbidden":
            yield Mistake(key, "unknown key", _hint_for_key(key))
        elif kind == "literal_error":
            options = re.findall(r"'([^']*)'", str(ctx.get("expected", "")))
            match = nearest(str(e["input"]), options)
            hint = f"Did you mean {match}?" if match else ""
            yield Mistake(key, f"expected one of {', '.join(options)}, got {found}", hint)
        elif kind in _RANGES:
            bound = next(v for k, v in ctx.items() if k in ("ge", "gt", "le", "lt"))
            yield Mistake(key, f"expected a number {_RANGES[kind]} {bound:g}, got {found}")
        elif kind in _EXPECTED:
            yield Mistake(key, f"expected {_EXPECTED[kind]}, got {found}")
        else:
            yield Mistake(key, f"{e['msg']}, got {found}")


def describe(value: Any) -> str:
    """Return a short description of a value for messages."""
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


def _hint_for_key(key: KeyPath) -> str:
    word = str(key[-1])
    section = _section_at(key[:-1])
    if section is None:
        return ""
    siblings = list(section.model_fields)
    here = ".".join(map(str, key[:-1]))
    prefix = f"{here}." if here else ""
    if renamed := new_name(f"{prefix}{word}"):
        return f"It is now called {renamed}."
    match = nearest(word, siblings)
    if match:
        return f"Did you mean {prefix}{match}?"
    # Another common mistake is the right name in the wrong section.
    elsewhere = sorted(
        (n for n in setting_names() if n.rsplit(".", 1)[-1] == word), key=lambda n: not n.startswith(prefix)
    )
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere[:3])}?"
    return f"Keys of {here or 'a recipe'}: {', '.join(siblings)}."


def _section_at(key: KeyPath) -> type[Section] | None:
    """Return the class of the section at ``key``, or None if there is no section."""
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
    """Return the class of section that a field of this type holds, itself or in a list, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((s for s in map(inner_section, get_args(annotation)) if s is not None), None)


def _allows_none(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation)


def _without_empty(values: Any, section: type[Section]) -> Any:
    """Drop keys without a value, so that a section with everything commented out means the defaults."""
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


def suspicious(values: Any, parsed: Any, key: KeyPath) -> Iterator[Mistake]:
    """Yield mistakes that pydantic accepts: true or false in place of a number, and numbers that are not finite."""
    if isinstance(values, dict):
        for name, value in values.items():
            inner = parsed.get(name) if isinstance(parsed, dict) else getattr(parsed, str(name), None)
            yield from suspicious(value, inner, (*key, name))
    elif isinstance(values, list) and isinstance(parsed, list | tuple):
        for i, (value, inner) in enumerate(zip(values, parsed, strict=False)):
            yield from suspicious(value, inner, (*key, i))
    elif isinstance(values, bool) and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        yield Mistake(key, f"expected a number, got {describe(values)}")
    elif isinstance(parsed, float) and not math.isfinite(parsed):
        yield Mistake(key, f"expected a finite number, got {describe(values)}")
