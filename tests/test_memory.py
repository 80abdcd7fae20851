"""An update in little memory: head and loss in slices, gradient checkpointing, sums in small messages; a cache that
takes what is written.
"""

import mmap
import platform
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LEARN, ROOT, caught, run_in_process, tiny
from helpers import FAMILIES, by_name, check_equal, groups_of, token_logprobs
from test_grpo import CONFIG, close, equal, gradient, logprobs_by_hand, make_responses
from test_runs import check_same_run
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GraniteConfig

import train_grpo
from parts.cli import UserError
from parts.engine.kv_cache import zeros_when_touched
from parts.engine.sampling import Sampling
from parts.running import communication
from parts.running.launcher import spawn
from parts.training import logprobs
from parts.training.logprobs import checkpoint_layers, forward_bytes, token_scores, update_mode
from rollout import Engine

VOCAB = 1009  # a prime, so that no other dimension has this size
SLICE_TOKENS = 40  # more than the width of the head


@pytest.fixture
def small_slices(monkeypatch):
    """Slices have SLICE_TOKENS tokens."""
    monkeypatch.setattr(logprobs, "SLICE", VOCAB * SLICE_TOKENS)


@pytest.fixture
def whole_sequences(monkeypatch):
    """No prompt is shared: that sums in another order."""
    monkeypatch.setattr(logprobs, "WORTH_SHARING", 2.0)


class LargestTensor(TorchDispatchMode):
    """While active, notes the size of the largest tensor that has the vocabulary as a dimension."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and VOCAB in x.shape:
                self.numbers = max(self.numbers, x.numel())
        return result


class KeptTensors:
    """While active, collects what a forward keeps for its backward, beside the weights: storages, by address."""

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.tensors: dict[int, torch.Tensor] = {}
        self.hooks = saved_tensors_hooks(self.note, lambda x: x)

    def note(self, x: torch.Tensor) -> torch.Tensor:
        address = x.untyped_storage().data_ptr()
        if address not in self.weights:
            self.tensors[address] = x
        return x

    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.tensors.values())

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


# ---------------------------------------------------------------- head and loss in slices


def check_logits_are_never_whole(model, responses):
    """The logits of all tokens are never computed at once nor kept: in forward and backward, in float32 and bfloat16,
    with and without gradients.
    """
    for bf16 in (False, True):
        kept = KeptTensors(model)
        with LargestTensor() as largest:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False), kept:
                logp = token_logprobs(model, responses, 0.7)
            assert len(logp) > 5 * SLICE_TOKENS
            assert not [x for x in kept.tensors.values() if VOCAB in x.shape]
            logp.sum().backward()
            with torch.no_grad():
                token_logprobs(model, responses, 0.7)
        assert 0 < largest.numbers <= VOCAB * SLICE_TOKENS


def test_the_logits_of_a_micro_batch_never_exist_at_once(small_slices, monkeypatch):
    model = tiny(vocab_size=VOCAB)
    responses = make_responses(model)
    check_logits_are_never_whole(model, responses)
    with monkeypatch.context() as patch:  # all slices are kept
        patch.setattr(logprobs, "checkpoint", lambda work, *args, **kwargs: work(*args))
        caught(check_logits_are_never_whole, model, responses)
    monkeypatch.setattr(logprobs, "SLICE", 1 << 24)
    caught(check_logits_are_never_whole, model, responses)


class AdaptedHead(torch.nn.Module):
    """A head that is not a linear layer: a frozen one with a small adapter beside it that learns."""

    def __init__(self, head):
        super().__init__()
        self.head = head.requires_grad_(False)
        self.down = torch.nn.Linear(head.in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, head.out_features)

    def forward(self, x):
        return self.head(x) + self.up(self.down(x))


def model_with(head: str):
    """Return a tiny model with a head tied to the embedding, of its own, with a bias, or with an adapter."""
    model = tiny(vocab_size=VOCAB, tie_word_embeddings=head == "tied")
    torch.manual_seed(1)
    if head == "biased":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    if head == "adapted":
        model.lm_head = AdaptedHead(model.lm_head)
    return model


def check_slices_change_nothing(head, monkeypatch, **changes):
    """With slices, an update has the gradients and the figures that it has without them."""
    model = model_with(head)
    reference = tiny(vocab_size=VOCAB)
    config = replace(CONFIG, kl=0.1, temperature=0.7, micro_tokens=1000, **changes)
    responses = make_responses(reference)
    whole, stats = gradient(model, responses, config, reference=reference)
    with monkeypatch.context() as patch:
        patch.setattr(logprobs, "SLICE", VOCAB * SLICE_TOKENS)
        slices, their_stats = gradient(model, responses, config, reference=reference)
    assert close(whole, slices)
    assert all(abs(stats[name] - their_stats[name]) < 1e-4 for name in stats)


@pytest.mark.parametrize("head", ["own", "tied", "biased", "adapted"])
def test_gradients_are_the_same_with_slices(head, monkeypatch):
    check_slices_change_nothing(head, monkeypatch)
    right = logprobs.checkpoint

    def without_hidden(work, hidden, targets, **kwargs):
        return right(work, hidden.detach(), targets, **kwargs)

    def without_head(work, hidden, targets, **kwargs):
        logp, entropy = torch.no_grad()(work)(hidden, targets)
        return logp + 0 * hidden.sum(), entropy

    for broken in (without_hidden, without_head):
        with monkeypatch.context() as patch:
            patch.setattr(logprobs, "checkpoint", broken)
            caught(check_slices_change_nothing, head, monkeypatch)


def check_bfloat16_sums(monkeypatch):
    """The head's gradient in bfloat16 is as near to float32 with a slice for each token as with one slice."""
    model = tiny()
    config = replace(CONFIG, micro_tokens=10_000)
    responses = make_responses(model)
    index = [name for name, _ in model.named_parameters()].index("lm_head.weight")
    exact = gradient(model, responses, config)[0][index]

    def error() -> float:
        return (gradient(model, responses, replace(config, bf16=True))[0][index] - exact).norm().item()

    whole = error()
    assert whole > 0
    with monkeypatch.context() as patch:
        patch.setattr(logprobs, "SLICE", 118)
        assert error() < 1.5 * whole


