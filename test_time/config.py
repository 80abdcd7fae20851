"""The settings of `python -m test_time`, each a command-line flag."""

from dataclasses import dataclass
from pathlib import Path

from parts.cli import UserError, flag
from test_time.strategies import SEARCHES

COMMANDS = ["answer", "learn", "sweep", "speed", "report"]
AGGREGATES = ["last", "min", "product"]


@dataclass(frozen=True)
class Config:
    """The settings. In brackets: the commands that read them."""

    command: str = flag("answer", "what to do", choices=COMMANDS, positional=True)
    model: str = flag("base/chain", "folder of the policy, which also holds its verifiers, drafter and revise/")
    task: str = flag("chain", "chain or gsm8k")
    data: str = flag("", "folder of the task's data, if it needs any")
    seed: int = flag(0, "seed of all sampling")
    prompt: str = flag("", "(answer) the question")
    strategy: str = flag("auto", "(answer) search strategy; auto: by predicted difficulty", choices=["auto", *SEARCHES])
    n: int = flag(16, "(answer) number of attempts N, unless --strategy is auto")
    budget: int = flag(1000, "(answer) mean tokens per question for auto; hard questions may get more")
    questions: int = flag(8000, "(learn) training questions")
    continuations: int = flag(2, "(learn) samples from the end of each step, which label it")
    epochs: int = flag(12, "(learn) epochs of tuning the revision policy")
    drafter_seconds: float = flag(60.0, "(learn) training time of each drafter")
    count: int = flag(1000, "(sweep, speed) held-out questions")
    seeds: int = flag(1, "(sweep) repetitions with other samples")
    chunk: int = flag(100, "(sweep) questions in one part of the work")
    workers: int = flag(2, "(sweep) processes")
    aggregate: str = flag("last", "(sweep, answer) how steps' scores make an attempt's score", choices=AGGREGATES)
    verifier_noise: float = flag(0.2, "(sweep) share of the scores that are inverted for the noisy strategies")
    large: str = flag("", "(sweep) folder of a larger model to compare with")
    json: str = flag("runs/test-time.jsonl", "(sweep, report) file of the rows; speed writes its own beside it")


def writable_folder(model: str) -> Path:
    """Return --model as a folder to write into. Unlike folders that are only read, it is not looked for beside the
    scripts. Raises UserError.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").exists():
        raise UserError(f"--model {model}: no policy in this folder, and this command writes into the policy's folder")
    return folder
