"""The rules that verify draft tokens: tokens equal to plain decoding (Coupled, Tree), the exact distribution (all
rules), and broken variants.
"""

import functools
import itertools
import random
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import cases, caught, tiny
from helpers import (
    FAMILIES,
    SAMPLINGS,
    RandomPlans,
    by_name,
    check_equal,
    check_identity,
    fixed,
    groups_of,
    make_engine,
    tiny_of,
    tokens_of,
    tokens_per_round,
    trained_drafter,
)
from hypothesis import given
from hypothesis import strategies as st

from drafter import Drafter, EagleProposer
from parts.cli import UserError
from parts.engine import acceptance
from parts.engine import sampling as sampling_module
from parts.engine.acceptance import Coupled, Ratio, Tree
from parts.engine.interfaces import MAX_DRAFT_LEN, DraftPlan, Group, Proposer, Strategy
from parts.engine.kv_cache import KVCache, TreeShape
from parts.engine.sampling import Sampling, all_token_ids, noise_for, scale_and_filter, sequence_seed
from rollout import Engine


@functools.cache
def plain_responses(sampling: Sampling) -> dict:
    """Return the responses of tiny() in plain decoding."""
    return by_name(make_engine(tiny()).generate(groups_of(12, random.Random(1)), sampling))


WAYS = {
    **{f"chain {k}": (Coupled, partial(fixed, "eagle", k)) for k in (*range(1, 9), MAX_DRAFT_LEN)},
    "ngram": (Coupled, partial(fixed, "ngram", 4)),
    "random plans": (Coupled, partial(RandomPlans, 0)),
    "tree 4x3": (partial(Tree, width=3), partial(fixed, "eagle", 4)),
    "tree 8x2": (partial(Tree, width=2), partial(fixed, "eagle", 8)),
    "n-gram tree": (partial(Tree, width=2), partial(fixed, "ngram", 3)),
    "tree, random plans": (partial(Tree, width=2), partial(RandomPlans, 0)),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("way", WAYS)
def test_speculative_tokens_are_those_of_plain_decoding(way, sampling):
    """With a drafter that has learned a little: draft tokens that are never accepted would prove nothing."""
    rule, make_strategy = WAYS[way]
    model = tiny()
    engine = make_engine(model, trained_drafter(model), rule=rule)
    responses = engine.generate(groups_of(12, random.Random(1)), sampling, make_strategy())
    check_equal(by_name(responses), plain_responses(sampling))
    assert engine.stats.accepted[0] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [Coupled, partial(Tree, width=2)], ids=["chain", "tree"])
def test_every_family_speculates(family, rule):
    check_identity(RandomPlans(3), rule=rule, model=tiny_of(family))


