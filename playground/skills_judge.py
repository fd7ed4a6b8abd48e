"""``python -m playground.skills_judge --out FOLDER``: train the judge of the fourteen skills' world.

A text-only model of under two megabytes that reads the judge's prompt (question, ground truth, response) and writes a
brief explanation and a verdict. It learns from the exact rule's verdicts on training questions, and is measured by them
on questions and responses it has not seen. ``--measure FOLDER`` measures a judge that is there.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: split
import torch

from openril.errors import DataError, OpenRILError
from openril.hf import AutoModelForCausalLM, AutoTokenizer
from openril.rewards.judge_prompt import read_verdict
from openril.sampling.greedy_batch import GreedyDecoder
from openril.storage import atomic_path, stable_hash, write_json
from playground.judge import DRILLS, fit
from playground.judge_material import Case, make_cases, reply_text, world_questions
from playground.judge_model import build_judge
from playground.skills.questions import LETTERS

NUM_QUESTIONS = 14000
"""Training questions the responses are about."""
NUM_RESPONSES = 48000
"""Most training responses; they are used again for more steps."""
NUM_HELD_OUT = 1400
"""Held-out questions."""
PROMPT_SHARE = 0.35
"""Share of the steps that also learn to predict the prompt."""
EMBEDDINGS = 15.0
"""Word embeddings start this many times as large as the architecture makes them: a judge matches words with each other,
and what the first layer adds must not drown which word a token is."""
WEIGHTS = "model.safetensors"


@dataclass
class Settings:
    """Train a judge for the fourteen skills and measure how often it agrees with the exact rule."""

    out: Path | None = None
    """Folder to write; left alone if a judge is there. A run that is stopped leaves nothing behind."""
    measure: Path | None = None
    """Folder of a judge to measure instead."""
    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 32
    """Responses a step."""
    learning_rate: float = 2e-3
    """AdamW's, of the embeddings; the layers' matrices have Muon's."""
    hidden_size: int = 128
    """Width of the model."""
    num_layers: int = 3
    """Depth of the model."""
    num_verdicts: int = 2800
    """Held-out verdicts to measure on."""
    seed: int = 0
    """Of weights and responses."""


