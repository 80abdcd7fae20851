"""Train the tiny policies in this folder from scratch: base/ (countdown, 28 layers, 5 MB) and base/chain/ (chain, 12
layers, 2 MB).

    python -m base.pretrain                                   `make base`: 20 minutes on 2 cores, and its drafter
    python -m base.pretrain --task chain --layers 12 ...      `make chain`

Both are ordinary Hugging Face folders. They are deep and narrow, so that a drafter of one layer has the same relative
cost as beside a real language model, which has 24 to 64 layers.

Countdown. A demonstration is a depth-first search in random order until the target is found, so response lengths are
long-tailed by nature:

    3,7,8=29<think>7+3=10>10,8;10+8=18:29;10*8=80:29;8-3=5>5,7;...;7*3=21>21,8;21+8=29:29!</think>
    <answer>(7*3)+8</answer>                                               (all of it on one line)

`a+b=c>c,d;` goes one level down (the numbers that are left are written out), `a+b=c:t;` is a leaf with the target
beside it, `!` claims success. The model can only learn this because the target is written beside each leaf: without it
it claims success at random.

Training has two phases on one schedule (AdamW, linear warm-up and decay): clean traces teach the search, then NOISY
ones (false claims of success, giving up, slips of arithmetic) teach bad habits on top of it. The result solves about a
third of held-out problems but is able to do better, which reinforcement learning can bring out: the policy learns to
continue the search instead of claiming success, so responses grow longer.

Chain (for test_time/). `7:cfa=` -> `c12;f3;a29;#29`, one function per step. The demonstrations contain a few slips, and
confuse some functions with their neighbours: the later in the alphabet the more often, the last one more often than
not. So some mistakes are corrected by more samples, some by majority, and some only by a verifier.
"""

import functools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from parts.cli import UserError, check_above, check_at_least, flag, parse_flags, run
from parts.files import check_writable
from parts.running.launcher import process_pool
from tasks import Chain, Countdown, combine

SYMBOLS = {
    "countdown": ["<pad>", "<eos>", "<think>", "</think>", "<answer>", "</answer>", *"+-*/=>,:;!()"],
    "chain": ["<pad>", "<eos>", *":=;#|", *Chain.LETTERS],  # | separates attempts, see Chain.again
}
MAX_TRACE = 640  # tokens; a longer search is replaced by another one
NOISE = {"claim": 0.10, "quit": 0.03, "slip": 0.05}  # of the noisy traces, see `trace`
PARTS = 20  # jobs that make the traces of a kind, in parallel


