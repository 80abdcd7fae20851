"""The GPU path, settled by one command: what is claimed of it, what was measured, and whether that confirms it.

    machine     cost of a launch, bandwidth of copies, attention kernels, attention over a view that grows
    exact       noise as on the CPU; base/ in float32: plain against chains, rounded and replayed rounds; in bfloat16:
                how many responses stay the same, and whether length and reward do on average
    round       a round of the Qwen2.5-0.5B shape, random weights, way by way; speculation at a stated acceptance
    bandwidth   plain decoding of the Qwen2.5-7B shape at batch 1: bytes of weights a second
    training    a policy of about 100 M weights learns Countdown on the spot; its drafter; GRPO steps, plain and TLT
    memory      what Engine.affordable and the update count, against what they take

It needs no network, and takes under nine minutes on one GPU. Each line of the second table is a verdict: CONFIRMED or
REFUTED, or NOT TESTED where this machine cannot tell (no GPU, no second one, too little memory), which is never a pass.
A part that fails is refuted, and the others go on. Without a GPU every part runs at a small size, so that all of its
code has run.

Ratio: plain decoding of the 0.5B shape at one row, replayed over the model's own modules.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from base import pretrain
from bench.anatomy import WAYS, anatomy, operators, random_model, subject_of, time_rounds
from bench.exact import exact_part
from bench.harness import Output, Result, now, train
from bench.verdicts import Found, Place, Verdict
from drafter import Drafter, EagleProposer
from parts.cli import UserError, check_at_least, flag, reason
from parts.devices import pick_device
from parts.engine.cuda_graphs import GraphRecorder
from parts.files import ROOT
from parts.training.logprobs import forward_bytes, logprobs_at
from rollout import Engine

PARTS = ("machine", "exact", "round", "bandwidth", "training", "memory")


@dataclass(frozen=True)
class Config(Output):
    """Settings of this table."""

    parts: tuple[str, ...] = flag(PARTS, "what is measured", PARTS)
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    traces: int = flag(
        0, "search traces for the policy that learns on the spot; 0: 80,000 on a GPU, else base/ is taken"
    )
    responses: int = flag(0, "responses in `exact`; 0: 256 on a GPU, 32 without")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 0, "traces", "responses")
        pick_device(self.device)


def seconds_of(function, turns: int = 20) -> float:
    """Of a call, the mean of some that follow a first one."""
    function()
    started = now()
    for _ in range(turns):
        function()
    return (now() - started) / turns


# ---------------------------------------------------------------- machine


def copy_bandwidth(place: Place) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(1 << (29 if place.gpu else 24), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def attention_backends(query, key, mask) -> list[str]:
    """Kernels that take masked attention as the engine asks for it."""
    names = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
            names.append(backend.name.lower())
        except RuntimeError:
            continue
    return names


def machine_part(place: Place) -> Found:
    """See the top."""
    tiny = torch.zeros(8, device=place.device)
    launch = seconds_of(lambda: [tiny.add_(1) for _ in range(1000)], 5) / 1000
    bandwidth = copy_bandwidth(place)
    dtype = torch.bfloat16 if place.gpu else torch.float32
    query = torch.randn(8, 2, 7, 64, dtype=dtype, device=place.device)
    key = torch.randn(8, 2, 2056, 64, dtype=dtype, device=place.device)[:, :, :2048]  # part of a slot
    mask = torch.zeros(8, 1, 7, 2048, dtype=dtype, device=place.device)

    def attention_inputs(views) -> None:
        for view in views:
            part = key[:, :, :view]
            F.scaled_dot_product_attention(query, part, part, attn_mask=mask[..., :view])

    backends = attention_backends(query, key, mask)
    attention_inputs(range(1024, 1032))
    same = seconds_of(lambda: attention_inputs([1024] * 64), 3)
    started = now()
    attention_inputs(range(128, 128 + 8 * 64, 8))  # sizes that come for the first time
    growing = now() - started
    rows = [
        {"name": "a launch", "value": launch * 1e6, "unit": "us"},
        {"name": "copy bandwidth", "value": bandwidth / 1e9, "unit": "GB/s"},
        {"name": "attention: " + ", ".join(backends), "value": None, "unit": ""},
        {"name": "64 attentions over one view", "value": same * 1e3, "unit": "ms"},
        {"name": "64 attentions over a view that grows", "value": growing * 1e3, "unit": "ms"},
    ]
    ratio = growing / same if place.gpu else None
    has_kernel = float("efficient_attention" in backends)
    verdicts = [
        Verdict("attention with a mask is one kernel", has_kernel if place.gpu else None, 1.0),
        Verdict("a view that grows costs no plans: growing / repeated", ratio, 3.0, at_least=False),
        Verdict("cuDNN attention is off", float(torch.backends.cuda.cudnn_sdp_enabled()), 0.0, at_least=False),
    ]
    return Found(rows, verdicts)


# ---------------------------------------------------------------- speed


def round_part(place: Place) -> Found:
    """See the top."""
    shape, rows_of, ways = ("Qwen2.5-0.5B", (1, 8, 64, 256), WAYS) if place.gpu else ("tiny", (1, 4), WAYS[:2])
    model = random_model(shape, place.device, torch.bfloat16 if place.gpu else torch.float32)
    rows = anatomy(model, rows_of, (0, 4, 8), 64 if place.gpu else 8, 64 if place.gpu else 16, ways)
    cells = {(row["rows"], row["k"], row["way"]): row for row in rows}
    best = ways[-1]

    def gain(n: int) -> float:
        """Of four drafts over none."""
        drafted, plain = cells[n, 4, best], cells[n, 0, best]
        return drafted["tokens"] / drafted["ms"] * plain["ms"]

    counts = operators()
    modules, fused = counts["modules"], counts["fused layers"]
    for way, by_k in counts.items():
        for k, count in by_k.items():
            rows.append({"name": f"operators of a round of 24 layers, k = {k}, {way}", "value": count, "unit": ""})
    over_modules = cells[1, 0, WAYS[0]]["ms"] / cells[1, 0, best]["ms"] if place.gpu else None
    verdicts = [
        Verdict("layers are fused", float(all(row["fused"] for row in cells.values())), 1.0),
        Verdict("operators of a plain round, fused / modules", fused[0] / modules[0], 0.5, at_least=False),
        Verdict("plain decoding at one row: modules / replayed", over_modules, 5.0),
    ]
    for n in (1, 8, 64):
        verdicts.append(Verdict(f"four drafts over none, {n} rows", gain(n) if place.gpu else None, 1.8))
    verdicts.append(Verdict("four drafts over none, 256 rows", gain(256) if place.gpu else None, 1.0))
    return Found(rows, verdicts)


def bandwidth_part(place: Place) -> Found:
    """See the top."""
    claim = "7B shape, plain, one row: share of the copy bandwidth"
    if place.gpu and torch.cuda.mem_get_info()[0] < 24e9:  # weights, and the head in float64 while layers are tried
        return Found([], [Verdict(claim, None, 0.7)])
    model = random_model("Qwen2.5-7B" if place.gpu else "tiny", place.device, torch.bfloat16)
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read -= model.get_input_embeddings().weight.nbytes  # one row of it
    if not place.gpu:
        model.float()
    row = anatomy(model, (1,), (0,), 64 if place.gpu else 8, 64 if place.gpu else 16, WAYS[-1:])[0]
    share = read / (row["ms"] / 1e3) / copy_bandwidth(place)
    return Found([{**row, "share": share}], [Verdict(claim, share if place.gpu else None, 0.7)])


# ---------------------------------------------------------------- training


def learn_policy(place: Place, folder: Path) -> None:
    """A policy of about 100 M weights that has seen so many search traces, as a folder with its drafter."""
    tokenizer = pretrain.make_tokenizer()
    settings = pretrain.Command(clean=place.traces * 3 // 4, noisy=place.traces // 4, tokens=8192)
    plan = pretrain.plan_of(settings)
    torch.manual_seed(0)
    model = pretrain.new_policy(tokenizer, 14, 768).to(place.device)
    # without its cache, which would keep the first weights in bfloat16 for all steps
    with torch.autocast(place.device, torch.bfloat16, cache_enabled=False):
        pretrain.learn(model, plan, 6e-4, "a policy of 100 M weights")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # for the processes that follow
    command = [sys.executable, str(ROOT / "drafter.py"), "--model", str(folder), "--out", str(folder / "drafter")]
    done = subprocess.run([*command, "--seconds", "40", "--prompts", "32"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"drafter.py failed: {done.stderr[-500:]}")


def training_part(place: Place) -> Found:
    """See the top."""
    sizes = ["--prompts", 16, "--samples", 16, "--max-new", 768, "--slots", 256] if place.gpu else []
    sizes = sizes or ["--prompts", 2, "--samples", 4, "--max-new", 48, "--slots", 8]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = "base"
        if place.traces:
            model = folder / "policy"
            learn_policy(place, model)
        flags = ["--model", model, "--device", place.device, "--steps", 3, "--workers", 1, *sizes]
        plain = train([*flags, "--drafter", "off", "--strategy", "off"], folder / "plain").steps
        tlt = train(flags, folder / "tlt").steps
    rows = []
    for party, steps in (("plain", plain), ("TLT", tlt)):
        for step in sorted(steps)[1:]:
            seconds = steps[step]["seconds"]
            rows.append({"name": f"step {step}, {party}", "value": seconds["step"], "unit": "s"})
    whole = sum(row["value"] for row in rows if "plain" in row["name"])
    ratio = whole / sum(row["value"] for row in rows if "TLT" in row["name"])
    return Found(rows, [Verdict("a GRPO step, plain / TLT", ratio if place.gpu else None, 1.0), *team_verdicts(place)])


def team_verdicts(place: Place) -> list[Verdict]:
    """What only several GPUs can show."""
    claims = (
        ("idle time that drafter training has reclaimed", 0.9, True),
        ("seconds from the last response to the end of drafter training", 0.1, False),
    )
    if not place.gpu or torch.cuda.device_count() < 2:
        return [Verdict(claim, None, bound, at_least) for claim, bound, at_least in claims]
    with tempfile.TemporaryDirectory() as out:
        steps = train(["--model", "base", "--steps", 4, "--prompts", 16, "--samples", 16, "--max-new", 960], out).steps
    last = steps[max(steps)]["drafter"]
    figures = (last["reclaimed"], last["preempted"])
    return [Verdict(claim, value, bound, at_least) for value, (claim, bound, at_least) in zip(figures, claims)]


# ---------------------------------------------------------------- memory


def recording_bytes(model) -> tuple[int, int]:
    """GPU memory that recorded rounds of 64 rows and fewer take: all in one pool, and each in its own."""
    taken = []
    for record in (GraphRecorder(), lambda function: GraphRecorder()(function)):
        subject = subject_of(model, 64, 64, 64, record)
        subject.engine.graphs = subject.graphs
        gc.collect()  # engines and graphs refer to each other
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]  # the driver's own share of a graph is not in torch's books
        for k in (0, 4, 8):
            time_rounds(subject, k)
        torch.cuda.empty_cache()
        taken.append(before - torch.cuda.mem_get_info()[0])
    return taken[0], taken[1]


def memory_part(place: Place) -> Found:
    """See the top."""
    rows_claim = "bytes of a row, counted / taken"
    update_claim = "bytes of an update, counted / taken"
    if not place.gpu:
        return Found([], [Verdict(rows_claim, None, 0.9), Verdict(update_claim, None, 0.9)])
    model = random_model("Qwen2.5-0.5B", place.device, torch.bfloat16)
    shared, alone = recording_bytes(model)
    gc.collect()
    before = torch.cuda.memory_allocated()
    engine = Engine(model, {-1}, 64, 2048, proposers={"eagle": EagleProposer(Drafter(model))})
    taken = torch.cuda.memory_allocated() - before
    counted = engine.slots * engine.slot_bytes(engine.tokens.shape[1])
    del engine
    gc.collect()
    model.float().requires_grad_(True)
    ids = torch.randint(3, 1000, (8, 512), device=place.device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        picked = torch.ones_like(ids, dtype=torch.bool)
        logprobs_at(model, ids, picked, ids.flatten(), 1.0)[0].sum().backward()
    update_taken = torch.cuda.max_memory_allocated() - before
    rows = [
        {"name": "64 rows of 2,048 tokens", "value": taken / 1e9, "unit": "GB"},
        {"name": "recorded rounds that share their memory", "value": shared / 1e9, "unit": "GB"},
        {"name": "the same, each with memory of its own", "value": alone / 1e9, "unit": "GB"},
        {"name": "an update of 4,096 tokens", "value": update_taken / 1e9, "unit": "GB"},
    ]
    update_ratio = forward_bytes(model, 4096) / update_taken
    return Found(rows, [Verdict(rows_claim, counted / taken, 0.9), Verdict(update_claim, update_ratio, 0.9)])


# ---------------------------------------------------------------- the table

FUNCTIONS = {
    "machine": machine_part,
    "exact": exact_part,
    "round": round_part,
    "bandwidth": bandwidth_part,
    "training": training_part,
    "memory": memory_part,
}


def attempt(name: str, place: Place) -> Found:
    """A part. If it fails, that is what was found: the other parts are to be seen, too."""
    try:
        gc.collect()
        torch.cuda.empty_cache()  # what the part before has left
        return FUNCTIONS[name](place)
    except Exception as error:  # whatever a new machine, driver or torch has in store
        traceback.print_exc()
        return Found([], [Verdict(f"the part runs to its end ({reason(error)[:100]})", 0.0, 1.0)])


def measure(config: Config) -> Result:
    """Part by part; each part's lines are printed as it ends."""
    device = pick_device(config.device)
    gpu = device == "cuda"
    place = Place(device, config.responses or (256 if gpu else 32), config.traces or (80_000 if gpu else 0))
    if not place.gpu:
        print("torch sees no GPU: every part runs small, on the CPU, to show that it runs; speeds are NOT TESTED")
    rows: list[dict] = []
    ratio = 1.0
    for name in tqdm([name for name in PARTS if name in config.parts], desc="gpu", unit="part"):
        started = time.time()
        found = attempt(name, place)
        part = [{"part": name, **row} for row in found.rows]
        for verdict in found.verdicts:
            line = {"claim": verdict.claim, "verdict": verdict.word, "measured": verdict.measured}
            part.append({"part": name, **line, "bound": verdict.bound, "at_least": verdict.at_least})
            if verdict.claim.startswith("plain decoding at one row"):
                ratio = verdict.measured or ratio
        part.append({"part": name, "name": "the part took", "value": time.time() - started, "unit": "s"})
        tqdm.write(table(part))
        rows += part
    counts = {word: sum(row.get("verdict") == word for row in rows) for word in ("CONFIRMED", "REFUTED", "NOT TESTED")}
    return Result(ratio, rows, device, json.dumps(counts))


def table(rows: list[dict]) -> str:
    """The rows as text: figures, then verdicts."""
    lines = []
    for row in rows:
        if "way" in row:
            where = f"{row['rows']:4d} rows, k = {row['k']}, {row['way']}"
            lines.append(f"{row['part']:>10}  {where:<52} {row['ms']:10.3f} ms {row['tokens']:6.2f} tokens a row")
        elif "name" in row:
            value = "" if row["value"] is None else f"{row['value']:10.4g}"
            lines.append(f"{row['part']:>10}  {row['name']:<52} {value} {row['unit']}")
    for row in rows:
        if "verdict" in row:
            measured = "         -" if row["measured"] is None else f"{row['measured']:10.4g}"
            sign = ">=" if row["at_least"] else "<="
            lines.append(f"{row['verdict']:>10}  {row['claim']:<66} {measured} {sign} {row['bound']:g}")
    return "\n".join(lines)
