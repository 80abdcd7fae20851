"""TLT on one page: GRPO with a speculative rollout, and a drafter that is trained by workers that have gone idle.

    python tlt_one_page.py            a minute or two on two CPU cores, one line per step

When a language model learns to reason by reinforcement learning, most of each step is rollout, and most of the rollout
is spent on a few very long responses. TLT (Taming the Long Tail, arXiv 2511.16665) shortens it by speculation: a small
drafter proposes k draft tokens, and the policy verifies them in one forward pass. The policy changes in every step, so
the drafter has to follow it. A worker that has finished its part of the rollout trains the drafter on its own responses
until the other worker has finished, too.

    y        = argmax(logits / temperature + g)             g: Gumbel noise, a hash of (sequence's seed, position, id)
    accepted = (y[:, :k] == ids[:, 1:]).cumprod(1).sum(1)   ids: the last token and k draft tokens

Each y is an exact sample of softmax(logits / temperature), and does not depend on the batch or the worker. The drafter
adds the same noise to its own logits and often draws the same token, so verification is a test for equality. Only the
policy's samples y are emitted: responses are the same with and without drafts, up to ties within rounding.

    h'       = layer(fc([embed(x_{t+1}); h_t]))             logits of x_{t+2}: lm_head(h')
    loss     = cross-entropy(lm_head(h'), softmax(lm_head(h_{t+1}))) + 0.5 * SmoothL1(h', h_{t+1})

The drafter is one decoder layer (EAGLE, arXiv 2401.15077). h_t is the policy's last hidden state at position t, its
feature. Entry t of the drafter combines it with the token that follows, and estimates the next feature.

    A        = (reward - mean of the group) / standard deviation of the group
    loss     = -(mean over responses of the mean over tokens of A * log p(token))

A group is the responses to one prompt. With one update per rollout the ratio of GRPO is 1, so it is never clipped.

Shapes: B sequences, T new tokens of each, S entries of the kv cache, V vocabulary, D width, HD width of a head.
"""

import ast
import operator
import random
import re
import time
from collections import Counter, namedtuple
from fractions import Fraction
from functools import reduce
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

BASE = Path(__file__).parent / "base"
TOKENIZER = Tokenizer.from_file(str(BASE / "tokenizer.json"))
LAYERS, D, HD, V, EOS = 28, 64, 32, 118, 1  # of the policy in base/: a Llama with two query heads and one kv head
FREQUENCIES = (10000.0 ** (-torch.arange(0, HD, 2) / HD)).repeat(2)  # of its rotary position embedding
START = torch.zeros(1, dtype=torch.long)
TEMPERATURE, DRAFT_LENGTHS, WORKERS = 1.0, (0, 2, 4, 8), 2
LR, WARMUP, DRAFTER_LR = 3e-4, 3, 1e-4  # learning rate of the policy, steps of its warm-up; of the drafter


# ---------------------------------------------------------------- the task: Countdown
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def make_problem(rng: random.Random) -> tuple[list[int], int]:
    """Return three or four numbers, and a target that can be made from them."""
    while True:
        numbers = [rng.randint(1, 10) for _ in range(rng.choice((3, 3, 4)))]
        target = reduce(lambda a, b: rng.choice((a + b, a * b, abs(a - b))), numbers)
        if 0 < target < 100 and target not in numbers:
            return numbers, target


def evaluate(node: ast.AST) -> Fraction:
    """Return the exact value of a parsed expression. Raise ValueError if it is not arithmetic with + - * /."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    raise ValueError("not arithmetic")


def grade(text: str, numbers: list[int], target: int) -> float:
    """Return 1.0 if the answer equals the target and uses each number exactly once, else 0.0."""
    found = re.search(r"<answer>([0-9+\-*/() ]{1,100})</answer>(<eos>)?$", text)
    if not found or sorted(map(int, re.findall("[0-9]+", found[1]))) != sorted(numbers):
        return 0.0
    try:
        return float(evaluate(ast.parse(found[1].strip(), mode="eval").body) == target)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return 0.0


# ---------------------------------------------------------------- noise
def hash_int32(x: torch.Tensor) -> torch.Tensor:
    """Return a hash of each number in x; input and output are 32-bit numbers in int64 tensors."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the noise of all token ids at these positions: seeds (B,), positions (B, T) -> (B, T, V)."""
    keys = hash_int32(hash_int32(seeds)[:, None] ^ positions)  # (B, T)
    bits = hash_int32(keys[..., None] ^ hash_int32(torch.arange(1, V + 1)))  # (B, T, V)
    uniform = (bits.double() + 0.5) / 2**32  # in (0, 1)
    return -(-uniform.log()).log().float()


