"""The settings, each a command-line flag."""

from dataclasses import dataclass
from pathlib import Path

from parts.cli import UserError, flag

STRATEGIES = ["auto", "greedy", "majority", "parallel", "beam", "lookahead", "dvts", "revise"]


@dataclass(frozen=True)
class Config:
    """In brackets: the commands that a setting is for."""

    command: str = flag(
        "answer", "what to do", choices=["answer", "learn", "sweep", "report", "speed"], positional=True
    )
    model: str = flag("base/chain", "folder of the policy; verifiers, drafter and revise/ lie in it")
    task: str = flag("chain", "chain or gsm8k")
    data: str = flag("", "folder of the task's data, if it wants one")
    seed: int = flag(0, "of all sampling")
    prompt: str = flag("", "(answer) the question")
    strategy: str = flag("auto", "(answer) how to search; auto: by predicted difficulty", choices=STRATEGIES)
    n: int = flag(16, "(answer) N, unless auto")
    budget: int = flag(1000, "(answer) tokens, for auto; hard questions may get more, easy ones less")
    questions: int = flag(8000, "(learn) training questions")
    continuations: int = flag(2, "(learn) from the end of each step")
    epochs: int = flag(12, "(learn) of tuning for revisions")
    drafter_seconds: float = flag(60.0, "(learn) training time of each drafter")
    count: int = flag(1000, "(sweep, speed) held-out questions")
    seeds: int = flag(1, "(sweep) repetitions with other samples")
    chunk: int = flag(100, "(sweep) questions in a part")
    workers: int = flag(2, "(sweep) processes")
    aggregate: str = flag(
        "last", "(sweep, answer) an attempt's score from those of its steps", choices=["last", "min", "product"]
    )
    verifier_noise: float = flag(0.2, "(sweep) share of the scores that are inverted for the noisy strategies")
    large: str = flag("", "(sweep) folder of a larger model to compare with")
    json: str = flag("runs/test-time.jsonl", "(sweep, report) the rows; (speed) its own go beside them")


def writable_folder(model: str) -> Path:
    """--model as a folder to write into: a policy's, exactly where the user says, not one beside the scripts.

    Raises UserError.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").exists():
        raise UserError(f"--model {model}: no policy in this folder, and this command writes into the policy's folder")
    return folder
