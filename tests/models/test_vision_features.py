"""The vision side runs once for whatever is frozen, and what is kept is always the right thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openril.models.freezing import freeze
from openril.models.loading import load_model, load_processor
from openril.models.prompts import Prompt, PromptEncoder
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.records import ImageSource, Question
from support.tiny import draw_square, unlike_questions

PLENTY = 2**24


def prompts(checkpoint: Path, folder: Path, numbers: Sequence[int] = (0, 1, 3)) -> list[Prompt]:
    encoder = PromptEncoder(load_processor(str(checkpoint)), load_model(str(checkpoint)))
    questions = unlike_questions(folder)
    return [encoder(questions[n]) for n in numbers]


def tower_calls(model: Any) -> list[None]:
    """Grows by one whenever the vision tower is called."""
    calls: list[None] = []
    tower = VisionFeatures(model).tower
    assert tower is not None
    # The first layer below it: with the tower's own output kept, the tower is called but does not run.
    embedding = next(m for n, m in tower.named_modules() if "patch_embed" in n.rsplit(".", 1)[-1])
    embedding.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def flat(outputs: dict[str, Any] | None) -> Tensor:
    """All features as one vector, Qwen3-VL's of the lower layers too."""
    assert outputs is not None
    image = outputs["image"]
    parts = [image.pooler_output, *(getattr(image, "deepstack_features", None) or [])]
    return torch.cat([t.flatten() for part in parts for t in ([part] if isinstance(part, Tensor) else part)])


def fresh(model: Any, prompt: Prompt) -> Tensor:
    """Features straight from the model."""
    return flat({"image": model.model.get_image_features(**prompt.vision)})


@pytest.mark.parametrize("frozen", [["vision_tower"], ["vision_tower", "projector"]], ids=["tower", "vision side"])
def test_second_time_the_tower_does_not_run(frozen: list[Any], tiny_family: Path, tmp_path: Path):
    model = load_model(str(tiny_family))
    freeze(model, frozen)
    expected = [fresh(model, p) for p in prompts(tiny_family, tmp_path)]
    calls = tower_calls(model)
    vision = VisionFeatures(model, FeatureCache(PLENTY))
    for _ in range(2):
        for prompt, right in zip(prompts(tiny_family, tmp_path), expected, strict=True):
            assert torch.allclose(flat(vision([prompt])), right, atol=1e-6)
        assert len(calls) == 3
    assert torch.allclose(flat(vision(prompts(tiny_family, tmp_path)[:1])), expected[0], atol=1e-6)
    assert (vision.store.hits, vision.store.misses) == (4, 3)


def test_a_training_projector_gets_its_gradient_from_what_is_kept(tiny_family: Path, tmp_path: Path):
    model = load_model(str(tiny_family))
    freeze(model, ["vision_tower"])
    [prompt] = prompts(tiny_family, tmp_path, [1])
    weights: Tensor | None = None
    results = []
    for vision in (None, VisionFeatures(model, FeatureCache(PLENTY))):
        for _ in range(1 if vision is None else 2):  # made, then kept
            model.zero_grad()
            features = fresh(model, prompt) if vision is None else flat(vision([prompt]))
            weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
            (features * weights).sum().backward()
            results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, *kept = results
    assert plain and any(g.abs().max() > 1e-3 for g in plain.values())
    for gradients in kept:
        assert gradients.keys() == plain.keys()
        for name, gradient in plain.items():
            assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-5), name


def test_the_projector_of_today_is_used(tiny_family: Path, tmp_path: Path):
    """It has learned since its input was kept."""
    model = load_model(str(tiny_family))
    freeze(model, ["vision_tower"])
    [prompt] = prompts(tiny_family, tmp_path, [1])
    vision = VisionFeatures(model, FeatureCache(PLENTY))
    with torch.no_grad():
        before = flat(vision([prompt]))
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
        after = flat(vision([prompt]))
        right = fresh(model, prompt)
    assert torch.allclose(after, right, atol=1e-5) and not torch.allclose(before, right, atol=1e-3)