def test_gradients_of_slices_are_summed_in_float32(monkeypatch):
    check_bfloat16_sums(monkeypatch)
    right = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: right(*args, **{**kwargs, "cache_enabled": True}))
    caught(check_bfloat16_sums, monkeypatch)


def check_one_slice_is_computed_once(model, responses):
    """If all tokens fit one slice, nothing is computed twice, and every bit is that of cross entropy on all logits."""
    calls = []  # tokens of each
    hook = model.lm_head.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    logp = token_logprobs(model, responses, 0.7)
    logp.sum().backward()
    hook.remove()
    assert calls == [len(logp)]
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    longest = max(len(r.prompt) + len(r.tokens) for r in responses)
    ids = torch.tensor([r.prompt + r.tokens + [0] * (longest - len(r.prompt) - len(r.tokens)) for r in responses])
    hidden = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    picked = torch.zeros(ids[:, 1:].shape, dtype=torch.bool)
    for row, r in zip(picked, responses):
        row[len(r.prompt) - 1 : len(r.prompt) + len(r.tokens) - 1] = True
    logits = model.lm_head(hidden[picked]) / 0.7
    wanted = -torch.nn.functional.cross_entropy(logits, ids[:, 1:][picked], reduction="none")
    wanted.sum().backward()
    assert torch.equal(logp, wanted)
    assert equal(got, [p.grad for p in model.parameters()])
    model.zero_grad()


def test_with_a_small_vocabulary_nothing_is_cut_or_computed_twice(monkeypatch, whole_sequences):
    model = tiny()
    responses = make_responses(model)
    check_one_slice_is_computed_once(model, responses)
    monkeypatch.setattr(logprobs, "SLICE", 118 * SLICE_TOKENS)
    caught(check_one_slice_is_computed_once, model, responses)


