"""Exact resume under fire (`make soak`): a small run with two workers is killed again and again, with SIGKILL, and goes
on from its last checkpoint, until it ends. Its metrics and its final policy must then equal those of the same run
undisturbed.

Who is killed (the parent or a worker) and what it is doing at that moment (rollout, drafter training, update, a
checkpoint half written ...) are drawn at random. To see what workers are doing, runs are started through this file,
which makes each worker write its state into a shared file. Half of the runs are restarted with --resume, the others by
torchrun's --max-restarts.
"""

import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import report  # noqa: E402
import tlt  # noqa: E402
from parts.cli import flag, parse_flags, run
from parts.files import write_atomically
from parts.running import checkpoints

WORKERS = 2
SETTINGS = {
    "--model": ROOT / "base",
    "--device": "cpu",
    "--prompts": 4,
    "--samples": 4,
    "--max-new": 96,
    "--slots": 8,
    "--save-every": 2,
    "--eval-every": 0,
    "--show-every": 0,
    "--lr": 3e-4,
}
# what must be equal in metrics.jsonl; the rest is timing, and rounding of the rollout
SAME = (
    "step",
    "digest",
    "reward",
    "solved",
    "zero_variance_groups",
    "length",
    "truncated",
    "tokens",
    "loss",
    "grad_norm",
    "skipped",
    "clipped",
    "kl",
)
AIMS = "#=d.ruc"  # marks of the states in which a worker is shot: see report.STATES
NAMES = {mark: name for name, (mark, _) in report.STATES.items()}


@dataclass(frozen=True)
class Config:
    """Settings."""

    kills: int = flag(50, "how many")
    steps: int = flag(20, "of each run")
    seed: int = flag(0, "of the runs, and of who is killed when")
    out: str = flag(str(ROOT / "runs/soak"), "folder for the runs; what is there goes")


# ---------------------------------------------------------------- in a worker, or its parent


