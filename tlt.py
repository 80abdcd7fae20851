"""TLT: GRPO on many workers, one per GPU (or CPU core), with speculative rollout and a drafter that idle workers train.
`python tlt.py` is the whole system; the loop itself is train_grpo.train.

A worker in a step:

    ROLLOUT   take groups from the queue, generate and grade them; the strategy says how to draft
    DRAFTER   no group and no sequence left: train the drafter on the features of its own responses (spot.py), until the
              last response of all workers is finished
    meet      every worker gets all responses; drafters are averaged, weighted by the steps that each has made
    UPDATE    of the policy (train_grpo.py)

Rules. Drafter training can be interrupted at any step: between two steps a worker reads the Board, and that is all, so
the update begins at most one step after the last response. The LAST response ends drafter training, not the first
worker that is done. The engine drafts with a copy of the drafter that changes between rollouts only. Features stay on
the worker that made them; the buffer holds this rollout's responses and the long ones of the last, because a worker
that idles early has seen short responses only. Held-out responses are never learned from.

One worker alone is never idle. It spends a small share of the rollout's time on the drafter instead: a drafter that
stands still while the policy moves costs more.

Three ways to start, one worker function:
    RANK is set (torchrun, accelerate launch, several hosts)   -> join that group
    one worker                                                 -> call it directly, so that breakpoint() works
    else                                                       -> start a process per worker (parts/running/launcher.py)

Work queue. The groups of a rollout are numbered; `board.add("next")` hands out the next number to whichever worker has
free slots, so fast workers take more. No collective runs while a worker generates: workers read the Board (a TCP
key-value store), and meet only when all responses exist.

Every worker then holds all responses and updates the same weights: micro-batches are dealt out by content, gradients
are summed, each worker steps the same optimizer. So 1, 2 and 3 workers, with and without speculation, make the same
tokens and, to fp32 rounding, the same policy.

Left out: taking over sequences of the tail from a busy worker; saving the moments of the drafter's optimizer.
"""

import contextlib
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from drafter import EagleProposer
from parts.cli import UserError, check_above, check_at_least, flag, parse_flags, run
from parts.engine.interfaces import Group, Response, Stats
from parts.engine.ngram import NgramProposer
from parts.files import ROOT, find_folder
from parts.running import checkpoints
from parts.running.communication import join, sum_up
from parts.running.demo import demo_flags, real_flags
from parts.running.launcher import spawn
from parts.training.fsdp import FSDPLayout
from report import SpeculationStats
from rollout import Engine
from spot import SpotTrainer, train_until
from strategy import CountingStrategy, make_strategy
from train_grpo import Config, Worker, check, train