def check_scaled_logits():
    """The log-probabilities of a Granite, which divides its logits by a number, equal those computed by hand."""
    model = tiny(GraniteConfig, logits_scaling=4.0)
    responses = make_responses(model)
    wanted = torch.cat([logprobs_by_hand(model, r, 0.7) for r in responses])
    assert torch.allclose(token_logprobs(model, responses, 0.7), wanted, atol=1e-4)


def test_logits_are_scaled_as_the_model_scales_them(monkeypatch):
    check_scaled_logits()
    monkeypatch.setattr(logprobs, "head_of", lambda model: model.get_output_embeddings())
    caught(check_scaled_logits)


def check_entropies(scores):
    """Entropies equal those computed by hand at the sampling temperature, and have no gradient."""
    model = tiny(vocab_size=VOCAB)
    responses = make_responses(model)
    wanted = []
    for r in responses:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([(r.prompt + r.tokens)[:-1]])).logits[0, len(r.prompt) - 1 :]
        wanted.append(torch.distributions.Categorical(logits=logits / 0.7).entropy())
    _, entropy = scores(model, responses, 0.7)
    assert torch.allclose(entropy, torch.cat(wanted), atol=1e-4)
    assert not entropy.requires_grad


@pytest.mark.parametrize("slice_tokens", [SLICE_TOKENS, 1 << 20])
def test_entropies_equal_those_by_hand(slice_tokens, monkeypatch):
    monkeypatch.setattr(logprobs, "SLICE", VOCAB * slice_tokens)
    check_entropies(token_scores)
    caught(check_entropies, lambda model, responses, temperature: token_scores(model, responses, 1.0))


def check_frozen_head(head: str, bf16: bool) -> None:
    """A head that does not learn is computed once, and gradients below it are those below a head that does learn."""
    gradients = []
    for learns in (True, False):
        model = model_with(head)
        for p in model.lm_head.parameters():
            p.requires_grad_(learns)
        calls = []
        model.lm_head.register_forward_hook(lambda module, args, out, calls=calls: calls.append(len(out)))
        responses = make_responses(tiny(vocab_size=VOCAB))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            logp = token_logprobs(model, responses, 0.7)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        gradients.append([p.grad for p in model.get_decoder().parameters()])
        assert sum(calls) == len(logp) * (2 if learns else 1)
    for learned, frozen in zip(*gradients):
        assert (learned - frozen).norm() <= (0.02 if bf16 else 1e-5) * learned.norm()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("head", ["own", "biased"])
def test_a_head_that_does_not_learn_is_computed_once(head, bf16, small_slices, monkeypatch):
    check_frozen_head(head, bf16)
    right = logprobs.FrozenHead.apply
    monkeypatch.setattr(logprobs.FrozenHead, "apply", lambda *args: right(*args[:3], 1.0, *args[4:]))
    caught(check_frozen_head, head, bf16)  # without the temperature


