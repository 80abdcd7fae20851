"""Whether the engine makes on this device what it makes on a CPU, and with drafts and recordings what it makes without.
The part `exact` of `bench gpu`.

In float32 responses are compared token by token; kernels of other shapes round differently, which parts a few of them
(one token in a million). In bfloat16 rounding parts most, and what must agree is the distribution: mean length and
reward, to three standard errors.
"""

import torch

from bench.harness import groups_for, room
from bench.verdicts import Found, Place, Verdict
from drafter import Drafter, EagleProposer
from parts.engine.cuda_graphs import GraphPool
from parts.engine.interfaces import DraftPlan, Response, Strategy
from parts.engine.model_loading import cast_weights, load_model, stop_tokens
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
from parts.files import ROOT
from rollout import Engine
from strategy import Goodput, plans_for
from tasks import Countdown


def noise_gap(place: Place) -> tuple[float, float]:
    """(largest gap of noise to the CPU's, share of rows whose largest noise is of another word)."""
    seeds = split_seeds(torch.tensor([sequence_seed(0, i) for i in range(64)]))
    index = torch.arange(64)
    here = gumbel_noise(seeds, index, all_token_ids(50_000, torch.device("cpu")))
    there = gumbel_noise(
        seeds.to(place.device), index.to(place.device), all_token_ids(50_000, torch.device(place.device))
    ).cpu()
    return (here - there).abs().max().item(), (here.argmax(-1) != there.argmax(-1)).float().mean().item()


@torch.inference_mode()
def sampler_gap(place: Place) -> tuple[float, float]:
    """The sampler as the engine calls it, on a GPU compiled, against the plain function: (share of rows with the same
    token, largest gap of their log-probabilities).
    """
    vocab = 100_000 if place.gpu else 3000
    logits = 3 * torch.randn(64, vocab, device=place.device).bfloat16()
    seeds = split_seeds(torch.tensor([sequence_seed(0, i) for i in range(64)], device=place.device))
    index = torch.arange(64, device=place.device)
    words = torch.arange(vocab, dtype=torch.int32, device=place.device)
    tokens, logprobs = sample(logits, Sampling(), seeds, index, words)
    plain, plain_logprobs = sample_at_once(logits, Sampling(), seeds, index, words)
    same = tokens == plain
    return same.float().mean().item(), (logprobs - plain_logprobs)[same].abs().max().item()


def engine_for(model, tokenizer, drafter, groups, max_new: int, **settings) -> Engine:
    """With a learned drafter and room for the groups."""
    drafters = {"eagle": EagleProposer(drafter)}
    engine = Engine(model, stop_tokens(model, tokenizer), 64, proposers=drafters, frozen=True, **settings)
    engine.reserve(room(groups, max_new))
    return engine


def responses_of(engine: Engine, groups, sampling, strategy: Strategy | None = None) -> dict[tuple, Response]:
    """(group, sample) -> response."""
    return {(r.group, r.sample): r for r in engine.generate(groups, sampling, strategy)}


def share_same(responses: dict, others: dict) -> float:
    """Of responses whose tokens are the same."""
    return sum(responses[name].tokens == others[name].tokens for name in responses) / len(responses)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), (numbers.std() / len(numbers) ** 0.5).item()


def apart(values: list[float], others: list[float]) -> float:
    """How many standard errors two means are apart."""
    (mean, error), (other, other_error) = mean_and_error(values), mean_and_error(others)
    return abs(mean - other) / max(1e-12, (error**2 + other_error**2) ** 0.5)


