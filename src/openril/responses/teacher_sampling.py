"""The choice of cached teacher responses for a group: balanced over teachers, seeded, and without early repetition."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from openril.errors import CacheError
from openril.records import Response
from openril.storage import stable_hash


class HoldsResponses(Protocol):
    """The part of ``LoadedResponses`` that ``draw`` needs."""

    def responses_for(self, question_id: str, source: str) -> list[Response]: ...


def draw(
    cache: HoldsResponses,
    question_id: str,
    teachers: Sequence[str],
    *,
    total: int | None = None,
    per_teacher: int | None = None,
    seed: int,
    epoch: int,
    fits: Callable[[Response], bool] | None = None,
) -> list[Response]:
    """Return the teacher responses of one group, in the order of ``teachers``.

    The result depends only on seed, question id, epoch and cache. Over the epochs every response of a teacher is used
    once before any is used again, in a seeded order. None is used twice in a group, unless the teacher has fewer
    responses than its share; then their counts differ by at most one. Raises CacheError if a teacher has none.

    Args:
        total: Number of responses in all. The teachers' shares differ by at most one, and the teachers take turns to give
            one more, from a seeded start.
        per_teacher: Number of responses of each teacher, instead of ``total``.
        epoch: How often this question has been used before, from 0.
        fits: Whether a response may be drawn; None allows all. A teacher without such a response gives none.
    """
    assert (total is None) != (per_teacher is None), "give total or per_teacher"
    drawn = []
    for number, teacher in enumerate(teachers):
        if total is None:
            assert per_teacher is not None
            shares = [per_teacher] * (epoch + 1)
        else:
            shares = [share(number, len(teachers), total, seed, question_id, v) for v in range(epoch + 1)]
        if max(shares) == 0:
            continue
        responses = cache.responses_for(question_id, teacher)
        if not responses:
            raise CacheError(
                f"question {question_id!r}: expected {max(shares)} responses of teacher {teacher!r}, got none."
                " Run `ril collect`."
            )
        if fitting := [r for r in responses if fits is None or fits(r)]:
            drawn += [fitting[i] for i in hand(len(fitting), shares, [seed, question_id, teacher])]
    return drawn


def draw_pooled(pool: Sequence[Response], question_id: str, *, total: int, seed: int, epoch: int) -> list[Response]:
    """Return ``total`` responses of a pool, in its order, so that a teacher gives its share of the pool on average.

    Over the epochs every response is used once before any is used again. None is used twice in a group, unless the pool
    is smaller than ``total``; then their counts differ by at most one. The other arguments are those of ``draw``.
    """
    return [pool[i] for i in sorted(hand(len(pool), [total] * (epoch + 1), [seed, question_id, "pool"]))]


def share(number: int, num_teachers: int, total: int, seed: int, question_id: str, epoch: int) -> int:
    """Return how many of ``total`` responses teacher ``number`` gives in this epoch."""
    base, extra = divmod(total, num_teachers)
    # The teachers take turns to give the extra ones, continuing from epoch to epoch.
    start = stable_hash(seed, question_id, "extra") + epoch * extra
    return base + ((number - start) % num_teachers < extra)


def hand(size: int, shares: Sequence[int], key: list[str | int]) -> list[int]:
    """Deal cards from a deck of ``size``, ``shares[i]`` to player i in turn, and return the last player's cards.

    A new deck is shuffled from ``key`` and the number of the deck. A player who takes the last cards of one deck and the
    first of the next takes those that he holds fewest of, so he gets a card twice only if his share is larger than
    ``size``. The cards that he skips stay for the players after him. size: at least 1.
    """
    deck: list[int] = []
    decks = 0
    cards: list[int] = []
    for count in shares:
        cards, deck = deck[:count], deck[count:]
        while len(cards) < count:
            fresh = list(range(size))
            random.Random(stable_hash(*key, decks)).shuffle(fresh)
            decks += 1
            new = sorted(fresh, key=cards.count)[: count - len(cards)]
            deck = [card for card in fresh if card not in new]
            cards = cards + new
    return cards
