"""The paper's models at their real sizes, without weights: parameters, module groups, layers and what trains."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from openril.models.freezing import freeze
from openril.models.published_shapes import model_on_meta, published_config, published_models, published_shape
from openril.models.stage_memory import stage_memory
from openril.recipe.schema import Recipe
from openril.stages.check import run_check
from openril.training.sharding import decoder_layers, frozen_vision

QWEN_7B, INTERNVL_8B = "Qwen/Qwen2.5-VL-7B-Instruct", "OpenGVLab/InternVL3-8B-hf"
LAYERS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 36,
    QWEN_7B: 28,
    "Qwen/Qwen2.5-VL-72B-Instruct": 80,
    "OpenGVLab/InternVL3-1B-hf": 24,
    "OpenGVLab/InternVL3-2B-hf": 28,
    INTERNVL_8B: 28,
    "OpenGVLab/InternVL3-78B-hf": 80,
}
STUDENTS = [name for name in LAYERS if "72B" not in name and "78B" not in name]


@pytest.mark.parametrize("name", LAYERS)
def test_the_models_have_the_published_number_of_parameters(name: str) -> None:
    published = published_models()[name]["parameters"]
    shape = published_shape(name)
    assert shape is not None and shape.text.layers == LAYERS[name]
    if isinstance(published, int):
        assert shape.total == published
    else:  # rounded to three digits
        assert shape.total == pytest.approx(published, rel=5e-4)
    assert "other" not in shape.parameters


def test_the_module_groups_of_the_models_of_seven_billion() -> None:
    """Numbers that were published by part: vision side, tower, and the layers of the language model, the same in both."""
    qwen, intern = published_shape(QWEN_7B), published_shape(INTERNVL_8B)
    assert qwen is not None and intern is not None
    vision = {"vision_tower", "projector"}
    assert sum(qwen.parameters[g] for g in vision) == 676_550_144
    assert qwen.total - 676_550_144 == 7_615_616_512  # Qwen2.5-7B, with its padded vocabulary
    assert (qwen.parameters["vision_tower"], intern.parameters["vision_tower"]) == (631_975_680, 304_012_288)
    for shape, words in ((qwen, 152_064), (intern, 151_674)):
        layers = sum(n for g, n in shape.parameters.items() if g not in vision | {"word_embeddings", "lm_head"})
        assert layers == 6_525_621_760  # with the last norm
        assert shape.parameters["word_embeddings"] == shape.parameters["lm_head"] == words * 3584


def test_embeddings_and_head_of_the_3b_are_one_matrix() -> None:
    model = model_on_meta(published_config("Qwen/Qwen2.5-VL-3B-Instruct"))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    shape = published_shape("Qwen/Qwen2.5-VL-3B-Instruct")
    assert shape is not None and "lm_head" not in shape.parameters


@pytest.mark.parametrize("name", [QWEN_7B, INTERNVL_8B])
def test_freezing_the_tower_leaves_what_the_estimate_takes_as_trainable(name: str) -> None:
    model, shape = model_on_meta(published_config(name)), published_shape(name)
    assert shape is not None
    trainable = freeze(model, ["vision_tower"])
    assert (
        sum(trainable.values()) == shape.trainable(["vision_tower"]) == shape.total - shape.parameters["vision_tower"]
    )
    assert "vision_tower" not in trainable and trainable["projector"] == shape.parameters["projector"]


@pytest.mark.parametrize("name", STUDENTS)
def test_the_units_of_sharding_are_the_decoder_layers_and_the_rest(name: str) -> None:
    """A pass gathers the rest and three layers, each value in two bytes; a frozen tower is in no unit."""
    model, shape = model_on_meta(published_config(name)), published_shape(name)
    assert shape is not None
    layers = decoder_layers(model)
    assert len(layers) == LAYERS[name]
    sizes = {sum(p.numel() for p in layer.parameters()) for layer in layers}
    [layer] = sizes
    freeze(model, ["vision_tower"])
    whole = frozen_vision(model)
    assert sum(p.numel() for p in whole) == shape.parameters["vision_tower"]
    rest = shape.total - shape.parameters["vision_tower"] - len(layers) * layer
    memory = stage_memory(Recipe.model_validate({"train": {"shard": True}}), shape, 100, processes=6)[-1]
    gathered = memory.phases["student update"]["student: gathered weights"]
    assert gathered == pytest.approx(2 * (rest + 3 * layer), rel=1e-4)
    held = memory.held["student: weights"] - 2 * shape.parameters["vision_tower"]
    assert held == pytest.approx(4 * (rest + len(layers) * layer) / 6, rel=2e-3)


def test_only_models_of_the_list_have_a_shape() -> None:
    assert published_shape("nobody/unknown") is None and published_config("./folder") is None


def test_check_plans_with_a_model_that_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing model stays a problem, but its memory is estimated."""

    def unreachable(*arguments: Any, **settings: Any) -> Any:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("openril.models.loading.AutoConfig.from_pretrained", unreachable)
    monkeypatch.setattr("openril.models.loading.AutoProcessor.from_pretrained", unreachable)
    console = Console(file=io.StringIO(), width=200)
    recipe = Recipe.model_validate({"student": {"model": QWEN_7B}, "rewards": {"answer": {"kind": "rules"}}})
    assert run_check(recipe, console, 1, ["80"]) == 2
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert "problem  student: " in page and "8.29B parameters" in page and "student: weights" in page
