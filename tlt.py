"""TLT: GRPO on many workers, one per GPU (or CPU core), with speculative rollout and a drafter that is trained in the time that would be lost.
`python tlt.py` is the whole system; the loop itself is train_grpo.train.

A worker in a step:

    ROLLOUT   take groups from the queue, generate and grade them; the strategy says how to draft         rollout.py, strategy.py
    DRAFTER   no group and no row left: train the drafter on the features of one's own responses, until the last response of all workers is there
    meet      responses go to everybody, drafters are averaged, weighted by the steps that each has made
    UPDATE    of the policy                                                                                train_grpo.py

Rules. Nobody waits inside the preemptible part: between two micro-steps of the drafter a worker looks at the Board, and that is all, so the update begins at most one micro-step
after the last response. It is the LAST response that ends drafter training, not the first worker that is done. The engine drafts with a copy of the
drafter that changes between rollouts only. Features stay on the worker that made them; the buffer holds this rollout's responses and the long ones of the last, because those
who idle first have seen the short responses only.

One worker is never idle, so there the drafter gets a small share of the rollout's time instead: a drafter that stands still while the policy moves costs more.

Three doors, one worker function:
    RANK is set (torchrun, accelerate launch, several hosts)   -> join that group
    one worker                                                 -> call it directly, so breakpoint() works
    else                                                       -> spawn a process per GPU or CPU worker

Work queue. A rollout's groups are numbered; `board.add("next")` hands out the next number to whichever worker has room, so fast workers take more.
No collective runs while anybody generates: workers look at the Board (a TCP key-value store), and meet only when all responses exist.

Every worker then holds all responses and updates the same weights: micro-batches are dealt out by content, gradients are summed, each worker steps the same
optimizer. So 1, 2 and 3 workers, with and without speculation, make the same tokens and, to fp32 rounding, the same policy.

Left out: stealing rows of the tail from a busy worker, drafter checkpoints with optimizer state (a resumed run goes on with its weights and new moments).
"""

import copy
import os
import shutil
import signal
import socket
import sys
import threading
import time
import types
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

from drafter import Drafter, FeatureBuffer, LearnedDrafts, NGramDrafts, Trainer
from report import STATES
from rollout import Engine, run
from strategy import make_strategy
from tasks import UserError
from train_grpo import Alone, Config, bfloat16, flag, logits_at, parse_flags, restarted, train


@dataclass(frozen=True)
class TLTConfig(Config):
    out: str = flag("runs/tlt", Config.__dataclass_fields__["out"].metadata["help"])
    drafter: str = flag("adaptive", "off; static: warm-started, then frozen; adaptive: trained on by workers that have gone idle", ("off", "static", "adaptive"))
    strategy: str = flag("goodput", "how drafting is chosen: off, goodput, beg-mab, or a fixed draft length such as 4 (see strategy.py)")
    warm_start: float = flag(20.0, "with no drafter to start from: seconds that all workers train one after the first rollout; 0: start from a random one")
    drafter_from: str = flag("", "folder of a drafter to start from (`make drafter`); empty: the policy's own subfolder drafter/, if it has one")
    workers: int = flag(0, "worker processes; 0: one per GPU, or one per CPU core without GPUs")
    shard: bool = flag(False, "spread the policy's fp32 weights, gradients and optimizer state over the workers (FSDP2): for policies that do not fit a GPU whole")
    patience: float = flag(600.0, "seconds without a sign of life (a round, a micro-batch, a micro-step) after which a worker counts as hung and the run is stopped")

    def __post_init__(self):
        super().__post_init__()
        make_strategy(self.strategy, [])
        if self.drafter_from and not (Path(self.drafter_from) / "drafter.safetensors").exists():
            raise UserError(f"--drafter-from {self.drafter_from}: no drafter.safetensors there; `make drafter` writes one")
        gpus = torch.cuda.device_count() if self.device != "cpu" else 0
        if not 0 <= self.warm_start < float("inf"):
            raise UserError(f"--warm-start {self.warm_start}: seconds, 0 or more")
        if not self.patience > 0:  # nor nan
            raise UserError(f"--patience {self.patience:g}: must be above 0 seconds")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be at least 1, or 0 for one per GPU or core")
        if gpus and self.workers > gpus:
            raise UserError(f"--workers {self.workers}: there are only {gpus} GPUs here; use --workers {gpus} or --device cpu")
        if not gpus and self.workers > (os.cpu_count() or 1) * 4:
            raise UserError(f"--workers {self.workers}: there are only {os.cpu_count()} cores here; workers beyond that slow each other down")


