"""Questions encoded ahead, in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from openril.errors import DataError
from openril.models.loading import load_model, load_processor
from openril.models.prompts import Prompt, PromptEncoder
from support.loop import make_trainer, tiny_recipe
from support.tiny import tiny_questions


def encoder_of(checkpoint: Path, **options: Any) -> PromptEncoder:
    return PromptEncoder(load_processor(str(checkpoint)), load_model(str(checkpoint)), **options)


def same(a: Prompt, b: Prompt) -> bool:
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.position_ids, b.position_ids)
        and a.vision.keys() == b.vision.keys()
        and all(torch.equal(v, b.vision[k]) for k, v in a.vision.items())
        and a.images_key == b.images_key
    )


def test_what_was_prefetched_is_what_would_be_encoded(tiny_student: Path, tmp_path: Path, monkeypatch: Any):
    ahead, plain = encoder_of(tiny_student), encoder_of(tiny_student)
    questions = tiny_questions(tmp_path, 4)
    threads: list[str] = []
    encode = PromptEncoder._encode_question
    monkeypatch.setattr(
        PromptEncoder,
        "_encode_question",
        lambda self, q: threads.append(threading.current_thread().name) or encode(self, q),
    )
    ahead.prefetch(questions)
    got = [ahead(q) for q in questions]
    assert len(threads) == 4 and all(name.startswith("prompts") for name in threads)
    assert all(same(p, plain(q)) for p, q in zip(got, questions, strict=True))
    assert all(ahead(q) is p for q, p in zip(questions, got, strict=True))
    ahead.close()


def test_an_error_comes_when_the_question_is_asked_for(tiny_qwen: Path, tmp_path: Path):
    encoder = encoder_of(tiny_qwen, max_prompt_length=5)
    [question] = tiny_questions(tmp_path, 1)
    encoder.prefetch([question])
    with pytest.raises(DataError, match=question.id):
        encoder(question)
    with pytest.raises(DataError, match=question.id):  # and again, not from memory
        encoder(question)
    encoder.close()


def test_what_nobody_asked_for_is_dropped(tiny_qwen: Path, tmp_path: Path):
    encoder = encoder_of(tiny_qwen, keep=3)
    questions = tiny_questions(tmp_path, 6)
    encoder.prefetch(questions[:3])
    encoder.prefetch(questions[3:])
    assert list(encoder._coming) == questions[3:]
    encoder.close()
    assert not encoder._coming
    assert same(encoder(questions[5]), encoder_of(tiny_qwen)(questions[5]))


def test_the_loop_encodes_the_next_step_ahead(tiny_qwen: Path, tmp_path: Path, monkeypatch: Any):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__questions_per_step=2, train__max_steps=3)
    trainer = make_trainer(recipe, tmp_path / "data", count=8)
    threads: list[str] = []
    encode = PromptEncoder._encode_question
    monkeypatch.setattr(
        PromptEncoder,
        "_encode_question",
        lambda self, q: threads.append(threading.current_thread().name) or encode(self, q),
    )
    trainer.train()
    # Six questions: the first step's two in the loop's own thread, the others ahead of it.
    assert len(threads) == 6 and sum(name.startswith("prompts") for name in threads) == 4
