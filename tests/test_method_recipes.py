"""Every recipe of recipes/methods runs for two steps through the real command, all on one cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from openril.cli import main
from openril.data.reading import read_questions
from openril.recipe.loading import load_recipe
from openril.responses.cache import ResponseCache
from openril.stages.run import stages
from openril.stages.train import right_answers
from openril.storage import read_jsonl, weights_fingerprint
from support.playground_models import tiny_playground
from support.tiny import tiny_questions, write_questions

METHODS = sorted((Path(__file__).parents[1] / "recipes" / "methods").glob("*.yaml"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, four questions, and a cache that `ril collect` made and judged; every verdict is right."""
    folder = tmp_path_factory.mktemp("methods")
    tiny_playground(folder / "models")
    write_questions(folder / "train.jsonl", tiny_questions(folder / "data", 4))
    collection = recipe_of(folder, folder / "collection", "paper/base.yaml")
    assert main(["collect", str(collection), "--sft.enabled", "False"]) == 0
    return folder


def recipe_of(folder: Path, run: Path, base: str) -> Path:
    """Write a recipe as a user would, which names data, models and cache, with small numbers."""
    path = folder / f"{run.name}.yaml"
    models = folder / "models"
    path.write_text(f"""
base: {METHODS[0].parents[1] / base}
run_dir: {run}
cache_dir: {folder / "responses"}
data: {{train: [{folder / "train.jsonl"}], validation: [], selection: {{enabled: false}}}}
student:
  model: {models / "student_qwen" / "sft"}
  dtype: float32
  gradient_checkpointing: false
  sampler: {{engine: transformers}}
teachers:
  - {{name: a, model_path: {models / "teacher_a"}}}
  - {{name: b, model_path: {models / "teacher_b"}}}
judge: {{model_path: {models / "judge"}, base_urls: [], batch_size: 8, max_tokens: 16}}
collect: {{num_responses: 2, max_completion_length: 6, questions_per_batch: 4, judge_responses: true}}
sft: {{batch_size: 4, max_steps: 2, save_every: 0}}
discriminator: {{pretraining: {{questions_per_step: 3, save_every: 0}}}}
train: {{questions_per_step: 2, max_steps: 2, max_completion_length: 24, precision: float32, save_every: 0}}
""")
    return path


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_two_steps_of_a_method(path: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mine = recipe_of(prepared, tmp_path / path.stem, f"methods/{path.name}")
    recipe = load_recipe(mine)
    if recipe.sft.targets != "answers":
        assert main(["sft", str(mine)]) == 0, capsys.readouterr()
        assert (recipe.sft_student_path / "model.safetensors").exists()
        return
    options = ["--sft.enabled", "False"]
    if (
        recipe.train.retry.questions_per_step
    ):  # the judge accepts everything, and rules find no answer of these models right
        options += ["--rewards.answer.kind", "rules"]
    assert main(["run", str(mine), *options]) == 0, capsys.readouterr()
    rows = read_jsonl(recipe.run_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert (recipe.run_path / "student" / "model.safetensors").exists()
    assert ("discriminator/loss" in rows[0]) == recipe.uses_discriminator
    assert ("discriminator/replayed_accuracy" in rows[1]) == recipe.uses_replay
    responses = read_jsonl(recipe.run_path / "rollouts" / "step_000002.jsonl")
    sources = {row["source"] for row in responses}
    assert ("student" in sources) == bool(recipe.train.num_generations)
    assert bool(sources - {"student"}) == bool(recipe.teacher_responses_per_question)
    assert rows[1].get("retry/groups", 0) == (2 if recipe.train.retry.questions_per_step else 0)


def test_the_student_is_collected_after_a_warm_start_on_teacher_text(prepared: Path, tmp_path: Path):
    mine = recipe_of(prepared, tmp_path / "after", "methods/ril.yaml")
    cache = tmp_path / "responses"
    options = ["--cache_dir", str(cache), "--sft.targets", "teacher_responses", "--collect.student_after_sft", "True"]
    options += ["--train.max_steps", "1", "--collect.judge_responses", "False"]
    recipe = load_recipe(mine, options)
    titles = [title for title, _, _ in stages(recipe)]
    assert titles == ["collect", "sft", "collect", "discriminator", "train"]
    assert main(["collect", str(mine), *options]) == 0
    assert list(ResponseCache.open(cache).manifest()["sources"]) == ["a", "b"]
    assert main(["run", str(mine), *options]) == 0
    sources = ResponseCache.open(cache).manifest()["sources"]
    assert sources["student"]["revision"] == weights_fingerprint(recipe.sft_student_path)
    assert len(read_jsonl(recipe.run_path / "metrics.jsonl")) == 1


def test_the_answers_that_are_compared_are_those_that_the_judge_accepted(prepared: Path, tmp_path: Path):
    recipe = load_recipe(recipe_of(prepared, tmp_path / "right", "methods/zppo_like.yaml"))
    questions = read_questions(recipe.data, "train")
    said: list[str] = []
    right = right_answers(recipe, questions, check=True, wait=lambda: None, say=said.append)
    cache = ResponseCache.open(recipe.cache_path).load(questions, ["a", "b"], 2, check_hashes=False)
    for question in questions:
        everything = [r.text for name in ("a", "b") for r in cache.responses_for(question.id, name)]
        assert len(everything) == 4
        # The judge of these models accepts every response that it is asked about; empty and repetitive ones are not.
        assert set(right(question)) <= set(everything)
    number = sum(len(right(question)) for question in questions)
    assert number > 0 and said[0].startswith(f"{number} of 16 ")
