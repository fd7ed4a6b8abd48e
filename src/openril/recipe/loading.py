"""Load a recipe from a YAML file and command-line overrides, and save it. This module does not import torch.

A recipe file may be based on others: ``base: other.yaml`` or ``base: [method.yaml, mine.yaml]``, relative to the file
that contains the line. Of several, the later one counts. Sections are merged key by key, lists are replaced as a whole,
and an empty key (``null``) restores the default of the schema. All other relative paths in a recipe (run_dir, cache_dir,
data files, model folders) start at the current directory, so that one recipe serves several run folders.
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
from openril.recipe.validation import RENAMED_KEYS, KeyPath, describe, nearest, validate

BASE = "base"
"""Key that names the recipes a file is based on. It is not part of the resolved recipe."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), prog: str = "ril COMMAND RECIPE") -> Recipe:
    """Load a recipe file and apply command-line overrides.

    Args:
        path: Path of the recipe.
        overrides: Options such as ``["--train.beta", "0.02"]`` or ``["--train.beta=0.02"]``. Switches are written
            ``--sft.enabled``, ``--sft.no-enabled`` or ``--sft.enabled false``; lists take several values; an entry of a
            list in the file is addressed by its number (``--teachers.0.model name``). ``--help`` prints every setting and
            raises SystemExit(0).
        prog: Name of the command in the help text.

    Raises:
        RecipeError: With every mistake: key, what was expected, what was found, file and line.
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
    """Load a recipe that a run saved in its folder, even if its settings have earlier names."""
    path = Path(path)
    values, lines = _read(path, ())
    for old, new in RENAMED_KEYS.items():
        *sections, last = old.split(".")
        section: Any = values
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            value, (*sections, last) = section.pop(last), new.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
    return validate(values, str(path), {key: f"{file}:{line}" for key, (file, line) in lines.items()})


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe with every setting, so that ``load_recipe`` returns an equal one.

    A recipe names the environment variables of API keys, so no key is ever written.
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
    """Return the values of a recipe file, merged over those of its bases, and the place of each key."""
    if path.resolve() in chain:
        raise RecipeError(f"base: recipes are based on each other: {' -> '.join(map(str, (*chain, path)))}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe.{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: expected a text file in UTF-8, got an error: {e}") from e
    lines: Lines = {}
    try:
        node = _yaml().compose(text)
        if node is not None:
            _note_lines(node, (), str(path), lines, set())
        values = _yaml().load(text)
    except YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {getattr(e, 'problem', None) or e}.") from e
    except (RecursionError, ValueError) as e:
        raise RecipeError(f"{path}: not valid YAML: {e}.") from e
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected sections (data:, student:, ...), got {describe(values)}.")
    bases = values.pop(BASE, None)
    merged: dict[str, Any] = {}
    all_lines: Lines = {}
    for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
        if not isinstance(base, str) or not base:
            raise RecipeError(
                f"base: expected the path of another recipe or a list of them, got {describe(base)} ({path})."
            )
        base_path = (path.parent / Path(base).expanduser()).resolve()
        if not base_path.is_file():
            raise RecipeError(f"base: no such recipe: {base_path} ({path}).{_similar_file(base_path)}")
        base_values, base_lines = _read(base_path, (*chain, path.resolve()))
        merged, all_lines = _merge(merged, base_values), {**all_lines, **base_lines}
    return _merge(merged, values), {**all_lines, **lines}


def _similar_file(path: Path) -> str:
    if path.is_dir() or not path.parent.is_dir():
        return ""
    match = nearest(path.name, [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")])
    return f" Did you mean {path.parent / match}?" if match else ""


def _note_lines(node: Node, key: KeyPath, file: str, lines: Lines, above: set[int]) -> None:
    """Record file and line of every key, and refuse duplicate keys. Messages must not contain values: they may be secret."""
    if id(node) in above:
        raise MarkedYAMLError(problem="an anchor contains itself", problem_mark=node.start_mark)
    above = above | {id(node)}
    if isinstance(node, MappingNode):
        seen: set[str] = set()
        for name_node, value_node in node.value:
            name = name_node.value if isinstance(name_node, ScalarNode) else str(name_node.value)
            if name in seen:
                raise MarkedYAMLError(problem=f"duplicate key {name!r}", problem_mark=name_node.start_mark)
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
    """Refuse API keys that were pasted into the recipe, without repeating them in the message."""
    endpoints = {"judge": recipe.judge, "student.sampler": recipe.student.sampler.endpoint}
    for name, endpoint in {**endpoints, **{f"teachers.{i}": t for i, t in enumerate(recipe.teachers)}}.items():
        if endpoint.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", endpoint.api_key_env):
            raise RecipeError(
                f"{name}.api_key_env: expected the name of an environment variable such as OPENAI_API_KEY, got what looks "
                f"like the key itself ({file}). Export the key under a name, and write that name in the recipe."
            )
        if any(re.match(r"^[a-z]+://[^/]*@", url) for url in endpoint.base_urls):
            raise RecipeError(f"{name}.base_urls: a URL contains a user name or password ({file}). Use api_key_env.")
        for field, value in endpoint.extra_body.items():
            names = " ".join([field, *re.findall(r'"([^"]*)"\s*:', value if isinstance(value, str) else "")])
            if re.search(r"api_?key|authorization|password|secret", names, re.IGNORECASE):
                raise RecipeError(
                    f"{name}.extra_body.{field}: a secret would be written to the run folder ({file}). Use api_key_env."
                )
