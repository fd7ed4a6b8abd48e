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
from scripts import memory_table

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = sorted((RECIPES / "paper").glob("*teacher*.yaml"))
BASELINES = sorted((RECIPES / "methods").glob("*.yaml"))
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

SHARDED = [path for path in PAPER if re.search(r"_[378]b_", path.stem)]
ONE_GPU = RECIPES / "one_gpu" / "qwen2_5_vl_3b_24gb.yaml"


def needs(recipe, processes: int) -> dict[str, float]:
    """The GiB of each stage, and "most" for all."""
    shape, prompt = published_shape(recipe.student.model), recipe.data.max_prompt_length
    assert shape is not None
    stages = stage_memory(recipe, shape, prompt, prompt, processes)
    found = {memory.stage: (memory.total + CONTEXT_BYTES) / estimate.GIB for memory in stages}
    assert set(found) == {"sft", "discriminator", "train"}
    return found | {"most": max(found.values())}


@pytest.mark.parametrize("path", [p for p in PAPER if p not in SHARDED], ids=lambda p: p.stem)
def test_the_smallest_students_fit_whole(path: Path):
    recipe = load_recipe(path)
    assert not recipe.train.shard and needs(recipe, 6)["most"] < 0.85 * 80


@pytest.mark.parametrize("path", SHARDED, ids=lambda p: p.stem)
def test_the_largest_students_fit_six_devices_of_80_gb_with_15_percent_to_spare(path: Path):
    recipe = load_recipe(path)
    assert recipe.train.shard
    assert needs(recipe, 6)["most"] < 0.85 * 80
    recipe.train.offload = "swap"
    assert needs(recipe, 6)["most"] < 0.85 * 80
    recipe.train.shard, recipe.train.offload = False, "none"
    assert needs(recipe, 6)["most"] > 80  # so sharding is needed


def test_a_student_of_3b_fits_one_device_of_24_gb_with_15_percent_to_spare():
    recipe = load_recipe(ONE_GPU)
    assert recipe.student.lora.enabled and recipe.train.offload == "swap"
    found = needs(recipe, 1)
    assert found["most"] < 0.85 * 24
    [named] = re.findall(r"The largest need is\n# ([\d.]+) GiB, in `ril (\w+)`", ONE_GPU.read_text())
    assert (float(named[0]), named[1]) == (round(found["most"], 1), "discriminator")
    recipe.train.offload = "none"
    assert needs(recipe, 1)["most"] > 24


def test_the_choices_of_a_discriminator_on_24_gb_need_what_the_page_says():
    frozen = ["vision_tower", "projector", "word_embeddings", "mlp_gate", "mlp_up"]
    small = "OpenGVLab/InternVL3-1B-hf"
    found = []
    for init, freeze, algorithm in [
        ("", ["vision_tower"], "ril"),
        ("", frozen, "ril"),
        ("", [*frozen, "mlp_down"], "ril"),
        (small, ["vision_tower"], "ril"),
        ("", frozen, "dr_grpo"),
    ]:
        recipe = load_recipe(ONE_GPU)
        recipe.discriminator.init, recipe.discriminator.freeze, recipe.train.algorithm = init, freeze, algorithm
        shape, prompt = published_shape(recipe.student.model), recipe.data.max_prompt_length
        stages_ = stage_memory(recipe, shape, prompt, prompt, discriminator=published_shape(init))
        found.append(round((max(m.total for m in stages_) + CONTEXT_BYTES) / estimate.GIB, 1))
    page = (RECIPES.parent / "docs" / "sharding.md").read_text()
    section = page[page.index("| discriminator | GiB |") :]
    assert found == [float(n) for n in re.findall(r"^\| .* \| ([\d.]+)[^|]*\|$", section, re.M)]
    assert f"takes {found[0]:.0f} GiB" in " ".join(ONE_GPU.read_text().replace("#", " ").split())
    assert [float(n) for n in re.findall(r"([\d.]+) GiB[, ]", ONE_GPU.read_text().split("Other choices")[1])] == found[
        2:
    ]


def test_the_table_of_memory_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = RECIPES.parent / "docs" / "sharding.md"
    assert memory_table.main([str(page), "--check"]) == 0, "run python scripts/memory_table.py"
    old = tmp_path / "page.md"
    old.write_text(f"before {memory_table.BEGIN} old {memory_table.END} after")
    assert memory_table.main([str(old), "--check"]) == 1 and "page.md" in capsys.readouterr().err
    assert old.read_text().endswith("old <!-- end --> after")


def test_the_recipe_of_one_device_names_its_stages_and_programs_in_their_order():
    recipe, text = load_recipe(ONE_GPU), ONE_GPU.read_text()
    commands = re.findall(r"^#   ril (\w+) RECIPE", text, re.M)
    assert commands == ["check", *(title for title, _, _ in stages(recipe))]
    for stage in DIVIDED:
        assert not {problem.key for problem in cross_check(recipe, stage, 1)} & set(DIVIDED.values())
    [(model, port)] = re.findall(r"vllm serve (\S+) .*--port (\d+)", text)
    [teacher] = recipe.teachers
    assert model == teacher.model and teacher.base_urls == [f"http://127.0.0.1:{port}/v1"]
    assert f'"longest_edge": {recipe.student.max_pixels}' in text
    # Nothing else asks a server.
    assert recipe.student.sampler.engine == "transformers" and recipe.answer_kind == recipe.eval.score == "rules"
