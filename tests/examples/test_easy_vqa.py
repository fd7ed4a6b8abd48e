"""The worked example on a package with the interface of easy-vqa and pictures drawn here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image, ImageDraw

from examples.easy_vqa.prepare import COLORS, SHAPES, Row, commonest, prepare, record, shown, teacher_text
from examples.easy_vqa.run import METHODS, RunSettings, jobs, main, table
from openril.cli import main as ril
from openril.errors import DataError
from openril.records import Question
from openril.rewards.rules import score
from openril.storage import read_jsonl, write_jsonl

TINY = (
    "sft.max_steps=2", "sft.batch_size=4", "sft.micro_batch_size=4", "train.max_steps=2", "train.questions_per_step=4",
    "train.questions_per_sampling_batch=4", "train.save_every=0", "collect.num_responses=2",
    "discriminator.pretraining.questions_per_step=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A stand-in for the package: 24 training and 4 test pictures with three questions each."""
    folder = tmp_path_factory.mktemp("easy_vqa")
    made = ModuleType("easy_vqa")
    for split, count in (("train", 24), ("test", 4)):
        paths, asked = {}, []
        for i in range(count):
            color, shape = COLORS[i % 8], SHAPES[i % 3]
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).rectangle((10, 10, 40, 40 if split == "train" else 30), fill=color)
            paths[i] = str(folder / f"{split}{i}.png")
            image.save(paths[i])
            asked += [
                (f"what is the {color} shape?", shape, i),
                (f"is there a {SHAPES[0]}?", "yes" if shape == SHAPES[0] else "no", i),
                (f"is there not a {COLORS[0]} shape?", "no" if color == COLORS[0] else "yes", i),
            ]
        setattr(made, f"get_{split}_questions", lambda asked=asked: tuple(map(list, zip(*asked, strict=True))))
        setattr(made, f"get_{split}_image_paths", lambda paths=paths: paths)
    return made


@pytest.fixture
def settings(package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    monkeypatch.setitem(sys.modules, "easy_vqa", package)
    return RunSettings(tmp_path / "out", num_train=4, num_validation=2, num_test=4, overrides=TINY)


def test_the_splits_share_no_picture_and_no_question(settings: RunSettings):
    counts = prepare(settings)
    rows = {name: read_jsonl(settings.out / "data" / f"{name}.jsonl") for name in counts}
    assert {name: len(part) for name, part in rows.items()} == counts
    # 5 % of 24 pictures are one picture with three questions. It is in no file that anything is trained on.
    held_out = {row["images"][0] for row in rows["validation"]}
    assert len(held_out) == 1 and counts["validation"] == 2
    for name in ("captions", "warm_start", "train", "teacher_shape", "teacher_color"):
        assert not held_out & {row["images"][0] for row in rows[name]}, name
    assert not {row["id"] for row in rows["warm_start"]} & {row["id"] for row in rows["train"]}
    assert all("test" in Path(row["images"][0]).name for row in rows["test"])
    # 23 pictures with three questions: "which shape" and "is there a circle" are about shapes, one is about colors.
    assert (counts["captions"], counts["teacher_shape"], counts["teacher_color"]) == (2 * 23, 46, 23)


def test_what_a_picture_shows_comes_from_its_questions():
    rows = [
        Row("1", "what is the blue shape?", "circle", "a.png"),
        Row("2", "is there a red shape?", "no", "a.png"),
        Row("3", "what color is the shape?", "teal", "b.png"),  # its shape is never asked
        Row("4", "what color is the triangle?", "gray", "c.png"),
    ]
    assert shown(rows) == {"a.png": ("blue", "circle"), "c.png": ("gray", "triangle")}
    assert [row.kind for row in rows] == ["shape, which", "color, yes or no", "color, which", "color, which"]


def test_the_commonest_answer_to_each_wording():
    """ "a?" is mostly answered x and "b?" always y; the test asks "a?" twice, "b?" once, and a new wording."""
    train = [Row("", text, answer, "") for text, answer in (("a?", "x"), ("a?", "x"), ("a?", "y"), ("b?", "y"))]
    test = [Row("", text, answer, "") for text, answer in (("a?", "x"), ("a?", "y"), ("b?", "y"), ("c?", "x"))]
    assert commonest(train, test) == 2 / 4


@pytest.mark.parametrize(("question", "answer"), [("is there a circle?", "yes"), ("is no red shape present?", "no")])
def test_the_rule_finds_the_answer_in_both_teachers_texts(question: str, answer: str):
    row = Row("1", question, answer, "a.png")
    asked, other = Question("1", question, answer), Question("1", question, "no" if answer == "yes" else "yes")
    text = teacher_text(row, "red", "circle")
    assert (score("auto", asked, text), score("auto", other, text)) == (1.0, 0.0)


@pytest.mark.parametrize("text", ["shape is a triangle. shape is a circle. shape", "circle rectangle triangle"])
def test_naming_several_shapes_is_not_right(text: str):
    """A student learned to write this when words were looked for anywhere in its answers."""
    row = record(Row("1", "what is the red shape?", "circle", "a.png"))
    question = Question("1", row["question"], row["answer"], rule=row["rule"])
    assert score(row["rule"], question, text) != 1.0
    assert score(row["rule"], question, "The shape is a circle. The answer is circle.") == 1.0
    assert score(row["rule"], question, "circle") == 1.0


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DataError, match=r"easy-vqa.*\[examples\]"):
        prepare(RunSettings(tmp_path))


