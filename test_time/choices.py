"""choice.json: which strategy is best for which budget and predicted difficulty. `report` writes it, --strategy auto
reads it.

    aggregate   how an attempt's score comes from its steps, in the sweep that this is from
    edges       4 numbers: below edge b, an attempt's score says that the question is harder than the b-th fifth
    choices     budget in tokens -> for each fifth (search, N, pick)
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.cli import UserError
from parts.files import write_atomically
from test_time.optimal import BINS, allocate
from test_time.results import GREEDY, Key, Results

FILE = "choice.json"


class Choices(NamedTuple):
    """The file's contents."""

    aggregate: str
    edges: list[float]
    by_budget: dict[str, list[Key]]  # budget, as written there -> a Key for each difficulty

    def difficulty(self, easiness: float) -> int:
        """0 (easiest) to 4, of a question whose probe has that score."""
        return sum(easiness < edge for edge in self.edges)

    def best(self, difficulty: int, budget: float) -> Key:
        """For the largest budget in the file that is not above this one; if there is none, for the smallest."""
        budgets = [float(b) for b in self.by_budget]
        affordable = [b for b in budgets if b <= budget]
        return self.by_budget[str(max(affordable, default=min(budgets)))][difficulty]


def write_choices(results: Results, folder: Path) -> None:
    """From all rows of a sweep. Raises UserError."""
    right, cost = results.choices("tokens")
    bins = results.bins["predicted"]
    all_rows = np.ones(len(bins), bool)
    table = {}
    for budget in results.budgets("tokens", 12):
        by_bin = allocate(right, cost, all_rows, bins, budget) or {}
        table[float(budget)] = [by_bin.get(b, GREEDY) for b in range(BINS)]
    edges = [float(results.easiness[bins == b].min()) for b in range(BINS - 1)]
    contents = {"aggregate": results.settings["aggregate"], "edges": edges, "choices": table}
    write_atomically(folder / FILE, json.dumps(contents))


def read_choices(folder: Path) -> Choices:
    """Raises UserError if there are none."""
    path = folder / FILE
    if not path.exists():
        raise UserError(
            f"--strategy auto: no {path}; `python -m test_time sweep` and `report` find out what is best when"
        )
    contents = json.loads(path.read_text())
    by_budget = {}
    for budget, keys in contents["choices"].items():
        by_budget[budget] = [Key(*key) for key in keys]
    return Choices(contents["aggregate"], contents["edges"], by_budget)
