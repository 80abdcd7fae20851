"""How far to draft, chosen anew from what was measured. Nothing in this file can change a token, only the time it
takes.

Before a round a strategy sees the running sequences and answers with a DraftPlan (method of drafting, draft length k);
after it, it gets a RoundReport. (Together with the CUDA graphs, this is the paper's adaptive rollout manager.)

Goodput, the default (after SmartSpec / TurboSpec, arXiv 2406.14066), chooses the plan with the most tokens per second:

    E    = 1 + sum_{j<=k} prod_{i<=j} c_i                   tokens of a sequence in a round        AcceptanceEstimate
    t    = w . [1, B, k, B k, B kv_len] * r(bucket, plan)   seconds of a round of B sequences      RoundTimeEstimate
    plan = argmax E / t                                     and now and then another one           Goodput

    c_i   share of accepted draft tokens at depth i among those that were reached: discounted counts, forgotten where a
          drafter has changed; depths not reached lately count as good as the one before
    w     least squares of the relative error, discounted; for each bucket of batch sizes, where measurements of other
          buckets count less
    r     what w leaves unexplained, by bucket of batch sizes and plan

k = 0 is an ordinary plan (E = 1), so the batch size at which speculation pays is measured on each machine, not
configured. The method in use is measured all the time. Each of the others is tried again, with its best plan, as often
as half a percent of the time pays for.

BegMab, the paper's method (bucketed epsilon-greedy multi-armed bandit, arXiv 2511.16665): for each bucket of batch
sizes the plan with the best median of its last rewards (tokens per second), with probability epsilon another one.
Nothing is shared between plans or buckets, so each plan has to be tried in each bucket.
"""

import random
from collections import defaultdict, deque
from collections.abc import Iterable
from statistics import median, median_low

import numpy as np

from parts.cli import UserError
from parts.engine.interfaces import MAX_DRAFT_LEN, DraftPlan, RoundReport, Sequence, Strategy
from parts.running.timers import WorkerTimer

LENGTHS = {"eagle": (1, 2, 3, 4, 6, 8, 12), "ngram": (2, 4)}  # draft lengths to choose from, by method


def plans_for(methods: Iterable[str]) -> list[DraftPlan]:
    """Return plain decoding, and the plans of these methods."""
    return [DraftPlan()] + [DraftPlan(method, k) for method in methods for k in LENGTHS[method]]


def batch_bucket(batch_size: int) -> int:
    """Return the bucket of a batch size: 1, 2-3, 4-7, 8-15, ..."""
    return batch_size.bit_length()


# ---------------------------------------------------------------- goodput


class AcceptanceEstimate:
    """How well the draft tokens of one method are accepted, by depth: c_i above."""

    KEEP = 0.98  # of the counts, per round

    def __init__(self, longest: int):
        """longest: the largest draft length."""
        self.drafted = np.zeros(longest)  # draft tokens reached, by depth
        self.accepted = np.zeros(longest)

    def forget(self) -> None:
        """The drafter has changed. Not knowing is optimistic, so it will be tried."""
        self.drafted[:] = 0.0
        self.accepted[:] = 0.0

    def add(self, k: int, reports: list[RoundReport]) -> None:
        """Learn from rounds with draft length k."""
        for total, counts in (
            (self.drafted, [report.drafted for report in reports]),
            (self.accepted, [report.accepted for report in reports]),
        ):
            total *= self.KEEP ** len(reports)
            total[:k] += np.sum(counts, 0)

    @property
    def known(self) -> bool:
        """Return whether there are counts to rely on."""
        return self.drafted[0] >= 1

    def tokens_per_round(self, k: int) -> float:
        """Return E: the tokens that a sequence emits in a round with draft length k."""
        total = 1.0
        chance = 1.0
        c = 0.8
        for drafted, accepted in zip(self.drafted[:k].tolist(), self.accepted[:k].tolist()):
            c = (accepted + c) / (drafted + 1)  # one more draft token, as good as those at the depth before
            chance *= c
            total += chance
        return total


