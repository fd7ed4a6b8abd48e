import json
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openril.errors import CacheError, DataError
from openril.records import STUDENT, ImageSource, Question, Response
from openril.responses import loaded as loaded_module
from openril.responses.cache import ResponseCache
from openril.responses.files import Journal, has_old_verdicts, list_files

SETTINGS = {"temperature": 1.0, "top_p": 0.95}
Q = [Question(id=f"q{i}", question=f"What is {i}?", origin=f"train.jsonl:{i + 1}") for i in range(4)]


@pytest.fixture
def cache(tmp_path):
    cache = ResponseCache.create(tmp_path / "cache", shard_size=5)
    for source in ("big", STUDENT):
        cache.register(source, model=f"{source}-model", revision="r1", sampling=SETTINGS)
    return cache


def response(question, index, source="big", **fields):
    return Response(question.id, source, index, f"{source} {question.id} {index}", **fields)


def fill(cache, questions, count, source="big"):
    with cache.writer(source) as writer:
        for question in questions:
            for index in range(count):
                writer.append(question, response(question, index, source))


def names(folder):
    return [p.name for p in list_files(folder, "")]


def test_what_was_written_is_loaded(cache):
    ids = (5, 6, 7)
    with cache.writer(STUDENT) as writer:
        writer.append(Q[0], response(Q[0], 1, STUDENT, finish_reason="length", token_ids=ids))
        writer.append(Q[0], response(Q[0], 0, STUDENT, token_ids=(1,)))
    loaded = ResponseCache.open(cache.folder).load(Q[:1], [STUDENT], 2, with_token_ids=True)
    assert loaded.responses_for("q0", STUDENT) == [
        response(Q[0], 0, STUDENT, token_ids=(1,)),
        response(Q[0], 1, STUDENT, finish_reason="length", token_ids=ids),
    ]


@pytest.mark.parametrize("text", ["", "  \n", "a\nb\r\n\u2028c\x00d", "数学 🎓 é", '{"question_id": "q1"}'])
def test_any_text_survives(cache, text):
    with cache.writer("big") as writer:
        writer.append(Q[0], replace(response(Q[0], 0), text=text))
        assert cache.load(Q[:1], ["big"]).responses_for("q0", "big")[0].text == text  # from the journal
    assert cache.load(Q[:1], ["big"]).responses_for("q0", "big")[0].text == text  # from the shard


def test_lone_surrogates_become_question_marks(cache):
    with cache.writer("big") as writer:
        writer.append(Q[0], replace(response(Q[0], 0), text="a\ud800b"))
    assert cache.load(Q[:1], ["big"])["q0"][0].text == "a?b"


def test_rows_say_how_they_were_made(cache):
    fill(cache, Q[:1], 1)
    (path,) = list_files(cache.shard_folder, ".parquet")
    (row,) = pq.read_table(path).to_pylist()
    assert row["question_id"] == "q0" and row["source"] == "big" and row["index"] == 0
    assert (row["model"], row["revision"], json.loads(row["sampling"])) == ("big-model", "r1", SETTINGS)
    assert row["question_hash"] == Q[0].content_hash()
    assert "verdict" not in row and row["token_ids"] is None
    assert row["created"].tzinfo is not None


def test_full_shards_are_closed(cache):
    fill(cache, Q, 3)  # 12 responses, 5 a shard
    sizes = [len(pq.read_table(p)) for p in list_files(cache.shard_folder, ".parquet")]
    assert sizes == [5, 5, 2]
    assert names(cache.journal_folder) == []


def test_a_written_response_is_seen_before_its_shard_is_closed(cache):
    with cache.writer("big") as writer:
        writer.append(Q[0], response(Q[0], 0))
        other = ResponseCache.open(cache.folder)
        assert other.missing(Q[:1], "big", 2) == [(Q[0], 1)]
        assert other.load(Q[:1], ["big"], 1)["q0"] == [response(Q[0], 0)]
        assert len(names(cache.journal_folder)) == 1  # the live writer's journal is left alone


