"""`ril select`: choose the loop's questions by log-probabilities and the overlong filter (paper, section 4).

The first part scores all of data.train. With ``data.selection.drop_overlong`` its choice is provisional: `ril collect` asks
the student those questions, and the second part leaves out the overlong ones. Teachers are asked the final choice alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openril.data.reading import read_questions
from openril.data.selection import Selection, select, write_selection
from openril.errors import PromptTooLongError, RecipeError
from openril.models.adapters import base_model
from openril.models.dummy_image import has_images
from openril.models.loading import load_processor, load_student
from openril.models.packing import GroupTokens, Policy, batch_by_tokens, pack, packing_difference, pad_rows
from openril.models.packing_probe import PackingProbe, trial_group
from openril.models.prompt_lengths import LeftOut
from openril.recipe.checks import collects_all, filters_overlong, require
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question, Response
from openril.report.progress import ProgressDisplay, say, warn_line
from openril.responses.cache import ResponseCache
from openril.stages.data_checks import check_questions
from openril.stages.questions import chosen_of, provisional_file, selection_file, selection_folder
from openril.storage import append_jsonl, iterate_jsonl, refuse_changed, stable_hash, weights_fingerprint, write_json
from openril.training.distributed import release_memory
from openril.training.setup import make_encoder

BLOCK = 16
"""Questions that are scored together and written at once. A block is always the same questions, so that its numbers do not
depend on the number of processes or on kills."""
POLL = 1.0

Score = tuple[float | None, int]
"""The sum of an answer's log-probabilities in nats and its tokens, or None and the prompt's tokens where it is too long."""


def run_select(recipe: Recipe, console: Console) -> Path:
    """Do the next part of the selection and return its file. Continues after a kill, and does nothing if all is done.

    Under a launcher every process scores its share, and the first one chooses.
    """
    if not recipe.data.selection.enabled:
        raise RecipeError("data.selection.enabled: expected true for `ril select`, got false. Turn it on.")
    rank, world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    target, provisional = selection_file(recipe), provisional_file(recipe)
    settings = selection_folder(recipe) / "settings.json"
    made_with = {"data.selection": recipe.data.selection.model_dump(mode="json"), "seed": recipe.seed}
    if settings.exists():
        fix = f"remove {settings.parent}/*.json* (which keeps the scores) and run `ril select` again"
        refuse_changed(settings.parent, json.loads(settings.read_text()), made_with, fix=fix)
    if target.exists():
        say(console, f"select: already done, the questions are in {target}")
        return target
    require(recipe, "select")
    two_parts = filters_overlong(recipe)
    if not provisional.exists():
        questions = read_questions(recipe.data, "train")
        check_questions(recipe, "select", questions, partial(warn_line, console, "select"), processed=True)
        path = provisional if two_parts else target
        selection = _choose_by_score(recipe, questions, rank, world, console)
        if selection is None:
            return path
        write_json(settings, made_with)
        write_selection(path, selection)
        say(console, f"select: {len(selection.ids)} of {len(questions)} questions, written to {path}")
    elif rank == 0:
        _filter_overlong(recipe, chosen_of(provisional, read_questions(recipe.data, "train")), console)
    else:
        return target
    if target.exists():
        say(console, f"select: done. Next: `ril {'collect' if collects_all(recipe) else 'train'}`")
        return target
    say(
        console,
        "select: the choice is provisional. Next: `ril collect` asks the student these questions; then `ril select` leaves"
        " out the overlong ones",
    )
    return provisional


def _choose_by_score(
    recipe: Recipe, questions: Sequence[Question], rank: int, world: int, console: Console
) -> Selection | None:
    """Score this process's share. Return the choice by score, or None in all processes but the first."""
    settings = recipe.data.selection
    checkpoints = {"student": recipe.collected_student} | (
        {"reference": settings.reference} if settings.reference else {}
    )
    folders = []
    for name, checkpoint in checkpoints.items():
        folders.append(score_answers(recipe, questions, checkpoint, name, rank, world, console))
        release_memory()
    if rank:  # the first process chooses
        return None
    sums = len(folders) == 2 and _vocabulary(recipe, recipe.collected_student) != _vocabulary(
        recipe, settings.reference
    )
    if sums:
        say(console, "select: the reference has another tokenizer, so sums over the answers are compared, not means")
    logprobs: list[dict[str, float | None]] = []
    too_long: dict[str, str] = {}
    for folder in folders:
        scores = wait_for_scores(folder, questions)
        values: dict[str, float | None] = {q.id: None for q in questions}
        for id, (logprob, tokens) in scores.items():
            if logprob is None:
                too_long[id] = f"too long: the prompt has {tokens} tokens"
            else:
                values[id] = logprob if sums else logprob / tokens
        logprobs.append(values)
    number = math.ceil(settings.provisional_share * settings.num_questions)
    config = settings.model_copy(
        update={"drop_overlong": False} | ({"num_questions": number} if settings.drop_overlong else {})
    )
    student, reference = logprobs[0], logprobs[1] if len(logprobs) == 2 else None
    return select(questions, student, reference, None, config, recipe.seed, too_long)