@cases(15)
@given(
    st.integers(0, 10**6),
    st.integers(4, 12),
    st.integers(1, 25),
    st.sets(st.integers(1, 117), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.7, 1.0, 1.3]),
    st.sampled_from([1, 2, 3]),
)
def test_identity_on_random_shapes(seed, slots, max_new, stop, temperature, width):
    rule = Coupled if width == 1 else partial(Tree, width=width)
    model = tiny()
    groups = groups_of(7, random.Random(seed))
    strategy = RandomPlans(seed, longest=MAX_DRAFT_LEN // width)
    sampling = Sampling(temperature, max_new=max_new)
    check_identity(strategy, sampling, rule, model, trained_drafter(model), groups, slots, stop)


def test_sharing_the_noise_raises_acceptance(monkeypatch):
    model = tiny()
    drafter = trained_drafter(model)
    coupled = tokens_per_round(model, drafter)
    monkeypatch.setattr(Coupled, "draft_token", lambda self, depth, logits, token_ids=None: logits.argmax(-1))
    assert tokens_per_round(model, drafter) < coupled


class Oracle(Proposer):
    """Drafts the tokens that will be sampled: all are accepted, so stop tokens and length limits fall inside the
    accepted run.
    """

    def __init__(self):
        self.tokens: dict[tuple, list[int]] = {}

    def propose(self, engine, shape, draft_token):
        k = shape.plan.k
        drafts = []
        for sequence in engine.running:
            coming = self.tokens[sequence.group.key, sequence.sample][len(sequence.tokens) :]
            drafts.append((coming + [7] * k)[:k])
        return torch.tensor(drafts)


@pytest.mark.parametrize("max_new", [29, 1])
def test_stop_and_length_limit_inside_an_accepted_run(max_new):
    oracle = Oracle()
    engine = Engine(tiny(), {1}, 10, 100, proposers={"oracle": oracle})
    groups = groups_of(12, random.Random(1))
    sampling = Sampling(max_new=max_new)
    oracle.tokens = tokens_of(engine.generate(groups, sampling))
    assert tokens_of(engine.generate(groups, sampling, Strategy(DraftPlan("oracle", 8)))) == oracle.tokens
    assert engine.stats.rounds <= 40
    assert engine.stats.accepted[0] > 0


def test_too_many_draft_tokens_are_refused():
    with pytest.raises(UserError, match="draft length 8 x width 3"):
        check_identity(fixed("eagle", 8), rule=partial(Tree, width=3))
    with pytest.raises(UserError, match="draft length 17"):
        check_identity(fixed("eagle", 17))


def check_tree() -> None:
    """A tree gives the tokens of plain decoding."""
    model = tiny()
    check_identity(fixed("eagle", 4), rule=partial(Tree, width=3), model=model, drafter=trained_drafter(model))


def test_siblings_that_see_each_other_are_caught(monkeypatch):
    check_tree()
    right = acceptance.chain_with_siblings

    def harm(k, width, device):
        shape = right(k, width, device)
        return TreeShape(shape.depth, shape.depth <= shape.depth[:, None])

    monkeypatch.setattr(acceptance, "chain_with_siblings", harm)
    caught(check_tree)


def test_an_accepted_sibling_that_is_not_moved_into_the_chain_is_caught(monkeypatch):
    monkeypatch.setattr(KVCache, "move_entries", lambda *args: None)
    caught(check_tree)


# ---------------------------------------------------------------- large vocabularies


def check_pieces(way: str, sampling: Sampling, max_logits: int, drafter: Drafter | None = None):
    """With columns that are sampled in pieces, where sequences drop out, or with a draft vocabulary, the responses are
    those of plain decoding. Return the statistics.
    """
    rule, make_strategy = WAYS[way]
    model = tiny()
    engine = make_engine(model, drafter or trained_drafter(model), rule=rule)
    engine.max_logits = max_logits
    responses = engine.generate(groups_of(12, random.Random(1)), sampling, make_strategy())
    check_equal(by_name(responses), plain_responses(sampling))
    return engine.stats


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("max_logits", [1, 118 * 10, 118 * 25])
def test_columns_sampled_in_pieces_change_no_token(sampling, max_logits, monkeypatch):
    monkeypatch.setattr(sampling_module, "SHARED_NOISE", 0)  # each piece makes its own noise
    accepted = check_pieces("chain 5", sampling, max_logits).accepted
    assert accepted == check_pieces("chain 5", sampling, 1 << 21).accepted
    assert accepted[1] > 0


def test_pieces_with_the_noise_of_other_sequences_are_caught(monkeypatch):
    """A later piece is sampled with the noise of the first sequences, whichever sequences are left."""
    right = acceptance.sample_columns

    def noise_of_the_first(logits, sampling, seeds, index, noise=None):
        return right(logits, sampling, noise_of_the_first.seeds[: len(seeds)], index, noise)

    def remember_seeds(self, sampling, seeds, *rest):
        noise_of_the_first.seeds = seeds
        init(self, sampling, seeds, *rest)

    init = Coupled.__init__
    monkeypatch.setattr(Coupled, "__init__", remember_seeds)
    monkeypatch.setattr(sampling_module, "SHARED_NOISE", 0)
    monkeypatch.setattr(acceptance, "sample_columns", noise_of_the_first)
    caught(check_pieces, "chain 5", SAMPLINGS[0], 1)


DRAFT_VOCAB = torch.arange(0, 118, 2).int()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("way", ["chain 1", "chain 4", "tree 4x3", "random plans"])
def test_a_draft_vocabulary_changes_no_token(way, sampling):
    drafter = trained_drafter(tiny())
    drafter.draft_vocab = DRAFT_VOCAB
    accepted = check_pieces(way, sampling, 1 << 21, drafter).accepted
    assert accepted[0] > 0


def test_a_draft_vocabulary_keeps_the_distribution_of_the_ratio_rule():
    check_distribution(Ratio, draft_vocab=torch.tensor([0, 2, 3]).int())


# ---------------------------------------------------------------- distribution


def enumerate_exactly(model, prompt, length, sampling) -> dict[tuple, float]:
    """Return the probability of every response of that length."""
    outcomes = list(itertools.product(range(model.config.vocab_size), repeat=length))
    ids = torch.tensor([prompt + list(outcome) for outcome in outcomes])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits[:, len(prompt) - 1 :]
    logp = scale_and_filter(logits, sampling)[1].log_softmax(-1).gather(-1, ids[:, len(prompt) :, None])
    return dict(zip(outcomes, logp[..., 0].sum(-1).exp().double().tolist()))


def chi_square(counts: dict, expected: dict, total: int) -> float:
    """Return chi-square of the counts against the expected probabilities. Rare outcomes are pooled."""
    frequent = {outcome: p * total for outcome, p in expected.items() if p * total >= 5}
    pairs = [(counts.get(outcome, 0), wanted) for outcome, wanted in frequent.items()]
    rare = total - sum(frequent.values())
    if rare >= 5:
        pairs.append((total - sum(seen for seen, _ in pairs), rare))
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)


def wild_drafter(model) -> Drafter:
    """Return a random drafter far from the policy: where both nearly agree, a wrong rule would hardly show."""
    torch.manual_seed(2)
    drafter = Drafter(model)
    with torch.no_grad():
        for p in drafter.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
    return drafter