class RoundTimeEstimate:
    """How long a round takes: t above, for the plans of one method.

    A round has to read the weights, and to compute B (k + 1) tokens; the longer of the two decides (the roofline), so t
    is not linear over all batch sizes. Each bucket has sums of its own, and those of other buckets count less, the
    farther away they are.
    """

    KEEP = 0.99  # of what is known of a bucket, per update
    NEIGHBOUR = 0.05  # how much a measurement one bucket away counts; two away, its square
    BUCKETS = 16

    def __init__(self):
        self.gram = np.zeros((self.BUCKETS, 5, 5))  # by bucket: sum of x x' / t^2
        self.aim = np.zeros((self.BUCKETS, 5))  # sum of x / t
        self.weights: dict[int, np.ndarray] = {}  # w, by bucket, of what was known when it was last needed
        self.ridge = 0.0
        self.residual: dict[tuple[int, DraftPlan], float] = {}  # r: measured / predicted
        self.rounds = 0  # that were seen
        self.tried: set[tuple[int, DraftPlan]] = set()  # bucket and plan

    @staticmethod
    def features(k: int, batch_size: float, kv_len: int) -> np.ndarray:
        """Return x: what the seconds of a round depend on, all of the order of 1."""
        return np.array([1.0, batch_size / 16, k / 4, batch_size * k / 64, batch_size * kv_len / 4096])

    def add(self, plan: DraftPlan, batch_size: float, kv_len: int, bucket: int, seconds: list[float]) -> None:
        """Learn from rounds with this plan. bucket: of their batch size."""
        if not seconds:
            return
        self.rounds += len(seconds)
        self.tried.add((bucket, plan))
        t = median_low(seconds)  # a hiccup is one round of many
        x = self.features(plan.k, batch_size, kv_len)
        self.gram[bucket] = self.KEEP * self.gram[bucket] + np.outer(x, x) / t**2
        self.aim[bucket] = self.KEEP * self.aim[bucket] + x / t
        self.ridge = 1e-3 / t**2  # a little
        self.weights.clear()
        error = t / max(1e-5, self.weights_near(bucket) @ x)
        smoothed = self.residual.get((bucket, plan), 1.0) * 0.8 + error * 0.2
        self.residual[bucket, plan] = min(2.0, max(0.5, smoothed))

    def weights_near(self, bucket: int) -> np.ndarray:
        """Return w as it is for batch sizes of this bucket."""
        if bucket not in self.weights:
            counts = self.NEIGHBOUR ** np.abs(np.arange(self.BUCKETS) - bucket)
            gram = np.tensordot(counts, self.gram, 1) + self.ridge * np.eye(5)
            self.weights[bucket] = np.linalg.solve(gram, counts @ self.aim)
        return self.weights[bucket]

    def seconds(self, plan: DraftPlan, batch_size: int, kv_len: int, bucket: int) -> float:
        """Return t: the predicted seconds of a round."""
        predicted = self.weights_near(bucket) @ self.features(plan.k, batch_size, kv_len)
        return max(1e-5, predicted * self.residual.get((bucket, plan), 1.0))