def test_a_training_tower_keeps_nothing(tiny_family: Path, tmp_path: Path):
    model = load_model(str(tiny_family))
    freeze(model, [])
    [prompt] = prompts(tiny_family, tmp_path, [1])
    calls = tower_calls(model)
    vision = VisionFeatures(model, FeatureCache(PLENTY))
    assert vision.keep == "nothing"
    for n in (1, 2):
        model.zero_grad()
        flat(vision([prompt])).sum().backward()
        assert len(calls) == n
    assert vision.store.bytes == vision.store.hits == vision.store.misses == 0
    tower = vision.tower
    assert tower is not None and any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())


@pytest.mark.parametrize("keep", ["features", "tower"])
def test_a_store_of_any_size_gives_the_same(keep: Any, tiny_student: Path, tmp_path: Path):
    """Nothing fits; only the smaller ones; one at a time; all."""
    model = load_model(str(tiny_student))
    three = prompts(tiny_student, tmp_path)
    right = [fresh(model, p) for p in three]
    whole = VisionFeatures(model, FeatureCache(PLENTY), keep)
    for p in three:
        whole([p])
    sizes = []
    for p in three:
        alone = FeatureCache(PLENTY)
        VisionFeatures(model, alone, keep)([p])
        sizes.append(alone.bytes)
    assert whole.store.bytes == sum(sizes)
    for limit in (0, min(sizes), max(sizes), sum(sizes)):
        store = FeatureCache(limit)
        vision = VisionFeatures(model, store, keep)
        for _ in range(2):
            for p, expected in zip(three, right, strict=True):
                assert torch.allclose(flat(vision([p])), expected, atol=1e-6)
                assert store.bytes <= limit
        assert (store.bytes > 0) == (limit > 0)
        assert store.hits == 3 if limit == sum(sizes) else store.hits < 3


def test_the_least_recently_used_goes_first():
    made: list[str] = []

    def make(name: str) -> Any:
        def now() -> Tensor:
            made.append(name)
            return torch.zeros(25)  # 100 bytes

        return now

    store = FeatureCache(250)
    for name in "abacab":  # b is dropped for c, although a came first; then c for b
        store.get(name, make(name))
    assert made == ["a", "b", "c", "b"]
    assert store.bytes == 200
    store.get("c", make("c"))
    assert made == ["a", "b", "c", "b", "c"]
    assert (store.hits, store.misses) == (2, 5)


def test_what_is_larger_than_the_store_drops_nothing():
    store = FeatureCache(100)
    store.get("small", lambda: torch.zeros(10))
    store.get("large", lambda: torch.zeros(100))
    assert store.bytes == 40
    store.get("small", lambda: pytest.fail("it was kept"))


def test_bytes_of_everything_inside_count():
    store = FeatureCache(1000)
    store.get("a", lambda: {"x": (torch.zeros(2, dtype=torch.float64), [torch.zeros(3)])})
    assert store.bytes == 2 * 8 + 3 * 4


def test_images_without_a_key_are_never_kept(tiny_qwen: Path, tmp_path: Path):
    [prompt] = prompts(tiny_qwen, tmp_path, [0])
    prompt.images_key = None
    model = load_model(str(tiny_qwen))
    calls = tower_calls(model)
    vision = VisionFeatures(model, FeatureCache(PLENTY), "features")
    vision([prompt])
    vision([prompt])
    assert len(calls) == 2 and vision.store.bytes == 0