class Exponentials(TorchDispatchMode):
    """Counts calls of exp on tensors that have the vocabulary as a dimension."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.exp.default and VOCAB in result.shape
        return result


def check_entropies_are_computed_once():
    """Although the backward computes the logits of each slice again."""
    model = tiny(vocab_size=VOCAB)
    responses = make_responses(model)
    tokens = sum(len(r.tokens) for r in responses)
    with Exponentials() as exponentials:
        token_scores(model, responses, 0.7)[0].sum().backward()
    assert exponentials.count == -(-tokens // SLICE_TOKENS)


def test_the_backward_does_not_compute_entropies_again(small_slices):
    check_entropies_are_computed_once()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        caught(check_entropies_are_computed_once)


# ---------------------------------------------------------------- gradient checkpointing


def kept_bytes(model, tokens: int = 80) -> int:
    """Return the bytes that the forward of so many tokens keeps in an update."""
    with update_mode(model), KeptTensors(model) as kept:
        model.get_decoder()(input_ids=torch.ones(2, tokens // 2, dtype=torch.long), use_cache=False)
    return kept.bytes()


def check_checkpointed_update(enable):
    """The gradients are the same bit for bit, and the forward keeps less than a quarter of the bytes."""
    model = tiny(num_hidden_layers=4)
    responses = make_responses(model)
    wanted, _ = gradient(model, responses)
    before = kept_bytes(model)
    enable(model)
    assert equal(wanted, gradient(model, responses)[0])
    assert kept_bytes(model) < before / 4


def test_gradients_are_the_same_with_checkpointed_layers(whole_sequences):
    check_checkpointed_update(checkpoint_layers)
    caught(check_checkpointed_update, lambda model: None)

    def without_gradients(model):  # layers are not computed again, but treated as constants
        for layer in model.get_decoder().layers:
            layer._gradient_checkpointing_func = lambda work, *args: torch.no_grad()(work)(*args) + 0 * args[0]
            layer.gradient_checkpointing = True

    caught(check_checkpointed_update, without_gradients)


def test_a_policy_that_cannot_checkpoint_layers_is_refused(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="--gradient-checkpointing: Qwen2ForCausalLM"):
        checkpoint_layers(model)


def check_rollout_stays(model, change, fused: bool):
    """The same responses are generated before and after the change, with fused layers or the model's own."""
    groups = groups_of(6, random.Random(2))

    def responses() -> dict:
        engine = Engine(model, {1}, 10, 100, keep_hidden=True)
        if not fused:
            engine.fused_layers = None
        return by_name(engine.generate(groups, Sampling(max_new=20)))

    before = responses()
    change(model)
    after = responses()
    check_equal(after, before)
    assert all(torch.equal(after[name].logprobs, before[name].logprobs) for name in after)


@pytest.mark.parametrize("fused", [True, False])
def test_checkpointed_layers_do_not_change_the_rollout(fused):
    check_rollout_stays(tiny(), checkpoint_layers, fused)

    def left_in_training_mode(model):  # then checkpointed layers get no cache
        checkpoint_layers(model)
        model.train()

    if not fused:
        with pytest.raises(RuntimeError, match="shape"):
            check_rollout_stays(tiny(), left_in_training_mode, fused)


def test_a_run_with_checkpointed_layers_makes_the_same_policy(chain_policy, tmp_path, monkeypatch, whole_sequences):
    enabled = []
    monkeypatch.setattr(train_grpo, "checkpoint_layers", lambda model: enabled.append(checkpoint_layers(model)))
    flags = (*LEARN, "--steps", 2, "--eval-every", 0)
    run_in_process(train_grpo.main, chain_policy, tmp_path / "plain", *flags)
    assert not enabled
    run_in_process(train_grpo.main, chain_policy, tmp_path / "checkpointed", *flags, "--gradient-checkpointing")
    assert enabled
    check_same_run(tmp_path / "plain", tmp_path / "checkpointed")


def check_estimate(estimate):
    """The estimated memory of an update covers what its forward keeps, and the layer that is computed again, and is not
    much more.
    """
    for family, (config_class, changes) in FAMILIES.items():
        model = tiny(config_class, **changes, num_hidden_layers=6)
        head = 4 * 5 * 80 * 118  # logits of 80 tokens and their gradients
        all_layers = kept_bytes(model)
        assert all_layers <= estimate(model, 80) - estimate(model, 0) - head <= 2 * all_layers, family
        checkpoint_layers(model)
        checkpointed = kept_bytes(model) + all_layers / 6
        assert checkpointed <= estimate(model, 80) - estimate(model, 0) - head <= 3 * checkpointed, family


def test_the_memory_of_an_update_is_estimated():
    check_estimate(forward_bytes)
    caught(check_estimate, lambda model, tokens: 12 * tokens * model.config.vocab_size)  # the logits alone


# ---------------------------------------------------------------- the cache on a CPU


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE / 2**20


