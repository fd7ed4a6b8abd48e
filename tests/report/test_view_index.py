"""The index of `ril view`: the same answers as a plain loop over all groups, whatever happens to the files."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import pytest

from openril.report.rollouts import FLAGS, build_groups, read_step, step_files
from openril.report.serving import index as index_module
from openril.report.serving.index import ORDERS, Query, RunIndex
from support.synthetic_run import write_run

Groups = list[dict]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    for i, name in enumerate(("one", "two's")):
        write_run(folder / name, 5, groups=7, members=6, words=12, questions=20, seed=i)
    return [folder / "one", folder / "two's"]


def all_groups(run_dirs: list[Path]) -> Groups:
    """Every group, read without the index."""
    return [
        g for run, f in enumerate(run_dirs) for _, path in step_files(f) for g in build_groups(read_step(path), run)
    ]


def place(group: dict) -> tuple[int, int, int]:
    run, step, position = map(int, group["id"].split("-"))
    return step, run, position


def spread(group: dict) -> float:
    rewards = [m["reward"] for m in group["members"] if m["reward"] is not None]
    return max(rewards) - min(rewards) if rewards else 0.0


def plain_answer(groups: Groups, query: Query) -> list[str]:
    """The ids of a query's groups by a loop over all of them, as the page's own script finds them."""

    def holds(g: dict) -> bool:
        texts = [g["question"], g["question_id"], *g["truths"], *(m["text"] for m in g["members"])]
        return (
            (query.run is None or g["run"] == query.run)
            and (query.step_min is None or g["step"] >= query.step_min)
            and (query.step_max is None or g["step"] <= query.step_max)
            and (query.skill is None or g["skill"] == query.skill)
            and (query.source is None or any(m["source"] == query.source for m in g["members"]))
            and (query.question is None or g["question_id"] == query.question)
            and all(flag in g["flags"] for flag in query.flags)
            and any(query.q.strip().lower() in text.lower() for text in texts)
        )

    found = sorted(filter(holds, groups), key=place)
    keys = {
        "-step": lambda g: -g["step"],
        "longest": lambda g: -g["longest"],
        "-spread": lambda g: -spread(g),
        "advantage": lambda g: -max(abs(m["advantage"]) for m in g["members"]),
    }
    return [g["id"] for g in (sorted(found, key=keys[query.sort]) if query.sort in keys else found)]


SINGLE = [
    *({"run": run} for run in (0, 1, 2)),
    *({"step_min": n} for n in (2, 9)),
    *({"step_max": n} for n in (0, 3)),
    *({"skill": skill} for skill in ("counting", "charts", "none")),
    *({"source": source} for source in ("student", "teacher_b", "nobody")),
    *({"question": question} for question in ("q3", "q")),
    *({"flags": (flag,)} for flag in FLAGS),
    {"flags": ("d_fooled", "cut")},
    *({"q": q} for q in ("", "  ", "ANSWER is 4", "Pattern 5", "q13", "7", "no such text", "%", "_", "é", "step 1 question")),
]  # fmt: skip


def test_every_filter_and_order_means_the_same_as_a_plain_loop(runs: list[Path]):
    write_special_texts(runs[1])
    index = RunIndex(runs, None)
    index.refresh()
    groups = all_groups(runs)
    pairs = [a | b for a, b in itertools.combinations(SINGLE, 2) if not a.keys() & b.keys()]
    sizes = set()
    for number, given in enumerate([*SINGLE, *pairs, *({"sort": sort} for sort in ORDERS)]):
        query = Query(**{"sort": list(ORDERS)[number % len(ORDERS)], **given})
        found = index.find(query)
        assert [f"{run}-{step}-{position}" for run, step, position, *_ in found] == plain_answer(groups, query), query
        sizes.add(len(found))
    assert len(sizes) > 20 and {0, len(groups)} <= sizes  # the queries tell the groups apart
    by_id = {g["id"]: g for g in groups}
    for group in index.groups(index.find(Query(sort="longest"))):
        assert group == by_id.pop(group["id"])  # flags and whole texts
    assert not by_id
    index.close()


def write_special_texts(folder: Path) -> None:
    """Give the first step texts that could confuse a search."""
    path = step_files(folder)[0][1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    special = [
        "ÉCOLE é",
        "100% _ 'quoted' \x00 NUL \x1e",
        "<script>alert(1)</script>",
        "İ ß ΑΣ",
        "line\r\nline\u2028x",
        "\ud800 lone",
    ]
    for row, text in zip(rows[::3], special, strict=False):
        row["text"] = text
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def ids(index: RunIndex) -> list[str]:
    return [g["id"] for g in index.groups(index.find(Query()))]


def test_files_that_arrive_change_and_go(tmp_path: Path):
    run = tmp_path / "run"
    write_run(run, 3, groups=2, members=4, words=5)
    index = RunIndex([run], tmp_path / "cache" / "index.duckdb")
    index.refresh()
    assert ids(index) == ["0-1-0", "0-1-1", "0-2-0", "0-2-1", "0-3-0", "0-3-1"]
    second, third = (path for _, path in step_files(run)[1:])

    half = second.read_bytes()  # a copy that is not finished: the other steps stay, and the message names the file
    second.write_bytes(half[: len(half) // 2])
    index.refresh()
    assert ids(index) == ["0-1-0", "0-1-1", "0-3-0", "0-3-1"]
    ((where, problem),) = index.progress.problems.items()
    assert "step 2" in where and str(second) in problem
    second.write_bytes(half)
    index.refresh()
    assert len(ids(index)) == 6 and not index.progress.problems

    third.unlink()  # cut back to step 2, then continued with other responses
    index.refresh()
    assert index.find(Query(step_min=3)) == [] and index.progress.steps == 2
    write_run(run, 2, groups=1, members=4, words=5, seed=5, first_step=3)
    index.refresh()
    assert [i for i in ids(index) if i > "0-3"] == ["0-3-0", "0-4-0"] and index.progress.groups == 6
    text = all_groups([run])[-1]["members"][0]["text"]
    assert index.find(Query(q=text))[-1][:3] == (0, 4, 0)
    index.close()


def test_a_group_whose_file_changed_since_it_was_indexed_is_left_out_until_it_is_read_again(tmp_path: Path):
    write_run(tmp_path, 2, groups=2, members=4, words=5)
    index = RunIndex([tmp_path], None)
    index.refresh()
    path = step_files(tmp_path)[0][1]
    path.write_bytes(b"\n".join(reversed(path.read_bytes().splitlines())) + b"\n\n")
    assert ids(index) == ["0-2-0", "0-2-1"]
    path.unlink()
    assert ids(index) == ["0-2-0", "0-2-1"]
    index.close()


def test_the_index_is_kept_and_the_run_folder_left_alone(tmp_path: Path):
    run, cache = tmp_path / "run", tmp_path / "cache" / "index.duckdb"
    write_run(run, 3, groups=2, members=4, words=5)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    index = RunIndex([run], cache)
    index.refresh()
    expected = ids(index)
    index.close()
    again = RunIndex([run], cache)
    assert ids(again) == expected  # before anything is read
    again.refresh()
    assert again.changes == 0
    again.close()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_two_viewers_of_one_run_and_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, cache = tmp_path / "run", tmp_path / "cache" / "index.duckdb"
    write_run(run, 2, groups=2, members=4, words=5)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(index_module.tempfile, "tempdir", None)
    holder = "import sys, duckdb; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    first = RunIndex([run], cache)
    first.refresh()
    first.close()
    import subprocess
    import sys

    with subprocess.Popen(
        [sys.executable, "-c", holder, cache], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        second = RunIndex([run], cache)
        second.refresh()
        assert len(ids(second)) == 4
        assert len(list(tmp_path.glob("ril-view-*"))) == 1
        second.close()
        other.communicate()
    (tmp_path / "file").write_text("")
    third = RunIndex([run], tmp_path / "file" / "index.duckdb")
    third.refresh()
    assert len(ids(third)) == 4
    third.close()
    assert not list(tmp_path.glob("ril-view-*"))


@pytest.mark.parametrize("damage", ["bytes", "version", "other runs"])
def test_an_index_that_cannot_be_used_is_built_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch):
    run, cache = tmp_path / "run", tmp_path / "index.duckdb"
    write_run(run, 2, groups=2, members=4, words=5)
    if damage == "bytes":
        cache.write_bytes(os.urandom(5000))
    else:
        with monkeypatch.context() as m:
            m.setattr(index_module, "VERSION", 0 if damage == "version" else index_module.VERSION)
            other = RunIndex([run if damage == "version" else tmp_path / "no"], cache)
            other.refresh()
            other.close()
    index = RunIndex([run], cache)
    index.refresh()
    assert index.changes > 0 and len(ids(index)) == 4
    index.close()
    with duckdb.connect(str(cache), read_only=True) as database:  # it is in the cache again, not in a temporary folder
        assert database.execute("select count(*) from groups").fetchone() == (4,)


def test_what_is_indexed_can_be_asked_for_while_the_rest_is_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_module, "FILES_AT_ONCE", 2)
    write_run(tmp_path, 6, groups=1, members=2, words=5)
    index = RunIndex([tmp_path], None)
    index.refresh(stop=lambda: index.progress.indexed >= 4)
    assert ids(index) == ["0-1-0", "0-2-0", "0-3-0", "0-4-0"]
    assert index.progress.indexing and (index.progress.indexed, index.progress.steps) == (4, 6)
    index.refresh()
    assert len(ids(index)) == 6 and not index.progress.indexing
    index.close()


def test_an_answer_is_asked_again_only_when_groups_have_changed(tmp_path: Path):
    write_run(tmp_path, 2, groups=2, members=2, words=5)
    index = RunIndex([tmp_path], None)
    index.refresh()
    query = Query(skill="charts")
    found = index.find(query)
    assert index.find(Query(**asdict(query))) is found
    for step in range(20):
        index.find(replace(query, step_min=step))
    assert len(index._found) <= 8
    write_run(tmp_path, 1, groups=8, members=2, words=5, first_step=3)
    index.refresh()
    assert len(index.find(query)) > len(found)
    index.close()
