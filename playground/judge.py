"""A tiny judge: a text-only model that learns to read the judge's prompt and to write a verdict.

It is trained by plain supervised learning on (question, ground truth, response) with the verdict of the exact answer
rule, and explains itself first: it finds what the response says, repeats the truth, and compares the two.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# isort: split
import torch
from torch import Tensor

from openril.hf import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from openril.records import Question
from openril.rewards import judge_prompt, rules
from openril.rewards.answers import judge_item
from openril.sampling.greedy_batch import GreedyDecoder
from openril.storage import atomic_path, stable_hash, write_json
from openril.testing.tiny_models import build_tiny_model

MAX_RESPONSE_CHARS = 8000
MUON = 5.0
"""Learning rate of the layers' matrices under Muon, as a multiple of AdamW's for the rest."""
PROMPT_WEIGHT = 0.2
"""Weight of the question, truth and response themselves in the loss, beside the reply's 1: to predict them is to learn
to look things up, without which the judge takes the truth for what the response says."""
PROMPT_SHARE = 0.6
"""Share of the steps for which that goes on."""
DRILLS = 32
"""Replies without their prompts a step, to learn to compare: a reply's verdict follows from its own words."""


@dataclass(frozen=True)
class Pair:
    """A response to judge. says: the answer it states, "" for none."""

    question: Question
    response: str
    says: str

    @property
    def verdict(self) -> int:
        """The exact rule's verdict; a response without an answer is wrong."""
        rule = self.question.rule or rules.choose_rule(self.question)
        return int(rules.score(rule, self.question, self.response) == 1.0)

    @property
    def reply(self) -> str:
        """What the judge should write."""
        return reply_text(self.says, self.question.answer, self.verdict)

    def messages(self) -> list[dict[str, str]]:
        return judge_messages(self.question, self.response)


def judge_messages(question: Question, response: str) -> list[dict[str, str]]:
    """The judge's chat about a response."""
    item = judge_item(question, response)
    prompt = judge_prompt.Prompt.of(item.question, item.truth, item.response, MAX_RESPONSE_CHARS)
    return prompt.messages()


def make_pairs(
    questions: Sequence[Question], wordings: Callable[[Question], Sequence[str]], number: int, seed: int
) -> list[Pair]:
    """Responses of every sort, about half of them right.

    wordings: right responses to a question, each ending in its answer (a full stop may follow); the first is the answer
    alone. Wrong ones exchange that last word for another question's answer, or are another question's response;
    a share is cut short before its answer, or is a heap of words.
    """
    rng = random.Random(seed)
    by_skill: dict[str, list[Question]] = {}
    for q in questions:
        by_skill.setdefault(str(q.metadata.get("skill", "")), []).append(q)
    all_words = sorted({word for q in questions[:200] for text in wordings(q) for word in text.split()})
    # Skills with many different answers (numbers) have the more comparisons to learn.
    weights = [len({q.answer for q in members}) ** 0.5 for members in by_skill.values()]
    pairs: list[Pair] = []
    while len(pairs) < number:
        (skill,) = rng.choices(list(by_skill), weights)
        question = rng.choice(by_skill[skill])
        other = rng.choice(by_skill[skill])
        sort = rng.random()
        texts = wordings(question)
        style = rng.randrange(len(texts))
        if sort < 0.1:
            words = texts[style].split()
            cut = " ".join(words[: rng.randrange(1, len(words))]) if len(words) > 1 else ""
            salad = " ".join(rng.choices(all_words, k=rng.randrange(1, 12)))
            response, says = (cut, "") if cut and rng.random() < 0.5 else (salad, "")
            if Pair(question, response, "").verdict:  # it happens to hold the answer
                continue
        elif sort < 0.45:
            response, says = texts[style], question.answer
        elif sort < 0.7:
            response, says = wordings(other)[style], other.answer
        else:
            response, says = exchange_answer(texts[style], question.answer, other.answer), other.answer
        pairs.append(Pair(question, response, says))
    return pairs


def exchange_answer(text: str, old: str, new: str) -> str:
    """The text with its closing answer exchanged."""
    end = "." if text.endswith(".") else ""
    body = text.removesuffix(".")
    assert body.endswith(old), (text, old)
    return body.removesuffix(old) + new + end


