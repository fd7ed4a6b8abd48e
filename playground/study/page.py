"""Write results.json, the figures, and the generated blocks of the study's page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openril.errors import DataError
from openril.storage import write_json, write_text
from playground.study.findings import Findings
from playground.study.jobs import read_done
from playground.study.scores import read_results
from playground.study.tables import BLOCKS, NOTHING
from playground.study.work import DONE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "study_first.md"
BEGIN, END = "<!-- generated: {} -->", "<!-- end: {} -->"


def default_page(out: Path, split: str) -> Path:
    """Return docs/study_first.md for the shipped study, and study.md in its folder for any other one and for validation."""
    shipped = out.resolve() == (PAGE.parents[1] / "runs" / "study").resolve() and split == "test"
    return PAGE if shipped else out / "study.md"


def write_report(out: Path, page: Path, resamples: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Write ``out/results.json``, the figures and the page's blocks from the finished cells; returns the findings.

    A new page begins as a copy of docs/study_first.md. Raises DataError when nothing is finished.
    """
    from playground.study.figures import draw_figures

    results = read_results(out)
    found = Findings(results, resamples).everything()
    done = [d for path in sorted(out.rglob(DONE)) if (d := read_done(path.parent)) is not None]
    found["jobs"], found["hours"] = len(done), sum(d["seconds"] for d in done) / 3600
    found["split"] = json.loads((out / "study.json").read_text(encoding="utf-8"))["split"]
    write_json(out / "results.json", found)
    text = (page if page.is_file() else PAGE).read_text(encoding="utf-8")
    images = page.parent / "images" / "study"
    drawn = draw_figures(results, found, images)
    blocks = {name: make(found) for name, make in BLOCKS.items()}
    blocks |= {
        name: NOTHING if path is None else f"![{title}](images/study/{path.name})\n"
        for name, (title, path) in drawn.items()
    }
    write_text(page, replace_blocks(text, blocks))
    say(
        f"report: {page}, {out / 'results.json'}, {sum(path is not None for _, path in drawn.values())} figures in {images}"
    )
    return found


def replace_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """Replace the text between the markers of each given block. Raises DataError for a marker without its end."""
    for name, content in blocks.items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin in text:
            if end not in text[text.index(begin) :]:
                raise DataError(f"the page has {begin} without {end} after it")
            pattern = re.escape(begin) + r".*?" + re.escape(end)
            text = re.sub(pattern, lambda _: f"{begin}\n{content.rstrip()}\n{end}", text, count=1, flags=re.DOTALL)  # noqa: B023
    return text
