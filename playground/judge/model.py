"""A small text model whose tokenizer has one token for each fixed part of the judge's prompt.

Prompts and replies are less than half as long with such a tokenizer. If the prompt's text changes, the judge must be
trained again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from openril.hf import GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast
from openril.rewards.judge_prompt import SYSTEM, USER
from openril.testing.tiny_templates import CHATML

MOST_TOKENS = 1200
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, END = SPECIAL[0], SPECIAL[2]
REPLY_PARTS = ("It says", ", truth", ". <answer>", "</answer>")
"""Fixed parts of a reply (see ``cases.reply_text``)."""


def judge_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts.

    Frequent numbers become one token, and so do the fixed parts of prompt and reply. The latter are ordinary tokens, not
    special ones. The prompt removes them from responses.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fixed = [SYSTEM, *re.split(r"\{\w+\}", USER), *REPLY_PARTS]
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS - len(fixed),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *["system\nuser\nassistant\n"] * len(texts)], trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in fixed])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, padding_side="left", model_max_length=4096
    )
    tokenizer.chat_template = CHATML.replace("IMAGE", "")
    return tokenizer


def build_judge(
    folder: Path, texts: Sequence[str], *, hidden_size: int, num_layers: int, num_heads: int = 4, seed: int = 0
) -> None:
    """Write a random judge and its tokenizer to ``folder``.

    The architecture is Granite, which has Llama's layers. transformers loads its tokenizer as it was saved, whereas the
    tokenizer class of Qwen splits every number into digits.
    """
    tokenizer = judge_tokenizer(texts)
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        attention_multiplier=(hidden_size // num_heads) ** -0.5,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GraniteForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