class Board:
    """What the workers tell each other while they work: counters in a TCP store that rank 0 serves. Every call returns at once."""

    def __init__(self, host, port, hosted=None):
        self.store = hosted or TCPStore(host, port, is_master=False, timeout=timedelta(seconds=120))

    @staticmethod
    def host():
        """A store on a free port, served by this process."""
        return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))

    def add(self, key, n=1):
        """Add to a counter -> its new value. n = 0 reads it."""
        return self.store.add(key, n)


class Spot:
    """Spot training: the drafter learns in time that nobody else wants.

    The learner is kept in float32 and trained on this worker's own responses; the engine drafts with a copy that changes only between rollouts.
    """

    def __init__(self, actor, config, rank):
        torch.manual_seed(config.seed)  # every worker's drafter starts alike
        self.learner, self.served = Drafter(actor, torch.float32), Drafter(actor)
        places = [Path(config.out) / "drafter"] * (config.resume or restarted()) + [Path(config.drafter_from)] * bool(config.drafter_from) + [Path(config.model) / "drafter"]
        start = next((p for p in places if (p / "drafter.safetensors").exists()), None)
        if start:
            self.learner.load(start)
        self.fresh = self.young = start is None  # not warm-started yet; has much to learn
        self.trainer, self.buffer = Trainer(self.learner, seed=config.seed * 1000 + rank), FeatureBuffer()
        self.since, self.steps, self.loss = 0, 0, 0.0  # micro-steps since the last average; micro-steps and their losses since the last notes

    def begin(self, rollout):
        self.buffer.begin(rollout)
        self.trainer.publish(self.served)

    def step(self):
        self.trainer.lr = 3e-3 if self.young and self.trainer.steps < 1500 else 7e-4  # to follow the policy, less: at 3e-3 a good drafter gets worse
        self.loss += self.trainer.step(self.buffer)[0]
        self.since, self.steps = self.since + 1, self.steps + 1

    @torch.no_grad()
    def average(self, team_sum):
        """The workers' drafters become their mean, weighted by the steps that each has made since the last one. Optimizer states stay as they are."""
        weights, n = [*self.learner.parameters(), *self.trainer.average], torch.tensor([float(self.since)], device=self.learner.fc.weight.device)
        sums = [w * n for w in weights] + [n]
        team_sum(sums)
        if sums[-1] > 0:
            for w, total in zip(weights, sums):
                w.copy_(total / sums[-1])
        self.since = 0

    def save(self, folder):
        self.trainer.publish(self.served)
        self.served.save(folder)