def _filter_overlong(recipe: Recipe, questions: Sequence[Question], console: Console) -> None:
    """Write the final choice among the provisional questions, unless some of the student's responses are missing."""
    settings, number = recipe.data.selection, recipe.collect.num_responses
    cache = ResponseCache.create(recipe.cache_path)
    if missing := len(cache.missing(questions, STUDENT, number)):
        total = len(questions) * number
        say(console, f"select: {missing} of {total} responses of the student are missing")
        return
    responses = cache.load(questions, [STUDENT], number, check_hashes=False)  # missing() has checked them
    overlong: dict[str, float] = {}
    for q in questions:
        cut = [r.finish_reason == "length" for r in responses.responses_for(q.id, STUDENT)]
        overlong[q.id] = sum(cut) / len(cut)
    student, reference = {}, {}
    for row in iterate_jsonl(provisional_file(recipe)):
        if row["selected"]:
            student[row["id"]], reference[row["id"]] = row["student_logprob"], row["reference_logprob"]
    selection = select(questions, student, reference if settings.reference else None, overlong, settings, recipe.seed)
    write_selection(selection_file(recipe), selection)
    say(console, f"select: {len(selection.ids)} of {len(questions)} questions, written to {selection_file(recipe)}")
    if len(selection.ids) < min(settings.num_questions, len(questions)):
        say(
            console,
            f"select: fewer than data.selection.num_questions ({settings.num_questions}). To have more, raise"
            f" provisional_share, remove {provisional_file(recipe).parent}/*.json*, and run `ril select` again",
        )


def _vocabulary(recipe: Recipe, checkpoint: str) -> dict[str, int]:
    processor = load_processor(checkpoint, trust_remote_code=recipe.student.trust_remote_code)
    vocabulary: dict[str, int] = getattr(processor, "tokenizer", processor).get_vocab()
    return vocabulary


def _has_answer(question: Question) -> bool:
    return bool(question.answer.strip())


def read_scores(folder: Path, ids: set[str]) -> dict[str, Score]:
    """Return the scores of these questions by id, from the files of all processes."""
    rows = (row for path in sorted(folder.glob("*.jsonl")) for row in iterate_jsonl(path) if row["id"] in ids)
    return {row["id"]: (row["logprob"], row["tokens"]) for row in rows}


def wait_for_scores(folder: Path, questions: Sequence[Question]) -> dict[str, Score]:
    """Return the scores of all questions with an answer, as soon as every process has written its share."""
    ids = {q.id for q in questions if _has_answer(q)}
    while True:
        started = time.monotonic()
        scores = read_scores(folder, ids)
        if len(scores) == len(ids):
            return scores
        time.sleep(max(POLL, 5 * (time.monotonic() - started)))


