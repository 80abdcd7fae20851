"""Coupled sampling: the distribution, the noise, and what top-k, top-p and temperature leave."""

import pytest
import torch
from conftest import caught

from parts.common import UserError
from parts.sampling import Sampling, gumbel, noise_for, sample, seed_words, sequence_seed


def chi_square(counts, expected) -> float:
    return ((counts - expected) ** 2 / expected).sum()


def check_distribution(temperature_of_truth=1.0, index_of=lambda i: i):
    """20,000 samples of 6 tokens against softmax; and tokens of one sequence are independent of each other."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    n = 10_000
    seeds = seed_words(torch.tensor([sequence_seed("chi", i) for i in range(n)]))
    noise = noise_for(Sampling(), seeds, index_of(torch.arange(2)).expand(n, 2), 6)
    y, _ = sample(logits.expand(n, 2, 6), Sampling(), noise)
    p = (logits / temperature_of_truth).softmax(-1).double()
    for column in y.T:
        counts = torch.bincount(column, minlength=6)
        assert chi_square(counts, n * p) < 20.5  # 5 degrees of freedom, p = 0.001
    joint = torch.bincount(y[:, 0] * 6 + y[:, 1], minlength=36)
    expected = n * (p[:, None] * p).flatten()
    assert chi_square(joint, expected) < 66.6  # 35 degrees of freedom, p = 0.001


def test_samples_follow_the_softmax_and_broken_noise_is_caught():
    check_distribution()
    caught(check_distribution, temperature_of_truth=0.9)
    caught(check_distribution, index_of=lambda i: i * 0)  # the same noise at each position


def test_noise_is_a_function_of_its_key_alone():
    seeds = seed_words(torch.tensor([sequence_seed("a", i) for i in range(50)]))
    g = gumbel(seeds, torch.arange(20).expand(50, 20), 300)
    assert torch.equal(g[7:9, 3:4], gumbel(seeds[7:9], torch.full((2, 1), 3), 300))
    assert torch.isfinite(g).all()
    assert len(g.unique()) > 0.99 * g.numel()
    assert abs(g.mean() - 0.5772) < 0.01  # Gumbel: Euler's constant
    assert abs(g.var() - 1.6449) < 0.02  # pi^2 / 6
    flat = g.flatten(0, 1).double()
    assert abs(torch.corrcoef(flat[:100]).triu(1)).max() < 0.35  # 300 values: 6 sigma


def test_top_k_top_p_and_temperature_narrow_what_is_drawn():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(2000, 1, 4)
    seeds = seed_words(torch.tensor([sequence_seed(i) for i in range(2000)]))

    def drawn(**settings) -> set[int]:
        sampling = Sampling(**settings)
        noise = noise_for(sampling, seeds, torch.zeros(2000, 1).long(), 4)
        return set(sample(logits, sampling, noise)[0].flatten().tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.65) == {0, 1}
    assert drawn(top_p=0.6) == {0}
    assert drawn(top_p=1e-6) == {0} == drawn(temperature=0.0) == drawn(top_k=1)


def test_log_probabilities_are_those_at_the_temperature():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    y, logp = sample(logits, Sampling(temperature=0.5), torch.zeros(()))
    assert torch.isclose(logp[0, 0], (logits[0, 0] / 0.5).log_softmax(-1)[y[0, 0]])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new": 0}])
def test_settings_that_make_no_sense_are_named(wrong):
    name = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name}"):
        Sampling(**wrong)
