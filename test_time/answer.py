"""`python -m test_time --prompt ...`: answer one question, and show what was tried and what it cost.

--strategy auto makes one attempt for a look. Its score predicts how difficult the question is, and choice.json says
what is best for that difficulty and the budget.
"""

from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from parts.cli import UserError
from tasks import Problem, make_task
from test_time.attempts import Attempt, Ledger, SearchStrategy
from test_time.choices import read_choices
from test_time.config import Config
from test_time.picking import pick, score
from test_time.solver import Solver
from test_time.strategies import beam, parallel, revise
from test_time.trials import WAYS

WITHOUT_VERIFIER = ("majority", "greedy")
SHOWN = 8  # attempts that are printed: the best ones, the best last


class Plan(NamedTuple):
    """How to search, and how to pick."""

    search: str
    n: int
    pick: str
    aggregate: str
    look: Ledger  # what it cost to find out


def answer(config: Config) -> None:
    """The command. Raises UserError."""
    if not config.prompt:
        raise UserError('--prompt "7:cfa=": a question is wanted')
    task = make_task(config.task, config.data)
    solver = Solver(config.model, task)
    problem = Problem(config.prompt, config.prompt, None)
    check(config, solver, problem)
    plan = plan_by_difficulty(config, solver, problem) if config.strategy == "auto" else plan_from_flags(config)
    searcher = Solver(solver.folder / "revise", task) if plan.search == "revise" else solver
    search = searches(plan.n, solver.again)[plan.search]
    attempts, ledger = searcher.solve([problem], search, config.seed, "answer")[0]
    show(attempts, ledger, plan, searcher)


def check(config: Config, solver: Solver, problem: Problem) -> None:
    """Raises UserError for what this policy cannot do."""
    solver.encode(problem)  # has all its symbols
    if not solver.verifiers and config.strategy not in WITHOUT_VERIFIER:
        raise UserError(
            f"--strategy {config.strategy}: {config.model} has no verifier (`python -m test_time learn`); "
            "only majority and greedy work without one"
        )
    if not 1 <= config.n <= solver.engine.slots:
        raise UserError(f"--n {config.n}: must be 1 to {solver.engine.slots}")


def plan_from_flags(config: Config) -> Plan:
    """What the flags say."""
    picks = {"majority": "majority", "greedy": "majority", "revise": "chains"}
    how = picks.get(config.strategy, "weighted")
    return Plan(config.strategy, config.n, how, config.aggregate, Ledger())


def plan_by_difficulty(config: Config, solver: Solver, problem: Problem) -> Plan:
    """Make an attempt for a look, and choose by its score."""
    choices = read_choices(solver.folder)
    attempts, look = solver.solve([problem], partial(parallel, n=1), config.seed, "probe")[0]
    easiness = score(attempts[0], choices.aggregate)
    difficulty = choices.difficulty(easiness)
    search, n, how = choices.best(difficulty, config.budget - look.decode)
    print(
        f"an attempt for a look: score {easiness:.2f}, difficulty {difficulty + 1} of 5, {look.decode} tokens "
        f"-> {search} {n}, {how}"
    )
    return Plan(search, n, how, choices.aggregate, look)


def searches(n: int, again: tuple[int, ...]) -> dict[str, SearchStrategy]:
    """By name, with n attempts. again: the tokens that part attempts."""
    return {
        "greedy": partial(parallel, n=1, greedy=True),
        "majority": partial(parallel, n=n),
        "parallel": partial(parallel, n=n),
        "beam": partial(beam, n=n, m=WAYS),
        "lookahead": partial(beam, n=n, m=WAYS, look=1),
        "dvts": partial(beam, n=n, m=WAYS, diverse=True),
        "revise": partial(revise, n=n, length=min(n, 8), again=again),
    }


def show(attempts: list[Attempt], ledger: Ledger, plan: Plan, solver: Solver) -> None:
    """The best attempts, the answer, the costs."""
    by_score = partial(score, aggregate=plan.aggregate)
    for attempt in sorted(attempts, key=by_score)[-SHOWN:]:
        text = solver.tokenizer.decode(list(attempt.tokens), skip_special_tokens=True)
        print(f"  {by_score(attempt):.3f}  {text}")
    total = ledger.plus(plan.look)
    how = f"{plan.search} {plan.n}, {plan.pick}; {len(attempts)} attempts in the end"
    print(f"answer: {pick(attempts, plan.pick, plan.aggregate)}   ({how})")
    tokens = ", ".join(f"{name} {value}" for name, value in asdict(total).items() if name != "seconds")
    mflops = total.flops(solver.sizes) / 1e6
    print(f"tokens (of the verifier: steps), the look included: {tokens}; {mflops:.1f} MFLOPs, {total.seconds:.2f} s")
