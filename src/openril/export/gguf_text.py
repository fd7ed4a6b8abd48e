"""The language model and its tokenizer as keys and tensors of a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from openril.export.gguf_file import GGUFFile, require


@dataclass(frozen=True)
class TextArchitecture:
    """How llama.cpp computes one language model of transformers."""

    name: str
    """Value of ``general.architecture``."""
    biased: bool = False
    """The projections of queries, keys and values have biases."""
    normed: bool = False
    """Queries and keys are normalized."""
    mrope: str = ""
    """How M-RoPE divides a head: "" (not used), "sections" or "interleaved"."""
    permuted: bool = False
    """Rotary pairs are neighbors in the file, and half a head apart in the checkpoint."""


ARCHITECTURES = {
    "qwen2": TextArchitecture("qwen2", biased=True),
    "qwen2_5_vl_text": TextArchitecture("qwen2vl", biased=True, mrope="sections"),
    "qwen3": TextArchitecture("qwen3", normed=True),
    "qwen3_vl_text": TextArchitecture("qwen3vl", normed=True, mrope="interleaved"),
    "llama": TextArchitecture("llama", permuted=True),
}
"""``model_type`` of the language model -> its architecture in llama.cpp."""

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    ("ByteLevel regex",): "gpt-2",
    (f"Split {_QWEN2_SPLIT}", "ByteLevel"): "qwen2",
    ("Digits", "ByteLevel regex"): "smollm",
}
"""Steps of a pre-tokenizer -> its name in llama.cpp."""


def add_text_keys(file: GGUFFile, config: Any, model_type: str) -> None:
    """Add the sizes and settings of the language model. config: its part of the configuration."""
    text = ARCHITECTURES[config.model_type]
    rope = config.rope_parameters
    require(config.hidden_act == "silu", "text_config.hidden_act", "silu", config.hidden_act)
    require(rope["rope_type"] == "default", "text_config.rope_parameters.rope_type", "default", rope["rope_type"])
    partial = rope.get("partial_rotary_factor", 1.0)
    require(partial == 1.0, "text_config.rope_parameters.partial_rotary_factor", "1.0", partial)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    require(kinds == {"full_attention"}, "text_config.layer_types", "full_attention only", sorted(kinds))
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = file.keys
    keys.add_type("model")
    keys.add_name(model_type)
    keys.add_block_count(config.num_hidden_layers)
    keys.add_context_length(config.max_position_embeddings)
    keys.add_embedding_length(config.hidden_size)
    keys.add_feed_forward_length(config.intermediate_size)
    keys.add_head_count(heads)
    keys.add_head_count_kv(config.num_key_value_heads)
    keys.add_key_length(head_dim)
    keys.add_value_length(head_dim)
    keys.add_rope_dimension_count(head_dim)
    keys.add_layer_norm_rms_eps(config.rms_norm_eps)
    keys.add_rope_freq_base(rope["rope_theta"])
    if text.mrope:
        interleaved = "interleaved" if rope.get("mrope_interleaved") else "sections"
        require(interleaved == text.mrope, "text_config.rope_parameters.mrope_interleaved", text.mrope, interleaved)
        keys.add_rope_dimension_sections([*rope["mrope_section"], 0])
    else:
        require(not rope.get("mrope_section"), "text_config.rope_parameters.mrope_section", "none", rope)


def add_tokenizer(file: GGUFFile, tokenizer: Any, vocab_size: int, ends: list[int], template: str) -> None:
    """Add the vocabulary, the merges and the chat template.

    Args:
        vocab_size: Rows of the embedding; those without a token get a name that is never written.
        ends: Ids that end an answer; the first ends a turn.

    Raises:
        ExportError: The tokenizer is of a kind that llama.cpp is not known to apply in the same way.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    require(model["type"] == "BPE", "tokenizer", "a byte-level BPE", model["type"])
    odd = {k: model.get(k) for k in ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix",
                                     "end_of_word_suffix") if model.get(k)}  # fmt: skip
    require(not odd, "tokenizer.model", "a plain BPE", odd)
    normalizer = (data["normalizer"] or {"type": "NFC"})["type"]
    require(normalizer == "NFC", "tokenizer.normalizer", "none or NFC", normalizer)
    steps = tuple(_steps(data["pre_tokenizer"]))
    require(steps in _SPLITS, "tokenizer.pre_tokenizer", f"one of {', '.join(_SPLITS.values())}", steps)
    post = data["post_processor"] or {"type": "ByteLevel"}
    adds = post.get("special_tokens") if post["type"] == "TemplateProcessing" else post["type"] != "ByteLevel"
    require(not adds, "tokenizer.post_processor", "one that adds no tokens", post)
    added = tokenizer.added_tokens_decoder
    trimmed = [t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word]
    require(not trimmed, "tokenizer.added_tokens", "tokens without lstrip, rstrip and single_word", trimmed[:3])
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    normal, unused, control, user_defined = 1, 5, 3, 4

    def kind(i: int) -> int:
        if i not in tokens:
            return unused
        return normal if i not in added else control if added[i].special else user_defined

    keys = file.keys
    keys.add_tokenizer_model("gpt2")
    keys.add_tokenizer_pre(_SPLITS[steps])
    keys.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    keys.add_token_types([kind(i) for i in range(vocab_size)])
    keys.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    keys.add_eos_token_id(ends[0])
    if tokenizer.bos_token_id is not None:
        keys.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        keys.add_pad_token_id(tokenizer.pad_token_id)
    keys.add_add_bos_token(False)
    keys.add_chat_template(template)


def _steps(part: dict[str, Any] | None) -> list[str]:
    """Return the steps of a pre-tokenizer in a form that can be compared."""
    if part is None:
        return ["none"]
    if part["type"] == "Sequence":
        return [step for inner in part["pretokenizers"] for step in _steps(inner)]
    if part["type"] == "ByteLevel":
        return (
            ["ByteLevel with a space in front"]
            if part["add_prefix_space"]
            else ["ByteLevel regex" if part["use_regex"] else "ByteLevel"]
        )
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return [f"Split {part['pattern'].get('Regex')}"]
    if part["type"] == "Digits" and part["individual_digits"]:
        return ["Digits"]
    return [json.dumps(part)]


def fixed_template(encoder: Any) -> str:
    """Return the chat template with thinking switched as in the prompts of training, whatever a request asks for.

    Training renders the template without ``enable_thinking``, which runtimes set themselves.
    """
    owner = encoder.processor if getattr(encoder.processor, "chat_template", None) else encoder.tokenizer
    template = owner.chat_template
    if "enable_thinking" not in template:
        return template
    chat = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    options = {"tokenize": False, "add_generation_prompt": True}
    trained = owner.apply_chat_template(chat, **options)
    for value in (True, False):
        if owner.apply_chat_template(chat, enable_thinking=value, **options) == trained:
            return "{%- set enable_thinking = " + str(value).lower() + " -%}\n" + template
    return template
