"""Curves of a run: what is drawn, what is skipped, and what the lines show."""

import json

import pytest
from PIL import Image

from openril.report.curves import draw_curves, series, smooth


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_a_run_leaves_both_figures(tmp_path):
    rows = [
        {"step": s, "reward/student_similarity": s / 30, "reward/student_answer": 0.5, "discriminator/accuracy": 0.7}
        for s in range(1, 31)
    ]
    rows[9]["eval/score"] = 0.6
    messages = []
    paths = draw_curves(write(tmp_path / "run", rows), messages.append)
    assert [p.name for p in paths] == ["learning.png", "health.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and len(set(image.convert("RGB").getdata())) > 20
    assert len(messages) == 1 and "KL" in messages[0] and "accuracy" not in messages[0]
    assert sorted(p.name for p in (tmp_path / "run/curves").iterdir()) == ["health.png", "learning.png"]


def test_panels_without_values_are_left_out(tmp_path):
    messages = []
    paths = draw_curves(write(tmp_path / "run", [{"step": 1, "train/kl": 0.1}]), messages.append)
    assert [p.name for p in paths] == ["health.png"]
    assert any("Similarity reward" in message for message in messages)


def test_an_empty_run_draws_nothing(tmp_path):
    assert draw_curves(tmp_path) == []
    assert not (tmp_path / "curves").exists()


def test_a_series_has_the_steps_with_a_finite_value():
    rows = [{"step": 1, "a": 1.0}, {"step": 2}, {"step": 3, "a": float("nan")}, {"step": 4, "a": 0}]
    assert series(rows, "a") == ([1, 4], [1.0, 0.0])


def test_smoothing_is_a_centered_mean():
    # ends have two of the three values: (0 + 3) / 2 and (6 + 3) / 2
    assert smooth([0.0, 3.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 4.0, 4.5])
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_a_series_reads_the_name_that_a_metric_had_in_earlier_runs():
    rows = [{"step": 1, "reward/student": 0.5}, {"step": 2, "train/reward": 0.75}]
    assert series(rows, "train/reward") == ([1, 2], [0.5, 0.75])
