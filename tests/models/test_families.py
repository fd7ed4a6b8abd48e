"""Every supported family of models, end to end: prompts, image features, the plain pass, the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from openril.models.dummy_image import dummy_image_prompt
from openril.models.freezing import module_group
from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, collate_vision_inputs, pad_rows
from openril.models.prompts import Prompt, PromptEncoder
from openril.recipe.schema import SamplingConfig
from openril.records import Response
from openril.sampling.transformers_engine import TransformersSampler
from support.tiny import teacher_text, unlike_questions


@dataclass
class Student:
    model: Any
    encoder: PromptEncoder


@pytest.fixture
def student(tiny_family: Path) -> Iterator[Student]:
    model = load_model(str(tiny_family))
    yield Student(model, PromptEncoder(load_processor(str(tiny_family)), model))


def plain_inputs(prompt: Prompt, ids: Tensor) -> dict[str, Tensor]:
    """``prompt + ids`` as one unpadded row without images; the model finds positions itself."""
    inputs = {"input_ids": torch.cat([prompt.input_ids, ids])[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if prompt.token_types is not None:
        inputs[prompt.token_type_key] = torch.cat([prompt.token_types, torch.zeros_like(ids)])[None]
    return inputs


def own_logprobs(model: Any, prompt: Prompt, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(**plain_inputs(prompt, ids), **prompt.vision).logits[0]
    return logits[prompt.length - 1 : -1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def group(student: Student, folder: Path, number: int) -> GroupTokens:
    question = unlike_questions(folder)[number]
    texts = [teacher_text(question, teacher, number) for teacher in ("a", "b")]
    responses = [Response(question.id, "a", i, text) for i, text in enumerate(texts)]
    return GroupTokens(student.encoder(question), [student.encoder.completion_ids(r, 64) for r in responses])


def chat(student: Student, images: list[Image.Image]) -> Prompt:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which colour?"}]
    return student.encoder.encode([{"role": "user", "content": content}], images)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_prompt_holds_the_features_of_its_images(student: Student, count: int):
    sizes = [(56, 56), (112, 56)]
    prompt = chat(student, [Image.new("RGB", sizes[i], (220, 30, 30)) for i in range(count)])
    image_tokens = int((prompt.input_ids == student.model.config.image_token_id).sum())
    assert (image_tokens > 0) == bool(prompt.vision) == (count > 0)
    if count:
        with torch.no_grad():
            features = student.model.model.get_image_features(**prompt.vision).pooler_output
        assert sum(f.numel() for f in features) == image_tokens * student.model.config.get_text_config().hidden_size
    assert int(prompt.input_ids[0]) not in prompt.input_ids[1:2]  # the first token is written once
    assert prompt.next_position > 0 and prompt.position_ids.shape[1] == prompt.length


def test_another_image_gives_other_logprobs(student: Student):
    """Otherwise no test of this file would see wrong pixels."""
    ids = torch.tensor([50, 51, 52])
    red, blue = (
        own_logprobs(student.model, chat(student, [Image.new("RGB", (56, 56), color)]), ids)
        for color in ((220, 30, 30), (40, 60, 220))
    )
    assert (red - blue).abs().max() > 1e-3


@pytest.mark.parametrize("number", [0, 1, 2, 3], ids=["one image", "two images", "no image", "wide image"])
def test_plain_pass_equals_the_models_own(student: Student, tmp_path: Path, number: int):
    each = group(student, tmp_path, number)
    with torch.no_grad():
        ours = Policy(student.model)(pad_rows([each], student.encoder.pad_token_id))
    for row, ids in enumerate(each.completions):
        expected = own_logprobs(student.model, each.prompt, ids)
        assert ours[row, : len(ids)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_plain_pass_of_mixed_groups(student: Student, tmp_path: Path):
    groups = [group(student, tmp_path, number) for number in (2, 0, 1, 3, 2)]
    rows = pad_rows(groups, student.encoder.pad_token_id)
    ours = Policy(student.model)(rows)
    pairs = [(g.prompt, ids) for g in groups for ids in g.completions]
    for row, (prompt, ids) in enumerate(pairs):
        expected = own_logprobs(student.model, prompt, ids)
        assert ours[row, : len(ids)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert (ours[row, len(ids) :] == 0).all()
    ours.sum().backward()
    for name, parameter in student.model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    reached = {module_group(n) for n, p in student.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"vision_tower", "projector", "word_embeddings", "attention", "mlp_gate", "layer_norms"} <= reached


def test_features_made_before_give_the_same_logits(student: Student, tmp_path: Path):
    for number in (0, 1, 3):
        each = group(student, tmp_path, number)
        inputs = plain_inputs(each.prompt, each.completions[0])
        with torch.no_grad():
            expected = student.model(**inputs, **each.prompt.vision).logits
            features = student.model.model.get_image_features(**each.prompt.vision)
            # Grids are not passed, so M-RoPE positions have to be.
            length = inputs["input_ids"].shape[1]
            after = torch.arange(length - each.prompt.length) + each.prompt.next_position
            positions = torch.cat([each.prompt.position_ids, after.expand(len(each.prompt.position_ids), -1)], dim=1)
            positions = positions[:, None] if len(positions) > 1 else positions
            ours = student.model(**inputs, position_ids=positions, mm_encoder_outputs={"image": features}).logits
        assert (ours - expected).abs().max() < 1e-5


def test_joined_images_give_the_features_of_each(student: Student, tmp_path: Path):
    prompts = [student.encoder(q) for q in unlike_questions(tmp_path)]

    def features(vision: dict[str, Tensor]) -> Tensor:
        width = student.model.config.get_text_config().hidden_size
        return torch.cat([f.reshape(-1, width) for f in student.model.model.get_image_features(**vision).pooler_output])

    with torch.no_grad():
        alone = torch.cat([features(p.vision) for p in prompts if p.vision])
        together = features(collate_vision_inputs(prompts))
    assert together.shape == alone.shape
    assert torch.allclose(together, alone, atol=1e-5)
    assert collate_vision_inputs([p for p in prompts if not p.vision]) == {}


def test_every_parameter_belongs_to_a_module_group(student: Student):
    assert [name for name, _ in student.model.named_parameters() if module_group(name) is None] == []
    tower = [n for n, _ in student.model.named_parameters() if module_group(n) == "vision_tower"]
    assert tower and not any("language_model" in n or "text_model" in n for n in tower)
    vision_side = [n for n, _ in student.model.named_parameters() if module_group(n) in ("vision_tower", "projector")]
    language = ("model.language_model.", "model.text_model.", "lm_head.")
    others = [n for n, _ in student.model.named_parameters() if not n.startswith(language)]
    assert sorted(vision_side) == sorted(others)


def test_responses_hold_no_special_tokens_but_the_end(student: Student):
    tokenizer = student.encoder.tokenizer
    special = [tokenizer.convert_ids_to_tokens(i) for i in student.encoder.special_token_ids]
    assert len(special) >= 5
    ids = student.encoder.completion_ids(Response("q", "a", 0, "red" + " x ".join(special) + " blue"), 500).tolist()
    assert ids[-1] == student.encoder.eos_token_ids[0]
    assert not set(ids[:-1]) & student.encoder.special_token_ids


def test_sampled_responses_hold_no_special_tokens_but_the_end(student: Student, tmp_path: Path):
    questions = unlike_questions(tmp_path)
    drawn = TransformersSampler(student.model, student.encoder).sample(
        questions, 2, settings=SamplingConfig(temperature=1.5, top_p=1.0, top_k=0), max_completion_length=6, seed=3
    )
    for question, responses in zip(questions, drawn, strict=True):
        prompt = student.encoder(question)
        for response in responses:
            assert response.token_ids is not None and response.logprobs is not None
            ids = list(response.token_ids)
            banned = student.encoder.special_token_ids - set(student.encoder.eos_token_ids)
            assert not set(ids) & banned
            scaled = Policy(student.model, 1.5)(
                pad_rows([GroupTokens(prompt, [torch.tensor(ids)])], student.encoder.pad_token_id)
            )
            assert list(response.logprobs) == pytest.approx(scaled[0].tolist(), abs=1e-4)


def test_a_dummy_image_encodes(student: Student):
    prompt = dummy_image_prompt(student.encoder, student.model, num_processes=2)
    assert prompt is not None and prompt.vision
    with torch.no_grad():
        features = student.model.model.get_image_features(**prompt.vision).pooler_output
    assert sum(f.numel() for f in features) > 0


def test_marks_of_tiles_are_special_even_where_the_tokenizer_says_otherwise(tiny_smolvlm: Path):
    model = load_model(str(tiny_smolvlm))
    processor = load_processor(str(tiny_smolvlm))
    tokenizer = processor.tokenizer
    mark = tokenizer.convert_tokens_to_ids("<row_1_col_1>")
    plain = tokenizer.backend_tokenizer.get_added_tokens_decoder()[mark]
    plain.special = False
    tokenizer.backend_tokenizer.add_tokens([plain])
    encoder = PromptEncoder(processor, model)
    assert {mark, tokenizer.convert_tokens_to_ids("<global-img>")} <= encoder.special_token_ids


def test_gemmas_turns_end_with_their_own_token(tiny_gemma3: Path):
    model = load_model(str(tiny_gemma3))
    encoder = PromptEncoder(load_processor(str(tiny_gemma3)), model)
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.eos_token_ids)
    assert tokens == ["<end_of_turn>", "<eos>"]