def exact_part(place: Place) -> Found:
    """See the top."""
    model, tokenizer = load_model("base", place.device)
    drafter = Drafter(model)
    drafter.load(ROOT / "base/drafter")
    groups = groups_for(tokenizer, place.responses, 0)
    sampling = Sampling(max_new=512 if place.gpu else 96)
    gap, other_word = noise_gap(place)
    rows = [{"name": "noise: largest gap to the CPU's", "value": gap, "unit": ""}]
    claim = "noise is the CPU's: rows whose largest is another word"
    verdicts = [Verdict(claim, other_word if place.gpu else None, 1e-3, at_least=False), *sampler_verdicts(place)]

    engine = engine_for(model, tokenizer, drafter, groups, sampling.max_new, bucketed=False)
    plain = responses_of(engine, groups, sampling)
    bucketed_shape = engine_for(model, tokenizer, drafter, groups, sampling.max_new, bucketed=True)
    replayed = bucketed_shape.graphs
    if not place.gpu:  # a recording that is called again: the code runs, but proves nothing of CUDA graphs
        replayed = GraphPool(bucketed_shape.compute, lambda function: function)
    chain = Strategy(DraftPlan("eagle", 4))
    ways = (
        ("chain of 4", engine, None, chain),
        ("rounded", bucketed_shape, None, Strategy()),
        ("rounded, chain of 4", bucketed_shape, None, chain),
        ("replayed", bucketed_shape, replayed, Strategy()),
        ("replayed, chain of 4", bucketed_shape, replayed, chain),
        ("replayed, goodput", bucketed_shape, replayed, Goodput(plans_for(["eagle"]))),
    )
    for name, party, graphs, strategy in ways:
        party.graphs = graphs
        share = share_same(responses_of(party, groups, sampling, strategy), plain)
        if graphs and not graphs.replays:
            share = 0.0  # of rounds that were not replayed at all
        tested = place.gpu or graphs is None
        verdicts.append(Verdict(f"float32: {name} makes plain decoding's responses", share if tested else None, 0.99))
    rows.append({"name": "recorded rounds", "value": float(len(replayed.replays)), "unit": ""})
    bf16 = bfloat16_verdicts(model, tokenizer, groups, sampling, plain)
    return Found(rows + bf16.rows, verdicts + bf16.verdicts)


def sampler_verdicts(place: Place) -> list[Verdict]:
    """What becomes of the sampler where it is compiled."""
    share, gap = sampler_gap(place)
    is_compiled = float(compiled_sample.function not in (None, sample_at_once))
    return [
        Verdict("the sampler is compiled", is_compiled if place.gpu else None, 1.0),
        Verdict("it draws the plain sampler's tokens: share", share if place.gpu else None, 0.98),
        Verdict("gap of their log-probabilities", gap if place.gpu else None, 1e-3, at_least=False),
    ]


def bfloat16_verdicts(model, tokenizer, groups, sampling, exact: dict) -> Found:
    """Plain and speculative decoding in bfloat16, where rounding parts them: alike on average? exact: in float32."""
    model = cast_weights(model, torch.bfloat16)
    drafter = Drafter(model)
    drafter.load(ROOT / "base/drafter")
    engine = engine_for(model, tokenizer, drafter, groups, sampling.max_new)
    plain = responses_of(engine, groups, sampling)
    drafted = responses_of(engine, groups, sampling, Strategy(DraftPlan("eagle", 4)))
    task = Countdown()

    def rewards(responses: dict) -> list[float]:
        result = []
        for (group, _), response in sorted(responses.items()):
            text = tokenizer.decode(response.tokens, skip_special_tokens=False)
            result.append(float(task.grade(task.problem("test", group), text).strict))
        return result

    def lengths(responses: dict) -> list[float]:
        return [float(len(response.tokens)) for _, response in sorted(responses.items())]

    gaps = []
    for name, response in plain.items():
        if response.tokens == exact[name].tokens:
            gaps.append((response.logprobs - exact[name].logprobs).abs().mean().item())
    rows = [
        {
            "name": "bfloat16: responses that plain and chain of 4 share",
            "value": share_same(drafted, plain),
            "unit": "",
        },
        {"name": "bfloat16: mean log-probability gap to float32", "value": sum(gaps) / max(1, len(gaps)), "unit": ""},
    ]
    length_gap = apart(lengths(plain), lengths(drafted))
    reward_gap = apart(rewards(plain), rewards(drafted))
    verdicts = [
        Verdict("bfloat16: mean length, plain - chain, in standard errors", length_gap, 3.0, at_least=False),
        Verdict("bfloat16: mean reward, plain - chain, in standard errors", reward_gap, 3.0, at_least=False),
    ]
    return Found(rows, verdicts)
