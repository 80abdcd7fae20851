"""The one-layer EAGLE drafter: guesses the policy's next tokens from its last hidden state, at a fraction of its cost.

    h' = layer(fc([embed(x_{t+1}); h_t]))          logits of token t+2 = lm_head(h')

h_t is the policy's last hidden state (after the final norm) at position t. The layer is of the policy's own class;
embedding, head and rotary angles are the LIVE policy's, by reference: they follow it for free and are never touched by
drafter training.

    training, entry t :   input (x_{t+1}, h_t)   ->   target h_{t+1} and softmax(lm_head(h_{t+1}))
    inference         :   over accepted tokens with the TRUE h; then k - 1 more steps on its own tokens and features

The shift is the classic trap: pairing (x_t, h_t) trains just as smoothly and guesses badly, since x_{t+1} is what h_t
was uncertain about.

    loss = soft cross-entropy + feature_weight * SmoothL1(h', h_{t+1})     (EAGLE, arXiv 2401.15077; responses only)

From the second guess on, inference feeds the drafter its own h', not the true h. Training shows it both: a first pass
without gradient guesses all features, and the trained pass sees, at a random half of the positions, the guess in place
of h_t (scheduled sampling, 1506.03099: a cheap form of EAGLE-3's training-time test). On base/, 60 s on one core:
3.69 -> 3.93 tokens per round at k = 4, 4.67 -> 5.72 at k = 8, although a step then costs a third more.

Legend: B live rows, T entries per row, N entries of a packed batch (parts/features.py), D model width.
Left out: EAGLE-3's fusion of three layers' features (the engine keeps one), a head of the drafter's own.
"""

import copy
import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from parts.cli import check_above, check_at_least, flag, parse_flags, run
from parts.devices import pick_device
from parts.engine.forward import logit_scale
from parts.engine.fused_layers import PACK_FROM, Linear, fuse, refilled
from parts.engine.interfaces import Draft, Drafts, Group, Strategy, describe_stats
from parts.engine.kv_cache import SlotCache, attend, kv_heads
from parts.engine.model_loading import load_model, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import load_weights, save_weights
from parts.training.drafter_data import FeatureBuffer, Packed, WordCounts, block_mask, scale_of
from rollout import Engine
from tasks import TaskFlags, encode_prompt, make_task

FEWEST = 512


PARTS = ("gate_proj", "up_proj", "down_proj")


def width_of(layer) -> int | None:
    """Inner width of a decoder layer's MLP; None where it is not of the usual kind, as in mixtures of experts."""
    mlp = getattr(layer, "mlp", None)
    if not all(isinstance(getattr(mlp, part, None), torch.nn.Linear) for part in PARTS):
        return None
    return mlp.down_proj.in_features


def widened(layer, config):
    """The decoder layer, made anew if its MLP is too narrow. config: the policy's."""
    width = width_of(layer)
    if width is None or width >= FEWEST or width != getattr(config, "intermediate_size", None):
        return layer
    config = copy.deepcopy(config)
    config.intermediate_size = FEWEST
    return type(layer)(config, layer_idx=0)


class PolicyParts(NamedTuple):
    """What a drafter borrows from the live policy."""

    embed: torch.nn.Module
    rotary: torch.nn.Module
    head: torch.nn.Module
    config: object


