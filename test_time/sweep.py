"""`python -m test_time sweep`: run every strategy on --count held-out questions.

It writes rows to --json, one per question, strategy and way to pick an answer; `report` reads them.

No two questions are alike, so that the two halves of the statistics share none. The samples that determine difficulty
(probe, oracle) are not those that are spent on the answer.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from parts.cli import UserError
from parts.files import find_folder, write_atomically
from tasks import Problem, Task, make_task
from test_time.attempts import SearchStrategy, pick, score
from test_time.config import Config
from test_time.solver import Solution, Solver
from test_time.strategies import SEARCHES, parallel, revise

# ---------------------------------------------------------------- what is compared


class Trial(NamedTuple):
    """A strategy with a number of attempts, the solver that runs it, and the ways to pick its answer."""

    solver: str  # a key of `solver_folders`
    name: str
    n: int
    search: SearchStrategy
    picks: tuple[str, ...]


def trials_of(solver: str, name: str, search: Callable, counts: tuple[int, ...], picks: tuple[str, ...]) -> list[Trial]:
    """Return a Trial for each number of attempts."""
    return [Trial(solver, name, n, partial(search, n=n), picks) for n in counts]


CHAIN_LENGTHS = (1, 2, 4, 8, 16)  # among 16 revisions
MAJORITY = ("majority",)
BY_SCORE = ("max", "weighted")
CHAINS = ("chains", "weighted", "majority")
TRIALS = [
    *trials_of("base", "greedy", SEARCHES["greedy"], (1,), MAJORITY),
    *trials_of("base", "probe", parallel, (1,), ("weighted",)),  # predicts difficulty
    *trials_of("base", "oracle", parallel, (16,), ("weighted",)),  # determines the known difficulty
    *trials_of("base", "parallel", parallel, (1, 2, 4, 8, 16, 32, 64), ("max", "weighted", "majority", "outcome")),
    *trials_of("base", "beam", SEARCHES["beam"], (4, 8, 16, 32, 64), BY_SCORE),
    *trials_of("base", "lookahead", SEARCHES["lookahead"], (4, 16), BY_SCORE),
    *trials_of("base", "dvts", SEARCHES["dvts"], (16, 64), BY_SCORE),
    *trials_of("noisy", "noisy parallel", parallel, (16,), BY_SCORE),
    *trials_of("noisy", "noisy beam", SEARCHES["beam"], (16,), BY_SCORE),
    *trials_of("revise", "revise 1", partial(revise, length=1), (4,), CHAINS),
    *trials_of("revise", "revise 4", partial(revise, length=4), (4,), CHAINS),
]
for chain_length in CHAIN_LENGTHS:
    TRIALS += trials_of("revise", f"revise {chain_length}", partial(revise, length=chain_length), (16,), CHAINS)
TRIALS += trials_of("refit", "refit parallel", parallel, (1, 16), MAJORITY)  # the control, see learn.py
TRIALS += trials_of("large", "large greedy", SEARCHES["greedy"], (1,), MAJORITY)


def solver_folders(folder: Path, large: str = "") -> dict[str, Path]:
    """Return the folder of each solver's policy, as far as there is one. large: "" for none."""
    folders = {
        "base": folder,
        "noisy": folder,  # the same, with noise on its verifier's scores
        "revise": folder / "revise",
        "refit": folder / "refit",
    }
    if large:
        folders["large"] = Path(large)
    return {name: path for name, path in folders.items() if (path / "config.json").exists()}


# ---------------------------------------------------------------- the sweep


class Job(NamedTuple):
    """A part of a sweep, for one process."""

    config: Config
    indices: list[int]  # of the questions
    seed: int


def sweep(config: Config) -> None:
    """Run all parts in --workers processes and write the rows. Raises UserError."""
    folder = Path(find_folder(config.model))
    if config.large and not (Path(find_folder(config.large, "--large")) / "config.json").exists():
        raise UserError(f"--large {config.large}: no policy in this folder")
    if not (folder / "process").exists():
        raise UserError(
            f"--model {config.model}: it has no verifier to search with; "
            f"`python -m test_time learn --model {config.model}` makes one"
        )
    indices = distinct(make_task(config.task, config.data), config.count)
    jobs = []
    for seed in range(config.seed, config.seed + config.seeds):
        for first in range(0, len(indices), config.chunk):
            jobs.append(Job(config, indices[first : first + config.chunk], seed))
    rows = []
    with ProcessPoolExecutor(config.workers, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        for part in tqdm(pool.map(sweep_part, jobs), total=len(jobs), desc="sweep", unit="part"):
            rows += part
    write_rows(Path(config.json), rows)
    print(f"wrote {config.json}")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as lines of JSON. Raises UserError."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def distinct(task: Task, count: int) -> list[int]:
    """Return the indices of the first `count` held-out questions of which no two are alike; fewer, if there are not so
    many among the first 10 * count.
    """
    first: dict[str, int] = {}  # prompt -> its first index
    for i in range(10 * count):
        first.setdefault(task.problem("test", i).prompt, i)
    return list(first.values())[:count]


def sweep_part(job: Job) -> list[dict]:
    """Run all strategies on some questions, in a process of its own -> rows."""
    config = job.config
    torch.set_num_threads(1)
    task = make_task(config.task, config.data)
    problems = [task.problem("test", i) for i in job.indices]
    large = find_folder(config.large, "--large") if config.large else ""
    solvers = {}
    for name, folder in solver_folders(Path(find_folder(config.model)), large).items():
        noise = config.verifier_noise if name == "noisy" else 0.0
        solvers[name] = Solver(folder, task, speculate=False, noise=noise)
    rows = []
    for trial in TRIALS:
        if trial.solver not in solvers:
            continue
        solver = solvers[trial.solver]
        samples = trial.name if trial.name in ("probe", "oracle") else "attempts"
        for problem, solution in zip(problems, solver.solve(problems, trial.search, job.seed, samples)):
            rows += rows_of(trial, solver, problem, solution, job)
    return rows


def rows_of(trial: Trial, solver: Solver, problem: Problem, solution: Solution, job: Job) -> list[dict]:
    """Return a row for each way to pick the answer."""
    aggregate = job.config.aggregate
    attempts, ledger = solution
    rights = [int(solver.grade(problem, list(attempt.tokens))) for attempt in attempts]
    common = {
        "prompt": problem.trace or problem.prompt,
        "search": trial.name,
        "n": trial.n,
        "seed": job.seed,
        "aggregate": aggregate,
        "noise": job.config.verifier_noise,
        "weights": solver.sizes.policy,
        "ledger": asdict(ledger),
        "attempts": rights,
        "score": sum(score(attempt, aggregate) for attempt in attempts) / len(attempts),
    }
    rows = []
    for how in trial.picks:
        answer = pick(attempts, how, aggregate)
        right = next((is_right for attempt, is_right in zip(attempts, rights) if attempt.answer == answer), 0)
        sizes = solver.sizes._replace(verifier=0) if how == "majority" else solver.sizes
        rows.append({**common, "pick": how, "answer": answer, "right": right, "flops": ledger.flops(sizes)})
    return rows
