"""GRPO, plain: a policy learns from its own graded samples. Runs alone in one process; tlt.py puts workers under the same loop.

One step:

    rollout   G samples from each of P prompts                                  rollout.py
    reward    r = 1 if the verifier accepts the answer, else 0                  tasks.py
    advantage A = (r - mean of its group) / std of its group                    a group whose rewards are all equal teaches nothing: A = 0
    update    maximise  sum_t w * min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)  - kl * w * k3,     rho = p(token) / p_old(token)

    loss      w, the weight of each token                     advantage
    grpo      1 / (number of responses * its length)          divided by std      DeepSeekMath, arXiv 2402.03300
    dr_grpo   1 / (number of responses * max_new)             not divided         no bias to short right / long wrong answers, 2503.20783
    dapo      1 / (number of tokens)                          divided by std      every token counts the same, 2503.14476

    k3        exp(d) - d - 1,  d = log p_ref - log p          an unbiased, positive estimate of KL(policy || reference)

Rules that keep the sums right (each has a test):
- The denominators are those of the whole mini-batch, worked out before it is cut: the loss does not depend on micro-batches or workers.
- Masks come from lengths, never from `!= pad`: the stop token is a decision and gets its gradient.
- Scoring uses the sampling temperature. The first update of a rollout takes its own log-probabilities as the old ones, so rho is exactly 1; the rollout's
  are compared with them (`gap_max` in metrics.jsonl: the alarm that rollout and trainer are the same policy) and serve as p_old in later updates.
- A gradient that is not finite changes nothing: that update is skipped and counted, and after three in a row training stops and names the last checkpoint.
- Only token ids cross from rollout to update. Who made a response, when, in which batch, must not reach the sums, so mini- and micro-batches are cut by content.

Left out: a critic, DAPO's dynamic sampling and overlong shaping, reward models, replay of old rollouts.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_optimizer_state_dict
from tqdm import tqdm

from report import Table, describe, draw_curves, draw_timeline, model_card, show_samples, summarise, trace
from rollout import Engine, Group, Sampling, load_model, run, sequence_seed, stop_tokens
from tasks import UserError, encode_prompt, make_task


def flag(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings, each a command-line flag."""
    model: str = flag("base", "policy to start from: a folder or a hub name")
    task: str = flag("countdown", "countdown, countdown-hard (numbers to 99, for real language models), chain (base/chain) or gsm8k")
    data: str = flag("", "gsm8k: a local folder with train.jsonl and test.jsonl instead of the hub")
    prompt_style: str = flag("auto", "how problems become prompts", ("auto", "trace", "chat", "base"))
    out: str = flag("runs/grpo", "folder for metrics.jsonl, curves.png, checkpoints and the final policy; without --resume an earlier run there is replaced")
    resume: bool = flag(False, "go on from the newest checkpoint in --out")
    seed: int = flag(0, "seed of prompts and samples")
    device: str = flag("auto", "cpu or cuda; auto takes a GPU if there is one", ("auto", "cpu", "cuda"))

    steps: int = flag(30, "RL steps")
    prompts: int = flag(16, "prompts per step")
    samples: int = flag(16, "samples per prompt, the group size G")
    max_new: int = flag(512, "longest response in tokens")
    temperature: float = flag(1.0, "sampling temperature, also used in scoring")
    slots: int = flag(64, "rows that a worker generates at once")

    loss: str = flag("grpo", "which weights and advantages (see above)", ("grpo", "dr_grpo", "dapo"))
    clip_low: float = flag(0.2, "how far the ratio may fall below 1")
    clip_high: float = flag(0.2, "how far the ratio may rise above 1 (dapo's authors use 0.28)")
    kl: float = flag(0.0, "weight of the KL penalty to the starting policy; 0 keeps no reference model")
    mask_truncated: bool = flag(False, "give no gradient to responses cut at max_new")
    lr: float = flag(1e-4, "learning rate, constant after the warm-up")
    warmup: int = flag(3, "updates until the learning rate is reached")
    grad_clip: float = flag(1.0, "largest gradient norm")
    epochs: int = flag(1, "passes over each rollout")
    minibatches: int = flag(1, "updates per pass")
    micro_tokens: int = flag(2048, "tokens, padding included, in one forward-backward")
    bf16: bool = flag(False, "bfloat16 autocast in the update (always on for GPUs)")

    eval_every: int = flag(15, "steps between evaluations (also before the first step and after the last); 0: never")
    eval_problems: int = flag(128, "held-out problems per evaluation")
    eval_samples: int = flag(4, "samples per held-out problem: pass@1 is their mean, pass@k for k up to this many")
    save_every: int = flag(10, "steps between checkpoints; the last two are kept")
    show_every: int = flag(10, "steps between printed samples; 0: never")

    def __post_init__(self):
        for name in ("steps", "prompts", "samples", "max_new", "slots", "epochs", "minibatches", "micro_tokens", "save_every",
                     "eval_problems", "eval_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: learning needs samples that differ, so it must be above 0")
        for name in ("lr", "kl", "clip_low", "clip_high", "grad_clip", "eval_every", "show_every", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be a number that is not negative")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; use --device cpu")