class Drafter(torch.nn.Module):
    """One decoder layer on top of [embedding; feature]. Its parameters are only its own; the policy's parts are
    borrowed.

    dtype: the policy's, unless given: one that learns beside a bfloat16 policy does so in float32.
    """

    def __init__(self, policy, dtype: torch.dtype | None = None):
        super().__init__()
        decoder = policy.get_decoder()
        config = policy.config
        width = self.width = config.hidden_size
        dtype = dtype or policy.dtype
        self.embed_scale = scale_of(decoder.embed_tokens.weight)
        self.words: torch.Tensor | None = None  # (N,) int32: ids that it may guess, see parts/vocabulary.py; None: all
        # in a tuple, the policy's modules do not become submodules
        self.policy = PolicyParts(decoder.embed_tokens, decoder.rotary_emb, policy.get_output_embeddings(), config)
        self.fc = torch.nn.Linear(2 * width, width, bias=False)
        self.layer = widened(type(decoder.layers[0])(config, layer_idx=0), config)
        # no first norm, as in EAGLE, so that SGLang and vLLM can serve it; with the norm 2 % more tokens a round, and a
        # dearer step
        if hasattr(self.layer, "input_layernorm"):
            self.layer.input_layernorm = torch.nn.Identity()
        for p in self.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * 0.5)
        self.to(policy.device, dtype)  # drawn on the host: the same weights whatever the device

    def forward(self, ids, features, angles, mask, cache: SlotCache | None = None) -> torch.Tensor:
        """ids (B, T): x_{t+1}; features (B, T, D): h_t; angles: of positions t -> guesses of h_{t+1}, (B, T, D)."""
        return self.through_layer(self.enter(ids, features), angles, mask, cache)

    def through_layer(self, x, angles, mask, cache: SlotCache | None) -> torch.Tensor:
        """x (B, T, D) -> (B, T, D)."""
        cached = {"past_key_values": cache, "use_cache": cache is not None}
        return self.layer(x, attention_mask=mask, position_embeddings=angles, **cached)

    def enter(self, ids, features) -> torch.Tensor:
        """The layer's input, (B, T, D)."""
        return self.fc(torch.cat([self.policy.embed(ids).detach() * self.embed_scale, features], -1))

    def angles(self, positions):
        """Rotary cosines and sines of positions (B, T)."""
        return self.policy.rotary(self.fc.weight, positions)

    def head_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight (N, D), bias (N,) or None) of the live policy's head, of the drafter's words."""
        head = self.policy.head
        words = slice(None) if self.words is None else self.words.to(head.weight.device)
        weight = head.weight[words]
        bias = None if head.bias is None else head.bias[words]
        factor = logit_scale(self.policy.config)
        if factor == 1:
            return weight, bias
        return weight * factor, None if bias is None else bias * factor

    def save(self, folder) -> None:
        """Write folder/drafter.safetensors. Raises UserError."""
        words = {} if self.words is None else {"words": self.words}
        save_weights({**self.plain_weights(), **words}, folder)

    def plain_weights(self) -> dict[str, torch.Tensor]:
        """The weights for embeddings that are not scaled, as files and servers want them."""
        weights = dict(self.state_dict())
        weights["fc.weight"] = weights["fc.weight"].clone()
        weights["fc.weight"][:, : self.width] *= self.embed_scale
        return weights

    @torch.no_grad()
    def load(self, folder) -> None:
        """Read folder/drafter.safetensors. Raises UserError."""
        path = Path(folder) / "drafter.safetensors"
        extras = load_weights(self, path, "a drafter (`make drafter` trains one)", ("words",))
        self.fc.weight[:, : self.width] /= self.embed_scale
        self.words = extras.get("words")


# ---------------------------------------------------------------- guessing, inside the engine


class LearnedDrafts(Drafts):
    """The drafter at work, with a one-layer slot cache beside the engine's. Entry t of a row holds (x_{t+1}, h_t).

    Each round first catches up: every entry that now has its true feature is computed, over the last round's guesses.
    After plain rounds, or right after prefill, that gap is just longer: speculation can begin at any time without
    touching the policy.
    """

    needs_hidden = True
    asks_host = False
    # Guesses are drawn as if from logits so much larger: one who is not sure does better to bet on what is likely. More
    # tokens per round: base/ 7.11 -> 7.15 (k = 8), SmolLM2-135M 1.63 -> 1.65 (k = 4), soon after the start 1.47 -> 1.52
    SHARPEN = 1.2
    PIECE = 256  # columns caught up with at once: the mask of 12,000 at once would take gigabytes

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.fused_layer = None  # a FusedLayer, or None: the module itself
        self.fc: torch.Tensor | None = None  # (D, 2D), for embeddings as they are
        self.rows: torch.Tensor | None = None  # (N, D) of the policy's head
        self.bias: torch.Tensor | None = None  # (N,)
        self.head: Linear | None = None  # features (B, T, D) -> logits (B, T, N)
        self.words: torch.Tensor | None = None  # as Drafter.words
        self.cache: SlotCache | None = None
        self.true_entries: list[int] = []  # of each slot: entries that were made from true features

    def begin(self):
        """As Drafts.begin: take the drafter's weights as they are now."""
        before = [self.fc, self.rows, self.bias, self.words]
        if self.fc is None:
            fused_layers = fuse([self.drafter.layer], self.drafter.policy.config, self.drafter.policy.rotary)
            self.fused_layer = fused_layers[0] if fused_layers else None
        elif self.fused_layer is not None:
            self.fused_layer.read()
        self.fc = refilled(self.fc, self.drafter.plain_weights()["fc.weight"])
        rows, bias = self.drafter.head_rows()
        self.rows = refilled(self.rows, rows * self.SHARPEN)
        self.bias = None if bias is None else refilled(self.bias, bias * self.SHARPEN)
        self.head = Linear([(self.rows, self.bias)], pack=rows.numel() >= PACK_FROM)
        words = self.drafter.words
        self.words = None if words is None else refilled(self.words, words.to(rows.device))
        return any(new is not old for new, old in zip((self.fc, self.rows, self.bias, self.words), before))

    def reserve(self, engine, slots, room):
        """As Drafts.reserve."""
        model = engine.model
        self.cache = SlotCache(model.config, slots, room, model.dtype, model.device, layers=1)
        self.true_entries = [0] * slots

    def admit(self, rows):
        """As Drafts.admit."""
        self.true_entries[rows] = [0] * (rows.stop - rows.start)

    def move(self, source, target):
        """As Drafts.move."""
        self.cache.move(source, slice(target, target + 1), self.true_entries[source])
        self.true_entries[target] = self.true_entries[source]

    def angles(self, positions):
        """Of positions (B, T), as the layer wants them."""
        if self.fused_layer is None:
            return self.drafter.angles(positions)
        return self.cache.angles(self.drafter.policy.rotary, positions)

    def forward(self, ids, features, angles, mask) -> torch.Tensor:
        """As Drafter.forward, on the cache's next entries, which `attend` has placed."""
        x = F.linear(torch.cat([self.drafter.policy.embed(ids), features], -1), self.fc)
        if self.fused_layer is None:
            return self.drafter.through_layer(x, angles, mask, self.cache)
        return self.fused_layer(x, mask, self.cache, angles, 0)

    def missing(self, live):
        """As Drafts.missing."""
        ends = [row.length for row in live]
        gap = max(1, *(end - true for end, true in zip(ends, self.true_entries)))
        self.true_entries[: len(ends)] = ends
        return gap

    def propose(self, engine, shape, guess):
        """As Drafts.propose: catch up, then k - 1 single steps."""
        feature = self.catch_up(engine, shape)  # (B, 1, D): h' for position lens
        n, k = shape.rows, shape.draft.k
        # angles, masks and slots of all the single steps at once
        positions, mask = attend(self.cache, slice(0, n), engine.lens[:n], shape.view, k)  # (B, k), (B, 1, groups*k, S)
        angles = list(zip(*(part.split(1, -2) for part in self.angles(positions))))
        masks = mask.view(n, 1, -1, k, shape.view).unbind(3)
        slots = self.cache.flat.view(n, -1, k).movedim(-1, 0).flatten(1)  # (k, B * kv heads)
        drafts = []
        for depth in range(k):
            drafts.append(guess(depth, self.head(feature), self.words))  # (B, 1)
            if depth + 1 < k:
                self.cache.flat = slots[depth]
                feature = self.forward(drafts[-1], feature, angles[depth], masks[depth])
        return torch.cat(drafts, 1)

    def catch_up(self, engine, shape) -> torch.Tensor:
        """Compute the entries that have got their true features -> what the last of them guesses, (B, 1, D).

        All rows compute as many of their last entries as the row that is furthest behind (shape.gap): what a row
        computes again comes out as it was, and what stands beyond its end is overwritten before anyone looks.
        """
        n, gap = shape.rows, shape.gap
        rows = torch.arange(n, device=engine.lens.device)
        lens = engine.lens[:n]
        first = (lens - gap).clamp(min=0)  # (B,)
        newest = lens - first - 1  # the column of a row's last true feature; -1: it has none, and guesses from 0
        feature = torch.zeros((), device=lens.device)
        for done in range(0, gap, self.PIECE):
            width = min(self.PIECE, gap - done)
            columns = (first + done)[:, None] + torch.arange(width, device=lens.device)
            columns = columns.clamp(max=engine.tokens.shape[1] - 2)
            positions, mask = attend(self.cache, slice(0, n), first + done, shape.view, width)
            ids = engine.tokens[:n].gather(1, columns + 1)
            out = self.forward(ids, engine.hidden[rows[:, None], columns], self.angles(positions), mask)
            here = (newest >= done) & (newest < done + width)
            last = out[rows, (newest - done).clamp(0, width - 1)]  # (B, D)
            feature = torch.where(here[:, None], last, feature)
        return feature[:, None]


