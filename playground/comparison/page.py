"""Write results.json, the figure and the generated blocks of the pages in docs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from openril.storage import write_json, write_text
from playground.comparison.archive import pack
from playground.comparison.figures import draw
from playground.comparison.findings import Findings
from playground.comparison.tables import BLOCKS
from playground.study.page import replace_blocks
from playground.study.tables import NOTHING

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"comparison": "study.md", "comparison_2": "study_round_two.md", "comparison_3": "study_round_three.md"}
"""Page in docs by the comparison's folder in runs."""


def write_report(out: Path, say: Callable[[str], None]) -> None:
    """Write ``out/results.json``, ``out/scores.jsonl`` and the blocks of a page.

    The page is that in docs for a folder of ``PAGES``, else one in ``out``, which begins as a copy of docs/study.md.
    """
    found = Findings(out).everything()
    write_json(out / "results.json", found)
    pack(out, out / "scores.jsonl")
    shipped = out.resolve().parent == (ROOT / "runs").resolve() and out.name in PAGES
    docs = ROOT / "docs"
    page = docs / PAGES[out.name] if shipped else out / "study.md"
    text = (page if page.is_file() else docs / "study.md").read_text(encoding="utf-8")
    blocks = {name: make(found) for name, make in BLOCKS.items()}
    # A folder for each comparison, because two pages of docs have the figure.
    blocks["figure_discriminators"] = draw(found, page.parent / "images" / out.name) or NOTHING
    write_text(page, replace_blocks(text, blocks))
    say(f"report: {page} and {out / 'results.json'}")
