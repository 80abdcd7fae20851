"""Where a worker's time goes. A worker is in exactly one state at any moment, so the seconds of all states sum to the
whole.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

STATES = {
    "rollout": ("#", "tab:blue"),
    "speculative": ("=", "tab:cyan"),
    "drafter": ("d", "tab:green"),
    "idle": (".", "0.85"),
    "reward": ("r", "tab:purple"),
    "update": ("u", "tab:orange"),
    "checkpoint": ("c", "tab:brown"),
}


LABELS = {"rollout": "plain rollout", "speculative": "speculative rollout", "drafter": "drafter training"}


ROLLOUT = ("rollout", "speculative", "reward")


class Span(NamedTuple):
    """A worker was in a state from start to end (seconds since 1970)."""

    state: str
    start: float
    end: float
    rows: int = 0  # responses that it was writing; 0: before the first round, or no rollout

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


class Clock:
    """Where a worker's time goes. It is in one state at any moment, so the states' seconds sum to the whole."""

    def __init__(self, tell: Callable[[str], None] | None = None):
        """tell(state) hears of each call of `enter`: a sign of life."""
        self.tell = tell
        self.spans: list[Span] = []
        self.state = "idle"
        self.rows = 0
        self.since = time.time()

    def enter(self, state: str, rows: int | None = None) -> None:
        """From now on the worker is in this state, with so many live rows; None: in a rollout as many as before."""
        if self.tell:
            self.tell(state)
        if rows is None:
            rows = self.rows if state in ROLLOUT else 0
        if (state, rows) != (self.state, self.rows):
            now = time.time()
            self.spans.append(Span(self.state, self.since, now, self.rows))
            self.state = state
            self.rows = rows
            self.since = now

    def take(self) -> list[Span]:
        """The spans since the last call."""
        now = time.time()
        spans = [*self.spans, Span(self.state, self.since, now, self.rows)]
        self.spans = []
        self.since = now
        return spans
