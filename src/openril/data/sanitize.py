"""Cleaning of text from data and models, so that it cannot forge turns, tags or image places in a prompt.

All functions are pure. Running any of them a second time changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

from openril.records import IMAGE_MARKER

# Spellings that tokenizers turn into single control tokens: turn and sequence marks, and image, video and audio places.
# Marks that a model may write in an honest answer (<think>, <box>, <ref>, <answer>) are not listed; pass them as extra.
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

_OPENING, _CLOSING = (
    "<\uff1c\ufe64\u2039\u27e8\u3008\u2329\u276e\u276c\u300a\u02c2\u1438",
    ">\uff1e\ufe65\u203a\u27e9\u3009\u232a\u276f\u276d\u300b\u02c3\u1433",
)
_ENTITIES = re.compile(r"&(?:amp;)*(?:(?P<lt>lt|#0*60|#x0*3c)|gt|#0*62|#x0*3e);?", re.I)
_LOOKALIKES = str.maketrans("аеорсухѕіԁոһԛԝαερνιοτυη", "aeopcyxsidnhqwaepviotun")
_LONGEST_TAG = 64
_HARMLESS = re.compile(r"[\n\t !-%'-;=?-Z\\-~]*")
"""Printable ASCII without ``&``, ``<``, ``>`` and ``[``: no entity, tag or special token can be made of it."""


def strip_special(text: str, extra: Sequence[str] = (), keep_markers: bool = False) -> str:
    """Replace everything that a chat template could take for a control token by a space.

    A space, and not nothing, ensures that removing one token never completes another (``<|im_<|im_end|>end|>``).

    Args:
        extra: Further literal strings to remove in any case, for instance ``special_tokens(tokenizer)``.
        keep_markers: Leave ``<image>`` in place, for the text of a question.
    """
    if keep_markers:
        return IMAGE_MARKER.join(strip_special(part, extra) for part in text.split(IMAGE_MARKER))
    if not extra and "<" not in text and "[" not in text:  # fast path for nearly all text of large data sets
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
    """Return whether ``strip_special`` would change ``text``."""
    return strip_special(text, keep_markers=keep_markers) != text


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts of a tokenizer's special tokens, also of those that were added later."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added})


def remove_tags(text: str, names: Sequence[str]) -> str:
    """Delete ``<name>`` and ``</name>`` in any case, until none can be put together from what is left."""
    tags = re.compile(rf"<\s*/?\s*({'|'.join(names)})\s*>", re.IGNORECASE)
    while (shorter := tags.sub("", text)) != text:
        text = shorter
    return text


def strip_disguised_tags(text: str, names: Collection[str]) -> str:
    """Remove special tokens, invisible characters, and tags with these names in any disguise.

    Disguises are case, spaces, attributes, full-width or look-alike characters, HTML entities, invisible characters and
    tags inside tags. White space at both ends is removed too.

    Args:
        names: Names of tags, in lower case and without spaces.
    """
    if _HARMLESS.fullmatch(text):  # fast path: a caller may clean every response of a cache
        return text.strip()
    text = "".join(c for c in text if c in "\n\t" or not _invisible(c))
    while True:
        stripped = _ENTITIES.sub(lambda m: "<" if m["lt"] else ">", text)
        stripped = _strip_tags(strip_special(stripped), names)
        if stripped == text:
            return text.strip()
        text = stripped


def _invisible(character: str) -> bool:
    category = unicodedata.category(character)
    # Format and control characters, lone surrogates, variation selectors, fillers.
    return (
        category in ("Cf", "Cc", "Cs") or "\ufe00" <= character <= "\ufe0f" or character in "\u034f\u115f\u1160\u3164"
    )


def _strip_tags(text: str, names: Collection[str]) -> str:
    """Replace every named tag by a space; one pass from left to right also unpacks tags inside tags."""
    out: list[str] = []
    openings: list[int] = []
    for character in text:
        out.append(character)
        if character in _OPENING:
            openings.append(len(out) - 1)
        elif character in _CLOSING:
            openings = [i for i in openings if len(out) - i <= _LONGEST_TAG]
            for start in reversed(openings):
                if _is_tag("".join(out[start:]), names):
                    out[start:] = [" "]
                    openings = [i for i in openings if i < start]
                    break
    return "".join(out)


def _is_tag(text: str, names: Collection[str]) -> bool:
    squeezed = "".join(text.split())
    if squeezed.startswith("<|") and squeezed.endswith("|>"):
        return True  # a special token that was broken up by other text inside it
    decomposed = unicodedata.normalize("NFKD", text).casefold().translate(_LOOKALIKES)
    letters = "".join(c for c in decomposed if c.isalnum())
    # A tag with attributes also counts: <answer id="x">.
    first_word = re.match(r"[a-z]+", decomposed.strip(_OPENING + "</ \n\t"))
    return letters in names or bool(first_word and first_word.group() in names)