class Goodput(Strategy):
    """Chooses the plan with the most tokens per second, and decides when to try another one.

    A decision is made when the batch size changes its bucket, else every HOLD rounds: a decision takes 0.1 ms, a round
    of one sequence 1 ms.
    """

    PROBES = 0.005  # share of the time that goes into trying each other method
    HOLD = 8  # rounds with one plan
    TRIAL = 2  # rounds of a first try, or of a probe
    LONGEST_TRIAL = 5  # as long as it has no time: on a GPU the first two rounds of a shape are slower than the rest

    def __init__(self, plans: list[DraftPlan]):
        super().__init__(plans[0])  # self.plan: the one in use
        longest = max(plan.k for plan in plans)
        self.plans: dict[str, list[DraftPlan]] = {}  # by method
        for plan in plans:
            self.plans.setdefault(plan.method, []).append(plan)
        self.acceptance = {method: AcceptanceEstimate(longest) for method in self.plans}
        self.times = {method: RoundTimeEstimate() for method in self.plans}
        self.credit = dict.fromkeys(self.plans, 0.0)  # seconds to spend on trying a method
        self.method_changed = False
        self.bucket = 0
        self.kv_len = 0
        self.rounds_left = 0
        self.reports: list[RoundReport] = []  # of the rounds since the last decision

    def drafters_changed(self, methods):
        for method in methods:
            if method in self.plans:
                self.acceptance[method].forget()

    def choose(self, running: list[Sequence]) -> DraftPlan:
        bucket = batch_bucket(len(running))
        if not self.rounds_left and 0 < len(self.reports) < self.LONGEST_TRIAL and not self.timed_rounds():
            self.rounds_left = 1
        if not self.rounds_left or bucket != self.bucket:
            if self.reports:
                self.learn()
            self.bucket = bucket
            self.kv_len = max(sequence.length for sequence in running)
            self.rounds_left = self.HOLD
            before = self.plan
            self.plan = self.decide(len(running))
            self.method_changed = self.plan.method != before.method
        self.rounds_left -= 1
        return self.plan

    def observe(self, report: RoundReport) -> None:
        self.reports.append(report)

    def learn(self) -> None:
        """Learn from the rounds with the plan in use."""
        plan = self.plan
        reports = self.reports
        self.acceptance[plan.method].add(plan.k, reports)
        for method in self.plans:
            self.credit[method] += self.PROBES * sum(report.seconds for report in reports)
        batch_size = sum(report.batch_size for report in reports) / len(reports)
        self.times[plan.method].add(plan, batch_size, self.kv_len, self.bucket, self.timed_rounds())
        self.reports = []

    def timed_rounds(self) -> list[float]:
        """Return the seconds of the rounds since the last decision that tell what this plan costs."""
        timed = self.reports[1:] if self.method_changed else self.reports  # in the first, the drafter catches up
        return [report.seconds for report in timed if not report.warmup]

    def decide(self, batch_size: int) -> DraftPlan:
        """Return the plan for the next rounds, and set how many they are."""
        self.rounds_left = self.TRIAL
        untried = self.untried_plan()
        if untried:
            return untried
        goodput = {plan: self.goodput(plan, batch_size) for plans in self.plans.values() for plan in plans}
        best = max(goodput, key=goodput.get)
        probe = self.affordable_probe(best, goodput)
        if probe:
            return probe
        if not best.k or self.acceptance[best.method].known:  # else its acceptance is unknown, and two rounds will tell
            self.rounds_left = self.HOLD
        return best

    def untried_plan(self) -> DraftPlan | None:
        """Return a plan of a method that was never measured: its shortest, then one from the middle; after these, the
        time of all its plans can be predicted.
        """
        for method, plans in self.plans.items():
            rounds = self.times[method].rounds
            if rounds < self.TRIAL:
                return plans[0]
            if rounds < self.TRIAL * min(2, len(plans)):
                return plans[len(plans) // 2]
        return None

    def affordable_probe(self, best: DraftPlan, goodput: dict[DraftPlan, float]) -> DraftPlan | None:
        """Return the best plan of another method if its credit pays for the seconds that trying it costs."""
        for method, plans in self.plans.items():
            plan = max(plans, key=goodput.get)
            tokens = self.TRIAL * self.acceptance[method].tokens_per_round(plan.k)
            loss = tokens * (1 / goodput[plan] - 1 / goodput[best])
            if method != best.method and loss < self.credit[method]:
                self.credit[method] -= loss
                return plan
        return None

    def goodput(self, plan: DraftPlan, batch_size: int) -> float:
        """Return E / t."""
        tokens = self.acceptance[plan.method].tokens_per_round(plan.k)
        return tokens / self.times[plan.method].seconds(plan, batch_size, self.kv_len, self.bucket)


# ---------------------------------------------------------------- the paper's method


class BegMab(Strategy):
    """The bucketed epsilon-greedy bandit."""

    def __init__(self, plans: list[DraftPlan], epsilon: float = 0.1, window: int = 20, seed: int = 0):
        super().__init__(plans[0])
        self.plans = plans
        self.epsilon = epsilon
        self.window = window
        self.rng = random.Random(seed)
        # bucket -> plan -> its last rewards
        self.rewards: dict[int, dict[DraftPlan, deque]] = defaultdict(self.no_rewards)

    def no_rewards(self) -> dict[DraftPlan, deque]:
        """Return what is known of a new bucket."""
        return {plan: deque(maxlen=self.window) for plan in self.plans}

    def choose(self, running: list[Sequence]) -> DraftPlan:
        rewards = self.rewards[batch_bucket(len(running))]
        untried = [plan for plan in self.plans if not rewards[plan]]
        if untried or self.rng.random() < self.epsilon:
            return self.rng.choice(untried or self.plans)
        return max(self.plans, key=lambda plan: median(rewards[plan]))

    def observe(self, report: RoundReport) -> None:
        if report.warmup:
            return
        reward = (report.batch_size + sum(report.accepted)) / report.seconds
        self.rewards[batch_bucket(report.batch_size)][report.plan].append(reward)


# ---------------------------------------------------------------- watching, choosing by name


class CountingStrategy(Strategy):
    """Passes on the choices of another strategy, sets the timer's state (plain or speculative), and counts how many
    draft tokens of the EAGLE drafter are accepted.
    """

    def __init__(self, inner: Strategy, timer: WorkerTimer):
        super().__init__()
        self.inner = inner
        self.timer = timer
        self.drafted = [0] * MAX_DRAFT_LEN  # by depth
        self.accepted = [0] * MAX_DRAFT_LEN

    def reset_counts(self) -> None:
        """Start to count anew."""
        self.drafted = [0] * MAX_DRAFT_LEN
        self.accepted = [0] * MAX_DRAFT_LEN

    def drafters_changed(self, methods):
        self.inner.drafters_changed(methods)

    def choose(self, running: list[Sequence]) -> DraftPlan:
        plan = self.inner.choose(running)
        self.timer.enter("speculative" if plan.k else "rollout", len(running))
        return plan

    def observe(self, report: RoundReport) -> None:
        if report.plan.method == "eagle":
            for depth, (drafted, accepted) in enumerate(zip(report.drafted, report.accepted)):
                self.drafted[depth] += drafted
                self.accepted[depth] += accepted
        self.inner.observe(report)


def make_strategy(name: str, methods: list[str]) -> Strategy:
    """Return the strategy of that name: off, goodput, beg-mab, or a draft length. methods: of the drafters at hand.
    Raises UserError.
    """
    named = {
        "off": Strategy,
        "goodput": lambda: Goodput(plans_for(methods)),
        "beg-mab": lambda: BegMab(plans_for(methods)),
    }
    length = int(name) if name.isdecimal() else -1
    if name not in named and not 0 <= length <= MAX_DRAFT_LEN:
        choices = f"{', '.join(named)}, or a draft length such as 4, at most {MAX_DRAFT_LEN}"
        raise UserError(f"--strategy {name}: {choices}")
    if not methods or name == "0":
        return Strategy()
    return named[name]() if name in named else Strategy(DraftPlan(methods[0], length))
