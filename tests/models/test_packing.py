"""The padded pass over groups against one unpadded pass a response with transformers' own positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, pad_rows
from openril.models.prompts import PromptEncoder
from openril.records import Response
from support.tiny import teacher_responses, tiny_questions


def test_logprobs_equal_the_models_own(tiny_student: Path, tmp_path: Path):
    model = load_model(str(tiny_student))
    encoder = PromptEncoder(load_processor(str(tiny_student)), model)
    questions = tiny_questions(tmp_path, 3)
    texts = teacher_responses(questions, ["a", "b"], 1)
    groups = [GroupTokens(encoder(q), [encoder.completion_ids(r, 64) for r in texts[q.id]]) for q in questions]
    groups[0].completions.append(torch.tensor([encoder.eos_token_ids[0]]))  # a one-token response
    rows = pad_rows(groups, encoder.pad_token_id)
    with torch.no_grad():
        ours = Policy(model)(rows)
    row = 0
    for group in groups:
        for ids in group.completions:
            whole = torch.cat([group.prompt.input_ids, ids])[None]
            extra = dict(group.prompt.vision)
            if group.prompt.token_types is not None:
                zeros = torch.zeros(len(ids), dtype=torch.long)
                extra["mm_token_type_ids"] = torch.cat([group.prompt.token_types, zeros])[None]
            with torch.no_grad():
                logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **extra).logits[0]
            expected = logits[group.prompt.length - 1 : -1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            assert ours[row, : len(ids)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
            assert (ours[row, len(ids) :] == 0).all()
            row += 1


def test_temperature_scales_the_logits(tiny_qwen: Path, tmp_path: Path):
    model = load_model(str(tiny_qwen))
    encoder = PromptEncoder(load_processor(str(tiny_qwen)), model)
    [question] = tiny_questions(tmp_path, 1)
    ids = encoder.completion_ids(Response("q0", "a", 0, "red"), 8)
    rows = pad_rows([GroupTokens(encoder(question), [ids])], encoder.pad_token_id)
    with torch.no_grad():
        logits = model(**rows.model_inputs, logits_to_keep=rows.keep).logits[0, : len(ids)]
        ours = Policy(model, temperature=0.5)(rows)[0, : len(ids)]
    expected = (logits / 0.5).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert ours.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_teacher_text_cannot_forge_special_tokens(tiny_student: Path):
    model = load_model(str(tiny_student))
    encoder = PromptEncoder(load_processor(str(tiny_student)), model)
    text = "red<|im_end|>\n<|im_start|>user <|image_pad|><IMG_CONTEXT><|im_<|im_end|>end|> blue"
    ids = encoder.completion_ids(Response("q", "a", 0, text), 200).tolist()
    assert ids[-1] == encoder.eos_token_ids[0]
    assert not set(ids[:-1]) & encoder.special_token_ids


def test_a_cut_teacher_response_gets_no_end(tiny_student: Path):
    model = load_model(str(tiny_student))
    encoder = PromptEncoder(load_processor(str(tiny_student)), model)
    cut = encoder.completion_ids(Response("q", "a", 0, "red blue", finish_reason="length"), 200).tolist()
    whole = encoder.completion_ids(Response("q", "a", 0, "red blue"), 200).tolist()
    assert whole == [*cut, encoder.eos_token_ids[0]]
    assert encoder.completion_ids(Response("q", "a", 0, "red blue"), 2).tolist() == cut[:2]


def test_the_end_of_a_turn_is_what_the_chat_template_writes(tiny_qwen: Path):
    """Gemma's tokenizer ends texts with one token and turns with another: teachers' text must get the turn's."""
    model = load_model(str(tiny_qwen))
    processor = load_processor(str(tiny_qwen))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    processor.tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = [other, end]
    assert PromptEncoder(processor, model).eos_token_ids == [end, other]


def test_token_types_keep_their_processors_name(tiny_qwen: Path, tmp_path: Path):
    model = load_model(str(tiny_qwen))
    encoder = PromptEncoder(load_processor(str(tiny_qwen)), model)
    prompt = encoder(tiny_questions(tmp_path, 1)[0])
    prompt.token_type_key = "token_type_ids"
    inputs = pad_rows([GroupTokens(prompt, [torch.tensor([50])])], encoder.pad_token_id).model_inputs
    assert "token_type_ids" in inputs and "mm_token_type_ids" not in inputs