@torch.no_grad()
def score_answers(
    recipe: Recipe, questions: Sequence[Question], checkpoint: str, name: str, rank: int, world: int, console: Console
) -> Path:
    """Compute the log-probability of each question's ground-truth answer under a checkpoint; return the folder of results.

    This process takes every ``world``-th block of questions and appends to its own file. Questions without an answer
    are passed over.
    """
    student, train = recipe.student, recipe.train
    made_by = {
        "checkpoint": weights_fingerprint(Path(checkpoint)) or checkpoint,
        "max_completion_length": train.max_completion_length,
        "max_prompt_length": recipe.data.max_prompt_length,
        "min_pixels": student.min_pixels,
        "max_pixels": student.max_pixels,
        "system_prompt": student.system_prompt,
    }
    # Scores of another checkpoint or of other lengths are in another folder.
    folder = selection_folder(recipe) / f"logprobs_{name}_{stable_hash(made_by):016x}"
    blocks = [questions[i : i + BLOCK] for i in range(rank * BLOCK, len(questions), world * BLOCK)]
    blocks = [[q for q in block if _has_answer(q)] for block in blocks]
    done = set(read_scores(folder, {q.id for block in blocks for q in block}))
    todo = [block for block in blocks if not done.issuperset(q.id for q in block)]
    if not todo:
        return folder
    if rank == 0:
        write_json(folder / "settings.json", made_by)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_student(student, checkpoint, torch.bfloat16 if device.type == "cuda" else torch.float32)
    encoder = make_encoder(recipe, processor, model, keep=2 * BLOCK)
    policy = Policy(model).to(device)
    left_out = LeftOut(recipe, "select")
    with ProgressDisplay(console, f"select ({name})") as progress:
        score = _Scorer(recipe, policy, encoder, device, progress.warn)
        for number, block in enumerate(todo):
            if number + 1 < len(todo):
                encoder.prefetch(todo[number + 1])
            groups: list[GroupTokens] = []
            rows: list[dict[str, Any]] = []
            for q in block:
                try:
                    prompt = encoder(q)
                except PromptTooLongError as e:
                    left_out.add(q, e.tokens)
                    rows.append({"id": q.id, "logprob": None, "tokens": e.tokens})
                else:
                    answer = encoder.completion_ids(Response(q.id, name, 0, q.answer), train.max_completion_length)
                    groups.append(GroupTokens(prompt, [answer]))
                    rows.append({"id": q.id, "logprob": 0.0, "tokens": len(answer)})
            scored = iter(score(groups))
            append_jsonl(
                folder / f"{rank}.jsonl", *(r if r["logprob"] is None else r | {"logprob": next(scored)} for r in rows)
            )
            progress.report(number + 1, len(todo), {})
    encoder.close()
    return folder


class _Scorer:
    """Computes the sum of the log-probabilities of each group's response, several groups in a forward pass."""

    def __init__(
        self, recipe: Recipe, policy: Policy, encoder: Any, device: torch.device, warn: Callable[[str], None]
    ) -> None:
        self.policy, self.encoder, self.device = policy, encoder, device
        self.budget = recipe.train.max_tokens_per_micro_batch
        self.packing = PackingProbe(recipe.train.packed, "select", warn)

    def __call__(self, groups: Sequence[GroupTokens]) -> list[float]:
        if not groups:
            return []
        pad = self.encoder.pad_token_id
        if self.packing.due(images := has_images([g.prompt for g in groups])):
            trial = [trial_group(next((g for g in groups if g.prompt.vision), groups[0]))]

            def compare() -> float:
                self.policy.enable_packing()
                return packing_difference(self.policy, trial, pad, self.device)

            self.packing.run(base_model(self.policy.model), compare, images=images)
        sums: list[float] = []
        lengths = [g.packed_length() for g in groups]
        for batch in batch_by_tokens(lengths, self.budget):
            part = [groups[i] for i in batch]
            rows = (pack if self.packing.on else pad_rows)(part, pad).to(self.device)
            sums += self.policy(rows).double().sum(-1).tolist()
        return sums
