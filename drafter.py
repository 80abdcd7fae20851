"""The one-layer EAGLE drafter: guesses the policy's next tokens from its last hidden state, at a fraction of its cost.

    h' = layer(fc([embed(x_{t+1}); h_t]))          logits of token t+2 = lm_head(h')

h_t is the policy's last hidden state (after the final norm) at position t. The layer is of the policy's own class; embedding, head and rotary angles are
the LIVE policy's, by reference: they follow it for free and are never touched by drafter training.

    training row t :   input (x_{t+1}, h_t)   ->   target h_{t+1} and softmax(lm_head(h_{t+1}))
    inference      :   over accepted tokens with the TRUE h; then k - 1 more steps on its own tokens and features

The shift is the classic trap: pairing (x_t, h_t) trains just as smoothly and guesses badly, since x_{t+1} is what h_t was uncertain about.

    loss = soft cross-entropy + feature_weight * SmoothL1(h', h_{t+1})       (EAGLE, arXiv 2401.15077; masked to the response)

From the second guess on, inference feeds the drafter its own h', not the true h. Training shows it both: a first pass without gradient guesses all features,
and the trained pass sees, at a random half of the positions, the guess in place of h_t (scheduled sampling, 1506.03099: a cheap form of EAGLE-3's
training-time test). On base/, 60 s on one core: 3.69 -> 3.93 tokens per round at k = 4, 4.67 -> 5.72 at k = 8, although a step then costs a third more.

Several sequences are packed into one row: positions restart, a block-diagonal mask keeps them apart, and the last position of each has no target.

Left out: EAGLE-3's fusion of three layers' features (the engine keeps one), a reduced draft vocabulary, a separate draft head.
"""

import argparse
import json
import os
import random
import time
from collections import deque
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from rollout import Draft, Engine, Group, Sampling, SlotCache, attend, fuse, kv_heads, load_model, narrow, report, run, sequence_seed, signed, stop_tokens
from tasks import UserError, encode_prompt, make_task


class Drafter(torch.nn.Module):
    """One decoder layer on top of [embedding; feature]. Its parameters are only its own; the policy's parts are borrowed.

    dtype: the policy's, unless given: one that learns beside a bfloat16 policy does so in float32.
    """

    def __init__(self, policy, dtype=None):
        super().__init__()
        decoder, config = policy.get_decoder(), policy.config
        device, dtype = policy.device, dtype or policy.dtype
        self.borrowed = (decoder.embed_tokens, decoder.rotary_emb, policy.get_output_embeddings(), config)  # a tuple: not registered as submodules
        self.fc = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False, device=device, dtype=dtype)
        self.layer = type(decoder.layers[0])(config, layer_idx=0).to(device, dtype)
        if hasattr(self.layer, "input_layernorm"):  # as in EAGLE, so that SGLang and vLLM can serve it; with the norm 2 % more tokens a round, and a dearer step
            self.layer.input_layernorm = torch.nn.Identity()
        for p in self.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * 0.5)

    def forward(self, ids, features, angles, mask, cache=None):
        """ids (B, T): tokens x_{t+1}; features (B, T, D): h_t; angles: of positions t -> guessed features h_{t+1}, (B, T, D)."""
        return self.layer(self.enter(ids, features), attention_mask=mask, past_key_values=cache, use_cache=cache is not None, position_embeddings=angles)

    def enter(self, ids, features):
        """The layer's input, (B, T, D)."""
        return self.fc(torch.cat([self.borrowed[0](ids).detach(), features], -1))

    def angles(self, positions):
        """Rotary cosines and sines of positions (B, T)."""
        return self.borrowed[1](self.fc.weight, positions)

    def logits(self, features):
        return self.borrowed[2](features)

    def save(self, folder):
        save_weights(self.state_dict(), folder)

    def load(self, folder):
        load_weights(self, Path(folder) / "drafter.safetensors", "a drafter (`make drafter`)")


def load_weights(module, path, what):
    try:
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load {what} for this policy from {path}: {str(error).splitlines()[0]}") from error


