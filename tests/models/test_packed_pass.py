"""A packed row against the plain pass, which is itself checked against transformers' own: the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import openril.models.packing as group_forward
from openril.models.adapters import add_adapters, base_model, without_adapters
from openril.models.freezing import freeze, round_products
from openril.models.group_attention import CannotPack, GroupLayout
from openril.models.loading import load_model, load_processor
from openril.models.packing import (
    GroupTokens,
    Policy,
    batch_by_tokens,
    pack,
    packing_difference,
    pad_rows,
    split_to,
)
from openril.models.packing_probe import tolerance
from openril.models.prompts import PromptEncoder
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.recipe.schema import LoraConfig
from openril.training.setup import enable_checkpointing
from support.tiny import unlike_questions

PACKING = ["tiny_qwen", "tiny_internvl", "tiny_llava_onevision", "tiny_smolvlm", "tiny_qwen3_vl"]
LIMIT = 48  # the longest response there may be
LENGTHS = [[5, 1, LIMIT, 12], [3, 9], [1, 1, 2], [LIMIT, 7], [6]]
QUESTIONS = {"one image": [0], "two images": [1], "no image": [2], "wide image": [3], "mixed": [2, 0, 1, 3, 0]}


@pytest.fixture(params=PACKING)
def packing_family(request: pytest.FixtureRequest) -> Path:
    """Every family that packs."""
    return request.getfixturevalue(request.param)


class Case:
    """A model, wrapped as the loop does, and its encoder."""

    def __init__(self, checkpoint: Path, model: Any = None, store: int = 0, temperature: float = 1.0) -> None:
        self.model = model if model is not None else load_model(str(checkpoint))
        self.encoder = PromptEncoder(load_processor(str(checkpoint)), base_model(self.model))
        self.store = FeatureCache(store)
        self.policy = Policy(self.model, temperature, VisionFeatures(base_model(self.model), self.store))
        self.policy.enable_packing()

    def groups(self, folder: Path, numbers: Sequence[int]) -> list[GroupTokens]:
        """Groups of the numbered questions with random responses of different lengths."""
        generator = torch.Generator().manual_seed(11)
        size = self.model.config.get_text_config().vocab_size
        ids = torch.tensor([i for i in range(size) if i not in self.encoder.special_token_ids])
        questions = unlike_questions(folder)
        return [
            GroupTokens(
                self.encoder(questions[q]),
                [ids[torch.randint(len(ids), (n,), generator=generator)] for n in LENGTHS[i]],
            )
            for i, q in enumerate(numbers)
        ]

    def run(self, groups: Sequence[GroupTokens], *, packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities, and gradients of their sum under different weights."""
        rows = (pack if packed else pad_rows)(groups, self.encoder.pad_token_id)
        self.policy.zero_grad()
        logprobs = self.policy(rows)
        assert logprobs.shape == rows.mask.shape and (logprobs[~rows.mask] == 0).all()
        weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(12))
        (logprobs * weights).sum().backward()
        return logprobs.detach(), {n: p.grad.clone() for n, p in self.policy.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Log-probabilities within 1e-5 nats; gradients within 1e-5 of a parameter's largest one.

    Some gradients are zero in truth (a key's bias moves all scores of a query alike): theirs is rounding noise, so
    there is a floor, a millionth of the largest gradient of all.
    """
    assert float((ours[0] - theirs[0]).abs().max()) < 1e-5
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    floor = 1e-6 * max(float(g.abs().max()) for g in theirs[1].values())
    for name, gradient in theirs[1].items():
        difference, size = (ours[1][name] - gradient).abs().max(), gradient.abs().max()
        assert float(difference) < max(1e-5 * float(size), floor), f"{name}: {difference} of {size}"


def reached(gradients: dict[str, Tensor], *parts: str) -> bool:
    return any(g.abs().max() > 1e-6 for n, g in gradients.items() if any(p in n for p in parts))


@pytest.mark.parametrize("kind", QUESTIONS)
def test_same_logprobs_and_gradients(kind: str, packing_family: Path, tmp_path: Path):
    case = Case(packing_family)
    groups = case.groups(tmp_path, QUESTIONS[kind])
    packed, plain = case.run(groups, packed=True), case.run(groups, packed=False)
    assert_same(packed, plain)
    assert reached(packed[1], "visual", "vision_tower", "vision_model") == (kind != "no image")


def test_temperature_is_the_plain_passs(tiny_student: Path, tmp_path: Path):
    case = Case(tiny_student, temperature=0.7)
    groups = case.groups(tmp_path, QUESTIONS["mixed"])
    assert_same(case.run(groups, packed=True), case.run(groups, packed=False))


def test_checkpointing_changes_nothing(packing_family: Path, tmp_path: Path):
    case = Case(packing_family)
    groups = case.groups(tmp_path, QUESTIONS["mixed"])
    plain = case.run(groups, packed=False)
    layer = case.model.get_decoder().layers[0].mlp
    calls: list[None] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(None))
    case.policy.train()
    assert_same(case.run(groups, packed=True), plain)
    assert len(calls) == 1
    enable_checkpointing(case.model)
    assert_same(case.run(groups, packed=True), plain)
    assert len(calls) == 3  # it did run again for the backward pass


def test_adapters(packing_family: Path, tmp_path: Path):
    torch.manual_seed(4)
    model = add_adapters(load_model(str(packing_family)), LoraConfig(enabled=True, r=2))
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # they start at zero, where adapters do nothing
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    case = Case(packing_family, model, store=2**24)
    groups = case.groups(tmp_path, QUESTIONS["mixed"])
    packed, plain = case.run(groups, packed=True), case.run(groups, packed=False)
    assert_same(packed, plain)
    assert all("lora" in n for n in packed[1]) and reached(packed[1], "lora_A") and reached(packed[1], "lora_B")

    rows = pack(groups, case.encoder.pad_token_id)
    with torch.no_grad(), without_adapters(model):
        reference = case.policy(rows)
        base = Policy(load_model(str(packing_family)))(pad_rows(groups, case.encoder.pad_token_id))
    assert float((reference - base).abs().max()) < 1e-5
    assert float((reference - packed[0]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("frozen", "keep"),
    [(["vision_tower"], "tower"), (["vision_tower", "projector"], "features"), ([], "nothing")],
    ids=["tower frozen", "vision side frozen", "all trains"],
)
def test_whatever_is_frozen(frozen: list[Any], keep: str, packing_family: Path, tmp_path: Path):
    """The first packed pass fills the store and the second is served from it."""
    model = load_model(str(packing_family))
    freeze(model, frozen)
    case = Case(packing_family, model, store=2**24)
    assert case.policy.vision.keep == keep
    groups = case.groups(tmp_path, QUESTIONS["mixed"])
    plain = case.run(groups, packed=False)
    assert_same(case.run(groups, packed=True), plain)
    assert case.store.hits == (0 if keep == "nothing" else 1)  # one question comes twice in the micro-batch
    assert_same(case.run(groups, packed=True), plain)
    assert case.store.hits == (0 if keep == "nothing" else 5)
    vision = [n for n in plain[1] if "lm_head" not in n and "language_model" not in n and "text_model" not in n]
    assert bool(vision) == (keep != "features")
    assert reached(plain[1], "visual.blocks", "vision_tower", "vision_model") == (keep == "nothing")


@pytest.mark.parametrize("packed", [True, False])
def test_a_rounded_reference_computes_the_same_under_autocast(packed: bool, tiny_family: Path, tmp_path: Path):
    """Bit for bit: autocast would round the same weights in every call."""
    case = Case(tiny_family)
    rows = (pack if packed else pad_rows)(case.groups(tmp_path, QUESTIONS["mixed"]), case.encoder.pad_token_id)
    results = []
    for rounded in (False, True):
        if rounded:
            round_products(case.model.requires_grad_(False), torch.bfloat16)
        try:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                results.append(case.policy(rows))
        except CannotPack:
            assert "gemma3" in tiny_family.name
            return
    assert torch.equal(*results)
    types = {p.dtype for p in case.model.parameters()}
    assert types == {torch.float32, torch.bfloat16}


def test_logits_in_parts(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = Case(tiny_student)
    groups = case.groups(tmp_path, QUESTIONS["mixed"])
    tokens = sum(len(c) for g in groups for c in g.completions)
    calls: list[int] = []
    case.model.lm_head.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    whole = case.run(groups, packed=True)
    assert calls == [tokens]
    calls.clear()
    vocabulary = case.model.lm_head.out_features
    monkeypatch.setattr(group_forward, "LOGITS_BYTES", 10 * 4 * vocabulary)
    parts = case.run(groups, packed=True)
    assert_same(parts, whole)
    assert max(calls) == 10 and sum(calls) == 2 * tokens  # each part once forward, once again for the backward pass
    assert_same(case.run(groups, packed=False), whole)
    calls.clear()
    with torch.no_grad():
        logprobs = case.policy(pack(groups, case.encoder.pad_token_id))
    assert sum(calls) == tokens and float((logprobs - whole[0]).abs().max()) < 1e-5


def test_logits_are_made_for_responses_only(tiny_qwen: Path, tmp_path: Path):
    case = Case(tiny_qwen)
    groups = case.groups(tmp_path, [1])
    calls: list[Any] = []
    case.model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out.shape[:-1].numel()))
    case.policy(pack(groups, case.encoder.pad_token_id))
    assert calls == [sum(LENGTHS[0])] and groups[0].prompt.length > 20


def test_a_row_holds_its_prompt_once_and_nothing_twice(tiny_qwen: Path, tmp_path: Path):
    """Responses' last tokens predict nothing, so they are left out; the discriminator's are kept."""
    case = Case(tiny_qwen)
    [group] = case.groups(tmp_path, [0])
    group = GroupTokens(group.prompt, [torch.tensor([60, 61, 62]), torch.tensor([63]), torch.tensor([64, 65])])
    prompt = group.prompt.input_ids.tolist()
    rows = pack([group, group], case.encoder.pad_token_id)
    assert rows.model_inputs["input_ids"].tolist() == [[*prompt, 60, 61, 64] * 2]
    p, after = len(prompt), group.prompt.next_position
    positions = rows.model_inputs["position_ids"]
    assert positions.shape == (3, 1, 2 * (p + 3))
    assert positions[:, 0, p : p + 3].tolist() == [[after, after + 1, after]] * 3
    assert rows.index[:3].tolist() == [[p - 1, p, p + 1], [p - 1, 0, 0], [p - 1, p + 2, 0]]
    assert rows.mask.sum(1).tolist() == [3, 1, 2] * 2
    whole = pack([group, group], case.encoder.pad_token_id, whole=True)
    assert whole.model_inputs["input_ids"].tolist() == [[*prompt, 60, 61, 62, 63, 64, 65] * 2]
    n = p + 6
    assert whole.last.tolist() == [p + 2, p + 3, p + 5, n + p + 2, n + p + 3, n + p + 5]
    assert group.packed_length() == n and group.plain_length() == 3 * p + 6


def test_other_groups_of_the_row_do_not_matter(packing_family: Path, tmp_path: Path):
    """A response's numbers follow from its own prompt and itself: not from what else is in the row."""
    case = Case(packing_family)
    groups = case.groups(tmp_path, QUESTIONS["mixed"])
    pad = case.encoder.pad_token_id
    with torch.no_grad():
        together = case.policy(pack(groups, pad))
        alone = [case.policy(pack([GroupTokens(g.prompt, [c])], pad))[0] for g in groups for c in g.completions]
    for row, expected in zip(together, alone, strict=True):
        assert row[: len(expected)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_difference_is_measured(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = Case(tiny_qwen)
    groups = case.groups(tmp_path, [0])
    pad, cpu = case.encoder.pad_token_id, torch.device("cpu")
    assert packing_difference(case.policy, groups, pad, cpu) < 1e-5 < tolerance(torch.float32)
    original = GroupLayout.of
    # Everything one long prompt: plain causal attention over the whole row.
    monkeypatch.setattr(GroupLayout, "of", lambda g, read: original([(sum(p + sum(n) for p, n in g), [])], read))
    assert packing_difference(case.policy, groups, pad, cpu) > tolerance(torch.float32)


def test_the_last_mlp_runs_where_it_is_read(tiny_qwen: Path, tmp_path: Path):
    case = Case(tiny_qwen)
    [group] = case.groups(tmp_path, [0])
    layers = case.policy.model.model.language_model.layers
    seen: list[tuple[int, int]] = []
    for number, layer in enumerate(layers):
        layer.mlp.up_proj.register_forward_hook(lambda m, args, out, n=number: seen.append((n, args[0].shape[1])))
    rows = pack([group], case.encoder.pad_token_id)
    case.policy(rows)
    length = rows.model_inputs["input_ids"].shape[1]
    # The prompt's last token predicts every response's first; a response's tokens but its last predict the next.
    read = 1 + sum(len(c) - 1 for c in group.completions)
    last = len(layers) - 1
    assert seen == [*((n, length) for n in range(last)), (last, read)]
    seen.clear()
    case.policy(pad_rows([group], case.encoder.pad_token_id))  # a plain pass is what it was
    assert len({n for _, n in seen}) == 1


# ---- micro-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([3, 4, 5], 7, [(0, 2), (2, 3)]),
        ([3, 4, 5], 6, [(0, 1), (1, 2), (2, 3)]),
        ([3, 4, 5], 12, [(0, 3)]),
        ([2, 9, 2, 2], 5, [(0, 1), (1, 2), (2, 4)]),  # too long for any budget: alone
        ([9, 1], 5, [(0, 1), (1, 2)]),
        ([5, 5], 1, [(0, 1), (1, 2)]),
        ([], 5, []),
    ],
)
def test_consecutive_lengths_within_a_budget(lengths: list[int], budget: int, expected: list[tuple[int, int]]):
    assert [(b.start, b.stop) for b in batch_by_tokens(lengths, budget)] == expected


@pytest.mark.parametrize(
    ("batches", "count", "expected"),
    [
        ([(0, 2), (2, 3)], 2, [(0, 2), (2, 3)]),
        ([(0, 5)], 2, [(0, 2), (2, 5)]),
        ([(0, 5)], 3, [(0, 2), (2, 3), (3, 5)]),
        ([(0, 1), (1, 4)], 3, [(0, 1), (1, 2), (2, 4)]),
        ([(0, 4)], 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_as_many_micro_batches_as_the_other_processes(
    batches: list[tuple[int, int]], count: int, expected: list[tuple[int, int]]
):
    given = [range(*b) for b in batches]
    assert [(b.start, b.stop) for b in split_to(given, count)] == expected
    assert given == [range(*b) for b in batches]
