"""Which cached teacher responses join a group: balanced over the teachers, seeded, and each used before one repeats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from openril.errors import CacheError
from openril.records import Response
from openril.storage import stable_hash


class HoldsResponses(Protocol):
    """What a draw needs; ``LoadedResponses`` is one."""

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
) -> list[Response]:
    """The teacher responses of one group; a pure function of (seed, question id, visit) and the cache.

    total: responses in all, shared out so that teachers differ by at most one; who gets one more takes turns over the
    visits, from a seeded start. per_teacher: responses of each instead. visit: how often this question came up before,
    from 0. Over the visits every response of a teacher comes up once before any comes up again, in a seeded order, and
    none comes twice in a group unless the teacher has fewer than its share: then they come equally often, to within
    one. Returned in the order of ``teachers``.

    Raises CacheError when a teacher has no response.
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
                f"question {question_id!r}: {max(shares)} responses of teacher {teacher!r} are wanted in a group, none is"
                " cached; run `ril collect`"
            )
        drawn += [responses[i] for i in hand(len(responses), shares, [seed, question_id, teacher])]
    return drawn


def share(number: int, num_teachers: int, total: int, seed: int, question_id: str, epoch: int) -> int:
    """How many of ``total`` responses teacher ``number`` gives at this visit."""
    base, extra = divmod(total, num_teachers)
    # The extra ones go round the teachers without a gap from visit to visit.
    start = stable_hash(seed, question_id, "extra") + epoch * extra
    return base + ((number - start) % num_teachers < extra)


def hand(size: int, shares: Sequence[int], key: list[str | int]) -> list[int]:
    """What the last of ``len(shares)`` players gets, who in turn take ``shares`` cards from a deck of ``size``.

    A used-up deck is shuffled anew, from ``key`` and the number of the deck. A player who takes the last cards of one
    deck and the first of the next takes those he has fewest of, so he gets none twice unless he wants more than there
    are; what he passed over stays for those behind him. size: at least 1.
    """
    deck: list[int] = []
    decks = 0
    cards: list[int] = []
    for wanted in shares:
        cards, deck = deck[:wanted], deck[wanted:]
        while len(cards) < wanted:
            fresh = list(range(size))
            random.Random(stable_hash(*key, decks)).shuffle(fresh)
            decks += 1
            new = sorted(fresh, key=cards.count)[: wanted - len(cards)]
            deck = [card for card in fresh if card not in new]
            cards = cards + new
    return cards
