"""Exact resume after SIGKILL (`make soak`): a small run with two workers is killed again and again, and continues from
its last checkpoint, until it ends. Its metrics and its final policy must then equal those of the same run undisturbed.

Which process is killed (the parent or a worker) and what it is doing at that moment (rollout, drafter training, update,
writing a checkpoint ...) are drawn at random. Runs are started through this file, which makes each worker write its
state into a shared file, so that the state to kill it in can be waited for. Half of the runs are restarted with
--resume, the others by torchrun's --max-restarts.
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

import tlt
import train_grpo
from parts.cli import flag, parse_flags, run
from parts.files import write_atomically
from parts.running import checkpoints
from parts.running.timers import STATES, WorkerTimer

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
# what must be equal in metrics.jsonl; other figures depend on time, or on rounding in the rollout
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
TARGET_STATES = "#=d.ruc"  # characters of the states in which a worker is killed: see timers.STATES
STATE_NAMES = {character: name for name, (character, _) in STATES.items()}


@dataclass(frozen=True)
class Config:
    """Settings."""

    kills: int = flag(50, "number of kills")
    steps: int = flag(20, "RL steps of each run")
    seed: int = flag(0, "seed of the first run, and of the choice of processes and moments")
    out: str = flag(str(ROOT / "runs/soak"), "folder for the runs; its earlier content is removed")


# ---------------------------------------------------------------- in a worker, or its parent


class SharedStateTimer(WorkerTimer):
    """A worker's timer that also writes its state's character into the file SOAK_STATES, one byte for each worker."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.states = mmap.mmap(os.open(os.environ["SOAK_STATES"], os.O_RDWR), WORKERS)
        self.rank = int(os.environ.get("RANK", 0))

    def enter(self, state, rows=None):
        """As WorkerTimer.enter."""
        super().enter(state, rows)
        if state in STATES:
            self.states[self.rank] = ord(STATES[state][0])


if os.environ.get("SOAK_STATES"):  # worker processes import this file, too
    train_grpo.WorkerTimer = SharedStateTimer


# ---------------------------------------------------------------- runs and their processes


