"""Override settings of a recipe on the command line, with dotted names. tyro parses them and prints the help."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from openril.errors import RecipeError
from openril.recipe.schema import Recipe
from openril.recipe.validation import nearest, new_name, settings, suspicious, translate

_SWITCHES = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def override(recipe: Recipe, overrides: list[str], prog: str) -> Recipe:
    """Return ``recipe`` with ``overrides`` applied; see ``loading.load_recipe``."""
    import tyro

    known = {".".join(map(str, key)): value for key, value in settings(recipe, ())}
    arguments = _spell_switches(overrides, known)
    printed = io.StringIO()
    wants_help = any(a in ("--help", "-h") for a in arguments)
    try:
        if wants_help:
            return tyro.cli(Recipe, default=recipe, args=arguments, prog=prog)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            changed = tyro.cli(Recipe, default=recipe, args=arguments, prog=prog)
        changed = Recipe.model_validate(changed.model_dump())
    except ValidationError as e:
        raise RecipeError("\n".join(mistake.sentence("--") for mistake in translate(e))) from e
    except SystemExit as e:
        if wants_help:
            raise
        raise RecipeError(_plain(printed.getvalue())) from e
    mistakes = [mistake.sentence("--") for mistake in suspicious(changed.model_dump(), changed, ())]
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return changed


def _spell_switches(overrides: list[str], known: Mapping[str, Any]) -> list[str]:
    """Refuse unknown names, and turn ``--sft.enabled false`` into the switch that tyro knows."""
    arguments: list[str] = []
    names = {name.replace("-", "_"): name for name in known}
    i = 0
    while i < len(overrides):
        argument = overrides[i]
        i += 1
        if not re.match(r"--[A-Za-z]", argument) or argument == "--help":
            arguments.append(argument)
            continue
        raw, equals, value = argument[2:].partition("=")
        name = raw.replace("-", "_")
        negated = re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", name)
        if name not in names and not (negated != name and isinstance(known.get(negated), bool)):
            if renamed := new_name(name):
                raise RecipeError(f"--{raw}: unknown setting. It is now called --{renamed}.")
            match = nearest(name, list(names))
            last_words = {n.rsplit(".", 1)[-1]: n for n in names}
            if match is None or (match.rpartition(".")[0] != name.rpartition(".")[0] and name in last_words):
                match = last_words.get(name, match)
            hint = f"Did you mean --{match}?" if match else "--help lists every setting."
            raise RecipeError(f"--{raw}: unknown setting. {hint}")
        if isinstance(known.get(names.get(name, "")), bool):
            word = value if equals else (overrides[i] if i < len(overrides) else "")
            if equals or (word and not word.startswith("-")):
                switch = _SWITCHES.get(word.lower())
                if switch is None:
                    raise RecipeError(f"--{raw}: expected true or false, got {word!r}.")
                i += not equals
                name = name if switch else re.sub(r"[^.]+$", r"no_\g<0>", name)
            arguments.append(f"--{name.replace('_', '-')}")
        else:
            arguments.append(argument)
    return arguments


def _plain(boxed: str) -> str:
    """Return tyro's message without its frame, its title and its pointers."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    title, rule, rest = text.partition("-" * 20)  # the title says again what the message does
    text = rest if rule and len(title.split("\n")) == 2 else text
    rows = [row.strip().strip("│").strip() for row in text.splitlines()]
    rows = [row for row in rows if row and not re.match(r"^[╭╰─]", row)]
    joined = " ".join(rows)
    joined = re.split(r"For full helptext|Argument helptext:", joined)[0]
    joined = re.sub(r"For further information visit \S+", "", joined)
    joined = re.sub(r"\[type=[^\]]*\]|[─-]{5,}", "", joined)
    return re.sub(r"\s+", " ", joined).strip()
