"""`python -m test_time speed`: seconds for a question with and without speculation, one question at a time.

What is the drafter worth here? The answers must be the same, token by token. Rows go beside --json, to *.speed.jsonl.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from parts.files import find_folder, write_atomically
from tasks import Problem, make_task
from test_time.config import Config
from test_time.solver import Solver
from test_time.trials import Trial, trials

# The other searches decode step by step, plainly
TIMED = (("greedy", 1), ("parallel", 8), ("revise 1", 16), ("revise 4", 16), ("revise 16", 16))


def speed(config: Config) -> None:
    """A line and a row for each strategy. Raises UserError."""
    torch.set_num_threads(1)
    task = make_task(config.task, config.data)
    folder = Path(find_folder(config.model))
    problems = [task.problem("test", 10**6 + i) for i in range(config.count)]
    solvers = {}  # by name: plain, speculative
    for name, where in (("base", folder), ("revise", folder / "revise")):
        solvers[name] = [Solver(where, task, speculate=on, slots=64) for on in (False, True)]
    print(f"{'':>16} {'plain s':>8} {'spec. s':>8} {'ratio':>6} {'same':>7} {'MFLOPs plain / speculative':>28}")
    rows = []
    for trial in trials({name: pair[0].again for name, pair in solvers.items()}):
        if (trial.name, trial.n) in TIMED:
            row = time_trial(trial, solvers[trial.solver], problems, config.seed)
            print_row(row)
            rows.append(row)
    lines = [json.dumps(row) + "\n" for row in rows]
    write_atomically(Path(config.json).with_suffix(".speed.jsonl"), "".join(lines))


def time_trial(trial: Trial, solvers: list[Solver], problems: list[Problem], seed: int) -> dict:
    """One strategy on all problems, twice: the first turn warms up, and does not count. solvers: plain, speculative.

    -> a row: means over the questions, and on how many of them both made the same tokens.
    """
    seconds = [0.0, 0.0]
    flops = [0.0, 0.0]
    same = 0
    for turn in range(2):
        for i, problem in enumerate(tqdm(problems, desc=trial.name, leave=False)):
            solutions = {}
            for which in (0, 1) if i % 2 else (1, 0):  # taking turns in being first
                solutions[which] = solvers[which].solve([problem], trial.search, seed)[0]
            if turn == 0:
                continue
            for which, solution in solutions.items():
                seconds[which] += solution.ledger.seconds / len(problems)
                flops[which] += solution.ledger.flops(solvers[which].sizes) / len(problems)
            plain = [attempt.tokens for attempt in solutions[0].attempts]
            speculative = [attempt.tokens for attempt in solutions[1].attempts]
            same += plain == speculative
    return {
        "search": trial.name,
        "n": trial.n,
        "plain": seconds[0],
        "speculative": seconds[1],
        "same": same,
        "questions": len(problems),
        "flops": flops,
    }


def print_row(row: dict) -> None:
    """A line of the table."""
    name = f"{row['search']} {row['n']}"
    plain = row["plain"]
    speculative = row["speculative"]
    same = f"{row['same']:>3}/{row['questions']}"
    mflops = f"{row['flops'][0] / 1e6:18.1f} / {row['flops'][1] / 1e6:.1f}"
    print(f"{name:>16} {plain:8.4f} {speculative:8.4f} {plain / speculative:6.2f} {same} {mflops}")
