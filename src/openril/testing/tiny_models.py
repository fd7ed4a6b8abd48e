"""Build tiny random checkpoints of the real architectures, with their processors and chat templates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from openril.errors import ModelError
from openril.storage import atomic_path
from openril.testing.tiny_families import FAMILIES, Sizes

Architecture = Literal["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "smolvlm", "gemma3", "qwen2"]

_CORPUS = [
    "You are a helpful assistant. Compare the generated text with the ground truth.",
    "Question, answer, response, student, teacher, true, false, yes, no, red, blue, green, yellow, black.",
    "There is a box with two squares and one circle touching the wall.",
    "How many? Which colour? The answer is 0 1 2 3 4 5 6 7 8 9 A B C D.",
]


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """Train a byte-level BPE, which writes and reads back any text exactly."""
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
    """Make a unigram model over bytes and words, a second kind of tokenizer whose ids differ from the BPE's.

    The library's trainer sums in the order of a hash map, so its result differs between processes. Here the pieces are
    all bytes and the most frequent words, and their scores are the logarithms of their shares.
    """
    normalizer, split = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    count = max(0, vocab_size - len(special) - len(alphabet))
    words = sorted((w for w in counts if len(w) > 1), key=lambda w: (-counts[w], w))[:count]
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
    num_kv_heads: int = 0,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    max_pixels: int = 112 * 112,
    tile_size: int = 56,
    max_tiles: int = 4,
    sees: bool = False,
    seed: int = 0,
) -> Path:
    """Write a tiny random checkpoint with its processor to ``folder``, and return the folder.

    Args:
        architecture: "qwen2" is a text-only model, for judges; "smolvlm" needs the package num2words.
        texts: What the tokenizer is trained on, together with a few built-in sentences.
        num_kv_heads: Heads of keys and values; 0 for half of num_heads.
        max_pixels: Largest image area of the Qwen-VL families, which have one image token per 28 x 28 pixels (Qwen3-VL:
            32 x 32).
        tile_size: Side of the other families' square tiles in pixels, a multiple of 28. They have one image token per
            28 x 28 pixels (LLaVA-OneVision: 14 x 14).
        max_tiles: Most tiles of an image. Gemma 3 does not split images.
        sees: Start from weights with which a model of this size learns to look at its images (see ``widen``), and give
            every query head its key-value head. Off, the weights are as small as the architectures make them: such
            models run everywhere, but learn hardly more than the commonest answer to each wording.

    Raises:
        ModelError: The sizes do not fit together.
    """
    if architecture not in FAMILIES:
        raise ModelError(f"architecture: expected one of {', '.join(FAMILIES)}, got {architecture!r}")
    if hidden_size % num_heads or (hidden_size // num_heads) % 8:
        raise ModelError(f"hidden_size: expected a multiple of 8 x num_heads ({8 * num_heads}), got {hidden_size}")
    if tile_size % 28:
        raise ModelError(f"tile_size: expected a multiple of 28, got {tile_size}")
    folder = Path(folder)
    family = FAMILIES[architecture]
    make = _bpe_tokenizer if tokenizer == "bpe" else _unigram_tokenizer
    backend = make([*texts, *_CORPUS], vocab_size, family.tokens)
    vocabulary = backend.get_vocab()
    ids = {token: vocabulary[token] for token in family.tokens}
    text_config: dict[str, Any] = {
        "vocab_size": backend.get_vocab_size(),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads or (num_heads if sees else max(1, num_heads // 2)),
        "max_position_embeddings": 32768,
        "bos_token_id": ids.get(family.bos or ""),
        "eos_token_id": ids[family.ends[0]],
        "pad_token_id": ids[family.pad],
        "tie_word_embeddings": False,
    }
    sizes = Sizes(
        text=text_config,
        ids=ids,
        tokenizer=family.tokenizer(backend),
        vision_hidden_size=vision_hidden_size,
        vision_layers=vision_layers,
        max_pixels=max_pixels,
        tile_size=tile_size,
        max_tiles=max_tiles,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = family.build(sizes)
        if sees:
            widen(model)
    ends = [ids[token] for token in family.ends]
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    model.generation_config.pad_token_id = ids[family.pad]
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return folder


WORDS = 15.0
"""Factor of the word embeddings. At the architectures' scale, the output of the first layer hides which word a token is."""


@torch.no_grad()
def widen(model: torch.nn.Module) -> None:
    """Draw the matrices and convolutions of a random model again, with standard deviations that suit its size.

    The architectures draw all weights with a standard deviation of 0.02, which suits thousands of inputs. With 64 inputs
    each layer returns a tenth of what it gets, and hardly anything of an image reaches the language model. Here the
    standard deviation is 1 / sqrt(inputs), so that a layer keeps the scale. Word embeddings become ``WORDS`` times as
    large. Biases, norms and tables of positions are not changed.
    """
    words = model.get_input_embeddings().weight  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d) and module.weight is not words:
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    words.mul_(WORDS)