def test_missing_lists_gaps_in_order(cache):
    with cache.writer("big") as writer:
        writer.append(Q[1], response(Q[1], 1))
    assert cache.missing(Q[:2], "big", 3) == [(Q[0], 0), (Q[0], 1), (Q[0], 2), (Q[1], 0), (Q[1], 2)]
    assert len(cache.missing(Q[:2], STUDENT, 3)) == 6


def abandon(cache, rows, tail=b""):
    """Leave a journal as a killed writer does: whole, unlocked, perhaps with a torn end."""
    header = {"source": "big", "model": "m", "revision": None, "sampling": "{}"}
    journal = Journal(cache.journal_folder, "big", header)
    for question, index in rows:
        row = {"question_id": question.id, "index": index, "text": "t", "finish_reason": "stop"}
        row |= {"question_hash": question.content_hash(), "created": "2026-01-01T00:00:00+00:00"}
        journal.append(row)
    os.close(journal._file)
    with open(journal.path, "ab") as f:
        f.write(tail)
    return journal.path


def test_dead_writers_journal_becomes_a_shard(cache):
    abandon(cache, [(Q[0], 0), (Q[0], 1)], tail=b'{"question_id": "q0", "ind')
    opened = ResponseCache.open(cache.folder)
    assert names(cache.journal_folder) == []
    assert [r.index for r in opened.load(Q[:1], ["big"])["q0"]] == [0, 1]
    assert opened.missing(Q[:1], "big", 3) == [(Q[0], 2)]


def test_journal_with_a_torn_header_is_nothing(cache):
    cache.journal_folder.mkdir()
    (cache.journal_folder / "big-1-a.jsonl").write_bytes(b'{"source": "bi')
    assert len(ResponseCache.open(cache.folder).missing(Q[:1], "big", 2)) == 2
    assert names(cache.journal_folder) == []


def test_kill_between_shard_and_journal_doubles_nothing(cache):
    path = abandon(cache, [(Q[0], 0)])
    journal = path.read_bytes()
    ResponseCache.open(cache.folder)
    path.write_bytes(journal)  # the shard is there, the journal not yet gone
    opened = ResponseCache.open(cache.folder)
    assert len(opened.load(Q[:1], ["big"])["q0"]) == 1
    assert sum(len(pq.read_table(p)) for p in list_files(cache.shard_folder, ".parquet")) == 1


def test_the_earlier_of_two_rows_for_one_response_wins(cache):
    for text in ("first", "second"):
        with cache.writer("big") as writer:
            writer.append(Q[0], replace(response(Q[0], 0), text=text))
    assert [r.text for r in cache.load(Q[:1], ["big"])["q0"]] == ["first"]


def test_damage_inside_a_journal_is_named(cache):
    path = abandon(cache, [(Q[0], 0)], tail=b"\x00\x00\n")
    with pytest.raises(CacheError, match=path.name):
        ResponseCache.open(cache.folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "other"])
