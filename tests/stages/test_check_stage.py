"""`ril check` on real tiny checkpoints, real files and a real local server."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from openril.errors import ModelError, RecipeError
from openril.models import memory_estimate as estimate
from openril.models.loading import load_config, load_processor
from openril.models.prompt_lengths import TokenCounter
from openril.models.prompts import question_messages
from openril.models.stage_memory import Memory, stage_memory
from openril.recipe.schema import Recipe
from openril.records import ImageSource, Question
from openril.report.page import Page
from openril.stages.check import _check_servers, run_check
from support.misbehaving_server import MisbehavingServer, Say, Status
from support.tiny import draw_square


def recipe_for(folder: Path, student: Path, **changes: Any) -> Recipe:
    draw_square(folder / "a.png", "red", (64, 40))
    rows = [
        {"id": "1", "question": "Which colour?", "answer": "red", "images": ["a.png"]},
        {"id": "2", "question": "How many?", "answer": "3"},
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "v.jsonl").write_text(json.dumps(rows[0] | {"id": "3", "question": "Which one?"}) + "\n")
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {"train": [str(folder / "q.jsonl")], "validation": [str(folder / "v.jsonl")]},
        "student": {"model": str(student)},
        "teachers": [{"name": "big", "model_path": str(student)}],
        "rewards": {"answer": {"kind": "rules"}},
        "train": {"questions_per_step": 2},
    }
    return Recipe.model_validate(values | changes)


def check(recipe: Recipe) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = run_check(recipe, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_recipe_that_is_ready(tmp_path: Path, tiny_student: Path) -> None:
    code, page = check(recipe_for(tmp_path, tiny_student))
    assert code == 0 and "Ready." in page, page
    assert "2 questions, 2 usable; 1 images, 1 questions without one" in page
    # 2 questions x 16 responses x (teacher and student); 1 step of 2 questions x 4 samples.
    assert "1 steps on 2 questions, 8 student samples; 64 responses to collect" in page
    assert not (tmp_path / "run").exists()


def test_problems_of_every_part_are_on_one_page(tmp_path: Path, tiny_qwen: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_qwen, judge={"base_urls": ["http://127.0.0.1:9/v1"], "model": "j"})
    recipe.rewards.answer.kind = "judge"
    recipe.teachers[0].model_path = str(tmp_path / "nowhere")
    recipe.train.num_teacher_responses = 99
    (tmp_path / "a.png").write_bytes(b"broken")
    code, page = check(recipe)
    assert code == 2
    for words in (
        "train.num_teacher_responses",
        "nowhere",
        "a.png",
        "judge: cannot reach http://127.0.0.1:9/v1",
    ):
        assert words in page, page
    # a.png in both files, the teacher's path (once, although two parts find it), the judge, and a batch larger than the
    # data; and as a warning more teacher responses than are collected.
    assert "5 problems, 1 warning" in page


def test_servers_are_asked_for_their_models(tmp_path: Path, tiny_qwen: Path) -> None:
    with MisbehavingServer() as server:
        teacher = {"name": "big", "base_urls": [server.url], "model": "no-such-model"}
        code, page = check(recipe_for(tmp_path, tiny_qwen, teachers=[teacher]))
        assert code == 2 and "no-such-model" in page
        teacher["model"] = server.model
        code, page = check(recipe_for(tmp_path, tiny_qwen, teachers=[teacher]))
        assert code == 0 and "up to 32 requests to teacher big" in page, page


def servers_part(teacher: Any = None, judge: Any = None) -> str:
    values: dict[str, Any] = {"rewards": {"answer": {"kind": "judge" if judge else "rules"}}}
    values |= {"teachers": [teacher]} if teacher else {"judge": judge}
    console = Console(file=io.StringIO(), width=200)
    _check_servers(Recipe.model_validate(values), Page(console))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_each_server_is_asked_for_one_answer_which_is_shown(tmp_path: Path) -> None:
    endpoint = {"model": "fake", "max_retries": 0}
    with MisbehavingServer(then=Say("[bold] Blue.", finish_reason="stop")) as server:
        page = servers_part(teacher=endpoint | {"name": "big", "base_urls": [server.url]})
        assert "'[bold] Blue.' (finish reason stop)" in page and "ok" in page
        assert server.count == 1 and server.requests[0].body["max_tokens"] == 512
        page = servers_part(judge=endpoint | {"base_urls": [server.url]})
        assert "problem" in page and "no verdict" in page
    with MisbehavingServer(then=Say("Same. <answer>1</answer>")) as server:
        assert "read as verdict 1" in servers_part(judge=endpoint | {"base_urls": [server.url]})
    with MisbehavingServer(then=Say("", finish_reason="length")) as server:
        page = servers_part(teacher=endpoint | {"name": "big", "base_urls": [server.url]})
        assert "warning" in page and "finish reason length" in page and "collect.max_completion_length" in page
    with MisbehavingServer(then=Status(400, "Unrecognized request argument supplied: seed")) as server:
        page = servers_part(teacher=endpoint | {"name": "big", "base_urls": [server.url]})
        assert "omit: [seed] for teacher big" in page


def test_the_students_servers_are_asked_too(tmp_path: Path) -> None:
    with MisbehavingServer(then=Say("red"), model="student") as server:
        sampler = {"engine": "vllm", "base_urls": [server.url, "http://127.0.0.1:9/v1"]}
        recipe = Recipe.model_validate({"run_dir": str(tmp_path), "student": {"sampler": sampler}})
        recipe.rewards.answer.kind = "rules"
        console = Console(file=io.StringIO(), width=200)
        page = Page(console)
        _check_servers(recipe, page)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"student.sampler: student at {server.url} answered 'red'" in shown
    assert "student.sampler: cannot reach http://127.0.0.1:9/v1" in shown and page.errors == 1


def test_text_only_checkpoints_cannot_be_students(tmp_path: Path) -> None:
    from openril.testing.tiny_models import build_tiny_model

    text_only = build_tiny_model(tmp_path / "text", "qwen2", hidden_size=32)
    code, page = check(recipe_for(tmp_path, text_only))
    assert code == 2 and "takes no images" in page


def test_a_truncated_weight_file_is_found_without_loading_it(tmp_path: Path, tiny_qwen: Path) -> None:
    copy = Path(shutil.copytree(tiny_qwen, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, page = check(recipe_for(tmp_path, copy))
    assert code == 2 and "model.safetensors" in page


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"\.safetensors.*pytorch_model\.bin"):
        estimate.checkpoint_parameters(tmp_path)


def test_missing_shards_are_named(tmp_path: Path, tiny_qwen: Path) -> None:
    copy = Path(shutil.copytree(tiny_qwen, tmp_path / "copy"))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of 2 .*model-00002-of-00002"):
        estimate.checkpoint_parameters(copy)


def test_header_counts_are_the_models_own(tiny_student: Path) -> None:
    from openril.models.loading import load_model

    expected = sum(p.numel() for p in load_model(str(tiny_student)).parameters())
    assert sum(estimate.checkpoint_parameters(tiny_student).values()) == expected


@pytest.mark.parametrize("sizes", [[], [(64, 40)], [(40, 64), (112, 112)], [(500, 90)]])
def test_token_counts_are_the_processors_own(tiny_student: Path, sizes: list[tuple[int, int]]) -> None:
    processor = load_processor(str(tiny_student))
    images = tuple(ImageSource(data=bytes([i])) for i in range(len(sizes)))
    question = Question("q", "Which " + " and ".join(["<image>"] * len(sizes)) + "?", images=images)
    text = processor.apply_chat_template(
        question_messages(question, "Be brief."), tokenize=False, add_generation_prompt=True
    )
    blank = [Image.new("RGB", size) for size in sizes]
    real = processor(text=[text], images=[blank] if blank else None, return_tensors="pt")["input_ids"].shape[1]
    counter = TokenCounter(processor, "Be brief.")
    counter._COMPARED = 0  # compare nothing, so that the rule itself is tested here
    assert counter(question, sizes)[0] == real


def test_a_processor_whose_rule_is_wrong_is_measured_instead(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load_processor(str(tiny_qwen))
    question = Question("q", "Which?", images=(ImageSource(data=b"x"),))
    right = TokenCounter(processor)(question, [(64, 40)])
    wrong = TokenCounter(processor)
    monkeypatch.setattr(TokenCounter, "_by_rule", lambda self, sizes: 999)
    assert wrong(question, [(64, 40)]) == right and wrong.exact_rule is False


TOWER = estimate.Tower(hidden=10, intermediate=30, layers=2, query=10, key_value=5)
SHAPE = estimate.Shape({"vision_tower": 100, "attention": 1000, "lm_head": 200}, TOWER, vocabulary=50)


def small(**changes: Any) -> Recipe:
    train = {"precision": "float32", "num_generations": 2, "max_completion_length": 5, **changes.pop("train", {})}
    train = {"max_tokens_per_micro_batch": 80, **train}
    return Recipe.model_validate({"teachers": [{"name": "a"}], "train": train, **changes})


def loop(recipe: Recipe) -> Memory:
    return stage_memory(recipe, SHAPE, 15)[-1]


def test_memory_computed_by_hand() -> None:
    memory = loop(small())
    held, update = memory.held, memory.phases["student update"]
    # 1300 values x 4 bytes; 1200 of them train (the vision tower is frozen); the discriminator has no LM head.
    assert held["student: weights"] == 5200 and update["student: gradients"] == 4800
    assert held["student: AdamW states"] == 9600 and held["reference: weights"] == 5200
    assert held["discriminator: weights"] == 4400
    assert memory.phases["discriminator update"]["discriminator: gradients"] == 4000
    # The budget of 80 tokens is filled by groups of 15 + 4 x 5. A layer saves 24 x 10 + 16 x 10 + 16 x 5 + 16 x 30 bytes a
    # token, and 20 x 10 + 12 x 10 + 12 x 30 exist inside one.
    assert update["activations"] == 80 * (2 * 960 + 680)
    # 80 tokens x 50 words x 4 bytes, three times: logits, probabilities, gradient.
    assert update["logits"] == 3 * 80 * 50 * 4
    checkpointed = loop(small(student={"gradient_checkpointing": True})).phases["student update"]
    assert checkpointed["activations"] == 80 * (960 + 2 * 10 * 4 + 680)
    # 8 questions x (15 + 2 x 5 tokens) x (keys, values) x 5 values x 2 layers x 4 bytes.
    assert memory.phases["sampling"]["KV cache"] == 8 * 25 * 2 * 5 * 2 * 4


def test_memory_follows_the_recipe() -> None:
    def names(recipe: Recipe) -> set[str]:
        memory = loop(recipe)
        return {n.split(":")[0] for n in memory.held if ":" in n}

    assert "reference" not in names(small(train={"beta": 0}))
    assert "reference" not in names(small(student={"lora": {"enabled": True}}))
    assert "discriminator" not in names(small(train={"algorithm": "grpo"}))
    fixed = loop(small(discriminator={"mode": "fixed"}))
    assert "discriminator: AdamW states" not in fixed.held and "discriminator update" not in fixed.phases
    whole, half = loop(small()), loop(small(train={"precision": "pure_bf16"}))
    for name, size in whole.held.items():  # the optimizer's states stay at 8 bytes a value
        assert half.held[name] == (size if "AdamW" in name else size / 2)
    # Under autocast the reference has 1,200 values in bfloat16 and 100 in float32.
    assert loop(small(train={"precision": "bfloat16"})).held["reference: weights"] == 2 * 1300


def test_a_device_that_is_too_small_is_a_problem(tmp_path: Path, tiny_qwen: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_qwen)
    console = Console(file=io.StringIO(), width=200)

    def page(*device_memory: str, world_size: int = 1) -> tuple[int, str]:
        console.file = io.StringIO()
        code = run_check(recipe, console, world_size, device_memory)
        return code, console.file.getvalue()

    code, text = page("1.01")
    assert code == 2 and "Ready" not in text
    for words in ("--device-memory", "student: weights", "student.lora.enabled: true", "train.precision: pure_bf16",
                  "student.gradient_checkpointing: true", "train.max_tokens_per_micro_batch: 1024"):  # fmt: skip
        assert words in text, text
    assert page("80")[0] == 0
    if not torch.cuda.is_available():
        code, text = page()
        assert code == 0 and "compared with nothing" in text
    for wrong in (("many",), ("1", "2"), ("-3",)):
        with pytest.raises(RecipeError, match="--device-memory"):
            page(*wrong)


def test_a_student_of_7b_does_not_fit_80_gib_with_any_number_of_processes() -> None:
    tower = estimate.Tower(hidden=3584, intermediate=18944, layers=28, query=3584, key_value=512)
    matrix = 152064 * 3584
    groups = {"vision_tower": 660_000_000, "word_embeddings": matrix, "lm_head": matrix, "attention": 822_000_000}
    groups |= dict.fromkeys(("mlp_gate", "mlp_up", "mlp_down"), 28 * 3584 * 18944)
    shape = estimate.Shape(groups, tower, 152064)
    for processes in (1, 8):
        memory = stage_memory(Recipe.model_validate({"teachers": [{"name": "a"}]}), shape, 1500, processes=processes)[
            -1
        ]
        # Student: (4 + 4 + 8) bytes a value, discriminator the same, and a reference.
        assert memory.total > 250e9, memory


def test_work_of_the_papers_loop() -> None:
    served = {"base_urls": ["http://h/v1"], "model": "m"}
    recipe = Recipe.model_validate({"teachers": [{"name": "a", **served}, {"name": "b", **served}], "judge": served})
    done = estimate.work(recipe, 40_000, 0)
    assert done.steps == 1112 and done.student_samples == 1112 * 36 * 4  # 40,000 / 36, rounded up
    assert done.collected_responses == 40_000 * 16 * 3
    assert done.requests == {"teacher a": 640_000, "teacher b": 640_000, "judge": 1112 * 36 * 8}


def test_student_configuration_gives_the_shape(tiny_student: Path) -> None:
    shape = estimate.shape_of(load_config(str(tiny_student)), estimate.checkpoint_parameters(tiny_student))
    assert (shape.text.hidden, shape.text.intermediate, shape.text.layers) == (32, 64, 2)
    assert shape.text.key_value == 16 and shape.vision is not None and shape.vision.hidden == 64
    assert 0 < shape.trainable(["vision_tower"]) < shape.total