# ---------------------------------------------------------------- training


def drafter_loss(drafter: Drafter, batch: Packed, feature_weight: float = 0.5, own: float = 0.5):
    """-> (loss, share of entries whose likeliest token is the policy's). own: share that see a guessed feature."""
    ids, features, targets, positions, owner, counted = batch
    config = drafter.policy.config
    groups = config.num_attention_heads // kv_heads(config)
    wanted = targets[0][counted]
    # float32 weights beside a bfloat16 policy
    with torch.autocast(features.device.type, torch.bfloat16, enabled=features.dtype == torch.bfloat16):
        mask = block_mask(owner, positions, groups, features.dtype)
        angles = drafter.angles(positions)
        with torch.no_grad():
            weight, bias = drafter.head_rows()
            p = F.linear(wanted, weight, bias).float().softmax(-1)
            if own:
                guess = drafter(ids, features, angles, mask).roll(1, dims=1)  # entry t - 1 guesses h_t
                swap = (torch.rand(ids.shape) < own).to(ids.device) & (positions > 0)  # drawn on the host, too
                features = torch.where(swap[..., None], guess.to(features.dtype), features)
        guessed = drafter(ids, features, angles, mask)[0][counted]
        logits = F.linear(guessed, weight, bias).float()
    cross_entropy = -(p * logits.log_softmax(-1)).sum(-1).mean()
    loss = cross_entropy + feature_weight * F.smooth_l1_loss(guessed.float(), wanted.float())
    return loss, (logits.argmax(-1) == p.argmax(-1)).float().mean()


