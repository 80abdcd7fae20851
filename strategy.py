"""How far to draft, chosen anew from what was measured. Nothing in this file can change a token, only the time it
takes.

Before a round a strategy sees the live rows and answers with a Draft (kind of drafter, draft length k); after it, it
hears what came of that (interfaces.Strategy).

Goodput, the default (after SmartSpec / TurboSpec, arXiv 2406.14066): the arm with the most tokens per second,

    E   = 1 + sum_{j<=k} prod_{i<=j} c_i                tokens a row emits in a round
    t   = w . [1, B, k, B k, B view] * r(bucket, arm)   seconds of a round of B rows that look at `view` cached tokens
    arm = argmax E / t

    c_i   share of right guesses at depth i among those that were reached: discounted counts, forgotten where a drafter
          has changed; depths not reached lately count as good as the one before
    w     least squares of the relative error, discounted
    r     what it leaves unexplained, by bucket of batch sizes and arm

k = 0 is an ordinary arm (E = 1), so the batch size at which speculation pays is found out on each machine, not
configured. The kind in use is measured all the time. Each of the others is tried again, with its best arm, as often
as half a percent of the time pays for.

BEG-MAB, the paper's method (bucketed epsilon-greedy bandit, arXiv 2511.16665): for each bucket of batch sizes the arm
with the best median of its last rewards (tokens per second), with chance epsilon another one. Nothing is shared
between arms or buckets, so each has to be tried in each.
"""

import random
from collections import defaultdict, deque
from collections.abc import Iterable
from statistics import median, median_low

import numpy as np

from parts.cli import UserError
from parts.engine.interfaces import MAX_DRAFTS, Draft, RoundReport, Row, Strategy
from parts.running.timers import Clock

LENGTHS = {"learned": (1, 2, 3, 4, 6, 8, 12), "n-gram": (2, 4)}  # draft lengths to choose from


def arms(kinds: Iterable[str]) -> list[Draft]:
    """Plain decoding, and chains of these kinds of drafters."""
    return [Draft()] + [Draft(kind, k) for kind in kinds for k in LENGTHS[kind]]


def bucket(rows: int) -> int:
    """Of the batch size: 1, 2-3, 4-7, 8-15, ..."""
    return rows.bit_length()


