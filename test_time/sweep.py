"""`python -m test_time sweep`: every strategy on --count held-out questions.

It writes rows to --json, one per question, strategy and way to pick an answer: what `report` draws from.

No two of the questions are alike, so that the two halves of the statistics have none in common. The samples that judge
difficulty (probe, oracle) are others than those that are spent on the answer.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from parts.cli import UserError
from parts.files import find_folder, write_atomically
from tasks import Problem, Task, make_task
from test_time.config import Config
from test_time.picking import pick, score
from test_time.solver import Solution, Solver
from test_time.trials import Trial, solver_folders, trials


class Job(NamedTuple):
    """A part of a sweep."""

    config: Config
    indices: list[int]  # of the questions
    seed: int


def sweep(config: Config) -> None:
    """All parts, in --workers processes. Raises UserError."""
    folder = Path(find_folder(config.model))
    if config.large and not (Path(find_folder(config.large, "--large")) / "config.json").exists():
        raise UserError(f"--large {config.large}: no policy there")
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
    with ProcessPoolExecutor(config.workers, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        parts = list(tqdm(pool.map(sweep_part, jobs), total=len(jobs), desc="sweep", unit="part"))
    lines = [json.dumps(row) + "\n" for part in parts for row in part]
    write_atomically(Path(config.json), "".join(lines))
    print(f"wrote {config.json}")


def distinct(task: Task, count: int) -> list[int]:
    """Indices of the first `count` held-out questions of which no two are alike; fewer, if ten times as many do not
    hold so many.
    """
    first: dict[str, int] = {}  # prompt -> its first index
    for i in range(10 * count):
        first.setdefault(task.problem("test", i).prompt, i)
    return list(first.values())[:count]


def sweep_part(job: Job) -> list[dict]:
    """All strategies on some questions, in a process of its own -> rows."""
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
    for trial in trials({name: solver.again for name, solver in solvers.items()}):
        solver = solvers[trial.solver]
        samples = trial.name if trial.name in ("probe", "oracle") else "attempts"
        solutions = solver.solve(problems, trial.search, job.seed, samples)
        for problem, solution in zip(problems, solutions):
            rows += rows_of(trial, solver, problem, solution, job)
    return rows


def rows_of(trial: Trial, solver: Solver, problem: Problem, solution: Solution, job: Job) -> list[dict]:
    """A row for each way to pick the answer."""
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
        right = next((good for attempt, good in zip(attempts, rights) if attempt.answer == answer), 0)
        sizes = solver.sizes._replace(verifier=0) if how == "majority" else solver.sizes
        rows.append({**common, "pick": how, "answer": answer, "right": right, "flops": ledger.flops(sizes)})
    return rows
