"""The measurements, on held-out questions.

`python -m test_time sweep` runs every strategy on --count questions and writes rows to --json, one per question,
strategy and way to pick an answer; `report` reads them. No two questions are alike, so that the two halves of the
statistics share none. The samples that determine difficulty (probe, oracle) are not those that are spent on the answer.
Speculation makes a sweep faster; its costs are those of the same tokens without it.

`python -m test_time speed` measures seconds per question with and without speculation, one question at a time. The
tokens must be the same. Its rows are written beside --json, to *.speed.jsonl.
"""

import json
import time
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from parts.cli import UserError
from parts.files import check_writable, find_folder, write_atomically
from parts.running.launcher import process_pool
from tasks import Problem, Task
from test_time.attempts import Ledger, SearchStrategy, pick, score
from test_time.config import Config
from test_time.results import COMPARED, read_rows
from test_time.solver import VERIFIERS, Solution, Solver, check_verifiers
from test_time.strategies import SEARCHES, parallel, revise


class Trial(NamedTuple):
    """A strategy with a number of attempts, the solver that runs it, and the ways to pick its answer."""

    solver: str  # see `sweep`
    name: str
    n: int
    search: SearchStrategy
    picks: tuple[str, ...]
    smaller: tuple[int, ...] = ()  # of independent attempts: the first of them, so many, are a trial of their own

    def counts(self) -> tuple[int, ...]:
        """Return the numbers of attempts that there will be rows of."""
        return (*self.smaller, self.n)


def samples_of(solver: str, name: str, counts: Sequence[int], picks: tuple[str, ...]) -> Trial:
    """Return a Trial of independent attempts. They are made once for all of these numbers of them, which increase."""
    *smaller, n = counts
    return Trial(solver, name, n, partial(parallel, n=n), picks, tuple(smaller))


def trials_of(solver: str, name: str, search: Callable, counts: tuple[int, ...], picks: tuple[str, ...]) -> list[Trial]:
    """Return a Trial for each number of attempts."""
    return [Trial(solver, name, n, partial(search, n=n), picks) for n in counts]


SECONDS_BETWEEN_WRITES = 60.0
ORACLE_ATTEMPTS = 16  # of which the share that is right is a question's known difficulty
MAJORITY = ("majority",)
BY_SCORE = ("max", "weighted")
CHAINS = ("chains", "weighted", "majority")
BY_STEPS = ("beam", "lookahead", "dvts")


def chain_lengths(n: int) -> list[int]:
    """Return the lengths of the chains that n revisions are divided into: 1, 2, 4 ... n."""
    return [2**i for i in range(n.bit_length())]


def trials(most: int, skip_steps: bool = False) -> list[Trial]:
    """Return all trials with at most so many attempts, and those that determine the difficulty. skip_steps: without the
    searches by steps.
    """
    compared = min(COMPARED, most)
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]
    found = [
        *trials_of("base", "greedy", SEARCHES["greedy"], (1,), MAJORITY),
        samples_of("base", "parallel", counts, ("max", "weighted", "majority", "outcome")),
        *trials_of("base", "beam", SEARCHES["beam"], (4, 8, 16, 32), BY_SCORE),
        *trials_of("base", "lookahead", SEARCHES["lookahead"], (4, 16), BY_SCORE),
        *trials_of("base", "dvts", SEARCHES["dvts"], (compared,), BY_SCORE),
        samples_of("noisy", "noisy parallel", [compared], BY_SCORE),
        *trials_of("noisy", "noisy beam", SEARCHES["beam"], (compared,), BY_SCORE),
    ]
    for n, lengths in ((4, [1, 4]), (compared, chain_lengths(compared))):
        for length in lengths:
            found += trials_of("revise", f"revise {length}", partial(revise, length=length), (n,), CHAINS)
    found.append(samples_of("refit", "refit parallel", [1, compared], MAJORITY))  # the control, see learn.py
    found += trials_of("large", "large greedy", SEARCHES["greedy"], (1,), MAJORITY)
    if skip_steps:  # and without the noisy verifier, which compares these searches with samples
        found = [trial for trial in found if trial.name not in BY_STEPS and trial.solver != "noisy"]
    by_name = {(trial.name, trial.n): trial for trial in found if trial.n <= most}  # each once
    difficulty = [
        samples_of("base", "probe", [1], ("weighted",)),  # predicts it
        samples_of("base", "oracle", [ORACLE_ATTEMPTS], ("weighted",)),  # determines it
    ]
    return difficulty + list(by_name.values())


