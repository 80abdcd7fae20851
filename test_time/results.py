"""The rows of a sweep as arrays over the questions, always in the same order."""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.cli import UserError
from test_time.optimal import BINS, Optimal, PerStrategy, compute_optimal, interval, matched_samples, quintiles


class Key(NamedTuple):
    """A strategy, with a way to pick the answer."""

    search: str
    n: int
    pick: str


GREEDY = Key("greedy", 1, "majority")
PROBE = Key("probe", 1, "weighted")
ORACLE = Key("oracle", 16, "weighted")
LARGE = Key("large greedy", 1, "majority")

# what a question's own strategy may be chosen from; the others are controls
CHOICES = ("greedy", "parallel", "beam", "lookahead", "dvts")
# attempts at a question: in these searches their number may differ from question to question
UNEVEN = ("beam", "lookahead", "dvts", "noisy beam")


class Matched(NamedTuple):
    """The small model with as many FLOPs as the large one."""

    version: str  # of the multiplier, see optimal.matched_samples
    ratio: float  # tokens inferred per token of training
    samples: float
    right: np.ndarray  # (Q,)


def read_rows(path) -> list[dict]:
    """The rows, sorted by question. Raises UserError."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; `python -m test_time sweep` writes it") from error
    rows = [json.loads(line) for line in lines]
    if not rows:
        raise UserError(f"--json {path}: holds no rows")
    return sorted(rows, key=lambda row: (row["prompt"], row["seed"]))


def mean_of_some(x: np.ndarray, where: np.ndarray) -> float:
    """The mean of x (Q,) where `where` (Q,) is true."""
    return x[where].mean()


class Results:
    """Arrays over Q rows of each strategy: a question with one seed.

    right[key] (Q,)            0 or 1
    attempts[key] (Q, N)       each attempt's own right; not of the UNEVEN searches
    cost[unit][key] (Q,)       unit: tokens or flops
    bins[difficulty] (Q,)      0 (easy) to 4: by predicted and by known difficulty
    easiness (Q,)              what the prediction is made from
    folds (Q,)                 0 or 1; all that is known of a question is in one fold
    question (Q,)              number of the question: seeds are further rows of it
    """

    def __init__(self, path):
        rows = read_rows(path)
        columns: dict[Key, list[dict]] = defaultdict(list)
        for row in rows:
            columns[Key(row["search"], row["n"], row["pick"])].append(row)
        self.settings = rows[0]
        self.weights: dict[str, int] = {row["search"]: row["weights"] for row in rows}
        self.right: dict[Key, np.ndarray] = {}
        self.attempts: dict[Key, np.ndarray] = {}
        self.cost: dict[str, dict[Key, np.ndarray]] = {"tokens": {}, "flops": {}}
        for key, column in columns.items():
            self.right[key] = np.array([row["right"] for row in column], float)
            if key.search not in UNEVEN:
                self.attempts[key] = np.array([row["attempts"] for row in column], float)
            self.cost["tokens"][key] = np.array([row["ledger"]["decode"] for row in column], float)
            self.cost["flops"][key] = np.array([row["flops"] for row in column], float)
        self.candidates = [key for key in columns if key.search in CHOICES and key.pick != "outcome"]
        probes = columns[PROBE]
        prompts = [row["prompt"] for row in probes]
        self.easiness = np.array([row["score"] for row in probes])
        self.bins = {
            "predicted": quintiles(self.easiness),
            "known": quintiles(self.attempts[ORACLE].mean(1)),
        }
        self.folds = np.array([zlib.crc32(prompt.encode()) % 2 for prompt in prompts])
        self.question = np.unique(prompts, return_inverse=True)[1]

    def interval(self, x: np.ndarray, where=slice(None)) -> float:
        """Half the 95 % interval of a mean over (some of) the rows, by question."""
        return interval(x[where], np.unique(self.question[where], return_inverse=True)[1])

    def by_bin(self, x: np.ndarray, of: Callable = mean_of_some) -> list[float]:
        """The mean of x (Q,), or another `of(x, where)`, in each fifth of known difficulty."""
        return [of(x, self.bins["known"] == b) for b in range(BINS)]

    def choices(self, unit: str) -> tuple[PerStrategy, PerStrategy]:
        """(right, cost) of what may be chosen from."""
        right = {key: self.right[key] for key in self.candidates}
        return right, {key: self.cost[unit][key] for key in self.candidates}

    def budgets(self, unit: str, count: int) -> np.ndarray:
        """From the cheapest strategy to the dearest, evenly on a logarithmic scale."""
        cost = self.cost[unit]
        highest = max(cost[key].mean() for key in self.candidates)
        return np.geomspace(cost[GREEDY].mean() * 1.01, highest * 1.01, count)

    def optimal(self, unit: str, budget: float, difficulty: str | None) -> Optimal | None:
        """compute_optimal by known or predicted difficulty; None: one strategy for all. What prediction costs is
        charged.
        """
        right, cost = self.choices(unit)
        bins = self.bins[difficulty] if difficulty else np.zeros(len(self.folds), int)
        look = self.cost[unit][PROBE] if difficulty == "predicted" else 0.0
        return compute_optimal(right, cost, bins, self.folds, budget, look, self.question)

    def matched(self) -> Iterator[Matched]:
        """The small model, compute-optimal by predicted difficulty, at the FLOPs of one sample of the large model."""
        times_larger = self.weights[LARGE.search] / self.weights["parallel"]
        one_sample = self.cost["flops"][Key("parallel", 1, "majority")].mean()
        for version, backward in (("v1", 3.0), ("ICLR", 1.5)):
            for ratio in (0.16, 0.79, 22.0):
                samples = matched_samples(times_larger, ratio, backward)
                small = self.optimal("flops", samples * one_sample, "predicted")
                if small:
                    yield Matched(version, ratio, samples, small.right)
