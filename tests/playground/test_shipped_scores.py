"""The scores that ship make the tables of their page in docs."""

from __future__ import annotations

import re
from pathlib import Path

from playground.comparison.archive import unpack
from playground.comparison.findings import Findings
from playground.comparison.tables import BLOCKS

ROOT = Path(__file__).resolve().parents[2]


def test_every_table_of_round_three_follows_from_its_scores(tmp_path: Path):
    cells = unpack(ROOT / "playground" / "comparison" / "scores" / "round_three.jsonl", tmp_path)
    assert cells > 50
    found = Findings(tmp_path).everything()
    page = (ROOT / "docs" / "study_round_three.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- generated: (\w+) -->\n(.*?)\n<!-- end: \1 -->", page, re.DOTALL)
    assert {name for name, _ in blocks} >= {"goals", "contenders", "steps", "regimes", "same_rate"}
    for name, text in blocks:
        if name in BLOCKS:  # the others are figures
            assert text == BLOCKS[name](found).rstrip(), name