def parse_flags(config_class, description, argv=None):
    """A config from the command line. Unknown flags and wrong values exit with status 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config_class):
        name, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} [{f.default}]"
        if f.type in (bool, "bool"):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(name, type=f.type, default=f.default, choices=f.metadata["choices"], help=text)
    return config_class(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------- the mathematics


def advantages(rewards, loss):
    """rewards (P, G) float -> advantages (P, G); exactly 0 in groups whose rewards are all equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss != "dr_grpo":
        centred = centred / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), torch.zeros_like(rewards), centred)


def token_weights(lengths, loss, max_new):
    """lengths: of all responses of the mini-batch that count -> weight of a token of each, so that weighted sums are the loss."""
    if loss == "grpo":
        return [1 / (len(lengths) * n) for n in lengths]
    return [1 / (len(lengths) * max_new) if loss == "dr_grpo" else 1 / sum(lengths)] * len(lengths)


def policy_loss(logp, old, reference, advantage, weight, config):
    """Sum over tokens, all arguments (N,) -> scalar. reference is None without KL."""
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if reference is not None:
        d = reference - logp
        loss = loss + config.kl * (d.exp() - d - 1)
    return (weight * loss).sum()


def token_logprobs(model, responses, temperature):
    """Log-probability of every response token, concatenated (N,), under softmax(logits / temperature).

    Right padding under a causal mask needs no attention mask; only the response's positions go through the head.
    """
    longest = max(len(r.prompt) + len(r.tokens) for r in responses) - 1
    ids = torch.zeros(len(responses), longest, dtype=torch.long)
    picked = torch.zeros(len(responses), longest, dtype=torch.bool)
    for i, r in enumerate(responses):
        row = (r.prompt + r.tokens)[:-1]
        ids[i, :len(row)] = torch.tensor(row)
        picked[i, len(r.prompt) - 1:len(row)] = True  # the position before a token predicts it, the stop token included
    targets = torch.tensor([t for r in responses for t in r.tokens], device=model.device)
    logits = getattr(model, "logits_at", partial(logits_at, model))(ids.to(model.device), picked.to(model.device))  # a sharded model gathers its weights around its own method
    return -torch.nn.functional.cross_entropy(logits.float() / temperature, targets, reduction="none")


