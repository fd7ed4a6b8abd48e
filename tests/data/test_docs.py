"""The table of data forms in docs/data.md says what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from openril.data.preflight import Report, preflight
from openril.recipe.schema import DataConfig

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TABLE = PAGE.split("<!-- run by tests/data/test_docs.py -->")[1].split("\n## ")[0]
FORMS = re.findall(r"^\| (.*?) \| `(\{.*?\})` \| (.*?) \|$", TABLE, re.M)
FORMATS = ("question", "prompt", "messages", "conversations", "instruction", "texts")


def check(folder: Path, example: str) -> Report:
    row: dict[str, Any] = json.loads(example)
    row = row if any(name in row for name in FORMATS) else {"question": "Which?"} | row
    (folder / "q.jsonl").write_text(json.dumps(row))
    mapped = {"question": "texts"} if "texts" in row else {}
    return preflight(DataConfig(train=[str(folder / "q.jsonl")], columns=mapped))


def test_every_line_of_the_table_is_tried() -> None:
    assert len(FORMS) == len(re.findall(r"^\| ", TABLE, re.M)) - 1 > 30


@pytest.mark.parametrize(("form", "example", "outcome"), FORMS)
def test_forms_have_the_outcome_of_the_table(tmp_path: Path, form: str, example: str, outcome: str) -> None:
    report = check(tmp_path, example)
    # The images of the examples do not exist, which is not what the table is about.
    errors = [p for p in report.errors if p.kind not in ("missing image", "corrupt image")]
    counted = report.warnings or any(
        (report.dropped_turns, report.dropped_images, report.num_system, report.num_several_answers)
    )
    assert bool(errors) == outcome.startswith("refused"), errors
    assert bool(counted) == ("counted" in outcome), report
    if "read" in outcome:
        assert report.num_questions == 1 and not set(report.columns_kept) - {"decoded_image", "reward_model"}
