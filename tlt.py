"""TLT: GRPO on many workers, one per GPU (or CPU core), with speculative rollout and a drafter that is trained in the
time that would be lost. `python tlt.py` is the whole system; the loop itself is train_grpo.train.

A worker in a step:

    ROLLOUT   take groups from the queue, generate and grade them; the strategy says how to draft
    DRAFTER   no group and no row left: train the drafter on the features of one's own responses, until the last
              response of all workers is there
    meet      responses go to everybody; drafters are averaged, weighted by the steps that each has made
    UPDATE    of the policy (train_grpo.py)

Rules. Nobody waits inside the preemptible part: between two micro-steps of the drafter a worker looks at the Board, and
that is all, so the update begins at most one micro-step after the last response. It is the LAST response that ends
drafter training, not the first worker that is done. The engine drafts with a copy of the drafter that changes between
rollouts only. Features stay on the worker that made them; the buffer holds this rollout's responses and the long ones
of the last, because those who idle first have seen the short responses only. Held-out responses teach nobody anything.

One worker is never idle, so there the drafter gets a small share of the rollout's time instead: a drafter that stands
still while the policy moves costs more.

Three doors, one worker function:
    RANK is set (torchrun, accelerate launch, several hosts)   -> join that group
    one worker                                                 -> call it directly, so breakpoint() works
    else                                                       -> start a process per worker (parts/supervise.py)

Work queue. A rollout's groups are numbered; `board.add("next")` hands out the next number to whichever worker has room,
so fast workers take more. No collective runs while anybody generates: workers look at the Board (a TCP key-value
store), and meet only when all responses exist.

Every worker then holds all responses and updates the same weights: micro-batches are dealt out by content, gradients
are summed, each worker steps the same optimizer. So 1, 2 and 3 workers, with and without speculation, make the same
tokens and, to fp32 rounding, the same policy.

Left out: stealing rows of the tail from a busy worker; saving the moments of the drafter's optimizer.
"""

import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from drafter import LearnedDrafts
from parts.cli import UserError, check_above, check_at_least, flag, parse_flags, run
from parts.engine.interfaces import Group, Response, Stats
from parts.engine.ngram import NGramDrafts
from parts.files import ROOT, find_folder
from parts.running import checkpoints
from parts.running.communication import join, sum_up
from parts.running.demo import demo_flags
from parts.running.launcher import spawn
from parts.training.fsdp import Sharded
from report import WorkerNotes
from rollout import Engine
from spot import Spot, train_until
from strategy import Watched, make_strategy
from train_grpo import Alone, Config, check, train


@dataclass(frozen=True)
class TLTConfig(Config):
    """Config, and what TLT adds."""

    out: str = flag("runs/tlt", Config.__dataclass_fields__["out"].metadata["help"])
    drafter: str = flag("adaptive", "static: frozen; adaptive: trained by idle workers", ("off", "static", "adaptive"))
    ngram: bool = flag(False, "let the strategy also choose n-gram drafts, for responses that repeat themselves")
    strategy: str = flag("goodput", "how far to draft: off, goodput, beg-mab, or a fixed length such as 4")
    warm_start: float = flag(120.0, "without a drafter: seconds of training after the first rollout, or until it pays")
    draft_vocab: int = flag(0, "words that the drafter may guess; 0: all, of a large vocabulary those that are used")
    drafter_from: str = flag("", "folder of a drafter to start from; empty: the policy's own subfolder drafter/")
    workers: int = flag(0, "worker processes; 0: one per GPU, or one per CPU core without GPUs")
    workers_per_gpu: int = flag(1, "workers that share a GPU and its memory, e.g. 2, where there is but one")
    shard: bool = flag(False, "spread the policy over the workers (FSDP2), if it does not fit a GPU whole")
    patience: float = flag(600.0, "seconds without a sign of life after which a worker counts as hung")

    def __post_init__(self):
        """Raises UserError."""
        super().__post_init__()
        make_strategy(self.strategy, [])
        if self.drafter_from and not (Path(self.drafter_from) / "drafter.safetensors").exists():
            folder = f"--drafter-from {self.drafter_from}"
            raise UserError(f"{folder}: no drafter.safetensors there; `make drafter` writes one")
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
            mend = "raise --workers-per-gpu, or use --device cpu"
            raise UserError(f"--workers {workers}: there are only {self.gpus} GPUs here; {mend}")
        if not self.gpus and workers > cores * 4:
            raise UserError(f"--workers {workers}: too many, there are only {cores} cores here")

    @property
    def gpus(self) -> int:
        """GPUs of this host that are used."""
        return torch.cuda.device_count() if self.device != "cpu" else 0


