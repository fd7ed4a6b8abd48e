"""Text that comes from data or models must not forge turns or image places in a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from openril.records import IMAGE_MARKER

# Spellings that tokenizers turn into single control tokens: turn and sequence marks, and image, video and audio places.
# Marks a model may write in an honest answer (<think>, <box>, <ref>, <answer>) are not here; pass them as ``extra``.
_WORDS = (
    "s|unk|pad|bos|eos|cls|sep|mask|im_start|im_end|im_patch|img|image|video|audio|img_context|image_pad|video_pad|"
    "image_placeholder|image_newline|image_soft_token|audio_soft_token|start_of_image|end_of_image|start_of_audio|"
    "end_of_audio|start_of_turn|end_of_turn|end_of_utterance|end_of_text|begin_of_text|fake_token_around_image|"
    r"global-img|row_\d+_col_\d+|patch|unused\d+|img_start|img_end|vision_start|vision_end"
)
_BRACKETS = "INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG|IMG_BREAK|IMG_END|MODEL_SETTINGS"
_SPECIAL = re.compile(
    r"<[|\uFF5C][^\s<>]{1,100}?[|\uFF5C]>"  # <|im_end|>, <|image_pad|>, and DeepSeek's full-width bars
    rf"|</?(?:{_WORDS})\s?/?>"
    rf"|\[/?(?:{_BRACKETS})\]"
    r"|<<\s?/?SYS\s?>>",
    re.IGNORECASE,
)


def strip_special(text: str, extra: Sequence[str] = (), keep_markers: bool = False) -> str:
    """``text`` without anything a chat template could take for a control token.

    Each token becomes one space, so that removing one can never complete another (``<|im_<|im_end|>end|>``); running
    it again changes nothing. extra: further literal strings to remove, for instance a tokenizer's
    ``all_special_tokens`` or the tags of a judge's prompt (matched in any case). keep_markers: leave ``<image>``, for
    the text of a question.
    """
    if keep_markers:
        return IMAGE_MARKER.join(strip_special(part, extra) for part in text.split(IMAGE_MARKER))
    if not extra and "<" not in text and "[" not in text:  # nearly all text; millions of rows come through here
        return text
    extras = sorted({e for e in extra if e.strip()}, key=len, reverse=True)
    literal = re.compile("|".join(map(re.escape, extras)), re.IGNORECASE) if extras else None
    while True:
        stripped = _SPECIAL.sub(" ", text)
        if literal is not None:
            stripped = literal.sub(" ", stripped)
        if stripped == text:
            return text
        text = stripped


def has_special(text: str, keep_markers: bool = False) -> bool:
    """Whether ``strip_special`` would change ``text``."""
    return strip_special(text, keep_markers=keep_markers) != text
