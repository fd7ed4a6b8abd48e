"""The columns of a row, taken one by one, and the plain values in them."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeGuard

from openril.errors import DataError


class Columns:
    """The columns of one row. A field of a question takes its column; what is left becomes metadata.

    Args:
        mapping: ``data.columns``: field of a question -> column, which may be inside another one ("reward_model.style").
            "" reads no column for the field.
    """

    def __init__(self, row: Mapping[Any, Any], mapping: Mapping[str, str]) -> None:
        self.left = {str(k): v for k, v in row.items() if not is_missing(v)}
        self.mapping = mapping
        self._mapped = set(mapping.values())
        self.read: list[str] = []
        """What was taken, as "question" or "query as question"."""

    def take(self, field: str, *names: str) -> tuple[str, Any]:
        """Remove the column of ``field`` and return its name and value: the mapped one, or else the first of ``names`` that
        is not mapped to another field.

        Without such a column the value is None. Columns inside another one stay in the metadata.
        """
        if field in self.mapping:
            names = (self.mapping[field],)
        for name in names:
            value = self.left.get(name) if name in self.left or "." not in name else look_up(self.left, name)
            if value is not None and (field in self.mapping or name not in self._mapped):
                self.left.pop(name, None)
                self.read.append(name if name == field else f"{name} as {field}")
                return name, value
        return field, None

    def is_mapped(self, field: str) -> bool:
        """Return whether the recipe maps the field to a column that this row has."""
        return field in self.mapping and look_up(self.left, self.mapping[field]) is not None


def look_up(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or of a dotted name inside it; None if there is none."""
    if not name or name in row:
        return row.get(name) if name else None
    value: Any = row
    for part in name.split("."):
        if not is_mapping(value):
            return None
        value = value.get(part)
    return None if is_missing(value) else value


def is_missing(value: Any) -> bool:
    return value is None or (type(value) is float and math.isnan(value))


def literal(value: Any) -> Any:
    """Return the list or mapping that a text spells in JSON or Python, as files without nested columns hold it."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] not in ("[", "{") or not text:
        return value
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    if re.search(r"""['"]\s+['"]""", text):  # a printed array, whose items Python would join to one
        return value
    with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences
        return ast.literal_eval(text)
    return value


def plain_text(value: Any, name: str) -> str:
    """Return the text of a scalar. JSON numbers, true and false are valid too."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise DataError(f"{name}: expected text or a number, got {kind(value)}")


def kind(value: Any) -> str:
    """Return what a value is, for messages, with the beginning of its text."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, str):
        return f"text {json.dumps(value[:40], ensure_ascii=False)}"
    if is_list(value):
        return "a list" if value else "an empty list"
    return f"{type(value).__name__} {str(value)[:40]}"


def is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return type(value) is dict or isinstance(value, Mapping)  # the first is much faster


def is_list(value: Any) -> bool:
    return type(value) is list or (isinstance(value, Sequence) and not isinstance(value, str | bytes))
