"""The demo's own parts; the stages it runs have their own tests."""

import json

import pytest

from openril.errors import OpenRILError
from openril.playground.build import Settings as BuildSettings
from openril.playground.build import build
from openril.playground.commands import Command, run_lanes
from openril.playground.demo import Settings, mean_of, model_lanes, prepare, read_evaluations, recipe_copy
from openril.recipe.loading import load_recipe


def test_recipes_are_moved_to_the_folder_asked_for(tmp_path):
    out = tmp_path / "elsewhere"
    recipe = load_recipe(recipe_copy("ril", Settings(out, seed=7, overrides=("train.max_steps=3",))))
    assert recipe.run_path == out / "ril"
    assert recipe.data.train == [str(out / "world" / "train.jsonl")]
    assert [t.model_path for t in recipe.teachers] == [
        str(out / "teacher_a" / "sft" / "student"),
        str(out / "teacher_b" / "sft" / "student"),
    ]
    assert (recipe.seed, recipe.train.max_steps) == (7, 3)


def test_what_is_trained_already_is_not_trained_again(tmp_path):
    settings = Settings(tmp_path, num_train=16, num_validation=8)
    recipes = prepare(settings)
    assert [c.title for lane in model_lanes(settings, recipes) for c in lane] == [
        "train judge", "train student", "train teacher_a", "train teacher_b",
    ]  # fmt: skip
    for name in ("teacher_a", "student"):
        folder = tmp_path / name / "sft" / "student"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    titles = [c.title for lane in model_lanes(settings, recipes) for c in lane]
    assert titles == ["train judge", "train teacher_b"]


def test_world_is_drawn_once(tmp_path):
    settings = Settings(tmp_path, num_train=16, num_validation=8)
    prepare(settings)
    before = (tmp_path / "world" / "train.jsonl").stat().st_mtime_ns
    prepare(settings)
    assert (tmp_path / "world" / "train.jsonl").stat().st_mtime_ns == before


def test_lanes_run_in_order_and_write_logs(tmp_path):
    (tmp_path / "note.json").write_text('{"a": 1}')
    said = []
    commands = [Command(f"look {i}", ("json.tool", str(tmp_path / "note.json"))) for i in (1, 2)]
    run_lanes([commands, []], tmp_path / "logs", said.append)
    assert json.loads((tmp_path / "logs" / "look_2.log").read_text()) == {"a": 1}
    assert [line.split(":")[0].strip() for line in said if "done" in line] == ["look 1", "look 2"]


def test_failed_command_is_named_with_the_end_of_its_log(tmp_path):
    with pytest.raises(OpenRILError, match=r"(?s)broken failed with exit code .*No such file.*broken\.log"):
        run_lanes([[Command("broken", ("json.tool", str(tmp_path / "missing.json")))]], tmp_path, lambda line: None)


def test_metrics_that_are_missing_are_left_out():
    rows = [{"step": 1, "train/kl": 1.0}, {"step": 2, "train/kl": 3.0}]
    assert mean_of(rows) == {"train/kl": 2.0}


def test_evaluations_come_from_the_table(tmp_path):
    assert read_evaluations(tmp_path) == []
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "table.json").write_text('{"settings": {}, "evaluations": [{"name": "sft", "score": 0.5}]}')
    assert read_evaluations(tmp_path) == [{"name": "sft", "score": 0.5}]


def test_words_of_the_texts_are_single_tokens(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "question": "Which zebra is purple?"}) + "\n" for i in range(20))
    )
    folder = build(BuildSettings(tmp_path / "model", "qwen2", texts=[tmp_path / "questions.jsonl"], hidden_size=32))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer(" zebra purple")["input_ids"]) == 2
