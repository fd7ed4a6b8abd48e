"""Cells, their recipes, their order, what they need, and which of them are recognized as done."""

import json
from functools import reduce

import pytest
from ruamel.yaml import YAML

from openril.errors import DataError, RecipeError, StateError
from openril.recipe.checks import cross_check
from openril.recipe.loading import load_recipe
from openril.recipe.validation import RENAMED_KEYS
from openril.storage import changed_keys, write_json
from playground.study.command import check, prepare
from playground.study.jobs import Plan
from playground.study.plan import ABLATIONS, CELLS, COMPUTE, MAIN, METHODS, REFERENCE, Settings
from playground.study.recipes import RECIPES, Place, Recipes, baseline_settings, method_settings, put
from support.finished_study import write_cell

TRAINED = [(g, n) for g in ("contenders", "ablations") for n, c in CELLS[g].items() if c.how != "as_is"]
NOT_HERE_YET = ("no such file", "no such folder", "holds no")


def recipes(tmp_path, *overrides):
    return Recipes(tmp_path / "out", tmp_path / "models", overrides)


def plan(tmp_path, **selected):
    return Plan(Settings(tmp_path / "out", tmp_path / "models", **selected))


@pytest.mark.parametrize(("group", "name"), TRAINED, ids=[n for _, n in TRAINED])
def test_every_cell_is_consistent_and_takes_the_same_steps_from_the_same_student_on_the_same_questions(
    tmp_path, group, name
):
    made = recipes(tmp_path)
    recipe = made.cell(Place("student_qwen", group, name, 1))
    reference = made.cell(Place("student_qwen", "contenders", REFERENCE, 1))
    problems = [str(p) for p in cross_check(recipe, "sft" if recipe.sft.enabled else "train") if p.key != "train.beta"]
    assert [p for p in problems if not any(w in p for w in NOT_HERE_YET)] == []
    assert (recipe.sft.max_steps if recipe.sft.enabled else recipe.train.max_steps) == reference.train.max_steps
    assert recipe.train.questions_per_step == reference.train.questions_per_step
    assert recipe.data == reference.data
    assert recipe.seed == reference.seed == 1
    assert recipe.student.model == str(tmp_path / "models/student_qwen" / ("base" if name == "no_sft" else "sft"))
    assert recipe.start_student == recipe.student.model or recipe.sft.enabled


def test_imitation_learns_as_many_teacher_responses_a_step_as_the_groups_hold(tmp_path):
    made = recipes(tmp_path, "train.questions_per_step=10", "train.num_generations=3")
    assert made.cell(Place("student_qwen", "contenders", "sft_teacher_text", 0)).sft.batch_size == 30
    assert made.cell(Place("student_qwen", "contenders", "ril_both", 0)).teacher_responses_per_question == 3


def test_an_ablation_changes_what_it_names_and_nothing_else(tmp_path):
    made = recipes(tmp_path)
    reference = made.cell(Place("student_qwen", "contenders", REFERENCE, 0)).model_dump()
    other = made.cell(Place("student_qwen", "ablations", "beta_0.1", 0)).model_dump()
    assert other["train"].pop("beta") == 0.1
    assert reference["train"].pop("beta") == 0.01
    other.pop("run_dir"), reference.pop("run_dir")
    assert other == reference


def test_every_ablation_differs_from_the_reference(tmp_path):
    made = recipes(tmp_path)
    seen = [made.cell(Place("student_qwen", "contenders", REFERENCE, 0)).model_dump(exclude={"run_dir"})]
    for _, cells in ABLATIONS.values():
        for name in cells:
            values = made.cell(Place("student_qwen", "ablations", name, 0)).model_dump(exclude={"run_dir"})
            assert values not in seen, name
            seen.append(values)


def test_folders_and_overrides_reach_every_path(tmp_path):
    recipe = recipes(tmp_path, "train.max_steps=7").cell(Place("student_internvl", "contenders", "ril_a", 2))
    assert recipe.run_path == tmp_path / "out/student_internvl/contenders/ril_a/seed_2"
    assert recipe.data.train == [str(tmp_path / "out/world/train.jsonl")]
    assert [t.model_path for t in recipe.teachers] == [str(tmp_path / "models" / t) for t in ("teacher_a", "teacher_b")]
    assert recipe.judge.model_path == str(tmp_path / "models/judge")
    assert (recipe.train.max_steps, recipe.seed) == (7, 2)


def test_test_questions_are_in_no_recipe(tmp_path):
    jobs = plan(tmp_path).jobs()
    assert all("test.jsonl" not in job.recipe().model_dump_json() for job in jobs if "/compute/" not in job.name)


