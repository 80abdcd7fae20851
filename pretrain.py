"""The tiny base policies, from scratch: `make base` writes base/ (countdown), a normal Hugging Face folder of 8 MB, `make chain` base/chain/, one of 0.7 MB.

Countdown. A search trace is a depth-first search in random order until the target is hit, so response lengths are long-tailed by nature:

    3,7,8=29<think>7+3=10>10,8;10+8=18:29;10*8=80:29;8-3=5>5,7;...;7*3=21>21,8;21+8=29:29!</think><answer>(7*3)+8</answer>

`a+b=c>c,d;` goes one level down (the numbers left are written out), `a+b=c:t;` is a leaf beside the target, `!` claims success.
Writing the target beside each leaf is what makes it learnable: without it a model claims success at random.

Two phases on one schedule (AdamW, linear warm-up and decay): clean traces teach to search, then NOISY ones (false claims of success, giving up,
slips of arithmetic) teach bad habits on top. The result solves about a third of held-out problems but knows how to do better, which is what
reinforcement learning can lift: it learns to go on searching instead of claiming, so responses grow longer.

Chain (for test_time.py). `7:cfa=` -> `c12;f3;a29;#29`, a function a line. The demonstrator slips now and then, and takes some functions for their neighbours, the later in
the alphabet the more often, the last one more often than not. So some mistakes go away with more samples, some by majority, and some only with a verifier.
"""

import argparse
import functools
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import Chain, Countdown, combine

SYMBOLS = {"countdown": ["<pad>", "<eos>", "<think>", "</think>", "<answer>", "</answer>", *"+-*/=>,:;!()"],
           "chain": ["<pad>", "<eos>", *":=;#|", *Chain.LETTERS]}  # | parts attempts, see test_time.revise
MAX_TRACE = 640    # tokens; a longer search is drawn again


