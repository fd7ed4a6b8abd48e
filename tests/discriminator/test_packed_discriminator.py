"""The discriminator's packed pass: what responses share runs once, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openril.models.packing import Batch, GroupTokens
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.records import Group, Response, Rollout
from openril.training.discriminator_update import Discriminator
from openril.training.distributed import make_accelerator
from openril.training.setup import fresh_discriminator
from support.loop import tiny_recipe
from support.tiny import unlike_questions

TEXTS = [
    ("student", "red"),
    ("student", "I look and look and look at the square, and it is yellow, or maybe it is green."),
    ("student", ""),
    ("a", "I look at the square. Its colour is red. The answer is red."),
    ("b", "Answer: blue (3)"),
]


@pytest.fixture(params=["tiny_qwen", "tiny_internvl", "tiny_llava_onevision", "tiny_smolvlm", "tiny_qwen3_vl"])
def packing_family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def made(checkpoint: Path, folder: Path, *, packed: bool = True, **overrides: Any) -> tuple[Discriminator, list[str]]:
    recipe = tiny_recipe(folder / "run", checkpoint, train__packed=packed, **overrides)
    warnings: list[str] = []
    d = fresh_discriminator(recipe, make_accelerator(recipe), recipe.discriminator.optimizer, warnings.append)
    with torch.no_grad():  # a head that starts small would hide differences
        d.accelerator.unwrap_model(d.network).head.weight.mul_(20)
    return d, warnings


def groups_on(folder: Path) -> list[Group]:
    """One image, two, none and a wide one; sides of different sizes."""
    groups = []
    for i, q in enumerate(unlike_questions(folder / "data")):
        texts = TEXTS if i % 2 else [*TEXTS, ("student", f"blue {i}")]
        groups.append(Group(q, [Rollout(Response(q.id, s, n, f"{t} {i}")) for n, (s, t) in enumerate(texts)]))
    return groups


def probabilities(d: Discriminator, groups: list[Group]) -> list[float]:
    d.score(groups)
    return [r.student_prob or 0.0 for g in groups for r in g.rollouts]


def learned(d: Discriminator, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of an update that is not taken."""
    gradients: dict[str, Tensor] = {}

    def keep(accelerator: Any, optimizer: Any, parameters: Any, limit: float, what: str) -> float:
        for name, p in accelerator.unwrap_model(d.network).named_parameters():
            if p.requires_grad:
                gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr("openril.training.discriminator_update.take_step", keep)
        return d.update(groups)["loss"], gradients


def assert_same(
    ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], within: float = 1e-5
) -> None:
    """Within 1e-5 of a parameter's largest gradient, or a millionth of the largest of all: keys' biases have none."""
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    floor = 0.1 * within * max(float(g.abs().max()) for g in theirs[1].values())
    assert floor > 1e-9
    for name, gradient in theirs[1].items():
        difference, size = float((ours[1][name] - gradient).abs().max()), float(gradient.abs().max())
        assert difference < max(within * size, floor), f"{name}: {difference} of {size}"


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses that read much alike pull the weights in opposite directions: in float32 little more than rounding is left."""
    monkeypatch.setattr("openril.training.setup.master_dtype", lambda recipe: torch.float64)


@pytest.mark.parametrize("loss", ["bce", "bradley_terry"])
@pytest.mark.parametrize("inputs", ["response", "question", "image"])
def test_same_logits_and_gradients(
    inputs: str, loss: str, tiny_student: Path, tmp_path: Path, in_double: None, monkeypatch: pytest.MonkeyPatch
):
    results = []
    for packed in (True, False):
        d, warnings = made(
            tiny_student, tmp_path, packed=packed, discriminator__inputs=inputs, discriminator__loss=loss
        )
        groups = groups_on(tmp_path)
        results.append((probabilities(d, groups), learned(d, groups, monkeypatch)))
        assert warnings == [] and d.packing.on is packed
    (probs, learning), (plain_probs, plain_learning) = results
    assert probs == pytest.approx(plain_probs, abs=1e-6)
    assert max(probs) - min(probs) > 2e-3
    assert_same(learning, plain_learning)


@pytest.mark.parametrize("loss", ["bce", "bradley_terry"])
def test_same_with_matched_lengths(
    loss: str, tiny_student: Path, tmp_path: Path, in_double: None, monkeypatch: pytest.MonkeyPatch
):
    """And the same where groups are split, which BCE allows. Beginnings that read alike leave little of the float32
    logits' gradients."""
    results = []
    for packed, tokens in ((True, 8192), (False, 8192), (True, 200)):
        d, _ = made(
            tiny_student,
            tmp_path,
            packed=packed,
            discriminator__inputs="question",
            discriminator__loss=loss,
            discriminator__match_length=True,
            discriminator__max_tokens_per_micro_batch=tokens,
        )
        groups = groups_on(tmp_path)
        results.append((probabilities(d, groups), learned(d, groups, monkeypatch)))
    for probs, learning in results[1:]:
        assert probs == pytest.approx(results[0][0], abs=1e-6)
        assert_same(learning, results[0][1], within=1e-4)
    assert max(probs) - min(probs) > 2e-3