def save_weights(weights, folder, name="drafter.safetensors"):
    """Write the file in the folder, whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{name}.part", metadata={"format": "pt"})
    os.replace(folder / f"{name}.part", folder / name)


SERVERS = {"sglang": {"llama": "LlamaForCausalLMEagle", "qwen2": "Qwen2ForCausalLMEagle"}, "vllm": {"llama": "LlamaForCausalLM", "qwen2": "LlamaForCausalLM"}}


def export(drafter, folder, server):
    """Write the drafter as the EAGLE checkpoint that a server loads beside the policy: config.json and model.safetensors (it takes embedding and head from the policy).

    Names, shapes and settings follow the loaders in SGLang 0.5.23 (models/llama_eagle.py, qwen2_eagle.py) and vLLM 0.33 (models/llama_eagle.py, which vLLM names
    Eagle + architecture; Qwen2 runs there as a Llama with biases on q, k, v). Raises UserError for other kinds of policies: neither server has an EAGLE layer for them.
    """
    config, folder = drafter.borrowed[3], Path(folder)
    kind = config.model_type
    if kind not in SERVERS[server]:
        raise UserError(f"{server} serves EAGLE drafters of {', '.join(SERVERS[server])} policies, not of {kind}")
    settings = {k: v for k, v in config.to_dict().items() if k not in ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window", "dtype")}
    settings.update(architectures=[SERVERS[server][kind]], num_hidden_layers=1, torch_dtype=str(drafter.fc.weight.dtype).removeprefix("torch."))
    weights = {name.replace("layer.", "layers.0.", 1): w.cpu() for name, w in drafter.state_dict().items()}
    if server == "sglang":
        weights["fc.bias"] = torch.zeros_like(weights["fc.weight"][:, 0])  # its fc has one, which would stay random; vLLM's has none, and refuses it
    elif kind == "qwen2":
        settings.update(model_type="llama", attention_bias=False, qkv_bias=True)
    save_weights(weights, folder, "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings, indent=1))  # last: without it no server takes the folder for a model


# ---------------------------------------------------------------- guessing, inside the engine


class LearnedDrafts:
    """The drafter at work: its own one-layer slot cache beside the engine's. Entry t of a row holds (x_{t+1}, h_t).

    Each round first catches up: every entry that now has its true feature is (re)computed, which also overwrites last round's guesses. After plain rounds,
    or right after prefill, that gap is just longer: speculation can begin at any time without touching the policy.
    """

    needs_hidden, samples = True, True  # wants features; its guesses are samples of a q that it tells
    PIECE = 256  # columns caught up with at once: the mask of 12,000 at once would take gigabytes

    def __init__(self, drafter):
        self.drafter = drafter

    def begin(self):
        """A rollout begins: take the drafter's weights as they are now."""
        self.quick = fuse([self.drafter.layer], self.drafter.borrowed[3], self.drafter.borrowed[1])

    def run(self, ids, features, angles, mask):
        if self.quick is None:
            return self.drafter(ids, features, angles, mask, self.cache)
        return self.quick[0](self.drafter.enter(ids, features), mask, self.cache, angles, 0)

    def angles(self, positions):
        return self.drafter.angles(positions) if self.quick is None else signed(self.drafter.angles(positions))

    def reserve(self, engine, slots, room):
        self.cache = SlotCache(engine.model.config, slots, room, engine.model.dtype, engine.model.device, layers=1)
        self.have = [0] * slots  # entries of each row computed from true features
        self.known = torch.zeros(slots, dtype=torch.long, device=engine.model.device)  # the same where it is needed: copying it over would wait for the device

    def admit(self, rows):
        self.have[rows] = [0] * (rows.stop - rows.start)
        self.known[rows] = 0

    def move(self, source, target):
        self.cache.move(source, slice(target, target + 1), self.have[source])
        self.have[target] = self.have[source]
        self.known[target] = self.known[source]

    def propose(self, engine, n, k, width, noise, sampling):
        """k guesses for each of the n live rows -> tokens (n, k, width), best first, and for the ratio rule the logits they come from (n, k, V). noise (n, k+1, V) or 0."""
        rows, device = slice(0, n), engine.lens.device
        each, lens = torch.arange(n, device=device), engine.lens[rows]
        ends = [row.length for row in engine.live]
        gap = max(1, max(end - have for end, have in zip(ends, self.have)))
        have = self.known[rows].clone()
        self.have[:n], self.known[rows] = ends, lens
        at = (lens - have - 1).clamp(min=0)  # the column of a row's last true feature
        for done in range(0, gap, self.PIECE):
            part = min(self.PIECE, gap - done)
            columns = (have + done)[:, None] + torch.arange(part, device=device)  # beyond a row's own gap: stale, and overwritten before anyone looks
            columns = columns.clamp(max=engine.tokens.shape[1] - 2)
            positions, mask = attend(self.cache, rows, have + done, max(1, *ends), part)
            out = self.run(engine.tokens[rows].gather(1, columns + 1), engine.hidden[each[:, None], columns], self.angles(positions), mask)
            found = out[each, (at - done).clamp(0, part - 1)]
            feature = torch.where((at >= done)[:, None], found, feature) if done else found
        feature = feature[:, None]  # (n, 1, D), h' at position lens
        # angles, masks and slots of all the single steps at once
        positions, mask = attend(self.cache, rows, lens, max(ends) + k, k)  # (n, k), (n, 1, groups * k, view)
        angles = zip(*(a.split(1, -2) for a in self.angles(positions)))
        masks = mask.view(n, 1, -1, k, mask.shape[-1]).unbind(3)
        slots = self.cache.flat.view(n, -1, k).movedim(-1, 0).flatten(1)  # (k, n * heads)
        noises = noise.split(1, 1) if noise.ndim else [noise] * k
        tokens, logits = [], []
        for i, (turn, mask, slot) in enumerate(zip(angles, masks, slots)):
            logits.append(self.drafter.logits(feature))
            score = narrow(logits[-1], sampling)[1] + noises[i]
            tokens.append(score.argmax(-1, keepdim=True) if width == 1 else score.topk(width).indices)  # (n, 1, width)
            if i + 1 < k:
                self.cache.flat = slot
                feature = self.run(tokens[-1][..., 0], feature, turn, mask)
        return torch.cat(tokens, 1), torch.cat(logits, 1) if engine.verify == "ratio" else None