class Team(Alone):
    """All workers, as the training loop sees them (Alone is the same for one)."""

    ONE_WORKER_SHARE = 0.05  # drafter training as a share of the rollout's time, for one worker, who is never idle

    def __init__(self, config, tell=lambda state: None):
        from accelerate import Accelerator
        from accelerate.utils import broadcast_object_list, gather_object
        self.accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available())
        self.gather = gather_object
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        super().__init__(config, tell)
        self.device = "cpu" if self.accelerator.device.type == "cpu" else str(self.accelerator.device)  # accelerate says "cpu:0"
        hosted = Board.host() if self.rank == 0 else None
        address = [os.environ.get("MASTER_ADDR", "127.0.0.1"), hosted.port if hosted else 0]
        if self.size > 1:
            broadcast_object_list(address)
        self.board, self.rollouts, self.config = Board(*address, hosted), 0, config

    def prepare(self, model):
        """With --shard each worker keeps a slice of every weight, and gathers a layer when it computes with it. What generates is a whole copy."""
        self.sharded = self.config.shard and self.size > 1
        if not self.sharded:
            return super().prepare(model)
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        actor = copy.deepcopy(model).requires_grad_(False)
        actor = (bfloat16(actor) if self.device != "cpu" else actor).to(self.device)
        mesh = torch.distributed.device_mesh.init_device_mesh(self.accelerator.device.type, (self.size,))
        for part in (*model.get_decoder().layers, model):
            fully_shard(part, mesh=mesh)  # brings its slice to the GPU
            part.set_gradient_divide_factor(1.0)  # sums, not means: the weights of the loss are those of the whole mini-batch
            part.set_force_sum_reduction_for_comms(True)
        model.logits_at = types.MethodType(logits_at, model)
        register_fsdp_forward_method(model, "logits_at")
        return model, actor

    def engine(self, actor, stop, slots, spare):
        """An engine with its drafters; with them come the spot trainer and the strategy."""
        self.spot = Spot(actor, self.config, self.rank) if self.config.drafter != "off" else None
        drafters = {"learned": LearnedDrafts(self.spot.served)} if self.spot else {}
        if self.config.strategy != "off":
            drafters["n-gram"] = NGramDrafts()
        self.strategy = make_strategy(self.config.strategy, list(drafters))
        self.made = Engine(actor, stop, slots, drafters=drafters, spare=spare)
        self.tried, self.right = [], []  # guesses of the learned drafter by depth since the last notes
        return self.made

    def rollout(self, engine, groups, sampling, grade, progress):
        """As Alone.rollout, but the groups are shared out by the Board, the responses of all workers come back, and who has nothing left to
        generate trains the drafter until everybody is done."""
        self.rollouts += 1
        name = f"rollout {self.rollouts} "  # fresh counters for each rollout: no reset, so no race
        spot, total, started, done = self.spot, sum(len(g.seeds) for g in groups), time.time(), []
        engine.most = fair_share([len(g.seeds) for g in groups], self.size, engine.slots)
        adaptive = spot and self.config.drafter == "adaptive"
        if spot:
            spot.begin(self.rollouts)
            if hasattr(self.strategy, "begin"):
                self.strategy.begin(["learned"])  # the policy has moved, the drafter has learned

        def mine():
            while (i := self.board.add(name + "next") - 1) < len(groups):
                yield groups[i]

        def choose(live):
            draft = self.strategy(live)
            self.clock.enter("speculative" if draft.k else "rollout")
            return draft

        def all_done():
            count = self.board.add(name + "responses", 0)
            progress(count)
            return count >= total

        def observe(rows, arm, seconds, tried, right):
            if arm.kind == "learned":
                self.tried, self.right = ([a + b for a, b in zip_longest(total, new, fillvalue=0)] for total, new in ((self.tried, tried), (self.right, right)))
            if hasattr(self.strategy, "observe"):
                self.strategy.observe(rows, arm, seconds, tried, right)

        choose.observe = observe
        for r in self.work(engine, mine(), sampling, grade, choose):
            if adaptive or spot and spot.fresh:
                spot.buffer.add(r)
            r.hidden = None  # features stay with the worker that made them
            done.append(r)
            progress(self.board.add(name + "responses"))
        spare(all_done, self.clock, spot if adaptive else None)
        done = self.everyone(done)
        if spot and spot.fresh:  # the warm start, with an average about every two seconds, lest the workers' drafters drift apart
            parts = round(self.config.warm_start / 2) or 1
            pauses, spot.fresh = [self.config.warm_start / parts] * parts, False
        else:
            pauses = [self.ONE_WORKER_SHARE * (time.time() - started)] if adaptive and self.size == 1 else []
        for seconds in pauses or [0.0] * bool(adaptive):
            end = time.time() + seconds
            spare(lambda: time.time() >= end, self.clock, spot)
            spot.average(self.sum)
        return sorted((r for part in done for r in part), key=lambda r: (r.group, r.sample))

    def notes(self):
        spot, stats = self.spot, self.made.stats
        if not self.made.drafters:
            return {}
        told = {k: stats[k] for k in ("rounds", "spec_rounds", "spec_row_rounds", "spec_tokens", "spec_drafts")}
        for name, counts in (("tried", self.tried), ("right", self.right)):
            told.update({f"{name}{j}": sum(counts[j:j + 1]) for j in range(12)})
        self.tried, self.right = [], []
        told.update(drafter_steps=spot.steps if spot else 0, drafter_loss=spot.loss if spot else 0.0)
        if spot:
            spot.steps, spot.loss = 0, 0.0
        return told

    def save(self, out):
        if self.spot and self.rank == 0:
            self.spot.save(out / "drafter")

    def deploy(self, folder):
        """The drafter, and what decodes with it in stock transformers."""
        if self.spot:
            self.spot.save(folder / "drafter")
            shutil.copytree(Path(__file__).parent / "custom_generate", folder / "custom_generate", ignore=shutil.ignore_patterns("__pycache__"))

    def sum(self, tensors):
        if self.size > 1:
            flat = torch.cat([t.flatten() for t in tensors])  # one message instead of hundreds
            flat = self.accelerator.reduce(flat, "sum")
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def everyone(self, value):
        return self.gather([value]) if self.size > 1 else [value]


