"""`ril report`: write one page that shows run folders, and opens without a network."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from openril.errors import OpenRILError
from openril.report.document import GROUPS, MOST_BYTES, build_document
from openril.report.html import render_page
from openril.report.progress import say
from openril.storage import write_text

PAGE = "report.html"


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser(
        "ril report",
        usage="ril report RUN_DIR [RUN_DIR ...] [--out FILE] [--groups N | --all] [--audit FILE]",
        description="Write report.html: curves, evaluations, groups with their pictures, discriminator and judge of a run.",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("runs", metavar="RUN_DIR", type=Path, nargs="+", help="a run folder; with several the page compares them")
    add("--out", metavar="FILE", type=Path, help=f"the file to write; default: {PAGE} in the first run folder")
    add(
        "--groups",
        metavar="N",
        type=_count,
        default=GROUPS,
        help=f"the most groups of each run to show; default: {GROUPS}",
    )
    text = f"show every group, also above the size of {MOST_BYTES / 1e6:.0f} MB that a page has otherwise"
    add("--all", action="store_true", help=text)
    add("--audit", metavar="FILE", type=Path, help="fold in ticks that the page exported")
    return p


def run_report(arguments: Sequence[str], console: Console) -> int:
    """Write the page of the run folders that the arguments name.

    Raises:
        DataError: A folder is no run, or a line of its rollouts cannot be read.
    """
    chosen = parser().parse_args(list(arguments))
    out: Path = chosen.out or chosen.runs[0] / PAGE
    if out.is_dir():
        out = out / PAGE
    say(console, write_report(chosen.runs, out, groups=None if chosen.all else chosen.groups, ticks=chosen.audit))
    return 0


def write_report(
    run_dirs: Sequence[Path],
    out: Path,
    *,
    groups: int | None = GROUPS,
    ticks: Path | None = None,
    warn: Callable[[str], None] | None = None,
) -> str:
    """Write a page and return a line that says where it is and how much it shows.

    Args:
        groups: The most groups of each run to show; None for all, whatever the size of the page.
        warn: Receives a message for each line that cannot be read, which otherwise raises DataError.
    """
    most_bytes = MOST_BYTES if groups is not None else None
    document = build_document(run_dirs, groups=groups, most_bytes=most_bytes, ticks=ticks, warn=warn)
    page = render_page(document)
    try:
        write_text(out, page)
    except OSError as e:
        raise OpenRILError(f"--out {out}: expected a file that can be written, got an error: {e.strerror or e}.") from e
    shown, total = document["shown"], document["total"]
    more = "" if shown == total else " (--groups N or --all shows more)"
    return f"report: {out}, {len(page.encode()) / 1e6:.1f} MB, showing {shown} of {total} groups{more}"


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


class TrainingReport:
    """Writes the page of a run while it trains. A mistake in it is a warning, and never stops the run."""

    def __init__(self, run_dir: Path, every: int, warn: Callable[[str], None]) -> None:
        self.run_dir, self.every, self.warn = run_dir, every, warn

    def step(self, step: int) -> None:
        """Write the page again if ``train.report_every`` asks for it at this step."""
        if self.every and step % self.every == 0:
            self.write()

    def write(self) -> str:
        """Write the page and return a line about it, or warn and return ""."""
        problems: list[str] = []
        line = ""
        try:
            line = write_report([self.run_dir], self.run_dir / PAGE, warn=problems.append)
        except Exception as e:
            problems.append(f"{PAGE} of {self.run_dir} cannot be written ({type(e).__name__}: {e}).")
        for problem in problems[:3]:
            self.warn(f"report: {problem}")
        return line