# ---------------------------------------------------------------- sweep


def sweep(config: Config) -> None:
    """Run all trials on parts of the questions, divided among --workers processes. Until all are done, the rows are in
    *.unfinished.jsonl, written every minute and however the sweep ends; --resume goes on from there, or adds to a sweep
    that is finished. Raises UserError.
    """
    path = rows_file(config.json)
    unfinished = path.with_suffix(".unfinished.jsonl")
    folders = folders_of(config)
    rows = rows_before(path, unfinished, config) if config.resume else []
    done = {what_row(row) for row in rows}
    jobs = jobs_of(config, folders, done)
    written = time.time()
    try:
        with process_pool(config.workers) as pool:
            for found in tqdm(pool.map(run_trial, jobs), total=len(jobs), desc="sweep", unit="trial"):
                rows += [row for row in found if what_row(row) not in done]
                if time.time() - written > SECONDS_BETWEEN_WRITES:
                    write_rows(unfinished, rows)
                    written = time.time()
    finally:
        if rows:
            write_rows(unfinished, rows)
    unfinished.replace(path)
    print(f"wrote {path}")


class Job(NamedTuple):
    """A trial on some questions: what a worker process does at a time."""

    config: Config
    trial: Trial
    folder: Path  # of the trial's policy
    indices: list[int]  # of the questions
    seed: int


def folders_of(config: Config) -> dict[str, Path]:
    """Return the folders of the policies that there are, by the name of their solver. Raises UserError."""
    folder = Path(find_folder(config.model))
    folders = {"base": folder, "revise": folder / "revise", "refit": folder / "refit"}
    if config.verifier_noise:
        folders["noisy"] = folder
    if config.large:
        folders["large"] = Path(find_folder(config.large, "--large"))
        if not folders["large"].is_dir():
            raise UserError(f"--large {config.large}: no policy in this folder")
    largest = max(ORACLE_ATTEMPTS, config.most)
    if config.slots < largest:
        raise UserError(f"--slots {config.slots}: must be at least {largest} with --most {config.most}")
    check_verifiers(folders["base"])
    if (folders["revise"] / "config.json").exists():
        check_verifiers(folders["revise"])
    return {name: folder for name, folder in folders.items() if (folder / "config.json").exists()}


SHARED_WITH_SPEED = ("model", "learned", "task", "max_new")  # of the settings: those that `speed` depends on, too


@cache
def settings_of(config: Config) -> dict:
    """Return the settings that all rows of a file share."""
    return {
        "model": config.model,
        "learned": learned_in(Path(find_folder(config.model))),
        "large": config.large,
        "task": config.task,
        "data": config.data,
        "dtype": config.dtype,
        "max_new": config.max_new,
        "aggregate": config.aggregate,
        "noise": config.verifier_noise,
    }


