"""Every speed in the README, measured side by side in one run: `python bench.py engine --json out.json`.

Parties take turns (A B A B ...) in one process on the same cores, so that whatever else the machine does hits them alike; each figure is the median over
the rounds, each comparison a ratio of medians. Every sub-command prints one table and, with --json FILE, writes

    {"name": sub-command, "ratio": headline, "machine": {...}, "rows": [...]}
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from drafter import Drafter, LearnedDrafts, NGramDrafts, warm_start
from rollout import Draft, Engine, Group, Sampling, load_model, run, sequence_seed, stop_tokens
from tasks import Countdown, encode_prompt
from train_grpo import write_atomically


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
    """Our plain engine against Hugging Face generate: same model, prompts, temperature, limit, cores. Ratio: tokens per second at the largest batch."""
    model, tokenizer = load_model(args.model)
    stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    stop, rows, turn = stop_tokens(model, tokenizer), [], [0]
    for batch in args.batches:
        ours = Engine(model, stop, slots=batch)

        def mine():
            turn[0] += 1
            groups = groups_for(Countdown(), tokenizer, batch, (args.seed, turn[0]))
            ours.reserve(room(groups, args))
            return sum(len(r.tokens) for r in ours.generate(groups, Sampling(max_new=args.max_new)))

        def theirs():
            torch.manual_seed(args.seed + turn[0])
            prompts = [g.prompt for g in groups_for(Countdown(), tokenizer, batch, 0) for _ in g.seeds]
            made = 0
            for part in [prompts] if batch > 1 else [[p] for p in prompts]:
                padded = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
                with torch.inference_mode():
                    out = stock.generate(**padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new,
                                         eos_token_id=sorted(stop), pad_token_id=tokenizer.pad_token_id)[:, padded["input_ids"].shape[1]:]
                ended = torch.isin(out, torch.tensor(sorted(stop))).cumsum(1)
                made += int((ended == 0).sum() + (ended[:, -1] > 0).sum())  # tokens up to and with the stop token
            return made

        speeds = take_turns({"engine": mine, "generate": theirs}, args.rounds, f"batch {batch}")
        rows.append({"batch": batch, "engine": speeds["engine"][0], "generate": speeds["generate"][0], "ratio": speeds["engine"][0] / speeds["generate"][0]})
    print(f"\n{'batch':>6} {'engine tok/s':>13} {'generate tok/s':>15} {'ratio':>6}")
    for r in rows:
        print(f"{r['batch']:6d} {r['engine']:13.0f} {r['generate']:15.0f} {r['ratio']:6.2f}")
    return rows[-1]["ratio"], rows


def drafted_engine(args, batch, verify="coupled"):
    """(engine with a learned and an n-gram drafter, tokenizer). The drafter is loaded from --drafter, or warm-started here for --warm seconds."""
    model, tokenizer = load_model(args.model)
    torch.manual_seed(args.seed)
    drafter = Drafter(model)
    if args.drafter:
        drafter.load(args.drafter)
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
    for title, sampling, count in (("temperature 1", Sampling(max_new=args.max_new), args.responses), ("temperature 0", Sampling(0.0, max_new=args.max_new), 128),
                                   ("top-p 0.9", Sampling(top_p=0.9, max_new=args.max_new), 256)):
        groups = groups_for(Countdown(), tokenizer, count, args.seed)
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


def speculation(args):
    """Speculative against plain rollout of the same engine, same tokens. Ratio: the best coupled mode over plain at the largest batch."""
    modes = {"plain": Draft(), **{f"chain {k}": Draft("learned", k) for k in (1, 2, 3, 4, 6, 8)}, "tree 4x2": Draft("learned", 4, 2), "n-gram 4": Draft("n-gram", 4),
             "ratio 4": Draft("learned", 4), "k by rows": None}
    by_rows = lambda live: Draft("learned", 8 if len(live) <= 8 else 6 if len(live) <= 24 else 3)  # drafts are the cheaper, the fewer rows share a core
    rows = []
    for batch in args.batches:
        coupled, tokenizer = drafted_engine(args, min(batch, args.slots))
        ratio, _ = drafted_engine(args, min(batch, args.slots), "ratio")  # its tokens are others, with the same distribution
        groups = groups_for(Countdown(), tokenizer, batch, args.seed)
        notes = {}

        def party(name, draft):
            engine = ratio if name == "ratio 4" else coupled
            engine.reserve(room(groups, args))

            def go():
                engine.drafters["n-gram"].tables.clear()  # each turn generates the same tokens: it must not remember them
                made = sum(len(r.tokens) for r in engine.generate(groups, Sampling(max_new=args.max_new), (lambda live: draft) if draft else by_rows))
                s = engine.stats
                notes[name] = (s["spec_tokens"] / max(1, s["spec_row_rounds"]), s["draft_seconds"] / s["seconds"], s["rounds"])
                return made
            return go

        speeds = take_turns({name: party(name, draft) for name, draft in modes.items()}, args.rounds, f"batch {batch}")
        for name, (speed, tokens) in speeds.items():
            per_round, drafting, rounds = notes[name]
            rows.append({"batch": batch, "mode": name, "tokens_per_second": speed, "ratio": speed / speeds["plain"][0], "tokens_per_round": per_round,
                         "draft_share": drafting, "rounds": rounds, "tokens": tokens})
    print(f"\n{'batch':>6} {'mode':>9} {'tok/s':>7} {'ratio':>6} {'tokens per round':>17} {'drafting':>9} {'rounds':>7}")
    for r in rows:
        print(f"{r['batch']:6d} {r['mode']:>9} {r['tokens_per_second']:7.0f} {r['ratio']:6.2f} {r['tokens_per_round']:17.2f} {r['draft_share']:9.0%} {r['rounds']:7d}")
    return max(r["ratio"] for r in rows if r["batch"] == args.batches[-1] and r["mode"] != "ratio 4"), rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for function in (engine, identity, speculation):
        sub = commands.add_parser(function.__name__, help=function.__doc__)
        sub.add_argument("--json", default="", help="also write the result here")
        sub.add_argument("--model", default="base")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--rounds", type=int, default=3, help="turns of each party")
        sub.add_argument("--threads", type=int, default=torch.get_num_threads())
        sub.add_argument("--max-new", type=int, default=512)
        sub.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128], help="responses at once (engine, speculation)")
        sub.add_argument("--slots", type=int, default=64, help="rows at once, for batches beyond it (speculation)")
        sub.add_argument("--responses", type=int, default=1024, help="responses compared at temperature 1 (identity)")
        sub.add_argument("--drafter", default="", help="folder of a trained drafter; without it one is warm-started")
        sub.add_argument("--warm", type=float, default=60, help="seconds of warm start")
        sub.set_defaults(function=function)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratio, rows = args.function(args)
    print(f"ratio {ratio:.2f}   {machine()}")
    if args.json:
        write_atomically(Path(args.json), json.dumps({"name": args.name, "ratio": ratio, "machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    run(main)