def start(config: Config, out: Path, seed: int, *flags: str, states="", launcher=()) -> subprocess.Popen:
    """Start a run, or continue it. states: the file for the workers' states; launcher: what starts this file."""
    settings = [str(part) for setting in SETTINGS.items() for part in setting]
    run_flags = ["--out", str(out), "--steps", str(config.steps), "--seed", str(seed), *flags]
    environment = {
        **os.environ,
        "SOAK_STATES": str(states),
        "SOAK_RUN": str(out),
        # else torchrun's restarted workers read the addresses of those that were killed
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, __file__, "run", *settings, *run_flags],
            cwd=ROOT,
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def is_alive(process_folder: Path) -> bool:
    """Return whether a process is no zombie. process_folder: its folder in /proc."""
    return (process_folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def processes_of(out: Path) -> list[int]:
    """Return the ids of all living processes of a run, known by their environment, whatever their parents are."""
    variable = f"SOAK_RUN={out}\0".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (folder / "environ").read_bytes() and is_alive(folder):
                pids.append(int(folder.name))
        except OSError:
            pass  # the process has ended meanwhile
    return sorted(pids)


def workers_of(out: Path, process: subprocess.Popen) -> list[int]:
    """Return the process ids of the two workers, by rank; [] unless there are two."""
    pids = []
    try:
        for pid in processes_of(out):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid != process.pid and (b"spawn_main" in line or b"soak.py" in line):
                pids.append(pid)
    except OSError:
        return []
    return pids if len(pids) == WORKERS else []


def steps_to_repeat(out: Path) -> int:
    """Return the number of steps that are done but not in a checkpoint."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    newest = checkpoints.newest(out)
    saved = int(newest.name[-6:]) if newest else 0
    return max([row["step"] for row in rows], default=0) - saved


def wait_until_gone(out: Path, process: subprocess.Popen) -> float:
    """Wait until the process has ended, then until all processes of its run have -> the seconds that these took.

    Raises SystemExit if one is left behind.
    """
    process.wait()
    started = time.time()
    while processes_of(out):
        if time.time() > started + 60:
            raise SystemExit(f"soak: processes left behind: {processes_of(out)}")
        time.sleep(0.05)
    return time.time() - started


# ---------------------------------------------------------------- a run that is killed again and again


@dataclass
class Tally:
    """The totals so far."""

    kills: Counter = field(default_factory=Counter)  # by process and state
    runs: int = 0
    restarts: int = 0
    repeated: int = 0  # steps
    slowest: float = 0.0  # seconds until all processes of a killed run were gone
    differences: list[str] = field(default_factory=list)  # from the undisturbed runs

    def add_exit_time(self, seconds: float) -> None:
        """Count how long the processes of a run took to disappear."""
        self.slowest = max(self.slowest, seconds)


class Target:
    """A run that is killed and started again until it ends. torchrun: its agent restarts killed workers; else the run
    is started again with --resume.
    """

    def __init__(self, config: Config, out: Path, seed: int, states, states_file: Path, torchrun: bool):
        self.config = config
        self.out = out
        self.seed = seed
        self.states = states  # a writable map of the file
        self.states_file = states_file
        self.torchrun = torchrun
        self.process = self.begin()

    def begin(self, *flags: str) -> subprocess.Popen:
        """Start the run, or start it again."""
        if not self.torchrun:
            flags = (*flags, "--workers", str(WORKERS))
        launcher = ()
        if self.torchrun:
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS))
            launcher = (*launcher, "--max-restarts", "1000", "--monitor-interval", "0.2")
        return start(self.config, self.out, self.seed, *flags, states=self.states_file, launcher=launcher)

    def running(self) -> bool:
        """Return whether the run has not ended yet."""
        return self.process.poll() is None

    def wait_for_state(self, state: str, rank: int, rng: random.Random) -> None:
        """Wait until some worker works, then a random time, then until worker `rank` is in the state with this
        character.
        """
        self.states[:] = bytes(WORKERS)
        while not any(self.states[:]) and self.running():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2.5))
        deadline = time.time() + 6
        while self.running() and chr(self.states[rank]) != state and time.time() < deadline:
            time.sleep(0.001)  # some states do not come; then the worker is killed in another one
        time.sleep(rng.uniform(0, 0.02))

    def kill(self, rng: random.Random) -> str | None:
        """Kill a process, wait until the workers have ended too -> which process it was, and its state; None: the run
        has ended before.
        """
        state = rng.choice(TARGET_STATES)
        rank = rng.randrange(WORKERS)
        while self.running():
            self.wait_for_state(state, rank, rng)
            alive = workers_of(self.out, self.process)
            if not self.running() or not alive:
                continue
            victim = self.pick(state, alive, rng)
            name = "parent"
            if victim in alive:
                name = f"worker, {STATE_NAMES.get(chr(self.states[alive.index(victim)]), 'start')}"
            os.kill(victim, signal.SIGKILL)
            while set(alive) & set(processes_of(self.out)):
                time.sleep(0.05)
            return f"torchrun's {name}" if self.torchrun else name
        return None

    def pick(self, state: str, alive: list[int], rng: random.Random) -> int:
        """Return the process to kill. Only rank 0 writes checkpoints; torchrun's parent is never killed, since nothing
        would start it again.
        """
        if state == "c":
            return alive[0]
        return rng.choice(alive if self.torchrun else [self.process.pid, *alive])

    def start_again(self) -> float:
        """Start the run again after a kill -> seconds until all of its processes were gone. torchrun does it itself."""
        if self.torchrun:
            return 0.0
        seconds = wait_until_gone(self.out, self.process)
        self.process = self.begin(*(["--resume"] if checkpoints.newest(self.out) else []))
        return seconds


def same_part(row: dict) -> dict:
    """Return the part of a row of metrics.jsonl that must be equal."""
    return {key: row[key] for key in SAME}


def differences(a: Path, b: Path) -> list[str]:
    """Return the names of steps and weights that differ between two finished runs."""
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
    """Make the same run twice, undisturbed and with kills, and compare the two."""
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
            killed = target.kill(rng)
            if killed is None:
                break
            tally.kills[killed] += 1
            tally.repeated += steps_to_repeat(out)
            tally.restarts += 1
            print(f"run {number}: {killed}; kill {tally.kills.total()}", flush=True)
            tally.add_exit_time(target.start_again())
        tally.add_exit_time(wait_until_gone(out, target.process))
        if target.process.returncode:
            raise SystemExit(f"soak: a run failed by itself, see {out}.log")
        if not tally.kills and not any(states[:]):  # no process would ever be killed
            raise SystemExit(f"soak: the workers have not written their states, see {out}.log")
    tally.differences += [f"run {number}: {name}" for name in differences(calm, out)]
    tally.runs += 1


def main() -> None:
    """Run until there were enough kills. The exit status is 1 if a killed run differs from the undisturbed one."""
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
        f"{len(tally.differences)} differences from the undisturbed runs {tally.differences[:5] or ''}"
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