# ---------------------------------------------------------------- policy
# Weights are dictionaries with the names in the files. Of a kv cache (B, layers, 2, S, 1, HD) the first lens[b] entries
# of sequence b are valid, and a token sees no entry behind its own: a rollback is only a lower length.
def linear(w, name, x) -> torch.Tensor:
    """Apply a linear layer, with a bias if it has one."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w, name, x) -> torch.Tensor:
    """Apply RMSNorm, or nothing if there is no such weight: the drafter's layer has no input norm."""
    return F.rms_norm(x, (D,), w[f"{name}.weight"], 1e-6) if f"{name}.weight" in w else x


def rotate(x, angles) -> torch.Tensor:
    """Apply rotary position embedding: x (B, T, heads, HD), angles (B, T, 1, HD)."""
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def decoder(w, names, x, lens=START, kv=None) -> torch.Tensor:
    """Run the named layers on x (B, T, D), at positions lens, lens + 1, ... of each sequence -> (B, T, D)."""
    rows, positions = torch.arange(len(x))[:, None], lens[:, None] + torch.arange(x.shape[1])  # (B, 1), (B, T)
    angles = positions[..., None, None] * FREQUENCIES  # (B, T, 1, HD)
    mask = (torch.arange(int(positions.max()) + 1) <= positions[..., None])[:, None]  # (B, 1, T, visible)
    for i, name in enumerate(names):
        h = norm(w, f"{name}.input_layernorm", x)
        q, k, v = (linear(w, f"{name}.self_attn.{part}_proj", h).unflatten(-1, (-1, HD)) for part in "qkv")
        q, k = rotate(q, angles), rotate(k, angles)  # (B, T, 2, HD), (B, T, 1, HD)
        if kv is not None:
            kv[rows, i, 0, positions], kv[rows, i, 1, positions] = k, v
            k, v = kv[:, i, :, : mask.shape[-1]].unbind(1)  # (B, visible, 1, HD)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attention = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # (B, 2, T, HD)
        x = x + linear(w, f"{name}.self_attn.o_proj", attention.transpose(1, 2).flatten(2))
        h = norm(w, f"{name}.post_attention_layernorm", x)
        gate = F.silu(linear(w, f"{name}.mlp.gate_proj", h))
        x = x + linear(w, f"{name}.mlp.down_proj", gate * linear(w, f"{name}.mlp.up_proj", h))
    return x


def policy(w, ids, lens=START, kv=None) -> torch.Tensor:
    """Return the policy's features, its last hidden states: ids (B, T) -> (B, T, D)."""
    x = F.embedding(ids, w["model.embed_tokens.weight"])
    return norm(w, "model.norm", decoder(w, [f"model.layers.{i}" for i in range(LAYERS)], x, lens, kv))


def logits(w, features) -> torch.Tensor:
    """Return the logits of features, divided by the temperature: (..., D) -> (..., V)."""
    return F.linear(features, w["lm_head.weight"]) / TEMPERATURE


# ---------------------------------------------------------------- drafter
def drafter(w, d, ids, features, lens=START, kv=None) -> torch.Tensor:
    """Return estimates of h_{t+1}: tokens x_{t+1} (B, T), features h_t (B, T, D) -> (B, T, D)."""
    x = torch.cat([F.embedding(ids, w["model.embed_tokens.weight"]), features], -1)
    return decoder(d, ["layer"], linear(d, "fc", x), lens, kv)


