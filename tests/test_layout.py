"""The layout of the package: what may import what, how large it may be, and what it exports."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import openril

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "openril"
PUBLIC_API = Path(__file__).parent / "public_api.txt"
FILES = sorted(PACKAGE.rglob("*.py"))

MOST_LINES = 33_500
MOST_LINES_OF_A_FILE = 450
LONGER_FILES = {"recipe/schema.py"}


def module_name(path: Path) -> str:
    """``openril.stages.train`` for its file; a package has the name of its folder."""
    parts = ("openril", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(tree: ast.Module, *, at_import_time: bool = False) -> Iterator[tuple[str, int]]:
    """Yield the full name of every imported module, with its line.

    ``from a import b`` yields ``a.b`` where that is a module, and ``a`` otherwise.

    Args:
        at_import_time: Leave out what runs later: imports inside functions and under ``if TYPE_CHECKING``.
    """
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        later |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import_time and later:
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: write imports with their full names"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else node.module), node.lineno


def declared_order() -> dict[str, int]:
    """The level of every package and module, from the table of packages in docs/overview.md (the first is lowest)."""
    lines = (ROOT / "docs" / "overview.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and "`errors.py`" in line)
    levels: dict[str, int] = {}
    for level, line in enumerate(lines[start:]):
        if not line.startswith("|"):
            break
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            levels[name.removesuffix(".py").strip("/")] = level
    return levels


def test_the_table_of_packages_names_each_of_them():
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert set(declared_order()) == there, "update the table of packages in docs/overview.md"


def test_a_package_imports_only_those_before_it():
    levels = declared_order()
    wrong = []
    for name, path in MODULES.items():
        if name == "openril":
            continue
        own = levels[name.split(".")[1]]
        for imported, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            top, *rest = imported.split(".")
            if top == "openril" and (not rest or levels[rest[0]] > own):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {imported}")
    assert not wrong, "\n".join(["these imports run back up the order of docs/overview.md:", *wrong])


def test_the_library_imports_nothing_from_the_playground():
    for path in FILES:
        for imported, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            assert imported.split(".")[0] not in ("playground", "tests"), f"{path}:{line} imports {imported}"


def test_files_do_not_import_each_other_in_a_circle():
    graph = {
        name: {m for m, _ in imports(ast.parse(path.read_text(encoding="utf-8")), at_import_time=True) if m in MODULES}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, f"a circle of imports: {' -> '.join([*chain[chain.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*chain, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_files_and_package_stay_small():
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    long = {p: n for p, n in lengths.items() if n > MOST_LINES_OF_A_FILE and p not in LONGER_FILES}
    assert not long, f"split these files: {long}"
    assert sum(lengths.values()) <= MOST_LINES, f"src/openril has {sum(lengths.values())} lines"


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.get("version", openril.__version__) == openril.__version__


def test_every_dependency_declares_the_lowest_version_it_is_tested_with():
    path = ROOT / "scripts" / "test_versions.py"
    spec = importlib.util.spec_from_file_location("versions_script", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    pins = script.lowest_pins()
    assert any(re.fullmatch(r"torch==[0-9.]+", pin) for pin in pins) and len(pins) == len(set(pins))
    assert [test for test in script.CORE_TESTS if not (ROOT / test).exists()] == []


def test_type_checkers_see_the_public_names():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert seen == {"__version__": "openril._version", **openril._WHERE}


def describe(name: str) -> str:
    """One line for a public name: a function's or a constructor's signature, or what else it is."""
    value = getattr(openril, name)
    if not callable(value):
        return f"{name}: {type(value).__name__}"
    if not inspect.isclass(value):
        return f"def {name}{inspect.signature(value)}"
    if issubclass(value, Exception):
        return f"class {name}({value.__base__.__name__})"
    signature = inspect.signature(value)
    if hasattr(value, "model_fields"):  # pydantic writes annotations in another form in each of its versions
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        signature = signature.replace(parameters=plain)
    return f"class {name}{re.sub(' at 0x[0-9a-f]+', '', str(signature))}"


def test_public_names_and_signatures_are_the_recorded_ones():
    now = [describe(name) for name in sorted(openril.__all__)]
    recorded = PUBLIC_API.read_text(encoding="utf-8").splitlines()
    gone = [f"- {line}" for line in recorded if line not in now]
    new = [f"+ {line}" for line in now if line not in recorded]
    update = "python tests/test_layout.py"
    assert not (gone or new), "\n".join(
        [f"the public interface changed; if that is meant, update {PUBLIC_API.name}: {update}", *gone, *new]
    )


if __name__ == "__main__":
    PUBLIC_API.write_text("".join(f"{describe(name)}\n" for name in sorted(openril.__all__)), encoding="utf-8")
