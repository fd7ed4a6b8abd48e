"""Recipes from YAML, bases and overrides: accepted values, and the contents of error messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from openril.errors import RecipeError
from openril.recipe.loading import load_recipe, load_saved_recipe, save_recipe
from openril.recipe.schema import DiscriminatorConfig, Recipe, TeacherConfig, TrainConfig
from openril.recipe.validation import setting_names

SHIPPED = Path(__file__).parents[2] / "recipes"
# recipes/accelerate holds configurations of the launcher.
RECIPES = sorted(p for p in SHIPPED.rglob("*.yaml") if "accelerate" not in p.relative_to(SHIPPED).parts)

SERVED = """
teachers:
  - {name: big, model: m, base_urls: [http://127.0.0.1:1/v1]}
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.relative_to(SHIPPED).as_posix())
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "")) == Recipe()


def test_sections_without_content_keep_their_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "student:\nteachers:\ntrain:\n  beta:\n")) == Recipe()


def test_targets_of_sft_are_text(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "sft:\n  targets: teacher_responses\n")).sft.targets == "teacher_responses"


def test_yes_and_off_are_understood_in_place_of_true_and_false(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "sft: {enabled: off}\ndata: {allow_urls: yes}\n"))
    assert (recipe.sft.enabled, recipe.data.allow_urls) == (False, True)


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SERVED.replace("}", ", extra_body: {x: 1e-6, y: 010}}")))
    assert recipe.teachers[0].extra_body == {"x": 1e-6, "y": 10}


def test_nested_request_fields_pass_with_their_truth_values(tmp_path: Path) -> None:
    text = SERVED.replace("}", ", extra_body: {chat_template_kwargs: {enable_thinking: false}}}")
    assert "chat_template_kwargs" in load_recipe(write(tmp_path, text)).teachers[0].extra_body


def test_unknown_key_names_file_line_and_nearest(tmp_path: Path) -> None:
    text = message(tmp_path, "seed: 1\ntrain:\n  betta: 0.1\n")
    assert text.startswith("train.betta: ") and f"({tmp_path}/r.yaml:3)" in text and "train.beta?" in text


def test_right_key_in_the_wrong_section_is_found(tmp_path: Path) -> None:
    assert "mean train.optimizer.learning_rate" in message(tmp_path, "train: {learning_rate: 1e-5}")
    assert "mean train.num_generations?" in message(tmp_path, "num_generations: 8")


def test_unknown_key_in_a_list_entry(tmp_path: Path) -> None:
    text = message(tmp_path, "teachers: [{nam: x}]")
    assert text.startswith("teachers.0.nam: ") and "mean teachers.0.name?" in text


@pytest.mark.parametrize(
    ("text", "key", "expected", "got"),
    [
        ("train: {num_generations: four}", "train.num_generations", "whole number", "'four'"),
        ("train: {num_generations: 2.5}", "train.num_generations", "whole number", "2.5"),
        ("train: {beta: true}", "train.beta", "number", "true"),
        ("train: {beta: -1}", "train.beta", ">= 0", "-1"),
        ("train: {beta: .nan}", "train.beta", ">= 0", "nan"),
        ("rewards: {answer: {weight: .inf}}", "rewards.answer.weight", "finite number", "inf"),
        ("data: {train: q.jsonl}", "data.train", "list", "'q.jsonl'"),
        ("train: 3", "train", "section", "3"),
        ("train: {algorithm: gril}", "train.algorithm", "ril, dr_grpo, grpo, gail", "'gril'"),
        ("student: {model: 7}", "student.model", "text", "7"),
    ],
)
def test_wrong_values_name_key_expected_and_got(tmp_path: Path, text: str, key: str, expected: str, got: str) -> None:
    found = message(tmp_path, text)
    assert re.fullmatch(rf"{key}: expected .*{expected}.*, got {got} \(.*r\.yaml:1\)\.( Did you mean ril\?)?", found)


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = message(tmp_path, "train:\n  betta: 1\n  epochs: -1\ndata:\n  train: x\n")
    assert re.findall(r"^(\S+): .*r\.yaml:(\d)\)", text, re.M) == [
        ("train.betta", "2"),
        ("train.epochs", "3"),
        ("data.train", "5"),
    ]


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    text = message(tmp_path, "seed: 1\nseed: 2\n")
    assert "r.yaml:2" in text and "'seed'" in text


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "{a: &x [*x]}", "\tseed: 1"])
def test_what_is_no_recipe_is_a_recipe_error(tmp_path: Path, text: str) -> None:
    assert "r.yaml" in message(tmp_path, text)


