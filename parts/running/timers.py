"""Where a worker's time goes. A worker is in exactly one state at any moment, so the seconds of all states sum to the
whole.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

STATES = {  # state -> its character in the table, its colour in the pictures
    "rollout": ("#", "tab:blue"),
    "speculative": ("=", "tab:cyan"),
    "drafter": ("d", "tab:green"),
    "idle": (".", "0.85"),
    "reward": ("r", "tab:purple"),
    "update": ("u", "tab:orange"),
    "checkpoint": ("c", "tab:brown"),
}
LABELS = {"rollout": "plain rollout", "speculative": "speculative rollout", "drafter": "drafter training"}
ROLLOUT = ("rollout", "speculative", "reward")  # the states of a rollout


class Span(NamedTuple):
    """A worker was in a state from start to end (seconds since 1970)."""

    state: str
    start: float
    end: float
    rows: int = 0  # sequences that ran on it; 0: before the first round, or no rollout

    @property
    def seconds(self) -> float:
        """Return its length."""
        return self.end - self.start


class WorkerTimer:
    """Records the states of a worker."""

    def __init__(self, heartbeat: Callable[[str], None] | None = None):
        """heartbeat(state) is called by each `enter`, as a sign of life."""
        self.heartbeat = heartbeat
        self.spans: list[Span] = []
        self.state = "idle"
        self.rows = 0
        self.since = time.time()

    def enter(self, state: str, rows: int | None = None) -> None:
        """From now on the worker is in this state, with so many running sequences; None: in a rollout as many as
        before.
        """
        if self.heartbeat:
            self.heartbeat(state)
        if rows is None:
            rows = self.rows if state in ROLLOUT else 0
        if (state, rows) != (self.state, self.rows):
            now = time.time()
            self.spans.append(Span(self.state, self.since, now, self.rows))
            self.state = state
            self.rows = rows
            self.since = now

    def take_spans(self) -> list[Span]:
        """Return the spans since the last call."""
        now = time.time()
        spans = [*self.spans, Span(self.state, self.since, now, self.rows)]
        self.spans = []
        self.since = now
        return spans
