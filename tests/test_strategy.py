"""Strategies on simulated machines: the time that they need, against the least time that is possible; and what the
engine reports to them.
"""

import random
from collections import defaultdict

import pytest
from conftest import caught, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter import Drafter, EagleProposer
from parts.cli import UserError
from parts.engine.interfaces import DraftPlan, Group, RoundReport, Strategy
from parts.engine.sampling import Sampling, sequence_seed
from rollout import Engine
from strategy import BegMab, Goodput, RoundTimeEstimate, batch_bucket, make_strategy, plans_for

METHODS = ["eagle", "ngram"]


class FakeSequence:
    """What strategies read of a running sequence."""

    length = 100


class Machine:
    """A simulated machine. A round takes start + per_sequence B + per_draft k + per_verified B k milliseconds, with 3 %
    noise; draft tokens of a method are accepted with a fixed chance.
    """

    def __init__(self, start, per_sequence, per_draft, per_verified, chance: dict[str, float], seed: int = 0):
        self.start = start
        self.per_sequence = per_sequence
        self.per_draft = per_draft
        self.per_verified = per_verified
        self.chance = chance
        self.rng = random.Random(seed)

    def seconds(self, batch_size: int, k: int) -> float:
        """Return the mean time of a round."""
        drafting = self.per_draft * k + self.per_verified * batch_size * k
        return (self.start + self.per_sequence * batch_size + drafting) / 1e3

    def expected(self, plan: DraftPlan) -> float:
        """Return the mean number of tokens per sequence and round."""
        c = self.chance.get(plan.method, 0.0)
        return sum(c**j for j in range(plan.k + 1))

    def best(self, batch_size: int) -> float:
        """Return the seconds per token and sequence of the best plan, which no strategy can beat."""
        return min(self.seconds(batch_size, plan.k) / self.expected(plan) for plan in plans_for(METHODS))

    def accepted(self, plan: DraftPlan) -> int:
        """Return how many draft tokens of a sequence are accepted in one round."""
        n = 0
        while n < plan.k and self.rng.random() < self.chance.get(plan.method, 0.0):
            n += 1
        return n

    def report(self, strategy: Strategy, report: RoundReport) -> None:
        """Give the strategy the report of a round."""
        strategy.observe(report)

    def play(self, strategy: Strategy, batch_sizes: list[int]) -> tuple[float, float, float]:
        """Run rounds of these batch sizes -> the seconds that they took, and the seconds that the best plan and plain
        decoding would have taken for the same tokens.
        """
        spent = ideal = plain = 0.0
        for batch_size in batch_sizes:
            plan = strategy.choose([FakeSequence()] * batch_size)
            lengths = [self.accepted(plan) for _ in range(batch_size)]
            reached = [sum(n >= depth for n in lengths) for depth in range(plan.k + 1)]
            seconds = self.seconds(batch_size, plan.k) * self.rng.uniform(0.97, 1.03)
            self.report(strategy, RoundReport(batch_size, plan, seconds, reached[:-1], reached[1:]))
            tokens = (batch_size + sum(lengths)) / batch_size
            spent += seconds
            ideal += tokens * self.best(batch_size)
            plain += tokens * self.seconds(batch_size, 0)
        return spent, ideal, plain


SHRINKING = [batch_size for batch_size in range(64, 0, -1) for _ in range(12)]
BATCH_SIZES = [64] * 400 + SHRINKING + [1] * 600
LIKE_BASE = Machine(1.3, 0.17, 0.2, 0.09, {"eagle": 0.87, "ngram": 0.3})


def check_near_the_best(strategy: Strategy, machine: Machine, limit: float):
    """The strategy takes at most `limit` times the least possible time."""
    spent, ideal, _ = machine.play(strategy, BATCH_SIZES)
    assert spent < ideal * limit


def test_goodput_is_near_the_best_and_fixed_plans_are_not():
    check_near_the_best(Goodput(plans_for(METHODS)), LIKE_BASE, 1.05)
    for name in ("off", "1", "8"):
        caught(check_near_the_best, make_strategy(name, ["eagle"]), LIKE_BASE, 1.05)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.5, 5), st.floats(0.01, 0.4), st.floats(0.02, 0.5), st.floats(0.0, 1.0), st.floats(0.3, 0.97))
