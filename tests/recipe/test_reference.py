"""The recipe reference is generated from the schema and current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from openril.recipe.validation import setting_names
from scripts import recipe_reference as reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipe_reference.md"


def rows() -> list[list[str]]:
    lines = [line for line in reference.markdown().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").replace("\\|", "\0").split("|")] for line in lines]


def test_the_page_is_current() -> None:
    assert reference.main([str(PAGE), "--check"]) == 0, "run python scripts/recipe_reference.py"


def test_an_old_page_is_reported_and_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    assert reference.main([str(page), "--check"]) == 1 and not page.exists()
    page.write_text("old")
    assert reference.main([str(page), "--check"]) == 1 and "page.md" in capsys.readouterr().err
    assert reference.main([str(page)]) == 0
    assert page.read_text(encoding="utf-8") == reference.markdown()


def test_every_setting_has_a_row_of_four_filled_cells() -> None:
    assert all(len(row) == 4 and all(row) for row in rows())
    keys = {row[0].strip("`") for row in rows()}
    assert set(setting_names()) - {"teachers", "rewards.functions"} <= keys
    assert {"teachers.0.name", "rewards.functions.0.weight"} <= keys


def test_types_and_defaults() -> None:
    by_key = {row[0]: row[1:3] for row in rows()}
    assert by_key["`train.beta`"] == ["number >= 0", "`0.01`"]
    assert by_key["`sft.optimizer.learning_rate`"] == ["number > 0", "`1e-05`"]
    assert by_key["`discriminator.loss`"] == ["`bce`, `bradley_terry`", '`"bce"`']
    assert by_key["`train.num_teacher_responses`"] == ["integer or null", "`null`"]
    assert by_key["`train.optimizer.betas`"] == ["list of 2 numbers", "`[0.9, 0.999]`"]
    assert by_key["`data.columns`"] == ["mapping of names to text", "`{}`"]


def test_cells_escape_pipes_and_line_breaks() -> None:
    assert reference._cell("a | b\n  c") == "a \\| b c"


def test_the_command_imports_no_torch() -> None:
    code = "import sys, scripts.recipe_reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