@dataclass(frozen=True)
class TLTConfig(Config):
    """The settings of train_grpo.Config, and those that TLT adds."""

    out: str = flag("runs/tlt", Config.__dataclass_fields__["out"].metadata["help"])
    drafter: str = flag("adaptive", "static: frozen; adaptive: trained by idle workers", ("off", "static", "adaptive"))
    ngram: bool = flag(False, "let the strategy also choose n-gram drafts, for responses that repeat themselves")
    strategy: str = flag("goodput", "how far to draft: off, goodput, beg-mab, or a fixed length such as 4")
    warm_start: float = flag(
        120.0, "without a drafter: seconds of training, in parts after the first rollouts, or until it is good"
    )
    draft_vocab: int = flag(0, "token ids that the drafter may draft; 0: all, of a large vocabulary those in use")
    drafter_from: str = flag("", "folder of a drafter to start from; empty: the policy's own subfolder drafter/")
    workers: int = flag(0, "worker processes; 0: one per GPU, or one per CPU core without GPUs")
    workers_per_gpu: int = flag(1, "workers that share a GPU and its memory, e.g. 2, where there is but one")
    shard: bool = flag(False, "spread the policy over the workers (FSDP2), if it does not fit a GPU whole")
    patience: float = flag(600.0, "seconds without a heartbeat after which a worker counts as hung")

    def __post_init__(self):
        """Raises UserError."""
        super().__post_init__()
        make_strategy(self.strategy, [])
        if self.drafter_from and not (Path(self.drafter_from) / "drafter.safetensors").exists():
            folder = f"--drafter-from {self.drafter_from}"
            raise UserError(f"{folder}: no drafter.safetensors there; `make drafter` writes one")
        if not self.resume:
            checkpoints.check_not_replaced(Path(self.out), "drafter_from", self.drafter_from)
        if self.shard and self.lora_rank:
            raise UserError("--shard with --lora-rank: adapters are not spread over the workers; leave one of them out")
        check_at_least(self, 0, "warm_start", "workers", "draft_vocab")
        check_at_least(self, 1, "workers_per_gpu")
        check_above(self, 0, "patience")
        if self.shard and self.workers_per_gpu > 1:
            raise UserError(f"--workers-per-gpu {self.workers_per_gpu}: with --shard each worker needs its own GPU")
        cores = os.cpu_count() or 1
        workers = int(os.environ.get("LOCAL_WORLD_SIZE", self.workers))
        if self.gpus and workers > self.gpus * self.workers_per_gpu:
            advice = "raise --workers-per-gpu, or use --device cpu"
            raise UserError(f"--workers {workers}: there are only {self.gpus} GPUs here; {advice}")
        if not self.gpus and workers > cores * 4:
            raise UserError(f"--workers {workers}: too many, there are only {cores} cores here")

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of this host that are used."""
        return torch.cuda.device_count() if self.device != "cpu" else 0


LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Board:
    """Counters that the workers share while they work, in a TCP store."""

    def __init__(self, host: str, port: int, hosted: TCPStore | None = None):
        """hosted: the store itself, in the process that serves it."""
        self.store = hosted or TCPStore(host, port, is_master=False, timeout=timedelta(seconds=120))

    @staticmethod
    def host(address: str = "127.0.0.1") -> TCPStore:
        """Return a store on a free port, served by this process. address: where the workers look for it; the loopback
        address cannot be reached from other hosts.
        """
        listener = socket.create_server(("127.0.0.1" if address in LOOPBACK else "", 0))
        port = listener.getsockname()[1]
        settings = {"is_master": True, "wait_for_workers": False, "timeout": timedelta(seconds=120)}
        return TCPStore("127.0.0.1", port, master_listen_fd=listener.detach(), **settings)

    def add(self, key: str, n: int = 1) -> int:
        """Add to a counter -> its new value, at once. n = 0 reads it."""
        return self.store.add(key, n)

    def wait(self, key: str, count: int) -> None:
        """Wait until a counter has reached `count`, however long that takes."""
        while self.add(key, 0) < count:
            time.sleep(0.02)


# ---------------------------------------------------------------- the workers


def fair_share(sizes: list[int], workers: int, slots: int) -> int:
    """Return how many sequences a worker may hold at once, of groups of these sizes. Without this limit, the first
    worker with enough slots would pull all groups, and leave nothing for the others.
    """
    return min(slots, -(-len(sizes) // workers) * max(sizes))


class TLTWorker(Worker):
    """One of many workers, with a drafter and a strategy."""

    ONE_WORKER_SHARE = 0.05  # drafter training as a share of the rollout's time, for one worker, which is never idle

    def __init__(self, config: TLTConfig, heartbeat: Callable[[str], None] | None = None):
        from accelerate.utils import broadcast_object_list

        self.accelerator = join(config)
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.first_here = self.accelerator.is_local_main_process
        super().__init__(config, heartbeat)
        kind = self.accelerator.device.type
        self.device = "cpu" if kind == "cpu" else str(self.accelerator.device)  # accelerate says "cpu:0"
        if config.shard and self.world_size > 1:
            self.layout = FSDPLayout(self.world_size, kind, config.actor_dtype)
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        hosted = Board.host(address) if self.rank == 0 else None
        port = [hosted.port if hosted else 0]
        if self.world_size > 1:
            broadcast_object_list(port)
        self.board = Board(address, port[0], hosted)
        self.rollouts = 0  # so far
        self.spot_trainer: SpotTrainer | None = None  # these two come with the engine
        self.strategy: CountingStrategy | None = None
        self.rollout_stats: list[Stats] = []  # of the rollouts of this step, not of evaluations
        self.steps_left = config.steps  # this one included

    @contextlib.contextmanager
    def loading(self, name):
        """Load a model without waiting for a download in a collective, which would time out: one worker of each host
        loads a model of the hub first, then the others, and all continue together.
        """
        here = f"{name} on {platform.node()}"
        if not self.first_here and not Path(find_folder(name)).is_dir():
            self.board.wait(here, 1)
        yield
        self.board.add(here)
        self.board.add(name)
        self.board.wait(name, self.world_size)

    def make_engine(self, actor, stop, slots, reserve_bytes, checkpoint):
        """Return an engine with its drafters; with them come the spot trainer and the strategy."""
        self.rollout_stats = []
        self.steps_left = self.config.steps - (checkpoints.step_of(checkpoint) if checkpoint else 0)
        proposers = {}
        if self.config.drafter != "off":
            self.spot_trainer = SpotTrainer(actor, self.config, self.rank, stop, checkpoint)
            proposers["eagle"] = EagleProposer(self.spot_trainer.served)
        if self.config.ngram:
            proposers["ngram"] = NgramProposer()
        self.strategy = CountingStrategy(make_strategy(self.config.strategy, list(proposers)), self.timer)
        return Engine(actor, stop, slots, proposers=proposers, reserve_bytes=max(reserve_bytes, self.idle_bytes()))

    def idle_bytes(self):
        """Return the memory of drafter training, which never runs beside an update."""
        return self.spot_trainer.idle_bytes() if self.spot_trainer else 0

    def rollout(self, engine, groups, sampling, grade, progress, learn):
        """Generate this worker's part of the groups, shared out by the Board, then train the drafter until all workers
        are done -> all responses, the same list on every worker.
        """
        self.rollouts += 1
        name = f"rollout {self.rollouts}"  # with counters of its own: none is reset, so there is no race
        started = time.time()
        engine.max_running = fair_share([len(g.seeds) for g in groups], self.world_size, engine.slots)
        if self.spot_trainer and learn:
            self.spot_trainer.begin_rollout(self.rollouts)
            self.strategy.drafters_changed(["eagle"])  # the policy has moved, the drafter has learned
        my_responses = self.my_part(engine, groups, sampling, grade, progress, name, learn)
        if learn:
            self.rollout_stats.append(engine.stats)

        total = sum(len(g.seeds) for g in groups)

        def all_done() -> bool:
            count = self.board.add(f"{name} responses", 0)
            progress(count)
            return count >= total

        adaptive = learn and self.config.drafter == "adaptive"
        train_until(all_done, self.timer, self.spot_trainer if adaptive else None)
        responses = [r for part in self.gather(my_responses) for r in part]
        if learn and self.spot_trainer:
            self.spot_trainer.count_tokens(responses)
            self.train_together(time.time() - started)
        return sorted(responses, key=lambda r: (r.group, r.sample))

    def my_part(self, engine, groups, sampling, grade, progress, name: str, learn: bool) -> list[Response]:
        """Generate this worker's part of a rollout. Features go into the buffer: they stay with the worker that made
        them.
        """

        def my_groups() -> Iterator[Group]:
            while (i := self.board.add(f"{name} next") - 1) < len(groups):
                yield groups[i]

        learns = learn and self.spot_trainer and self.spot_trainer.trains
        responses = []
        for response in self.graded_responses(engine, my_groups(), sampling, grade, self.strategy):
            if learns:
                self.spot_trainer.buffer.add(response)
            response.hidden = None
            response.problem = None  # the others need no problem of a response that is graded
            responses.append(response)
            progress(self.board.add(f"{name} responses"))
        return responses

    def train_together(self, rollout_seconds: float) -> None:
        """After a rollout: the warm start, or one worker's share of training; then the drafters are averaged."""
        spot_trainer = self.spot_trainer
        if spot_trainer.needs_warm_start:
            seconds = spot_trainer.warm_start_seconds(self.all_max(rollout_seconds), self.steps_left)
            spot_trainer.warm_start(seconds, self.timer, self.all_reduce)
        elif self.config.drafter == "adaptive":
            alone = self.world_size == 1 and spot_trainer.can_train
            end = time.time() + (self.ONE_WORKER_SHARE * rollout_seconds if alone else 0.0)
            train_until(lambda: time.time() >= end, self.timer, spot_trainer)
            spot_trainer.average(self.all_reduce)

    def take_speculation_stats(self):
        """Return the figures of the step's rollouts; acceptance and drafter training are those since the last call.
        Called once, at the end of a step.
        """
        rollouts = self.rollout_stats
        self.rollout_stats = []
        self.steps_left -= 1
        if self.spot_trainer is None and not self.config.ngram:
            return None
        stats = SpeculationStats(drafted=self.strategy.drafted, accepted=self.strategy.accepted)
        for rollout in rollouts:
            stats.add_rollout(rollout)
        self.strategy.reset_counts()
        if self.spot_trainer:
            stats.drafter_steps, stats.drafter_loss = self.spot_trainer.take_stats()
        return stats

    def save(self, folder):
        """Write the drafter, and how far its training has come."""
        if self.spot_trainer:
            self.spot_trainer.save(folder / "drafter")
            self.spot_trainer.save_progress(folder / "drafter")

    def deploy(self, folder):
        """Write the drafter, and the code that decodes with it in stock transformers."""
        if self.spot_trainer:
            self.spot_trainer.save(folder / "drafter")
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "custom_generate", folder / "custom_generate", ignore=ignore)

    def all_reduce(self, tensors):
        if self.world_size > 1:
            sum_up(tensors)

    def all_max(self, value: float) -> float:
        """Return the largest of the workers' values."""
        return max(self.gather(value))

    def gather(self, value):
        if self.world_size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


