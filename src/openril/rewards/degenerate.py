"""Detection of empty and repetitive responses, which score 0 without a judge or a rule."""

from __future__ import annotations

import re
from collections import Counter

from openril.rewards.judge_prompt import clean

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")

LOOP_SHARE = 0.5
"""A text is repetitive when one loop makes up at least this share of it."""
MIN_LOOPS = 5
MIN_LOOP_WORDS = 20
MIN_LOOP_CHARS = 60
LONGEST_WORD_PERIOD = 32
LONGEST_CHAR_PERIOD = 8
NGRAM = 8
MIN_NGRAM_WORDS = 60
REPEATED_NGRAM_SHARE = 0.6


def is_empty(text: str) -> bool:
    """Return whether a response has nothing but special tokens, tags and white space."""
    return not clean(text)


def is_repetitive(text: str) -> bool:
    """Return whether a response mostly repeats itself. Any of these counts:

    1. A loop of at most 32 words, repeated at least 5 times and at least 20 words long in all, is half the text or more
       ("the answer is the answer is the ...").
    2. The same for loops of at most 8 characters over at least 60 characters without spaces ("hahahaha", "0000").
    3. In a text of 60 words or more, at least 60 % of all 8-word sequences occurred before: a paragraph three times.

    Tables, numbered lists, counting and code, whose rows differ, and a text that states everything twice do not count.
    """
    words = _WORD.findall(text.casefold())
    characters = "".join(text.split())
    return (
        _loops(words, LONGEST_WORD_PERIOD, MIN_LOOP_WORDS)
        or _loops(characters, LONGEST_CHAR_PERIOD, MIN_LOOP_CHARS)
        or _repeats_sequences(words)
    )


def _loops(items: list[str] | str, longest_period: int, min_length: int) -> bool:
    """Return whether one loop covers LOOP_SHARE of the items, and at least min_length of them."""
    n = len(items)
    needed = max(min_length, LOOP_SHARE * n)
    for period in range(1, min(longest_period, n // MIN_LOOPS) + 1):
        run = 0
        for i in range(period, n):
            run = run + 1 if items[i] == items[i - period] else 0
            if run and run + period >= max(needed, MIN_LOOPS * period):
                return True
    return False


def _repeats_sequences(words: list[str]) -> bool:
    if len(words) < MIN_NGRAM_WORDS:
        return False
    counts = Counter(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
    total = len(words) - NGRAM + 1
    return (total - len(counts)) / total >= REPEATED_NGRAM_SHARE
