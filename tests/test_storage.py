import os

import pytest

from openril.errors import CacheError, StateError
from openril.storage import (
    append_jsonl,
    atomic_path,
    changed_keys,
    read_jsonl,
    refuse_changed,
    remove,
    stable_hash,
    weights_fingerprint,
    write_json,
    write_jsonl,
    write_text,
)


def test_stable_hash_is_the_same_in_every_process():
    # Pinned, because seeds and blocks of work depend on it: old runs could not continue after a change.
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


OLD = {"beta": 0.01, "sampling": {"top_k": 50, "top_p": 1.0}, "teachers": ["a"]}


def test_changed_keys_are_dotted_and_have_both_values():
    new = {"beta": 0.02, "sampling": {"top_k": 50, "top_p": 0.9}, "teachers": ["a", "b"]}
    assert changed_keys(OLD, OLD) == {}
    assert changed_keys(OLD, new) == {
        "beta": (0.01, 0.02),
        "sampling.top_p": (1.0, 0.9),
        "teachers": (["a"], ["a", "b"]),
    }


def test_a_key_that_one_side_lacks_counts_as_none():
    assert changed_keys({"a": 1}, {"b": {"c": 2}}) == {"a": (1, None), "b": (None, {"c": 2})}
    assert changed_keys({"a": None}, {}) == {}


def test_ignored_keys_may_change():
    new = OLD | {"beta": 0.02, "sampling": {"top_k": 1, "top_p": 0.9}}
    assert list(changed_keys(OLD, new, lambda key: key in ("beta", "sampling.top_k"))) == ["sampling.top_p"]


def test_refusing_names_the_path_the_keys_both_values_and_the_fix(tmp_path):
    refuse_changed(tmp_path, OLD, OLD, fix="set another run_dir")
    with pytest.raises(StateError) as error:
        refuse_changed(tmp_path, OLD, OLD | {"beta": None, "teachers": ["b"]}, fix="set another run_dir")
    message = str(error.value)
    for piece in (
        str(tmp_path),
        "beta (was 0.01, now unset)",
        'teachers (was ["a"], now ["b"])',
        "set another run_dir",
    ):
        assert piece in message
    assert "sampling" not in message


def test_a_refusal_shows_six_keys_and_counts_the_others(tmp_path):
    old = {f"k{i}": 0 for i in range(9)}
    with pytest.raises(CacheError, match=r"k5.* 3 more") as error:
        refuse_changed(tmp_path, old, dict.fromkeys(old, "x" * 200), fix="remove it", error=CacheError)
    assert "k6" not in str(error.value) and "x" * 100 not in str(error.value)


def test_a_fingerprint_follows_the_weights_and_nothing_else(tmp_path):
    assert weights_fingerprint(tmp_path / "none") is None  # a hub name
    assert weights_fingerprint(tmp_path) is None  # a folder without weights
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = weights_fingerprint(tmp_path)
    assert first is not None and first.startswith("weights:")
    (tmp_path / "config.json").write_text("{}")
    assert weights_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert weights_fingerprint(tmp_path) not in (None, first)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert weights_fingerprint(tmp_path) not in (None, first)


def test_a_large_file_is_sampled_up_to_its_end(tmp_path):
    # 80 MiB of zeros (sparse): more than 64 pieces of 1 MiB, so pieces are read from start to end.
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as f:
        f.truncate(80 << 20)
    first = weights_fingerprint(tmp_path)
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert weights_fingerprint(tmp_path) != first