# ---------------------------------------------------------------- three ways to start


def run_worker(config: TLTConfig, heartbeat: Callable[[str], None] | None = None) -> None:
    """Run one worker, however it was started. heartbeat: see timers.WorkerTimer."""
    torch.manual_seed(config.seed)
    worker = TLTWorker(config, heartbeat)
    train(config, worker)
    worker.accelerator.end_training()  # leaves the process group, too


PRESETS = """
--demo: settings for a demonstration on this machine; --real: settings for the language model of `make real`. Other
flags override them.
"""


def main() -> None:
    """Start the workers."""
    argv = sys.argv[1:]
    preset = []
    if "--demo" in argv:
        argv.remove("--demo")
        preset = demo_flags(argv)
    elif "--real" in argv:
        argv.remove("--real")
        preset = real_flags()
    config = parse_flags(TLTConfig, __doc__ + PRESETS, argv, preset)
    check(config)
    if "RANK" in os.environ:
        with checkpoints.claim(config.out) if os.environ["RANK"] == "0" else contextlib.nullcontext():
            run_worker(config)
        return
    count = config.workers or config.gpus * config.workers_per_gpu or os.cpu_count() or 1
    with checkpoints.claim(config.out):
        if count == 1:
            run_worker(config)
        else:
            spawn(run_worker, config, count, config.patience, config.gpus > 0)


if __name__ == "__main__":
    run(main)
