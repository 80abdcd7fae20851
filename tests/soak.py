"""Exact resume under fire (`make soak`): a small run with two workers is killed again and again, with SIGKILL, and goes on from its last checkpoint, until it ends. Its metrics and
its final policy must then equal those of the same run undisturbed.

Who is killed (the parent or a worker) and what it is doing at that moment (rollout, drafter training, update, a checkpoint half written ...) are drawn at random. To see what workers are doing,
runs are started through this file, which makes each worker write its state into a shared file. Half of the runs restart by --resume, the others by torchrun's --max-restarts.
"""

import argparse
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tlt  # noqa: E402
import train_grpo  # noqa: E402
from report import STATES  # noqa: E402
from rollout import run  # noqa: E402

FLAGS = ["--model", str(ROOT / "base"), "--device", "cpu", "--prompts", "4", "--samples", "4", "--max-new", "96", "--slots", "8", "--save-every", "2", "--eval-every", "0",
         "--show-every", "0", "--lr", "3e-4"]
SAME = ("step", "digest", "reward", "solved", "flat_groups", "length", "truncated", "tokens", "loss", "grad_norm", "skipped", "clipped", "kl")  # the rest is timing, and rounding of the rollout

if where := os.environ.get("SOAK_STATES"):  # in a worker, or its parent

    def tell(self, state, enter=train_grpo.Clock.enter):
        enter(self, state)
        if state in STATES:
            board[int(os.environ.get("RANK", 0))] = ord(STATES[state][0])

    board = mmap.mmap(os.open(where, os.O_RDWR), 2)
    train_grpo.Clock.enter = tell


def start(out, steps, seed, *argv, states="", door=()):
    return subprocess.Popen([sys.executable, *door, __file__, "run", *FLAGS, "--out", str(out), "--steps", str(steps), "--seed", str(seed), *argv], cwd=ROOT, start_new_session=True,
                            stdout=open(str(out) + ".log", "a"), stderr=subprocess.STDOUT, env={**os.environ, "SOAK_STATES": str(states), "SOAK_RUN": str(out),
                                 "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # or torchrun's workers, started again, read the addresses of those that were killed


def members(out):
    """Living processes of a run, wherever they belong: they share its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"SOAK_RUN={out}\0".encode() in (folder / "environ").read_bytes() and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(folder.name))
        except OSError:
            pass
    return sorted(found)


def workers(out, process):
    """Process ids of the two workers, by rank; none if there are not two."""
    line = lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes()
    try:
        mine = [pid for pid in members(out) if pid != process.pid and (b"spawn_main" in line(pid) or b"soak.py" in line(pid))]
    except OSError:
        return []
    return mine if len(mine) == 2 else []


def last_step(out):
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")] if (out / "metrics.jsonl").exists() else []
    newest = train_grpo.newest_checkpoint(out)
    return max([r["step"] for r in rows], default=0) - (int(newest.name[-6:]) if newest else 0)


def shoot(out, process, states, rng, torchrun):
    """Wait for a moment, kill somebody, see that all who have to follow do -> who it was, and what he was doing; None: the run has ended before."""
    names, aim, rank = {mark: name for name, (mark, _) in STATES.items()}, rng.choice("#=d.ruc"), rng.randrange(2)
    while process.poll() is None:
        states[:] = bytes(2)
        while not any(states[:]) and process.poll() is None:  # until a worker works
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2.5))
        patience = time.time() + 6
        while process.poll() is None and chr(states[rank]) != aim and time.time() < patience:  # some states do not come: then whatever there is
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        alive = workers(out, process)
        if process.poll() is None and alive:
            victim = alive[0] if aim == "c" else rng.choice(alive if torchrun else [process.pid, *alive])  # rank 0 writes the checkpoints; torchrun itself nobody starts again
            doing = f"worker, {names.get(chr(states[alive.index(victim)]), 'start')}" if victim in alive else "parent"
            os.kill(victim, signal.SIGKILL)
            while set(alive) & set(members(out)):
                time.sleep(0.05)
            return "torchrun's " * torchrun + doing


def gone(out, process):
    """Wait until the process has ended, then until all of its run have -> seconds that this took. Raises SystemExit if somebody stays."""
    process.wait()
    started = time.time()
    while members(out):
        if time.time() > started + 60:
            raise SystemExit(f"soak: processes left behind: {members(out)}")
        time.sleep(0.05)
    return time.time() - started


def differences(a, b):
    """Names of what differs between two finished runs."""
    from safetensors.torch import load_file
    rows = [[{k: row[k] for k in SAME} for row in map(json.loads, open(out / "metrics.jsonl"))] for out in (a, b)]
    x, y = (load_file(out / "policy/model.safetensors") for out in (a, b))
    return [f"step {r['step']}" for r, s in zip(*rows) if r != s] + ["steps"] * (len(rows[0]) != len(rows[1])) + [k for k in x if not x[k].equal(y[k])]


def soak(args):
    rng, kills, repeated, restarts, slowest, runs = random.Random(args.seed), Counter(), 0, 0, 0.0, 0
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    wrong = []
    while sum(kills.values()) < args.kills:
        seed, calm, out = args.seed + runs, args.out / f"calm-{runs}", args.out / f"run-{runs}"
        gone(calm, start(calm, args.steps, seed, "--workers", "2"))
        board = args.out / f"states-{runs}"
        board.write_bytes(bytes(2))
        with open(board, "r+b") as file, mmap.mmap(file.fileno(), 2) as states:
            torchrun = runs % 2 == 1  # its agent starts killed workers again; else we do
            door = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1000", "--monitor-interval", "0.2") if torchrun else ()
            begin = lambda *resume: start(out, args.steps, seed, *resume, *([] if torchrun else ["--workers", "2"]), states=board, door=door)
            process = begin()
            while (hit := sum(kills.values()) < args.kills and shoot(out, process, states, rng, torchrun)):
                kills[hit] += 1
                repeated, restarts = repeated + last_step(out), restarts + 1
                print(f"run {runs}: {hit}; kill {sum(kills.values())}", flush=True)
                if not torchrun:
                    slowest = max(slowest, gone(out, process))
                    process = begin(*["--resume"] * bool(train_grpo.newest_checkpoint(out)))
            slowest = max(slowest, gone(out, process))
            if process.returncode:
                raise SystemExit(f"soak: a run failed by itself, see {out}.log")
        wrong += [f"run {runs}: {x}" for x in differences(calm, out)]
        runs += 1
    print(f"\n{'killed':>36} times")
    for what, n in sorted(kills.items()):
        print(f"{what:>36} {n:5d}")
    print(f"{sum(kills.values())} kills in {runs} runs of {args.steps} steps, {restarts} restarts, {repeated} steps repeated, all processes gone within {slowest:.1f} s, "
          f"{len(wrong)} differences to the undisturbed runs {wrong[:5] or ''}")
    train_grpo.write_atomically(args.out / "soak.json", json.dumps({"kills": kills, "runs": runs, "restarts": restarts, "repeated": repeated, "differences": wrong}, indent=1))
    sys.exit(bool(wrong))


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=50)
    flags.add_argument("--steps", type=int, default=20, help="of each run")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, default=ROOT / "runs/soak")
    soak(flags.parse_args())


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        del sys.argv[1]
        run(tlt.main)
    else:
        main()
