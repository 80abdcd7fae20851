"""The settings of `python -m test_time`, each a command-line flag."""

from dataclasses import dataclass
from pathlib import Path

from parts.cli import UserError, check_at_least, flag
from parts.engine.model_loading import ACTOR_DTYPES
from tasks import Task, make_task
from test_time.strategies import SEARCHES

COMMANDS = ["answer", "learn", "sweep", "speed", "report"]
AGGREGATES = ["last", "min", "product"]


@dataclass(frozen=True)
class Config:
    """The settings. In brackets: the commands that read them."""

    command: str = flag("answer", "what to do", choices=COMMANDS, positional=True)
    model: str = flag("base/chain", "folder of the policy, which also holds its verifiers, drafter and revise/")
    task: str = flag("chain", "chain, gsm8k, or countdown, countdown-3, countdown-hard (for language models)")
    data: str = flag("", "folder of the task's data, if it needs any")
    dtype: str = flag("auto", "of the policy's weights: auto is bfloat16 on a GPU, float32 on a CPU", ACTOR_DTYPES)
    max_new: int = flag(0, "tokens of an attempt, at most; 0: as many as the task says")
    slots: int = flag(256, "sequences that run at once; speed: 64")
    seed: int = flag(0, "seed of all sampling")
    prompt: str = flag("", "(answer) the question")
    strategy: str = flag("auto", "(answer) search strategy; auto: by predicted difficulty", choices=["auto", *SEARCHES])
    n: int = flag(16, "(answer) number of attempts N, unless --strategy is auto")
    budget: int = flag(1000, "(answer) mean tokens per question for auto; hard questions may get more")
    questions: int = flag(8000, "(learn) training questions")
    attempts: int = flag(1, "(learn) attempts at each question that the verifiers are trained on")
    continuations: int = flag(2, "(learn) samples from the end of each step, which label it")
    labelled: int = flag(0, "(learn) steps of each attempt that are labelled, beside its last; 0: all")
    held_out: int = flag(200, "(learn) questions that the verifiers are measured on")
    epochs: int = flag(12, "(learn) epochs of tuning the revision policy; 0: there will be none")
    lora_rank: int = flag(0, "(learn) tune adapters of this rank, for language models; 0: all weights")
    drafter_from: str = flag("", "(learn) folder of a drafter to start from; empty: the policy's, or random weights")
    drafter_seconds: float = flag(60.0, "(learn) training time of each drafter; 0: none")
    resume: bool = flag(False, "(learn, sweep) keep what is there of an interrupted run with the same settings")
    count: int = flag(1000, "(sweep, speed) held-out questions")
    most: int = flag(64, "(sweep, speed) strategies with more attempts at a question are left out")
    seeds: int = flag(1, "(sweep) repetitions with other samples")
    skip_steps: bool = flag(False, "(sweep) leave out beam, lookahead, DVTS and the noisy strategies")
    chunk: int = flag(100, "(sweep) questions in one part of the work")
    workers: int = flag(2, "(sweep) processes")
    aggregate: str = flag(
        "last", "(sweep, answer) score of an attempt, from its steps', to pick by", choices=AGGREGATES
    )
    verifier_noise: float = flag(0.2, "(sweep) share of scores that the noisy strategies get inverted; 0: none run")
    large: str = flag("", "(sweep) folder of a larger model to compare with")
    json: str = flag("runs/test-time.jsonl", "(sweep, report) file of the rows; speed writes its own beside it")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "slots", "n", "questions", "attempts", "continuations", "held_out")
        check_at_least(self, 1, "count", "seeds", "chunk", "workers")
        check_at_least(self, 0, "max_new", "labelled", "epochs", "lora_rank", "drafter_seconds", "verifier_noise")
        if self.verifier_noise > 1:
            raise UserError(f"--verifier-noise {self.verifier_noise}: must be a share, 0 to 1")
        if self.most not in (4, 8, 16, 32, 64):
            raise UserError(f"--most {self.most}: must be 4, 8, 16, 32 or 64")

    def make_task(self) -> Task:
        """Return the task, with --max-new as its limit. Raises UserError."""
        task = make_task(self.task, self.data)
        task.longest = self.max_new or task.longest
        return task


def writable_folder(model: str) -> Path:
    """Return --model as a folder to write into. Unlike folders that are only read, it is not looked for beside the
    scripts. Raises UserError.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").exists():
        raise UserError(f"--model {model}: no policy in this folder, and this command writes into the policy's folder")
    return folder