def test_cells_that_begin_alike_share_a_discriminator(tmp_path):
    made = recipes(tmp_path)

    def variant(name, group="ablations", student="student_qwen"):
        return made.variant(Place(student, group, name, 0))

    reference = variant(REFERENCE, "contenders")
    assert variant("gail", "contenders") == variant("mu_4") == variant("d_fixed") == variant("text_off") == reference
    assert len({reference, variant("ril_a", "contenders"), variant("sees_image"), variant("bradley_terry")}) == 4
    assert variant("match_length").match_length
    assert variant("no_sft").start == "base"
    assert variant("d_none") is variant("dr_grpo", "contenders") is variant("sft_teacher_text", "contenders") is None


def test_a_discriminators_recipe_has_the_settings_of_its_cells(tmp_path):
    made = recipes(tmp_path)
    place = Place("student_qwen", "contenders", "gad_like", 0)
    recipe, cell = made.discriminator("student_qwen", made.variant(place)), made.cell(place)
    assert (recipe.discriminator.inputs, recipe.discriminator.loss) == ("question", "bradley_terry")
    assert recipe.teacher_names == cell.teacher_names
    assert recipe.start_student == cell.start_student
    assert recipe.cache_path == cell.cache_path


def test_the_most_informative_cells_come_first(tmp_path):
    places = list(plan(tmp_path).places())
    first_of = {(p.student, p.group): i for i, p in reversed(list(enumerate(places)))}
    order = [
        ("student_qwen", "contenders"), ("student_internvl", "contenders"), ("student_qwen", "ablations"),
        ("student_qwen", "compute"),
    ]  # fmt: skip
    assert [first_of[key] for key in order] == sorted(first_of[key] for key in order)
    second = [p.name for p in places if p.student == "student_internvl" and p.group == "contenders"]
    mains = [n for n in second if n in MAIN]
    assert second[: len(mains)] == mains


def test_every_job_comes_after_what_it_needs(tmp_path):
    seen = set()
    for job in plan(tmp_path).jobs():
        assert set(job.needs) <= seen, job.name
        seen.add(job.name)


def test_selected_cells_bring_what_they_need_and_no_more(tmp_path):
    jobs = plan(tmp_path, students=["student_qwen"], seeds=1, only=["ril_a"], groups=["contenders"]).jobs()
    assert [j.name for j in jobs] == [
        "teachers/cache",
        "student_qwen/caches/sft",
        "student_qwen/discriminators/sft-response-bce-teacher_a",
        "student_qwen/contenders/ril_a/seed_0",
    ]


def test_the_teachers_recipes_are_the_same_for_any_students(tmp_path):
    def of_teachers(students):
        jobs = plan(tmp_path, students=students, seeds=1, groups=["contenders"]).jobs()
        return {job.name: job.recipe() for job in jobs if job.name.startswith("teachers/")}

    both = of_teachers(["student_qwen", "student_internvl"])
    assert set(both) == {"teachers/teacher_a", "teachers/teacher_b", "teachers/cache"}
    assert of_teachers(["student_internvl"]) == both


def test_equal_compute_is_computed_from_measured_steps(tmp_path):
    selected = plan(tmp_path, students=["student_qwen"], seeds=2, groups=["compute"])
    for seed in range(2):
        write_cell(tmp_path / "out", Place("student_qwen", "contenders", REFERENCE, seed), 1)  # 20 steps of 1.5 s
        write_cell(tmp_path / "out", Place("student_qwen", "contenders", "dr_grpo", seed), 1)  # of 0.5 s
    assert selected.compute_steps(Place("student_qwen", "compute", "dr_grpo", 1)) == 60
    with pytest.raises(StateError, match="ril_both and grpo"):
        selected.compute_steps(Place("student_qwen", "compute", "grpo", 1))


def test_a_begun_compute_cell_keeps_its_steps(tmp_path):
    selected = plan(tmp_path, students=["student_qwen"], seeds=1, groups=["compute"])
    for name in (REFERENCE, "dr_grpo"):
        write_cell(tmp_path / "out", Place("student_qwen", "contenders", name, 0), 1)
    job = next(j for j in selected.jobs() if j.name == "student_qwen/compute/dr_grpo/seed_0")
    assert {REFERENCE, "dr_grpo"} <= {n.split("/")[2] for n in job.needs}
    job.prepare()
    write_cell(tmp_path / "out", Place("student_qwen", "contenders", REFERENCE, 0), 1, steps=40)
    job.prepare()
    assert load_recipe(job.recipe_path).train.max_steps == 60


def test_a_folder_of_other_settings_is_refused(tmp_path):
    def job(*overrides):
        selected = plan(tmp_path, students=["student_qwen"], seeds=1, only=["dr_grpo"], overrides=overrides)
        return next(j for j in selected.jobs() if "contenders/dr_grpo" in j.name)

    job().prepare()
    job().prepare()
    with pytest.raises(StateError, match=r"seed_0 .*train\.beta"):
        job("train.beta=0.5").prepare()