def check_untouched_pages(zeros) -> None:
    """Of a cache for long sequences only what is written takes memory, and all of it is zero at first."""
    before = resident_megabytes()
    cache = zeros((4, 64, 1 << 19), torch.bfloat16, "cpu")  # 256 MB
    cache[1, 2] = 1
    assert resident_megabytes() - before < 32
    assert not cache[2, 3].any() and cache[1, 2].all()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_cache_takes_memory_when_it_is_written():
    check_untouched_pages(zeros_when_touched)
    caught(check_untouched_pages, lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (2, 3, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_of_any_shape(shape, dtype):
    made = zeros_when_touched(shape, dtype, "cpu")
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    part = made[:1]
    del made
    assert (part.fill_(2) == 2).all()  # a view keeps the memory alive


PAGES = """
import resource, torch
from parts.devices import keep_freed_memory
{}
for i in range(30):
    if i == 25:  # by then malloc reuses the same place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 << 20)  # 40 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def check_pages_are_kept(call: str) -> None:
    """A block of 40 MB that is freed and allocated again and again takes no new pages."""
    command = [sys.executable, "-c", PAGES.format(call)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_freed_memory_is_kept():
    check_pages_are_kept("keep_freed_memory()")
    caught(check_pages_are_kept, "")


# ---------------------------------------------------------------- sums over the workers


def shapes_of(seed: int) -> list[tuple[int, ...]]:
    """Return random shapes, from those of single numbers to tensors of several messages; some are empty."""
    rng = random.Random(seed)
    return [tuple(rng.choice([0, 1, 2, 5, 13]) for _ in range(rng.randint(0, 4))) for _ in range(30)] + [(), (90, 70)]


def tensors_of(seed: int, rank: int) -> list[torch.Tensor]:
    """Return a worker's tensors of these shapes. On worker 1 none is contiguous, on worker 0 some are."""
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    tensors = []
    for i, shape in enumerate(shapes_of(seed)):
        x = torch.randn(shape[::-1], generator=generator).permute(list(range(len(shape)))[::-1])
        tensors.append(x if rank or i % 3 else x.contiguous())
    return tensors


def one_message(tensors):
    """Sum all tensors in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def a_message_each(tensors):
    """Sum each tensor in a message of its own."""
    for t in tensors:
        one_message([t])


def not_copied_back(tensors):
    """Sum copies, and leave the tensors as they are."""
    for t in tensors:
        torch.distributed.all_reduce(t.contiguous())


WAYS = {way.__name__: way for way in (communication.sum_up, one_message, a_message_each, not_copied_back)}
MESSAGE = 1000


def sum_in_all_ways(folder: Path, heartbeat) -> None:
    """Run a worker process: write the sums and the sizes of the messages of each way into the folder."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    communication.MESSAGE = MESSAGE
    right = torch.distributed.all_reduce
    sizes = []

    def all_reduce(tensor):
        sizes.append(tensor.numel())
        right(tensor)

    torch.distributed.all_reduce = all_reduce
    results = {}
    for name, way in WAYS.items():
        for seed in range(4):
            tensors = tensors_of(seed, rank)
            sizes.clear()
            way(tensors)
            results[name, seed] = (tensors, list(sizes))
    torch.save(results, folder / f"rank {rank}")
    torch.distributed.destroy_process_group()


def check_sums(results: list[dict], way: str) -> None:
    """Each worker has the sums bit for bit, from few messages, none of them large."""
    for seed in range(4):
        wanted = [a + b for a, b in zip(tensors_of(seed, 0), tensors_of(seed, 1))]
        for result in results:
            got, sizes = result[way, seed]
            assert equal(got, wanted)
            assert max(sizes) <= MESSAGE
            assert len(sizes) <= 2 * sum(sizes) / MESSAGE + 1


def test_sums_over_workers_use_few_messages_of_bounded_size(tmp_path):
    spawn(sum_in_all_ways, tmp_path, 2, 60, False)
    results = [torch.load(tmp_path / f"rank {rank}", weights_only=True) for rank in range(2)]
    check_sums(results, "sum_up")
    for way in WAYS.keys() - {"sum_up"}:
        caught(check_sums, results, way)