def test_the_commands_run_and_leave_what_makes_them_done(settings: RunSettings, capsys: pytest.CaptureFixture[str]):
    prepare(settings)
    left_out = ("dr_grpo", "ril", "dr_grpo test", "ril test")  # tests/test_method_recipes.py runs these methods
    commands = [job for job in jobs(settings) if job.name not in left_out]
    for job in commands:
        assert job.seconds() is None, job.name
        # Teachers of two steps are never right, so that rejection sampling finds nothing.
        more = ["--sft.targets", "teacher_responses"] if job.name == "rejection_sampling" else []
        assert ril([*job.arguments[1:], *more]) == 0, capsys.readouterr()
        assert job.seconds() == 0.0, job.name
        if job.name == "collect":
            for method in list(METHODS)[1:]:
                assert ril(["check", str(settings.out / "recipes" / f"{method}.yaml")]) == 0, capsys.readouterr().out
    assert len(commands) == 10


def test_the_table_pairs_the_methods_on_the_test_questions(tmp_path: Path):
    """Two questions a kind. RL is right on one, RIL+ with seeds 0 and 1 on both and on one, the others on none."""
    asked = [("what is the red shape?", "circle"), ("is there a red shape?", "yes")]
    rows = [{"id": f"{i}", "question": text, "answer": answer} for i, (text, answer) in enumerate(2 * asked)]
    write_jsonl(tmp_path / "data" / "test.jsonl", rows)
    right = {"dr_grpo": "0", "dr_grpo_1": "0", "ril_plus": "02", "ril_plus_1": "0"}
    for name in ("warm_start", *(f"{method}{seed}" for method in list(METHODS)[1:] for seed in ("", "_1"))):
        scored = [{"question_id": row["id"], "score": float(row["id"] in right.get(name, ""))} for row in rows]
        write_jsonl(tmp_path / "test" / name / "eval" / "final.jsonl", [{"checkpoint": name}, *scored])
    text, numbers = table(tmp_path, seeds=2)
    assert numbers["ril_plus"]["correct"]["value"] == 3 / 8
    assert numbers["ril_plus"]["over_dr_grpo"]["value"] == 1 / 8
    assert numbers["ril_plus"]["by_kind"] == {"color, yes or no": 0.0, "shape, which": 3 / 4}
    assert "| Dr.GRPO | 25.0 [" in text and "| warm-started student | 0.0 [0.0, 0.0] |  |  | 0 | 0 |" in text


def test_a_folder_of_other_settings_is_refused(settings: RunSettings, capsys: pytest.CaptureFixture[str]):
    prepare(settings)
    settings.out.joinpath("example.json").write_text(
        '{"overrides": [], "num_train": 5, "num_validation": 2, "num_test": 4}'
    )
    numbers = ["--num-train", "4", "--num-validation", "2", "--num-test", "4"]
    assert main(["--out", str(settings.out), *numbers]) == 2
    assert "num_train" in capsys.readouterr().err