def make_tokenizer(task: str = "countdown") -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per whole number 0..99 and per symbol; `decode` returns exactly the text."""
    vocab = {token: i for i, token in enumerate(SYMBOLS[task] + [str(n) for n in range(100)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[a-z]+>|[0-9]+|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        prompt_style="trace",
        model_max_length=1024,
    )


# ---------------------------------------------------------------- the demonstrations


@functools.cache
def solvable(state: tuple, target: int) -> bool:
    """Return whether the target can be made from this sorted tuple of numbers."""
    if len(state) == 1:
        return state[0] == target
    return any(solvable(move[4], target) for move in moves(state))


@functools.cache
def moves(state: tuple) -> list[tuple]:
    """Return all (symbol, x, y, result, next state) from a sorted tuple of numbers."""
    options = {}
    for i in range(len(state)):
        for j in range(i):
            rest = state[:j] + state[j + 1 : i] + state[i + 1 :]
            for symbol, x, y, result in combine(state[i], state[j]):
                options[symbol, x, y] = (symbol, x, y, result, tuple(sorted((result, *rest))))
    return list(options.values())


class Search:
    """One depth-first search that writes down its text. See `trace` for the settings."""

    def __init__(
        self, target: int, rng: random.Random, claim: float, quit: float, slip: float, hint: float, width: int
    ):
        self.target = target
        self.rng = rng
        self.claim = claim
        self.quit = quit
        self.slip = slip
        self.hint = hint
        self.width = width
        self.text: list[str] = []

    def options(self, state: list[int], depth: int) -> list[tuple]:
        """Return the moves to try, in order."""
        options = moves(tuple(sorted(state)))
        options = self.rng.sample(options, len(options))
        if len(state) > 3:
            options.sort(key=lambda m: self.rng.random() < self.hint and solvable(m[4], self.target), reverse=True)
        return options[: self.width] if depth and len(state) > 2 else options

    def search(self, state: list[int], names: list[str], depth: int = 0) -> bool | None:
        """Search from a state, and return True for a claim of success, None for giving up, False if no move succeeded.
        state: values; names: their expressions.
        """
        for symbol, x, y, result, _ in self.options(state, depth):
            i = state.index(x)
            j = next(k for k in range(len(state)) if state[k] == y and k != i)
            name = symbol.join(n if n.isdigit() else f"({n})" for n in (names[i], names[j]))
            if self.rng.random() < self.slip:
                result = max(0, min(99, result + self.rng.choice([-10, -2, -1, 1, 2, 10])))
            rest = [k for k in range(len(state)) if k not in (i, j)]
            self.text.append(f"{x}{symbol}{y}={result}")
            if rest:
                values = [result] + [state[k] for k in rest]
                self.text.append(">" + ",".join(map(str, values)) + ";")
                outcome = self.search(values, [name] + [names[k] for k in rest], depth + 1)
            else:
                outcome = self.leaf(result, name)
            if outcome is not False:
                return outcome
        return False

    def leaf(self, result: int, name: str) -> bool | None:
        """One number is left: claim success, give up, or continue. The result is that of `search`."""
        if result == self.target or self.rng.random() < self.claim:
            self.text.append(f":{self.target}!</think><answer>{name}</answer>")
            return True
        self.text.append(f":{self.target};")
        return None if self.rng.random() < self.quit else False


def trace(numbers, target: int, rng: random.Random, claim=0.0, quit=0.0, slip=0.0, hint=0.5, width=3) -> str:
    """Return the text of one search, `</think>...<eos>` included.

    claim, quit: chance, at each failing leaf, to claim success or to give up. slip: chance that a wrong result is
    written. hint: chance that a branch which leads to the target is tried first; it is applied only while more than
    three numbers are left, so that 4-number searches end in reasonable time. width: number of branches that are tried
    below the first level before the search turns back.
    """
    search = Search(target, rng, claim, quit, slip, hint, width)
    if not search.search(list(numbers), [str(n) for n in numbers]):
        search.text.append("</think>")
    return "".join(search.text) + "<eos>"


def chain_trace(start: int, names: str, rng: random.Random, slip: float = 0.03, confuse: float = 0.55) -> str:
    """Return the text of one solution, `<eos>` included. slip: chance that a result is any number. confuse: chance that
    the last function of the alphabet is confused with the one before it; smaller for the others.
    """
    text = ""
    y = start
    last = len(Chain.LETTERS) - 1
    for name in names:
        i = Chain.LETTERS.index(name)
        confused = rng.random() < confuse * (i / last) ** 4
        y = Chain.apply(Chain.LETTERS[i - confused], y)
        y = rng.randrange(Chain.MODULUS) if rng.random() < slip else y
        text += f"{name}{y};"
    return f"{text}#{y}<eos>"


@dataclass(frozen=True)
class Job:
    """A part of the traces, made in a process of its own."""

    task: str
    kind: str  # clean or noisy
    seed: str
    count: int
    noise: dict


def make_traces(job: Job) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, completion ids) of each trace of a job."""
    rng = random.Random(job.seed)
    task = Countdown(sizes=(3, 4)) if job.task == "countdown" else Chain()
    tokenizer = make_tokenizer(job.task)
    examples = []
    while len(examples) < job.count:
        problem = task.problem("train", rng.getrandbits(40))
        if job.task == "countdown":
            text = trace(*problem.answer, rng, **job.noise)
        else:
            text = chain_trace(*problem.answer[:2], rng, **job.noise)
        completion = tokenizer.encode(text)
        if len(completion) <= MAX_TRACE:
            examples.append((tokenizer.encode(problem.trace), completion))
    return examples


# ---------------------------------------------------------------- training


def batches(examples: list, tokens: int, rng: random.Random) -> list[list]:
    """Return batches of sequences of similar length, in random order. A batch has at most `tokens` tokens, padding
    included, or a single longer sequence. examples: tuples that begin with the ids of a prompt and its completion.
    """
    lengths = [len(example[0]) + len(example[1]) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: lengths[i] + 8 * rng.random())
    found = []
    batch = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if batch and longest * (len(batch) + 1) > tokens:
            found.append(batch)
            batch = []
            longest = lengths[i]
        batch.append(examples[i])
    if batch:
        found.append(batch)
    rng.shuffle(found)
    return found


