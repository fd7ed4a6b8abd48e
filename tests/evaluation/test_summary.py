"""Scores, standard errors, groups and paired differences, against numbers computed by hand."""

import math

import pytest

from openril.evaluation.summary import Row, build_evaluation, compare, groups_of, mean_and_error
from openril.evaluation.table import cells, markdown_table, rich_table


def row(number, score, **more):
    return Row(question_id=f"q{number}", question="?", answer="a", text="t", score=score, **more)


def evaluation(*scores, name="x", groups=None):
    rows = [row(i, s, groups=groups[i] if groups else {}) for i, s in enumerate(scores)]
    return build_evaluation(name, "folder", rows)


def test_mean_and_standard_error():
    # 1, 1, 0, 0: mean 1/2, sample variance 4 * 1/4 / 3 = 1/3, error sqrt(1/3 / 4)
    assert mean_and_error([1, 1, 0, 0]) == (0.5, pytest.approx(math.sqrt(1 / 12)))
    assert mean_and_error([1.0]) == (1.0, None)
    assert mean_and_error([]) == (None, None)


def test_unknown_scores_are_outside_the_mean_and_counted():
    rows = [row(0, 1.0), row(1, None), row(2, 0.0, parsed=False), row(3, 1.0, finish_reason="length")]
    summary = build_evaluation("x", "", rows).summary
    assert summary.score == pytest.approx(2 / 3)
    assert (summary.n, summary.unknown, summary.unparsed, summary.cut) == (4, 1, 1, 1)


def test_groups_and_their_unweighted_mean():
    groups = [{"benchmark": "ai2d"}, {"benchmark": "ai2d"}, {"benchmark": "ai2d"}, {"benchmark": "blink"}]
    e = evaluation(1.0, 1.0, 0.0, 0.0, groups=groups)
    assert e.summary.score == 0.5
    assert e.groups["benchmark"]["ai2d"].score == pytest.approx(2 / 3)
    assert e.group_means == {"benchmark": pytest.approx(1 / 3)}  # (2/3 + 0) / 2
    assert groups_of({"benchmark": "ai2d", "skill": None, "source": "web"}) == {"benchmark": "ai2d"}


def test_a_paired_difference_has_less_error_than_two_means():
    a = evaluation(0, 0, 1, 1, None, name="a")
    b = evaluation(0, 1, 1, 1, 1, name="b")
    c = compare(a, b)
    # differences 0, 1, 0, 0 (the fifth is unknown in a): mean 1/4, sample variance (3/16 + 9/16) / 3 = 1/4
    assert (c.n, c.difference, c.standard_error) == (4, 0.25, pytest.approx(math.sqrt(0.25 / 4)))
    assert (c.better, c.worse) == (1, 0)


def test_questions_missing_on_one_side_are_not_compared():
    a, b = evaluation(1.0), evaluation(1.0, 0.0)
    assert compare(a, b).n == 1 and compare(a, b).standard_error is None


def test_the_table_shows_percent_errors_and_gains():
    base, trained = evaluation(0, 0, 1, 1, name="base"), evaluation(0, 1, 1, 1, name="final")
    header, rows = cells([base, trained])
    assert header[:3] == ["checkpoint", "score", "gain over base"]
    assert rows[0][:3] == ["base", "50.0 ± 28.9", ""]
    assert rows[1][:3] == ["final", "75.0 ± 25.0", "+25.0 ± 25.0"]
    assert markdown_table([base, trained]).splitlines()[3].startswith("| final | 75.0 ± 25.0 | +25.0 ± 25.0 | 4 |")


def test_many_groups_are_left_out_on_the_terminal_but_not_in_the_file():
    groups = [{"skill": f"s{i}"} for i in range(9)]
    e = evaluation(*[1.0] * 9, groups=groups)
    assert cells([e], 8)[0][-1] == "mean over skills" and "s3" not in cells([e], 8)[0]
    assert "s3" in markdown_table([e])


def test_groups_have_columns_only_where_the_terminal_is_wide_enough():
    groups = [{"skill": f"a long skill {i}"} for i in range(6)]
    e = evaluation(*[1.0] * 6, groups=groups)
    wide, narrow = rich_table([e], 200), rich_table([e], 100)
    assert len(wide.columns) == len(narrow.columns) + 6
    assert wide.caption is None and "table.md" in str(narrow.caption)
    # checkpoint, score, gain over NAME, unknown, mean over skills: 10 + 11 + 14 + 7 + 16 characters, 3 more each, and 1
    narrower = rich_table([e], 74)
    names = [str(column.header) for column in narrower.columns]
    assert names == ["checkpoint", "score", f"gain over {e.name}", "unknown", "mean over skills"]
    assert "table.md" in str(narrower.caption)
