"""`python -m test_time speed`: seconds per question with and without speculation, one question at a time.

The answers must be the same, token by token. Rows are written beside --json, to *.speed.jsonl.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from parts.files import find_folder
from tasks import Problem, make_task
from test_time.config import Config
from test_time.solver import Solver
from test_time.sweep import TRIALS, Trial, write_rows

# the other searches decode step by step, without speculation
TIMED = (("greedy", 1), ("parallel", 8), ("revise 1", 16), ("revise 4", 16), ("revise 16", 16))


def speed(config: Config) -> None:
    """Print a line and write a row for each strategy. Raises UserError."""
    torch.set_num_threads(1)
    task = make_task(config.task, config.data)
    folder = Path(find_folder(config.model))
    problems = [task.problem("test", 10**6 + i) for i in range(config.count)]
    solvers = {}  # by name: plain, speculative
    for name, where in (("base", folder), ("revise", folder / "revise")):
        solvers[name] = [Solver(where, task, speculate=on, slots=64) for on in (False, True)]
    print(f"{'':>16} {'plain s':>8} {'spec. s':>8} {'ratio':>6} {'same':>7} {'MFLOPs plain / speculative':>28}")
    rows = []
    for trial in TRIALS:
        if (trial.name, trial.n) not in TIMED:
            continue
        row = time_trial(trial, solvers[trial.solver], problems, config.seed)
        rows.append(row)
        plain, speculative = row["plain"], row["speculative"]
        mflops = [x / 1e6 for x in row["flops"]]
        print(
            f"{f'{trial.name} {trial.n}':>16} {plain:8.4f} {speculative:8.4f} {plain / speculative:6.2f} "
            f"{row['same']:>3}/{row['questions']} {mflops[0]:18.1f} / {mflops[1]:.1f}"
        )
    write_rows(Path(config.json).with_suffix(".speed.jsonl"), rows)


def time_trial(trial: Trial, solvers: list[Solver], problems: list[Problem], seed: int) -> dict:
    """Run one strategy on all problems, twice; the first time is a warm-up and does not count. solvers: plain,
    speculative.

    -> a row: means over the questions, and the number of questions at which both made the same tokens.
    """
    seconds = [0.0, 0.0]
    flops = [0.0, 0.0]
    same = 0
    for warmup in (True, False):
        for i, problem in enumerate(tqdm(problems, desc=trial.name, leave=False)):
            tokens = {}
            for which in (0, 1) if i % 2 else (1, 0):  # they take turns in running first
                attempts, ledger = solvers[which].solve([problem], trial.search, seed)[0]
                tokens[which] = [attempt.tokens for attempt in attempts]
                if not warmup:
                    seconds[which] += ledger.seconds / len(problems)
                    flops[which] += ledger.flops(solvers[which].sizes) / len(problems)
            same += not warmup and tokens[0] == tokens[1]
    return {
        "search": trial.name,
        "n": trial.n,
        "plain": seconds[0],
        "speculative": seconds[1],
        "same": same,
        "questions": len(problems),
        "flops": flops,
    }