def check_distribution(rule, k=3, count=8_000, draft_vocab=None) -> Engine:
    """The engine's responses of 3 tokens over a vocabulary of 4 follow the exact distribution: chi-square with 63
    degrees of freedom at p = 1e-4. Return the engine.
    """
    model = tiny(vocab_size=4, pad_token_id=None, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    sampling = Sampling(temperature=0.8, max_new=3)
    prompt = [1, 2, 3]
    drafter = wild_drafter(model)
    drafter.draft_vocab = draft_vocab
    engine = Engine(model, {99}, 400, 16, proposers={"eagle": EagleProposer(drafter)}, rule=rule)
    groups = [Group(i, prompt, [sequence_seed("d", i, j) for j in range(400)]) for i in range(count // 400)]
    counts = Counter(tuple(r.tokens) for r in engine.generate(groups, sampling, fixed("eagle", k)))
    expected = enumerate_exactly(model, prompt, 3, sampling)
    assert set(counts) <= set(expected)
    assert chi_square(counts, expected, count) < 113
    return engine


@pytest.mark.parametrize("rule, k", [(Coupled, 2), (partial(Tree, width=2), 2), (Ratio, 1), (Ratio, 2), (Ratio, 3)])
def test_responses_follow_the_exact_distribution(rule, k):
    stats = check_distribution(rule, k).stats
    assert 0.05 < stats.accepted[0] / stats.drafted[0] < 0.95


class Argmax(Ratio):
    """Its draft tokens are not samples of q."""

    def draft_token(self, depth, logits, token_ids=None):
        super().draft_token(depth, logits)
        return logits.argmax(-1)


def change_verify(monkeypatch, change):
    """Replace verify_ratio by change(verify_ratio, logits, q_logits, drafts, sampling, seeds, index)."""
    monkeypatch.setattr(acceptance, "verify_ratio", partial(change, acceptance.verify_ratio))


def another_temperature_in_q(verify, logits, q_logits, *rest):
    return verify(logits, q_logits * 0.5, *rest)


def last_accepted_token_dropped(verify, *args):
    y, logprobs, accepted = verify(*args)
    return y, logprobs, (accepted - 1).clamp(min=0)


def positions_off_by_one(verify, logits, q_logits, *rest):
    return verify(logits, q_logits.roll(1, 1), *rest)


def no_residual(verify, logits, q_logits, drafts, sampling, seeds, index):
    """After a rejected draft token comes a sample of p, not of the residual."""
    y, logprobs, accepted = verify(logits, q_logits, drafts, sampling, seeds, index)
    noise = noise_for(sampling, seeds, index, all_token_ids(logits.shape[-1], logits.device))
    own = (scale_and_filter(logits, sampling)[1] + noise).argmax(-1)
    kept = torch.arange(y.shape[1]) < accepted[:, None]
    return torch.where(kept, y, own), logprobs, accepted


@pytest.mark.parametrize(
    "change", [another_temperature_in_q, last_accepted_token_dropped, positions_off_by_one, no_residual]
)
def test_broken_ratio_verification_is_caught(change, monkeypatch):
    change_verify(monkeypatch, change)
    caught(check_distribution, Ratio, count=4_000)


def test_the_ratio_rule_with_argmax_draft_tokens_is_caught():
    caught(check_distribution, Argmax, count=4_000)


@pytest.mark.parametrize("sampling, method", [(SAMPLINGS[1], "eagle"), (SAMPLINGS[0], "ngram")])
def test_the_ratio_rule_falls_back_to_equality(sampling, method):
    """With greedy sampling, and with proposers that have no q."""
    model = tiny()
    groups = groups_of(6, random.Random(1))
    plain = tokens_of(make_engine(model).generate(groups, sampling))
    assert plain == tokens_of(make_engine(model, rule=Ratio).generate(groups, sampling, fixed(method, 4)))


def check_ratio_noise(stream):
    """One draft token from a q far from p, 200,000 times: the emitted token follows p only if draft token and residual
    are sampled with different noise. stream: of the draft token's noise.
    """
    n = 200_000
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    q = torch.tensor([0.5, 0.1, 0.38, 0.02])
    seeds = torch.randint(-(2**31), 2**31, (n, 2), generator=torch.Generator().manual_seed(0)).int()
    index = torch.arange(2).expand(n, 2)
    noise = noise_for(SAMPLINGS[0], seeds, index, all_token_ids(4, seeds.device), stream)
    drafts = (q.log() + noise[:, :1]).argmax(-1)
    logits = p.log().expand(n, 2, 4)
    y, _, _ = acceptance.verify_ratio(logits, q.log().expand(n, 1, 4), drafts, SAMPLINGS[0], seeds, index)
    counts = torch.bincount(y[:, 0], minlength=4)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 21  # 3 degrees of freedom, p = 1e-4


def test_noise_shared_by_draft_token_and_residual_is_caught():
    check_ratio_noise(stream=1)
    caught(check_ratio_noise, stream=0)
