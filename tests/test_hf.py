"""Every import of transformers and TRL goes through openril.hf."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOOR = ROOT / "src" / "openril" / "hf.py"
TOOL = ROOT / "src" / "openril" / "export" / "compressed_tensors_tool.py"
"""Runs in an environment of llm-compressor, which does not have openril."""
STUB = DOOR.with_suffix(".pyi")
SOURCES = [
    p for folder in ("src", "playground") for p in sorted((ROOT / folder).rglob("*.py")) if p not in (DOOR, TOOL)
]


def imported(path: Path) -> list[tuple[str, str, int]]:
    """Module, name and line of every import of a file, also of those inside functions; the name may be empty."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out += [(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            out += [(node.module or "", alias.name, node.lineno) for alias in node.names]
    return out


def test_no_other_file_imports_transformers_or_trl():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in SOURCES
        for module, _, line in imported(path)
        if module.split(".")[0] in ("transformers", "trl")
    ]
    assert not wrong, "\n".join(["import these from openril.hf:", *wrong])


def test_names_imported_from_it_exist_and_those_of_trl_are_listed():
    """Type checkers take the names of transformers from the library, and those of TRL from the list in hf.pyi."""
    from openril import hf

    tests = sorted((ROOT / "tests").rglob("*.py"))
    used = {name for path in [*SOURCES, *tests] for module, name, _ in imported(path) if module == "openril.hf"}
    own = {"submodule", "transformers", "transformers_logging"}
    unknown = {name for name in used - own if not hasattr(hf.transformers, name)}
    listed = {name for module, name, _ in imported(STUB) if module == "trl"}
    assert unknown == listed == set(hf._FROM_TRL), f"correct the lists of TRL's names in {DOOR} and {STUB}"
    assert all(getattr(hf, name) for name in used)