def logits_at(model, ids, picked):
    """ids (B, T), picked (B, T) bool -> logits (N, V) of the picked positions."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return model.get_output_embeddings()(hidden[picked])


def micro_batches(responses, tokens, workers):
    """Cut by content: like lengths together, at most `tokens` with padding, the heaviest first to the least loaded worker.

    -> a list of micro-batches for each worker. Depends on the responses alone, not on their order or origin.
    """
    batch, cut = [], []
    for r in sorted(responses, key=lambda r: (-len(r.prompt) - len(r.tokens), r.group, r.sample)):
        if batch and (len(batch) + 1) * (len(batch[0].prompt) + len(batch[0].tokens)) > tokens:
            cut.append(batch)
            batch = []
        batch.append(r)
    shares, load = [[] for _ in range(workers)], [0] * workers
    for batch in cut + [batch] * bool(batch):
        least = load.index(min(load))
        shares[least].append(batch)
        load[least] += len(batch) * (len(batch[0].prompt) + len(batch[0].tokens))
    return shares


def pass_at_k(n, right, k):
    """Unbiased chance that at least one of k samples is right, seen `right` of n (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ---------------------------------------------------------------- one process, and what the loop asks of it


class Clock:
    """Where a worker's time goes. It is in exactly one state at any moment, so the states' seconds sum to the whole. tell(state) hears of each call: a sign of life."""

    def __init__(self, tell=lambda state: None):
        self.spans, self.state, self.since, self.tell = [], "idle", time.time(), tell

    def enter(self, state):
        self.tell(state)
        if state != self.state:
            now = time.time()
            self.spans.append((self.state, self.since, now))
            self.state, self.since = state, now

    def take(self):
        """The spans (state, start, end) since the last call."""
        now = time.time()
        spans, self.spans, self.since = [*self.spans, (self.state, self.since, now)], [], now
        return spans


def bfloat16(model):
    """Its weights in bfloat16, in place. Not `model.bfloat16()`: that rounds the buffers, too, and rotary frequencies rounded to 8 bits are other angles far from the start."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


class Alone:
    """The loop's view of the workers, for one process. tlt.Team has the same members for many."""

    rank, size, sharded = 0, 1, False

    def __init__(self, config, tell=lambda state: None):
        self.clock, self.micro_tokens = Clock(tell), config.micro_tokens  # the latter falls when memory runs out
        self.device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"

    def prepare(self, model):
        """-> (the policy that learns, the one that generates). On a GPU the rollout runs on a bfloat16 copy of the fp32 policy; on a CPU on the policy itself."""
        model.to(self.device)
        return model, bfloat16(copy.deepcopy(model).requires_grad_(False)) if self.device != "cpu" else model

    def engine(self, actor, stop, slots, spare):
        return Engine(actor, stop, slots, spare=spare)

    def rollout(self, engine, groups, sampling, grade, progress):
        """All responses to the groups, graded, ordered by (group, sample). The same list on every worker. progress(number so far)."""
        done = []
        for r in self.work(engine, groups, sampling, grade):
            done.append(r)
            progress(len(done))
        return sorted(done, key=lambda r: (r.group, r.sample))

    def work(self, engine, groups, sampling, grade, choose=None):
        """This worker's responses, graded as they end. choose: see Engine.generate."""
        self.clock.enter("rollout")
        for r in engine.generate(groups, sampling, choose):
            self.clock.enter("reward")
            yield grade(r)
            self.clock.enter("rollout")

    def notes(self):
        """What this worker did for speculation since the last call, for the metrics."""
        return {}

    def save(self, out):
        """With each checkpoint: whatever the workers keep beside the policy."""

    def deploy(self, folder):
        """Into the final policy's folder: whatever else serves it."""

    def sum(self, tensors):
        """Add up each tensor over the workers, in place."""

    def everyone(self, value):
        """The values of all workers, a list by rank."""
        return [value]


# ---------------------------------------------------------------- the loop


def train(config, team):
    """The training loop; every worker runs it. Returns the summary as a dict (the same on every worker)."""
    out = Path(config.out)
    if team.rank == 0:
        prepare_folder(out, config)
    task = make_task(config.task, config.data)
    newest = newest_checkpoint(out) if config.resume or restarted() else None
    model, tokenizer = load_model(str(newest or config.model))  # on the host: a policy that is to be sharded may not fit a GPU whole
    model, actor = team.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first, metrics = load_state(newest, model, optimizer)
    if len(set(team.everyone(first))) > 1:
        raise UserError(f"--out {out}: not every worker finds the same checkpoint there; it must be a folder that all hosts share")
    model.generation_config.update(do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=config.max_new)  # `generate` as it was trained
    reference = load_model(config.model, team.device)[0].requires_grad_(False) if config.kl else None
    sampling = Sampling(temperature=config.temperature, max_new=config.max_new)
    # what the update will take beside the engine: gradients, for each token of a micro-batch three rows as wide as the vocabulary (at most 8 GB, since an update that
    # runs out of memory is cut finer; not if it is sharded), and, until the first one, room for Adam's moments
    weights = sum(p.numel() for p in model.parameters()) // (team.size if team.sharded else 1)
    spare = 4 * weights + min(math.inf if team.sharded else 8 << 30, 12 * config.micro_tokens * model.config.vocab_size)
    engine = team.engine(actor, stop_tokens(model, tokenizer), max(config.slots, config.samples, config.eval_samples), spare + 8 * weights * (newest is None))
    for split in ("train", "test"):  # mistakes show here, before anything runs
        engine.reserve(len(encode_prompt(task.problem(split, 0), tokenizer, config.prompt_style)) + config.max_new)
    say = tqdm.write if team.rank == 0 else lambda *a: None
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=team.rank > 0, dynamic_ncols=True, smoothing=0.1)
    table, history = Table(say), []

    shown = [0.0]

    def progress(text):
        if time.time() > shown[0] + 0.5:
            bar.set_postfix_str(text)
            shown[0] = time.time()

    def grade(response):
        split, index = response.group
        response.grade = task.grade(task.problem(split, index), tokenizer.decode(response.tokens, skip_special_tokens=False))
        return response

    def ask(split, indices, samples, *seed):
        """Responses to problems of a split, `samples` each; `seed` names this rollout."""
        prompts = [encode_prompt(task.problem(split, i), tokenizer, config.prompt_style) for i in indices]
        engine.reserve(max(map(len, prompts)) + config.max_new)
        groups = [Group((split, i), p, [sequence_seed(config.seed, *seed, i, k) for k in range(samples)]) for i, p in zip(indices, prompts)]
        total = len(groups) * samples
        return team.rollout(engine, groups, sampling, grade, lambda n: progress(f"{split} {n}/{total}"))

    def evaluate(step):
        started = time.time()
        graded = ask("test", range(config.eval_problems), config.eval_samples, "eval")  # the same noise each time: paired
        n = config.eval_samples
        right = [sum(r.grade.strict for r in graded[i:i + n]) for i in range(0, len(graded), n)]
        row = {"step": step, "eval": {f"pass@{k}": sum(pass_at_k(n, c, k) for c in right) / len(right) for k in sorted({1, n})},
               "lenient": sum(r.grade.lenient for r in graded) / len(graded), "problems": len(right), "samples": n,
               "length": sum(len(r.tokens) for r in graded) / len(graded), "seconds": time.time() - started}
        say(f"held-out at step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in row["eval"].items())
            + f", lenient {row['lenient']:.3f}, mean length {row['length']:.0f} ({len(right)} problems, {row['seconds']:.0f} s)")
        return row

    def keep(row):
        metrics.append(row)
        if team.rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    if team.rank == 0:  # steps after the checkpoint will be made again
        write_atomically(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))
    if config.eval_every and not first:
        keep(evaluate(0))
    bad = 0  # steps in a row with a gradient that is not finite
    for step in range(first, config.steps):
        team.clock.enter("rollout")
        started = time.time()
        indices = range(step * config.prompts, (step + 1) * config.prompts)
        responses = ask("train", indices, config.samples, step)
        team.clock.enter("update")
        rewards = torch.tensor([float(r.grade.strict) for r in responses]).view(config.prompts, config.samples)
        stats = update(model, reference, optimizer, responses, advantages(rewards, config.loss).flatten().tolist(), step, config, team)
        engine.spare = spare
        if actor is not model:
            for a, m in zip(actor.parameters(), model.parameters()):
                a.data.copy_(whole(m).data)
        team.clock.enter("idle")
        told = team.everyone((team.clock.take(), started, team.notes()))
        history.append((step + 1, [spans for spans, *_ in told]))  # with the evaluation and the checkpoint before the step
        spans = [[(state, max(start, began), end) for state, start, end in mine if end > began] for mine, began, _ in told]
        row = describe(step + 1, responses, rewards, stats, spans, [notes for *_, notes in told])
        keep(row)
        table.show(row, spans)
        bad = bad + 1 if row["skipped"] else 0
        if bad == 3:
            bar.close()
            raise UserError(f"step {step + 1}: the gradient was not finite in three steps in a row; lower --lr and --resume from {newest_checkpoint(out)}")
        bar.update()
        if config.show_every and (step + 1) % config.show_every == 0:
            show_samples(say, responses, tokenizer)
        if config.eval_every and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            keep(evaluate(step + 1))
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            team.clock.enter("checkpoint")
            states = get_state_dict(model, optimizer, options=WHOLE)  # of the policy and its optimizer, by the names of the weights, on rank 0
            if team.rank == 0:
                save_checkpoint(out, step + 1, model, tokenizer, states, metrics)
            team.save(out)
    bar.close()
    weights, summary = get_model_state_dict(model, options=WHOLE), summarise(metrics, config)
    if team.rank == 0:
        draw_curves(metrics, out / "curves.png", config)
        if history:
            draw_timeline({f"step {config.steps}": spans}, out / "timeline.png")
            write_atomically(out / "trace.json", trace(history))

        def fill(folder):  # all that deployment needs
            save_policy(folder, model, tokenizer, weights)
            (folder / "README.md").write_text(model_card(metrics, config))
            team.deploy(folder)

        save_folder(out / "policy", fill)
        say(summary["text"])
    return summary


