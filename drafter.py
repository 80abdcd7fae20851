"""The one-layer EAGLE drafter: predicts the policy's next tokens from its last hidden state, at a fraction of the cost.

    h' = layer(fc([embed(x_{t+1}); h_t]))          logits of token t+2 = lm_head(h')

h_t is the policy's last hidden state (after the final norm) at position t. The layer is of the policy's own class;
embedding, head and rotary angles are the LIVE policy's, by reference: they follow it at no cost and are never changed
by drafter training.

    training, entry t :   input (x_{t+1}, h_t)   ->   target h_{t+1} and softmax(lm_head(h_{t+1}))
    inference         :   over accepted tokens with the TRUE h; then k - 1 more steps on its own tokens and features

Missing the shift is a classic mistake: pairing (x_t, h_t) trains just as smoothly but drafts badly, since x_{t+1} is
exactly what h_t was uncertain about.

    loss = soft cross-entropy + feature_weight * SmoothL1(h', h_{t+1})     (EAGLE, arXiv 2401.15077; responses only)

From the second draft token on, inference feeds the drafter its own h' instead of the true h. Training covers both: a
first pass without gradient predicts all features, and the trained pass sees, at a random half of the positions, the
prediction in place of h_t (scheduled sampling, 1506.03099: a cheap form of EAGLE-3's training-time test). On base/, 60
s on one core: 3.69 -> 3.93 tokens per round at k = 4, 4.67 -> 5.72 at k = 8, although a step then costs a third more.

Legend: B running sequences, T entries per sequence, N entries of a packed batch (drafter_data.py) or token ids of the
draft vocabulary, D model width.
Left out: EAGLE-3's fusion of three layers' features (the engine keeps one), a head of the drafter's own.
"""

import copy
import math
import random
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from parts.cli import UserError, check_above, check_at_least, flag, parse_flags, run
from parts.devices import pick_device, send
from parts.engine.forward import logit_scale
from parts.engine.fused_layers import FusedLayer, JoinedLinear, PackedLinear, as_one_linear, fuse
from parts.engine.interfaces import DraftPlan, Group, Proposer, Strategy, describe_stats
from parts.engine.kv_cache import CacheWindow, KVCache, attention_inputs, kv_heads
from parts.engine.model_loading import ACTOR_DTYPES, load_actor, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import load_weights, read_notes, save_weights
from parts.training.drafter_data import FeatureBuffer, PackedBatch, TokenCounts, block_mask, embedding_scale
from rollout import Engine
from tasks import TaskFlags, encode_prompt, make_task

# ---------------------------------------------------------------- the model

# Beside a tiny policy, a layer of its own size cannot do in one step what the policy does in 28, and a larger one costs
# next to nothing. So its MLP is at least this wide. With base/ (64 wide, an MLP of 144), 75 s of training on one
# core: the likeliest token is right 93.7 % of the time, not 92.4 %, and a round gives 5.79 tokens, not 5.50 (k = 8).
MIN_MLP_WIDTH = 512
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def mlp_width(layer) -> int | None:
    """Return the inner width of a decoder layer's MLP; None if it is of another kind, such as a mixture of experts."""
    mlp = getattr(layer, "mlp", None)
    if not all(isinstance(getattr(mlp, part, None), torch.nn.Linear) for part in MLP_PARTS):
        return None
    return mlp.down_proj.in_features


def decoder_layer(policy) -> torch.nn.Module:
    """Return a new decoder layer of the policy's class, with an MLP of at least MIN_MLP_WIDTH."""
    config = policy.config
    layer_class = type(policy.get_decoder().layers[0])
    layer = layer_class(config, layer_idx=0)
    width = mlp_width(layer)
    if width is None or width >= MIN_MLP_WIDTH or width != getattr(config, "intermediate_size", None):
        return layer
    config = copy.deepcopy(config)
    config.intermediate_size = MIN_MLP_WIDTH
    return layer_class(config, layer_idx=0)


