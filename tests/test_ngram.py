"""N-gram drafts: what followed before, here and in siblings."""

import random

import torch
from conftest import cases, tiny
from helpers import SAMPLINGS, fixed, groups_of, make_engine, shape_of
from hypothesis import given
from hypothesis import strategies as st

from parts.engine.interfaces import Group, Sequence
from parts.engine.ngram import NgramProposer


class FakeEngine:
    """All that n-gram drafts look at."""

    lens = torch.zeros(1)

    def __init__(self, running):
        self.running = running


def test_ngrams_draft_what_followed_before_and_from_siblings():
    drafts = NgramProposer()
    group = Group(0, [5, 6], [1, 2])
    rows = [Sequence(group, 0, [10, 11, 12, 13, 14, 10, 11]), Sequence(group, 1, [13])]
    assert drafts.propose(FakeEngine(rows), shape_of(rows, 3), None).tolist() == [[12, 13, 14], [14, 10, 11]]
    other = Sequence(Group(1, [5, 7], [1]), 0, [10, 11])  # another prompt shares nothing
    assert drafts.propose(FakeEngine([other]), shape_of([other], 2), None).tolist() == [[0, 0]]


def by_hand(text: list[int], k: int) -> list[int]:
    """What followed the newest occurrence of the longest suffix, of 4 tokens at most."""
    for m in range(min(4, len(text)), 0, -1):
        ends = [end for end in range(m, len(text)) if text[end - m : end] == text[-m:]]
        if ends:
            return text[ends[-1] : ends[-1] + k]
    return []


@cases(100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.lists(st.integers(1, 6), max_size=8), st.integers(1, 6))
def test_ngrams_are_what_a_search_by_hand_finds(text, pieces, k):
    """However the text grows."""
    drafts = NgramProposer()
    row = Sequence(Group(0, [9], [1]), 0)
    for n in [*pieces, len(text)]:
        row.tokens += text[len(row.tokens) :][:n]
        wanted = by_hand(row.tokens, k)
        drafted = drafts.propose(FakeEngine([row]), shape_of([row], k), None)
        assert drafted[0].tolist() == wanted + [0] * (k - len(wanted))


def test_ngrams_learn_a_loop():
    engine = make_engine(tiny())
    list(engine.generate(groups_of(12, random.Random(1)), SAMPLINGS[1], fixed("ngram", 4)))
    assert engine.stats.spec_tokens / engine.stats.spec_sequence_rounds > 1.2


def test_a_new_rollout_knows_nothing_of_the_last():
    drafts = NgramProposer()
    row = Sequence(Group(0, [9], [1]), 0, [1, 2, 1])
    assert drafts.propose(FakeEngine([row]), shape_of([row], 1), None).tolist() == [[2]]
    drafts.begin()
    row = Sequence(Group(0, [9], [1]), 0, [1])
    assert drafts.propose(FakeEngine([row]), shape_of([row], 1), None).tolist() == [[0]]
