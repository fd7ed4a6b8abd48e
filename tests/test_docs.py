"""The documentation is checked like code: links and anchors resolve, and commands and recipe keys exist."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import tyro
from pydantic import BaseModel
from ruamel.yaml import YAML

from openril.cli import COMMANDS, _options
from openril.errors import RecipeError
from openril.recipe.loading import load_recipe
from openril.recipe.overrides import override
from openril.recipe.schema import Recipe
from openril.stages.bench import parser as bench_parser
from openril.stages.export import parser as export_parser
from openril.stages.export import split_arguments
from openril.stages.report import parser as report_parser
from openril.stages.view import parser as view_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^ *```", re.M | re.S)
FILE_ENDINGS = ("md", "py", "yaml", "yml", "jsonl", "json", "parquet", "png", "svg", "html", "txt", "sh", "toml")
EXAMPLE = Recipe.model_validate({"teachers": [{"name": "a"}, {"name": "b"}], "rewards": {"functions": [{}]}})
"""What a reader's own recipe may hold: lists with entries, so that overrides such as teachers.0.model have a target."""


@dataclass(frozen=True)
class Command:
    """One command of a page. shown: for a transcript, the output that the page shows after it."""

    page: str
    text: str
    shown: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


# Links


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that both GitHub and the built site give to the page's headings."""
    github, site = set(), set()
    for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", page.read_text()), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.replace("`", "")).lower()
        plain = re.sub(r"[^\w\s-]", "", plain).strip()
        github.add(plain.replace(" ", "-"))
        site.add(re.sub(r"[-\s]+", "-", plain))
    return frozenset(github & site)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_anchors_resolve(page: Path):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: there is no such heading"


def test_every_page_is_in_the_navigation_once():
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry if isinstance(entry, list) else entry.values():
                yield from pages(value)

    navigation = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(navigation)) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_tables_of_questions_name_every_page(page: str):
    linked = {Path(target).name for target in re.findall(r"\]\(([\w/]+\.md)\)", (ROOT / page).read_text())}
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


# Commands


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for _, language, block in FENCE.findall(text):
            if language in ("", "bash", "sh", "console", "text"):
                found += list(_commands_of_block(page_name(page), block))
        for inline in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
            if re.match(r"(ril|make|torchrun|accelerate launch|python -m|python scripts/\S+) +\S", inline):
                found.append(Command(page_name(page), inline))
    return found


def _commands_of_block(page: str, block: str) -> Iterator[Command]:
    lines = re.sub(r"\\\n", " ", block).splitlines()
    transcript = any(line.lstrip().startswith("$ ") for line in lines)
    for i, line in enumerate(lines):
        line = line.strip()
        if transcript and not line.startswith("$ "):
            continue
        line = re.sub(r"^\$ ", "", line)
        line = re.sub(r"^(\w+=\S* )+", "", line)
        first = line.split(" ")[0]
        if first in ("ril", "make", "torchrun", "accelerate", "python") or first.startswith(".venv/bin/"):
            yield Command(page, line, "\n".join(lines[i + 1 :]) if transcript else "")


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch):
    words = shlex.split(command.text, comments=True)
    words = [w for w in words if w not in ("...", "&")]
    if "openril.cli" in words:  # a launcher, or `python -m openril.cli`
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        words = ["ril", *words[words.index("openril.cli") + 1 :]]
    program = words[0].removeprefix(".venv/bin/")
    if program == "ril":
        try:
            _understand_ril(words[1:])
        except RecipeError as e:
            if not command.shown:
                raise
            key = str(e).split(":")[0]
            assert key in command.shown, f"the page does not show this error: {e}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
    elif program == "python" and words[1] == "-m":
        if words[2] == "pytest":
            assert all((ROOT / w).exists() for w in words[3:] if w.startswith("tests"))
        elif words[2] not in ("venv", "pip"):
            _parse_only(words[2], words[3:], monkeypatch)
    elif program == "python" and words[1].endswith(".py"):
        _parse_only(words[1], words[2:], monkeypatch)
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    else:
        assert program in ("torchrun", "accelerate"), "this program is not known here; add it if it is right"
        assert len(words) == 2 and words[1] == "launch" if program == "accelerate" else len(words) == 1


def _understand_ril(words: list[str]) -> None:
    if not words or words[0] in ("--help", "--version", "COMMAND"):
        return
    command = COMMANDS[words[0]]
    if not words[1:]:
        return  # its name alone
    if not command.takes_recipe:
        parse = {"bench": bench_parser, "export": export_parser, "report": report_parser, "view": view_parser}[
            words[0]
        ]().parse_args
        parse(split_arguments(words[1:])[0] if words[0] == "export" else words[1:])
        return
    rest, _ = _options(command, words[1:])
    if not rest or rest == ["--help"]:
        return
    path, overrides = rest[0], rest[1:]
    if path.isupper() or path.startswith("runs/") or Path(path).name in ("my.yaml", "mine.yaml"):
        override(EXAMPLE, overrides, "ril")  # the reader's own recipe, or one that a run leaves
    else:
        load_recipe(ROOT / path, overrides)


class _ParsedError(Exception):
    """Raised in place of what a command would do after it has parsed its arguments."""


def _parse_only(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the module and let its ``main`` parse the arguments, and nothing more."""

    def then_stop(parse: Any) -> Any:
        def parse_and_stop(*args: Any, **kwargs: Any) -> None:
            parse(*args, **kwargs)
            raise _ParsedError

        return parse_and_stop

    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module).stem, ROOT / module)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        has_main = importlib.util.find_spec(f"{module}.__main__") if _is_package(module) else None
        loaded = importlib.import_module(f"{module}.__main__" if has_main else module)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(tyro, "cli", then_stop(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
    with pytest.raises(_ParsedError):
        loaded.main()


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    return spec.submodule_search_locations is not None


# Recipe keys


def _names_a_setting(model: Any, names: list[str]) -> bool:
    """Whether the dotted path ``names`` leads to a field of the model, through sections and lists of sections."""
    if not names:
        return True
    sections = [m for m in (model, *get_args(model)) if isinstance(m, type) and issubclass(m, BaseModel)]
    if not sections:
        return False
    rest = names[1:] if names[0] == "N" or names[0].isdigit() else names
    if not rest:
        return True
    field = sections[0].model_fields.get(rest[0].replace("-", "_"))
    return field is not None and _names_a_setting(field.annotation, rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_recipe_keys_exist(page: Path):
    text = page.read_text()
    sections = "|".join(Recipe.model_fields)
    for key in re.findall(rf"(?<![\w./-])((?:{sections})\.[\w.]*\w)(?![\w/*(-])", FENCE.sub("", text)):
        if key.rpartition(".")[2] not in FILE_ENDINGS:
            assert _names_a_setting(Recipe, key.split(".")), f"{key} is no key of a recipe"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_yaml_examples_are_parts_of_a_recipe(page: Path):
    for _, language, block in FENCE.findall(page.read_text()):
        if language == "yaml":
            Recipe.model_validate({k: v for k, v in YAML(typ="safe").load(block).items() if k != "base"})
