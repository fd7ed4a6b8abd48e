"""The judge's training: plain supervised learning of replies, with two tasks next to it that make it learn faster."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from openril.hf import DynamicCache
from openril.storage import stable_hash
from playground.judge.cases import Case, reply_text
from playground.models.training import optimizers
from playground.world.questions import LETTERS

PROMPT_WEIGHT = 0.2
"""Weight of the prompt's tokens (question, truth, response) in the loss; the reply's tokens have weight 1. Predicting the
prompt teaches the model to look things up. Without it, the judge quotes the truth as what the response states."""
PROMPT_SHARE = 0.35
"""Share of the steps, from the first, in which the prompt's tokens are in the loss."""
DRILLS = 32
"""Number of replies without prompts in each step. They teach the comparison, since a reply's verdict follows from its own
words."""


def fit(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    drills: Sequence[str],
    steps: int,
    batch_size: int,
    learning_rate: float,
    say: Callable[[str], None],
) -> None:
    """Train the model in place on ``batch_size`` cases and DRILLS replies without prompts a step.

    With fewer than ``steps * batch_size`` cases they are used again in another order. The learning rate falls linearly.
    The part of the prompt that all rows share is computed once a batch.
    """
    encoded = _batches([_encode(tokenizer, case) for case in cases], steps, batch_size)
    prefix = _common_prefix([ids for ids, _ in encoded])
    warmup = max(1, steps // 20)
    made = optimizers(model, learning_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda n: min((n + 1) / warmup, max(0.02, (steps - n) / (steps - warmup))))
        for o in made
    ]
    encoded_drills = [_encode_reply(tokenizer, text) for text in drills]
    model.train()
    total = 0.0
    for step in range(steps):
        batch = encoded[step * batch_size : (step + 1) * batch_size]
        loss = _loss(model, batch, prefix, PROMPT_WEIGHT if step < PROMPT_SHARE * steps else 0.0)
        loss = loss + _drill_loss(model, encoded_drills[step * DRILLS : (step + 1) * DRILLS])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(made, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            say(f"judge: step {step + 1}/{steps}, loss {total / 50:.4f}")
            total = 0.0
    model.eval()


Row = tuple[list[int], int]
"""Token ids of a prompt and its reply, and the index at which the reply begins."""


def _batches(each: list[Row], steps: int, batch_size: int) -> list[Row]:
    """Return the rows in training order: rows of similar length share a batch, which saves padding."""
    encoded = list(each)
    while len(encoded) < steps * batch_size:
        random.Random(len(encoded)).shuffle(each)
        encoded += each
    for start in range(0, len(encoded), 8 * batch_size):
        block = sorted(encoded[start : start + 8 * batch_size], key=lambda row: len(row[0]))
        batches = [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
        random.Random(start).shuffle(batches)
        encoded[start : start + 8 * batch_size] = [row for batch in batches for row in batch]
    return encoded


def make_drills(cases: Sequence[Case], number: int, seed: int) -> list[str]:
    """Return replies without prompts, which teach the comparison.

    Each has what a response states and a truth, which in half of them is what the exact rule reads in the response.
    """
    rng = random.Random(stable_hash("drills", seed))
    by_skill: dict[str, list[Case]] = {}
    for case in cases:
        by_skill.setdefault(case.skill, []).append(case)
    answers = {skill: sorted({c.question.answer for c in members}) for skill, members in by_skill.items()}
    skills = list(by_skill)
    # Skills with many different answers have more comparisons to learn.
    weights = [len(answers[skill]) for skill in skills]
    texts = []
    for _ in range(number):
        (skill,) = rng.choices(skills, weights)
        case = rng.choice(by_skill[skill])
        choices = case.question.choices
        if choices:
            options = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
            right = [option for option in options if case.reading and case.reading in option.split(". ")]
            truth = right[0] if right and rng.random() < 0.5 else rng.choice(options)
            texts.append(reply_text(case.says, truth, int(truth in right)))
        else:
            truth = case.reading if case.reading and rng.random() < 0.5 else case.question.answer
            truth = truth if rng.random() < 0.75 else rng.choice(answers[skill])
            texts.append(reply_text(case.says, truth, int(truth == case.reading)))
    return texts


def _encode_reply(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _encode(tokenizer: Any, case: Case) -> Row:
    prompt = tokenizer.apply_chat_template(case.messages(), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [*ids, *_encode_reply(tokenizer, case.reply)], len(ids)


def _common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    length = min(map(len, rows))
    for i in range(length):
        if len({row[i] for row in rows}) > 1:
            return list(rows[0][:i])
    return list(rows[0][:length])


def _drill_loss(model: Any, drills: Sequence[list[int]]) -> Tensor:
    """Return the mean cross-entropy over all tokens of replies that have no prompt."""
    longest = max(map(len, drills))
    ids = torch.tensor([row + [-100] * (longest - len(row)) for row in drills])
    logits = model(ids.clamp(min=0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)


def _loss(model: Any, batch: Sequence[Row], prefix: Sequence[int], prompt_weight: float) -> Tensor:
    """Return the cross-entropy summed over replies and, weighted, their prompts, divided by the replies' tokens."""
    shared, rows = len(prefix), len(batch)
    longest = max(len(ids) for ids, _ in batch) - shared
    inputs = torch.zeros(rows, longest, dtype=torch.long)
    mask = torch.zeros(rows, shared + longest, dtype=torch.long)
    weights = torch.zeros(rows, longest)
    for r, (ids, start) in enumerate(batch):
        inputs[r, : len(ids) - shared] = torch.tensor(ids[shared:])
        mask[r, : len(ids)] = 1
        weights[r, : start - shared - 1] = prompt_weight
        weights[r, start - shared - 1 : len(ids) - shared - 1] = 1.0
    first = model.model(torch.tensor([list(prefix)]), use_cache=True)
    cache = DynamicCache()
    for number, layer in enumerate(first.past_key_values.layers):
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
    hidden = model.model(
        inputs,
        attention_mask=mask,
        position_ids=torch.arange(shared, shared + longest)[None].expand(rows, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    counted = weights > 0
    each = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[counted]), inputs.roll(-1, dims=1)[counted], reduction="none"
    )
    return (each * weights[counted]).sum() / (weights == 1.0).sum()