def test_same_with_images_for_every_family_and_all_of_it_training(
    packing_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = []
    for packed in (True, False):
        d, warnings = made(
            packing_family, tmp_path, packed=packed, discriminator__inputs="image", discriminator__freeze=[]
        )
        groups = groups_on(tmp_path)
        results.append((probabilities(d, groups), learned(d, groups, monkeypatch)))
        assert warnings == [] and d.packing.on is packed
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert_same(results[0][1], results[1][1])
    assert any(g.abs().max() > 1e-6 for n, g in results[0][1][1].items() if "vision" in n or "visual" in n)


@pytest.mark.parametrize("inputs", ["response", "image"])
def test_groups_split_over_micro_batches_teach_the_same(
    inputs: str, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, _ = made(tiny_student, tmp_path, discriminator__inputs=inputs)
    split, _ = made(tiny_student, tmp_path, discriminator__inputs=inputs, discriminator__max_tokens_per_micro_batch=260)
    groups = groups_on(tmp_path)
    assert probabilities(split, groups) == pytest.approx(probabilities(whole, groups), abs=1e-5)
    calls = forwards(split)
    ours = learned(split, groups, monkeypatch)
    assert len(calls) > len(groups)
    assert_same(ours, learned(whole, groups, monkeypatch))


def test_bradley_terry_never_splits_a_group(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its pairs are of one group."""
    d, _ = made(
        tiny_qwen,
        tmp_path,
        discriminator__inputs="question",
        discriminator__loss="bradley_terry",
        discriminator__max_tokens_per_micro_batch=1,
    )
    groups = groups_on(tmp_path)
    probabilities(d, groups)
    calls = forwards(d)
    learned(d, groups, monkeypatch)
    assert [len(rows.last) for rows in calls] == [len(g.rollouts) for g in groups]


def forwards(d: Discriminator) -> list[Batch]:
    """The rows of every forward pass from here on."""
    calls: list[Batch] = []
    d.network.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    return calls


def members(d: Discriminator, groups: list[Group]) -> list[GroupTokens]:
    out = []
    for g in groups:
        head, after = d.prompts.head(g.question)
        out.append(GroupTokens(head, [d.prompts.tail(r.response.text, after) for r in g.rollouts]))
    return out


def test_a_response_alone_shares_one_prompt_with_all_questions(tiny_student: Path, tmp_path: Path):
    d, _ = made(tiny_student, tmp_path)
    groups = groups_on(tmp_path)
    probabilities(d, groups)
    calls = forwards(d)
    probabilities(d, groups)
    tokens = members(d, groups)
    head = tokens[0].prompt.length
    tails = sum(len(c) for g in tokens for c in g.completions)
    assert [rows.model_inputs["input_ids"].numel() for rows in calls] == [head + tails]
    plain, _ = made(tiny_student, tmp_path, packed=False)
    calls = forwards(plain)
    probabilities(plain, groups)
    assert sum(int(rows.model_inputs["attention_mask"].sum()) for rows in calls) == 22 * head + tails
    assert head > 30


@pytest.mark.parametrize("inputs", ["question", "image"])
def test_a_question_stands_once_before_its_responses(inputs: str, tiny_student: Path, tmp_path: Path):
    d, _ = made(tiny_student, tmp_path, discriminator__inputs=inputs)
    groups = groups_on(tmp_path)
    probabilities(d, groups)
    calls = forwards(d)
    probabilities(d, groups)
    expected = sum(g.prompt.length + sum(len(c) for c in g.completions) for g in members(d, groups))
    assert [rows.model_inputs["input_ids"].numel() for rows in calls] == [expected]


def test_images_are_processed_once_a_question(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The processor, and the frozen tower, over two rounds of learning and scoring."""
    d, _ = made(tiny_student, tmp_path, discriminator__inputs="image")
    groups = groups_on(tmp_path)
    processor = d.encoder.processor.image_processor
    processed: list[None] = []
    original = type(processor).__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        processed.append(None)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", counted)
    tower = VisionFeatures(d.accelerator.unwrap_model(d.network).backbone).tower
    assert tower is not None
    ran: list[None] = []
    embedding = next(m for n, m in tower.named_modules() if "patch_embed" in n.rsplit(".", 1)[-1])
    embedding.register_forward_pre_hook(lambda *_: ran.append(None))
    for _ in range(2):
        d.update(groups)
        probabilities(d, groups)
    assert len(processed) == 3
    assert len(ran) == 3 + 1  # and once in the plain pass that the first packed one is compared with


def test_a_fixed_discriminator_scores_packed(tiny_qwen: Path, tmp_path: Path):
    d, _ = made(tiny_qwen, tmp_path, discriminator__inputs="image")
    fixed = Discriminator(
        copy.deepcopy(d.network).requires_grad_(False),
        d.encoder,
        d.accelerator,
        d.settings,
        store=FeatureCache(2**24),
    )
    groups = groups_on(tmp_path)
    assert probabilities(fixed, groups) == pytest.approx(probabilities(d, groups), abs=1e-6)
    assert fixed.packing.on is True and fixed.store.bytes > 0


@pytest.mark.parametrize("inputs", ["response", "image"])
def test_gemma_falls_back_and_says_so(inputs: str, tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = []
    for packed in (True, False):
        d, warnings = made(tiny_gemma3, tmp_path, packed=packed, discriminator__inputs=inputs)
        groups = groups_on(tmp_path)
        results.append((probabilities(d, groups), learned(d, groups, monkeypatch)))
        assert d.packing.on is False
        assert len(warnings) == (1 if packed else 0)
        assert all("discriminator: Gemma3Model" in w and "sliding_window" in w for w in warnings)
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert_same(results[0][1], results[1][1])


def test_text_alone_proves_nothing_about_images(tiny_gemma3_full_attention: Path, tmp_path: Path):
    d, warnings = made(tiny_gemma3_full_attention, tmp_path, discriminator__inputs="image")
    groups = groups_on(tmp_path)
    probabilities(d, [g for g in groups if not g.question.images])
    assert d.packing.on is True and warnings == []
    ours = probabilities(d, groups)
    assert d.packing.on is False and len(warnings) == 1
    plain, _ = made(tiny_gemma3_full_attention, tmp_path, packed=False, discriminator__inputs="image")
    assert ours == pytest.approx(probabilities(plain, groups), abs=1e-6)
