"""Which tokens are learned, which examples are left out, and which answers the recipe's three sources give."""

import pytest
import torch

from openril.errors import CacheError, DataError
from openril.models.dummy_image import dummy_image_prompt
from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, pad_rows
from openril.models.prompt_lengths import LeftOut
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import Recipe
from openril.records import Question, Response
from openril.responses.cache import ResponseCache
from openril.rewards.answers import judge_item
from openril.rewards.judge_prompt import Prompt
from openril.rewards.judge_protocol import Verdict, judge_identity
from openril.rewards.verdict_store import open_verdict_store, verdict_key
from openril.storage import read_jsonl
from openril.training.sft_examples import IGNORED, Example, SFTCollator, fingerprint, sft_examples
from support.tiny import tiny_questions


def answers(questions):
    return [Example(q, Response(q.id, "answer", 0, q.answer)) for q in questions]


def make_collator(checkpoint, examples, folder, *, processes=1, **limits):
    model = load_model(str(checkpoint))
    encoder = PromptEncoder(load_processor(str(checkpoint)), model, keep=0)
    dummy = dummy_image_prompt(encoder, model, processes)
    limits = {"max_prompt_length": 4096, "max_length": 4608, **limits}
    left_out = LeftOut(Recipe(run_dir=str(folder)), "sft")
    return model, SFTCollator(examples, encoder, left_out=left_out, dummy=dummy, **limits)


def rows(*numbers):
    return [{"example": i} for i in numbers]


