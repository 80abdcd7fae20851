"""How to draft, chosen anew from what was measured. Nothing in this file can change a token, only the time it takes.

A strategy is called with the live rows and answers with a Draft (kind of drafter, draft length k, tree width); after the round `observe` tells it what came
of that. Any function of the live rows is a strategy too.

Goodput, the default (after SmartSpec / TurboSpec, arXiv 2406.14066): the arm with the most tokens per second,

    E   = 1 + sum_{j<=k} prod_{i<=j} c_i                tokens a row emits; c_i: share of right guesses at depth i among those that were reached
    t   = w . [1, B, k, B k, B view] * r(bucket, arm)   seconds of a round of B rows that look at up to `view` cached tokens
    arm = argmax E / t

k = 0 is an ordinary arm (E = 1), so the batch size at which speculation pays is found out on each machine, not configured.
c: discounted counts, forgotten where a drafter has changed; depths not reached lately count as good as the one before.
w: least squares of the relative error, discounted; r: what it leaves unexplained.
The kind in use is measured all the time. Each of the others is tried again, with its best arm, as often as half a percent of the time pays for.

BEG-MAB, the paper's method (bucketed epsilon-greedy bandit, arXiv 2511.16665): for each bucket of batch sizes the arm with the best median of its last rewards
(tokens per second), with chance epsilon another one. Nothing is shared between arms or buckets, so each has to be tried in each.
"""

import random
from collections import defaultdict, deque
from statistics import median, median_low

import numpy as np

from rollout import Draft, Engine
from tasks import UserError


def arms(kinds):
    """Plain decoding and chains. No trees: a chain with siblings was slower than the chain at every batch size (`bench.py speculation`)."""
    return [Draft()] + [Draft(kind, k) for kind in kinds for k in ((1, 2, 3, 4, 6, 8, 12) if kind == "learned" else (2, 4))]


def bucket(rows):
    """Of the batch size: 1, 2-3, 4-7, 8-15, ..."""
    return rows.bit_length()


