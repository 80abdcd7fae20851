"""Every speed in the README, measured side by side in one run: `python bench.py engine --json out.json`.

Parties take turns (A B A B ...) on the same cores, so that whatever else the machine does hits them alike; each figure is the median over the rounds, each
comparison a ratio of medians. (`paired` and `drafter` compare training runs, `scale` predicts; they say how.) Every sub-command prints one table and, with --json FILE, writes

    {"name": sub-command, "ratio": headline, "machine": {torch, threads, cores, cpu, gpu}, "rows": [...]}

with rows of

    engine       batch; tokens per second of engine, generate, continuous or prompt lookup and generate with drafter; ratio
    identity     sampling, mode, responses, identical, largest_logprob_gap, tokens_per_round
    speculation  workload, mode, tokens_per_second, ratio, tokens_per_round, draft_share, rounds, tokens
    spot         party, tokens_per_second; training, steps_per_second; packing and saving (seconds)
    scale        workers; predicted seconds plain and speculative; ratio, idle
    step         party, workers, digests, seconds per step: rollout, drafter, idle, update, step
    paired       phase, plain, tlt, ratio; then the checks: steps, identical, parted, evaluations, equal, reclaimed, preempted
    drafter      steps, adaptive, static
"""

import argparse
import heapq
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from custom_generate.generate import generate
from drafter import Drafter, FeatureBuffer, LearnedDrafts, NGramDrafts, Trainer, warm_start
from report import draw_timeline, pyplot
from rollout import Draft, Engine, Group, Sampling, load_model, run, sequence_seed, stop_tokens
from strategy import Bandit, Goodput, arms, bucket
from tasks import Countdown, UserError, encode_prompt
from tlt import fair_share
from train_grpo import WHOLE, get_state_dict, save_checkpoint, write_atomically


def machine():
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "cpu": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def take_turns(parties, rounds, title):
    """parties: name -> function returning a number of tokens. -> name -> (median tokens/s, tokens of the last round)."""
    found = {name: [] for name in parties}
    for _ in tqdm(range(rounds), desc=title, unit="round"):
        for name, party in parties.items():
            started = time.perf_counter()
            tokens = party()
            found[name].append((tokens / (time.perf_counter() - started), tokens))
    return {name: (statistics.median(speed for speed, _ in runs), runs[-1][1]) for name, runs in found.items()}


