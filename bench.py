"""Every speed in the README, measured side by side in one run: `python bench.py engine --json out.json`.

Parties take turns (A B A B ...) in one process on the same cores, so that whatever else the machine does hits them alike; each figure is the median over
the rounds, each comparison a ratio of medians. Every sub-command prints one table and, with --json FILE, writes

    {"name": sub-command, "ratio": headline, "machine": {...}, "rows": [...]}
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from rollout import Engine, Group, Sampling, load_model, run, sequence_seed, stop_tokens
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


def engine(args):
    """Our plain engine against Hugging Face generate: same model, prompts, temperature, limit, cores. Ratio: tokens per second at the largest batch."""
    model, tokenizer = load_model(args.model)
    stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    task, stop, rows = Countdown(), stop_tokens(model, tokenizer), []
    for batch in args.batches:
        size = min(16, batch)  # 16 samples a prompt, as in training
        prompts = [encode_prompt(task.problem("test", i), tokenizer) for i in range(batch // size)]
        ours = Engine(model, stop, slots=batch, context=max(map(len, prompts)) + args.max_new)
        turn = [0]

        def mine():
            turn[0] += 1
            groups = [Group(i, p, [sequence_seed(args.seed, turn[0], i, k) for k in range(size)]) for i, p in enumerate(prompts)]
            return sum(len(r.tokens) for r in ours.generate(groups, Sampling(max_new=args.max_new)))

        def theirs():
            torch.manual_seed(args.seed + turn[0])
            padded = tokenizer.pad({"input_ids": [p for p in prompts for _ in range(size)]}, padding_side="left", return_tensors="pt")
            with torch.inference_mode():
                out = stock.generate(**padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new,
                                     eos_token_id=sorted(stop), pad_token_id=tokenizer.pad_token_id)
            out = out[:, padded["input_ids"].shape[1]:]
            ended = torch.isin(out, torch.tensor(sorted(stop))).cumsum(1)
            return int((ended == 0).sum() + (ended[:, -1] > 0).sum())  # tokens up to and with the stop token

        speeds = take_turns({"engine": mine, "generate": theirs}, args.rounds if batch > 1 else args.rounds * 4, f"batch {batch}")
        rows.append({"batch": batch, "engine": speeds["engine"][0], "generate": speeds["generate"][0], "ratio": speeds["engine"][0] / speeds["generate"][0]})
    print(f"\n{'batch':>6} {'engine tok/s':>13} {'generate tok/s':>15} {'ratio':>6}")
    for r in rows:
        print(f"{r['batch']:6d} {r['engine']:13.0f} {r['generate']:15.0f} {r['ratio']:6.2f}")
    return rows[-1]["ratio"], rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for function in (engine,):
        sub = commands.add_parser(function.__name__, help=function.__doc__)
        sub.add_argument("--json", default="", help="also write the result here")
        sub.add_argument("--model", default="base")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--rounds", type=int, default=3, help="turns of each party")
        sub.add_argument("--threads", type=int, default=torch.get_num_threads())
        sub.add_argument("--max-new", type=int, default=512)
        sub.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
        sub.set_defaults(function=function)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratio, rows = args.function(args)
    print(f"ratio {ratio:.2f}   {machine()}")
    if args.json:
        write_atomically(Path(args.json), json.dumps({"name": args.name, "ratio": ratio, "machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    run(main)