def test_damaged_shard_is_named(cache, damage):
    with cache.writer("big") as writer:
        for i in range(4):
            writer.append(Q[0], replace(response(Q[0], i), text=os.urandom(500).hex()))
    (path,) = list_files(cache.shard_folder, ".parquet")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 3] ^= 0xFF
    content = {"truncated": data[: len(data) // 2], "flipped": data, "emptied": b"", "other": b"hello"}[damage]
    path.write_bytes(bytes(content))
    with pytest.raises(CacheError, match=rf"{path.name}.*Delete .*ril collect"):
        cache.load(Q[:1], ["big"])


def test_foreign_parquet_file_is_named(cache):
    cache.shard_folder.mkdir()
    pq.write_table(pa.table({"a": [1]}), cache.shard_folder / "mine.parquet")
    with pytest.raises(CacheError, match=r"mine.parquet: .*lacks .*question_id"):
        cache.load(Q[:1], ["big"])


def test_stale_question_is_refused_by_name(cache):
    fill(cache, Q[:2], 2)
    changed = [Q[0], replace(Q[1], question="What else?")]
    fresh = ResponseCache.open(cache.folder)
    for ask in (lambda: fresh.load(changed, ["big"]), lambda: fresh.missing(changed, "big", 2)):
        with pytest.raises(CacheError, match=r"'q1' \(train.jsonl:2\) .*--recollect"):
            ask()
    assert len(fresh.load(changed, ["big"], check_hashes=False)["q1"]) == 2


def test_a_replaced_picture_makes_responses_stale(cache, tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"one")
    question = Question(id="pic", question="?", images=(ImageSource(path=picture),))
    fill(cache, [question], 1)
    picture.write_bytes(b"two")
    with pytest.raises(CacheError, match="'pic'"):
        ResponseCache.open(cache.folder).load([question], ["big"])


def test_metadata_and_answer_do_not_make_responses_stale(cache):
    fill(cache, Q[:1], 1)
    changed = replace(Q[0], answer="new", metadata={"a": 1}, origin="elsewhere")
    assert len(cache.load([changed], ["big"])["q0"]) == 1


def test_discarding_stale_responses_leaves_the_others(cache):
    fill(cache, Q[:2], 2)
    fill(cache, Q[:2], 1, STUDENT)
    changed = [Q[0], replace(Q[1], question="What else?")]
    assert cache.discard_stale(changed, "big") == 2
    assert cache.missing(changed, "big", 2) == [(changed[1], 0), (changed[1], 1)]
    assert len(cache.load(Q[:2], [STUDENT])["q1"]) == 1


def test_discarding_a_source_frees_its_name(cache):
    fill(cache, Q, 2)
    assert cache.discard("big") == 8
    cache.register("big", model="other", revision=None, sampling={})
    assert len(cache.missing(Q, "big", 1)) == 4


def test_nothing_is_discarded_under_a_live_writer(cache):
    with cache.writer("big") as writer:
        writer.append(Q[0], response(Q[0], 0))
        with pytest.raises(CacheError, match="collecting 'big'"):
            cache.discard("big")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, r'big.model \(was "big-model", now "other"\)'),
        ({"revision": "r2"}, r'big.revision \(was "r1", now "r2"\)'),
        ({"sampling": {**SETTINGS, "temperature": 0.5}}, r"big.sampling.temperature \(was 1.0, now 0.5\)"),
        ({"sampling": {"temperature": 1.0}}, r"big.sampling.top_p \(was 0.95, now unset\)"),
    ],
)
def test_other_settings_are_refused_with_both_values(cache, change, message):
    entry = {"model": "big-model", "revision": "r1", "sampling": SETTINGS} | change
    with pytest.raises(CacheError, match=f"{message}.*--recollect"):
        cache.register("big", **entry)


def test_equal_weights_elsewhere_are_the_same_model(cache):
    cache.register("local", model="/a", revision="weights:1", sampling={})
    cache.register("local", model="/b", revision="weights:1", sampling={})
    with pytest.raises(CacheError, match=r'local.revision .was "weights:1", now "weights:2"'):
        cache.register("local", model="/a", revision="weights:2", sampling={})


def test_too_few_responses_with_counts(cache):
    fill(cache, Q[:3], 2)
    with pytest.raises(CacheError, match=r"big: 1 of 4 .*2 \(6 of 8 .*'q3' has 0\).*ril collect"):
        cache.load(Q, ["big"], 2)


def test_unknown_source_lists_the_known(cache):
    with pytest.raises(CacheError, match=r"big, student.*bigg"):
        cache.load(Q, ["bigg"])


def test_more_than_required_are_cut_to_the_first(cache):
    fill(cache, Q[:1], 4)
    assert [r.index for r in cache.load(Q[:1], ["big"], 2)["q0"]] == [0, 1]


def test_two_questions_with_one_id_are_refused(cache):
    with pytest.raises(DataError, match="'q0'"):
        cache.load([Q[0], Q[0]], ["big"])


def test_other_questions_in_the_cache_do_not_disturb(cache):
    fill(cache, Q, 2)
    loaded = cache.load([Q[2]], ["big"], 2)
    assert list(loaded) == ["q2"] and [r.question_id for r in loaded["q2"]] == ["q2", "q2"]
    with pytest.raises(CacheError, match="'q0'"):
        loaded.responses_for("q0", "big")


def test_a_missing_cache_names_the_command_to_run(tmp_path):
    with pytest.raises(CacheError, match=r"cache_dir: .*none.*`ril collect RECIPE`"):
        ResponseCache.open(tmp_path / "none")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "other"}', '{"format": "openril-responses", "schema_version": 9}']
)
def test_unreadable_manifest_is_named(cache, content):
    cache.manifest_path.write_text(content)
    with pytest.raises(CacheError, match=r"manifest\.json"):
        ResponseCache.open(cache.folder)