def test_never_another_questions_features(tiny_family: Path, tmp_path: Path):
    """Same text, same sizes, other pictures; and the same pictures in another order or as a longer list."""
    model = load_model(str(tiny_family))
    encoder = PromptEncoder(load_processor(str(tiny_family)), model)
    red, blue = (ImageSource(path=draw_square(tmp_path / f"{c}.png", c)) for c in ("red", "blue"))
    as_bytes = ImageSource(data=(tmp_path / "blue.png").read_bytes())
    sets = [(red,), (blue,), (as_bytes,), (red, blue), (blue, red), (red, red)]
    questions = [Question(f"q{i}", "Which colour?", "red", images) for i, images in enumerate(sets)]
    vision = VisionFeatures(model, FeatureCache(PLENTY), "features")
    with torch.no_grad():
        for _ in range(2):
            for question in questions:
                prompt = encoder(question)
                assert torch.allclose(flat(vision([prompt])), fresh(model, prompt), atol=1e-6), question.id
    assert vision.store.misses == len(sets)
    # Another question about the same picture shares its features.
    vision([encoder(Question("other", "How many?", "1", (red,)))])
    assert vision.store.misses == len(sets)
    assert not torch.allclose(fresh(model, encoder(questions[0])), fresh(model, encoder(questions[1])), atol=1e-3)


def test_several_prompts_features_stand_in_their_order(tiny_family: Path, tmp_path: Path):
    model = load_model(str(tiny_family))
    three = prompts(tiny_family, tmp_path)
    [text] = prompts(tiny_family, tmp_path, [2])
    vision = VisionFeatures(model, FeatureCache(PLENTY), "features")
    width = model.config.get_text_config().hidden_size
    with torch.no_grad():
        for order in ([0, 1, 2], [2, 0, 0, 1]):
            given = [three[i] for i in order]
            ours = vision([given[0], text, *given[1:]])
            assert ours is not None
            pooled = ours["image"].pooler_output
            pooled = [pooled] if isinstance(pooled, Tensor) else pooled
            right = [model.model.get_image_features(**p.vision).pooler_output for p in given]
            joined = torch.cat([t.reshape(-1, width) for r in right for t in ([r] if isinstance(r, Tensor) else r)])
            assert torch.allclose(torch.cat([t.reshape(-1, width) for t in pooled]), joined, atol=1e-6)
    assert vision([text]) is None


def test_what_is_kept_cannot_be_changed_by_who_uses_it(tiny_family: Path, tmp_path: Path):
    """Models write into the output objects they are given."""
    model = load_model(str(tiny_family))
    [prompt] = prompts(tiny_family, tmp_path, [1])
    vision = VisionFeatures(model, FeatureCache(PLENTY), "features")
    right = flat(vision([prompt]))
    for _ in range(2):
        given = vision([prompt])
        assert given is not None
        given["image"].pooler_output = None
        given["image"].deepstack_features = None
    assert torch.equal(flat(vision([prompt])), right)


def test_two_models_share_one_store(tiny_student: Path, tmp_path: Path):
    """The reference's tower is the student's, as long as it is frozen."""
    student, reference = load_model(str(tiny_student)), load_model(str(tiny_student))
    freeze(student, ["vision_tower"])
    reference.requires_grad_(False)
    store = FeatureCache(PLENTY)
    ours = VisionFeatures(student, store)
    theirs = VisionFeatures(reference, store, ours.keep)
    calls = [tower_calls(m) for m in (student, reference)]
    [prompt] = prompts(tiny_student, tmp_path, [1])
    assert torch.allclose(flat(ours([prompt])), flat(theirs([prompt])), atol=1e-6)
    assert [len(c) for c in calls] == [1, 0]


@pytest.mark.parametrize("keep", ["features", "tower"])
def test_each_precision_has_its_own_features(keep: Any, tiny_family: Path, tmp_path: Path):
    """What autocast rounded must not reach a pass in float32, nor the other way round."""
    model = load_model(str(tiny_family))
    [prompt] = prompts(tiny_family, tmp_path, [1])
    vision = VisionFeatures(model, FeatureCache(PLENTY), keep)
    with torch.no_grad():
        for misses in (1, 1):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rounded = flat(vision([prompt]))
                assert torch.equal(rounded, flat(vision([prompt])))
            exact = flat(vision([prompt]))
            assert torch.allclose(exact, fresh(model, prompt), atol=1e-6)
            assert not torch.allclose(exact, rounded.float(), atol=1e-5)
            assert vision.store.misses == 2 * misses
