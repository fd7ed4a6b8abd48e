"""Every recipe that is shipped can be read and fits together."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from openril.recipe.checks import cross_check
from openril.recipe.loading import load_recipe

ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(p for p in ROOT.rglob("*.yaml") if p.parent.name != "accelerate")
BASES = {"base.yaml", "world.yaml", "ril.yaml"}


def name(path):
    return str(path.relative_to(ROOT))


def test_there_are_recipes():
    assert len(RECIPES) > 20


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_is_read(path):
    load_recipe(path)


def complete():
    return [p for p in RECIPES if p.name not in BASES or name(p) == "demo/ril.yaml"]


@pytest.mark.parametrize("path", complete(), ids=name)
def test_recipe_contradicts_itself_nowhere(path):
    """Only what is not on this disk may be missing: data, checkpoints, caches."""
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


@pytest.mark.parametrize("path", sorted((ROOT / "baselines").glob("*.yaml")), ids=name)
def test_baselines_take_as_many_steps_on_the_same_questions(path):
    recipe, ril = load_recipe(path), load_recipe(ROOT / "demo" / "ril.yaml")
    assert recipe.data == ril.data
    assert recipe.cache_path == ril.cache_path
    assert recipe.run_path != ril.run_path
    assert recipe.seed == ril.seed
    if recipe.sft.enabled:
        assert recipe.sft.max_steps == ril.train.max_steps
    else:
        assert recipe.train.max_steps == ril.train.max_steps
    assert recipe.student.model == ril.start_student


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate").glob("*.yaml")), ids=name)
def test_accelerate_configurations_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == YAML(typ="safe").load(path.read_text())["num_processes"]
