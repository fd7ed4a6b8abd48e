"""Cross-checks find each reason why a recipe cannot work, and a good recipe passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.numpy import save_file

from openril.errors import RecipeError
from openril.export.request import FORMATS, format_module
from openril.recipe import export_checks
from openril.recipe.checks import STAGES, cross_check, require
from openril.recipe.schema import ExportFormat, Recipe


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe with everything in place: data, checkpoints, a cache, a pre-trained discriminator."""
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "run/sft/student", "run/discriminator/discriminator"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
        save_file({}, tmp_path / folder / "model.safetensors")
    (tmp_path / "run/responses").mkdir()
    (tmp_path / "run/responses/shard-0.parquet").touch()
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text("{}\n")
    served = {"base_urls": ["http://127.0.0.1:1/v1"], "model": "m"}
    return Recipe.model_validate(
        {
            "run_dir": "run",
            "data": {"train": ["train.jsonl"], "validation": ["validation.jsonl"]},
            "student": {"model": "./model"},
            "teachers": [{"name": "qwen72b", **served}, {"name": "intern78b", **served}],
            "judge": served,
        }
    )


def change(recipe: Recipe, **changes: Any) -> Recipe:
    """Return a copy with other values. The names of ``changes`` are dotted, with __ for the dots."""
    values = recipe.model_dump()
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = values
        for section in sections:
            place = place[int(section)] if section.isdigit() else place[section]
        place[last] = value
    return Recipe.model_validate(values)


def found(recipe: Recipe, stage: str, world_size: int = 1, level: str = "error") -> dict[str, str]:
    return {p.key: str(p) for p in cross_check(recipe, stage, world_size) if p.level == level}