def test_tags_that_would_run_code_are_refused(tmp_path: Path) -> None:
    message(tmp_path, "run_dir: !!python/object/apply:os.system ['true']")


def test_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, "", "paper.yaml")
    with pytest.raises(RecipeError, match=r"papr\.yaml: .*paper\.yaml\?"):
        load_recipe(tmp_path / "papr.yaml")


def test_base_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "seed: 3\ntrain: {beta: 0.5, epsilon: 0.3}\ndata: {train: [a.jsonl, b.jsonl]}\n", "deep/base.yaml")
    path = write(tmp_path, "base: deep/base.yaml\ntrain: {beta: 0.1}\ndata: {train: [c.jsonl]}\n")
    recipe = load_recipe(path)
    assert (recipe.seed, recipe.train.beta, recipe.train.epsilon) == (3, 0.1, 0.3)
    assert recipe.data.train == ["c.jsonl"]


def test_of_several_bases_the_later_one_counts(tmp_path: Path) -> None:
    write(tmp_path, "seed: 3\ntrain: {beta: 0.5, epsilon: 0.3}\n", "method.yaml")
    write(tmp_path, "seed: 4\ntrain: {beta: 0.2, betta: 1}\n", "mine.yaml")
    assert re.search(r"train.betta.*mine.yaml:2", message(tmp_path, "base: [method.yaml, mine.yaml]\n"), re.S)
    write(tmp_path, "seed: 4\ntrain: {beta: 0.2}\n", "mine.yaml")
    recipe = load_recipe(write(tmp_path, "base: [method.yaml, mine.yaml]\nseed: 5\n"))
    assert (recipe.seed, recipe.train.beta, recipe.train.epsilon) == (5, 0.2, 0.3)
    assert load_recipe(write(tmp_path, "base: [mine.yaml, method.yaml]\n")).train.beta == 0.5


@pytest.mark.parametrize("base", ["3", "[method.yaml, {a: b}]", "''"])
def test_a_base_that_is_no_path_is_refused(base: str, tmp_path: Path) -> None:
    write(tmp_path, "seed: 3\n", "method.yaml")
    assert re.search(r"base: .*path.*r\.yaml", message(tmp_path, f"base: {base}\n"))


def test_an_empty_key_takes_back_what_the_base_set(tmp_path: Path) -> None:
    write(tmp_path, "train: {beta: 0.5}\n", "base.yaml")
    assert load_recipe(write(tmp_path, "base: base.yaml\ntrain: {beta: }\n")).train.beta == 0.01


def test_problems_in_a_base_name_the_base(tmp_path: Path) -> None:
    write(tmp_path, "train:\n  betta: 1\n", "base.yaml")
    text = message(tmp_path, "base: base.yaml\n")
    assert "base.yaml:2" in text and "train.betta" in text


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: r.yaml\n", "base.yaml")
    assert re.search(r"^base: .*r\.yaml -> .*base\.yaml", message(tmp_path, "base: base.yaml\n"))


def test_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "sft: {targets: answers}\ntrain: {beta: 3e-7}\nrun_dir: läufe/é\n" + SERVED))
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert "läufe/é" in (tmp_path / "saved.yaml").read_text(encoding="utf-8")


def test_a_section_that_moved_is_named_and_read_from_recipes_of_earlier_runs(tmp_path: Path) -> None:
    text = "train: {beta: 0.5, sampler: {engine: vllm, concurrency: 7}}\nstudent: {model: m}\n"
    assert re.search(r"^train\.sampler: .*r\.yaml:1\).* student\.sampler\.$", message(tmp_path, text))
    for student in ("student: {model: m}", ""):
        path = write(tmp_path, text.replace("student: {model: m}", student))
        recipe = load_saved_recipe(path)
        assert (recipe.student.sampler.engine, recipe.student.sampler.concurrency, recipe.train.beta) == (
            "vllm",
            7,
            0.5,
        )
        assert recipe.student.model == ("m" if student else "")