class Goodput:
    """See above. It decides when the batch size changes its bucket, else every HOLD rounds: a decision costs 0.1 ms, a round of one row 1 ms."""

    KEEP_RIGHT, KEEP_TIME, PROBES, HOLD, TRIAL = 0.98, 0.99, 0.005, 8, 2

    def __init__(self, arms):
        self.kinds = {arm.kind: [a for a in arms if a.kind == arm.kind] for arm in arms}
        longest = max(arm.k for arm in arms)
        self.tried, self.right = ({kind: np.zeros(longest) for kind in self.kinds} for _ in range(2))  # guesses by depth
        self.gram = {kind: np.zeros((5, 5)) for kind in self.kinds}  # sum of x x' / t^2
        self.aim = {kind: np.zeros(5) for kind in self.kinds}        # sum of x / t
        self.weights, self.rest = {}, {}                             # w; (bucket, arm) -> measured / predicted
        self.seen, self.credit = dict.fromkeys(self.kinds, 0), dict.fromkeys(self.kinds, 0.0)  # rounds with each kind; seconds to spend on trying it
        self.arm, self.changed, self.bucket, self.view, self.left = arms[0], False, 0, 0, 0
        self.heard = []  # of the rounds since the last decision

    def __call__(self, live):
        if not self.left or bucket(len(live)) != self.bucket:
            if self.heard:
                self.learn()
            self.bucket, self.view, self.left = bucket(len(live)), max(row.length for row in live), self.HOLD
            before, self.arm = self.arm, self.decide(len(live))
            self.changed = self.arm.kind != before.kind
        self.left -= 1
        return self.arm

    def begin(self, changed):
        """A rollout begins, and the drafters of these kinds are not what they were: forget how well they guess. Not knowing is optimism, so they are tried."""
        for kind in changed:
            self.tried[kind][:] = self.right[kind][:] = 0.0

    def observe(self, rows, arm, seconds, tried, right):
        """After a round of so many rows. tried, right: k numbers each, guesses by depth that were reached, and that were accepted."""
        self.heard.append((rows, seconds, tried, right))

    def learn(self):
        rows, seconds, tried, right = zip(*self.heard)
        arm, kind, n, self.heard = self.arm, self.arm.kind, len(rows), []
        for total, new in ((self.tried[kind], tried), (self.right[kind], right)):
            total *= self.KEEP_RIGHT ** n
            total[:arm.k] += np.sum(new, 0)
        for other in self.kinds:
            self.credit[other] += self.PROBES * sum(seconds)
        seconds = seconds[int(self.changed):]  # in the first round a drafter catches up with what it has missed
        if not seconds:
            return
        self.seen[kind] += len(seconds)
        x, t = self.features(arm, sum(rows) / n), median_low(seconds)  # median: a hiccup is one round of many
        self.gram[kind] = self.KEEP_TIME * self.gram[kind] + np.outer(x, x) / t**2
        self.aim[kind] = self.KEEP_TIME * self.aim[kind] + x / t
        self.weights[kind] = np.linalg.solve(self.gram[kind] + 1e-3 * np.eye(5) / t**2, self.aim[kind])  # a little ridge
        place, error = (self.bucket, arm), t / max(1e-5, self.weights[kind] @ x)
        self.rest[place] = min(2.0, max(0.5, self.rest.get(place, 1.0) * 0.8 + error * 0.2))

    def decide(self, rows):
        self.left = self.TRIAL
        for kind, mine in self.kinds.items():  # never seen: its shortest arm, then one from the middle, and t is known for all
            if self.seen[kind] < self.TRIAL * len(mine[:2]):
                return mine[0] if self.seen[kind] < self.TRIAL else mine[len(mine) // 2]
        rate = {arm: self.expected(arm) / self.seconds(arm, rows) for mine in self.kinds.values() for arm in mine}
        best = max(rate, key=rate.get)
        for kind in self.kinds:
            other = max(self.kinds[kind], key=rate.get)
            loss = self.TRIAL * self.expected(other) * (1 / rate[other] - 1 / rate[best])  # seconds that trying it costs
            if kind != best.kind and loss < self.credit[kind]:
                self.credit[kind] -= loss
                return other
        if not best.k or self.tried[best.kind][0] >= 1:  # else its guesses are unknown, and two rounds tell
            self.left = self.HOLD
        return best

    def expected(self, arm):
        """E: tokens per row and round."""
        total = chance = 1.0
        here = 0.8
        for tried, right in zip(self.tried[arm.kind][:arm.k].tolist(), self.right[arm.kind].tolist()):
            here = (right + here) / (tried + 1)  # one more guess, as good as those at the depth before
            chance *= here
            total += chance
        return total

    def features(self, arm, rows):
        return np.array([1.0, rows / 16, arm.k / 4, rows * arm.k / 64, rows * self.view / 4096])  # all of the order of 1

    def seconds(self, arm, rows):
        """t: of a round."""
        return max(1e-5, self.weights[arm.kind] @ self.features(arm, rows) * self.rest.get((self.bucket, arm), 1.0))


class Bandit:
    """BEG-MAB."""

    def __init__(self, arms, epsilon=0.1, window=20, seed=0):
        self.arms, self.epsilon, self.rng = arms, epsilon, random.Random(seed)
        self.rewards = defaultdict(lambda: {arm: deque(maxlen=window) for arm in arms})  # bucket -> arm -> its last rewards

    def __call__(self, live):
        mine = self.rewards[bucket(len(live))]
        untried = [arm for arm in self.arms if not mine[arm]]
        if untried or self.rng.random() < self.epsilon:
            return self.rng.choice(untried or self.arms)
        return max(self.arms, key=lambda arm: median(mine[arm]))

    def observe(self, rows, arm, seconds, tried, right):
        self.rewards[bucket(rows)][arm].append((rows + sum(right)) / seconds)


def make_strategy(name, kinds):
    """name: off, goodput, beg-mab, or a draft length; kinds: of the drafters at hand. -> a strategy"""
    if name == "goodput":
        return Goodput(arms(kinds))
    if name == "beg-mab":
        return Bandit(arms(kinds))
    if name != "off" and not (name.isdecimal() and int(name) <= Engine.LONGEST):
        raise UserError(f"--strategy {name}: off, goodput, beg-mab, or a draft length such as 4, at most {Engine.LONGEST}")
    draft = Draft(kinds[0], int(name)) if name != "off" and kinds and int(name) else Draft()
    return lambda live: draft