@pytest.mark.parametrize("stage", STAGES)
def test_a_good_recipe_has_no_problems_at_any_stage(good: Recipe, stage: str) -> None:
    assert cross_check(good, stage) == []


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("train", {"train__algorithm": "ril", "teachers": []}, "teachers", "no teachers"),
    (
        "run",
        {"discriminator__mode": "none", "teachers": [], "rewards__similarity__weight": 0},
        "teachers",
        "no teachers",
    ),
    ("train", {"cache_dir": "elsewhere"}, "cache_dir", "ril collect"),
    ("discriminator", {"cache_dir": "elsewhere"}, "cache_dir", "ril collect"),
    ("train", {"discriminator__mode": "none"}, "discriminator.mode", "rewards.similarity.weight"),
    ("train", {"discriminator__mode": "none", "train__algorithm": "gail"}, "discriminator.mode", "updated or fixed"),
    (
        "train",
        {"run_dir": "other", "cache_dir": "run/responses", "sft__enabled": False},
        "discriminator.mode",
        "ril discr",
    ),
    (
        "run",
        {"discriminator__mode": "fixed", "discriminator__pretraining__enabled": False},
        "discriminator.pretraining.enabled",
        "fixed",
    ),
    ("train", {"judge__base_urls": []}, "judge", "neither base_urls nor model_path"),
    ("train", {"judge__base_urls": [], "rewards__answer__kind": "rules_then_judge"}, "judge", "rules_then_judge"),
    ("eval", {"judge__base_urls": [], "eval__score": "judge"}, "judge", "eval.score"),
    ("train", {"judge__model_path": "model"}, "judge.model_path", "base_urls"),
    ("train", {"judge__model": ""}, "judge.model", "nothing"),
    ("train", {"judge__base_urls": ["localhost:8000"]}, "judge.base_urls", "http"),
    ("train", {"judge__api_key_env": "OPENRIL_NOT_SET"}, "judge.api_key_env", "export OPENRIL_NOT_SET"),
    ("collect", {"teachers__0__base_urls": []}, "teachers.0", "neither base_urls nor model_path"),
    ("collect", {"teachers__0__model_path": "model"}, "teachers.0.model_path", "base_urls"),
    ("collect", {"teachers__0__name": "student"}, "teachers.0.name", "reserved"),
    ("collect", {"teachers__0__name": "intern78b"}, "teachers.1.name", "used twice"),
    ("collect", {"teachers__0__name": ""}, "teachers.0.name", "nothing"),
    ("collect", {"teachers": [], "collect__student": False}, "collect", "collect.student"),
    ("train", {"train__teachers": ["qwen27b"]}, "train.teachers", "mean qwen72b"),
    (
        "sft",
        {"sft__targets": "teacher_responses", "sft__sources": ["intern"]},
        "sft.sources",
        "mean intern78b",
    ),
    ("sft", {"sft__targets": "teacher_responses", "cache_dir": "elsewhere"}, "sft.targets", "ril collect"),
    ("sft", {"sft__batch_size": 10, "sft__micro_batch_size": 4}, "sft.batch_size", "multiple"),
    ("train", {"train__num_teacher_responses": 0}, "train.num_teacher_responses", "got 0"),
    ("train", {"train__num_teacher_responses": -1}, "train.num_teacher_responses", "-1"),
    ("train", {"train__algorithm": "grpo", "train__num_generations": 1}, "train.num_generations", "standard deviation"),
    (
        "train",
        {"train__num_generations": 1, "train__teacher_responses_in_update": False},
        "train.num_generations",
        "one response",
    ),
    ("train", {"train__eval_every": 5, "data__validation": []}, "train.eval_every", "data.validation"),
    ("train", {"train__eval_suite": ["ai2d"]}, "train.eval_every", "train.eval_suite"),
    ("train", {"train__eval_suite": ["ai2d"], "train__eval_every": 5}, "eval.suite_max_tokens", "16384"),
    (
        "train",
        {"train__eval_suite": ["mmvet", "ai2d"], "train__eval_every": 5, "judge__base_urls": []},
        "train.eval_suite",
        "mmvet need a judge",
    ),
    ("train", {"rewards__answer__rule": "exakt"}, "rewards.answer.rule", "mean exact"),
    ("train", {"rewards__answer__kind": "none", "rewards__similarity__weight": 0}, "rewards", "weight"),
    ("train", {"rewards__functions": [{"function": "nowhere"}]}, "rewards.functions.0.function", "package.module:name"),
    ("train", {"rewards__functions": [{"function": "no.py:f"}]}, "rewards.functions.0.function", "no such file"),
    (
        "run",
        {"data__selection": {"enabled": True}, "collect__student": False},
        "data.selection.drop_overlong",
        "student",
    ),
    ("run", {"data__selection": {"enabled": True, "reference": "./model"}}, "data.selection.reference", "itself"),
    ("run", {"collect__student": False}, "collect.student", "student responses"),
    (
        "run",
        {"discriminator__pretraining__responses_per_question": 17},
        "discriminator.pretraining.responses_per_question",
        "(16), got 17",
    ),
    ("select", {"run_dir": "fresh", "cache_dir": "run/responses"}, "sft.enabled", "ril sft"),
    ("eval", {"data__validation": []}, "data.validation", "empty list"),
    ("train", {"data__train": []}, "data.train", "empty list"),
    ("train", {"data__train": ["trian.jsonl"]}, "data.train", "no such file"),
    ("train", {"data__columns": {"qestion": "q"}}, "data.columns.qestion", "mean question"),
    ("run", {"student__model": ""}, "student.model", "nothing"),
    ("run", {"student__model": "./nowhere"}, "student.model", "no such folder"),
    ("train", {"run_dir": "fresh", "cache_dir": "run/responses"}, "sft.enabled", "ril sft"),
    ("run", {"student__min_pixels": 9, "student__max_pixels": 4}, "student.min_pixels", "(4), got 9"),
    ("run", {"run_dir": "train.jsonl"}, "run_dir", "is a file"),
    ("run", {"discriminator__at_chance_accuracy": 0.99}, "discriminator.at_chance_accuracy", "(0.98), got 0.99"),
    ("train", {"train__retry__questions_per_step": 4}, "train.retry.questions_per_step", "discriminator"),
    *(
        (stage, {"train__retry__questions_per_step": 4, "train__algorithm": "dr_grpo", **other}, key, word)
        for stage, other, key, word in (
            ("train", {"rewards__answer__weight": 0}, "train.retry.questions_per_step", "answer reward"),
            ("train", {"teachers": []}, "train.retry.forms", "no teachers"),
            ("train", {"cache_dir": "elsewhere"}, "cache_dir", "ril collect"),
            ("run", {}, "collect.judge_responses", "verdicts"),
        )
    ),
    (
        "train",
        {"rewards__similarity__gate__open_above": 0.5},
        "rewards.similarity.gate.closed_below",
        "(0.5), got 0.55",
    ),
    *(
        ("train", {"discriminator__gradient_penalty": 1, **other}, "discriminator.gradient_penalty", word)
        for other, word in (
            ({"student__gradient_checkpointing": True}, "checkpointed"),
            ({"student__attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        )
    ),
    (
        "run",
        {"collect__student_after_sft": True, "sft__targets": "teacher_responses", "sft__sources": ["student"]},
        "collect.student_after_sft",
        "sft.sources",
    ),
    (
        "run",
        {"collect__student_after_sft": True, "sft__targets": "teacher_responses", "data__selection__enabled": True},
        "collect.student_after_sft",
        "data.selection",
    ),
    ("run", {"export__to": "gguf", "export__type": ["q9"]}, "export.type", "'q9'"),
    ("run", {"export__to": "compressed-tensors", "export__type": ["fp8", "w4a16"]}, "export.type", "got 2"),
    ("run", {"export__to": "compressed-tensors"}, "export.python", "nothing"),
    ("run", {"export__to": "compressed-tensors", "export__python": "./no-python"}, "export.python", "'./no-python'"),
    ("run", {"export__to": "gguf", "export__out": "train.jsonl"}, "export.out", "train.jsonl"),
    ("run", {"export__to": "gguf", "data__validation": []}, "export.check", "data.validation"),
]


@pytest.mark.parametrize(("stage", "changes", "key", "words"), CASES)
def test_errors_name_key_value_and_fix(good: Recipe, stage: str, changes: dict, key: str, words: str) -> None:
    problems = found(change(good, **changes), stage)
    assert key in problems and words in problems[key], problems


WARNINGS: list[tuple[str, dict[str, Any], str, str]] = [
    ("train", {"train__beta": 0}, "train.beta", "collapse"),
    ("train", {"train__num_teacher_responses": 1}, "train.num_teacher_responses", "absent from every group"),
    # 9 over two teachers is 5 + 4, one more than the 4 that were collected.
    (
        "train",
        {"train__num_teacher_responses": 9, "collect__num_responses": 4},
        "train.num_teacher_responses",
        "up to 5",
    ),
    (
        "train",
        {"train__num_teacher_responses": 5, "train__per_teacher": True, "collect__num_responses": 4},
        "train.num_teacher_responses",
        "more than once",
    ),
    *(
        ("train", {f"discriminator__{name}": value, "discriminator__mode": "fixed"}, f"discriminator.{name}", "fixed")
        for name, value in (("replay", 0.5), ("num_iterations", 1), ("update_below", 0.9), ("ema_decay", 0.9))
    ),
    (
        "train",
        {"rewards__similarity__gate__enabled": True, "rewards__similarity__weight": 0},
        "rewards.similarity.gate.enabled",
        "weight",
    ),
    ("run", {"collect__student_after_sft": True}, "collect.student_after_sft", "cached text"),
    ("train", {"train__retry__max_tries": 3}, "train.retry.questions_per_step", "change nothing"),
    (
        "run",
        {"train__num_generations": 20, "train__num_teacher_responses": 4},
        "collect.num_responses",
        "16 student responses",
    ),
    ("train", {"data__validation": ["train.jsonl"]}, "data.validation", "also in data.train"),
    (
        "run",
        {"data__selection": {"enabled": True}, "collect__max_completion_length": 9},
        "data.selection.drop_overlong",
        "9",
    ),
    ("run", {"export__python": "python3"}, "export.to", "python has no effect"),
]


@pytest.mark.parametrize(("stage", "changes", "key", "words"), WARNINGS)
def test_warnings_are_returned_and_stop_nothing(good: Recipe, stage: str, changes: dict, key: str, words: str) -> None:
    recipe = change(good, **changes)
    assert words in found(recipe, stage, level="warning")[key]
    assert key in [p.key for p in require(recipe, stage)]


def test_files_a_stage_does_not_read_need_not_be_there(good: Recipe) -> None:
    assert found(change(good, data__validation=["later.jsonl"]), "sft") == {}
    assert found(change(good, data__train=["gone.jsonl"]), "eval") == {}
    assert "data.validation" in found(change(good, data__validation=["later.jsonl"]), "eval")


def test_uneven_shares_of_teachers_are_fine(good: Recipe) -> None:
    assert found(change(good, train__num_teacher_responses=5), "train") == {}


def test_one_student_sample_is_enough_next_to_teacher_responses(good: Recipe) -> None:
    assert found(change(good, train__num_generations=1, train__num_teacher_responses=1), "train") == {}


def test_rl_only_needs_no_teachers_cache_or_discriminator(good: Recipe) -> None:
    changes = {"teachers": [], "train__algorithm": "dr_grpo", "cache_dir": "elsewhere", "sft__enabled": False}
    assert found(change(good, **changes), "train") == {}


def test_a_run_makes_its_own_cache_and_models(good: Recipe) -> None:
    assert found(change(good, run_dir="fresh"), "run") == {}


def test_rl_alone_does_not_ask_the_teachers_it_lists(good: Recipe) -> None:
    assert found(change(good, teachers__0__base_urls=[], train__algorithm="dr_grpo"), "run") == {}


def test_collection_for_sft_on_teacher_text_comes_before_sft(good: Recipe) -> None:
    assert found(change(good, run_dir="fresh", sft__targets="teacher_responses"), "collect") == {}


def test_a_judge_nobody_asks_need_not_exist(good: Recipe) -> None:
    assert found(change(good, judge__base_urls=[], judge__model="", rewards__answer__kind="rules"), "run") == {}


def test_collection_from_teachers_alone_needs_no_student(good: Recipe) -> None:
    assert found(change(good, student__model="", collect__student=False), "collect") == {}


def test_batch_has_to_fit_the_number_of_processes(good: Recipe) -> None:
    assert found(good, "train", world_size=6) == {}
    assert "35 or 40" in found(good, "train", world_size=5)["train.questions_per_step"]


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
def test_an_attention_whose_package_is_missing_is_refused(good: Recipe, monkeypatch: pytest.MonkeyPatch, package: str):
    name = {"flash_attn": "flash_attention_2", "flash_attn_interface": "flash_attention_3"}[package]
    there = change(good, student__attn_implementation=name, train__precision="bfloat16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = found(there, "train")["student.attn_implementation"]
    assert name in reason and package.replace("_", "-") in reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "student.attn_implementation" not in found(there, "train")
    half = change(there, train__precision="float32")
    assert "train.precision" in found(half, "train")["student.attn_implementation"]


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_prints_its_install_line(
    good: Recipe, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert f'pip install "openril[{tracker}]"' in found(change(good, train__log_to=[tracker]), "train")["train.log_to"]


def test_tables_of_groups_need_a_tracker(good: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "train.log_to" in found(change(good, train__log_groups_every=5), "train")["train.log_groups_every"]
    both = change(good, train__log_groups_every=5, train__log_to=["trackio"])
    assert "train.log_groups_every" not in found(both, "train")


def test_require_raises_with_every_error(good: Recipe) -> None:
    with pytest.raises(RecipeError) as caught:
        require(change(good, train__teachers=["x"], data__train=[]), "train")
    assert "train.teachers" in str(caught.value) and "data.train" in str(caught.value)


def test_unknown_stage_lists_the_stages(good: Recipe) -> None:
    with pytest.raises(RecipeError, match="sft, collect, select, discriminator, train, eval, run"):
        cross_check(good, "traim")


@pytest.mark.parametrize("stage", STAGES)
def test_vllm_needs_servers_in_each_stage_that_samples_the_student(good: Recipe, stage: str) -> None:
    uses = stage in ("collect", "train", "eval", "run")
    problems = found(change(good, student__sampler__engine="vllm"), stage)
    assert problems.keys() == ({"student.sampler.base_urls"} if uses else set())
    served = change(good, student__sampler={"engine": "vllm", "base_urls": ["http://127.0.0.1:1/v1"]})
    assert cross_check(served, stage) == []
    assert (
        "student.sampler.base_urls" in found(change(served, student__sampler__base_urls=["127.0.0.1"]), stage)
    ) == uses


@pytest.mark.parametrize("stage", STAGES)
def test_a_sync_of_adapters_needs_adapters_in_each_stage_that_trains_them(good: Recipe, stage: str) -> None:
    sampler = {"engine": "vllm", "base_urls": ["http://127.0.0.1:1/v1"], "sync": "adapter"}
    recipe = change(good, student__sampler=sampler)
    assert ("student.sampler.sync" in found(recipe, stage)) == (stage in ("train", "run"))
    assert "student.sampler.sync" not in found(change(recipe, student__lora__enabled=True), stage)


def test_collecting_from_teachers_alone_needs_no_server_of_the_student(good: Recipe) -> None:
    recipe = change(good, student__sampler__engine="vllm", collect__student=False)
    assert not found(recipe, "collect")


def test_an_export_names_the_package_or_the_model_that_it_lacks(good: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = change(good, export__to="gguf")
    monkeypatch.setattr(export_checks, "find_spec", lambda name: None)
    assert "gguf and xllamacpp" in found(gguf, "run")["export.to"]
    assert "xllamacpp" not in found(change(gguf, export__check=False), "run")["export.to"]
    assert found(gguf, "train") == {}, "the export is a stage of ril run"
    Path("model/config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert "qwen2_5_vl" in found(change(good, export__to="internvl-original"), "run")["export.to"]
    Path("model/config.json").write_text('{"model_type": "internvl"}')
    assert found(change(good, export__to="internvl-original"), "run") == {}


def test_the_types_of_an_export_are_those_of_its_module() -> None:
    assert {name: format_module(name).TYPES for name in FORMATS} == export_checks.EXPORT_TYPES
    assert set(get_args(ExportFormat)) == {"", *FORMATS}


NO_D = {"discriminator__mode": "none", "rewards__similarity__weight": 0.0}
PLUS = {
    "collect__judge_responses": True,
    "train__teacher_draw": "judged_right",
}


@pytest.mark.parametrize(
    ("changes", "key", "level"),
    [
        ({"train__per_teacher": True}, "train.teacher_draw", "error"),
        ({"train__algorithm": "dr_grpo"}, "train.teacher_draw", "warning"),
        ({"collect__judge_responses": False}, "collect.judge_responses", "error"),
        ({"train__algorithm": "gail", "judge": {}}, "train.teacher_draw", "error"),
        ({"train__teacher_weight": "shaped", "train__clip_teacher_upper": False}, "train.clip_teacher_upper", "error"),
        ({"train__teacher_weight": "shaped", "train__teacher_responses_in_update": False}, "train.teacher_weight", "warning"),
        ({"train__teacher_responses_below": 0.5, "train__teacher_responses_in_update": False},
         "train.teacher_responses_below", "warning"),
        ({"train__teacher_responses_below": 0.5, "rewards__answer__kind": "none"}, "train.teacher_responses_below", "error"),
        ({**NO_D, "train__num_generations": 0, "train__num_teacher_responses": 4, "train__teacher_responses_below": 0.5},
         "train.teacher_responses_below", "error"),
        ({"train__teacher_advantages": "positive", "train__num_teacher_responses": 0, "discriminator__mode": "none",
          "rewards__similarity__weight": 0.0}, "train.teacher_advantages", "warning"),
        ({"train__baseline": "students", "train__teacher_responses_in_update": False}, "train.baseline", "warning"),
        ({"train__baseline": "students", "train__num_generations": 1}, "train.num_generations", "error"),
        ({"train__baseline": "none", "train__algorithm": "grpo"}, "train.baseline", "error"),
        ({"train__baseline": "none", "rewards__combine": "per_reward"}, "train.baseline", "error"),
        ({"rewards__combine": "right_only", "train__algorithm": "gail"}, "rewards.combine", "error"),
        ({"rewards__combine": "right_only", "rewards__similarity__weight": 0.0}, "rewards.combine", "error"),
        ({"rewards__combine": "per_reward", "train__algorithm": "gail"}, "rewards.combine", "warning"),
        ({"train__beta": 0.0}, "train.beta", "warning"),
        ({"train__num_generations": 0}, "train.num_generations", "error"),
        ({**NO_D, "train__num_generations": 0, "train__baseline": "students"}, "train.num_generations", "error"),
        ({**NO_D, "train__num_generations": 0, "train__teacher_responses_in_update": False}, "train.num_generations", "error"),
        ({**NO_D, "train__num_generations": 0, "train__retry__questions_per_step": 2}, "train.num_generations", "error"),
        ({**NO_D, "rewards__answer__without_truth": "leave_out"}, "rewards.answer.without_truth", "error"),
        ({"rewards__answer__without_truth": "leave_out", "rewards__combine": "right_only"}, "rewards.answer.without_truth",
         "error"),
    ],
)  # fmt: skip
def test_switches_that_do_not_go_together(changes: dict[str, Any], key: str, level: str, good: Recipe):
    found = [(p.key, p.level) for p in cross_check(change(good, **{**PLUS, **changes}), "run")]
    assert (key, level) in found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"collect__judge_responses": False, "rewards__answer__kind": "rules"},  # rules are run when they are needed
        {"rewards__combine": "right_only"},
        {"rewards__combine": "per_reward", "train__baseline": "students"},
        {"train__beta": 0.0, "train__negative_scale": 0.5},
        {"train__teacher_weight": "shaped", "train__teacher_advantages": "positive"},
        {"train__teacher_responses_below": 0.3},
        {**NO_D, "train__num_generations": 0, "train__num_teacher_responses": 4, "train__baseline": "none"},
        {"rewards__answer__without_truth": "leave_out"},
    ],
)
def test_switches_that_go_together(changes: dict[str, Any], good: Recipe):
    assert cross_check(change(good, **{**PLUS, **changes}), "run") == []