def update(model, reference, optimizer, responses, advantage, step, config, team):
    """All optimizer steps on one rollout. responses: all workers' responses, in the same order everywhere; advantage: one number for each."""
    for r, a in zip(responses, advantage):
        r.advantage = a
    counted = [r for r in responses if r.stopped or not config.mask_truncated]
    found, norms = [], []
    model.train()
    for epoch in range(config.epochs):
        for part in range(config.minibatches):
            batch = counted[part::config.minibatches]  # strided: each mini-batch holds samples of every group
            if not batch:
                continue
            for r, w in zip(batch, token_weights([len(r.tokens) for r in batch], config.loss, config.max_new)):
                r.weight = w
            useful = [r for r in batch if r.advantage or config.kl]  # advantage 0 without KL: the gradient is exactly 0, so don't compute it
            found.append(gradients(model, reference, optimizer, useful, epoch == part == 0, config, team))
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
            if not team.sharded:
                team.sum(grads)
            for p, g in zip(model.parameters(), grads):
                p.grad = g
            norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)).item())
            done = step * config.epochs * config.minibatches + len(norms)  # updates so far, this one included
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, done / max(1, config.warmup))
            if math.isfinite(norms[-1]):  # the same on all workers
                optimizer.step()
            optimizer.zero_grad()
    model.eval()
    good = [n for n in norms if math.isfinite(n)]
    everyone = [stats for found in team.everyone(found) for stats in found]
    total = {name: sum(stats[name] for stats in everyone) for name in ("loss", "tokens", "clipped", "kl")}
    tokens = max(1.0, total["tokens"])
    return {"loss": total["loss"], "grad_norm": sum(good) / max(1, len(good)), "skipped": len(norms) - len(good), "gap_max": max((stats["gap_max"] for stats in everyone), default=0.0),
            "clipped": total["clipped"] / tokens, "kl": total["kl"] / tokens}


