"""Every shipped recipe is valid, and the baselines run on a user's own data."""

from pathlib import Path

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from openril.recipe.checks import cross_check
from openril.recipe.loading import load_recipe
from openril.stages.check import run_check
from openril.storage import changed_keys
from playground.study.recipes import baseline_settings
from support.playground_models import tiny_playground
from support.tiny import tiny_questions, write_questions

ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(p for p in ROOT.rglob("*.yaml") if p.parent.name != "accelerate")
BASES = {"base.yaml"}
BASELINES = sorted((ROOT / "methods").glob("*.yaml"))


def name(path):
    return str(path.relative_to(ROOT))


def test_there_are_recipes():
    assert len(RECIPES) > 20


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_is_read(path):
    load_recipe(path)


def complete():
    return [p for p in RECIPES if p.name not in BASES and p not in BASELINES]


@pytest.mark.parametrize("path", complete(), ids=name)
def test_recipe_is_consistent(path):
    """Only data, checkpoints and caches may be missing, which are not part of the repository."""
    recipe = load_recipe(path)
    stage = "run" if recipe.teachers else "sft"
    missing = ("no such file", "no such folder", "holds no", "holds no config.json", "no responses")
    left = [str(p) for p in cross_check(recipe, stage) if not any(m in str(p) for m in missing)]
    assert left == []


@pytest.mark.parametrize("path", sorted((ROOT / "paper").glob("*teacher*.yaml")), ids=name)
def test_paper_recipes_keep_the_papers_values(path):
    recipe = load_recipe(path)
    train = recipe.train
    assert (train.algorithm, train.num_generations, recipe.collect.num_responses) == ("ril", 4, 16)
    assert (train.num_iterations, train.epsilon, train.beta) == (1, 0.2, 0.01)
    assert train.optimizer.learning_rate == recipe.discriminator.optimizer.learning_rate == 1e-6
    assert recipe.sft.optimizer.learning_rate == recipe.discriminator.pretraining.optimizer.learning_rate == 1e-5
    assert train.questions_per_step * train.num_generations == 144
    assert recipe.judge.model == "Qwen/Qwen2.5-32B-Instruct"
    assert len(recipe.teachers) == (2 if "two" in path.name else 1)
    sampling = train.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1.0, 0.95, 50, 1.05)


# Baselines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_playground(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("path", BASELINES, ids=name)
def test_a_baseline_is_ready_to_run_on_a_users_data(path, tmp_path, models):
    for split, count in (("train", 8), ("validation", 4)):
        questions = tiny_questions(tmp_path / split, count)
        write_questions(tmp_path / f"{split}.jsonl", questions)
    mine = tmp_path / "my.yaml"
    mine.write_text(f"""
base: {path}
run_dir: {tmp_path / "run"}
data: {{train: [{tmp_path / "train.jsonl"}], validation: [{tmp_path / "validation.jsonl"}], selection: {{enabled: false}}}}
student: {{model: {models / "student_qwen" / "sft"}, sampler: {{engine: transformers}}}}
teachers:
  - {{name: a, model_path: {models / "teacher_a"}}}
  - {{name: b, model_path: {models / "teacher_b"}}}
judge: {{model_path: {models / "judge"}, base_urls: []}}
train: {{questions_per_step: 4}}
""")
    console = Console(record=True, width=200)
    assert run_check(load_recipe(mine), console) == 0, console.export_text()


@pytest.mark.parametrize("path", BASELINES, ids=name)
def test_the_header_of_a_baseline_names_the_commands_that_it_needs(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"`base: recipes/{name(path)}`" in line for line in header)
    commands = [line.split()[2] for line in header if line.startswith("#   ril ") and "my.yaml" in line]
    recipe = load_recipe(path)
    assert commands == (["check", "run"] if recipe.sft.targets == "answers" else ["collect", "sft"])


@pytest.mark.parametrize("run", ["dr_grpo", "rejection_sampling", "ril_plus"])
def test_the_demo_runs_the_method_and_nothing_else_differs(run):
    """Apart from the tuned rate, and for Dr.GRPO as many samples as the others have responses."""
    ril, other = (load_recipe(ROOT / "demo" / f"{name}.yaml").model_dump() for name in ("ril", run))
    changed = {key: new for key, (_, new) in changed_keys(ril, other).items()}
    assert changed.pop("run_dir") == f"runs/demo/{run}"
    assert changed.pop("cache_dir") == "runs/demo/ril/responses"
    if run == "dr_grpo":
        assert changed.pop("train.num_generations") == 12
    method = baseline_settings({"rejection_sampling": "rejection_sampling_balanced"}.get(run, run))
    optimizer = {key for key in (*changed, *method) if key.startswith("train.optimizer.")}
    same = [{k: v for k, v in found.items() if k not in optimizer} for found in (changed, method)]
    assert same[0] == same[1]


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate").glob("*.yaml")), ids=name)
def test_accelerate_configurations_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == YAML(typ="safe").load(path.read_text())["num_processes"]
