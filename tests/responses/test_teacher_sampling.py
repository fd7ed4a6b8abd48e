import itertools

import pytest

from openril.errors import CacheError
from openril.records import Response
from openril.responses.teacher_sampling import draw, draw_pooled, hand


class Cache:
    def __init__(self, **sizes):
        self.sizes = sizes

    def responses_for(self, question_id, source):
        return [Response(question_id, source, i, f"{source} {i}") for i in range(self.sizes[source])]


def flat(hands):
    return [card for hand in hands for card in hand]


def counts(responses, teachers):
    return [sum(r.source == t for r in responses) for t in teachers]


def test_a_deck_is_dealt_once_before_it_repeats():
    # 6 cards, hands of 2: three hands are one deck, the next three the same cards again.
    hands = [hand(6, [2] * n, ["k"]) for n in range(1, 7)]
    assert sorted(flat(hands[:3])) == [0, 1, 2, 3, 4, 5]
    assert sorted(flat(hands[3:])) == [0, 1, 2, 3, 4, 5]
    assert hands[:3] != hands[3:]  # shuffled again


def test_a_hand_across_two_decks_has_no_card_twice():
    # 5 cards, hands of 3: the second hand takes 2 of the first deck and 1 of the second.
    for key in range(50):
        hands = [hand(5, [3] * n, [key]) for n in range(1, 6)]
        assert all(len(set(h)) == 3 for h in hands)
        dealt = flat(hands)  # 15 cards = three decks
        assert all(dealt.count(card) == 3 for card in range(5))


def test_balanced_over_two_teachers():
    got = draw(Cache(a=16, b=16), "q", ["a", "b"], total=4, seed=0, epoch=0)
    assert counts(got, "ab") == [2, 2]
    assert len({(r.source, r.index) for r in got}) == 4


def test_the_extra_one_takes_turns():
    epochs = [counts(draw(Cache(a=9, b=9), "q", ["a", "b"], total=3, seed=0, epoch=v), "ab") for v in range(4)]
    assert epochs in ([[2, 1], [1, 2]] * 2, [[1, 2], [2, 1]] * 2)


def test_extras_of_three_teachers_even_out():
    # 5 over 3 teachers: 1 each and 2 extra; after 3 epochs everyone has given 5.
    epochs = [counts(draw(Cache(a=16, b=16, c=16), "q", "abc", total=5, seed=1, epoch=v), "abc") for v in range(3)]
    assert all(sum(v) == 5 and max(v) - min(v) == 1 for v in epochs)
    assert [sum(v[i] for v in epochs) for i in range(3)] == [5, 5, 5]


def test_the_start_of_the_turns_depends_on_seed_and_question():
    first = {
        tuple(counts(draw(Cache(a=4, b=4), f"q{i}", "ab", total=1, seed=s, epoch=0), "ab"))
        for i in range(8)
        for s in range(2)
    }
    assert first == {(1, 0), (0, 1)}


def test_all_responses_come_up_before_any_repeats():
    # 16 of each teacher, 2 of each an epoch: eight epochs use all 32.
    seen = [(r.source, r.index) for v in range(8) for r in draw(Cache(a=16, b=16), "q", "ab", total=4, seed=3, epoch=v)]
    assert len(set(seen)) == len(seen) == 32


def test_cycling_holds_with_an_extra_that_takes_turns():
    # total 3 of two teachers with 6 each: over 8 epochs 24 responses, every one of the 12 exactly twice.
    seen = [(r.source, r.index) for v in range(8) for r in draw(Cache(a=6, b=6), "q", "ab", total=3, seed=3, epoch=v)]
    assert sorted(seen) == sorted([(s, i) for s in "ab" for i in range(6)] * 2)


def test_a_draw_follows_from_its_arguments_alone():
    args = {"total": 4, "seed": 7, "epoch": 5}
    assert draw(Cache(a=8, b=8), "q", "ab", **args) == draw(Cache(a=8, b=8), "q", "ab", **args)
    assert draw(Cache(a=8, b=8), "q", "ab", **args) != draw(Cache(a=8, b=8), "q", "ab", **{**args, "seed": 8})


def test_per_teacher():
    got = draw(Cache(a=4, b=4), "q", "ab", per_teacher=3, seed=0, epoch=0)
    assert counts(got, "ab") == [3, 3]


def test_more_teachers_than_responses_asks_nothing_of_the_rest():
    got = draw(Cache(a=1, b=1, c=1), "q", "abc", total=1, seed=0, epoch=0)
    assert sum(counts(got, "abc")) == 1


def test_fewer_than_the_share_come_equally_often():
    # 3 responses, 4 a group: one of them twice in a group, and over three groups (12 = four decks) each four times.
    groups = [[r.index for r in draw(Cache(a=3), "q7", ["a"], total=4, seed=0, epoch=v)] for v in range(3)]
    assert all(sorted(g.count(i) for i in range(3)) == [1, 1, 2] for g in groups)
    assert all(flat(groups).count(i) == 4 for i in range(3))


def test_a_single_response_fills_the_group():
    got = draw(Cache(a=1, b=1), "q", "ab", total=4, seed=0, epoch=1)
    assert [(r.source, r.index) for r in got] == [("a", 0), ("a", 0), ("b", 0), ("b", 0)]


def test_a_hand_of_more_than_a_deck_and_a_half():
    for key in range(20):
        hands = [hand(3, [5] * n, [key]) for n in range(1, 4)]
        assert all(sorted(h.count(i) for i in range(3)) == [1, 2, 2] for h in hands)
        assert all(flat(hands).count(i) == 5 for i in range(3))  # 15 cards = five decks


def test_none_cached_is_an_error_with_numbers():
    with pytest.raises(CacheError, match=r"'q.*4 .*teacher 'a'.*ril collect"):
        draw(Cache(a=0), "q7", ["a"], total=4, seed=0, epoch=0)


def test_a_pool_is_drawn_in_proportion_and_used_up_before_it_repeats():
    # 6 of a and 2 of b in groups of 4: two epochs are the whole pool, so a gives 6 of 8, which balancing would not.
    pool = [*Cache(a=6).responses_for("q", "a"), *Cache(b=2).responses_for("q", "b")]
    epochs = [draw_pooled(pool, "q", total=4, seed=0, epoch=v) for v in range(4)]
    for first in (0, 2):
        both = [*epochs[first], *epochs[first + 1]]
        assert counts(both, "ab") == [6, 2] and len({(r.source, r.index) for r in both}) == 8
    assert epochs[0] != epochs[2]
    assert all(pool.index(x) < pool.index(y) for e in epochs for x, y in itertools.pairwise(e))  # in the pool's order


def test_a_small_pool_is_used_equally_often():
    got = draw_pooled(Cache(a=3).responses_for("q", "a"), "q", total=4, seed=0, epoch=0)
    assert sorted(got.count(r) for r in set(got)) == [1, 1, 2]
