"""The n-gram proposer drafts what followed the same tokens before, in the response or in its siblings."""

import random

import torch
from conftest import cases, tiny
from helpers import SAMPLINGS, fixed, groups_of, make_engine, round_shape
from hypothesis import given
from hypothesis import strategies as st

from parts.engine.interfaces import Group, Sequence
from parts.engine.ngram import NgramProposer


class FakeEngine:
    """What the n-gram proposer reads of an engine."""

    lens = torch.zeros(1)

    def __init__(self, running):
        self.running = running


def propose(proposer: NgramProposer, sequences: list[Sequence], k: int) -> list[list[int]]:
    """Return the draft tokens of each of these running sequences."""
    return proposer.propose(FakeEngine(sequences), round_shape(sequences, k), None).tolist()


def test_what_followed_before_is_drafted_also_from_siblings():
    proposer = NgramProposer()
    group = Group(0, [5, 6], [1, 2])
    sequences = [Sequence(group, 0, [10, 11, 12, 13, 14, 10, 11]), Sequence(group, 1, [13])]
    assert propose(proposer, sequences, 3) == [[12, 13, 14], [14, 10, 11]]
    other = Sequence(Group(1, [5, 7], [1]), 0, [10, 11])  # another prompt shares nothing
    assert propose(proposer, [other], 2) == [[0, 0]]


def by_hand(text: list[int], k: int) -> list[int]:
    """Return what followed the newest occurrence of the longest suffix, of 4 tokens at most."""
    for m in range(min(4, len(text)), 0, -1):
        ends = [end for end in range(m, len(text)) if text[end - m : end] == text[-m:]]
        if ends:
            return text[ends[-1] : ends[-1] + k]
    return []


@cases(100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.lists(st.integers(1, 6), max_size=8), st.integers(1, 6))
def test_draft_tokens_are_those_that_a_search_by_hand_finds(text, pieces, k):
    """The text grows by pieces of any length."""
    proposer = NgramProposer()
    sequence = Sequence(Group(0, [9], [1]), 0)
    for n in [*pieces, len(text)]:
        sequence.tokens += text[len(sequence.tokens) :][:n]
        wanted = by_hand(sequence.tokens, k)
        assert propose(proposer, [sequence], k) == [wanted + [0] * (k - len(wanted))]


def test_repeated_text_is_accepted():
    engine = make_engine(tiny())
    list(engine.generate(groups_of(12, random.Random(1)), SAMPLINGS[1], fixed("ngram", 4)))
    assert engine.stats.spec_tokens / engine.stats.spec_sequence_rounds > 1.2


def test_a_new_rollout_forgets_the_last_one():
    proposer = NgramProposer()
    assert propose(proposer, [Sequence(Group(0, [9], [1]), 0, [1, 2, 1])], 1) == [[2]]
    proposer.load_weights()
    assert propose(proposer, [Sequence(Group(0, [9], [1]), 0, [1])], 1) == [[0]]
