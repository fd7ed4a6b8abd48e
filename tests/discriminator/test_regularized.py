"""Gradient penalty and averaged weights of the discriminator: right values by hand, and equality with plain references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openril.discriminator.gradient_penalty import logits_and_slopes
from openril.models.packing import GroupTokens, pad_rows
from openril.models.prompts import Prompt
from openril.records import Group, Response, Rollout
from openril.training.discriminator_update import Discriminator
from openril.training.distributed import make_accelerator
from openril.training.setup import fresh_discriminator
from support.loop import tiny_recipe
from support.tiny import tiny_questions


class Squares(nn.Module):
    """A network whose logit is the square of the sum of a row's embeddings: token i has the embedding i."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding.from_pretrained(torch.arange(10.0)[:, None], freeze=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, rows: Any) -> torch.Tensor:
        inputs = rows.model_inputs
        return (self.embeddings(inputs["input_ids"])[..., 0] * inputs["attention_mask"]).sum(1).square()


def test_slopes_by_hand():
    prompt = Prompt(torch.tensor([3, 1]), {}, None, torch.arange(2)[None], 2)
    rows = pad_rows([GroupTokens(prompt, [torch.tensor([2]), torch.tensor([4, 1, 1])])], pad_token_id=9)
    network = Squares()
    logits, slopes = logits_and_slopes(network, network, rows)
    # The sums are 4 + 2 and 4 + 6. The gradient by each token is 2 x sum; the rows have one and three tokens of their own.
    assert logits.tolist() == [36.0, 100.0]
    assert slopes.tolist() == [1 * 12.0**2, 3 * 20.0**2]
    assert not network.embeddings._forward_hooks


def made(checkpoint: Path, tmp_path: Path, **overrides: Any) -> Discriminator:
    recipe = tiny_recipe(tmp_path / "run", checkpoint, **overrides)
    d = fresh_discriminator(recipe, make_accelerator(recipe), recipe.discriminator.optimizer)
    d.ema_decay = recipe.discriminator.ema_decay
    return d


def groups(tmp_path: Path) -> list[Group]:
    texts = [
        ("student", "red"),
        ("student", "It is blue, I think."),
        ("a", "I look at it. The answer is red."),
        ("b", "7"),
    ]
    questions = tiny_questions(tmp_path / "data", 2)
    return [Group(q, [Rollout(Response(q.id, s, i, t)) for i, (s, t) in enumerate(texts)]) for q in questions]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("tiny_qwen", {}),
        ("tiny_internvl", {"discriminator__inputs": "image", "discriminator__loss": "bradley_terry"}),
    ],
)
def test_the_update_descends_the_loss_with_the_penalty(
    family: str, overrides: Any, request: pytest.FixtureRequest, tmp_path: Path
):
    """Against a reference that takes the gradient by the embeddings of one response at a time."""
    checkpoint = request.getfixturevalue(family)
    shared = {"discriminator__optimizer": {"learning_rate": 3e-3, "max_grad_norm": 0.0}, **overrides}
    plain = made(checkpoint, tmp_path, **shared)  # the heads are equal, because they are drawn from the recipe's seed
    d = made(checkpoint, tmp_path, discriminator__gradient_penalty=3.0, **shared)
    network = d.accelerator.unwrap_model(d.network)
    network.train()
    expected, batch = 0.0, groups(tmp_path)
    for group in batch:
        head, after = d.prompts.head(group.question)
        for rollout in group.rollouts:
            tail = d.prompts.tail(rollout.response.text, after)
            kept: list[torch.Tensor] = []
            hook = network.backbone.get_input_embeddings().register_forward_hook(
                lambda m, i, o, kept=kept: kept.append(o)
            )
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                z = network(pad_rows([GroupTokens(head, [tail])], d.encoder.pad_token_id))
            hook.remove()
            (g,) = torch.autograd.grad(z.sum(), kept[0])
            expected += float(g[0, -len(tail) :].square().sum()) / 2 / len(batch)  # two responses a side
    without, with_penalty = plain.update(batch), d.update(batch)
    assert with_penalty["embedding_gradient"] == pytest.approx(expected, rel=1e-3)
    assert with_penalty["loss"] == pytest.approx(without["loss"] + 3.0 / 2 * expected, rel=1e-3)
    assert with_penalty["loss_minus_chance"] == pytest.approx(without["loss_minus_chance"], abs=1e-5)
    assert "embedding_gradient" not in without
    for _ in range(4):
        last = d.update(batch)
    assert last["embedding_gradient"] < 0.5 * expected  # the penalty reaches the weights


def test_scores_are_those_of_the_averaged_weights(tiny_qwen: Path, tmp_path: Path):
    d, batch = made(tiny_qwen, tmp_path, discriminator__ema_decay=0.75), groups(tmp_path)
    weights = [[p.detach().clone() for p in d.trainable]]

    def scored() -> list[float]:
        d.score(batch)
        return [r.student_prob for g in batch for r in g.rollouts if r.student_prob is not None]

    before = scored()
    for _ in range(2):
        d.update(batch)
        weights.append([p.detach().clone() for p in d.trainable])
    averaged = scored()
    for p, last in zip(d.trainable, weights[2], strict=True):
        assert torch.equal(p, last)  # training goes on from the weights themselves
    d.ema_decay = 0.0
    live = scored()
    with torch.no_grad():
        for p, first, second, third in zip(d.trainable, *weights, strict=True):  # 0.75 (0.75 w0 + 0.25 w1) + 0.25 w2
            p.copy_(0.5625 * first + 0.1875 * second + 0.25 * third)
    assert averaged == pytest.approx(scored(), abs=1e-6)
    assert len({round(values[0], 5) for values in (before, averaged, live)}) == 3
