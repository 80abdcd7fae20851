"""`python -m test_time --prompt ...`: answer one question, and show the attempts and their costs.

--strategy auto makes a probe attempt first. Its score predicts how difficult the question is, and choice.json has the
best strategy for that difficulty and the budget.
"""

from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from parts.cli import UserError
from tasks import Problem, make_task
from test_time.attempts import Ledger, pick, score
from test_time.config import Config
from test_time.results import read_choices
from test_time.solver import Solution, Solver
from test_time.strategies import SEARCHES, parallel

PICKS = {"majority": "majority", "greedy": "majority", "revise": "chains"}  # all others: weighted
WITHOUT_VERIFIER = ("majority", "greedy")
SHOWN = 8  # attempts that are printed: the best ones, the best last


class SearchPlan(NamedTuple):
    """How to search, and how to pick the answer."""

    search: str
    n: int
    pick: str
    aggregate: str
    probe: Ledger  # the cost of the probe attempt


def answer(config: Config) -> None:
    """Answer --prompt. Raises UserError."""
    if not config.prompt:
        raise UserError('--prompt "7:cfa=": a question is needed')
    task = make_task(config.task, config.data)
    solver = Solver(config.model, task)
    problem = Problem(config.prompt, config.prompt, None)
    solver.encode(problem)  # raises UserError for a symbol that the tokenizer does not have
    if not solver.verifiers and config.strategy not in WITHOUT_VERIFIER:
        raise UserError(
            f"--strategy {config.strategy}: {config.model} has no verifier (`python -m test_time learn`); "
            "only majority and greedy work without one"
        )
    if not 1 <= config.n <= solver.engine.slots:
        raise UserError(f"--n {config.n}: must be 1 to {solver.engine.slots}")
    if config.strategy == "auto":
        plan = plan_by_difficulty(config, solver, problem)
    else:
        n = 1 if config.strategy == "greedy" else config.n
        plan = SearchPlan(config.strategy, n, PICKS.get(config.strategy, "weighted"), config.aggregate, Ledger())
    if plan.search == "revise":
        solver = Solver(solver.folder / "revise", task)
    search = partial(SEARCHES[plan.search], n=plan.n)
    show(solver.solve([problem], search, config.seed, "answer")[0], plan, solver)


def plan_by_difficulty(config: Config, solver: Solver, problem: Problem) -> SearchPlan:
    """Make a probe attempt, and choose by its score."""
    choices = read_choices(solver.folder)
    attempts, probe = solver.solve([problem], partial(parallel, n=1), config.seed, "probe")[0]
    easiness = score(attempts[0], choices.aggregate)
    difficulty = choices.difficulty(easiness)
    search, n, how = choices.best(difficulty, config.budget - probe.decode)
    print(
        f"probe attempt: score {easiness:.2f}, so difficulty {difficulty + 1} of 5; {probe.decode} tokens "
        f"-> {search} {n}, {how}"
    )
    return SearchPlan(search, n, how, choices.aggregate, probe)


def show(solution: Solution, plan: SearchPlan, solver: Solver) -> None:
    """Print the best attempts, the answer and the costs."""
    attempts, ledger = solution
    by_score = partial(score, aggregate=plan.aggregate)
    for attempt in sorted(attempts, key=by_score)[-SHOWN:]:
        text = solver.tokenizer.decode(list(attempt.tokens), skip_special_tokens=True)
        print(f"  {by_score(attempt):.3f}  {text}")
    total = ledger + plan.probe
    how = f"{plan.search} {plan.n}, {plan.pick}; {len(attempts)} attempts at the end"
    print(f"answer: {pick(attempts, plan.pick, plan.aggregate)}   ({how})")
    tokens = ", ".join(f"{name} {value}" for name, value in asdict(total).items() if name != "seconds")
    mflops = total.flops(solver.sizes) / 1e6
    print(f"tokens (verifier: steps), with the probe: {tokens}; {mflops:.1f} MFLOPs, {total.seconds:.2f} s")
