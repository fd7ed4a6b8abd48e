"""Groups and flags from rollout rows, of both versions and with hostile content."""

from __future__ import annotations

import json

import pytest

from openril.errors import DataError
from openril.report.rollouts import FLAGS, build_groups, group_flags, read_row, read_step, split_groups, step_files


def row(**fields):
    old = {"step": 3, "question_id": "q", "question": "?", "images": [], "answer": "a", "source": "student", "index": 0}
    return {"schema": 1, "group": None, **old, "text": "a", "rewards": {}, "advantage": 0.0, **fields}


def member(source="student", **fields):
    known = {"source": source, "student_prob": None, "similarity": None, "verdict": None, "rewards": {}}
    return {**known, "advantage": 0.0, "finish_reason": "stop", **fields}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([member(verdict=1.0, advantage=0.5), member(verdict=1.0), member("a", verdict=0.0)], ["all_right"]),
        ([member(verdict=0.0, advantage=0.5), member(verdict=0.0)], ["all_wrong"]),
        ([member(verdict=0.0, advantage=0.5), member(verdict=None)], []),  # unknown, but no answer was scored
        ([member(rewards={"answer": None}, advantage=0.5)], ["verdict_unknown"]),
        ([member(), member("a")], ["zero_advantage"]),
        # Half of the student's samples pass as a teacher's, and then one of three.
        ([member(student_prob=0.4, advantage=1.0), member(student_prob=0.6)], ["d_fooled"]),
        ([member(student_prob=0.4, advantage=1.0), *[member(student_prob=p) for p in (0.5, 0.6)]], []),
        ([member("a", student_prob=0.6, advantage=1.0), member(student_prob=0.5)], []),
        # The wrong sample looks more like a teacher's than the right one, and then less. Teachers' responses do not count.
        (
            [member(student_prob=0.6, verdict=0.0, advantage=1.0), member(student_prob=0.7, verdict=1.0)],
            ["d_judge_disagree"],
        ),
        ([member(student_prob=0.7, verdict=0.0, advantage=1.0), member(student_prob=0.6, verdict=1.0)], []),
        (
            [member("a", student_prob=0.1, verdict=0.0), member(student_prob=0.6, verdict=1.0, advantage=1.0)],
            ["all_right"],
        ),
        ([member(finish_reason="length", advantage=1.0)], ["cut"]),
    ],
)
def test_flags(members, expected):
    assert group_flags({"members": members}) == expected


def test_mixed_is_a_property_of_the_step():
    groups = build_groups([row(question_id="q"), row(question_id="r", images=["b.png"], image_hashes=["ab" * 16])])
    assert all("mixed" in g["flags"] for g in groups) and groups[1]["images"] == ["ab" * 16]
    assert "mixed" not in build_groups([row()])[0]["flags"]


def test_groups_of_both_versions():
    # Version 1: the question changes, and a question that comes twice in a step starts with index 0 again.
    old = [row(index=0), row(index=1), row(index=0), row(question_id="r", index=1)]
    assert [len(g) for g in split_groups(old)] == [2, 1, 1]
    new = [row(group=0, schema=2), row(group=1, schema=2), row(group=1, schema=2, index=1)]
    assert [len(g) for g in split_groups(new)] == [1, 2]
    group = build_groups(old)[0]
    assert group["id"] == "0-3-0" and group["truths"] == ["a"] and group["rule"] is None
    assert group["members"][0]["learned"] is None and group["members"][0]["explanation"] is None


def test_hostile_values_become_plain_ones():
    line = json.dumps(row(text="\ud800<script>\0", advantage=float("nan"), tokens="12", reward=10**400, rewards=[1],
                          images=["../../etc/passwd"], image_hashes=["../../etc/passwd"], choices="abc")).encode()  # fmt: skip
    group = build_groups([read_row(line, "f:1")])[0]
    found = group["members"][0]
    assert found["text"] == "?<script>\0" and found["advantage"] == 0.0 and found["tokens"] is None
    assert found["reward"] is None and found["rewards"] == {} and group["choices"] == []
    assert group["images"] == [] and group["missing_images"] == ["../../etc/passwd"]  # never a path of ours
    json.dumps(group, allow_nan=False)


def test_long_texts_are_cut_at_a_stated_length():
    found = build_groups([row(text="x" * 100)], most_chars=30)[0]["members"][0]
    assert len(found["text"]) == 30 and found["cut"] == 70


@pytest.mark.parametrize("line", [b'{"step": 1, "te', b"[1]", b'{"step": "1", "question_id": 1, "source": "", "text": ""}',
                                  b'{"step": 1, "source": "student", "text": "a"}', b"\xff\xfe", b"[" * 100_000])  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "rollouts" / "step_000004.jsonl"
    path.parent.mkdir()
    path.write_bytes(json.dumps(row()).encode() + b"\n" + line + b"\n")
    assert step_files(tmp_path) == [(4, path)]
    with pytest.raises(DataError, match=r"step_000004\.jsonl:2: expected"):
        read_step(path)


def test_every_flag_is_named():
    assert len(set(FLAGS)) == 8