def test_a_cache_of_an_earlier_version_is_a_cache_of_responses(cache):
    fill(cache, Q, 2)
    assert not has_old_verdicts(cache.folder)
    for number, path in enumerate(list_files(cache.shard_folder, ".parquet")):
        table = pq.read_table(path)
        verdicts = [1.0 if number == 0 and i == 0 else None for i in range(len(table))]
        column = table.schema.get_field_index("question_hash") + 1
        pq.write_table(table.add_column(column, "verdict", pa.array(verdicts, pa.float32())), path)
    fill(cache, Q, 1, STUDENT)  # a shard of this version next to the old ones
    opened = ResponseCache.open(cache.folder)
    assert has_old_verdicts(cache.folder)
    assert [r.text for r in opened.load(Q, ["big"], 2)["q1"]] == ["big q1 0", "big q1 1"]
    assert opened.missing(Q, "big", 3) == [(q, 2) for q in Q]
    assert opened.discard("big", ["q0"]) == 2
    assert "q0" in opened.load(Q[:1], [STUDENT]) and len(opened.load(Q[1:], ["big"], 2)) == 3


def test_verdicts_that_an_earlier_version_had_not_merged_are_noticed(cache):
    fill(cache, Q[:1], 1)
    (cache.folder / "verdicts.jsonl").write_text('{"question_id": "q0", "source": "big", "index": 0, "verdict": 1.0}\n')
    assert has_old_verdicts(cache.folder)
    assert len(ResponseCache.open(cache.folder).load(Q[:1], ["big"])["q0"]) == 1


def test_read_only_folder_can_be_loaded(cache):
    fill(cache, Q[:1], 1)
    for path in [cache.folder, *cache.folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(ResponseCache.open(cache.folder).load(Q[:1], ["big"])["q0"]) == 1
    finally:
        for path in [cache.folder, *cache.folder.rglob("*")]:
            path.chmod(0o755)


def test_source_names_of_any_kind_stay_apart(cache):
    for name in ("a/b", "a b", "../up", "é"):
        cache.register(name, model="m", revision=None, sampling={})
        fill(cache, Q[:1], 1, name)
        assert cache.load(Q[:1], [name])["q0"][0].source == name
    assert all(p.parent == cache.shard_folder for p in list_files(cache.shard_folder, ".parquet"))
    assert len(names(cache.shard_folder)) == 4


def test_pandas_reads_the_shards_as_one_table(cache):
    pandas = pytest.importorskip("pandas")
    fill(cache, Q, 3)
    frame = pandas.read_parquet(cache.shard_folder)
    assert frame.groupby("question_id").size().to_dict() == {"q0": 3, "q1": 3, "q2": 3, "q3": 3}


def test_texts_are_read_when_needed_so_that_memory_does_not_grow_with_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(loaded_module, "KEPT_BYTES", 2**20)
    cache = ResponseCache.create(tmp_path / "cache", shard_size=500)
    cache.register("big", model="m", revision="r", sampling=SETTINGS)
    questions = [Question(f"q{i}", f"Question {i}?") for i in range(500)]
    text = "".join(chr(33 + i * i % 90) for i in range(5000))
    with cache.writer("big") as writer:
        for q in reversed(questions):
            for i in range(4):
                writer.append(q, Response(q.id, "big", i, f"{q.id} {i} {text}"))
    before = pa.total_allocated_bytes()
    loaded = ResponseCache.open(cache.folder).load(questions, ["big"], 4)
    assert pa.total_allocated_bytes() - before < 2**20  # the texts are 10 MB
    for q in questions[::7]:
        assert [r.text.split(" ", 2)[:2] for r in loaded.responses_for(q.id, "big")] == [
            [q.id, str(i)] for i in range(4)
        ]
    assert pa.total_allocated_bytes() - before < 4 * 2**20
    for path in cache.shard_folder.glob("*.parquet"):
        path.unlink()
    with pytest.raises(CacheError, match="changed while it was in use"):
        [loaded[q.id] for q in questions]
