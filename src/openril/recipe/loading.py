"""A recipe from a YAML file and dotted overrides, and back to YAML. Imports no torch.

A recipe file may start from another one: ``base: other.yaml`` (relative to the file that says so). Sections are merged
key by key, lists are replaced whole, and an empty key (``null``) takes the schema's default again. Every other relative
path in a recipe (run_dir, cache_dir, data files, model folders) counts from the current directory, so that one recipe
serves several run folders.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from openril import storage
from openril.errors import RecipeError
from openril.recipe.overrides import override
from openril.recipe.schema import Recipe
from openril.recipe.validation import RENAMED_KEYS, KeyPath, describe, nearest, setting_names, validate

BASE = "base"
"""Key of a recipe file that names the file it starts from; not part of the resolved recipe."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), prog: str = "ril COMMAND RECIPE") -> Recipe:
    """Read a recipe file and apply command-line overrides such as ``["--train.beta", "0.02"]``.

    overrides: ``--section.key value`` or ``--section.key=value``; switches take ``--sft.enabled``, ``--sft.no-enabled``
    or a word (``--sft.enabled false``); lists take several values; an entry of a list in the file is reached by its
    number (``--teachers.0.model name``). ``--help`` prints every setting and raises SystemExit(0). prog: how the help
    text calls the command.

    Raises RecipeError with every problem found: file, line, key, what was found, what is wanted.
    """
    path = Path(path).expanduser()
    values, lines = _read(path, ())
    where = {key: f"{file}:{line}" for key, (file, line) in lines.items()}
    recipe = validate(values, str(path), where)
    if overrides:
        recipe = override(recipe, list(overrides), prog)
    _refuse_secrets(recipe, str(path))
    return recipe


def load_saved_recipe(path: str | Path) -> Recipe:
    """Read a recipe that a run saved in its own folder, also one whose settings had earlier names.

    Raises:
        RecipeError: As for ``load_recipe``.
    """
    path = Path(path)
    values, lines = _read(path, ())
    for old, new in RENAMED_KEYS.items():
        *sections, last = old.split(".")
        section: Any = values
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            section[new.rsplit(".", 1)[-1]] = section.pop(last)
    return validate(values, str(path), {key: f"{file}:{line}" for key, (file, line) in lines.items()})


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe, every setting spelled out; ``load_recipe`` reads back an equal one.

    Keys of servers are named by environment variable in a recipe, so none is ever written.
    """
    _refuse_secrets(recipe, "recipe")
    text = io.StringIO("# Every setting of this run. Written by ril; usable as a recipe again.\n")
    text.seek(0, io.SEEK_END)
    _yaml().dump(recipe.model_dump(mode="json"), text)
    storage.write_text(Path(path), text.getvalue())


# YAML


class _Constructor(SafeConstructor):
    """Plain values only. A date stays text, for instance in the name of a run folder."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    """Writes 1.0e-05 where YAML 1.2 allows 1e-05, because readers of YAML 1.1 take the latter for text."""

    def represent_float(self, data: Any) -> Any:
        node = super().represent_float(data)
        node.value = re.sub(r"^(-?\d+)e", r"\1.0e", node.value)
        return node


_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # version 1.2: only true and false are booleans, and 1e-6 is a number
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.default_flow_style, yaml.width = False, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


Lines = dict[KeyPath, tuple[str, int]]


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Lines]:
    """Values of a recipe file merged over its base, and where each key was written."""
    if path.resolve() in chain:
        raise RecipeError(f"{path}: recipes are each other's base: {' -> '.join(str(p) for p in (*chain, path))}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe" + _similar_file(path)) from None
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read ({e})") from e
    lines: Lines = {}
    try:
        node = _yaml().compose(text)
        if node is not None:
            _note_lines(node, (), str(path), lines, set())
        values = _yaml().load(text)
    except YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{path}{line}: not YAML: {getattr(e, 'problem', None) or e}") from e
    except (RecursionError, ValueError) as e:
        raise RecipeError(f"{path}: cannot be read as YAML ({e})") from e
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (data:, student:, ...); found {describe(values)}")
    base = values.pop(BASE, None)
    if base is None:
        return values, lines
    if not isinstance(base, str) or not base:
        raise RecipeError(f"{path}: base: {describe(base)} found; the path of another recipe is wanted")
    base_path = (path.parent / Path(base).expanduser()).resolve()
    if not base_path.is_file():
        raise RecipeError(f"{path}: base: no such recipe: {base_path}" + _similar_file(base_path))
    base_values, base_lines = _read(base_path, (*chain, path.resolve()))
    return _merge(base_values, values), {**base_lines, **lines}


def _similar_file(path: Path) -> str:
    if path.is_dir() or not path.parent.is_dir():
        return ""
    match = nearest(path.name, [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")])
    return f"; did you mean {path.parent / match}?" if match else ""


def _note_lines(node: Node, key: KeyPath, file: str, lines: Lines, above: set[int]) -> None:
    """Record file and line of every key; refuse keys written twice, of which YAML would silently keep the last."""
    if id(node) in above:
        raise MarkedYAMLError(problem="an anchor that holds itself", problem_mark=node.start_mark)
    above = above | {id(node)}
    if isinstance(node, MappingNode):
        seen: set[str] = set()
        for name_node, value_node in node.value:
            name = name_node.value if isinstance(name_node, ScalarNode) else str(name_node.value)
            if name in seen:
                raise MarkedYAMLError(problem=f"key {name!r} is written twice", problem_mark=name_node.start_mark)
            seen.add(name)
            lines[(*key, name)] = (file, name_node.start_mark.line + 1)
            _note_lines(value_node, (*key, name), file, lines, above)
    elif isinstance(node, SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*key, i)] = (file, item.start_mark.line + 1)
            _note_lines(item, (*key, i), file, lines, above)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _refuse_secrets(recipe: Recipe, file: str) -> None:
    """Keys belong into the environment: refuse one that was pasted into the recipe, without repeating it."""
    for name, endpoint in [("judge", recipe.judge), *((f"teachers.{i}", t) for i, t in enumerate(recipe.teachers))]:
        if endpoint.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", endpoint.api_key_env):
            raise RecipeError(
                f"{file}: {name}.api_key_env: the name of an environment variable is wanted, like OPENAI_API_KEY; "
                "what is there looks like the key itself. Export it under a name and write that name here"
            )
        if any(re.match(r"^[a-z]+://[^/]*@", url) for url in endpoint.base_urls):
            raise RecipeError(f"{file}: {name}.base_urls: a URL holds a user name or password; use api_key_env instead")
        for field, value in endpoint.extra_body.items():
            names = " ".join([field, *re.findall(r'"([^"]*)"\s*:', value if isinstance(value, str) else "")])
            if re.search(r"api_?key|authorization|password|secret", names, re.IGNORECASE):
                raise RecipeError(
                    f"{file}: {name}.extra_body.{field} would be written to the run folder; use api_key_env"
                )


__all__ = ["load_recipe", "load_saved_recipe", "nearest", "save_recipe", "setting_names"]
