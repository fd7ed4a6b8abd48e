"""Write a few groups of a step as tables with their pictures into the trackers of ``train.log_to``."""

from __future__ import annotations

import html
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from openril.data.images import load_image
from openril.errors import DataError
from openril.records import Group, ImageSource, Question
from openril.rewards.extraction import extracted_answer

GROUPS = 4
"""Groups in the table of a step: the first ones of its batch, which is a random one."""
LONGEST_TEXT = 4000
"""Characters of a text in a table."""
LONGEST_SIDE = 256
"""Longest side of a picture in pixels."""
NAME = "groups"
COLUMNS = (
    "step", "group", "question_id", "question", "truth", "picture", "source", "verdict", "reward", "advantage", "student_prob",
    "similarity", "tokens", "finish_reason", "extracted", "text", "explanation",
)  # fmt: skip

Row = dict[str, Any]


def log_groups(
    trackers: Sequence[GeneralTracker], step: int, groups: Sequence[Group], questions: Mapping[str, Question]
) -> None:
    """Write the first groups of a step into every tracker.

    Args:
        questions: The questions with their pictures, by id.
    """
    rows = table_rows(step, groups[:GROUPS], questions)
    for tracker in trackers:
        if tracker.name == "tensorboard":
            _log_to_tensorboard(tracker.tracker, step, rows)
        else:
            _log_table(importlib.import_module(tracker.name), tracker.tracker, step, rows)


def table_rows(step: int, groups: Sequence[Group], questions: Mapping[str, Question]) -> list[Row]:
    """Return a row for each response, with the keys of ``COLUMNS``. ``picture``: an image, or None without one."""
    rows = []
    for number, group in enumerate(groups):
        q = group.question
        picture = picture_of(questions.get(q.id, q).images)
        about = {"step": step, "group": number, "question_id": q.id, "question": shorter(q.question)}
        about |= {"truth": shorter(" | ".join(q.answers)), "picture": picture}
        for r in group.rollouts:
            response = r.response
            row = {"source": response.source, "verdict": r.verdict, "reward": r.reward, "advantage": r.advantage}
            row |= {"student_prob": r.student_prob, "similarity": r.similarity, "finish_reason": response.finish_reason}
            row["tokens"] = None if response.token_ids is None else len(response.token_ids)
            row["extracted"] = shorter(extracted_answer(response.text) or "", 200)
            rows.append({**about, **row, "text": shorter(response.text), "explanation": shorter(r.explanation)})
    return rows


def picture_of(images: Sequence[ImageSource]) -> Image.Image | None:
    """Return the pictures of a question next to each other, reduced; None where none can be read."""
    pictures = []
    for source in images:
        try:
            picture = load_image(source)
        except DataError:  # a picture on the network, or one that has been removed
            continue
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        pictures.append(picture)
    if len(pictures) < 2:
        return pictures[0] if pictures else None
    joined = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        joined.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    return joined


def shorter(text: str, most: int = LONGEST_TEXT) -> str:
    """Return the beginning of a text, in characters that UTF-8 can hold."""
    text = text.encode("utf-8", "replace").decode().replace("\0", " ")
    return text if len(text) <= most else f"{text[:most]} ({len(text) - most} more characters)"


def _log_table(library: Any, run: Any, step: int, rows: Sequence[Row]) -> None:
    """Log the rows to W&B or Trackio, whose tables hold pictures in their cells."""
    pictures = {
        row["group"]: row["picture"] and library.Image(row["picture"]) for row in rows
    }  # one file for each group
    cells = [[pictures[row["group"]] if c == "picture" else row[c] for c in COLUMNS] for row in rows]
    table = library.Table(columns=list(COLUMNS), data=cells)
    run.log({NAME: table}, step=step)


def _log_to_tensorboard(writer: Any, step: int, rows: Sequence[Row]) -> None:
    """Log a Markdown table for each group, since TensorBoard has no tables, and its pictures next to it."""
    for number in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == number]
        writer.add_text(f"{NAME}/{number}", markdown(members), global_step=step)
        if members[0]["picture"] is not None:
            pixels = np.asarray(members[0]["picture"])
            writer.add_image(f"{NAME}/{number}", pixels, global_step=step, dataformats="HWC")
    writer.flush()


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows of one group as Markdown in which no text of a model or a data set is markup."""
    head, columns = ("question_id", "question", "truth"), COLUMNS[COLUMNS.index("source") :]
    lines = [f"{name}: {plain_cell(rows[0][name])}\n" for name in head]
    lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join(plain_cell(row[c]) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def plain_cell(value: Any) -> str:
    """Return a value as the text of a table's cell: HTML and Markdown in it stay visible and have no effect."""
    text = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    escaped = "".join(f"&#{ord(c)};" if c in "\\`*_{}[]()#+-.!|~:/" else c for c in html.escape(text))
    return "<br>".join(escaped.splitlines())