def gradients(model, reference, optimizer, responses, fresh, config, team):
    """Gradients of this worker's share of the responses, added up in the model -> statistics. When memory runs out the share is cut finer and done again."""
    shares = micro_batches(responses, config.micro_tokens, team.size)
    mine = shares[team.rank]
    if team.sharded:  # each forward gathers weights from all workers: all must do equally many, so fill up with a response that weighs nothing
        mine = mine + [[nothing(responses)] for _ in range(max(map(len, shares)) - len(mine))]
    while True:
        if team.micro_tokens < config.micro_tokens:  # only its own share: what the others do stays as it is
            mine = micro_batches([r for micro in mine for r in micro], team.micro_tokens, 1)[0]
        try:
            return accumulate(model, reference, mine, fresh, config, team)
        except torch.OutOfMemoryError:
            pass  # go on outside, where the failed try's tensors are gone
        optimizer.zero_grad()  # a part may be summed up already
        torch.cuda.empty_cache()
        if team.sharded:
            raise UserError(f"out of memory in the update: lower --micro-tokens {config.micro_tokens}")  # no worker can do its part again alone
        if max(len(micro) for micro in mine) == 1:
            raise UserError(f"out of memory in the update with a single response of {len(mine[0][0].prompt) + len(mine[0][0].tokens)} tokens: lower --max-new")
        team.micro_tokens //= 2
        tqdm.write(f"worker {team.rank}: out of memory in the update; it is done again with --micro-tokens {team.micro_tokens}")


def nothing(responses):
    """A copy of the shortest response with weight 0."""
    filler = replace(min(responses, key=lambda r: len(r.prompt) + len(r.tokens)))
    filler.advantage = filler.weight = 0.0
    return filler


def accumulate(model, reference, micros, fresh, config, team):
    """Forward and backward of this worker's micro-batches; gradients add up in the model -> statistics. fresh: the first update of a rollout, whose old policy is the present one."""
    stats = dict(loss=0.0, gap_max=0.0, tokens=0.0, clipped=0.0, kl=0.0)
    for micro in micros:
        team.clock.enter("update")
        with torch.autocast(model.device.type, torch.bfloat16) if config.bf16 or team.device != "cpu" else contextlib.nullcontext():
            logp = token_logprobs(model, micro, config.temperature)
            with torch.no_grad():
                ref = token_logprobs(reference, micro, config.temperature) if reference else None
        behaviour = torch.cat([r.logprobs for r in micro]).to(logp.device)
        each = torch.tensor([len(r.tokens) for r in micro], device=logp.device)
        spread = lambda name: torch.tensor([getattr(r, name) for r in micro], device=logp.device).repeat_interleave(each)
        loss = policy_loss(logp, logp.detach() if fresh else behaviour, ref, spread("advantage"), spread("weight"), config)
        loss.backward()
        if not micro[0].weight:
            continue
        with torch.no_grad():
            gap, ratio = (logp - behaviour).abs(), (logp - behaviour).exp()
            stats["loss"] += loss.item()
            stats["tokens"] += len(logp)
            if fresh:
                stats["gap_max"] = max(stats["gap_max"], gap.max().item())
            else:
                stats["clipped"] += ((ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)).sum().item()
            if ref is not None:
                stats["kl"] += ((ref - logp).exp() - (ref - logp) - 1).sum().item()
    return stats


