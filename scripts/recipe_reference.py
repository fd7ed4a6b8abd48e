"""Write docs/recipe_reference.md, a table of every setting: ``python scripts/recipe_reference.py [--check] [FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from openril.recipe.schema import OptimizerConfig, Recipe, SamplingConfig, Section
from openril.recipe.validation import inner_section

HEAD = """# Recipe reference

Every setting of a recipe, by section. This page is generated from the schema by
`python scripts/recipe_reference.py`; [configuration](configuration.md) explains how recipes work.
"""

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
_SHARED = (OptimizerConfig, SamplingConfig)  # used in several places, so the field says more than the class
_PLURALS = {"integer": "integers", "number": "numbers", "text": "texts"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def markdown() -> str:
    """Return the page: one table for each section, with the key, type, default and meaning of its settings."""
    return HEAD + "".join(_section(Recipe(), "", Recipe.__doc__ or ""))


def _section(section: Section, prefix: str, meaning: str) -> Iterator[str]:
    fields = type(section).model_fields
    inner = {name: found for name, field in fields.items() if (found := inner_section(field.annotation))}
    yield f"\n## {f'`{prefix}`' if prefix else 'Top level'}\n\n{meaning}\n"
    if len(inner) < len(fields):
        yield "\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in fields.items():
        if name not in inner:
            default = json.dumps(getattr(section, name), ensure_ascii=False)
            cells = [f"`{_key(prefix, name)}`", _type(field.annotation, field), f"`{default}`", field.description or ""]
            yield f"| {' | '.join(map(_cell, cells))} |\n"
    for name, kind in inner.items():
        value = getattr(section, name)
        meaning = (fields[name].description if kind in _SHARED else kind.__doc__) or ""
        if isinstance(value, list):
            yield from _section(
                kind(), f"{_key(prefix, name)}.0", f"{meaning} The number is the position in the list, from 0."
            )
        else:
            yield from _section(value, _key(prefix, name), meaning)


def _key(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _cell(text: str) -> str:
    """Return ``text`` as one line that is safe inside a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin is list:
        inner = _type(args[0])
        return f"list of {_PLURALS.get(inner, inner)}"
    if origin is tuple:
        return f"list of {len(args)} {_PLURALS[_type(args[0])]}"
    if origin is dict:
        return "mapping of names to " + _type(args[1])
    if args:
        return " or ".join(_type(arg) for arg in args)
    bounds = [f"{_SIGNS[name]} {getattr(part, name):g}" for part in (field.metadata if field else ()) for name in _SIGNS
              if getattr(part, name, None) is not None]  # fmt: skip
    return " ".join([_NAMES[annotation], " and ".join(bounds)]).strip()


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with ``--check`` return 1 if the file differs from it."""
    parser = argparse.ArgumentParser(prog="python scripts/recipe_reference.py", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/recipe_reference.md"))
    parser.add_argument("--check", action="store_true", help="only check that the file is current")
    options = parser.parse_args(arguments)
    if not options.check:
        options.file.write_text(markdown(), encoding="utf-8")
    elif not options.file.is_file() or options.file.read_text(encoding="utf-8") != markdown():
        print(f"{options.file}: not current. Run python scripts/recipe_reference.py.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
