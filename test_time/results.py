"""The rows of a sweep as arrays over the questions, always in the same order; and choice.json, which strategy is best
for which budget and predicted difficulty: `report` writes it, --strategy auto reads it.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.cli import UserError
from parts.files import write_atomically
from test_time import optimal
from test_time.optimal import BINS, Optimal, PerStrategy


class Key(NamedTuple):
    """A strategy, with a way to pick the answer."""

    search: str
    n: int
    pick: str


GREEDY = Key("greedy", 1, "majority")
PROBE = Key("probe", 1, "weighted")
ORACLE = Key("oracle", 16, "weighted")
LARGE = Key("large greedy", 1, "majority")

COMPARED = 16  # attempts of the strategies that are compared at equal number; fewer with a smaller --most

# the strategies to choose from; the others are controls
CANDIDATES = ("greedy", "parallel", "beam", "lookahead", "dvts")


def read_rows(path) -> list[dict]:
    """Return the rows of a sweep. Raises UserError."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; `python -m test_time sweep` writes it") from error
    except ValueError as error:
        raise UserError(f"--json {path}: these are not the rows of a sweep") from error
    if not all(isinstance(row, dict) and {"prompt", "seed", "pick", "ledger"} <= set(row) for row in rows):
        raise UserError(f"--json {path}: these are not the rows of a sweep")
    return rows


def in_any_order(row: dict) -> tuple:
    """Return what rows are sorted by. Questions that are equally difficult are divided among the fifths in this order,
    which should say nothing about them.
    """
    return zlib.crc32(row["prompt"].encode()), row["prompt"], row["seed"]


class Results:
    """Arrays over Q rows of each strategy; a row is a question with one seed. Raises UserError.

    right[key] (Q,)            0 or 1
    cost[unit][key] (Q,)       unit: tokens or flops
    bins[difficulty] (Q,)      0 (easy) to 4: by predicted and by known difficulty
    easiness (Q,)              the score that the prediction is made from
    folds (Q,)                 0 or 1; all rows of a question are in one fold
    question (Q,)              index of the question: other seeds are further rows of it
    """

    def __init__(self, path):
        rows = read_rows(path)
        questions = {row["prompt"] for row in rows}
        if len(questions) < BINS:
            raise UserError(f"--json {path}: {len(questions)} questions, too few to divide them into {BINS} parts")
        self.columns: dict[Key, list[dict]] = defaultdict(list)  # the rows of each strategy, by question
        for row in sorted(rows, key=in_any_order):
            self.columns[Key(row["search"], row["n"], row["pick"])].append(row)
        self.left_out = self.remove_unfinished()
        for key in (PROBE, ORACLE, GREEDY, Key("parallel", 1, "majority")):
            if key not in self.columns:
                raise UserError(f"--json {path}: {key.search} is not finished; `sweep --resume` goes on with it")
        self.right: dict[Key, np.ndarray] = {}
        self.cost: dict[str, dict[Key, np.ndarray]] = {"tokens": {}, "flops": {}}
        for key, column in self.columns.items():
            self.right[key] = np.array([row["right"] for row in column], float)
            self.cost["tokens"][key] = np.array([row["ledger"]["decode"] for row in column], float)
            self.cost["flops"][key] = np.array([row["flops"] for row in column], float)
        probes = self.columns[PROBE]
        self.settings = probes[0]
        # the number of attempts of the strategies that are compared at equal number
        self.compared = max(key.n for key in self.columns if key.search == "parallel" and key.n <= COMPARED)
        self.has_steps = Key("beam", self.compared, "weighted") in self.columns
        self.has_noise = Key("noisy beam", self.compared, "weighted") in self.columns
        self.has_revisions = Key("refit parallel", self.compared, "majority") in self.columns  # the last of them
        self.times_larger = 0.0  # how many times more weights the large model has; 0: there is none
        if LARGE in self.columns:
            self.times_larger = self.columns[LARGE][0]["weights"] / probes[0]["weights"]
        prompts = [row["prompt"] for row in probes]
        self.easiness = np.array([row["score"] for row in probes])
        known = self.attempts(ORACLE).mean(1)
        self.bins = {"predicted": optimal.quintiles(self.easiness), "known": optimal.quintiles(known)}
        self.folds = np.array([zlib.crc32(prompt.encode()) % 2 for prompt in prompts])
        if len(set(self.folds)) == 1:
            raise UserError(f"--json {path}: all questions fall into the same half; sweep more of them")
        self.question = np.unique(prompts, return_inverse=True)[1]

    def remove_unfinished(self) -> list[Key]:
        """Remove the columns that do not have a row of all questions -> their keys. There are some in the rows of an
        unfinished sweep, and where a sweep was resumed without some of its strategies.
        """
        found = [key for key, column in self.columns.items() if len(column) != len(self.columns[PROBE])]
        for key in found:
            del self.columns[key]
        return found

    def attempts(self, key: Key) -> np.ndarray:
        """Return 1 for each attempt that is right, (Q, N), of a strategy that always makes N attempts."""
        return np.array([row["attempts"] for row in self.columns[key]], float)

    def interval(self, x: np.ndarray, where=slice(None)) -> float:
        """Return half the 95 % interval of a mean over (some of) the rows, by question."""
        return optimal.interval(x[where], np.unique(self.question[where], return_inverse=True)[1])

    def by_bin(self, x: np.ndarray, of: Callable = lambda x, where: x[where].mean()) -> list[float]:
        """Return the mean of x (Q,), or another `of(x, where)`, in each fifth of known difficulty."""
        return [of(x, self.bins["known"] == b) for b in range(BINS)]

    def choices(self, unit: str) -> tuple[PerStrategy, PerStrategy]:
        """Return (right, cost) of the strategies to choose from."""
        keys = [key for key in self.right if key.search in CANDIDATES and key.pick != "outcome"]
        return {key: self.right[key] for key in keys}, {key: self.cost[unit][key] for key in keys}

    def budgets(self, unit: str, count: int = 12) -> np.ndarray:
        """Return budgets from the cheapest to the most expensive strategy, evenly spaced on a logarithmic scale."""
        cost = self.choices(unit)[1]
        return np.geomspace(cost[GREEDY].mean() * 1.01, max(c.mean() for c in cost.values()) * 1.01, count)

    def optimal(self, unit: str, budget: float, difficulty: str | None) -> Optimal | None:
        """Return the compute-optimal choice by known or predicted difficulty; None: one strategy for all questions.
        The prediction is paid for.
        """
        right, cost = self.choices(unit)
        bins = self.bins[difficulty] if difficulty else np.zeros(len(self.folds), int)
        probe_cost = self.cost[unit][PROBE] if difficulty == "predicted" else 0.0
        return optimal.compute_optimal(right, cost, bins, self.folds, budget, probe_cost, self.question)

    def savings(self) -> Iterator[tuple[float, float, tuple[float, float, float]]]:
        """Yield for each budget the accuracy of the compute-optimal choice by predicted difficulty, its tokens, and the
        tokens that best-of-N takes for the same accuracy: also for one that is lower, and higher, by half the 95 %
        interval; inf where best-of-N does not get there.

        With N samples, best-of-N picks by the sums of scores ("weighted") or by the largest score ("max"), whichever is
        right more often. Between two N it is interpolated, linearly in the logarithm of the tokens.
        """
        tokens = []
        rights = []
        for n in sorted({key.n for key in self.right if key.search == "parallel"}):
            keys = [Key("parallel", n, how) for how in ("max", "weighted")]
            tokens.append(self.cost["tokens"][keys[0]].mean())
            rights.append(max(self.right[key].mean() for key in keys))
        rising = np.append(True, rights[1:] > np.maximum.accumulate(rights)[:-1])  # more samples that gain nothing
        curve = np.array(rights)[rising], np.log(tokens)[rising]
        seen = set()  # several budgets may have the same choice
        for budget in self.budgets("tokens"):
            best = self.optimal("tokens", budget, "predicted")
            accuracy = best.right.mean() if best else 0.0
            if accuracy > curve[0][0] and accuracy not in seen:
                seen.add(accuracy)
                half = self.interval(best.right)
                needed = np.exp(np.interp([accuracy, accuracy - half, accuracy + half], *curve, right=np.inf))
                yield accuracy, best.cost.mean(), tuple(needed)

    def matched(self) -> Iterator[tuple[str, float, float, np.ndarray]]:
        """Yield the small model, compute-optimal by predicted difficulty, at the FLOPs of one sample of the large one:
        (version of the formula, tokens inferred per token of training, samples of the small model, right (Q,)).
        """
        one_sample = self.cost["flops"][Key("parallel", 1, "majority")].mean()
        for version, backward in (("v1", 3.0), ("ICLR", 1.5)):
            for ratio in (0.16, 0.79, 22.0):
                samples = optimal.matched_samples(self.times_larger, ratio, backward)
                small = self.optimal("flops", samples * one_sample, "predicted")
                if small:
                    yield version, ratio, samples, small.right