def test_goodput_is_near_the_best_on_any_machine(start, per_sequence, per_draft, share, chance):
    """share: the cost of verifying one more token of a sequence, as a share of the cost of the sequence itself."""
    machine = Machine(start, per_sequence, per_draft, per_sequence * share, {"eagle": chance, "ngram": 0.2})
    check_near_the_best(Goodput(plans_for(METHODS)), machine, 1.06)


class Roofline(Machine):
    """A round reads the weights once and computes B (k + 1) tokens; the longer of the two decides. So a draft token
    costs a language model on a CPU nothing with one sequence, and much with 16.
    """

    def seconds(self, batch_size, k):
        round_ms = max(self.start, self.per_sequence * batch_size * (k + 1))
        return (round_ms + self.per_draft * k + self.per_verified * batch_size * k) / 1e3


SMALL_SHRINKING = [batch_size for batch_size in range(15, 2, -1) for _ in range(6)]
ROLLOUT = [16] * 40 + SMALL_SHRINKING + [2] * 60 + [1] * 80


def check_near_the_best_under_a_roofline():
    """In five rollouts after the first, of 16 sequences that end one by one."""
    for chance in (0.65, 0.8):
        machine = Roofline(40, 6.5, 1.7, 0.15, {"eagle": chance})
        strategy = Goodput(plans_for(["eagle"]))
        machine.play(strategy, ROLLOUT)
        spent = ideal = 0.0
        for _ in range(5):
            strategy.drafters_changed(["eagle"])
            played = machine.play(strategy, ROLLOUT)
            spent += played[0]
            ideal += played[1]
        assert spent < ideal * 1.08


def test_the_time_of_a_round_is_learned_for_each_range_of_batch_sizes(monkeypatch):
    """One linear model for all of them believes that drafts are dear with one sequence, too, and never tries them."""
    check_near_the_best_under_a_roofline()
    monkeypatch.setattr(RoundTimeEstimate, "NEIGHBOUR", 1.0)
    caught(check_near_the_best_under_a_roofline)


def check_no_slower_than_plain(strategy: Strategy):
    """In the second rollout with a useless drafter the strategy loses less than two percent to plain decoding."""
    machine = Machine(1.0, 0.2, 0.3, 0.2, {"eagle": 0.02})
    machine.play(strategy, BATCH_SIZES)  # in the first rollout it learns that
    strategy.drafters_changed(["eagle"])
    spent, _, plain = machine.play(strategy, BATCH_SIZES)
    assert spent < plain * 1.02


def test_a_useless_drafter_costs_less_than_two_percent():
    check_no_slower_than_plain(Goodput(plans_for(METHODS)))
    caught(check_no_slower_than_plain, BegMab(plans_for(METHODS)))


def check_notices_a_better_drafter(strategy: Strategy):
    """After the drafter has become good, the strategy is near the best again."""
    machine = Machine(1.3, 0.17, 0.2, 0.09, {"eagle": 0.02})
    machine.play(strategy, [32] * 500)
    machine.chance["eagle"] = 0.87
    strategy.drafters_changed(["eagle"])
    spent, ideal, _ = machine.play(strategy, [32] * 300)
    assert spent < ideal * 1.1


class NeverLearnsAgain(Goodput):
    """Keeps its estimates when the drafter changes, and never probes."""

    PROBES = 0.0

    def drafters_changed(self, methods):
        pass


def test_goodput_notices_that_the_drafter_is_better():
    check_notices_a_better_drafter(Goodput(plans_for(["eagle"])))
    caught(check_notices_a_better_drafter, NeverLearnsAgain(plans_for(["eagle"])))


def test_the_bandit_chooses_for_each_bucket_of_batch_sizes():
    bandit = BegMab(plans_for(["eagle"]), epsilon=0.0)
    machine = Machine(1.0, 0.1, 0.05, 0.2, {"eagle": 0.8})
    machine.play(bandit, [1] * 100 + [64] * 100)
    assert bandit.choose([FakeSequence()]).k > bandit.choose([FakeSequence()] * 64).k


