"""The local judge on tiny checkpoints: it runs, answers alone as in company, and leaves random state alone."""

import shutil

# isort: split
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from openril.errors import ModelError
from openril.hf import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from openril.recipe.schema import JudgeConfig
from openril.rewards.judge import JudgeService, make_judge
from openril.rewards.judge_prompt import SYSTEM, Prompt
from openril.rewards.local_judge import LocalJudge
from openril.rewards.verdict_store import VerdictStore
from openril.testing.tiny_models import build_tiny_model

WITH_SYSTEM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM_ROLE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
WITHOUT_SYSTEM = NO_SYSTEM_ROLE + WITH_SYSTEM
IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ITEMS = [
    ("Which color?", "red", "It is red."),
    ("Which color is the large ball on the left side?", "blue", "I believe that it is green, or so it looks."),
    ("How many?", "3", "three"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Qwen2 with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    specials = ["<unk>", "<|im_start|>", "<|im_end|>"]
    words = ["<answer>", "</answer>", "0", "1", "it", "is", "the", "same", "wrong", "right", "red", "blue"]
    vocabulary = {word: i for i, word in enumerate([*specials, *words])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<unk>",  # the default of Qwen2's tokenizer would be a token beyond the embedding
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = WITH_SYSTEM
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def settings_for(folder, **more):
    return JudgeConfig(model_path=str(folder), max_tokens=12, bad_verdict_retries=1, **more)


def service_for(folder, path, **more):
    return JudgeService(settings_for(folder, **more), VerdictStore(path / "rank0.jsonl"))


def test_a_random_judge_gives_a_verdict_or_unknown(checkpoint, tmp_path):
    verdicts = service_for(checkpoint, tmp_path).judge(ITEMS)
    for verdict in verdicts:
        assert verdict.asked
        assert verdict.score in (0.0, 1.0) or "unreadable verdict" in verdict.cause


def test_a_verdict_does_not_depend_on_its_neighbours(checkpoint, tmp_path):
    together = service_for(checkpoint, tmp_path / "together").judge(ITEMS)
    for i, item in enumerate(ITEMS):
        alone = service_for(checkpoint, tmp_path / f"alone{i}").judge([item])
        assert alone == [together[i]]
    reverse = service_for(checkpoint, tmp_path / "reverse").judge(ITEMS[::-1])
    assert reverse[::-1] == together


def test_sampling_is_seeded_and_leaves_the_random_state_alone(checkpoint, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad():
        first = service_for(checkpoint, tmp_path / "a", temperature=1.0).judge(ITEMS)
        assert torch.equal(torch.rand(3), expected)
        assert service_for(checkpoint, tmp_path / "b", temperature=1.0).judge(ITEMS) == first


def test_work_waits_until_the_result_is_asked_for_and_is_done_once(checkpoint, tmp_path):
    service = service_for(checkpoint, tmp_path)
    handle = service.submit([ITEMS[0], ITEMS[0]])
    assert not (tmp_path / "rank0.jsonl").exists()
    assert handle.result()[0].asked and not handle.result()[1].asked
    assert len((tmp_path / "rank0.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("template", [WITH_SYSTEM, WITHOUT_SYSTEM, IN_PARTS])
def test_every_kind_of_chat_template_shows_the_whole_prompt(checkpoint, template):
    judge = LocalJudge(settings_for(checkpoint))
    judge.tokenizer.chat_template = template
    text = judge.render(Prompt("Which color?", "red", "It is red.").messages())
    assert SYSTEM in text and "It is red." in text
    assert text.count("<|im_start|>") == (2 if template == WITHOUT_SYSTEM else 3)


def test_the_checkpoints_own_special_tokens_are_stripped_from_the_prompt(checkpoint):
    judge = LocalJudge(settings_for(checkpoint))
    judge._special.append("[VERY-SPECIAL]")
    assert "[VERY-SPECIAL]" not in judge.render(Prompt("q", "t", "a [VERY-SPECIAL] b").messages())


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"judge.model_path: .*nowhere"):
        make_judge(settings_for(tmp_path / "nowhere"))


def test_a_checkpoint_without_chat_template_is_an_error(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"judge.model_path: .*chat template"):
        make_judge(settings_for(tmp_path / "bare"))


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "internvl"])
def test_vision_language_checkpoints_judge_as_text(architecture, tmp_path):
    build_tiny_model(tmp_path / "vlm", architecture)
    service = service_for(tmp_path / "vlm", tmp_path / "verdicts")
    [verdict] = service.judge(ITEMS[:1])
    assert verdict.asked and (verdict.score is not None or "unreadable verdict" in verdict.cause)
    assert "It is red." in service.judge_model.render(Prompt(*ITEMS[0]).messages())


def test_batches_give_the_replies_of_one_at_a_time(tmp_path):
    folder = build_tiny_model(tmp_path / "bytes", "qwen2", texts=["red blue green three"], seed=3)
    together = service_for(folder, tmp_path / "together", batch_size=2).judge(ITEMS)
    assert together == service_for(folder, tmp_path / "alone").judge(ITEMS)
    assert len({verdict.explanation for verdict in together}) > 1


def test_all_that_waits_is_answered_with_the_first_result(checkpoint, tmp_path):
    service = service_for(checkpoint, tmp_path, batch_size=8)
    sizes = []
    complete = service.judge_model._decoder.complete
    service.judge_model._decoder.complete = lambda prompts, *more: (
        sizes.append(len(prompts)) or complete(prompts, *more)
    )
    first, later = service.submit(ITEMS[:2]), service.submit(ITEMS[2:])
    first.result()
    assert sizes[0] == 3
    count = len(sizes)
    later.result()
    assert len(sizes) == count


def test_a_cancelled_verdict_is_not_worked_on(checkpoint, tmp_path):
    service = service_for(checkpoint, tmp_path, batch_size=8)
    [[(pending, _)], handle] = [service.submit([item])._slots for item in ITEMS[:1]] + [service.submit(ITEMS[1:])]
    assert pending.cancel()
    handle.result()
    assert len((tmp_path / "rank0.jsonl").read_text().splitlines()) == 2


def test_what_fails_in_a_batch_is_raised(checkpoint, tmp_path):
    service = service_for(checkpoint, tmp_path, batch_size=8)

    def broken(*arguments):
        raise RuntimeError("out of memory")

    service.judge_model._decoder.complete = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        service.judge(ITEMS)


def test_batches_are_greedy_and_for_text_models(checkpoint, tmp_path):
    with pytest.raises(ModelError, match=r"judge.batch_size: .*temperature 1.0"):
        LocalJudge(settings_for(checkpoint, temperature=1.0, batch_size=4))
    build_tiny_model(tmp_path / "vlm", "qwen2_5_vl")
    with pytest.raises(ModelError, match=r"judge.batch_size: .*vision-language"):
        LocalJudge(settings_for(tmp_path / "vlm", batch_size=4))