class NGramDrafts:
    """No parameters: what followed the longest recent suffix (n to 1 tokens), in this response or its siblings."""

    needs_hidden, samples = False, False
    reserve = admit = move = lambda self, *args: None

    def __init__(self, n=4):
        self.n, self.tables = n, {}

    def begin(self):
        self.tables = {}  # of the last rollout's prompts

    def propose(self, engine, n, k, width, noise, sampling):
        """As LearnedDrafts.propose; one guess per depth, and no logits."""
        found = []
        for row in engine.live:
            table = self.learn(row)
            tokens = row.tokens
            match = next((table[gram] for m in range(min(self.n, len(tokens)), 0, -1) if (gram := tuple(tokens[-m:])) in table), None)
            guess = match[0][match[1]:match[1] + k] if match else []
            found.append(guess + [0] * (k - len(guess)))
        drafts = torch.tensor(found, device=engine.lens.device)[..., None]  # (n, k, 1)
        return (drafts if width == 1 else drafts.expand(-1, -1, width)), None

    def learn(self, row):
        """Enter the row's new tokens in its prompt's table: suffix -> (the text, where it goes on). The newest occurrence wins."""
        table, tokens = self.tables.setdefault(tuple(row.group.prompt), {}), row.tokens
        for end in range(getattr(row, "learned", 1), len(tokens)):
            for m in range(1, min(self.n, end) + 1):
                table[tuple(tokens[end - m:end])] = (tokens, end)
        row.learned = max(1, len(tokens))
        return table


# ---------------------------------------------------------------- training