def fair_share(sizes, workers, slots):
    """Rows that a worker may hold at once, of groups of these sizes: with slots enough for more than its share of the groups, the first to come would leave nothing for the others."""
    return min(slots, -(-len(sizes) // workers) * max(sizes))


def spare(over, clock, spot=None):
    """Spend the time until over() on the drafter, or wait. It is asked between micro-steps, so at most one of them is in its way; nothing here waits for
    another worker, so nobody has to be told to stop."""
    while not over():
        if spot and spot.buffer.rows:
            clock.enter("drafter")
            spot.step()
        else:
            clock.enter("idle")
            time.sleep(0.005)
    clock.enter("idle")


def worker(config, tell=lambda state: None):
    """The one worker function behind all three doors. tell: see Clock."""
    torch.manual_seed(config.seed)
    team = Team(config, tell)
    train(config, team)
    team.accelerator.end_training()  # leaves the process group, too


class Pulse:
    """What each spawned worker is doing, and since when it has said nothing: in shared memory, for the parent."""

    NAMES = ("start", *STATES)

    def __init__(self, count):
        self.state, self.heard = mp.get_context("spawn").Array("i", count, lock=False), mp.get_context("spawn").Array("d", [time.time()] * count, lock=False)

    def tell(self, rank, state):
        self.state[rank], self.heard[rank] = self.NAMES.index(state), time.time()

    def doing(self, rank):
        return self.NAMES[self.state[rank]]

    def silent(self, patience):
        """Workers that have said nothing for so many seconds. Those that wait for a hung one in a collective are silent, too; so are those that wait while another
        one loads the model or writes a checkpoint, which may take long."""
        if any(self.doing(rank) in ("start", "checkpoint") for rank in range(len(self.heard))):
            return []
        return [rank for rank, heard in enumerate(self.heard) if time.time() - heard > patience]


def spawned(rank, config, count, port, threads, said, pulse):
    """A child process: set what torchrun would set, and never outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=lambda: (mp.parent_process().join(), os._exit(1)), daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS=str(threads))
    torch.set_num_threads(threads)
    try:
        worker(config, lambda state: pulse.tell(rank, state))
    except RuntimeError as error:
        if "onnection" in str(error):  # another worker is gone, and this one has only noticed: let the other one's reason be heard first
            time.sleep(3)
        raise
    except UserError as error:
        said.put(str(error))  # several workers may make the same mistake: the parent prints one line
        os._exit(2)  # at once: the others may wait for this worker in a collective


def spawn(config, count):
    """Run `count` workers on this host; when one dies or hangs, stop the rest and say which, and what it was doing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)  # spawn does not divide the cores: without this they oversubscribe, 10x slower
    os.environ["OMP_NUM_THREADS"] = str(threads)
    said = mp.get_context("spawn").SimpleQueue()
    pulse = Pulse(count)
    context = mp.spawn(spawned, (config, count, port, threads, said, pulse), nprocs=count, join=False)

    try:
        while not context.join(timeout=1.0, grace_period=3):  # when one has died, a hung one gets 3 s, not torch's 30
            if hung := [rank for rank in pulse.silent(config.patience) if context.processes[rank].is_alive()]:
                sys.exit(f"tlt.py: no sign of life for {config.patience:g} s from " + ", ".join(f"worker {r} ({pulse.doing(r)})" for r in hung)
                         + "; all were stopped. Continue with --resume; if it was only slow, with a larger --patience.")
    except mp.ProcessExitedException as error:
        if not said.empty():
            raise UserError(said.get()) from error
        cause = f"signal {error.signal_name}" if error.signal_name else f"exit status {error.exit_code}"
        sys.exit(f"tlt.py: worker {error.error_index} died ({cause}) in state {pulse.doing(error.error_index)}; the others were stopped. Continue with --resume.")
    except mp.ProcessRaisedException as error:
        sys.exit(f"tlt.py: worker {error.error_index} failed in state {pulse.doing(error.error_index)}; the others were stopped. Continue with --resume.\n{error}")
    finally:  # whatever happened, Ctrl-C included
        for process in context.processes:
            process.terminate()
        for process in context.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def demo_flags():
    """The demo's settings for this machine: a language model if there is a GPU and the hub answers, else the tiny policy in base/."""
    if not torch.cuda.is_available():
        why = "torch sees no GPU"
    else:
        try:
            from huggingface_hub import model_info
            model_info("Qwen/Qwen2.5-0.5B", timeout=10)
            print("demo: Qwen/Qwen2.5-0.5B on countdown-hard, one worker per GPU")
            return ["--model", "Qwen/Qwen2.5-0.5B", "--task", "countdown-hard", "--lr", "1e-6", "--max-new", "1024", "--slots", "256", "--prompts", "32",
                    "--steps", "100", "--micro-tokens", "16384"]
        except Exception as error:  # many kinds of network failure, one consequence
            why = f"the hub does not answer ({type(error).__name__})"
    print(f"demo: the tiny policy in base/ on countdown, two CPU workers, because {why}")
    return ["--model", "base", "--device", "cpu", "--workers", "2", "--max-new", "960"]


def main():
    argv = sys.argv[1:]
    if "--demo" in argv:
        argv.remove("--demo")
        argv = demo_flags() + argv  # what is given by hand comes later and wins
    config = parse_flags(TLTConfig, __doc__ + "\n--demo: settings for a demonstration on this machine; other flags override them", argv)
    if "RANK" in os.environ:
        return worker(config)
    count = config.workers or (torch.cuda.device_count() if config.device != "cpu" else 0) or os.cpu_count() or 1
    worker(config) if count == 1 else spawn(config, count)


if __name__ == "__main__":
    run(main)