def learned_in(folder: Path) -> int:
    """Return a checksum of what `learn` has made in a policy's folder: other verifiers choose other answers."""
    parts = [part / name for part in (folder, folder / "revise") for name in VERIFIERS]
    checksum = 0
    for path in sorted(path for part in parts for path in part.glob("*.safetensors")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum


def what_row(row: dict) -> tuple:
    """Return what a row is of; rows that differ only in how the answer is picked are of the same."""
    return row["search"], row["n"], row["seed"], row["prompt"]


def rows_before(finished: Path, unfinished: Path, config: Config) -> list[dict]:
    """Return the rows that there are. Those of a finished sweep with other settings do not count. Raises UserError if
    an unfinished one had other settings.
    """
    path = unfinished if unfinished.exists() else finished
    rows = read_rows(path) if path.exists() else []
    for name, now in settings_of(config).items():
        before = rows[0].get(name) if rows else now
        if before != now:
            difference = f"the rows in {path} were made with {name} {before}, not {now}"
            if path == unfinished:
                raise UserError(f"--resume: {difference}; without --resume the sweep begins anew")
            print(f"beginning anew: {difference}")
            return []
    return rows


def jobs_of(config: Config, folders: dict[str, Path], done: set[tuple]) -> list[Job]:
    """Return what is to be done. done: (search, n, seed, question) of the rows that there are."""
    task = config.make_task()
    questions = {i: question_of(task.problem("test", i)) for i in distinct(task, config.count)}
    indices = list(questions)
    jobs = []
    for seed in range(config.seed, config.seed + config.seeds):
        for first in range(0, len(indices), config.chunk):
            part = indices[first : first + config.chunk]
            for trial in trials(config.most, config.skip_steps):
                missing = []
                for i in part:
                    if {(trial.name, n, seed, questions[i]) for n in trial.counts()} - done:
                        missing.append(i)
                if missing and trial.solver in folders:
                    jobs.append(Job(config, trial, folders[trial.solver], missing, seed))
    return jobs


def question_of(problem: Problem) -> str:
    """Return what stands for a question in the rows."""
    return problem.trace or problem.prompt


def rows_file(name: str) -> Path:
    """Return --json as a path that can be written. Raises UserError."""
    path = Path(name)
    if not name or path.is_dir():
        raise UserError(f"--json {name!r}: must be the name of a file")
    check_writable(path.parent)
    return path


def distinct(task: Task, count: int) -> list[int]:
    """Return the indices of the first `count` held-out questions of which no two are alike; fewer, if there are not so
    many among the first 10 * count.
    """
    first: dict[Hashable, int] = {}  # question -> its first index
    for i in range(10 * count):
        first.setdefault(task.identity(task.problem("test", i)), i)
    return list(first.values())[:count]


def run_trial(job: Job) -> list[dict]:
    """Do a job, in a worker process -> rows."""
    torch.set_num_threads(1)
    config, trial = job.config, job.trial
    solver = load_solver(config, job.folder, config.verifier_noise if trial.solver == "noisy" else 0.0)
    problems = [solver.task.problem("test", i) for i in job.indices]
    samples = trial.name if trial.name in ("probe", "oracle") else "attempts"
    rows = []
    for problem, solution in zip(problems, solver.solve(problems, trial.search, job.seed, samples)):
        for n in trial.smaller:
            rows += rows_of(trial._replace(n=n), solver, problem, first_attempts(solution, n), job.seed, config)
        rows += rows_of(trial, solver, problem, solution, job.seed, config)
    return rows


def first_attempts(solution: Solution, n: int) -> Solution:
    """Return the first n of independent attempts, with what they alone would have cost, without speculation."""
    attempts = solution.attempts[:n]
    decode = sum(len(attempt.tokens) for attempt in attempts)
    verifier = sum(len(attempt.scores) for attempt in attempts)
    return Solution(attempts, Ledger(prefill=solution.ledger.prefill, decode=decode, verifier=verifier))


@cache
def load_solver(config: Config, folder: Path, noise: float) -> Solver:
    """Return a solver for a policy. A worker process runs many trials, and loads each policy once."""
    task = config.make_task()
    return Solver(folder, task, slots=config.slots, noise=noise, dtype=config.dtype)


def rows_of(trial: Trial, solver: Solver, problem: Problem, solution: Solution, seed: int, config: Config) -> list:
    """Return a row for each way to pick the answer."""
    attempts = solution.attempts
    ledger = solution.ledger.without_speculation()
    rights = [int(solver.grade(problem, list(attempt.tokens))) for attempt in attempts]
    common = {
        **settings_of(config),
        "prompt": question_of(problem),
        "search": trial.name,
        "n": trial.n,
        "seed": seed,
        "weights": solver.sizes.policy + solver.sizes.head,
        "ledger": asdict(ledger),
        "attempts": rights,
        "score": sum(score(attempt, config.aggregate) for attempt in attempts) / len(attempts),
    }
    rows = []
    for how in trial.picks:
        answer = pick(attempts, how, config.aggregate)
        right = next((is_right for attempt, is_right in zip(attempts, rights) if attempt.answer == answer), 0)
        sizes = solver.sizes._replace(verifier=0) if how == "majority" else solver.sizes
        rows.append({**common, "pick": how, "answer": answer, "right": right, "flops": ledger.flops(sizes)})
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as lines of JSON. Raises UserError."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- speed


def timed(most: int) -> list[Trial]:
    """Return the trials that are timed. All others decode step by step, without speculation."""
    compared = min(COMPARED, most)
    names = {("greedy", 1)} | {(f"revise {length}", compared) for length in (1, 4, compared)}
    found = [trial for trial in trials(most) if (trial.name, trial.n) in names]
    return [samples_of("base", "parallel", [min(8, most)], BY_SCORE), *found]


def speed(config: Config) -> None:
    """Print a line and write a row for each strategy that is timed. Raises UserError."""
    torch.set_num_threads(1)
    path = rows_file(config.json)
    task = config.make_task()
    folder = Path(find_folder(config.model))
    problems = [task.problem("test", 10**6 + i) for i in range(config.count)]
    solvers = {}  # by name: plain, speculative
    for name, policy in (("base", folder), ("revise", folder / "revise")):
        if (policy / "config.json").exists():
            if not (policy / "drafter").exists():
                raise UserError(f"{policy}: no drafter to compare with; `python -m test_time learn` makes one")
            solvers[name] = [Solver(policy, task, on, slots=64, dtype=config.dtype) for on in (False, True)]
    print(f"{'':>16} {'plain s':>8} {'spec. s':>8} {'ratio':>6} {'same':>7} {'MFLOPs plain / speculative':>28}")
    rows = []
    for trial in timed(config.most):
        if trial.solver in solvers:
            seconds, flops, same = time_trial(trial, solvers[trial.solver], problems, config.seed)
            print(
                f"{f'{trial.name} {trial.n}':>16} {seconds[0]:8.4f} {seconds[1]:8.4f} {seconds[0] / seconds[1]:6.2f} "
                f"{same:>3}/{len(problems)} {flops[0] / 1e6:18.1f} / {flops[1] / 1e6:.1f}"
            )
            row = {"search": trial.name, "n": trial.n, "plain": seconds[0], "speculative": seconds[1]}
            row |= {name: settings_of(config)[name] for name in SHARED_WITH_SPEED}
            rows.append({**row, "same": same, "questions": len(problems), "flops": flops})
    write_rows(path.with_suffix(".speed.jsonl"), rows)


def time_trial(trial: Trial, solvers: list[Solver], problems: list[Problem], seed: int):
    """Run one strategy on all problems, after a warm-up on a quarter of them. solvers: plain, speculative.

    -> mean seconds and mean FLOPs of both, and the number of problems for which both made the same tokens.
    """
    for problem in problems[: -(-len(problems) // 4)]:
        for solver in solvers:
            solver.solve([problem], trial.search, seed)
    seconds = [0.0, 0.0]
    flops = [0.0, 0.0]
    same = 0
    for i, problem in enumerate(tqdm(problems, desc=trial.name, leave=False)):
        tokens = {}
        for which in (0, 1) if i % 2 else (1, 0):  # they take turns in running first
            attempts, ledger = solvers[which].solve([problem], trial.search, seed)[0]
            tokens[which] = [attempt.tokens for attempt in attempts]
            seconds[which] += ledger.seconds / len(problems)
            flops[which] += ledger.flops(solvers[which].sizes) / len(problems)
        same += tokens[0] == tokens[1]
    return seconds, flops, same
