"""Whether the engine makes on this device what it makes on a CPU, and with draft tokens and recorded rounds what it
makes without. The part `exact` of `bench gpu`; config is a gpu.Config.

In float32 responses are compared token by token; kernels of other shapes round differently, which changes a few of them
(one token in a million). In bfloat16 rounding changes most, and what must agree is the distribution: mean length and
reward, to three standard errors.
"""

import statistics

import torch

from bench.harness import DrafterSettings, batch_groups, by_name, fixed, load_policy, make_engine, same_tokens
from bench.verdicts import claim, figure
from parts.engine.cuda_graphs import GraphPool
from parts.engine.interfaces import Response
from parts.engine.sampling import (
    Sampling,
    all_token_ids,
    compiled_sample,
    gumbel_noise,
    sample,
    sample_at_once,
    sequence_seed,
    split_seeds,
)
from strategy import Goodput, plans_for
from tasks import Countdown


def noise_on(device: str) -> torch.Tensor:
    """Return the noise of 64 tokens of a large vocabulary, made on the device."""
    seeds = split_seeds(torch.tensor([sequence_seed(0, i) for i in range(64)], device=device))
    return gumbel_noise(seeds, torch.arange(64, device=device), all_token_ids(50_000, torch.device(device))).cpu()


@torch.inference_mode()
def sampler_gap(config) -> tuple[float, float]:
    """Compare the sampler as the engine calls it, on a GPU compiled, with the plain function -> share of equal tokens,
    largest gap of their log-probabilities.
    """
    vocab = 100_000 if config.gpu else 3000
    logits = 3 * torch.randn(64, vocab, device=config.device).bfloat16()
    seeds = split_seeds(torch.tensor([sequence_seed(0, i) for i in range(64)], device=config.device))
    index = torch.arange(64, device=config.device)
    token_ids = torch.arange(vocab, dtype=torch.int32, device=config.device)
    tokens, logprobs = sample(logits, Sampling(), seeds, index, token_ids)
    plain, plain_logprobs = sample_at_once(logits, Sampling(), seeds, index, token_ids)
    same = tokens == plain
    return same.float().mean().item(), (logprobs - plain_logprobs)[same].abs().max().item()


def sampler_rows(config) -> list[dict]:
    """Return the rows of the noise and the sampler."""
    here, there = noise_on("cpu"), noise_on(config.device)
    other_token = (here.argmax(-1) != there.argmax(-1)).float().mean().item()
    share, gap = sampler_gap(config)
    compiled = float(compiled_sample.function not in (None, sample_at_once))
    return [
        figure("noise: largest gap to the CPU's", (here - there).abs().max().item()),
        claim("noise is the CPU's: share whose largest is another id", config.on_gpu(other_token), "<=", 1e-3),
        claim("the sampler is compiled", config.on_gpu(compiled), ">=", 1),
        claim("it samples the plain sampler's tokens: share", config.on_gpu(share), ">=", 0.98),
        claim("gap of their log-probabilities", config.on_gpu(gap), "<=", 1e-3),
    ]


def exact_part(config) -> list[dict]:
    """See the top."""
    policy = load_policy(DrafterSettings(device=config.device, actor_dtype="float32"))
    groups = batch_groups(policy.tokenizer, config.responses, 0)
    sampling = Sampling(max_new=512 if config.gpu else 96)
    exact = make_engine(policy, 64, groups, sampling.max_new, frozen=True, bucketed=False)
    plain = by_name(exact.generate(groups, sampling))
    bucketed = make_engine(policy, 64, groups, sampling.max_new, frozen=True, bucketed=True)
    replayed = bucketed.graphs
    if not config.gpu:  # a recording that is called again: the code runs, but proves nothing of CUDA graphs
        replayed = GraphPool(bucketed.compute_round, lambda function: function)
    ways = (
        ("chain of 4", exact, None, fixed(4)),
        ("bucketed", bucketed, None, fixed(0)),
        ("bucketed, chain of 4", bucketed, None, fixed(4)),
        ("replayed", bucketed, replayed, fixed(0)),
        ("replayed, chain of 4", bucketed, replayed, fixed(4)),
        ("replayed, goodput", bucketed, replayed, Goodput(plans_for(["eagle"]))),
    )
    rows = sampler_rows(config)
    for name, engine, graphs, strategy in ways:
        engine.graphs = graphs
        share = len(same_tokens(by_name(engine.generate(groups, sampling, strategy)), plain)) / len(plain)
        if graphs and not graphs.replays:
            share = 0.0  # of rounds that were not replayed at all
        measured = share if graphs is None else config.on_gpu(share)
        rows.append(claim(f"float32: {name} makes plain decoding's responses", measured, ">=", 0.99))
    rows.append(figure("recorded rounds", float(len(replayed.replays))))
    return rows + bfloat16_rows(config, groups, sampling, plain)


def bfloat16_rows(config, groups, sampling: Sampling, exact: dict[tuple, Response]) -> list[dict]:
    """Compare plain and speculative decoding in bfloat16 on average. exact: plain responses in float32."""
    policy = load_policy(DrafterSettings(device=config.device, actor_dtype="bfloat16"))
    engine = make_engine(policy, 64, groups, sampling.max_new, frozen=True)
    plain = by_name(engine.generate(groups, sampling))
    drafted = by_name(engine.generate(groups, sampling, fixed(4)))

    def reward(response: Response) -> float:
        text = policy.tokenizer.decode(response.tokens, skip_special_tokens=False)
        return float(Countdown().grade(response.problem, text).strict)

    def length(response: Response) -> float:
        return float(len(response.tokens))

    gaps = [(plain[name].logprobs - exact[name].logprobs).abs().mean().item() for name in same_tokens(plain, exact)]
    share = len(same_tokens(drafted, plain)) / len(plain)
    rows = [figure("bfloat16: responses that plain and chain of 4 share", share)]
    rows.append(figure("bfloat16: mean log-probability gap to float32", sum(gaps) / max(1, len(gaps))))
    for value in (length, reward):
        errors = standard_errors_apart(list(map(value, plain.values())), list(map(value, drafted.values())))
        text = f"bfloat16: mean {value.__name__}, plain - chain, in standard errors"
        rows.append(claim(text, errors, "<=", 3))
    return rows


def standard_errors_apart(values: list[float], others: list[float]) -> float:
    """Return how many standard errors two means are apart."""
    error = (statistics.variance(values) / len(values) + statistics.variance(others) / len(others)) ** 0.5
    return abs(statistics.mean(values) - statistics.mean(others)) / max(1e-12, error)