def test_exactly_the_answer_and_its_end_are_learned(tiny_student, tmp_path):
    questions = tiny_questions(tmp_path, 3)  # one image, two images, none, in one batch
    _, collator = make_collator(tiny_student, answers(questions), tmp_path)
    batch = collator(rows(0, 1, 2))
    encoder = collator.encoder
    image_tokens = {encoder.tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<IMG_CONTEXT>")}
    for r, question in enumerate(questions):
        learned = batch["labels"][r] != IGNORED
        ids = batch["input_ids"][r]
        assert encoder.tokenizer.decode(ids[learned].tolist()) == question.answer + "<|im_end|>"
        assert torch.equal(batch["labels"][r][learned], ids[learned])
        assert not learned[: encoder(question).length].any()
        assert not image_tokens & set(ids[learned].tolist())
        assert not (learned & (batch["attention_mask"][r] == 0)).any()


def test_the_loss_is_minus_the_mean_log_probability_the_loop_computes(tiny_student, tmp_path):
    questions = tiny_questions(tmp_path, 3)
    model, collator = make_collator(tiny_student, answers(questions), tmp_path)
    batch = collator(rows(0, 1, 2))
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss  # transformers' own loss on our labels
        encoder = collator.encoder
        groups = [
            GroupTokens(encoder(q), [encoder.completion_ids(Response(q.id, "a", 0, q.answer), 99)]) for q in questions
        ]
        laid_out = pad_rows(groups, encoder.pad_token_id)
        logprobs = Policy(model)(laid_out)
    assert loss.item() == pytest.approx(-(logprobs.sum() / laid_out.mask.sum()).item(), abs=1e-5)


def test_a_cut_response_does_not_teach_to_stop(tiny_qwen, tmp_path):
    question = Question("q", "Say something.")
    cut = Example(question, Response("q", "a", 0, "red green", finish_reason="length"))
    _, collator = make_collator(tiny_qwen, [cut], tmp_path)
    batch = collator(rows(0))
    learned = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert collator.encoder.tokenizer.decode(learned.tolist()) == "red green"


def test_special_tokens_in_an_answer_are_not_learned(tiny_qwen, tmp_path):
    question = Question("q", "Say something.", "red<|im_end|><|image_pad|>blue")
    _, collator = make_collator(tiny_qwen, answers([question]), tmp_path)
    learned = collator(rows(0))["labels"][0]
    text = collator.encoder.tokenizer.decode(learned[learned != IGNORED].tolist())
    assert text.count("<|im_end|>") == 1 and text.endswith("<|im_end|>") and "image_pad" not in text


def test_too_long_examples_are_left_out_whole_and_noted(tiny_qwen, tmp_path):
    questions = [Question("long", "word " * 200, "red"), Question("short", "Say red.", "red")]
    _, collator = make_collator(tiny_qwen, answers(questions), tmp_path, max_prompt_length=60, max_length=80)
    batch = collator(rows(0, 1))
    assert batch["input_ids"].shape[0] == 1
    noted = read_jsonl(tmp_path / "left_out.jsonl")
    assert [row["question_id"] for row in noted] == ["long"] and noted[0]["tokens"] > 60


def test_a_long_answer_is_left_out_too(tiny_qwen, tmp_path):
    questions = [Question("long", "Say much.", "red " * 200), Question("short", "Say red.", "red")]
    _, collator = make_collator(tiny_qwen, answers(questions), tmp_path, max_prompt_length=60, max_length=80)
    assert collator(rows(0, 1))["input_ids"].shape[0] == 1


def test_a_batch_left_out_whole_still_makes_a_step_that_teaches_nothing(tiny_qwen, tmp_path):
    model, collator = make_collator(
        tiny_qwen, answers([Question("q", "word " * 200, "red")]), tmp_path, max_prompt_length=60
    )
    batch = collator(rows(0))
    assert (batch["labels"] == IGNORED).all()
    assert model(**{k: v for k, v in batch.items() if k != "labels"}).logits.isfinite().all()


def test_with_several_processes_a_text_batch_borrows_an_image_it_does_not_learn(tiny_student, tmp_path):
    examples = answers([Question("q", "Say red.", "red")])
    _, alone = make_collator(tiny_student, examples, tmp_path)
    _, among_two = make_collator(tiny_student, examples, tmp_path, processes=2)
    plain, batch = alone(rows(0)), among_two(rows(0))
    assert "pixel_values" not in plain and "pixel_values" in batch
    assert (batch["labels"] != IGNORED).sum() == (plain["labels"] != IGNORED).sum()


# What is learned


def cached(folder, questions, judged=()):
    cache = ResponseCache.create(folder)
    for source in ("a", "b"):
        cache.register(source, model=source, revision=None, sampling={})
        with cache.writer(source) as writer:
            for q in questions:
                for i in range(3):
                    writer.append(q, Response(q.id, source, i, f"{source}{i} {q.answer}"))
    recipe = Recipe.model_validate(
        {"run_dir": str(folder.parent), "cache_dir": str(folder), "teachers": [{"name": "a"}, {"name": "b"}]}
    )
    store = open_verdict_store(recipe, "collect")
    by_id = {q.id: q for q in questions}
    for (id, source, i), score in dict(judged).items():
        item = judge_item(by_id[id], f"{source}{i} {by_id[id].answer}")
        prompt = Prompt.of(*item[:3], recipe.judge.max_response_chars)
        key = verdict_key(judge_identity(recipe.judge), prompt)
        store.add(key, Verdict(score, "Compared."), judge="j", prompt=prompt, attempts=1, shared=True)
    return recipe


QUESTIONS = [Question("q0", "Which?", "red"), Question("q1", "Which now?", "blue")]


def test_answers_of_the_data(tmp_path):
    questions = [*QUESTIONS, Question("q2", "Nobody knows?")]
    assert [e.answer.text for e in sft_examples(Recipe(), questions)] == ["red", "blue"]
    with pytest.raises(DataError, match=r"data\.columns\.answer"):
        sft_examples(Recipe(), [Question("q2", "Nobody knows?")])


def test_teacher_responses_of_all_teachers_up_to_a_number_each(tmp_path):
    recipe = cached(tmp_path / "cache", QUESTIONS)
    recipe.sft.targets = "teacher_responses"
    assert len(sft_examples(recipe, QUESTIONS)) == 2 * 2 * 3
    recipe.sft.responses_per_question = 1
    assert [e.answer.text for e in sft_examples(recipe, QUESTIONS)] == ["a0 red", "b0 red", "a0 blue", "b0 blue"]
    recipe.sft.sources = ["b"]
    assert [e.answer.text for e in sft_examples(recipe, QUESTIONS)] == ["b0 red", "b0 blue"]


def test_judged_responses_are_the_right_ones(tmp_path):
    verdicts = {("q0", "a", 0): 0.0, ("q0", "a", 1): 1.0, ("q0", "a", 2): 1.0, ("q1", "b", 0): 0.0}
    recipe = cached(tmp_path / "cache", QUESTIONS, verdicts)
    recipe.sft.targets = "judged_responses"
    assert [e.answer.text for e in sft_examples(recipe, QUESTIONS)] == ["a1 red", "a2 red"]
    recipe.sft.responses_per_question = 1  # of the right ones
    assert [e.answer.text for e in sft_examples(recipe, QUESTIONS)] == ["a1 red"]


def test_without_verdicts_the_error_names_the_setting(tmp_path):
    recipe = cached(tmp_path / "cache", QUESTIONS)
    recipe.sft.targets = "judged_responses"
    with pytest.raises(CacheError, match=r"sft\.targets.*collect\.judge_responses"):
        sft_examples(recipe, QUESTIONS)


def test_verdicts_of_another_judge_or_truth_choose_nothing(tmp_path):
    recipe = cached(tmp_path / "cache", QUESTIONS, {("q0", "a", 0): 1.0, ("q1", "a", 0): 1.0})
    recipe.sft.targets = "judged_responses"
    assert len(sft_examples(recipe, QUESTIONS)) == 2
    corrected = [QUESTIONS[0], Question("q1", "Which now?", "green")]
    assert [e.question.id for e in sft_examples(recipe, corrected)] == ["q0"]
    recipe.judge.max_tokens += 1
    with pytest.raises(CacheError, match=r"collect\.judge_responses"):
        sft_examples(recipe, QUESTIONS)


def test_rules_choose_without_a_judge(tmp_path):
    recipe = cached(tmp_path / "cache", QUESTIONS)
    recipe.sft.targets, recipe.rewards.answer.kind = "judged_responses", "rules"
    corrected = [QUESTIONS[0], Question("q1", "Which now?", "green")]
    assert {e.question.id for e in sft_examples(recipe, corrected)} == {"q0"}


def test_the_fingerprint_changes_with_a_text_and_with_the_order():
    a, b = answers(QUESTIONS)
    other = Example(b.question, Response("q1", "answer", 0, "green"))
    assert len({fingerprint(x) for x in ([a, b], [b, a], [a, other], [a])}) == 4