# ---------------------------------------------------------------- one round: draft, verify, accept
class Batch:
    """The unfinished sequences of a group. Each tensor has one row per sequence."""

    def __init__(self, w, prompt: list[int], seeds: list[int], limit: int):
        """Read the prompt except for its last token, which the policy reads in the first round."""
        B, P, S = len(seeds), len(prompt), len(prompt) + limit + max(DRAFT_LENGTHS)
        self.seeds = torch.tensor(seeds)
        self.lens = torch.full((B,), P)  # known tokens; the policy has read all but the last
        self.tokens = F.pad(torch.tensor([prompt] * B), (0, S - P))  # (B, S)
        self.kv = torch.zeros(B, LAYERS, 2, S, 1, HD)
        self.features = F.pad(policy(w, self.tokens[:, : P - 1], START, self.kv), (0, 0, 0, S - P + 1))  # (B, S, D)
        self.drafter_kv = torch.zeros(B, 1, 2, S, 1, HD)
        self.drafter_lens = torch.zeros(B, dtype=torch.long)  # entries of the drafter with the policy's features


def propose(w, d, batch: Batch, noise: torch.Tensor, k: int) -> torch.Tensor:
    """Return k draft tokens of each sequence, (B, k)."""
    # compute the entries of all tokens since the last call, which now have the policy's features
    count = int((batch.lens - 1 - batch.drafter_lens).max())
    first = (batch.lens - 1 - count).clamp(min=0)  # (B,)
    rows, entries = torch.arange(len(first)), first[:, None] + torch.arange(count)  # (B,), (B, count)
    ids, features = batch.tokens[rows[:, None], entries + 1], batch.features[rows[:, None], entries]
    estimates = drafter(w, d, ids, features, first, batch.drafter_kv)  # (B, count, D)
    batch.drafter_lens = batch.lens - 1
    # draft one token after the other; all but the first depend on the drafter's own features
    estimate = estimates[rows, batch.lens - 2 - first][:, None]  # (B, 1, D)
    drafts = [(logits(w, estimate) + noise[:, :1]).argmax(-1)]  # (B, 1)
    for i in range(1, k):
        estimate = drafter(w, d, drafts[-1], estimate, batch.lens - 2 + i, batch.drafter_kv)
        drafts.append((logits(w, estimate) + noise[:, i : i + 1]).argmax(-1))
    return torch.cat(drafts, 1)


