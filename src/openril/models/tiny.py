"""Tiny random models of the real architectures: real transformers classes, processors and chat templates, on disk.

For tests, the demo and trying a recipe before renting machines. A folder written here is an ordinary checkpoint.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from openril.errors import ModelError
from openril.storage import atomic_path

Architecture = Literal["qwen2_5_vl", "internvl", "qwen2"]

_CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN_TOKENS = [*_CHAT_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_INTERNVL_TOKENS = [*_CHAT_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]

# ChatML, the format both families use: content is a string or a list of image and text parts.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

_CORPUS = [
    "You are a helpful assistant. Compare the generated text with the ground truth.",
    "Question, answer, response, student, teacher, true, false, yes, no, red, blue, green, yellow, black.",
    "There is a box with two squares and one circle touching the wall.",
    "How many? Which colour? The answer is 0 1 2 3 4 5 6 7 8 9 A B C D.",
]


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be written, and read back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram_tokenizer(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """Another family of tokenizer, so that students and teachers share no ids: a unigram model over bytes and words.

    The library's trainer adds up in the order of a hash map, so its result differs from process to process. Here the
    pieces are all bytes and the most frequent words, with the logarithm of their shares as scores.
    """
    normalizer, split = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = max(0, vocab_size - len(special) - len(alphabet))
    words = sorted((w for w in counts if len(w) > 1), key=lambda w: (-counts[w], w))[:room]
    total = sum(counts.values()) + len(alphabet)
    pieces = [(token, 0.0) for token in special]
    pieces += [(byte, math.log(1 / total) - 1) for byte in alphabet]
    pieces += [(word, math.log(counts[word] / total)) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _fast_tokenizer(backend: Tokenizer, template: str, **extra: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=extra or {},
        padding_side="left",
        model_max_length=32768,
    )
    tokenizer.chat_template = template
    return tokenizer


def build_tiny_model(
    folder: str | Path,
    architecture: Architecture = "qwen2_5_vl",
    *,
    texts: Iterable[str] = (),
    tokenizer: Literal["bpe", "unigram"] = "bpe",
    vocab_size: int = 600,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 2,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    max_pixels: int = 112 * 112,
    tile_size: int = 56,
    max_tiles: int = 4,
    seed: int = 0,
) -> Path:
    """Write a tiny random checkpoint with its processor to ``folder`` and return the folder.

    texts: what the tokenizer is trained on, beside a few built-in sentences. max_pixels: largest image area for
    Qwen2.5-VL (one image token per 28 x 28 pixels). tile_size, max_tiles: InternVL's square tiles in pixels (a
    multiple of 28; one image token per 28 x 28 pixels) and their number. "qwen2" is a text-only model, for judges.
    Raises ModelError when sizes do not fit.
    """
    if hidden_size % num_heads or (hidden_size // num_heads) % 8:
        raise ModelError(f"hidden_size {hidden_size} must be num_heads {num_heads} times a multiple of 8")
    if tile_size % 28:
        raise ModelError(f"tile_size {tile_size} must be a multiple of 28")
    folder = Path(folder)
    special = {"qwen2_5_vl": _QWEN_TOKENS, "internvl": _INTERNVL_TOKENS, "qwen2": _CHAT_TOKENS}[architecture]
    make = _bpe_tokenizer if tokenizer == "bpe" else _unigram_tokenizer
    backend = make([*texts, *_CORPUS], vocab_size, special)
    token_id = {t: backend.token_to_id(t) for t in special}
    text_config: dict[str, Any] = {
        "vocab_size": backend.get_vocab_size(),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(1, num_heads // 2),
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": token_id["<|im_end|>"],
        "pad_token_id": token_id["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "qwen2_5_vl":
            model, processor = _qwen2_5_vl(
                text_config, backend, token_id, vision_hidden_size, vision_layers, max_pixels
            )
        elif architecture == "internvl":
            model, processor = _internvl(
                text_config, backend, token_id, vision_hidden_size, vision_layers, tile_size, max_tiles
            )
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**text_config))
            processor = _fast_tokenizer(backend, _CHAT_TEMPLATE)
    model.generation_config.eos_token_id = token_id["<|im_end|>"]
    model.generation_config.pad_token_id = token_id["<|endoftext|>"]
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return folder


def _qwen2_5_vl(text_config, backend, token_id, vision_hidden_size, vision_layers, max_pixels):
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    head_dim = text_config["hidden_size"] // text_config["num_attention_heads"]
    # M-RoPE shares a head's rotary pairs between time, height and width, in the ratio 2 : 3 : 3 of the real models.
    section = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
    section[0] += head_dim // 2 - sum(section)
    config = Qwen2_5_VLConfig(
        text_config={
            **text_config,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "use_sliding_window": False,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_heads": max(1, vision_hidden_size // 32),
            "out_hidden_size": text_config["hidden_size"],
            "fullatt_block_indexes": [vision_layers - 1],
        },
        image_token_id=token_id["<|image_pad|>"],
        video_token_id=token_id["<|video_pad|>"],
        vision_start_token_id=token_id["<|vision_start|>"],
        vision_end_token_id=token_id["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    template = _CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer = _fast_tokenizer(
        backend,
        template,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": max_pixels}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _internvl(text_config, backend, token_id, vision_hidden_size, vision_layers, tile_size, max_tiles):
    from transformers import GotOcr2ImageProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    image_seq_length = (tile_size // 28) ** 2
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config},
        vision_config={
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": max(1, vision_hidden_size // 32),
            "image_size": [tile_size, tile_size],
            "patch_size": [14, 14],
        },
        image_token_id=token_id["<IMG_CONTEXT>"],
        image_seq_length=image_seq_length,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    template = _CHAT_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\\n")
    tokenizer = _fast_tokenizer(
        backend,
        template,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            crop_to_patches=True,
            min_patches=1,
            max_patches=max_tiles,
            size={"height": tile_size, "width": tile_size},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=image_seq_length,
        chat_template=template,
    )
    return InternVLForConditionalGeneration(config), processor