def make_tokenizer(task="countdown"):
    """One token per whole number 0..99 and per symbol; `decode` gives back exactly the text."""
    vocab = {token: i for i, token in enumerate(SYMBOLS[task] + [str(n) for n in range(100)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[a-z]+>|[0-9]+|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False,
                                   prompt_style="trace", model_max_length=1024)


# ---------------------------------------------------------------- the demonstrators

@functools.lru_cache(maxsize=None)
def solvable(state, target):
    """Whether the target can be made from this sorted tuple of numbers."""
    if len(state) == 1:
        return state[0] == target
    return any(solvable(child, target) for *_, child in moves(state))


@functools.lru_cache(maxsize=None)
def moves(state):
    """All (symbol, x, y, result, next state) from a sorted tuple of numbers."""
    found = {}
    for i in range(len(state)):
        for j in range(i):
            rest = state[:j] + state[j + 1:i] + state[i + 1:]
            for symbol, x, y, result in combine(state[i], state[j]):
                found[symbol, x, y] = (symbol, x, y, result, tuple(sorted((result, *rest))))
    return list(found.values())


def trace(numbers, target, rng, claim=0.0, quit=0.0, slip=0.0, hint=0.5, width=3):
    """The text of one search, `</think>...<eos>` included.

    claim, quit: chance, at each failing leaf, to claim success or to give up. slip: chance that a result is written wrong.
    hint: chance that the search tries a promising branch first. It is applied only above the last two numbers' parent, so that
    4-number searches end in reasonable time. width: how many branches it tries below the first level before it turns back.
    """
    out = []

    def search(state, names, depth):
        """state: values; names: their expressions. True: claimed success. None: gave up. False: this branch is exhausted."""
        options = moves(tuple(sorted(state)))
        options = rng.sample(options, len(options))
        if len(state) > 3:
            options.sort(key=lambda m: rng.random() < hint and solvable(m[4], target), reverse=True)
        if depth and len(state) > 2:
            options = options[:width]
        for symbol, x, y, result, _ in options:
            i = state.index(x)
            j = next(k for k in range(len(state)) if state[k] == y and k != i)
            name = symbol.join(n if n.isdigit() else f"({n})" for n in (names[i], names[j]))
            if rng.random() < slip:
                result = max(0, min(99, result + rng.choice([-10, -2, -1, 1, 2, 10])))
            rest = [k for k in range(len(state)) if k not in (i, j)]
            out.append(f"{x}{symbol}{y}={result}")
            if rest:
                out.append(">" + ",".join(map(str, [result] + [state[k] for k in rest])) + ";")
                done = search([result] + [state[k] for k in rest], [name] + [names[k] for k in rest], depth + 1)
                if done is not False:
                    return done
            elif result == target or rng.random() < claim:
                out.append(f":{target}!</think><answer>{name}</answer>")
                return True
            else:
                out.append(f":{target};")
                if rng.random() < quit:
                    return None
        return False

    if not search(list(numbers), [str(n) for n in numbers], 0):
        out.append("</think>")
    return "".join(out) + "<eos>"


def chain_trace(start, names, rng, slip=0.03, confuse=0.55):
    """slip: chance that a result is any number. confuse: chance that the last function is taken for the one before it; less for the others."""
    out, y, last = "", start, len(Chain.LETTERS) - 1
    for name in names:
        i = Chain.LETTERS.index(name)
        y = Chain.apply(Chain.LETTERS[i - (rng.random() < confuse * (i / last) ** 4)], y)
        y = rng.randrange(Chain.MODULUS) if rng.random() < slip else y
        out += f"{name}{y};"
    return f"{out}#{y}<eos>"


def make_traces(job):
    """A list of (prompt ids, completion ids). job: (task, seed, how many, noise of `trace` or `chain_trace`)."""
    name, seed, count, noise = job
    rng, task, tokenizer = random.Random(seed), Countdown(sizes=(3, 4)) if name == "countdown" else Chain(), make_tokenizer(name)
    rows = []
    while len(rows) < count:
        problem = task.problem("train", rng.getrandbits(40))
        completion = tokenizer.encode(trace(*problem.answer, rng, **noise) if name == "countdown" else chain_trace(*problem.answer[:2], rng, **noise))
        if len(completion) <= MAX_TRACE:
            rows.append((tokenizer.encode(problem.trace), completion))
    return rows


# ---------------------------------------------------------------- training

def batches(rows, tokens, rng):
    """Batches of at most `tokens` tokens, padding included, of sequences of like length, in random order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]) + 8 * rng.random())
    batch, found = [], []
    for i in order:
        longest = len(rows[i][0]) + len(rows[i][1])
        if batch and longest * (len(batch) + 1) > tokens:
            found.append(batch)
            batch = []
        batch.append(rows[i])
    found += [batch] * bool(batch)
    rng.shuffle(found)
    return found


def loss_on(model, batch):
    """Mean cross-entropy of the completion tokens. Right padding under a causal mask needs no attention mask."""
    longest = max(len(p) + len(c) for p, c in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (p, c) in enumerate(batch):
        ids[row, :len(p) + len(c)] = torch.tensor(p + c)
        labels[row, len(p):len(p) + len(c)] = torch.tensor(c)
    logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def new_policy(tokenizer, layers, width):
    # Llama with Qwen2's biases: AutoTokenizer gives every folder of type qwen2 the Qwen2 tokenizer, which splits our numbers
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64), intermediate_size=width * 9 // 4, max_position_embeddings=1024,
        attention_bias=True, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def learn(model, plan, lr, title="training"):
    """One AdamW step per batch of the plan, linear warm-up and decay."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    keep = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 200, max(0.0, 1 - i / len(plan))))
    bar, mean = tqdm(plan, desc=title, unit="batch", mininterval=5), None
    for batch in bar:
        loss = loss_on(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--task", default="countdown", choices=sorted(SYMBOLS))
    flags.add_argument("--out", default="base")
    flags.add_argument("--layers", type=int, default=12)
    flags.add_argument("--width", type=int, default=128)
    flags.add_argument("--clean", type=int, default=100_000, help="clean traces (countdown)")
    flags.add_argument("--noisy", type=int, default=16_000, help="noisy traces (chain: all)")
    flags.add_argument("--tokens", type=int, default=4096, help="tokens in a batch")
    flags.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.task)
    model = new_policy(tokenizer, args.layers, args.width)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {args.threads} threads")

    noise = {"claim": 0.10, "quit": 0.03, "slip": 0.05} if args.task == "countdown" else {}  # see `trace`
    counts = {"clean": args.clean if args.task == "countdown" else 0, "noisy": args.noisy}
    jobs = [(args.task, f"{args.seed} {kind} {i}", n // 20, noise if kind == "noisy" else {}) for kind, n in counts.items() for i in range(20) if n]
    with ProcessPoolExecutor() as pool:
        parts = list(tqdm(pool.map(make_traces, jobs), total=len(jobs), desc="demonstrating", unit="part"))
    rng, plan, lengths = random.Random(args.seed), [], sorted(len(c) for part in parts for _, c in part)
    for kind in counts:  # first the clean ones
        plan += batches([row for part, job in zip(parts, jobs) if job[1].split()[1] == kind for row in part], args.tokens, rng)
    print(f"{len(lengths)} traces, {sum(lengths):,} tokens, " + ", ".join(f"p{q} {lengths[len(lengths) * q // 100]}" for q in (50, 90, 99)))
    started = time.time()
    learn(model, plan, 2e-3)
    model.generation_config.max_new_tokens = 512
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{time.time() - started:.0f} s; wrote {Path(args.out).resolve()}")


if __name__ == "__main__":
    main()