def count_accepted(y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return how many draft tokens, ids[:, 1:], equal the policy's samples y before the first difference, (B,)."""
    return (y[:, :-1] == ids[:, 1:]).cumprod(1).sum(1)


def run_round(w, d, batch: Batch, k: int) -> torch.Tensor:
    """Advance each sequence by its accepted draft tokens and one more token. Return how many were accepted, (B,)."""
    rows, positions = torch.arange(len(batch.lens))[:, None], batch.lens[:, None] + torch.arange(k + 1)
    noise = gumbel_noise(batch.seeds, positions)  # (B, k + 1, V)
    ids = batch.tokens[rows, positions[:, :1] - 1]  # (B, 1)
    if k:
        ids = torch.cat([ids, propose(w, d, batch, noise, k)], 1)  # (B, k + 1)
    features = policy(w, ids, batch.lens - 1, batch.kv)
    y = (logits(w, features) + noise).argmax(-1)  # (B, k + 1)
    accepted = count_accepted(y, ids)
    batch.tokens[rows, positions] = y
    batch.features[rows, positions - 1] = features
    batch.lens = batch.lens + accepted + 1  # the rejected tokens lie behind it and will be overwritten
    return accepted


# ---------------------------------------------------------------- rollout
class DraftLength:
    """Choose the draft length k with the most expected tokens per second, E_k / (seconds of a round). E_k is
    1 + c_1 + c_1 c_2 + ... + c_1 ... c_k, where c_i is the acceptance rate at depth i if all before are accepted.
    """

    def __init__(self, choices=DRAFT_LENGTHS):
        self.choices = choices
        self.rates = torch.full((max(DRAFT_LENGTHS),), 0.8)  # c_i, as running means
        self.seconds: dict = {}  # of a round, by size of the batch (1, 2-3, 4-7, ...) and k, as running means
        self.counts: Counter = Counter()  # rounds by k; sequences in speculative rounds, and tokens that they emitted

    def choose(self, B: int) -> int:
        """Return the draft length for a round with B sequences; now and then a random one, to measure it again."""
        expected = [1.0, *(1 + self.rates.cumprod(0).cumsum(0)).tolist()]
        speeds = {k: expected[k] / self.seconds.get((B.bit_length(), k), 1e-9) for k in self.choices}
        return random.choice(self.choices) if random.random() < 0.05 else max(speeds, key=speeds.get)

    def observe(self, k: int, accepted: torch.Tensor, seconds: float) -> None:
        """Learn from a round: accepted (B,)."""
        key = (len(accepted).bit_length(), k)
        self.seconds[key] = 0.8 * self.seconds.get(key, seconds) + 0.2 * seconds
        right = accepted[:, None] > torch.arange(k)  # (B, k)
        reached = accepted[:, None] >= torch.arange(k)
        self.rates[:k] += 0.01 * (right.sum(0) - reached.sum(0) * self.rates[:k])
        self.counts[k] += 1
        if k:
            self.counts.update(sequences=len(accepted), tokens=len(accepted) + int(accepted.sum()))


# ids: the prompt and, from `start` on, the response; features (len(ids) - 1, D) stay with the worker that made them
Response = namedtuple("Response", "group ids start reward features")


@torch.no_grad()
def rollout(w, d, step: int, group: int, samples: int, limit: int, lengths: DraftLength) -> list[Response]:
    """Return a group of responses of at most `limit` tokens. Step and group determine the problem and the noise."""
    rng = random.Random(f"{step} {group}")
    numbers, target = make_problem(rng)
    prompt = TOKENIZER.encode(f"{','.join(map(str, numbers))}={target}<think>").ids
    batch = Batch(w, prompt, [rng.getrandbits(32) for _ in range(samples)], limit)
    finished = {}  # by seed
    while len(finished) < samples:
        started = time.perf_counter()
        k = lengths.choose(len(batch.lens))
        accepted = run_round(w, d, batch, k)
        lengths.observe(k, accepted, time.perf_counter() - started)
        unfinished = []
        for row, n in enumerate(batch.lens.tolist()):
            ids = batch.tokens[row, len(prompt) : n].tolist()[:limit]
            if EOS in ids:
                ids = ids[: ids.index(EOS) + 1]
            elif len(ids) < limit:
                unfinished.append(row)
                continue
            reward = grade(TOKENIZER.decode(ids, skip_special_tokens=False), numbers, target)
            features = batch.features[row, : len(prompt) + len(ids) - 1].clone()
            finished[int(batch.seeds[row])] = Response(group, prompt + ids, len(prompt), reward, features)
        for name, tensor in vars(batch).items():
            setattr(batch, name, tensor[unfinished])
    return [finished[seed] for seed in sorted(finished)]


# ---------------------------------------------------------------- learning
def sum_over_workers(tensors: list[torch.Tensor], weight: float = 1.0) -> None:
    """Replace tensors by the weighted sum of all workers' tensors."""
    flat = parameters_to_vector(tensors) * weight
    dist.all_reduce(flat)
    vector_to_parameters(flat, tensors)


def update_policy(w, optimizer, responses: list[Response], samples: int, rank: int) -> None:
    """Take one GRPO step. Each worker computes the gradients of its share of the responses."""
    rewards = torch.tensor([r.reward for r in responses]).view(-1, samples)  # (groups, samples)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
    pairs = sorted(zip(responses, advantages.flatten().tolist()), key=lambda pair: len(pair[0].ids))
    for r, advantage in pairs[rank::WORKERS]:  # sorted by length, the shares are of about the same size
        ids = torch.tensor([r.ids])  # (1, T)
        logp = logits(w, policy(w, ids[:, :-1])).log_softmax(-1).gather(-1, ids[:, 1:, None])  # (1, T - 1, 1)
        loss = -advantage * logp[:, r.start - 1 :].mean() / len(responses)
        loss.backward()
    sum_over_workers([p.grad for p in w.values()])
    clip_grad_norm_(w.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_drafter(w, d, optimizer, responses: list[Response]) -> None:
    """Take one step of drafter training on four random responses."""
    for r in random.choices(responses, k=4):
        ids, features, targets = torch.tensor(r.ids[1:-1]), r.features[:-1], r.features[1:]  # x_{t+1}, h_t, h_{t+1}
        counted = slice(r.start - 2, None)  # entry t predicts token t + 2, which has to be one of the response
        estimates, targets = drafter(w, d, ids[None], features[None])[0, counted], targets[counted]  # (T, D)
        loss = F.cross_entropy(logits(w, estimates), logits(w, targets).softmax(-1))
        loss = loss + 0.5 * F.smooth_l1_loss(estimates, targets)
        loss.backward(inputs=list(d.values()))  # embedding and head are the policy's, and do not change
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- workers
def worker(rank: int, port: int, steps: int, prompts: int, samples: int, limit: int) -> None:
    """Run all steps on one worker. The store counts the prompts that are taken and the workers that have finished."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    w, d = load_file(BASE / "model.safetensors"), load_file(BASE / "drafter/drafter.safetensors")
    optimizer = torch.optim.Adam([p.requires_grad_() for p in w.values()], fused=True)
    drafter_optimizer = torch.optim.Adam([p.requires_grad_() for p in d.values()], DRAFTER_LR, fused=True)
    lengths = DraftLength()
    for step in range(steps):
        own, trained, began = [], 0, time.perf_counter()
        while (group := store.add(f"prompts taken in step {step}", 1) - 1) < prompts:
            own += rollout(w, d, step, group, samples, limit, lengths)
        store.add(f"workers finished in step {step}", 1)
        idle = time.perf_counter()
        while own and store.add(f"workers finished in step {step}", 0) < WORKERS:  # adding 0 reads the counter
            train_drafter(w, d, drafter_optimizer, own)
            trained += 1
        met = time.perf_counter()
        lengths.counts["idle seconds"] = met - idle
        reports = [None] * WORKERS
        dist.all_gather_object(reports, ([r._replace(features=None) for r in own], trained, lengths.counts))
        parts, steps_trained, counts = zip(*reports)
        responses = sorted(sum(parts, []), key=lambda r: r.group)
        if any(steps_trained):
            sum_over_workers(list(d.values()), trained / sum(steps_trained))
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        update_policy(w, optimizer, responses, samples, rank)
        if rank == 0:
            total = sum(counts, Counter())
            print(describe(step + 1, responses, total, met - began, time.perf_counter() - met), flush=True)
        lengths.counts.clear()
    dist.destroy_process_group()


def describe(step: int, responses: list[Response], counts: Counter, rollout: float, update: float) -> str:
    """Return the line of a step; drafter: seconds of training in idle time, of all workers together."""
    sizes = [len(r.ids) - r.start for r in responses]
    rounds = ", ".join(f"{counts[k]} with k={k}" for k in DRAFT_LENGTHS if counts[k])
    return (
        f"step {step:2}: reward {mean(r.reward for r in responses):.2f}, length {mean(sizes):.0f} (max {max(sizes)}), "
        f"{counts['tokens'] / max(1, counts['sequences']):.1f} tokens per round ({rounds}), "
        f"rollout {rollout:.1f} s, drafter {counts['idle seconds']:.1f} s, update {update:.1f} s"
    )


def main(steps: int = 12, prompts: int = 5, samples: int = 10, limit: int = 400) -> None:
    """Start the workers on a free port, and wait for them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (store.port, steps, prompts, samples, limit), nprocs=WORKERS, daemon=True)


if __name__ == "__main__":
    main()
