"""Coupled sampling: the distribution, the noise, and the tokens that top-k, top-p and temperature leave."""

import pytest
import torch
from conftest import cases, caught
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor import config

from parts.cli import UserError
from parts.engine import sampling as sampling_module
from parts.engine.sampling import (
    CompiledSampler,
    Sampling,
    all_token_ids,
    gumbel_noise,
    noise_for,
    sample,
    sample_at_once,
    sequence_seed,
    split_seeds,
)

CPU = torch.device("cpu")


def chi_square(counts, expected) -> float:
    """Return chi-square of the counts."""
    return ((counts - expected) ** 2 / expected).sum()


def check_distribution(temperature_of_truth=1.0, index_of=lambda i: i):
    """20,000 samples of 6 tokens follow the softmax, and the tokens of one sequence are independent of each other."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    n = 10_000
    seeds = split_seeds(torch.tensor([sequence_seed("chi", i) for i in range(n)]))
    index = index_of(torch.arange(2)).expand(n, 2)
    columns = [sample(logits.expand(n, 6), Sampling(), seeds, index[:, t])[0] for t in range(2)]
    y = torch.stack(columns, 1)
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
    seeds = split_seeds(torch.tensor([sequence_seed("a", i) for i in range(50)]))
    token_ids = all_token_ids(300, CPU)
    g = gumbel_noise(seeds[:, None], torch.arange(20).expand(50, 20), token_ids)
    assert torch.equal(g[7:9, 3], gumbel_noise(seeds[7:9], torch.full((2,), 3), token_ids))
    assert torch.equal(g[:, :, 40:60], gumbel_noise(seeds[:, None], torch.arange(20).expand(50, 20), token_ids[40:60]))
    assert torch.isfinite(g).all()
    assert len(g.unique()) > 0.99 * g.numel()
    assert abs(g.mean() - 0.5772) < 0.01  # Gumbel: Euler's constant
    assert abs(g.var() - 1.6449) < 0.02  # pi^2 / 6
    flat = g.flatten(0, 1).double()
    assert abs(torch.corrcoef(flat[:100]).triu(1)).max() < 0.35  # 300 values: 6 sigma


def test_top_k_top_p_and_temperature_restrict_what_is_sampled():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(2000, 4)
    seeds = split_seeds(torch.tensor([sequence_seed(i) for i in range(2000)]))

    def sampled(**settings) -> set[int]:
        return set(sample(logits, Sampling(**settings), seeds, torch.zeros(2000).long())[0].tolist())

    assert sampled() == {0, 1, 2, 3}
    assert sampled(top_k=2) == {0, 1}
    assert sampled(top_p=0.65) == {0, 1}
    assert sampled(top_p=0.6) == {0}
    assert sampled(top_p=1e-6) == {0} == sampled(temperature=0.0) == sampled(top_k=1)


def test_log_probabilities_are_those_at_the_temperature():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    y, logp = sample(logits, Sampling(temperature=0.5), split_seeds(torch.tensor([5])), torch.tensor([0]))
    assert torch.isclose(logp[0], (logits[0] / 0.5).log_softmax(-1)[y[0]])


# ---------------------------------------------------------------- one result, however it is computed


def check_ways(seed: int, positions: int, vocab: int, sampling: Sampling):
    """At once, with noise made before, in chunks, and from some token ids only: the same tokens."""
    torch.manual_seed(seed)
    logits = torch.randn(positions, vocab) * 3
    seeds = torch.randint(-(2**31), 2**31, (positions, 2)).int()
    index = torch.randint(0, 500, (positions,))
    noise = noise_for(sampling, seeds, index[:, None], all_token_ids(vocab, CPU))
    whole, logprobs = sample_at_once(logits, sampling, seeds, index, all_token_ids(vocab, CPU))
    ways = [
        sample(logits, sampling, seeds, index),
        sample(logits, sampling, seeds, index, noise=noise[:, 0] if noise.ndim else None),
        sample(logits, sampling, seeds, index, token_ids=all_token_ids(vocab, CPU)),
    ]
    for y, logp in ways:
        assert torch.equal(y, whole)
        assert torch.allclose(logp, logprobs, atol=1e-5)
    chosen = torch.randperm(vocab)[: max(1, vocab // 2)].sort().values.int()
    fewer, _ = sample(logits[:, chosen], sampling, seeds, index, chosen)
    held = torch.isin(whole, chosen)
    if not sampling.top_k and sampling.top_p == 1:  # these filter another set
        assert torch.equal(fewer[held], whole[held])  # the noise belongs to the token id, not to the column
    assert torch.isin(fewer, chosen).all()


@cases(30)
@given(
    st.integers(0, 10**6),
    st.integers(1, 30),
    st.integers(1, 400),
    st.sampled_from([Sampling(), Sampling(0.0), Sampling(0.6), Sampling(0.8, top_k=5), Sampling(1.2, top_p=0.8)]),
)
def test_chunks_and_token_ids_change_no_token(seed, positions, vocab, sampling):
    right = sampling_module.CHUNK
    sampling_module.CHUNK = 500  # so that there are several chunks
    try:
        check_ways(seed, positions, vocab, sampling)
    finally:
        sampling_module.CHUNK = right


def test_broken_chunks_and_token_ids_are_caught(monkeypatch):
    monkeypatch.setattr(sampling_module, "CHUNK", 500)
    right = gumbel_noise

    def noise_by_column(seeds, index, token_ids):
        return right(seeds, index, all_token_ids(len(token_ids), CPU))

    def noise_by_chunk(seeds, index, token_ids):
        return right(seeds[:1].expand_as(seeds), index, token_ids)

    for wrong in (noise_by_column, noise_by_chunk):
        monkeypatch.setattr(sampling_module, "gumbel_noise", wrong)
        caught(check_ways, 1, 20, 300, Sampling())
    monkeypatch.setattr(sampling_module, "gumbel_noise", right)
    check_ways(1, 20, 300, Sampling())


def test_the_ids_of_a_vocabulary_keep_their_address():
    """Recorded rounds read them there."""
    addresses = [all_token_ids(vocab, CPU).data_ptr() for vocab in range(100, 120)]
    assert [all_token_ids(vocab, CPU).data_ptr() for vocab in range(100, 120)] == addresses


def test_where_compiling_fails_the_plain_function_samples(monkeypatch, capsys):
    def broken(function, dynamic):
        def fail(*args):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(config, "compile_threads", 32)
    double = CompiledSampler(lambda x: 2 * x)
    assert [double(3), double(4)] == [6, 8]
    assert capsys.readouterr().err.count("no compiler here") == 1
    assert config.compile_threads == 1
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda x: function(x) + 1)
    assert CompiledSampler(lambda x: 2 * x)(3) == 7


def check_the_limit_of_recompilations_is_reported(capsys) -> None:
    """A function that is compiled anew more often than torch allows still works, and one line says that it is slow."""
    torch._dynamo.reset()
    named = CompiledSampler(lambda x, name: 2 * x + len(name))
    for length in range(1, torch._dynamo.config.recompile_limit + 3):
        assert named(torch.ones(2), "n" * length).tolist() == [2.0 + length] * 2
    assert capsys.readouterr().err.count("sampling is not compiled") == 1


def test_the_limit_of_recompilations_is_reported(capsys, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled(function, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    check_the_limit_of_recompilations_is_reported(capsys)

    def compiled_without_a_word(function, dynamic):
        torch._dynamo.config.fail_on_recompile_limit_hit = False
        return compiled(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled_without_a_word)
    caught(check_the_limit_of_recompilations_is_reported, capsys)


def test_the_compiled_function_samples_the_same_tokens():
    """It is traced as for a GPU, without generating code, and as one graph."""
    torch.manual_seed(0)
    compiled = torch.compile(sample_at_once, backend="eager", dynamic=True, fullgraph=True)
    for positions in (3, 5):
        seeds = torch.randint(-(2**31), 2**31, (positions, 2)).int()
        args = (torch.randn(positions, 50), Sampling(0.7), seeds, torch.arange(positions), all_token_ids(50, CPU))
        assert torch.equal(compiled(*args)[0], sample_at_once(*args)[0])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new": 0}])
def test_impossible_settings_are_refused(wrong):
    name = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name}"):
        Sampling(**wrong)