class WatchedClock(report.WorkerTimer):
    """A worker's clock that also writes the mark of its state into the file SOAK_STATES, a byte for each worker."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.states = mmap.mmap(os.open(os.environ["SOAK_STATES"], os.O_RDWR), WORKERS)
        self.rank = int(os.environ.get("RANK", 0))

    def enter(self, state, rows=None):
        """As Clock.enter."""
        super().enter(state, rows)
        if state in report.STATES:
            self.states[self.rank] = ord(report.STATES[state][0])


if os.environ.get("SOAK_STATES"):  # spawned workers import this file, too
    from parts.training import layouts as workers

    workers.WorkerTimer = WatchedClock


# ---------------------------------------------------------------- runs and their processes


def start(config: Config, out: Path, seed: int, *flags: str, states="", door=()) -> subprocess.Popen:
    """Begin a run, or go on with it. states: the file for the workers' states; door: what starts this file."""
    settings = [str(part) for setting in SETTINGS.items() for part in setting]
    run_flags = ["--out", str(out), "--steps", str(config.steps), "--seed", str(seed), *flags]
    environment = {
        **os.environ,
        "SOAK_STATES": str(states),
        "SOAK_RUN": str(out),
        # or torchrun's workers, started again, read the addresses of those that were killed
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *door, __file__, "run", *settings, *run_flags],
            cwd=ROOT,
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def is_alive(process_folder: Path) -> bool:
    """process_folder: in /proc. Not a zombie."""
    return (process_folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def members(out: Path) -> list[int]:
    """Living processes of a run, wherever they belong: they share its environment."""
    mark = f"SOAK_RUN={out}\0".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes() and is_alive(folder):
                pids.append(int(folder.name))
        except OSError:
            pass  # it has ended meanwhile
    return sorted(pids)


def workers_of(out: Path, process: subprocess.Popen) -> list[int]:
    """Process ids of the two workers, by rank; none if there are not two."""
    pids = []
    try:
        for pid in members(out):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid != process.pid and (b"spawn_main" in line or b"soak.py" in line):
                pids.append(pid)
    except OSError:
        return []
    return pids if len(pids) == WORKERS else []


def steps_to_repeat(out: Path) -> int:
    """Steps that are done but not in a checkpoint."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    newest = checkpoints.newest(out)
    saved = int(newest.name[-6:]) if newest else 0
    return max([row["step"] for row in rows], default=0) - saved


def wait_until_gone(out: Path, process: subprocess.Popen) -> float:
    """Wait until the process has ended, then until all of its run have -> seconds that this took.

    Raises SystemExit if somebody stays.
    """
    process.wait()
    started = time.time()
    while members(out):
        if time.time() > started + 60:
            raise SystemExit(f"soak: processes left behind: {members(out)}")
        time.sleep(0.05)
    return time.time() - started


# ---------------------------------------------------------------- a run under fire


@dataclass
class Tally:
    """What has happened so far."""

    kills: Counter = field(default_factory=Counter)  # by victim and what it was doing
    runs: int = 0
    restarts: int = 0
    repeated: int = 0  # steps
    slowest: float = 0.0  # seconds until all processes of a killed run were gone
    differences: list[str] = field(default_factory=list)  # to the undisturbed runs

    def note_gone(self, seconds: float) -> None:
        """So long a run took to disappear."""
        self.slowest = max(self.slowest, seconds)


class Target:
    """A run that is killed and started again until it ends. torchrun: its agent starts killed workers; else we do."""

    def __init__(self, config: Config, out: Path, seed: int, states, states_file: Path, torchrun: bool):
        self.config = config
        self.out = out
        self.seed = seed
        self.states = states  # a writable map of the file
        self.states_file = states_file
        self.torchrun = torchrun
        self.process = self.begin()

    def begin(self, *flags: str) -> subprocess.Popen:
        """Start it, or start it again."""
        if not self.torchrun:
            flags = (*flags, "--workers", str(WORKERS))
        door = ()
        if self.torchrun:
            door = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS))
            door = (*door, "--max-restarts", "1000", "--monitor-interval", "0.2")
        return start(self.config, self.out, self.seed, *flags, states=self.states_file, door=door)

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def wait_for_a_moment(self, aim: str, rank: int, rng: random.Random) -> None:
        """Until some worker works, then a random time, then until that worker is in the state with this mark."""
        self.states[:] = bytes(WORKERS)
        while not any(self.states[:]) and self.running():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2.5))
        patience = time.time() + 6
        while self.running() and chr(self.states[rank]) != aim and time.time() < patience:
            time.sleep(0.001)  # some states do not come: then whatever there is
        time.sleep(rng.uniform(0, 0.02))

    def shoot(self, rng: random.Random) -> str | None:
        """Kill somebody, see that all who have to follow do -> who it was and what it was doing; None: it has ended."""
        aim = rng.choice(AIMS)
        rank = rng.randrange(WORKERS)
        while self.running():
            self.wait_for_a_moment(aim, rank, rng)
            alive = workers_of(self.out, self.process)
            if not self.running() or not alive:
                continue
            victim = self.pick(aim, alive, rng)
            doing = "parent"
            if victim in alive:
                doing = f"worker, {NAMES.get(chr(self.states[alive.index(victim)]), 'start')}"
            os.kill(victim, signal.SIGKILL)
            while set(alive) & set(members(self.out)):
                time.sleep(0.05)
            return f"torchrun's {doing}" if self.torchrun else doing
        return None

    def pick(self, aim: str, alive: list[int], rng: random.Random) -> int:
        """The process to kill. Rank 0 writes the checkpoints; torchrun itself nobody starts again."""
        if aim == "c":
            return alive[0]
        return rng.choice(alive if self.torchrun else [self.process.pid, *alive])

    def start_again(self) -> float:
        """After a kill -> seconds until all of its processes were gone. torchrun needs no help."""
        if self.torchrun:
            return 0.0
        seconds = wait_until_gone(self.out, self.process)
        self.process = self.begin(*(["--resume"] if checkpoints.newest(self.out) else []))
        return seconds


def same_part(row: dict) -> dict:
    """What must be equal in a row of metrics.jsonl."""
    return {key: row[key] for key in SAME}


def differences(a: Path, b: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    from safetensors.torch import load_file

    rows = []
    for out in (a, b):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        rows.append([same_part(step) for step in steps])
    names = [f"step {x['step']}" for x, y in zip(*rows) if x != y]
    if len(rows[0]) != len(rows[1]):
        names.append("steps")
    weights, others = (load_file(out / "policy/model.safetensors") for out in (a, b))
    return names + [name for name in weights if not weights[name].equal(others[name])]


def soak_one(config: Config, tally: Tally, rng: random.Random) -> None:
    """The same run twice, undisturbed and under fire, compared."""
    number = tally.runs
    seed = config.seed + number
    calm = Path(config.out) / f"calm-{number}"
    out = Path(config.out) / f"run-{number}"
    wait_until_gone(calm, start(config, calm, seed, "--workers", str(WORKERS)))
    states_file = Path(config.out) / f"states-{number}"
    states_file.write_bytes(bytes(WORKERS))
    with open(states_file, "r+b") as file, mmap.mmap(file.fileno(), WORKERS) as states:
        target = Target(config, out, seed, states, states_file, torchrun=number % 2 == 1)
        while tally.kills.total() < config.kills:
            hit = target.shoot(rng)
            if hit is None:
                break
            tally.kills[hit] += 1
            tally.repeated += steps_to_repeat(out)
            tally.restarts += 1
            print(f"run {number}: {hit}; kill {tally.kills.total()}", flush=True)
            tally.note_gone(target.start_again())
        tally.note_gone(wait_until_gone(out, target.process))
        if target.process.returncode:
            raise SystemExit(f"soak: a run failed by itself, see {out}.log")
        if not tally.kills and not any(states[:]):  # nobody would ever be shot
            raise SystemExit(f"soak: the workers have not written their states, see {out}.log")
    tally.differences += [f"run {number}: {name}" for name in differences(calm, out)]
    tally.runs += 1


def main() -> None:
    """Exit status 1 if a run under fire came out differently."""
    config = parse_flags(Config, __doc__)
    rng = random.Random(config.seed)
    tally = Tally()
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    while tally.kills.total() < config.kills:
        soak_one(config, tally, rng)
    print(f"\n{'killed':>36} times")
    for victim, times in sorted(tally.kills.items()):
        print(f"{victim:>36} {times:5d}")
    print(
        f"{tally.kills.total()} kills in {tally.runs} runs of {config.steps} steps, {tally.restarts} restarts, "
        f"{tally.repeated} steps repeated, all processes gone within {tally.slowest:.1f} s, "
        f"{len(tally.differences)} differences to the undisturbed runs {tally.differences[:5] or ''}"
    )
    result = {
        "kills": tally.kills,
        "runs": tally.runs,
        "restarts": tally.restarts,
        "repeated": tally.repeated,
        "differences": tally.differences,
    }
    write_atomically(out / "soak.json", json.dumps(result, indent=1))
    sys.exit(1 if tally.differences else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        del sys.argv[1]
        run(tlt.main)
    else:
        main()