class RecordingMachine(Machine):
    """Records CUDA graphs: the first two rounds of a shape take 20 and 60 ms more. `play` does not count these."""

    def __init__(self, *args, reports_warmup: bool):
        super().__init__(*args)
        self.reports_warmup = reports_warmup
        self.seen: dict[tuple, int] = defaultdict(int)
        self.rounds = 0

    def report(self, strategy, report):
        self.rounds += 1
        shape = (report.plan, batch_bucket(report.batch_size), self.rounds // 60)  # kv_len grows
        extra = (0.02, 0.06)[self.seen[shape]] if self.seen[shape] < 2 else 0.0
        self.seen[shape] += 1
        strategy.observe(report._replace(seconds=report.seconds + extra, warmup=self.reports_warmup and extra > 0))


def check_ignores_warmup_rounds(strategy: Strategy, times: tuple, chance: float, reports_warmup: bool):
    """On a machine whose first rounds of a shape are slow, the strategy is near the best."""
    machine = RecordingMachine(*times, {"eagle": chance, "ngram": 0.3}, reports_warmup=reports_warmup)
    check_near_the_best(strategy, machine, 1.1)


@pytest.mark.parametrize(
    ("strategy", "times", "chance"),
    [(Goodput, (1.0, 0.2, 0.3, 0.2), 0.3), (BegMab, (1.3, 0.17, 0.2, 0.09), 0.87)],
)
def test_strategies_do_not_learn_from_the_times_of_warmup_rounds(strategy, times, chance):
    check_ignores_warmup_rounds(strategy(plans_for(METHODS)), times, chance, True)
    caught(check_ignores_warmup_rounds, strategy(plans_for(METHODS)), times, chance, False)


def check_probes_are_timed() -> None:
    """On a machine that records each new shape, every decision to leave a plan has a time of it."""
    machine = RecordingMachine(1.0, 0.1, 0.2, 0.1, {"eagle": 0.8, "ngram": 0.3}, reports_warmup=True)
    strategy = Goodput(plans_for(METHODS))
    untimed = []
    right = RoundTimeEstimate.add

    def recorded(self, plan, batch_size, kv_len, bucket, seconds):
        untimed.append(not seconds)
        right(self, plan, batch_size, kv_len, bucket, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundTimeEstimate, "add", recorded)
        machine.play(strategy, [8] * 4000)
    assert sum(untimed) == 0, f"{sum(untimed)} of {len(untimed)} trials have no time"


def test_a_probe_lasts_until_its_time_is_known(monkeypatch):
    check_probes_are_timed()
    monkeypatch.setattr(Goodput, "LONGEST_TRIAL", Goodput.TRIAL)
    caught(check_probes_are_timed)


class ReportChecker(Strategy):
    """Drafts 0 to 3 tokens in turn, and checks the reports."""

    def __init__(self):
        super().__init__()
        self.rounds: list[tuple[int, int]] = []  # (batch size, accepted draft tokens) of each

    def choose(self, running):
        return DraftPlan("eagle", len(self.rounds) % 4)

    def observe(self, report):
        assert len(report.drafted) == len(report.accepted) == report.plan.k
        assert report.seconds > 0
        by_depth = zip(report.drafted, report.accepted)
        assert all(report.batch_size >= drafted >= accepted for drafted, accepted in by_depth)
        assert report.drafted[:1] in ([], [report.batch_size])
        self.rounds.append((report.batch_size, sum(report.accepted)))


def test_reports_agree_with_the_responses():
    rng = random.Random(1)
    groups = []
    for i in range(12):
        prompt = [rng.randrange(2, 118) for _ in range(rng.randint(1, 20))]
        groups.append(Group(i, prompt, [sequence_seed(0, i, k) for k in range(rng.randint(1, 4))]))
    model = tiny()
    engine = Engine(model, {1}, 10, 100, proposers={"eagle": EagleProposer(Drafter(model))})
    strategy = ReportChecker()
    responses = list(engine.generate(groups, Sampling(max_new=30), strategy))
    sampled = sum(batch_size + accepted for batch_size, accepted in strategy.rounds)  # some behind a stop token
    tokens = sum(len(r.tokens) for r in responses)
    assert engine.stats.rounds == len(strategy.rounds)
    assert tokens <= sampled <= 1.3 * tokens
    assert sum(engine.stats.accepted) == sum(accepted for _, accepted in strategy.rounds)


def test_strategies_are_made_by_name():
    assert make_strategy("0", ["eagle"]).choose([1]) == make_strategy("off", []).choose([1]) == DraftPlan()
    assert make_strategy("goodput", []).choose([1]) == DraftPlan()  # there is no drafter
    assert make_strategy("3", METHODS).choose([1]) == DraftPlan("eagle", 3)
    assert make_strategy("3", ["ngram"]).choose([1]).method == "ngram"
    for wrong in ("best", "-1", "1.5", "", "17"):
        with pytest.raises(UserError, match="goodput, beg-mab"):
            make_strategy(wrong, [])
