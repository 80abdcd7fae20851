"""The GPU path, checked by one command: what is claimed of it, what was measured, and whether that confirms it.

    machine     time of a launch, bandwidth of copies, attention kernels, attention over a cache that grows
    exact       noise as on the CPU; base/ in float32: plain against chains, bucketed and replayed rounds; in bfloat16:
                how many responses stay the same, and whether length and reward do on average
    round       a round of the Qwen2.5-0.5B shape, random weights, way by way; speculation at a stated acceptance
    bandwidth   plain decoding of the Qwen2.5-7B shape at batch 1: bytes of weights a second
    training    a policy of about 100 M weights learns Countdown on the spot; its drafter; GRPO steps, plain and TLT
    memory      what Engine.affordable and the update count, against what they take

It needs no network, and takes under nine minutes on one GPU. Each claim gets a verdict: CONFIRMED or REFUTED, or NOT
TESTED where this machine cannot show it (no GPU, no second one, too little memory), which is never a pass. A part that
fails is refuted, and the others continue. Without a GPU every part runs at a small size, so that all of its code has
run.

Ratio: plain decoding of the 0.5B shape at one sequence, replayed over the model's own modules.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from base import pretrain
from bench import step
from bench.anatomy import WAYS, operators, random_model, time_ways
from bench.exact import exact_part
from bench.harness import Output, Result, seconds_per_call, text_table, train
from bench.memory import update_memory
from bench.verdicts import claim, figure
from drafter import Drafter, EagleProposer
from parts.cli import UserError, check_at_least, flag, reason
from parts.devices import pick_device
from parts.files import ROOT
from parts.training.logprobs import forward_bytes
from rollout import Engine

PARTS = ("machine", "exact", "round", "bandwidth", "training", "memory")
COLUMNS = {}


@dataclass(frozen=True)
class Config(Output):
    parts: tuple[str, ...] = flag(PARTS, "what is measured", PARTS)
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    traces: int = flag(0, "search traces for the policy that learns on the spot; 0: 80,000 on a GPU, else base/")
    responses: int = flag(0, "responses in `exact`; 0: 256 on a GPU, 32 without")

    def __post_init__(self):
        check_at_least(self, 0, "traces", "responses")
        pick_device(self.device)

    @property
    def gpu(self) -> bool:
        """Return whether the parts run on a GPU; for that, `measure` replaces auto in `device`."""
        return self.device == "cuda"

    def on_gpu(self, value: float) -> float | None:
        """Return the value if it was measured on a GPU, else None: then the claim is not tested."""
        return value if self.gpu else None


# ---------------------------------------------------------------- machine


def copy_bandwidth(config: Config) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source = torch.zeros(1 << (29 if config.gpu else 24), dtype=torch.uint8, device=config.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call(lambda: target.copy_(source), 20, warmup=True)


def takes_masks(query, key, mask) -> bool:
    """Return whether the memory-efficient kernel takes masked attention as the engine asks for it."""
    try:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    except RuntimeError:
        return False
    return True


def machine_part(config: Config) -> list[dict]:
    """See the top."""
    tiny = torch.zeros(8, device=config.device)
    launch = seconds_per_call(lambda: [tiny.add_(1) for _ in range(1000)], 5, warmup=True) / 1000
    dtype = torch.bfloat16 if config.gpu else torch.float32
    query = torch.randn(8, 2, 7, 64, dtype=dtype, device=config.device)
    key = torch.randn(8, 2, 2056, 64, dtype=dtype, device=config.device)[:, :, :2048]  # part of a slot
    mask = torch.zeros(8, 1, 7, 2048, dtype=dtype, device=config.device)

    def attention(kv_lens) -> None:
        for kv_len in kv_lens:
            part = key[:, :, :kv_len]
            F.scaled_dot_product_attention(query, part, part, attn_mask=mask[..., :kv_len])

    one_kernel = float(takes_masks(query, key, mask))
    attention(range(1024, 1032))
    same = seconds_per_call(lambda: attention([1024] * 64), 3, warmup=True)
    growing = seconds_per_call(lambda: attention(range(128, 128 + 8 * 64, 8)))  # sizes that come for the first time
    return [
        figure("a launch", launch * 1e6, "us"),
        figure("copy bandwidth", copy_bandwidth(config) / 1e9, "GB/s"),
        claim("attention with a mask is one kernel", config.on_gpu(one_kernel), ">=", 1),
        claim("a cache that grows needs no plans: growing / repeated", config.on_gpu(growing / same), "<=", 3),
        claim("cuDNN attention is off", float(torch.backends.cuda.cudnn_sdp_enabled()), "<=", 0),
    ]


# ---------------------------------------------------------------- speed


def round_part(config: Config) -> list[dict]:
    """See the top."""
    if config.gpu:
        model = random_model("Qwen2.5-0.5B", config.device, torch.bfloat16)
        rows = time_ways(model, (1, 8, 64, 256), (0, 4, 8), 64, 64, WAYS)
    else:
        model = random_model("tiny", config.device, torch.float32)
        rows = time_ways(model, (1, 4), (0, 4, 8), 8, 16, WAYS[:2])
    cells = {(row["batch"], row["k"], row["way"]): row for row in rows}
    best = WAYS[3] if config.gpu else WAYS[1]

    def gain(batch: int) -> float | None:
        """Return the tokens a second with four draft tokens over those with none; None without a GPU."""
        if not config.gpu:
            return None
        drafted, plain = cells[batch, 4, best], cells[batch, 0, best]
        return drafted["tokens"] / drafted["ms"] * plain["ms"]

    counts = operators()
    fused = float(all(row["fused"] for row in rows))
    for way, by_k in counts.items():
        rows += [figure(f"operators of a round of 24 layers, k = {k}, {way}", count) for k, count in by_k.items()]
    fewer = counts["fused layers"][0] / counts["modules"][0]
    over_modules = cells[1, 0, WAYS[0]]["ms"] / cells[1, 0, best]["ms"]
    return [
        *rows,
        claim("layers are fused", fused, ">=", 1),
        claim("operators of a plain round, fused / modules", fewer, "<=", 0.5),
        claim("plain decoding of one sequence: modules / replayed", config.on_gpu(over_modules), ">=", 5),
        *(claim(f"four draft tokens over none, batch {batch}", gain(batch), ">=", 1.8) for batch in (1, 8, 64)),
        claim("four draft tokens over none, batch 256", gain(256), ">=", 1),
    ]


def bandwidth_part(config: Config) -> list[dict]:
    """See the top."""
    text = "7B shape, plain, one sequence: share of the copy bandwidth"
    if config.gpu and torch.cuda.mem_get_info()[0] < 24e9:  # weights, and the head in float64 while layers are tried
        return [claim(text, None, ">=", 0.7)]
    model = random_model("Qwen2.5-7B" if config.gpu else "tiny", config.device, torch.bfloat16)
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read -= model.get_input_embeddings().weight.nbytes  # one row of it is read
    if not config.gpu:
        model.float()
    prompt, tokens = (64, 64) if config.gpu else (8, 16)
    row = time_ways(model, (1,), (0,), prompt, tokens, WAYS[-1:])[0]
    share = read / (row["ms"] / 1e3) / copy_bandwidth(config)
    return [row, claim(text, config.on_gpu(share), ">=", 0.7)]


# ---------------------------------------------------------------- training


def learn_policy(config: Config, folder: Path) -> None:
    """Train a policy of about 100 M weights on search traces -> its folder, with its drafter."""
    tokenizer = pretrain.make_tokenizer()
    settings = pretrain.Command(clean=config.traces * 3 // 4, noisy=config.traces // 4, tokens=8192)
    plan = pretrain.plan_of(settings)
    torch.manual_seed(0)
    model = pretrain.new_policy(tokenizer, 14, 768).to(config.device)
    # without its cache, which would keep the first weights in bfloat16 for all steps
    with torch.autocast(config.device, torch.bfloat16, cache_enabled=False):
        pretrain.learn(model, plan, 6e-4, "a policy of 100 M weights")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # for the processes that follow
    command = [sys.executable, str(ROOT / "drafter.py"), "--model", str(folder), "--out", str(folder / "drafter")]
    done = subprocess.run([*command, "--seconds", "40", "--prompts", "32"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"drafter.py failed: {done.stderr[-500:]}")


def training_part(config: Config) -> list[dict]:
    """See the top."""
    prompts, samples, max_new, slots = (16, 16, 768, 256) if config.gpu else (2, 4, 48, 8)
    sizes = {"prompts": prompts, "samples": samples, "max_new": max_new}
    with tempfile.TemporaryDirectory() as folder:
        model = "base"
        if config.traces:
            model = f"{folder}/policy"
            learn_policy(config, Path(model))
        settings = step.Config(model=model, device=config.device, rounds=1, steps=3, **sizes)
        rows = step.compare(settings, step.parties_of(settings, (1,), ("--slots", slots)))
    plain, tlt = (row["step"] for row in rows)
    return [*rows, claim("a GRPO step, plain / TLT", config.on_gpu(plain / tlt), ">=", 1), *two_worker_claims(config)]


def two_worker_claims(config: Config) -> list[dict]:
    """Return the claims that only several GPUs can show."""
    reclaimed = preempted = None
    if config.gpu and torch.cuda.device_count() > 1:
        flags = ["--model", "base", "--steps", 4, "--prompts", 16, "--samples", 16, "--max-new", 960]
        with tempfile.TemporaryDirectory() as out:
            steps = train(flags, out).steps
        last = steps[max(steps)]["drafter"]
        reclaimed, preempted = last["reclaimed"], last["preempted"]
    return [
        claim("share of idle time that drafter training has reclaimed", reclaimed, ">=", 0.9),
        claim("seconds from the last response to the end of drafter training", preempted, "<=", 0.1),
    ]


# ---------------------------------------------------------------- memory


def memory_part(config: Config) -> list[dict]:
    """See the top."""
    slot_ratio = update_ratio = None
    figures = []
    if config.gpu:
        model = random_model("Qwen2.5-0.5B", config.device, torch.bfloat16)
        before = torch.cuda.memory_allocated()
        engine = Engine(model, {-1}, 64, 2048, proposers={"eagle": EagleProposer(Drafter(model))})
        slots_taken = torch.cuda.memory_allocated() - before
        slot_ratio = engine.slots * engine.slot_bytes(engine.tokens.shape[1]) / slots_taken
        del engine
        gc.collect()
        update_taken = update_memory(model.float().requires_grad_(True), "cuda")["megabytes"] * 2**20
        update_ratio = forward_bytes(model, 4096) / update_taken
        figures.append(figure("64 slots of 2,048 tokens", slots_taken / 1e9, "GB"))
        figures.append(figure("an update of 4,096 tokens", update_taken / 1e9, "GB"))
    return [
        *figures,
        claim("bytes of a slot, counted / taken", slot_ratio, ">=", 0.9),
        claim("bytes of an update, counted / taken", update_ratio, ">=", 0.9),
    ]


# ---------------------------------------------------------------- the table

FUNCTIONS = {
    "machine": machine_part,
    "exact": exact_part,
    "round": round_part,
    "bandwidth": bandwidth_part,
    "training": training_part,
    "memory": memory_part,
}


def attempt(name: str, config: Config) -> list[dict]:
    """Run a part. If it fails, that is its result: the other parts run, too."""
    try:
        gc.collect()
        torch.cuda.empty_cache()  # what the part before has left
        return FUNCTIONS[name](config)
    except Exception as error:  # anything that a new machine, driver or torch may raise
        traceback.print_exc()
        return [claim(f"the part runs to its end ({reason(error)[:100]})", 0.0, ">=", 1)]


def measure(config: Config) -> Result:
    """Run the parts; each part's rows are printed as it ends. Verdicts come last."""
    device = pick_device(config.device)
    responses, traces = (256, 80_000) if device == "cuda" else (32, 0)
    config = replace(config, device=device, responses=config.responses or responses, traces=config.traces or traces)
    if not config.gpu:
        print("torch sees no GPU: every part runs small, on the CPU, to show that it runs; speeds are NOT TESTED")
    rows: list[dict] = []
    for name in tqdm([name for name in PARTS if name in config.parts], desc="gpu", unit="part"):
        started = time.time()
        found = attempt(name, config)
        found.append(figure("the part took", time.time() - started, "s"))
        part = [{"part": name, **row} for row in sorted(found, key=lambda row: "verdict" in row)]
        tqdm.write(text_table(part, COLUMNS))
        rows += part
    rows.sort(key=lambda row: "verdict" in row)
    counts = Counter(row["verdict"] for row in rows if "verdict" in row)
    replayed = (row["measured"] for row in rows if row.get("claim", "").startswith("plain decoding of one sequence"))
    return Result(next(replayed, None) or 1.0, rows, device, json.dumps(counts))
