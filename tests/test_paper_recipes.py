"""The paper's recipes and the launcher's settings agree: every stage accepts every number of processes they name."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from openril.recipe.checks import cross_check
from openril.recipe.loading import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = sorted((RECIPES / "paper").glob("*teacher*.yaml"))
BASELINES = sorted((RECIPES / "baselines").glob("*.yaml"))
LAUNCHER = RECIPES / "accelerate" / "ddp.yaml"
PROCESSES = (1, 2, 3, 4, 6)
DIVIDED = {
    "sft": "sft.batch_size",
    "discriminator": "discriminator.pretraining.questions_per_step",
    "train": "train.questions_per_step",
}
"""Stage -> the key that its number of processes must divide."""


def test_the_comments_and_the_launcher_name_these_process_counts():
    text = " ".join((RECIPES / "paper" / "base.yaml").read_text().replace("#", " ").split())
    [named] = re.findall(r"can be divided by ([\d, and]+) processes", text)
    assert tuple(map(int, re.findall(r"\d+", named))) == PROCESSES
    assert YAML(typ="safe").load(LAUNCHER.read_text())["num_processes"] == max(PROCESSES)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("stage", DIVIDED)
@pytest.mark.parametrize("path", [*PAPER, *BASELINES], ids=lambda p: p.stem)
def test_every_stage_accepts_every_process_count(path: Path, stage: str, processes: int):
    keys = {problem.key for problem in cross_check(load_recipe(path), stage, processes)}
    assert not keys & set(DIVIDED.values())


@pytest.mark.parametrize(("stage", "key"), DIVIDED.items())
def test_a_process_count_that_does_not_divide_is_refused(stage: str, key: str):
    """The check above would also pass if nothing were checked, so a count that cannot work must be reported."""
    assert key in {problem.key for problem in cross_check(load_recipe(PAPER[0]), stage, 7)}


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_one_image_fits_into_the_longest_prompt(path: Path):
    """Without a limit, Qwen2.5-VL's processor may turn one image into 16,384 tokens of 28 x 28 pixels."""
    recipe = load_recipe(path)
    if "Qwen2.5-VL" in recipe.student.model:
        assert 0 < recipe.student.max_pixels / 28**2 <= recipe.data.max_prompt_length / 2