def test_settings_of_a_method_come_from_its_baseline_recipe(tmp_path):
    made = recipes(tmp_path)
    reference = made.cell(Place("student_qwen", "contenders", REFERENCE, 0)).model_dump()
    named = {name: method.baseline for name, method in METHODS.items() if method.baseline}
    assert len(named) >= 7 and set(named.values()) <= {path.stem for path in (RECIPES / "methods").glob("*.yaml")}
    for name in named:
        settings = method_settings(METHODS[name])
        cell = made.cell(Place("student_qwen", "contenders", name, 0)).model_dump()
        changed = {key: new for key, (_, new) in changed_keys(reference, cell).items()}
        of_every_cell = {"collect.judge_responses", "run_dir", "sft.enabled", "sft.max_steps", "sft.batch_size"}
        assert {k: v for k, v in changed.items() if k not in of_every_cell} == {
            k: v for k, v in settings.items() if k not in of_every_cell
        }
    assert {name for name in named if METHODS[name].overrides} == {"gad_like"}


def test_the_method_settings_are_few():
    assert baseline_settings("dr_grpo") == {"train.algorithm": "dr_grpo"}
    assert baseline_settings("grpo") == {"train.algorithm": "grpo"}
    assert baseline_settings("gail") == {"train.algorithm": "gail"}
    assert baseline_settings("sft_teacher_text") == {"sft.targets": "teacher_responses"}
    assert baseline_settings("rejection_sampling") == {
        "sft.targets": "judged_responses", "collect.judge_responses": True,
    }  # fmt: skip
    assert baseline_settings("ril") == {}
    assert baseline_settings("persistent") == {"discriminator.replay": 0.5}
    gad = {
        "train.algorithm": "gail", "train.teacher_responses_in_update": False, "discriminator.loss": "bradley_terry",
        "discriminator.inputs": "question", "rewards.similarity.kind": "raw",
    }  # fmt: skip
    assert baseline_settings("gad") == gad
    # The cells of the study keep the reward that they were run with.
    assert method_settings(METHODS["gad_like"]) == gad | {"rewards.similarity.kind": "continuous"}


def test_a_finished_cell_with_earlier_setting_names_and_moved_models_is_recognized(tmp_path):
    def job(models):
        settings = Settings(tmp_path / "out", tmp_path / models, seeds=1, only=["gad_like"], groups=["contenders"])
        return next(j for j in Plan(settings).jobs() if "student_qwen/contenders/gad_like" in j.name)

    before = job("old/weights")
    before.prepare()
    values = YAML(typ="safe").load(before.recipe_path.read_text())
    for old, new in RENAMED_KEYS.items():
        (*sections, last), (*new_sections, new_last) = old.split("."), new.split(".")
        moved = reduce(dict.__getitem__, new_sections, values).pop(new_last)
        reduce(dict.__getitem__, sections, values)[last] = moved
    assert {"on", "optimiser"} <= set(values["sft"]) and values["discriminator"]["sees"] == "question"
    before.recipe_path.write_text(json.dumps(values))
    write_cell(tmp_path / "out", Place("student_qwen", "contenders", "gad_like", 0), 1)

    after = job("new/weights")
    assert after.seconds() == 60.0
    assert after.changed() == []
    after.prepare()  # Also a cell that has begun continues.
    assert load_recipe(after.recipe_path) == after.recipe()
    values["discriminator"]["sees"] = "image"
    after.recipe_path.write_text(json.dumps(values))
    assert after.changed() == ["discriminator.inputs"]


def test_a_key_that_is_no_setting_is_refused():
    with pytest.raises(RecipeError, match=r"train\.betta"):
        put({"train": {"beta": 1}}, "train.betta", 2)


def test_unknown_names_and_missing_models_are_refused(tmp_path):
    with pytest.raises(DataError, match="ril_c"):
        check(Settings(only=("ril_c",)))
    with pytest.raises(DataError, match="student_qwen/base"):
        check(Settings(models=tmp_path))


def test_another_study_in_the_same_folder_is_refused(tmp_path):
    settings = Settings(tmp_path / "out", tmp_path / "models", num_train=14, num_validation=14, num_test=14)
    prepare(settings)
    prepare(settings)
    settings.num_test = 28
    with pytest.raises(StateError, match="num_test"):
        prepare(settings)


def test_other_models_in_the_same_folder_are_refused(tmp_path):
    settings = Settings(tmp_path / "out", tmp_path / "models", num_train=14, num_validation=14, num_test=14)
    weights = settings.models / "teacher_a" / "model.safetensors"
    write_json(weights, 1)
    prepare(settings)
    write_json(weights, 2)
    with pytest.raises(StateError, match=r"models\.teacher_a"):
        prepare(settings)


def test_methods_at_equal_compute_are_methods_at_equal_steps():
    assert set(COMPUTE) < set(METHODS)