class Board:
    """What the workers tell each other while they work: counters in a TCP store."""

    def __init__(self, host: str, port: int, hosted: TCPStore | None = None):
        """hosted: the store itself, in the process that serves it."""
        self.store = hosted or TCPStore(host, port, is_master=False, timeout=timedelta(seconds=120))

    @staticmethod
    def host() -> TCPStore:
        """A store on a free port, served by this process."""
        return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))

    def add(self, key: str, n: int = 1) -> int:
        """Add to a counter -> its new value, at once. n = 0 reads it."""
        return self.store.add(key, n)

    def wait(self, key: str, count: int) -> None:
        """Until a counter has come so far, however long that takes."""
        while self.add(key, 0) < count:
            time.sleep(0.02)


# ---------------------------------------------------------------- the workers


def fair_share(sizes: list[int], workers: int, slots: int) -> int:
    """Rows that a worker may hold at once, of groups of these sizes: with slots for more than its share of the groups,
    the first to come would leave nothing for the others.
    """
    return min(slots, -(-len(sizes) // workers) * max(sizes))


class Team(Alone):
    """All workers, as the training loop sees them."""

    ONE_WORKER_SHARE = 0.05  # drafter training as a share of the rollout's time, for one worker, who is never idle

    def __init__(self, config: TLTConfig, tell: Callable[[str], None] | None = None):
        from accelerate.utils import broadcast_object_list

        super().__init__(config, tell)
        self.accelerator = join(config)
        self.rank = self.accelerator.process_index
        self.size = self.accelerator.num_processes
        self.first_here = self.accelerator.is_local_main_process
        kind = self.accelerator.device.type
        self.device = "cpu" if kind == "cpu" else str(self.accelerator.device)  # accelerate says "cpu:0"
        if config.shard and self.size > 1:
            self.layout = Sharded(self.size, kind, config.actor_dtype)
        hosted = Board.host() if self.rank == 0 else None
        address = [os.environ.get("MASTER_ADDR", "127.0.0.1"), hosted.port if hosted else 0]
        if self.size > 1:
            broadcast_object_list(address)
        self.board = Board(*address, hosted)
        self.rollouts = 0  # so far
        self.spot: Spot | None = None  # these three come with the engine
        self.strategy: Watched | None = None
        self.training: list[Stats] = []  # of the rollouts of this step, not of evaluations

    @contextlib.contextmanager
    def loading(self, name):
        """As Alone.loading. Nobody waits for a download in a collective, which would give up on it: a model of the hub
        is loaded by one worker of each host, then by the others, and all go on together.
        """
        here = f"{name} on {platform.node()}"
        if not self.first_here and not Path(find_folder(name)).is_dir():
            self.board.wait(here, 1)
        yield
        self.board.add(here)
        self.board.add(name)
        self.board.wait(name, self.size)

    def engine(self, actor, stop, slots, reserve_bytes):
        """An engine with its drafters; with them come the spot trainer and the strategy."""
        self.training = []
        drafters = {}
        if self.config.drafter != "off":
            self.spot = Spot(actor, self.config, self.rank, stop, self.start)
            drafters["learned"] = LearnedDrafts(self.spot.served)
        if self.config.ngram:
            drafters["n-gram"] = NGramDrafts()
        self.strategy = Watched(make_strategy(self.config.strategy, list(drafters)), self.clock)
        return Engine(actor, stop, slots, drafters=drafters, reserve_bytes=max(reserve_bytes, self.idle_bytes()))

    def idle_bytes(self):
        """As Alone.idle_bytes: for drafter training, which never runs beside an update."""
        return self.spot.idle_bytes() if self.spot else 0

    def rollout(self, engine, groups, sampling, grade, progress, learn):
        """As Alone.rollout, but the groups are shared out by the Board, and who has nothing left to generate trains the
        drafter until everybody is done.
        """
        self.rollouts += 1
        name = f"rollout {self.rollouts}"  # its own counters: no reset, so no race
        started = time.time()
        engine.row_limit = fair_share([len(g.seeds) for g in groups], self.size, engine.slots)
        if self.spot and learn:
            self.spot.begin(self.rollouts)
            self.strategy.begin(["learned"])  # the policy has moved, the drafter has learned
        my_responses = self.generate(engine, groups, sampling, grade, progress, name, learn)
        if learn:
            self.training.append(engine.stats)

        total = sum(len(g.seeds) for g in groups)

        def all_done() -> bool:
            count = self.board.add(f"{name} responses", 0)
            progress(count)
            return count >= total

        follows = learn and self.config.drafter == "adaptive"
        train_until(all_done, self.clock, self.spot if follows else None)
        responses = [r for part in self.gather(my_responses) for r in part]
        if learn and self.spot:
            self.spot.count_words(responses)
            self.train_together(time.time() - started)
        return sorted(responses, key=lambda r: (r.group, r.sample))

    def generate(self, engine, groups, sampling, grade, progress, name: str, learn: bool) -> list[Response]:
        """This worker's part of a rollout. Features go into the buffer: they stay with the worker that made them."""

        def my_groups() -> Iterator[Group]:
            while (i := self.board.add(f"{name} next") - 1) < len(groups):
                yield groups[i]

        learns = learn and self.spot and self.spot.trains
        responses = []
        for response in self.work(engine, my_groups(), sampling, grade, self.strategy):
            if learns:
                self.spot.buffer.add(response)
            response.hidden = None
            responses.append(response)
            progress(self.board.add(f"{name} responses"))
        return responses

    def train_together(self, rollout_seconds: float) -> None:
        """After a rollout: the warm start, or one worker's share of training; then the drafters are averaged."""
        if self.spot.needs_warm_start:
            self.spot.warm_start(self.config.warm_start, self.clock, self.all_reduce)
        elif self.config.drafter == "adaptive":
            seconds = self.ONE_WORKER_SHARE * rollout_seconds if self.size == 1 and self.spot.learns else 0.0
            end = time.time() + seconds
            train_until(lambda: time.time() >= end, self.clock, self.spot)
            self.spot.average(self.all_reduce)

    def notes(self):
        """As Alone.notes. The rounds are those of the step's rollouts, the guesses those since the last call."""
        training = self.training
        self.training = []
        if self.spot is None and not self.config.ngram:
            return None
        notes = WorkerNotes(tried=self.strategy.tried, right=self.strategy.right)
        for stats in training:
            notes.add_rollout(stats)
        self.strategy.forget()
        if self.spot:
            notes.drafter_steps = self.spot.steps
            notes.drafter_loss = self.spot.loss
            self.spot.steps = 0
            self.spot.loss = 0.0
        return notes

    def save(self, folder):
        """The drafter."""
        if self.spot:
            self.spot.save(folder / "drafter")

    def deploy(self, folder):
        """The drafter, and what decodes with it in stock transformers."""
        self.save(folder)
        if self.spot:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "custom_generate", folder / "custom_generate", ignore=ignore)

    def all_reduce(self, tensors):
        """As Alone.all_reduce."""
        if self.size > 1:
            sum_up(tensors)

    def gather(self, value):
        """As Alone.gather."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


# ---------------------------------------------------------------- three doors


def worker(config: TLTConfig, tell: Callable[[str], None] | None = None) -> None:
    """The one worker function behind all three doors. tell: see report.Clock."""
    torch.manual_seed(config.seed)
    team = Team(config, tell)
    train(config, team)
    team.accelerator.end_training()  # leaves the process group, too


def main() -> None:
    """See above."""
    argv = sys.argv[1:]
    demo = []
    if "--demo" in argv:
        argv.remove("--demo")
        demo = demo_flags(argv)
    description = __doc__ + "\n--demo: settings for a demonstration on this machine; other flags override them"
    config = parse_flags(TLTConfig, description, argv, demo)
    check(config)
    if "RANK" in os.environ:
        with checkpoints.claim(config.out) if os.environ["RANK"] == "0" else contextlib.nullcontext():
            worker(config)
        return
    count = config.workers or config.gpus * config.workers_per_gpu or os.cpu_count() or 1
    with checkpoints.claim(config.out):
        if count == 1:
            worker(config)
        else:
            spawn(worker, config, count, config.patience, config.gpus > 0)


if __name__ == "__main__":
    run(main)