class FeatureBuffer:
    """Finished responses with their features, bounded by bytes: the oldest leave first. Each row carries the number of the rollout that made it."""

    LONGEST = 2048

    def __init__(self, limit=256 << 20):
        self.rows, self.bytes, self.limit, self.rollout = deque(), 0, limit, 0

    def begin(self, rollout):
        """A new rollout begins. Of the last one's rows the longest quarter stays, older ones go: the first to finish are short, and a drafter
        trained on them alone would forget the tail, which is where it is needed."""
        last = [row for row in self.rows if row[3] == self.rollout]
        bar = sorted(len(row[0]) for row in last)[len(last) * 3 // 4] if last else 0
        self.rows, self.rollout = deque(row for row in last if len(row[0]) >= bar), rollout
        self.bytes = sum(row[1].nbytes for row in self.rows)

    def add(self, response):
        """Keep response.prompt + tokens and response.hidden (L - 1, D): features of every position but the last."""
        if len(response.hidden) < 2:
            return  # one feature has no next one to predict
        row = (torch.tensor(response.prompt + response.tokens), response.hidden, len(response.prompt), self.rollout)
        self.rows.append(row)
        self.bytes += row[1].nbytes
        while self.bytes > self.limit and len(self.rows) > 1:
            self.bytes -= self.rows.popleft()[1].nbytes

    def pack(self, tokens, rng):
        """Random sequences, together about `tokens` long, as one packed batch. Of very long ones a random stretch of LONGEST: more would not fit the memory."""
        picked, total = [], 0
        while total < tokens:
            ids, hidden, start, _ = self.rows[rng.randrange(len(self.rows))]
            last = len(ids) - self.LONGEST
            first = rng.randint(min(last, max(0, start - self.LONGEST // 2)), last) if last > 0 else 0  # not in the prompt alone, where nothing is learned
            picked.append((ids[first:][:self.LONGEST], hidden[first:][:self.LONGEST - 1], max(0, start - first)))
            total += len(picked[-1][0])
        return pack(picked)


def pack(rows):
    """rows: (ids (L,), hidden (L-1, D), prompt length) -> ids (1, N), features, targets (1, N, D), positions (1, N), owner (N,), counted (N,).

    Entry t of a sequence holds x_{t+1}, h_t and the target h_{t+1}, for t = 0 .. L-3: the last feature has nothing to predict.
    """
    ids = torch.cat([x[1:-1] for x, _, _ in rows])
    features, targets = (torch.cat([h[cut] for _, h, _ in rows]) for cut in (slice(None, -1), slice(1, None)))
    lengths = [len(x) - 2 for x, _, _ in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
    starts = torch.tensor([p for _, _, p in rows]).repeat_interleave(torch.tensor(lengths))
    return ids[None], features[None], targets[None], positions[None], owner, positions >= starts - 2  # entry t guesses token t+2


def block_mask(owner, positions, groups, dtype):
    """Additive mask (1, 1, groups * N, N): an entry sees the earlier entries of its own sequence. Folded for `slot_attention`."""
    seen = (owner[:, None] == owner) & (positions[0][:, None] >= positions[0])
    mask = torch.zeros(seen.shape, dtype=dtype, device=owner.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat(groups, 1)[None, None]


def drafter_loss(drafter, batch, feature_weight=0.5, own=0.5):
    """-> (loss, share of entries whose likeliest token is the policy's). batch: see `pack`. own: share of entries that see a guessed feature."""
    ids, features, targets, positions, owner, counted = batch
    config = drafter.borrowed[3]
    groups = config.num_attention_heads // kv_heads(config)
    wanted = targets[0][counted]
    with torch.autocast(features.device.type, torch.bfloat16, enabled=features.dtype == torch.bfloat16):  # float32 weights beside a bfloat16 policy
        mask, angles = block_mask(owner, positions, groups, features.dtype), drafter.angles(positions)
        with torch.no_grad():
            p = drafter.logits(wanted).float().softmax(-1)
            if own:
                guess = drafter(ids, features, angles, mask).roll(1, dims=1)  # entry t - 1 guesses h_t
                swap = (torch.rand(ids.shape, device=ids.device) < own) & (positions > 0)
                features = torch.where(swap[..., None], guess.to(features.dtype), features)
        guessed = drafter(ids, features, angles, mask)[0][counted]
        logits = drafter.logits(guessed).float()
    loss = -(p * logits.log_softmax(-1)).sum(-1).mean() + feature_weight * torch.nn.functional.smooth_l1_loss(guessed.float(), wanted.float())
    return loss, (logits.argmax(-1) == p.argmax(-1)).float().mean()


class Trainer:
    """The drafter's optimizer. `step` is the micro-step between which training can be stopped at any time.

    What guesses best is not the last weights but their running average (it does what a falling learning rate does, without an end to fall towards): `publish`.
    """

    def __init__(self, drafter, lr=3e-3, tokens=512, seed=0, keep=0.99):
        self.drafter, self.tokens, self.rng, self.keep = drafter, tokens, random.Random(seed), keep
        self.optimizer = torch.optim.AdamW(drafter.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.average = [p.detach().clone() for p in drafter.parameters()]
        self.steps, self.lr, self.warmup = 0, lr, 20

    def step(self, buffer):
        """One micro-step on the buffer -> (loss, agreement)."""
        batch = [x.to(self.drafter.fc.weight.device) for x in buffer.pack(self.tokens, self.rng)]
        loss, agreement = drafter_loss(self.drafter, batch)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=list(self.drafter.parameters()))  # nothing reaches the borrowed head
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / self.warmup)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.drafter.parameters()), 1 - min(self.keep, self.steps / (self.steps + 10)))
        return loss.item(), agreement.item()

    @torch.no_grad()
    def publish(self, drafter):
        """Give a drafter, e.g. the one in the engine, the averaged weights."""
        for p, mean in zip(drafter.parameters(), self.average):
            p.copy_(mean)


def fit(trainer, buffer, seconds, progress=True):
    """Train for so many seconds, the learning rate falling to 0 in the second half. -> mean loss and agreement of the last steps."""
    end, recent, lr = time.time() + seconds, deque(maxlen=50), trainer.lr
    bar = tqdm(total=round(seconds), unit="s", desc="drafter", disable=not progress, mininterval=1)
    while (left := end - time.time()) > 0:
        trainer.lr = lr * min(1.0, 2 * left / seconds)
        recent.append(trainer.step(buffer))
        bar.update(min(round(seconds - left), bar.total) - bar.n)
        bar.set_postfix(loss=f"{recent[-1][0]:.3f}", steps=trainer.steps, refresh=False)
    bar.close()
    trainer.lr = lr
    return [sum(x) / max(1, len(recent)) for x in zip(*recent)]


def warm_start(drafter, engine, groups, sampling, seconds, seed):
    """Roll out the groups with the policy alone, train the drafter on its features, say how it went. engine: one that keeps hidden states."""
    buffer, trainer = FeatureBuffer(), Trainer(drafter, seed=seed)
    total = sum(len(g.seeds) for g in groups)
    for response in tqdm(engine.generate(groups, sampling), total=total, desc="rollout", unit="response", mininterval=1):
        buffer.add(response)
    loss, agreement = fit(trainer, buffer, seconds)
    trainer.publish(drafter)
    print(f"{trainer.steps} steps in {seconds:.0f} s, {torch.get_num_threads()} threads, loss {loss:.3f}, likeliest token right {agreement:.1%}")


# ---------------------------------------------------------------- command line: warm start, export


def main():
    flags = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=
                                    "train   warm-start a drafter for a policy from the policy's own rollouts. Nobody has to: a random drafter is a valid start\n"
                                    "export  write the drafter in --model/drafter (or --start) for SGLang and vLLM: --out/sglang, --out/vllm\n"
                                    "        (for stock transformers the folder of a policy that tlt.py has trained is complete: see custom_generate/generate.py)")
    flags.add_argument("command", nargs="?", default="train", choices=["train", "export"])
    flags.add_argument("--model", default="base")
    flags.add_argument("--out", default="runs/drafter", help="folder for drafter.safetensors, or for what is exported")
    flags.add_argument("--start", default="", help="go on from the drafter in this folder")
    flags.add_argument("--task", default="countdown")
    flags.add_argument("--data", default="")
    flags.add_argument("--prompt-style", default="auto")
    flags.add_argument("--prompts", type=int, default=64, help="prompts to roll out, 16 samples each")
    flags.add_argument("--seconds", type=float, default=60, help="training time")
    flags.add_argument("--k", type=int, default=4, help="draft length of the measurement before and after")
    flags.add_argument("--max-new", type=int, default=512)
    flags.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    for name in ("threads", "prompts", "seconds", "max_new"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    task, drafter = make_task(args.task, args.data), Drafter(model)
    if args.command == "export":
        drafter.load(args.start or Path(args.model) / "drafter")
        for server in SERVERS:
            export(drafter, Path(args.out) / server, server)
        return print(f"wrote {args.out}/sglang and {args.out}/vllm; as the draft model of {args.model}:\n"
                     f"  python -m sglang.launch_server --model {args.model} --speculative-algorithm EAGLE --speculative-draft-model-path {args.out}/sglang --speculative-num-steps 5 "
                     "--speculative-eagle-topk 1 --speculative-num-draft-tokens 6\n"
                     f'  vllm serve {args.model} --speculative-config \'{{"method": "eagle", "model": "{args.out}/vllm", "num_speculative_tokens": 5}}\'')
    if args.start:
        drafter.load(args.start)
    engine = Engine(model, stop_tokens(model, tokenizer), slots=64, drafters={"learned": LearnedDrafts(drafter)}, keep_hidden=True)
    sampling = Sampling(max_new=args.max_new)

    def groups(split, count, samples):
        found = [Group(i, encode_prompt(task.problem(split, i), tokenizer, args.prompt_style), [sequence_seed(args.seed, split, i, k) for k in range(samples)])
                 for i in range(count)]
        engine.reserve(max(len(g.prompt) for g in found) + args.max_new)
        return found

    def measure(when):
        list(engine.generate(groups("test", 16, 4), sampling, lambda live: Draft("learned", args.k)))
        print(f"{when}: {report(engine.stats)}")

    measure("before")
    warm_start(drafter, engine, groups("train", args.prompts, 16), sampling, args.seconds, args.seed)
    measure("after")
    drafter.save(args.out)
    print(f"wrote {args.out}/drafter.safetensors")


if __name__ == "__main__":
    run(main)