def rate_for(width: int, at_128: float = 3e-3) -> float:
    """Learning rate of a drafter of that width: in inverse proportion to it, from the rate that is best at 128. At 576
    that is 7e-4, where 2e-3 learns worse and 3e-4 slower.
    """
    return at_128 * min(1.0, 128 / width)


class Trainer:
    """The drafter's optimizer. Training can be stopped at any time between two calls of `step`.

    What guesses best is not the last weights but their running average (it does what a falling learning rate does,
    without an end to fall towards): `publish`.
    """

    WARMUP = 20  # steps

    def __init__(self, drafter: Drafter, tokens: int = 512, seed: int = 0, keep: float = 0.99):
        self.drafter = drafter
        self.lr = rate_for(drafter.policy.config.hidden_size)
        self.tokens = tokens  # of a batch
        self.keep = keep  # of the average in a step
        self.rng = random.Random(seed)
        self.steps = 0
        parameters = list(drafter.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.average = [p.detach().clone() for p in parameters]

    def step(self, buffer: FeatureBuffer) -> tuple[float, float]:
        """One micro-step on the buffer -> (loss, agreement)."""
        device = self.drafter.fc.weight.device
        batch = Packed(*(x.to(device) for x in buffer.pack(self.tokens, self.rng)))
        loss, agreement = drafter_loss(self.drafter, batch)
        parameters = list(self.drafter.parameters())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=parameters)  # nothing reaches the borrowed head
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / self.WARMUP)
        self.optimizer.step()
        keep = min(self.keep, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, parameters, 1 - keep)
        return loss.item(), agreement.item()

    @torch.no_grad()
    def publish(self, drafter: Drafter) -> None:
        """Give a drafter, e.g. the one in the engine, the averaged weights."""
        for p, mean in zip(drafter.parameters(), self.average):
            p.copy_(mean)