# ---------------------------------------------------------------- choice.json

CHOICE_FILE = "choice.json"


class Choices(NamedTuple):
    """The contents of choice.json."""

    aggregate: str  # how an attempt's score came from its steps' scores, in the sweep
    edges: list[float]  # 4: an attempt's score below edge b means that the question is harder than the b-th fifth
    choices: dict[str, list[Key]]  # budget in tokens, the probe attempt included -> a Key for each fifth
    max_new: int = 0  # limit of an attempt in the sweep; 0: the task's

    def difficulty(self, easiness: float) -> int:
        """Return 0 (easiest) to 4, for a question whose probe attempt has that score."""
        return sum(easiness < edge for edge in self.edges)

    def within(self, budget: float) -> list[Key]:
        """Return the choice for each fifth, of the largest budget in the file that is not above this one; else of the
        smallest. If all five are equal, no prediction is needed.
        """
        affordable = [b for b in self.choices if float(b) <= budget]
        listed = max(affordable, key=float) if affordable else min(self.choices, key=float)
        return [Key(*key) for key in self.choices[listed]]


def write_choices(results: Results, folder: Path) -> None:
    """Write choice.json, made from all rows of a sweep. Raises UserError."""
    right, cost = results.choices("tokens")
    bins = results.bins["predicted"]
    choices = {}
    everything = np.ones(len(bins), bool)
    probe_cost = results.cost["tokens"][PROBE]
    for budget in results.budgets("tokens"):
        found = optimal.choose(right, cost, bins, everything, budget, probe_cost, results.question)
        if found:
            choices[str(float(budget))] = [found[0][b] for b in range(BINS)]
    edges = [float(results.easiness[bins == b].min()) for b in range(BINS - 1)]
    contents = Choices(results.settings["aggregate"], edges, choices, results.settings["max_new"])
    write_atomically(folder / CHOICE_FILE, json.dumps(contents._asdict()))


def read_choices(folder: Path) -> Choices:
    """Return the contents of choice.json. Raises UserError if there is none."""
    path = folder / CHOICE_FILE
    if not path.exists():
        raise UserError(f"--strategy auto: there is no {path}; `python -m test_time sweep`, then `report` write it")
    return Choices(**json.loads(path.read_text()))