def train_judge(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a judge, write it to ``settings.out`` in bfloat16 with ``agreement.json``, and return what that holds: see
    ``measure``."""
    assert settings.out is not None
    started = time.perf_counter()
    seed = settings.seed
    number = min(NUM_RESPONSES, settings.steps * settings.batch_size)
    cases = make_cases(world_questions("train", NUM_QUESTIONS, seed), number, stable_hash("learn", seed))
    say(f"judge: {number} responses in {time.perf_counter() - started:.0f} s")
    with atomic_path(settings.out) as temporary:
        texts = [text for case in cases[:4000] for text in (case.messages()[1]["content"], case.reply)]
        build_judge(temporary, texts, hidden_size=settings.hidden_size, num_layers=settings.num_layers, seed=seed)
        tokenizer = AutoTokenizer.from_pretrained(temporary)
        model: Any = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(EMBEDDINGS)
        drills = make_drills(cases, settings.steps * DRILLS, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fit(
                model, tokenizer, cases, drills, settings.steps, settings.batch_size, settings.learning_rate, say,
                prompt_share=PROMPT_SHARE,
            )  # fmt: skip
        seconds = time.perf_counter() - started
        model.to(torch.bfloat16).save_pretrained(temporary)
        result = measure(temporary, settings.num_verdicts, seed)
        result |= {"training_seconds": round(seconds, 1), "bytes": (temporary / WEIGHTS).stat().st_size}
        write_json(temporary / "agreement.json", result)
    return result


def make_drills(cases: Sequence[Case], number: int, seed: int) -> list[str]:
    """Replies without prompts, to learn to compare: what a response says, and a truth that half of the time is what
    the exact rule reads in it."""
    rng = random.Random(stable_hash("drills", seed))
    by_skill: dict[str, list[Case]] = {}
    for case in cases:
        by_skill.setdefault(case.skill, []).append(case)
    answers = {skill: sorted({c.question.answer for c in members}) for skill, members in by_skill.items()}
    skills = list(by_skill)
    # Skills with many different answers have the more comparisons to learn.
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


def measure(folder: Path, number: int, seed: int) -> dict[str, Any]:
    """How often a judge's verdict is the exact rule's, on ``number`` responses of every sort to questions about pictures
    of the validation split: ``agreement``; ``false_positive_rate`` (of the wrong responses, those called right) and
    ``false_negative_rate``; the share of ``unreadable`` replies, which never agree; ``by_skill`` and ``by_sort``
    (agreement, false positives, false negatives, number); ``verdicts_per_second`` in batches of 64."""
    cases = make_cases(world_questions("validation", NUM_HELD_OUT, seed), number, stable_hash("held out", seed))
    reader = GreedyDecoder.from_checkpoint(folder)
    started = time.perf_counter()
    replies: list[str] = []
    for start in range(0, len(cases), 64):
        replies += reader.replies([case.messages() for case in cases[start : start + 64]])
    seconds = time.perf_counter() - started
    return compare(cases, replies) | {"verdicts_per_second": round(len(cases) / seconds, 1)}


def compare(cases: Sequence[Case], replies: Sequence[str]) -> dict[str, Any]:
    """A judge's replies against the exact rule: what ``measure`` says, without the speed."""
    read = [read_verdict(reply) for reply in replies]
    given = [None if isinstance(verdict, str) else int(verdict[0]) for verdict in read]
    rows = list(zip(cases, given, strict=True))

    def table(key: Callable[[Case], str]) -> dict[str, dict[str, Any]]:
        names = sorted({key(case) for case in cases})
        return {name: _rates([row for row in rows if key(row[0]) == name]) for name in names}

    return {
        **_rates(rows),
        "unreadable": given.count(None) / max(1, len(given)),
        "by_skill": table(lambda case: case.skill),
        "by_sort": table(lambda case: case.sort),
    }


def _rates(rows: Sequence[tuple[Case, int | None]]) -> dict[str, Any]:
    """None where there is no response that could be called wrongly right, or wrongly wrong."""
    wrong = [given for case, given in rows if not case.verdict]
    right = [given for case, given in rows if case.verdict]
    return {
        "agreement": (wrong.count(0) + right.count(1)) / max(1, len(rows)),
        "false_positive_rate": wrong.count(1) / len(wrong) if wrong else None,
        "false_negative_rate": right.count(0) / len(right) if right else None,
        "num_verdicts": len(rows),
        "num_right": len(right),
    }


def show(result: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """The measurements as tables."""

    def line(name: str, row: dict[str, Any]) -> None:
        rates = [row["agreement"], row["false_positive_rate"], row["false_negative_rate"]]
        shown = [f"{rate:.1%}" if rate is not None else "-" for rate in rates]
        say(f"  {name:24}{shown[0]:>10}{shown[1]:>17}{shown[2]:>17}{row['num_verdicts']:>9}{row['num_right']:>7}")

    say(f"  {'':24}{'agreement':>10}{'false positives':>17}{'false negatives':>17}{'verdicts':>9}{'right':>7}")
    for group in ("by_skill", "by_sort"):
        for name, row in result[group].items():
            line(name, row)
        say("")
    line("all", result)
    say(
        f"judge: agrees with the exact rule on {result['agreement']:.2%} of {result['num_verdicts']} held-out verdicts; "
        f"unreadable {result['unreadable']:.2%}; {result['verdicts_per_second']:.0f} verdicts a second"
    )


def run(settings: Settings, say: Callable[[str], None]) -> None:
    if (settings.out is None) == (settings.measure is None):
        raise DataError("name a folder for the new judge with --out, or a judge to measure with --measure")
    if settings.measure is not None:
        if not (settings.measure / "config.json").is_file():
            raise DataError(f"{settings.measure} holds no judge (no config.json); train one with --out")
        show(measure(settings.measure, settings.num_verdicts, settings.seed), say)
        return
    assert settings.out is not None
    if (settings.out / "agreement.json").is_file():
        say(f"judge: already trained in {settings.out}")
        return
    if settings.out.exists() and any(settings.out.iterdir()):
        raise DataError(f"{settings.out} holds other files, which would be lost; name a new folder")
    result = train_judge(settings, say)
    show(result, say)
    say(f"judge: {settings.out}, {result['bytes'] / 1e6:.2f} MB, trained in {result['training_seconds']:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.skills_judge")
    try:
        run(settings, lambda line: print(line, flush=True))
    except OpenRILError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