def train_judge(
    folder: Path,
    questions: Sequence[Question],
    wordings: Callable[[Question], Sequence[str]],
    *,
    held_out: Sequence[Question],
    steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    hidden_size: int = 128,
    num_layers: int = 2,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a judge, write it to ``folder`` with ``agreement.json``, and return the same numbers: agreement with the
    exact rule on ``num_pairs`` responses to held-out questions, by verdict, and the share of unreadable replies."""
    started = time.perf_counter()
    pairs = make_pairs(questions, wordings, steps * batch_size, stable_hash("judge", seed))
    with atomic_path(folder) as temporary:
        build_tiny_model(
            temporary,
            "qwen2",
            texts=_tokenizer_texts(pairs[:3000]),
            vocab_size=1000,
            hidden_size=hidden_size,
            num_layers=num_layers,
            seed=seed,
        )
        tokenizer = AutoTokenizer.from_pretrained(temporary)
        model = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32)
        fit(model, tokenizer, pairs, _drills(pairs, steps * DRILLS), steps, batch_size, learning_rate, say)
        test = make_pairs(held_out, wordings, 512, stable_hash("judge test", seed))
        result = agreement(GreedyDecoder(model, tokenizer), test)
        result["seconds"] = round(time.perf_counter() - started, 1)
        model.save_pretrained(temporary)
        write_json(temporary / "agreement.json", result)
    say(
        f"judge: agrees with the exact rule on {result['agreement']:.1%} of {result['num_pairs']} held-out responses "
        f"({result['seconds']:.0f} s)"
    )
    return result


def _tokenizer_texts(pairs: Sequence[Pair]) -> list[str]:
    """The prompt's fixed words as often as the rest, so that every word is one token."""
    texts = []
    for pair in pairs:
        texts += [message["content"] for message in pair.messages()]
        texts.append(pair.reply)
    return texts


def fit(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    drills: Sequence[str],
    steps: int,
    batch_size: int,
    learning_rate: float,
    say: Callable[[str], None],
    prompt_share: float = PROMPT_SHARE,
) -> None:
    """Train the model on the pairs, ``batch_size`` a step, and on DRILLS replies without prompts beside them.

    With fewer than steps * batch_size pairs they are used again, in another order. Muon and AdamW with a linear decay;
    the prompt's part that all rows share is run once a batch. prompt_share: of the steps that also learn the prompts.
    """
    each = [_encode(tokenizer, pair) for pair in pairs]
    encoded = list(each)
    while len(encoded) < steps * batch_size:
        random.Random(len(encoded)).shuffle(each)
        encoded += each
    prefix = _common_prefix([ids for ids, _ in encoded])
    # Rows of about the same length share a batch: less padding.
    for start in range(0, len(encoded), 8 * batch_size):
        block = sorted(encoded[start : start + 8 * batch_size], key=lambda row: len(row[0]))
        batches = [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
        random.Random(start).shuffle(batches)
        encoded[start : start + 8 * batch_size] = [row for batch in batches for row in batch]
    optimizers = _optimizers(model, learning_rate)
    warmup = max(1, steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda n: min((n + 1) / warmup, max(0.02, (steps - n) / (steps - warmup))))
        for o in optimizers
    ]
    encoded_drills = [_encode_reply(tokenizer, text) for text in drills]
    model.train()
    total = 0.0
    for step in range(steps):
        batch = encoded[step * batch_size : (step + 1) * batch_size]
        loss = _loss(model, batch, prefix, PROMPT_WEIGHT if step < prompt_share * steps else 0.0)
        loss = loss + _drill_loss(model, encoded_drills[step * DRILLS : (step + 1) * DRILLS])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            say(f"judge: step {step + 1}/{steps}, loss {total / 50:.4f}")
            total = 0.0
    model.eval()


def _optimizers(model: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learn to copy in a fraction of AdamW's steps; AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=MUON * learning_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def reply_text(says: str, truth: str, right: int) -> str:
    """What the judge should write. says: "" for a response without an answer."""
    said = f"says {says}" if says else "gives no answer"
    verdict = "right" if right else "wrong"
    return f"The text {said} and the truth is {truth}: {verdict}. <answer>{right}</answer>"


def _drills(pairs: Sequence[Pair], number: int) -> list[str]:
    """Replies about random answers, half of them equal."""
    rng = random.Random(number)
    by_skill: dict[str, set[str]] = {}
    for pair in pairs:
        by_skill.setdefault(str(pair.question.metadata.get("skill", "")), set()).add(pair.question.answer)
    answers = [sorted(found) for found in by_skill.values()]
    weights = [len(found) for found in answers]
    texts = []
    for _ in range(number):
        (found,) = rng.choices(answers, weights)
        truth = rng.choice(found)
        says = truth if rng.random() < 0.5 else rng.choice(found)
        texts.append(reply_text(says, truth, int(says == truth)))
    return texts


def _encode_reply(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _encode(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """Token ids of prompt and reply, and where the reply begins."""
    prompt = tokenizer.apply_chat_template(pair.messages(), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [*ids, *_encode_reply(tokenizer, pair.reply)], len(ids)


def _common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    length = min(map(len, rows))
    for i in range(length):
        if len({row[i] for row in rows}) > 1:
            return list(rows[0][:i])
    return list(rows[0][:length])


def _drill_loss(model: Any, drills: Sequence[list[int]]) -> Tensor:
    """Cross-entropy of replies that stand alone, per token. What an answer is cannot be known here: all of it is learnt."""
    longest = max(map(len, drills))
    ids = torch.tensor([row + [-100] * (longest - len(row)) for row in drills])
    logits = model(ids.clamp(min=0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)


def _loss(model: Any, batch: Sequence[tuple[list[int], int]], prefix: Sequence[int], prompt_weight: float) -> Tensor:
    """Cross-entropy summed over the replies and, with a small weight, their prompts; per token of reply."""
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


def agreement(reader: GreedyDecoder, pairs: Sequence[Pair]) -> dict[str, Any]:
    """How often the judge's verdict is the exact rule's; an unreadable reply never agrees."""
    replies = reader.replies([pair.messages() for pair in pairs])
    counts = {0: [0, 0], 1: [0, 0]}
    unreadable = 0
    for pair, reply in zip(pairs, replies, strict=True):
        read = judge_prompt.read_verdict(reply)
        unreadable += isinstance(read, str)
        counts[pair.verdict][0] += not isinstance(read, str) and int(read[0]) == pair.verdict
        counts[pair.verdict][1] += 1
    return {
        "agreement": sum(c[0] for c in counts.values()) / len(pairs),
        "agreement_on_wrong": counts[0][0] / max(1, counts[0][1]),
        "agreement_on_right": counts[1][0] / max(1, counts[1][1]),
        "unreadable": unreadable / len(pairs),
        "num_pairs": len(pairs),
    }


@dataclass
class Settings:
    """Train a tiny judge on question files whose rows hold right responses in several wordings."""

    out: Path
    """Folder to write; left alone if it is there."""
    train: Path
    """Question file (.jsonl) to learn from."""
    validation: Path
    """Question file its agreement with the exact rule is measured on."""
    columns: list[str] = field(default_factory=lambda: ["derivation_a", "derivation_b", "derivation_c"])
    """Columns with right responses, each ending in the answer."""
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 32
    """Responses a step."""
    seed: int = 0
    """Of weights and responses."""


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    from openril.data.reading import read_questions
    from openril.errors import OpenRILError
    from openril.recipe.schema import DataConfig

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.judge")
    if (settings.out / "agreement.json").is_file():
        print(f"judge: already trained in {settings.out}")
        return 0
    try:
        data = DataConfig(train=[str(settings.train)], validation=[str(settings.validation)])
        train_judge(
            settings.out,
            read_questions(data, "train"),
            lambda q: [q.answer, *(str(q.metadata[c]) for c in settings.columns if c in q.metadata)],
            held_out=read_questions(data, "validation"),
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=settings.seed,
            say=lambda line: print(line, flush=True),
        )
    except OpenRILError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
