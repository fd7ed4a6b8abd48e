"""The paper's recipes and the launcher's settings agree: every stage accepts every number of processes they name."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from openril.models import memory_estimate as estimate
from openril.models.published_shapes import published_shape
from openril.models.stage_memory import CONTEXT_BYTES, stage_memory
from openril.recipe.checks import cross_check
from openril.recipe.loading import load_recipe
from openril.stages.run import stages

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


def test_the_commands_in_the_comments_are_the_stages_of_the_run_in_their_order():
    lines = re.findall(
        r"^#   (.*\b(?:ril|openril\.cli) \w+ RECIPE.*)$", (RECIPES / "paper" / "base.yaml").read_text(), re.M
    )
    words = [line.split("#")[0].replace("-m openril.cli", "ril").split() for line in lines]
    commands = [w[w.index("ril") + 1] for w in words]
    assert commands[0] == "check"
    for path in PAPER:
        assert commands[1:] == [title for title, _, _ in stages(load_recipe(path))]
    launched = {w[w.index("ril") + 1] for w in words if "accelerate" in w}
    assert launched == {"sft", "select", "discriminator", "train"}
    assert all(str(LAUNCHER.relative_to(RECIPES.parent)) in w for w in words if "accelerate" in w)


def test_the_work_of_the_paper_s_run_with_two_teachers():
    recipe = load_recipe(RECIPES / "paper" / "qwen2_5_vl_7b_two_teachers.yaml")
    work = estimate.work(recipe, 4_000_000, 1000)
    assert (work.sft_questions, work.provisional, work.questions) == (4_000_000, 50_000, 40_000)
    assert work.collected == {"qwen72b": 640_000, "internvl78b": 640_000, "student": 800_000}
    assert work.steps == 1112  # 40,000 / 36, rounded up
    judged = 1112 * 36 * (4 + 4)  # the student's samples and the teachers' responses
    assert work.requests == {"teacher qwen72b": 640_000, "teacher internvl78b": 640_000, "judge": judged}


# ---- memory, with the longest prompts and an image that fills them ------------------------------------------------------

SHARDED = [path for path in PAPER if re.search(r"_[78]b_", path.stem)]


def needs(recipe, processes: int) -> dict[str, float]:
    """The GiB of each stage, and "most" for all."""
    shape, prompt = published_shape(recipe.student.model), recipe.data.max_prompt_length
    assert shape is not None
    stages = stage_memory(recipe, shape, prompt, prompt, processes)
    found = {memory.stage: (memory.total + CONTEXT_BYTES) / estimate.GIB for memory in stages}
    assert set(found) == {"sft", "discriminator", "train"}
    return found | {"most": max(found.values())}


@pytest.mark.parametrize("path", SHARDED, ids=lambda p: p.stem)
def test_the_largest_students_fit_six_devices_of_80_gb_with_15_percent_to_spare(path: Path):
    recipe = load_recipe(path)
    assert recipe.train.shard
    assert needs(recipe, 6)["most"] < 0.85 * 80
    recipe.train.shard = False
    assert needs(recipe, 6)["most"] > 80  # so sharding is needed