def loss_on(model, batch: list) -> torch.Tensor:
    """Return the mean cross-entropy of the completion tokens. Right padding needs no mask under causal attention."""
    longest = max(len(prompt) + len(completion) for prompt, completion in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(batch):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    ids, labels = ids.to(model.device), labels.to(model.device)
    logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def new_policy(tokenizer, layers: int, width: int) -> LlamaForCausalLM:
    """Return a policy with random weights. It is a Llama with Qwen2's biases, since AutoTokenizer gives every folder of
    type qwen2 the Qwen2 tokenizer, which splits numbers.

    A deep and narrow model needs larger initial weights than the usual 0.02, which would shrink activations in such
    narrow layers, and smaller ones where a layer adds to the residual sum, which would otherwise grow with depth. With
    28 layers, width 64 and 4,000 clean traces the held-out loss is 1.36 with the usual weights, 1.08 with the larger
    ones, 0.62 with both changes.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        intermediate_size=width * 9 // 4,
        max_position_embeddings=1024,
        attention_bias=True,
        tie_word_embeddings=False,
        initializer_range=0.64 / width**0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= (2 * layers) ** 0.5
            layer.mlp.down_proj.weight /= (2 * layers) ** 0.5
    return model


def learn(model, plan: list[list], lr: float, title: str = "training") -> None:
    """Take one AdamW step per batch of the plan, with linear warm-up and decay of the learning rate."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)

    def factor(i: int) -> float:
        return min((i + 1) / 200, max(0.0, 1 - i / len(plan)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    bar = tqdm(plan, desc=title, unit="batch", mininterval=5)
    mean = None
    for batch in bar:
        loss = loss_on(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)


@dataclass(frozen=True)
class Command:
    """Settings, each a command-line flag."""

    task: str = flag("countdown", "task to learn", tuple(sorted(SYMBOLS)))
    out: str = flag("base", "folder for the policy")
    layers: int = flag(28, "number of decoder layers")
    width: int = flag(64, "hidden size; heads have 32 each")
    clean: int = flag(50_000, "number of clean traces (countdown)")
    noisy: int = flag(16_000, "number of noisy traces (chain: all traces)")
    tokens: int = flag(2048, "tokens per batch, padding included")
    lr: float = flag(4e-3, "peak learning rate")
    threads: int = flag(0, "number of torch threads; 0: torch's default")
    seed: int = flag(0, "seed of traces, initial weights and batches")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "layers", "tokens")
        check_at_least(self, 32, "width")
        check_at_least(self, 0, "clean", "noisy", "threads")
        check_above(self, 0, "lr")
        if not jobs_of(self):
            raise UserError(f"--noisy {self.noisy}: at least {PARTS} traces are needed")


def jobs_of(command: Command) -> list[Job]:
    """Return the jobs that make the traces: first the clean ones, then the noisy ones."""
    counts = {"clean": command.clean if command.task == "countdown" else 0, "noisy": command.noisy}
    jobs = []
    for kind, count in counts.items():
        noise = NOISE if kind == "noisy" and command.task == "countdown" else {}
        if count >= PARTS:
            for i in range(PARTS):
                jobs.append(Job(command.task, kind, f"{command.seed} {kind} {i}", count // PARTS, noise))
    return jobs


def plan_of(command: Command) -> list[list]:
    """Make the traces in parallel processes -> batches in the order in which they are learned."""
    jobs = jobs_of(command)
    with process_pool() as pool:
        parts = list(tqdm(pool.map(make_traces, jobs), total=len(jobs), desc="traces", unit="part"))
    lengths = sorted(len(completion) for part in parts for _, completion in part)
    quantiles = ", ".join(f"p{q} {lengths[len(lengths) * q // 100]}" for q in (50, 90, 99))
    print(f"{len(lengths)} traces, {sum(lengths):,} tokens, {quantiles}")
    rng = random.Random(command.seed)
    plan = []
    for kind in ("clean", "noisy"):
        examples = []
        for part, job in zip(parts, jobs):
            examples += part if job.kind == kind else []
        plan += batches(examples, command.tokens, rng)
    return plan


def main() -> None:
    """Make the traces, train the policy and write its folder."""
    command = parse_flags(Command, __doc__)
    if command.threads:
        torch.set_num_threads(command.threads)
    check_writable(Path(command.out))
    torch.manual_seed(command.seed)
    tokenizer = make_tokenizer(command.task)
    model = new_policy(tokenizer, command.layers, command.width)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {torch.get_num_threads()} threads")
    plan = plan_of(command)
    started = time.time()
    learn(model, plan, command.lr)
    model.generation_config.max_new_tokens = 512
    model.save_pretrained(command.out)
    tokenizer.save_pretrained(command.out)
    print(f"{time.time() - started:.0f} s; wrote {Path(command.out).resolve()}")


if __name__ == "__main__":
    run(main)