def test_a_key_pasted_into_the_recipe_is_refused_and_not_repeated(tmp_path: Path) -> None:
    text = message(tmp_path, "judge: {api_key_env: sk-12345}")
    assert "environment variable" in text and "12345" not in text
    assert "12345" not in message(tmp_path, "judge: {base_urls: ['https://me:12345@host/v1']}")
    assert "12345" not in message(tmp_path, "judge: {extra_body: {api_key: sk-12345}}")
    assert "12345" not in message(tmp_path, "judge: {extra_body: {headers: {Authorization: sk-12345}}}")


def test_overrides_change_values_lists_and_list_entries(tmp_path: Path) -> None:
    path = write(tmp_path, SERVED)
    arguments = ["--train.beta", "0.02", "--data.train", "a", "b", "--teachers.0.base-urls", "http://x/v1"]
    arguments += ["--train.num_generations=8"]
    recipe = load_recipe(path, arguments)
    assert (recipe.train.beta, recipe.train.num_generations, recipe.data.train) == (0.02, 8, ["a", "b"])
    assert (recipe.teachers[0].base_urls, recipe.teachers[0].name) == (["http://x/v1"], "big")


@pytest.mark.parametrize(
    "arguments", [["--sft.no-enabled"], ["--sft.enabled", "false"], ["--sft.enabled=False"], ["--sft.no_enabled"]]
)
def test_switches_can_be_written_both_ways(tmp_path: Path, arguments: list[str]) -> None:
    assert load_recipe(write(tmp_path, ""), arguments).sft.enabled is False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--train.betta 1", r"^--train\.betta: .*mean --train\.beta\?"),
        ("--beta 1", r"^--beta: .*mean --train\.beta\?"),
        ("--train.sampler.engine vllm", r"^--train\.sampler\.engine: .*--student\.sampler\.engine\."),
        ("--train.beta x", r"--train\.beta: .*'x'"),
        ("--train.beta -1", r"\btrain\b.*\bbeta\b.* 0$"),
        ("--train.algorithm ppo", r"^invalid choice 'ppo'"),
        ("--sft.enabled maybe", r"^--sft\.enabled: .*true or false.*'maybe'"),
        ("--rewards.answer.weight inf", r"^--rewards\.answer\.weight: .*finite.* inf"),
        ("stray", "Unrecognized options: stray"),
    ],
)
def test_bad_overrides_are_recipe_errors(tmp_path: Path, arguments: str, expected: str) -> None:
    assert re.search(expected, message(tmp_path, "", *arguments.split()))


def test_help_shows_the_docstring_of_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_recipe(write(tmp_path, SERVED), ["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for section, field in ((TrainConfig, "beta"), (TeacherConfig, "name"), (DiscriminatorConfig, "mode")):
        assert (section.model_fields[field].description or "?") in shown
    lists_of_sections = {"teachers", "rewards.functions"}  # written in the file; their entries are reached by number
    for name in set(setting_names()) - lists_of_sections:
        flag = f"--{name.replace('_', '-')}"
        assert f"{flag} " in shown or f"{flag}," in shown, name


def test_loading_and_checking_import_no_torch() -> None:
    code = "import sys, openril.recipe.loading, openril.recipe.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    text = (
        "sft: {optimizer: &o {learning_rate: 3e-5, weight_decay: 0.1}}\ntrain: {optimizer: {<<: *o, weight_decay: 0}}\n"
    )
    train = load_recipe(write(tmp_path, text)).train.optimizer
    assert (train.learning_rate, train.weight_decay) == (3e-5, 0.0)


def test_dates_and_hours_stay_text(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "\ufeffrun_dir: 2026-01-31\ncache_dir: 12:30:00\n"))
    assert (recipe.run_dir, recipe.cache_dir) == ("2026-01-31", "12:30:00")


def test_a_key_written_twice_is_refused_at_any_depth_without_its_values(tmp_path: Path) -> None:
    text = message(tmp_path, "judge:\n  batch_size: 1\nteachers:\n  - name: x\n    model: sk-1\n    model: sk-2\n")
    assert "r.yaml:6" in text and "'model'" in text and "sk-" not in text
    assert "'beta'" in message(tmp_path, "train: {beta: 1, beta: 2}")


def test_an_anchor_that_contains_itself_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "r.yaml:2" in message(tmp_path, "seed: 1\ndata: &x {train: *x}\n")


def test_saved_numbers_are_numbers_for_readers_of_yaml_1_1_too(tmp_path: Path) -> None:
    save_recipe(Recipe(), tmp_path / "saved.yaml")
    assert "learning_rate: 1.0e-05" in (tmp_path / "saved.yaml").read_text()