def fit(trainer: Trainer, buffer: FeatureBuffer, seconds: float, progress: bool = True) -> tuple[float, float]:
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


def collect(engine: Engine, groups: list[Group], sampling: Sampling, buffer: FeatureBuffer, words: WordCounts) -> None:
    """Roll out the groups plainly: features go into the buffer, tokens are counted. engine: keeps hidden states."""
    total = sum(len(group.seeds) for group in groups)
    responses = engine.generate(groups, sampling)
    for response in tqdm(responses, total=total, desc="rollout", unit="response", mininterval=1):
        buffer.add(response)
        words.add(response.tokens)


def warm_start(drafter, engine: Engine, groups, sampling: Sampling, seconds: float, seed: int, draft_vocab: int = 0):
    """Roll out the groups, train the drafter on the features, say how it went. engine: keeps hidden states;
    draft_vocab: as WordCounts.choose.
    """
    buffer = FeatureBuffer(limit=4 << 30)
    words = WordCounts(engine.model.config.vocab_size, engine.stop_set)
    collect(engine, groups, sampling, buffer, words)
    drafter.words = words.choose(draft_vocab)
    trainer = Trainer(drafter, seed=seed)
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
    start: str = flag("", "go on from the drafter in this folder; empty: from random weights")
    prompts: int = flag(64, "prompts to roll out, 16 samples each")
    seconds: float = flag(60.0, "training time")
    draft_vocab: int = flag(0, "words that the drafter may guess; 0: all, of a large vocabulary those that are used")
    k: int = flag(4, "draft length of the measurement before and after")
    max_new: int = flag(512, "longest response in tokens")
    threads: int = flag(0, "threads of torch; 0: torch's own choice")
    seed: int = flag(0, "of samples, initial weights and batches")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "prompts", "max_new", "k")
        check_at_least(self, 0, "threads", "draft_vocab")
        check_above(self, 0, "seconds")


def main() -> None:
    """Warm-start a drafter for a policy from the policy's own rollouts.

    Nobody has to: a random drafter is a valid start for training (python tlt.py), which trains it along.
    Tokens per round on held-out prompts are printed before and after.
    """
    command = parse_flags(Command, main.__doc__)
    if command.threads:
        torch.set_num_threads(command.threads)
    torch.manual_seed(command.seed)
    task = make_task(command.task, command.data, command.columns)
    model, tokenizer = load_model(command.model, pick_device())
    drafter = Drafter(model)
    if command.start:
        drafter.load(command.start)
    stop = stop_tokens(model, tokenizer)
    engine = Engine(model, stop, slots=64, drafters={"learned": LearnedDrafts(drafter)}, keep_hidden=True)
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
        for _ in engine.generate(groups("test", 16, 4), sampling, Strategy(Draft("learned", command.k))):
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