# ---------------------------------------------------------------- files: everything appears whole or not at all


def restarted():
    """Whether torchrun has started this process again after a failure (--max-restarts): then it goes on from the newest checkpoint, if there is one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def prepare_folder(out, config):
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = json.loads((out / "config.json").read_text()) if config.resume and (out / "config.json").exists() else {}
        if changed := [f"{k} {before[k]} -> {v}" for k, v in asdict(config).items() if before.get(k, v) != v and k not in ("steps", "resume", "out")]:
            tqdm.write("goes on with other settings than before: " + ", ".join(changed))
        write_atomically(out / "config.json", json.dumps(asdict(config), indent=1))
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror or error})") from error
    if config.resume and not restarted() and newest_checkpoint(out, tqdm.write) is None:
        raise UserError(f"--resume: no checkpoint in {out}; start without it")
    if not config.resume and not restarted():
        for old in out.glob("checkpoint-??????"):  # or a later --resume could go on from another run
            shutil.rmtree(old)


def write_atomically(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save_folder(folder, fill):
    """Let `fill(path)` write a folder beside its final place, then rename it."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole(x):
    """A tensor that may be sharded, as a whole: a collective then."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def save_policy(folder, model, tokenizer, weights):
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


FORMAT = 2  # of checkpoints


def save_checkpoint(out, step, model, tokenizer, states, metrics):
    """checkpoint-NNNNNN: a Hugging Face folder plus optimizer.pt, state.json (step, metrics) and checksums.json. Seeds and data follow from the step, so they need no state.
    states: of policy and optimizer, whole, so that a sharded run can go on unsharded and the other way round."""
    def fill(folder):
        save_policy(folder, model, tokenizer, states[0])
        torch.save(states[1], folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "metrics": metrics}))
        (folder / "checksums.json").write_text(json.dumps({path.name: checksum(path) for path in sorted(folder.iterdir())}))

    try:
        save_folder(out / f"checkpoint-{step:06d}", fill)
    except Exception as error:  # disk full, read-only, ...: each library has its own type for it
        shutil.rmtree(out / f"checkpoint-{step:06d}.part", ignore_errors=True)
        raise UserError(f"--out {out}: cannot write the checkpoint of step {step} ({error}); the last one there: {newest_checkpoint(out)}") from error
    for old in sorted(out.glob("checkpoint-??????"))[:-2]:
        shutil.rmtree(old)


def checksum(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def damage(folder):
    """What is wrong with a checkpoint, in words; empty if nothing is."""
    try:
        sums = json.loads((folder / "checksums.json").read_text())
        if wrong := sorted({path.name for path in folder.iterdir()} - {"checksums.json"} ^ sums.keys()):
            return "missing or unknown: " + ", ".join(wrong)
        if wrong := [name for name, known in sums.items() if checksum(folder / name) != known]:
            return ", ".join(wrong)
        state = json.loads((folder / "state.json").read_text())
        return "" if state["format"] == FORMAT else f"format {state['format']}, wanted {FORMAT}"
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


def newest_checkpoint(out, say=lambda text: None):
    """The newest one that is whole, or None. Damaged ones are named."""
    for folder in sorted(out.glob("checkpoint-??????"), reverse=True):
        wrong = damage(folder)
        if not wrong:
            return folder
        say(f"{folder} is damaged ({wrong}) and is passed over")
    return None


def load_state(checkpoint, model, optimizer):
    """(first step to do, metrics so far); fills the optimizer."""
    if checkpoint is None:
        return 0, []
    state = json.loads((checkpoint / "state.json").read_text())
    set_optimizer_state_dict(model, optimizer, torch.load(checkpoint / "optimizer.pt", weights_only=True), options=WHOLE)
    return state["step"], state["metrics"]


def main():
    config = parse_flags(Config, __doc__)
    torch.manual_seed(config.seed)
    train(config, Alone(config))


if __name__ == "__main__":
    run(main)
