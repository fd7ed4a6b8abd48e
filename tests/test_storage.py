import os

import pytest

from openril.storage import (
    append_jsonl,
    atomic_path,
    read_jsonl,
    remove,
    stable_hash,
    write_json,
    write_jsonl,
    write_text,
)


def test_stable_hash_is_the_same_in_every_process():
    # Pinned: it decides seeds and blocks of work, so a change would not continue old runs.
    assert stable_hash("q1", 0) == 4594234897306181453
    assert 0 <= stable_hash("anything") < 2**63


def test_stable_hash_keeps_parts_apart():
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    assert stable_hash(1) != stable_hash("1")


def test_atomic_file_keeps_the_old_content_when_writing_fails(tmp_path):
    target = tmp_path / "f.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_atomic_folder_replaces_a_full_folder(tmp_path):
    target = tmp_path / "d"
    for name in ("a", "b"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert os.listdir(target) == ["b"]
    assert os.listdir(tmp_path) == ["d"]


def test_write_makes_parent_folders(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"ü": 1})
    assert '"ü": 1' in (tmp_path / "a" / "b.json").read_text(encoding="utf-8")


def test_torn_line_of_a_killed_writer_costs_only_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"n": 1})
    with open(path, "a") as f:
        f.write('{"n": 2, "te')
    append_jsonl(path, {"n": 3}, {"n": 4})
    assert read_jsonl(path) == [{"n": 1}, {"n": 3}, {"n": 4}]


def test_jsonl_keeps_line_separators_inside_text(tmp_path):
    rows = [{"text": "a\nb\u2028c\x85d"}]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert read_jsonl(tmp_path / "r.jsonl") == rows


def test_read_jsonl_of_nothing(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_remove_takes_files_folders_links_and_nothing(tmp_path):
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    remove(tmp_path / "link")
    assert (tmp_path / "d" / "e").is_dir()
    remove(tmp_path / "d")
    remove(tmp_path / "d")
    assert os.listdir(tmp_path) == []