def groups_for(task, tokenizer, batch, seed, split="test"):
    """As in training: 16 samples a prompt. A batch of 1 is eight prompts, one after the other in one slot, so that it lasts long enough to time."""
    samples, prompts = (min(16, batch), max(1, batch // 16)) if batch > 1 else (1, 8)
    return [Group(i, encode_prompt(task.problem(split, i), tokenizer), [sequence_seed(seed, i, k) for k in range(samples)]) for i in range(prompts)]


def room(groups, args):
    return max(len(g.prompt) for g in groups) + args.max_new


def engine(args):
    """Our plain engine against Hugging Face generate, its continuous batching (generate_batch), and at batch 1 its prompt lookup: same model, prompts, temperature,
    limit, cores. Ratio: tokens per second, engine over the fastest of these, at the largest batch. Beside them, at batch 1: generate with our drafter (custom_generate/)."""
    model, tokenizer = load_model(args.model)
    stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    stop, rows, turn = stop_tokens(model, tokenizer), [], [0]
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new, eos_token_id=sorted(stop), pad_token_id=tokenizer.pad_token_id)
    for batch in args.batches:
        ours = Engine(model, stop, slots=batch)
        prompts = [g.prompt for g in groups_for(Countdown(), tokenizer, batch, 0) for _ in g.seeds]

        def mine():
            turn[0] += 1
            groups = groups_for(Countdown(), tokenizer, batch, (args.seed, turn[0]))
            ours.reserve(room(groups, args))
            return sum(len(r.tokens) for r in ours.generate(groups, Sampling(max_new=args.max_new)))

        def theirs(decode=stock.generate, **more):
            torch.manual_seed(args.seed + turn[0])
            made = 0
            for part in [prompts] if batch > 1 else [[p] for p in prompts]:
                padded = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
                with torch.inference_mode():
                    out = decode(**padded, **settings, **more)[:, padded["input_ids"].shape[1]:]
                ended = torch.isin(out, torch.tensor(sorted(stop))).cumsum(1)
                made += int((ended == 0).sum() + (ended[:, -1] > 0).sum())  # tokens up to and with the stop token
            return made

        def continuous():
            from transformers import GenerationConfig
            with torch.no_grad():  # it works in a thread of its own, and does not stand inference_mode
                out = stock.generate_batch(inputs=prompts, generation_config=GenerationConfig(**{**settings, "eos_token_id": max(stop)}), progress_bar=False)
            return sum(len(x.generated_tokens) for x in out.values())

        one = {"prompt lookup": lambda: theirs(prompt_lookup_num_tokens=4)}
        if (Path(args.model) / "drafter").exists():
            one["with drafter"] = lambda: theirs(partial(generate, stock))
        parties = {"engine": mine, "generate": theirs, **(one if batch == 1 else {"continuous": continuous})}
        speeds = {name: speed for name, (speed, _) in take_turns(parties, args.rounds, f"batch {batch}").items()}
        rows.append({"batch": batch, **speeds, "ratio": speeds["engine"] / max(v for k, v in speeds.items() if k in ("generate", "continuous", "prompt lookup"))})
    names = ("engine", "generate", "continuous", "prompt lookup", "with drafter")
    print(f"\ntokens per second\n{'batch':>6} " + " ".join(f"{n:>14}" for n in names) + f" {'ratio':>6}")
    for r in rows:
        print(f"{r['batch']:6d} " + " ".join(f"{r[n]:14.0f}" if n in r else " " * 14 for n in names) + f" {r['ratio']:6.2f}")
    return rows[-1]["ratio"], rows


def drafted_engine(args, batch, verify="coupled"):
    """(engine with a learned and an n-gram drafter, tokenizer). The drafter is that of --drafter, or the model's own, or warm-started here for --warm seconds."""
    model, tokenizer = load_model(args.model)
    torch.manual_seed(args.seed)
    drafter = Drafter(model)
    own = Path(args.model) / "drafter"
    if args.drafter or own.exists():
        drafter.load(args.drafter or own)
    else:
        groups = groups_for(Countdown(), tokenizer, 1024, args.seed, "train")
        source = Engine(model, stop_tokens(model, tokenizer), 64, room(groups, args), keep_hidden=True)
        warm_start(drafter, source, groups, Sampling(max_new=args.max_new), args.warm, args.seed)
        args.drafter = tempfile.mkdtemp()
        drafter.save(args.drafter)
    drafters = {"learned": LearnedDrafts(drafter), "n-gram": NGramDrafts()}
    return Engine(model, stop_tokens(model, tokenizer), slots=batch, drafters=drafters, verify=verify), tokenizer


def identity(args):
    """Speculative against plain decoding, token by token. Ratio: share of identical responses over all modes."""
    made, tokenizer = drafted_engine(args, 64)
    rng = random.Random(args.seed)
    modes = {**{f"chain {k}": Draft("learned", k) for k in range(1, 9)}, "tree 4x2": Draft("learned", 4, 2), "n-gram 4": Draft("n-gram", 4), "changing": None}
    rows = []
    for title, sampling, count in (("temperature 1", Sampling(max_new=args.max_new), args.responses), ("temperature 0", Sampling(0.0, max_new=args.max_new), 1024),
                                   ("top-p 0.9", Sampling(top_p=0.9, max_new=args.max_new), 256)):
        groups = groups_for(Countdown(), tokenizer, count, args.seed)
        if not sampling.temperature:
            groups = [replace(g, seeds=g.seeds[:1]) for g in groups]  # all samples of a prompt would be the same
        made.reserve(room(groups, args))
        plain = {(r.group, r.sample): r for r in made.generate(groups, sampling)}
        for name, draft in tqdm(modes.items(), desc=title):
            choose = (lambda live: draft) if draft else (lambda live: Draft(rng.choice(["learned", "n-gram"]), rng.choice([0, 1, 2, 4, 8]), rng.choice([1, 2])))
            same, gap = 0, 0.0
            for r in made.generate(groups, sampling, choose):
                other = plain[r.group, r.sample]
                same += r.tokens == other.tokens
                if r.tokens == other.tokens:
                    gap = max(gap, (r.logprobs - other.logprobs).abs().max().item())
            s = made.stats
            rows.append({"sampling": title, "mode": name, "responses": len(plain), "identical": same, "largest_logprob_gap": gap,
                         "tokens_per_round": s["spec_tokens"] / max(1, s["spec_row_rounds"])})
    print(f"\n{'sampling':>14} {'mode':>9} {'identical':>14} {'log-prob gap':>13} {'tokens per round':>17}")
    for r in rows:
        print(f"{r['sampling']:>14} {r['mode']:>9} {r['identical']:7d}/{r['responses']:<6d} {r['largest_logprob_gap']:13.1e} {r['tokens_per_round']:17.2f}")
    return sum(r["identical"] for r in rows) / sum(r["responses"] for r in rows), rows


class Watch:
    """A strategy that passes another one's choices on and keeps, for each bucket of batch sizes, the seconds and tokens they came to, the rounds, and the rows in them."""

    def __init__(self, inner):
        self.inner, self.found = inner, {}

    def __call__(self, live):
        return self.inner(live)

    def observe(self, rows, arm, seconds, tried, right):
        self.found[bucket(rows)] = tuple(a + b for a, b in zip(self.found.get(bucket(rows), (0.0, 0, 0, 0)), (seconds, rows + sum(right), 1, rows)))
        if hasattr(self.inner, "observe"):
            self.inner.observe(rows, arm, seconds, tried, right)


def speculation(args):
    """Ways to draft against plain rollout of the same engine, same tokens. Ratio: goodput over plain on the last workload. With --json F also a picture beside it.

    one: one row at a time. tail: 8 rows, until the last is done. bulk: full slots, short responses. mixed: --responses, at their natural lengths, in --slots.
    """
    fixed = {"plain": Draft(), **{f"chain {k}": Draft("learned", k) for k in (1, 2, 4, 6, 8, 12)}}
    others = {"tree 4x2": Draft("learned", 4, 2), "n-gram 4": Draft("n-gram", 4), "ratio 4": Draft("learned", 4)}
    workloads = {"one": (1, 1, args.max_new), "tail": (8, 8, args.max_new), "bulk": (args.responses, args.slots, 48), "mixed": (args.responses, args.slots, args.max_new)}
    rows = []
    for workload in args.workloads:
        batch, slots, limit = workloads[workload]
        coupled, tokenizer = drafted_engine(args, slots)
        ratio, _ = drafted_engine(args, slots, "ratio")  # its tokens are others, with the same distribution
        groups, notes = groups_for(Countdown(), tokenizer, batch, args.seed), {}
        adaptive = {"beg-mab": Bandit(arms(["learned", "n-gram"])), "goodput": Goodput(arms(["learned", "n-gram"]))}  # they go on learning from turn to turn

        def party(name, strategy):
            engine = ratio if name == "ratio 4" else coupled
            engine.reserve(room(groups, args))

            def go():
                made = sum(len(r.tokens) for r in engine.generate(groups, Sampling(max_new=limit), strategy if name in adaptive else lambda live: strategy))
                s = engine.stats
                notes[name] = (s["spec_tokens"] / max(1, s["spec_row_rounds"]), s["draft_seconds"] / s["seconds"], s["rounds"])
                return made
            return go

        parties = {name: party(name, x) for name, x in {**fixed, **others, **adaptive}.items()}
        for go in parties.values():  # a turn that does not count: memory is touched, strategies look around
            go()
        speeds = take_turns(parties, args.rounds, workload)
        for name, (speed, tokens) in speeds.items():
            per_round, drafting, rounds = notes[name]
            rows.append({"workload": workload, "mode": name, "tokens_per_second": speed, "ratio": speed / speeds["plain"][0], "tokens_per_round": per_round,
                         "draft_share": drafting, "rounds": rounds, "tokens": tokens})
    print(f"\n{'workload':>8} {'mode':>9} {'tok/s':>7} {'ratio':>6} {'tokens per round':>17} {'drafting':>9} {'rounds':>7}")
    for r in rows:
        print(f"{r['workload']:>8} {r['mode']:>9} {r['tokens_per_second']:7.0f} {r['ratio']:6.2f} {r['tokens_per_round']:17.2f} {r['draft_share']:9.0%} {r['rounds']:7d}")
    if args.json:
        figure, axis = pyplot().subplots(figsize=(11, 3.6))
        for i, workload in enumerate(args.workloads):
            mine = [r for r in rows if r["workload"] == workload and r["mode"] != "plain"]
            axis.bar([x + 0.8 * i / len(args.workloads) for x in range(len(mine))], [r["ratio"] for r in mine], 0.8 / len(args.workloads), align="edge", label=workload)
        axis.axhline(1, color="0.3", lw=1)
        axis.set(title="rollout speed over plain decoding, same tokens", xticks=[x + 0.4 for x in range(len(mine))], xticklabels=[r["mode"] for r in mine])
        axis.legend()
        figure.tight_layout()
        figure.savefig(Path(args.json).with_suffix(".png"), dpi=100)
    return next(r["ratio"] for r in rows if r["workload"] == args.workloads[-1] and r["mode"] == "goodput"), rows


def train_forever(args, ready, steps):
    torch.set_num_threads(1)
    made, tokenizer = drafted_engine(args, 16)
    trainer, buffer = Trainer(made.drafters["learned"].drafter), FeatureBuffer()
    groups = groups_for(Countdown(), tokenizer, 64, args.seed + 1)
    made.reserve(room(groups, args))
    for response in made.generate(groups, Sampling(max_new=args.max_new)):
        buffer.add(response)
    ready.set()
    while True:
        trainer.step(buffer)
        steps.value += 1


def spot(args):
    """What drafter training on one core costs a rollout on another: rollouts of 8 rows, while a process beside them trains, or is stopped, in
    turns. Ratio: rollout speed beside training over speed alone."""
    context = torch.multiprocessing.get_context("spawn")
    ready, steps = context.Event(), context.Value("l", 0)
    trainer = context.Process(target=train_forever, args=(args, ready, steps), daemon=True)
    trainer.start()
    torch.set_num_threads(1)
    made, tokenizer = drafted_engine(args, 8)
    made.reserve(room(groups := groups_for(Countdown(), tokenizer, 8, args.seed), args))
    trained = []

    def go(signal_first):
        os.kill(trainer.pid, signal_first)
        before, started = steps.value, time.perf_counter()
        tokens = sum(len(r.tokens) for _ in range(4) for r in made.generate(groups, Sampling(max_new=args.max_new), lambda live: Draft("learned", 8)))
        trained.append((steps.value - before) / (time.perf_counter() - started))
        return tokens

    while not ready.wait(1):
        if not trainer.is_alive():
            raise UserError("the training process died; its message is above")
    parties = {"alone": lambda: go(signal.SIGSTOP), "beside training": lambda: go(signal.SIGCONT)}
    speeds = {name: speed for name, (speed, _) in take_turns(parties, 5 * args.rounds, "spot").items()}
    trainer.kill()
    rows = [{"party": name, "tokens_per_second": speed} for name, speed in speeds.items()] + [{"party": "training", "steps_per_second": statistics.median(x for x in trained if x)}]
    print(f"\nrollout alone {speeds['alone']:.0f} tokens/s, beside training {speeds['beside training']:.0f}; {rows[-1]['steps_per_second']:.1f} drafter steps/s of 512 tokens")
    rows += training_costs(args, made, tokenizer, groups)
    return speeds["beside training"] / speeds["alone"], rows


def training_costs(args, made, tokenizer, groups):
    """Packed against padded batches, in tokens that teach per second, and what saving costs the worker: policy and optimizer; the drafter alone."""
    responses = list(made.generate(groups, Sampling(max_new=args.max_new)))
    drafter, speeds, saving = made.drafters["learned"].drafter, {}, {}
    for name, longest in (("packed", 0), ("padded", max(len(r.hidden) for r in responses))):
        buffer, trainer = FeatureBuffer(), Trainer(drafter)
        for r in responses:  # padded: by repeating, so that it costs what padding costs
            buffer.add(r if not longest else replace(r, tokens=(r.tokens * longest)[:longest + 1 - len(r.prompt)], hidden=r.hidden.repeat(longest, 1)[:longest]))
        useful = sum(len(r.hidden) for r in responses) / sum(len(row[1]) for row in buffer.rows)  # share of tokens that are not padding
        steps, packed, inner = 20 * args.rounds, [], buffer.pack
        buffer.pack = lambda *args: packed.append(inner(*args)) or packed[-1]
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step(buffer)
        speeds[name] = sum(batch[0].shape[1] for batch in packed) * useful / (time.perf_counter() - started)
    optimizer = torch.optim.AdamW(made.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        for name, save in (("all", lambda: save_checkpoint(Path(folder), 1, made.model, tokenizer, get_state_dict(made.model, optimizer, options=WHOLE), [])),
                           ("drafter", lambda: drafter.save(folder))):
            started = time.perf_counter()
            save()
            saving[name] = time.perf_counter() - started
    print(f"drafter training, tokens that teach per second: packed {speeds['packed']:.0f}, padded {speeds['padded']:.0f}; seconds that saving takes: "
          + ", ".join(f"{name} {seconds:.4f}" for name, seconds in saving.items()))
    return [{"party": "packing", **speeds}, {"party": "saving", **saving}]


def simulate(lengths, workers, slots, rounds):
    """When each worker is done with a rollout. lengths: of the responses of each group; rounds: bucket of batch sizes -> (seconds of a round, tokens a row gets in it).
    As in tlt.py: a worker takes the next group when its rows fit, a round takes as long as its live rows make it."""
    queue, done, most = list(reversed(lengths)), [], fair_share([len(x) for x in lengths], workers, slots)
    clocks = [(0.0, worker, []) for worker in range(workers)]
    while clocks:
        now, worker, rows = heapq.heappop(clocks)
        while queue and len(rows) + len(queue[-1]) <= most:
            rows = rows + [float(n) for n in queue.pop()]
        if not rows:
            done.append(now)
            continue
        seconds, tokens = rounds[bucket(len(rows))]
        heapq.heappush(clocks, (now + seconds, worker, [n - tokens for n in rows if n > tokens]))
    return done


def scale(args):
    """Rollout time of --responses in groups of 16 with 1 to 64 workers of one core each, predicted by a small simulation from the measured round times by batch size
    and the real lengths of one rollout. Workers beyond the number of groups have nothing to do. Ratio: plain over speculative rollout with 64 workers."""
    made, tokenizer = drafted_engine(args, args.slots)
    groups = groups_for(Countdown(), tokenizer, args.responses, args.seed, "train")
    made.reserve(room(groups, args))
    rows, rounds, spent = [], {}, {}
    strategies = {"plain": lambda live: Draft(), "speculative": Goodput(arms(["learned"]))}
    for turn in range(2):  # the first does not count
        for name, strategy in strategies.items():
            watch, lengths = Watch(strategy), [[] for _ in groups]
            for r in made.generate(groups, Sampling(max_new=args.max_new), watch):
                lengths[r.group].append(len(r.tokens))
            spent[name] = made.stats["seconds"]
            rounds[name] = {size: (seconds / count, tokens / live) for size, (seconds, tokens, count, live) in watch.found.items()}
    sizes = range(1, bucket(args.slots) + 1)
    for name, known in rounds.items():
        rounds[name] = {size: known[min(known, key=lambda other: abs(other - size))] for size in sizes}
    print(f"\nrollout of {args.responses} responses, seconds; measured with one worker: plain {spent['plain']:.1f}, speculative {spent['speculative']:.1f}\n"
          f"{'workers':>7} {'plain':>7} {'speculative':>12} {'ratio':>6} {'idle, speculative':>18}")
    for workers in (1, 2, 4, 8, 16, 32, 64):
        ends = {name: simulate(lengths, workers, args.slots, known) for name, known in rounds.items()}
        last = {name: max(x) for name, x in ends.items()}
        rows.append({"workers": workers, **last, "ratio": last["plain"] / last["speculative"], "idle": 1 - statistics.mean(ends["speculative"]) / last["speculative"]})
        print(f"{workers:7d} {last['plain']:7.1f} {last['speculative']:12.1f} {rows[-1]['ratio']:6.2f} {rows[-1]['idle']:18.0%}")
    return rows[-1]["ratio"], rows


def steps_of(folder):
    """The steps' rows of a run's metrics by number, and the held-out results by step."""
    rows = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]
    return {r["step"]: r for r in rows if "eval" not in r}, {r["step"]: r for r in rows if "eval" in r}


def training(flags, out):
    """Run tlt.py with these flags -> its steps' rows by number."""
    done = subprocess.run([sys.executable, "tlt.py", *map(str, flags), "--out", out, "--eval-every", "0", "--show-every", "0", "--save-every", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"tlt.py {' '.join(map(str, flags))} failed:\n{done.stdout[-2000:]}")
    return steps_of(out)[0]


def trl_steps(args, seed, indices):
    """Steps of TRL's GRPOTrainer on the same prompts, with all cores -> seconds of each. Settings: the same batch, group, loss, learning rate and limits; its own
    generation, of the whole batch at once."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UserError(f"--trl: {error}; it is needed for this comparison only: pip install trl") from error
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    torch.set_num_threads(os.cpu_count())
    task, tokenizer = Countdown(), AutoTokenizer.from_pretrained(args.model, padding_side="left")
    marks = []

    class Marks(TrainerCallback):
        def on_step_begin(self, *a, **kw):
            marks.append(time.perf_counter())

        def on_step_end(self, *a, **kw):
            marks[-1] = time.perf_counter() - marks[-1]

    def reward(completions, index, **kw):
        return [float(task.grade(task.problem("train", i), text).strict) for i, text in zip(index, completions)]

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(output_dir=out, seed=seed, use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(), learning_rate=1e-4, lr_scheduler_type="constant", beta=0.0, temperature=1.0,
                              loss_type="grpo", num_generations=16, max_completion_length=args.max_new, per_device_train_batch_size=args.trl_batch, steps_per_generation=256 // args.trl_batch,
                              gradient_accumulation_steps=256 // args.trl_batch, max_steps=len(indices) // 16, shuffle_dataset=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
                              gradient_checkpointing=False)
        data = Dataset.from_list([{"prompt": task.problem("train", i).trace, "index": i} for i in indices])
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        GRPOTrainer(model=model, reward_funcs=reward, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[Marks()]).train()
    return marks


def step(args):
    """Whole GRPO steps from one policy, in turns: plain and with TLT, 1 and 2 workers, the same prompts and seeds; with --trl also TRL's GRPOTrainer. Ratio: plain
    over TLT with 2 workers (with --trl: TRL over TLT). The first step of each turn does not count: memory is touched, the strategy looks around."""
    ours = {"plain": ("--drafter", "off", "--strategy", "off"), "TLT": ("--drafter-from", args.drafter) if args.drafter else ()}
    parties = [(who, workers) for workers in ((2,) if args.trl else (1, 2)) for who in ours]
    found, digests, trl = {party: [] for party in parties}, {party: [] for party in parties}, []
    for turn in tqdm(range(args.rounds), desc="step", unit="round"):
        for who, workers in parties:
            with tempfile.TemporaryDirectory() as out:
                made = training(["--model", args.model, "--device", "cpu", "--workers", workers, "--max-new", args.max_new, "--steps", args.steps, "--seed", args.seed + turn, *ours[who]], out)
            found[who, workers] += [made[n]["seconds"] for n in sorted(made)[1:]]
            digests[who, workers] += [made[n]["digest"] for n in sorted(made)[1:]]
        if args.trl:
            trl += trl_steps(args, args.seed + turn, range(16 * args.steps))[1:]
    phases = {"rollout": ("rollout", "speculative", "reward"), "drafter": ("drafter",), "idle": ("idle",), "update": ("update",), "step": ("step",)}
    mean = lambda seconds, parts: statistics.mean(sum(s[p] for p in parts) for s in seconds)
    rows = [{"party": who, "workers": workers, "digests": digests[who, workers], **{name: mean(seconds, parts) for name, parts in phases.items()}} for (who, workers), seconds in found.items()]
    if trl:
        rows.append({"party": "TRL", "workers": 1, "step": statistics.mean(trl)})
    same = all(digests[party] == digests[parties[0]] for party in parties)
    print(f"\nmean of {len(digests[parties[0]])} steps, seconds; our parties made {'the same tokens' if same else 'DIFFERENT tokens'}\n{'':>8} {'workers':>7} " + " ".join(f"{name:>8}" for name in phases))
    for r in rows:
        print(f"{r['party']:>8} {r['workers']:7d} " + " ".join(f"{r[name]:8.2f}" if name in r else " " * 8 for name in phases))
    of = lambda who: next(r["step"] for r in rows if r["party"] == who and (r["workers"] == 2 or who == "TRL"))
    return of("TRL" if trl else "plain") / of("TLT"), rows


def spans_of(folder, step):
    """Each worker's spans in a step, from a run's trace."""
    events = [e for e in json.loads((Path(folder) / "trace.json").read_text())["traceEvents"] if e.get("args", {}).get("step") == step]
    return [[(e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e["tid"] == rank] for rank in sorted({e["tid"] for e in events})]


def paired(args):
    """The training run in --run against the same steps without speculation and drafter training. Ratio: seconds per step, plain over TLT.

    The plain run is made here, from the last checkpoint but one of --run (with --whole, or if there is none, from the start), unless --plain names a finished one.
    """
    made, plain = Path(args.run), Path(args.plain or args.run.rstrip("/") + "-plain")
    if not (made / "trace.json").exists():
        raise UserError(f"--run {made}: no finished run of tlt.py there")
    if not args.plain:
        start = [] if args.whole else sorted(made.glob("checkpoint-??????"))[:-1][-1:]  # a short run has none before the last
        config = {**json.loads((made / "config.json").read_text()), "out": str(plain), "drafter": "off", "strategy": "off", "resume": bool(start)}
        if start:
            shutil.rmtree(plain, ignore_errors=True)
            shutil.copytree(start[0], plain / start[0].name)
        flags = [("--" if v is not False else "--no-") + k.replace("_", "-") + (f"={v}" if not isinstance(v, bool) else "") for k, v in config.items()]
        subprocess.run([sys.executable, "tlt.py", *flags], check=True)
    (ours, our_evals), (theirs, their_evals) = steps_of(made), steps_of(plain)
    common = [step for step in theirs if step in ours and "speculation" not in theirs[step]]  # rows before the checkpoint are copies
    same = [step for step in common if ours[step]["digest"] == theirs[step]["digest"]]
    phases = {"rollout": ("rollout", "speculative", "reward", "drafter", "idle"), "update": ("update",), "step": ("step",)}  # rollout: until the last response
    rows = [{"phase": name, **{who: sum(run[step]["seconds"][p] for step in common for p in parts) / len(common) for who, run in (("plain", theirs), ("tlt", ours))}}
            for name, parts in phases.items()]
    print(f"\nsteps {common[0]} to {common[-1]}, seconds per step\n{'':>8} {'plain':>7} {'TLT':>7} {'ratio':>6}")
    for r in rows:
        r["ratio"] = r["plain"] / r["tlt"]
        print(f"{r['phase']:>8} {r['plain']:7.2f} {r['tlt']:7.2f} {r['ratio']:6.2f}")
    evals = [step for step in their_evals if step in our_evals and step >= common[0]]
    equal = sum(their_evals[e]["eval"] == our_evals[e]["eval"] for e in evals)
    used, idle = (sum(ours[step]["seconds"][k] for step in common) for k in ("drafter", "idle"))
    parted = next((step for step in common if step not in same), None)
    rows.append({"phase": "checks", "steps": len(common), "identical": len(same), "parted": parted, "evaluations": len(evals), "equal": equal,
                 "reclaimed": used / max(1e-9, used + idle), "preempted": max(ours[step]["drafter"]["preempted"] for step in common)})
    print(f"the same tokens in {len(same)} of {len(common)} steps" + (f" (parted at step {parted})" if parted else "") + f", the same held-out results in {equal} of {len(evals)} evaluations\n"
          f"{rows[-1]['reclaimed']:.0%} of the idle time went into {sum(ours[step]['drafter']['steps'] for step in common)} drafter steps, "
          f"which ended at most {rows[-1]['preempted'] * 1e3:.0f} ms after the last response")
    draw_timeline({f"plain, step {common[-1]}": spans_of(plain, common[-1]), f"TLT, step {common[-1]}": spans_of(made, common[-1])}, made / "paired.png")
    print(f"wrote {made}/paired.png")
    return rows[2]["ratio"], rows


def drafter(args):
    """Adaptive against static drafter over the steps of two training runs (--adaptive, --static), in tokens per round at k = 8, worked out from the acceptance
    measured at each depth. Ratio: adaptive over static, mean of the last ten steps."""
    runs = {name: steps_of(folder)[0] for name, folder in (("adaptive", args.adaptive), ("static", args.static))}
    figure, (axis, rewards) = pyplot().subplots(1, 2, figsize=(11, 3.6))
    curves = {}
    for name, steps in runs.items():
        curves[name] = {}
        for step, row in steps.items():
            found = row["speculation"]["acceptance"][:8]
            if found[0] is None:
                continue  # nothing was drafted in this step
            total = chance = 1.0
            for c in found:
                here = here if c is None else c  # a depth that was not tried is as good as the one before
                chance *= here
                total += chance
            curves[name][step] = total
        axis.plot(list(curves[name]), list(curves[name].values()), label=name)
        rewards.plot(list(steps), [row["reward"] for row in steps.values()], "-" if name == "adaptive" else "k:", label=name)
    axis.set(xlabel="RL step", title="tokens per round at k = 8")
    rewards.set(xlabel="RL step", title="reward: the same, whatever drafts")
    axis.legend()
    rewards.legend()
    figure.tight_layout()
    figure.savefig(Path(args.adaptive) / "drafter.png", dpi=100)
    common = [step for step in curves["adaptive"] if step in curves["static"]]
    rows = [{"steps": [part[0], part[-1]], **{name: statistics.mean(curve[step] for step in part) for name, curve in curves.items()}}
            for part in (common[i:i + 10] for i in range(0, len(common), 10))]
    print(f"\n{'steps':>9} {'static':>7} {'adaptive':>9} {'ratio':>6}")
    for r in rows:
        print(f"{r['steps'][0]:4d}-{r['steps'][1]:<4d} {r['static']:7.2f} {r['adaptive']:9.2f} {r['adaptive'] / r['static']:6.2f}")
    return rows[-1]["adaptive"] / rows[-1]["static"], rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for function in (engine, identity, speculation, spot, scale, step, paired, drafter):
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("--json", default="", help="also write the result here")
        if function is paired:
            sub.add_argument("--run", default="runs/demo", help="folder of the run")
            sub.add_argument("--plain", default="", help="folder of a plain run that is there already")
            sub.add_argument("--whole", action="store_true", help="compare from the first step")
            continue
        if function is drafter:
            sub.add_argument("--adaptive", required=True, help="folder of a run with --drafter adaptive")
            sub.add_argument("--static", required=True, help="folder of a run with --drafter static")
            continue
        sub.add_argument("--model", default="base")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--rounds", type=int, default=3, help="turns of each party")
        sub.add_argument("--threads", type=int, default=torch.get_num_threads())
        sub.add_argument("--max-new", type=int, default=960 if function is step else 512)
        if function is step:
            sub.add_argument("--steps", type=int, default=4, help="steps in a turn")
            sub.add_argument("--trl", action="store_true", help="compare with TRL (pip install trl)")
            sub.add_argument("--trl-batch", type=int, default=64, help="responses in a forward-backward of TRL's")
            sub.add_argument("--drafter", default="", help="folder of a drafter for the policy; else its own (model/drafter)")
            continue
        if function is engine:
            sub.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="responses at once")
            continue
        if function is speculation:
            sub.add_argument("--workloads", nargs="+", default=["one", "tail", "bulk", "mixed"], choices=["one", "tail", "bulk", "mixed"])
        sub.add_argument("--slots", type=int, default=64, help="rows at once (speculation, scale)")
        sub.add_argument("--responses", type=int, default=1024 if function in (identity, scale) else 128, help="how many (identity, speculation, scale)")
        sub.add_argument("--drafter", default="", help="folder of a trained drafter; else the model's own (model/drafter), else one is warm-started")
        sub.add_argument("--warm", type=float, default=60, help="seconds of warm start")
    args = parser.parse_args()
    torch.set_num_threads(getattr(args, "threads", 1))
    ratio, rows = args.function(args)
    print(f"ratio {ratio:.2f}   {machine()}")
    if args.json:
        write_atomically(Path(args.json), json.dumps({"name": args.name, "ratio": ratio, "machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    run(main)
