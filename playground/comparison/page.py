"""Write results.json, the figure and the generated blocks of docs/study.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from openril.storage import write_json, write_text
from playground.comparison.figures import draw
from playground.comparison.findings import Findings
from playground.comparison.tables import BLOCKS
from playground.study.page import replace_blocks
from playground.study.tables import NOTHING

PAGE = Path(__file__).resolve().parents[2] / "docs" / "study.md"


def write_report(out: Path, say: Callable[[str], None]) -> None:
    """Write ``out/results.json`` and the page's blocks: of docs/study.md for runs/comparison, else of ``out/study.md``."""
    found = Findings(out).everything()
    write_json(out / "results.json", found)
    shipped = out.resolve() == (PAGE.parents[1] / "runs" / "comparison").resolve()
    page = PAGE if shipped else out / "study.md"
    text = (page if page.is_file() else PAGE).read_text(encoding="utf-8")
    blocks = {name: make(found) for name, make in BLOCKS.items()}
    blocks["figure_discriminators"] = draw(found, page.parent / "images" / "comparison") or NOTHING
    write_text(page, replace_blocks(text, blocks))
    say(f"report: {page} and {out / 'results.json'}")
