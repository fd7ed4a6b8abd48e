"""`ril select`: choose the loop's questions by log-probabilities and the overlong filter (paper, section 4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from openril.data.reading import read_questions
from openril.data.selection import select, write_selection
from openril.models.loading import load_student
from openril.models.packing import GroupTokens, Policy, pad_rows
from openril.recipe.checks import require
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question, Response
from openril.report.progress import ProgressDisplay
from openril.responses.cache import ResponseCache
from openril.storage import append_jsonl, read_jsonl, remove, weights_fingerprint, write_json
from openril.training.distributed import one_process
from openril.training.setup import make_encoder


def selection_folder(recipe: Recipe) -> Path:
    return recipe.run_path / "selection"


def selection_file(recipe: Recipe) -> Path:
    """Return the JSONL file with the ids of the chosen questions and the reasons why others were left out."""
    return selection_folder(recipe) / "selection.jsonl"


def run_select(recipe: Recipe, console: Console) -> Path:
    """Choose questions and return the file. Continues after a kill, and does nothing if the file exists."""
    target = selection_file(recipe)
    if target.exists():
        console.print(f"select: already done, the questions are in {target}")
        return target
    require(recipe, "select")
    one_process("select")
    questions = read_questions(recipe.data, "train")
    settings = recipe.data.selection
    student = answer_logprobs(recipe, questions, recipe.start_student, "student", console)
    reference = (
        answer_logprobs(recipe, questions, settings.reference, "reference", console) if settings.reference else None
    )
    overlong: dict[str, float] = {}
    if settings.drop_overlong:
        responses = ResponseCache.open(recipe.cache_path).load(questions, [STUDENT])
        for q in questions:
            cached = responses.responses_for(q.id, STUDENT)
            overlong[q.id] = sum(r.finish_reason == "length" for r in cached) / len(cached)
    selection = select(questions, student, reference, overlong, settings, recipe.seed)
    write_selection(target, selection)
    console.print(f"select: {len(selection.ids)} of {len(questions)} questions, written to {target}")
    return target


@torch.no_grad()
def answer_logprobs(
    recipe: Recipe, questions: Sequence[Question], checkpoint: str, name: str, console: Console
) -> dict[str, float]:
    """Return the mean log-probability in nats per token of each question's ground-truth answer under a checkpoint.

    Questions without an answer are left out. Each value is appended to ``selection/logprobs_<name>.jsonl``, so that a
    kill loses nothing.
    """
    path = selection_folder(recipe) / f"logprobs_{name}.jsonl"
    header = selection_folder(recipe) / f"logprobs_{name}.json"
    made_by: dict[str, Any] = {
        "checkpoint": weights_fingerprint(Path(checkpoint)) or str(checkpoint),
        "max_completion_length": recipe.train.max_completion_length,
    }
    if not header.exists() or json.loads(header.read_text()) != made_by:
        remove(path)  # its values belong to another checkpoint
        write_json(header, made_by)
    done = {row["id"]: row["logprob"] for row in read_jsonl(path)}
    todo = [q for q in questions if q.answer and q.id not in done]
    if not todo:
        return done
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_student(
        recipe.student, checkpoint, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    encoder = make_encoder(recipe, processor, model, keep=0)
    policy = Policy(model).to(device)
    with ProgressDisplay(console, f"select ({name})") as progress:
        for number, q in enumerate(todo, start=1):
            ids = encoder.completion_ids(Response(q.id, name, 0, q.answer), recipe.train.max_completion_length)
            rows = pad_rows([GroupTokens(encoder(q), [ids])], encoder.pad_token_id).to(device)
            logprobs: Tensor = policy(rows)[0]
            done[q.id] = float(logprobs.mean())
            append_jsonl(path, {"id": q.id, "logprob": done[q.id]})
            progress.report(number, len(todo), {})
    return done
