"""`python -m test_time --prompt ...`: answer one question, and show the attempts and their costs.

--strategy auto reads choice.json, which has the best strategy for each budget and difficulty. Where it depends on the
difficulty, a probe attempt is made first: its score predicts how difficult the question is.
"""

from dataclasses import asdict
from functools import partial

from parts.cli import UserError
from tasks import Problem
from test_time.attempts import Ledger, pick, score
from test_time.config import Config
from test_time.results import read_choices
from test_time.solver import Solver, check_verifiers
from test_time.strategies import BRANCHING, CHAIN, SEARCHES, parallel

PICKS = {"majority": "majority", "greedy": "majority", "revise": "chains"}  # all others: weighted
SHOWN = 8  # attempts that are printed: the best ones, the best last


def answer(config: Config) -> None:
    """Answer --prompt. Raises UserError."""
    if not config.prompt:
        raise UserError('--prompt "7:cfa=": a question is needed')
    task = config.make_task()
    solver = Solver(config.model, task, slots=config.slots, dtype=config.dtype)
    problem = Problem(config.prompt, config.prompt, None)
    solver.encode(problem)  # raises UserError for a symbol that the tokenizer does not have
    if not solver.verifiers and config.strategy not in ("majority", "greedy"):
        need = f"{config.model} has no verifier (`python -m test_time learn`)"
        raise UserError(f"--strategy {config.strategy}: {need}; only majority and greedy work without one")
    if config.strategy != "auto":
        check_number(config, solver.engine.slots)
    search, n, aggregate = config.strategy, config.n, config.aggregate
    how = PICKS.get(search, "weighted")
    probe = Ledger()
    if search == "auto":
        choices = read_choices(solver.folder)
        if choices.max_new != config.max_new:
            raise UserError(
                f"--max-new {config.max_new}: the choices in {solver.folder} were made with --max-new {choices.max_new}"
            )
        aggregate = choices.aggregate
        difficulty = 0
        by_difficulty = choices.within(config.budget)
        most = max(key.n for key in by_difficulty)
        if most > solver.engine.slots:
            raise UserError(f"--slots {config.slots}: the choice for --budget {config.budget} needs {most}")
        if len(set(by_difficulty)) > 1:
            attempts, probe = solver.solve([problem], partial(parallel, n=1), config.seed, "probe")[0]
            easiness = score(attempts[0], aggregate)
            difficulty = choices.difficulty(easiness)
            print(f"probe attempt: score {easiness:.2f}, {probe.decode} tokens; difficulty {difficulty + 1} of 5")
        search, n, how = by_difficulty[difficulty]
    if search == "greedy":
        n = 1
    if search == "revise":
        check_verifiers(solver.folder / "revise")
        solver = Solver(solver.folder / "revise", task, slots=config.slots, dtype=config.dtype)
    attempts, ledger = solver.solve([problem], partial(SEARCHES[search], n=n), config.seed, "answer")[0]
    ledger += probe
    by_score = partial(score, aggregate=aggregate)
    for attempt in sorted(attempts, key=by_score)[-SHOWN:]:
        text = solver.tokenizer.decode(list(attempt.tokens), skip_special_tokens=True)
        print(f"  {by_score(attempt):.3f}  {text}")
    print(f"answer: {pick(attempts, how, aggregate)}   ({search} {n}, {how}; {len(attempts)} attempts at the end)")
    tokens = ", ".join(f"{name} {value}" for name, value in asdict(ledger).items() if name != "seconds")
    mflops = ledger.flops(solver.sizes) / 1e6
    print(f"tokens (verifier: steps), with the probe: {tokens}; {mflops:.1f} MFLOPs, {ledger.seconds:.2f} s")


def check_number(config: Config, slots: int) -> None:
    """Raise UserError if there can be no search with --n attempts. slots: of the engine."""
    if not 1 <= config.n <= slots and config.strategy != "greedy":
        raise UserError(f"--n {config.n}: must be 1 to {slots}")
    multiples = {"beam": BRANCHING, "lookahead": BRANCHING, "dvts": BRANCHING, "revise": min(config.n, CHAIN)}
    multiple = multiples.get(config.strategy, 1)
    if config.n % multiple:
        raise UserError(f"--n {config.n}: must be a multiple of {multiple} for --strategy {config.strategy}")