class Goodput(Strategy):
    """See above. It decides when the batch size changes its bucket, else every HOLD rounds: a decision costs 0.1 ms, a
    round of one row 1 ms.
    """

    KEEP_RIGHT = 0.98  # of the counts of right guesses, per round
    KEEP_TIME = 0.99  # of what is known of seconds, per decision
    PROBES = 0.005  # share of the time that goes into trying each other kind
    HOLD = 8  # rounds with one arm
    TRIAL = 2  # rounds of a first try, or of a probe

    def __init__(self, arms: list[Draft]):
        super().__init__(arms[0])  # self.draft: the arm in use
        longest = max(arm.k for arm in arms)
        self.kinds: dict[str, list[Draft]] = {}
        for arm in arms:
            self.kinds.setdefault(arm.kind, []).append(arm)
        self.tried = {kind: np.zeros(longest) for kind in self.kinds}  # guesses by depth that were reached
        self.right = {kind: np.zeros(longest) for kind in self.kinds}  # and those that were accepted
        self.gram = {kind: np.zeros((5, 5)) for kind in self.kinds}  # sum of x x' / t^2
        self.aim = {kind: np.zeros(5) for kind in self.kinds}  # sum of x / t
        self.weights: dict[str, np.ndarray] = {}  # w
        self.rest: dict[tuple[int, Draft], float] = {}  # r: measured / predicted
        self.rounds_seen = dict.fromkeys(self.kinds, 0)
        self.credit = dict.fromkeys(self.kinds, 0.0)  # seconds to spend on trying a kind
        self.kind_changed = False
        self.bucket = 0
        self.view = 0
        self.rounds_left = 0
        self.reports: list[RoundReport] = []  # of the rounds since the last decision

    def begin(self, changed):
        """Forget how well these kinds guess. Not knowing is optimism, so they are tried."""
        for kind in changed:
            if kind in self.kinds:
                self.tried[kind][:] = 0.0
                self.right[kind][:] = 0.0

    def choose(self, live: list[Row]) -> Draft:
        if not self.rounds_left or bucket(len(live)) != self.bucket:
            if self.reports:
                self.learn()
            self.bucket = bucket(len(live))
            self.view = max(row.length for row in live)
            self.rounds_left = self.HOLD
            before = self.draft
            self.draft = self.decide(len(live))
            self.kind_changed = self.draft.kind != before.kind
        self.rounds_left -= 1
        return self.draft

    def observe(self, report: RoundReport) -> None:
        self.reports.append(report)

    def learn(self) -> None:
        """From the rounds with the arm in use."""
        arm = self.draft
        kind = arm.kind
        n = len(self.reports)
        for total, new in (
            (self.tried[kind], [report.tried for report in self.reports]),
            (self.right[kind], [report.right for report in self.reports]),
        ):
            total *= self.KEEP_RIGHT**n
            total[: arm.k] += np.sum(new, 0)
        rows = sum(report.rows for report in self.reports) / n
        for other in self.kinds:
            self.credit[other] += self.PROBES * sum(report.seconds for report in self.reports)
        if self.kind_changed:
            del self.reports[0]  # in the first round a drafter catches up with what it has missed
        seconds = [report.seconds for report in self.reports if not report.first]
        self.reports = []
        if seconds:
            self.rounds_seen[kind] += len(seconds)
            self.learn_time(arm, rows, median_low(seconds))  # median: a hiccup is one round of many

    def learn_time(self, arm: Draft, rows: float, t: float) -> None:
        """A round of so many rows has taken t seconds."""
        kind = arm.kind
        x = self.features(arm, rows)
        self.gram[kind] = self.KEEP_TIME * self.gram[kind] + np.outer(x, x) / t**2
        self.aim[kind] = self.KEEP_TIME * self.aim[kind] + x / t
        ridge = 1e-3 * np.eye(5) / t**2  # a little
        self.weights[kind] = np.linalg.solve(self.gram[kind] + ridge, self.aim[kind])
        place = (self.bucket, arm)
        error = t / max(1e-5, self.weights[kind] @ x)
        self.rest[place] = min(2.0, max(0.5, self.rest.get(place, 1.0) * 0.8 + error * 0.2))

    def decide(self, rows: int) -> Draft:
        """The arm for the next rounds."""
        self.rounds_left = self.TRIAL
        for kind, kind_arms in self.kinds.items():
            # never seen: its shortest arm, then one from the middle, and t is known for all
            if self.rounds_seen[kind] < self.TRIAL * len(kind_arms[:2]):
                return kind_arms[0] if self.rounds_seen[kind] < self.TRIAL else kind_arms[len(kind_arms) // 2]
        rate = {}
        for kind_arms in self.kinds.values():
            for arm in kind_arms:
                rate[arm] = self.expected(arm) / self.seconds(arm, rows)
        best = max(rate, key=rate.get)
        for kind, kind_arms in self.kinds.items():
            other = max(kind_arms, key=rate.get)
            # seconds that trying it costs
            loss = self.TRIAL * self.expected(other) * (1 / rate[other] - 1 / rate[best])
            if kind != best.kind and loss < self.credit[kind]:
                self.credit[kind] -= loss
                return other
        if not best.k or self.tried[best.kind][0] >= 1:  # else its guesses are unknown, and two rounds tell
            self.rounds_left = self.HOLD
        return best

    def expected(self, arm: Draft) -> float:
        """E: tokens per row and round."""
        total = 1.0
        chance = 1.0
        c = 0.8
        for tried, right in zip(self.tried[arm.kind][: arm.k].tolist(), self.right[arm.kind].tolist()):
            c = (right + c) / (tried + 1)  # one more guess, as good as those at the depth before
            chance *= c
            total += chance
        return total

    def features(self, arm: Draft, rows: float) -> np.ndarray:
        """x: what a round's seconds depend on, all of the order of 1."""
        return np.array([1.0, rows / 16, arm.k / 4, rows * arm.k / 64, rows * self.view / 4096])

    def seconds(self, arm: Draft, rows: int) -> float:
        """t: of a round."""
        predicted = self.weights[arm.kind] @ self.features(arm, rows)
        return max(1e-5, predicted * self.rest.get((self.bucket, arm), 1.0))


class Bandit(Strategy):
    """BEG-MAB."""

    def __init__(self, arms: list[Draft], epsilon: float = 0.1, window: int = 20, seed: int = 0):
        super().__init__(arms[0])
        self.arms = arms
        self.epsilon = epsilon
        self.window = window
        self.rng = random.Random(seed)
        self.rewards: dict[int, dict[Draft, deque]] = defaultdict(self.no_rewards)  # bucket -> arm -> its last rewards

    def no_rewards(self) -> dict[Draft, deque]:
        """What is known of a bucket at first."""
        return {arm: deque(maxlen=self.window) for arm in self.arms}

    def choose(self, live: list[Row]) -> Draft:
        rewards = self.rewards[bucket(len(live))]
        untried = [arm for arm in self.arms if not rewards[arm]]
        if untried or self.rng.random() < self.epsilon:
            return self.rng.choice(untried or self.arms)
        return max(self.arms, key=lambda arm: median(rewards[arm]))

    def observe(self, report: RoundReport) -> None:
        if report.first:
            return
        reward = (report.rows + sum(report.right)) / report.seconds
        self.rewards[bucket(report.rows)][report.draft].append(reward)


class Watched(Strategy):
    """Passes another strategy's choices on, tells the clock whether a round drafts, counts the learned drafter's
    guesses.
    """

    def __init__(self, inner: Strategy, clock: Clock):
        super().__init__()
        self.inner = inner
        self.clock = clock
        self.forget()

    def forget(self) -> None:
        """Start to count anew."""
        self.tried = [0] * MAX_DRAFTS  # by depth
        self.right = [0] * MAX_DRAFTS

    def begin(self, changed):
        self.inner.begin(changed)

    def choose(self, live: list[Row]) -> Draft:
        draft = self.inner.choose(live)
        self.clock.enter("speculative" if draft.k else "rollout", len(live))
        return draft

    def observe(self, report: RoundReport) -> None:
        if report.draft.kind == "learned":
            for depth, (tried, right) in enumerate(zip(report.tried, report.right)):
                self.tried[depth] += tried
                self.right[depth] += right
        self.inner.observe(report)


def make_strategy(name: str, kinds: list[str]) -> Strategy:
    """name: off, goodput, beg-mab, or a draft length; kinds: of the drafters at hand. Raises UserError."""
    length = int(name) if name.isdecimal() else -1
    if name not in ("off", "goodput", "beg-mab") and not 0 <= length <= MAX_DRAFTS:
        choices = f"off, goodput, beg-mab, or a draft length such as 4, at most {MAX_DRAFTS}"
        raise UserError(f"--strategy {name}: {choices}")
    if not kinds or name in ("off", "0"):
        return Strategy()
    if name == "goodput":
        return Goodput(arms(kinds))
    if name == "beg-mab":
        return Bandit(arms(kinds))
    return Strategy(Draft(kinds[0], length))