def fingerprint(embedding: torch.Tensor) -> str:
    """Return, as text, numbers that identify a policy by its embedding (V, D): the mean magnitude of its columns.
    Reinforcement learning hardly changes them, but they differ from model to model.
    """
    sizes = embedding.detach().float().abs().mean(0)[:32]
    return " ".join(f"{size:.4g}" for size in (sizes / sizes.mean()).tolist())


def is_same_policy(noted: str, embedding: torch.Tensor) -> bool:
    """Return whether a noted fingerprint is that of this embedding; True if none was noted."""
    numbers = [float(number) for number in noted.split()]
    now = [float(number) for number in fingerprint(embedding).split()]
    return not numbers or (len(numbers) == len(now) and max(abs(a - b) for a, b in zip(numbers, now)) < 0.1)


class BorrowedModules(NamedTuple):
    """What a drafter borrows from the live policy."""

    embed: torch.nn.Module
    rotary: torch.nn.Module
    head: torch.nn.Module
    config: object


class Drafter(torch.nn.Module):
    """One decoder layer on top of [embedding; feature]. It owns only these parameters; the policy's are borrowed.

    dtype: the policy's by default; a drafter that is trained beside a bfloat16 policy uses float32.
    """

    def __init__(self, policy, dtype: torch.dtype | None = None):
        super().__init__()
        decoder = policy.get_decoder()
        config = policy.config
        width = self.width = config.hidden_size
        dtype = dtype or policy.dtype
        self.policy_name = policy.name_or_path
        self.embed_scale = embedding_scale(decoder.embed_tokens.weight)
        self.draft_vocab: torch.Tensor | None = None  # (N,) int32: the ids that it drafts, see TokenCounts; None: all
        # in a tuple, the policy's modules do not become submodules
        self.policy = BorrowedModules(decoder.embed_tokens, decoder.rotary_emb, policy.get_output_embeddings(), config)
        self.fc = torch.nn.Linear(2 * width, width, bias=False)
        self.layer = decoder_layer(policy)
        # no first norm, as in EAGLE, so that SGLang and vLLM can serve it; the norm would give 2 % more tokens per
        # round, but a more expensive step
        if hasattr(self.layer, "input_layernorm"):
            self.layer.input_layernorm = torch.nn.Identity()
        for p in self.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * 0.5)
        self.to(policy.device, dtype)  # initialised on the host: the same weights on every device
        self.eval()  # it learns without dropout, whatever the policy's config says

    def forward(self, ids, features, angles, mask) -> torch.Tensor:
        """ids (B, T): x_{t+1}; features (B, T, D): h_t; angles: of positions t -> predictions of h_{t+1}, (B, T, D)."""
        x = self.fc(torch.cat([self.policy.embed(ids).detach() * self.embed_scale, features], -1))
        return self.run_layer(x, angles, mask)

    def run_layer(self, x, angles, mask, window: CacheWindow | None = None) -> torch.Tensor:
        """x (B, T, D) -> (B, T, D)."""
        cached = {"past_key_values": window, "use_cache": window is not None}
        return self.layer(x, attention_mask=mask, position_embeddings=angles, **cached)

    def angles(self, positions):
        """Return rotary cosines and sines of positions (B, T)."""
        return self.policy.rotary(self.fc.weight, positions)

    def head_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the live policy's head restricted to the draft vocabulary: weight (N, D), bias (N,) or None."""
        head = self.policy.head
        ids = slice(None) if self.draft_vocab is None else send(self.draft_vocab, head.weight.device)
        weight = head.weight[ids]
        bias = None if head.bias is None else head.bias[ids]
        factor = logit_scale(self.policy.config)
        if factor == 1:
            return weight, bias
        return weight * factor, None if bias is None else bias * factor

    def save(self, folder) -> None:
        """Write folder/drafter.safetensors. Raises UserError."""
        vocab = {} if self.draft_vocab is None else {"draft_vocab": self.draft_vocab}
        notes = {"policy": self.policy_name, "policy_fingerprint": fingerprint(self.policy.embed.weight)}
        save_weights({**self.plain_weights(), **vocab}, folder, notes=notes)

    def plain_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights converted for unscaled embeddings, as files and servers expect them."""
        weights = dict(self.state_dict())
        weights["fc.weight"] = weights["fc.weight"].clone()
        weights["fc.weight"][:, : self.width] *= self.embed_scale
        return weights

    @torch.no_grad()
    def load(self, folder) -> None:
        """Read folder/drafter.safetensors. Raises UserError."""
        path = Path(folder) / "drafter.safetensors"
        extras = load_weights(self, path, "a drafter (`make drafter` trains one)", ("draft_vocab",))
        self.fc.weight[:, : self.width] /= self.embed_scale
        self.draft_vocab = extras.get("draft_vocab")
        vocab = self.policy.config.vocab_size
        if self.draft_vocab is not None and not 0 <= self.draft_vocab.min() <= self.draft_vocab.max() < vocab:
            ids = f"token ids up to {self.draft_vocab.max()}, the policy has {vocab}"
            raise UserError(f"cannot load a drafter for this policy from {path}: it drafts {ids}")
        notes = read_notes(path)
        if not is_same_policy(notes.get("policy_fingerprint", ""), self.policy.embed.weight):
            made_for = f"{path} was made for another policy ({notes.get('policy')})"
            print(f"{made_for}: it will draft badly until it has been trained for this one", file=sys.stderr)


# ---------------------------------------------------------------- drafting, inside the engine


class EagleProposer(Proposer):
    """The drafter at work, with a one-layer cache beside the engine's. Entry t of a sequence holds (x_{t+1}, h_t).

    The entries of a prompt are computed once per group, when the group is admitted. After that, each round first
    catches up: every entry whose true feature has become known since is computed, overwriting the prediction that stood
    in its place. While rounds are speculative, that is at most k + 1 entries; after plain rounds, one per token decoded
    in them. So speculation can begin at any time without touching the policy.
    """

    needs_hidden = True
    needs_host = False
    # Draft tokens are sampled as if the logits were larger by this factor: a drafter that is unsure does better to bet
    # on what is likely. Tokens per round: base/ 7.11 -> 7.15 (k = 8), SmolLM2-135M 1.63 -> 1.65 (k = 4), and early in
    # its training 1.47 -> 1.52
    SHARPEN = 1.2
    # entries computed at once, of one sequence and of all: masks and activations of 12,000 would take gigabytes
    PIECE = 256
    ALL_PIECES = 4096

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.fused_layer: FusedLayer | None = None  # None: use the module itself
        self.fc: torch.Tensor | None = None  # (D, 2D), for unscaled embeddings
        self.input: JoinedLinear | PackedLinear | None = None  # the same as a layer
        self.head_weight: torch.Tensor | None = None  # (N, D) of the policy's head, times SHARPEN
        self.head_bias: torch.Tensor | None = None  # (N,)
        self.head: JoinedLinear | PackedLinear | None = None  # features (B, T, D) -> logits (B, T, N)
        self.draft_vocab: torch.Tensor | None = None  # as Drafter.draft_vocab
        self.cache: KVCache | None = None
        self.read_lens: list[int] = []  # per slot: how many entries were computed from true features

    def load_weights(self):
        """Copy the drafter's current weights. Return whether any copy has moved to a new address."""
        drafter = self.drafter
        before = [self.fc, self.head_weight, self.head_bias, self.draft_vocab]
        if self.fc is None:
            fused_layers = fuse([drafter.layer], drafter.policy.config, drafter.policy.rotary)
            self.fused_layer = fused_layers[0] if fused_layers else None
        elif self.fused_layer is not None:
            self.fused_layer.read_weights()
        weight, bias = drafter.head_weights()
        self.fc = refilled(self.fc, drafter.plain_weights()["fc.weight"])
        self.head_weight = refilled(self.head_weight, weight * self.SHARPEN)
        self.head_bias = refilled(self.head_bias, None if bias is None else bias * self.SHARPEN)
        self.input = as_one_linear([(self.fc, None)])
        self.head = as_one_linear([(self.head_weight, self.head_bias)])
        vocab = drafter.draft_vocab
        self.draft_vocab = refilled(self.draft_vocab, None if vocab is None else send(vocab, weight.device))
        after = [self.fc, self.head_weight, self.head_bias, self.draft_vocab]
        return any(new is not old for new, old in zip(after, before))

    def reserve(self, engine, slots, max_len):
        """Allocate the cache."""
        model = engine.model
        self.cache = KVCache(model.config, slots, max_len, model.dtype, model.device, layers=1)
        self.read_lens = [0] * slots

    def read_prompts(self, slots, tokens, hidden):
        """Compute the entries of the prompts that have just been prefilled in these slots."""
        length = hidden.shape[1]
        for begin in range(0, length, self.PIECE):
            end = min(length, begin + self.PIECE)
            begins = torch.full((len(tokens),), begin, device=tokens.device)
            self.compute_entries(slots, begins, tokens[:, begin + 1 : end + 1], hidden[:, begin:end], end)
        self.read_lens[slots] = [length] * len(tokens)

    def copy(self, source, targets, length):
        """Copy entries to other slots."""
        length = min(length, self.read_lens[source])
        self.cache.copy(source, targets, length)
        self.read_lens[targets] = [length] * (targets.stop - targets.start)

    def catch_up_len(self, running):
        """Return the largest number of entries that a sequence lacks; at least 1, since the last one is read again."""
        return max(1, *(sequence.length - read for sequence, read in zip(running, self.read_lens)))

    def caught_up(self, running):
        """Note that all entries up to the sequences' lengths are computed."""
        self.read_lens[: len(running)] = [sequence.length for sequence in running]

    def angles(self, positions):
        """Return the angles of positions (B, T), in the form that the layer wants."""
        if self.fused_layer is None:
            return self.drafter.angles(positions)
        return self.cache.angles(self.drafter.policy.rotary, positions)

    def forward(self, ids, features, angles, mask, window: CacheWindow) -> torch.Tensor:
        """As Drafter.forward, writing the cache's entries that `window` names."""
        x = self.input(torch.cat([self.drafter.policy.embed(ids), features], -1))
        if self.fused_layer is None:
            return self.drafter.run_layer(x, angles, mask, window)
        return self.fused_layer(x, mask, window, angles, 0)

    def compute_entries(self, slots, begins, ids, features, kv_len) -> torch.Tensor:
        """Compute T entries of each slot, from `begins` (B,) on: ids (B, T), features (B, T, D) -> (B, T, D)."""
        positions, mask, window = attention_inputs(self.cache, slots, begins, kv_len, ids.shape[1])
        return self.forward(ids, features, self.angles(positions), mask, window)

    def propose(self, engine, shape, draft_token):
        """Catch up, then draft k tokens one after the other -> (B, k)."""
        feature = self.catch_up(engine, shape)  # (B, 1, D): h' for position lens
        n, k = shape.batch_size, shape.plan.k
        # positions, masks and cache windows of all the single steps are made at once
        positions, mask, window = attention_inputs(self.cache, slice(0, n), engine.lens[:n], shape.kv_len, k)
        angles = list(zip(*(part.split(1, -2) for part in self.angles(positions))))
        masks = mask.view(n, 1, -1, k, mask.shape[-1]).unbind(3)
        windows = window.columns(k)
        drafts = []
        for depth in range(k):
            drafts.append(draft_token(depth, self.head(feature), self.draft_vocab))  # (B, 1)
            if depth + 1 < k:
                feature = self.forward(drafts[-1], feature, angles[depth], masks[depth], windows[depth])
        return torch.cat(drafts, 1)

    def catch_up(self, engine, shape) -> torch.Tensor:
        """Compute the entries that have got their true features -> the prediction of the last of them, (B, 1, D).

        All sequences compute as many of their last entries as the one that is furthest behind (shape.catch_up_len): an
        entry that is computed again comes out as it was, and what is written beyond the end of a sequence is
        overwritten before anyone reads it.
        """
        n, count = shape.batch_size, shape.catch_up_len
        rows = torch.arange(n, device=engine.lens.device)
        lens = engine.lens[:n]
        first = (lens - count).clamp(min=0)  # (B,)
        newest = lens - first - 1  # column of a sequence's last true feature; -1: it has none, and drafts from 0
        feature = torch.zeros((), device=lens.device)
        piece = min(self.PIECE, max(16, self.ALL_PIECES // n))
        for done in range(0, count, piece):
            width = min(piece, count - done)
            columns = (first + done)[:, None] + torch.arange(width, device=lens.device)
            columns = columns.clamp(max=engine.tokens.shape[1] - 2)
            ids = engine.tokens[:n].gather(1, columns + 1)
            features = engine.hidden[rows[:, None], columns]
            out = self.compute_entries(slice(0, n), first + done, ids, features, shape.kv_len)
            here = (newest >= done) & (newest < done + width)
            last = out[rows, (newest - done).clamp(0, width - 1)]  # (B, D)
            feature = torch.where(here[:, None], last, feature)
        return feature[:, None]


def refilled(buffer: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor | None:
    """Return the value, written into the buffer if that has the same shape, so that its address stays."""
    if buffer is None or value is None or buffer.shape != value.shape:
        return value
    return buffer.copy_(value)


# ---------------------------------------------------------------- training


def drafter_loss(drafter: Drafter, batch: PackedBatch, feature_weight: float = 0.5, own: float = 0.5):
    """Return the loss and the share of entries whose likeliest token is the policy's.

    own: share of the entries that see a predicted feature in place of the true one.
    """
    ids, features, targets, positions, sequence_ids, learned = batch
    config = drafter.policy.config
    groups = config.num_attention_heads // kv_heads(config)
    wanted = targets[0][learned]
    # float32 weights beside a bfloat16 policy
    with torch.autocast(features.device.type, torch.bfloat16, enabled=features.dtype == torch.bfloat16):
        mask = block_mask(sequence_ids, positions, groups, features.dtype)
        angles = drafter.angles(positions)
        with torch.no_grad():
            weight, bias = drafter.head_weights()
            p = F.linear(wanted, weight, bias).float().softmax(-1)
            if own:
                predicted = drafter(ids, features, angles, mask).roll(1, dims=1)  # entry t - 1 predicts h_t
                swap = send(torch.rand(ids.shape) < own, ids.device) & (positions > 0)  # random numbers of the host
                features = torch.where(swap[..., None], predicted.to(features.dtype), features)
        predicted = drafter(ids, features, angles, mask)[0][learned]
        logits = F.linear(predicted, weight, bias).float()
    cross_entropy = -(p * logits.log_softmax(-1)).sum(-1).mean()
    loss = cross_entropy + feature_weight * F.smooth_l1_loss(predicted.float(), wanted.float())
    return loss, (logits.argmax(-1) == p.argmax(-1)).float().mean()


def scaled_lr(width: int, at_128: float = 3e-3) -> float:
    """Return the learning rate of a drafter of that width: in inverse proportion to it, from the rate that is best at
    128. At 576 that is 7e-4, where 2e-3 learns worse and 3e-4 slower.
    """
    return at_128 * min(1.0, 128 / width)


class DrafterTrainer:
    """The drafter's optimizer. Training can be stopped at any time between two calls of `step`.

    The weights that draft best are not the last ones but their running average (which does what a falling learning rate
    does, without an end to fall towards): see `publish`.
    """

    WARMUP = 20  # steps

    def __init__(self, drafter: Drafter, tokens: int = 512, seed: int = 0, keep: float = 0.99):
        self.drafter = drafter
        self.lr = scaled_lr(drafter.policy.config.hidden_size)
        self.tokens = tokens  # of a batch
        self.keep = keep  # of the average in a step
        self.rng = random.Random(seed)
        self.steps = 0
        parameters = list(drafter.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.average = [p.detach().clone() for p in parameters]

    def step(self, buffer: FeatureBuffer) -> tuple[float, float]:
        """Make one training step on the buffer -> (loss, agreement). If the gradient is not finite, nothing changes,
        and both are nan.
        """
        device = self.drafter.fc.weight.device
        loss, agreement = drafter_loss(self.drafter, buffer.pack(self.tokens, self.rng).on(device))
        parameters = list(self.drafter.parameters())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=parameters)  # no gradient reaches the borrowed head
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        figures = torch.stack([loss.detach(), agreement, norm]).tolist()  # the host waits here, once
        if not all(map(math.isfinite, figures)):
            return math.nan, math.nan
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / self.WARMUP)
        self.optimizer.step()
        keep = min(self.keep, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, parameters, 1 - keep)
        return figures[0], figures[1]

    @torch.no_grad()
    def publish(self, drafter: Drafter) -> None:
        """Copy the averaged weights into a drafter, e.g. the one in the engine."""
        for p, mean in zip(drafter.parameters(), self.average):
            p.copy_(mean)


def fit(trainer: DrafterTrainer, buffer: FeatureBuffer, seconds: float, progress: bool = True) -> tuple[float, float]:
    """Train for so many seconds, the learning rate falling to 0 in the second half -> mean loss and agreement at the
    end.
    """
    full_lr = trainer.lr
    end = time.time() + seconds
    recent: deque[tuple[float, float]] = deque(maxlen=50)
    bar = tqdm(total=round(seconds), unit="s", desc="drafter", disable=not progress, mininterval=1)
    while (left := end - time.time()) > 0:
        trainer.lr = full_lr * min(1.0, 2 * left / seconds)
        recent.append(trainer.step(buffer))
        bar.update(min(round(seconds - left), bar.total) - bar.n)
        bar.set_postfix(loss=f"{recent[-1][0]:.3f}", steps=trainer.steps, refresh=False)
    bar.close()
    trainer.lr = full_lr
    losses, agreements = zip(*recent)
    return sum(losses) / len(recent), sum(agreements) / len(recent)


def collect(engine: Engine, groups: list[Group], sampling, buffer: FeatureBuffer, counts: TokenCounts) -> None:
    """Roll out the groups plainly: features go into the buffer, token ids are counted. engine: keeps hidden states."""
    total = sum(len(group.seeds) for group in groups)
    responses = engine.generate(groups, sampling)
    for response in tqdm(responses, total=total, desc="rollout", unit="response", mininterval=1):
        buffer.add(response)
        counts.add(response.tokens)


def warm_start(drafter, engine: Engine, groups, sampling: Sampling, seconds: float, seed: int, draft_vocab: int = 0):
    """Roll out the groups, train the drafter on the features, print the result. engine: keeps hidden states;
    draft_vocab: size of the draft vocabulary, see TokenCounts.choose.
    """
    buffer = FeatureBuffer(limit=4 << 30)
    counts = TokenCounts(engine.model.config.vocab_size, engine.stop_set)
    collect(engine, groups, sampling, buffer, counts)
    learn_from(buffer, counts, drafter, engine.model, seconds, seed, draft_vocab)


def learn_from(buffer, counts: TokenCounts, drafter, model, seconds: float, seed: int, draft_vocab: int = 0) -> None:
    """Train the policy's drafter on the features in the buffer, print the result. counts, draft_vocab: the draft
    vocabulary is chosen from them, see TokenCounts.choose.
    """
    drafter.draft_vocab = counts.choose(draft_vocab)
    learner = drafter
    if drafter.fc.weight.dtype is not torch.float32:  # in bfloat16 most steps would be rounded away
        learner = Drafter(model, torch.float32)
        learner.load_state_dict(drafter.state_dict())
        learner.draft_vocab = drafter.draft_vocab
    trainer = DrafterTrainer(learner, seed=seed)
    loss, agreement = fit(trainer, buffer, seconds)
    trainer.publish(drafter)
    how = f"{trainer.steps} steps in {seconds:.0f} s, {torch.get_num_threads()} threads"
    print(f"{how}, loss {loss:.3f}, likeliest token right {agreement:.1%}")


# ---------------------------------------------------------------- command line: warm start


@dataclass(frozen=True)
class Command(TaskFlags):
    """Settings, each a command-line flag."""

    model: str = flag("base", "policy: a folder or a hub name")
    out: str = flag("runs/drafter", "folder for drafter.safetensors")
    start: str = flag("", "continue from the drafter in this folder; empty: from random weights")
    prompts: int = flag(64, "prompts to roll out, 16 samples each")
    seconds: float = flag(60.0, "training time")
    draft_vocab: int = flag(0, "token ids that the drafter may draft; 0: all, of a large vocabulary those in use")
    k: int = flag(4, "draft length of the measurement before and after")
    max_new: int = flag(512, "longest response in tokens")
    dtype: str = flag("auto", "of the policy's weights: auto is bfloat16 on a GPU, float32 on a CPU", ACTOR_DTYPES)
    threads: int = flag(0, "threads of torch; 0: torch's own choice")
    seed: int = flag(0, "of samples, initial weights and batches")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "prompts", "max_new", "k")
        check_at_least(self, 0, "threads", "draft_vocab")
        check_above(self, 0, "seconds")


def main() -> None:
    """Warm-start a drafter for a policy from the policy's own rollouts.

    This is never required: a random drafter is a valid start for training (python tlt.py), which trains it along the
    way. Tokens per round on held-out prompts are printed before and after.
    """
    command = parse_flags(Command, main.__doc__)
    if command.threads:
        torch.set_num_threads(command.threads)
    torch.manual_seed(command.seed)
    task = make_task(command.task, command.data, command.columns)
    device = pick_device()
    model, tokenizer = load_actor(command.model, device, command.dtype)
    drafter = Drafter(model)
    if command.start:
        drafter.load(command.start)
    stop = stop_tokens(model, tokenizer)
    engine = Engine(model, stop, slots=64, proposers={"eagle": EagleProposer(drafter)}, keep_hidden=True)
    sampling = Sampling(max_new=command.max_new)

    def groups(split: str, prompts: int, samples: int) -> list[Group]:
        result = []
        for i in range(prompts):
            problem = task.problem(split, i)
            prompt = encode_prompt(problem, tokenizer, command.prompt_style, command.system, command.chat_args)
            seeds = [sequence_seed(command.seed, split, i, k) for k in range(samples)]
            result.append(Group(i, prompt, seeds))
        engine.reserve(max(len(group.prompt) for group in result) + command.max_new)
        return result

    def measure(when: str) -> None:
        for _ in engine.generate(groups("test", 16, 4), sampling, Strategy(DraftPlan("eagle", command.k))):
            pass
        print(f"{when}: {describe_stats(engine.stats)}")

    measure("before")
    responses = groups("train", command.prompts, 16)
    warm_start(drafter, engine, responses, sampling, command.seconds, command.seed, command.draft_vocab)
    measure("after")
    drafter.save(command.out)
    print(f"wrote {command.out}/drafter.safetensors")


if __name__ == "__main__":
    run(main)
