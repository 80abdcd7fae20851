"""Strategies on simulated machines: the time they need, against the best that anyone could have done, and what the
engine tells them.
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
from strategy import BegMab, Goodput, batch_bucket, make_strategy, plans_for

KINDS = ["eagle", "ngram"]


class FakeRow:
    """All that strategies look at."""

    length = 100


class Machine:
    """Rounds that take start + row B + guess k + both B k milliseconds (each with 3 % noise), and drafters that are
    right with a chance for each kind.
    """

    def __init__(self, start: float, row: float, guess: float, both: float, right: dict[str, float], seed: int = 0):
        self.start = start
        self.row = row
        self.guess = guess
        self.both = both
        self.right = right
        self.rng = random.Random(seed)

    def seconds(self, rows: int, k: int) -> float:
        return (self.start + self.row * rows + self.guess * k + self.both * rows * k) / 1e3

    def expected(self, arm: DraftPlan) -> float:
        """Tokens per row and round."""
        c = self.right.get(arm.kind, 0.0)
        return sum(c**j for j in range(arm.k + 1))

    def best(self, rows: int) -> float:
        """Seconds per token and row of the best arm: nobody can do better."""
        return min(self.seconds(rows, arm.k) / self.expected(arm) for arm in plans_for(KINDS))

    def guesses(self, arm: DraftPlan) -> int:
        """How many guesses of a row are right."""
        n = 0
        while n < arm.k and self.rng.random() < self.right.get(arm.kind, 0.0):
            n += 1
        return n

    def tell(self, strategy: Strategy, report: RoundReport) -> None:
        """What came of a round."""
        strategy.observe(report)

    def play(self, strategy: Strategy, sizes: list[int]) -> tuple[float, float, float]:
        """-> (seconds needed, seconds that the best arm, or plain decoding, would have needed for the same tokens)."""
        spent = ideal = plain = 0.0
        for rows in sizes:
            arm = strategy.choose([FakeRow()] * rows)
            lengths = [self.guesses(arm) for _ in range(rows)]
            reached = [sum(n >= depth for n in lengths) for depth in range(arm.k + 1)]
            seconds = self.seconds(rows, arm.k) * self.rng.uniform(0.97, 1.03)
            self.tell(strategy, RoundReport(rows, arm, seconds, reached[:-1], reached[1:]))
            tokens = (rows + sum(lengths)) / rows
            spent += seconds
            ideal += tokens * self.best(rows)
            plain += tokens * self.seconds(rows, 0)
        return spent, ideal, plain


SHRINKING = [rows for rows in range(64, 0, -1) for _ in range(12)]
SIZES = [64] * 400 + SHRINKING + [1] * 600
LIKE_OURS = Machine(1.3, 0.17, 0.2, 0.09, {"eagle": 0.87, "ngram": 0.3})


def check_near_the_best(strategy: Strategy, machine: Machine, limit: float):
    spent, ideal, _ = machine.play(strategy, SIZES)
    assert spent < ideal * limit


def test_goodput_is_near_the_best_and_poor_lengths_are_not():
    check_near_the_best(Goodput(plans_for(KINDS)), LIKE_OURS, 1.05)
    for name in ("off", "1", "8"):
        caught(check_near_the_best, make_strategy(name, ["eagle"]), LIKE_OURS, 1.05)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.5, 5), st.floats(0.01, 0.4), st.floats(0.02, 0.5), st.floats(0.0, 1.0), st.floats(0.3, 0.97))
def test_goodput_is_near_the_best_on_any_machine(start, row, guess, share, right):
    """share: what verifying one more token of a row costs, as a share of what the row itself costs."""
    machine = Machine(start, row, guess, row * share, {"eagle": right, "ngram": 0.2})
    check_near_the_best(Goodput(plans_for(KINDS)), machine, 1.06)


def check_no_slower_than_plain(strategy: Strategy):
    machine = Machine(1.0, 0.2, 0.3, 0.2, {"eagle": 0.02})
    machine.play(strategy, SIZES)  # the first rollout finds out
    strategy.begin(["eagle"])
    spent, _, plain = machine.play(strategy, SIZES)
    assert spent < plain * 1.02


def test_a_useless_drafter_costs_less_than_two_percent():
    check_no_slower_than_plain(Goodput(plans_for(KINDS)))
    caught(check_no_slower_than_plain, BegMab(plans_for(KINDS)))


def check_notices_a_better_drafter(strategy: Strategy):
    machine = Machine(1.3, 0.17, 0.2, 0.09, {"eagle": 0.02})
    machine.play(strategy, [32] * 500)
    machine.right["eagle"] = 0.87
    strategy.begin(["eagle"])
    spent, ideal, _ = machine.play(strategy, [32] * 300)
    assert spent < ideal * 1.1


class Deaf(Goodput):
    """Keeps what it knew, and never tries again."""

    PROBES = 0.0

    def drafters_changed(self, methods):
        pass


def test_goodput_notices_that_the_drafter_has_learned():
    check_notices_a_better_drafter(Goodput(plans_for(["eagle"])))
    caught(check_notices_a_better_drafter, Deaf(plans_for(["eagle"])))


def test_the_bandit_knows_its_buckets():
    bandit = BegMab(plans_for(["eagle"]), epsilon=0.0)
    machine = Machine(1.0, 0.1, 0.05, 0.2, {"eagle": 0.8})
    machine.play(bandit, [1] * 100 + [64] * 100)
    assert bandit.choose([FakeRow()]).k > bandit.choose([FakeRow()] * 64).k


class Recording(Machine):
    """Rounds are recorded: the first two of a kind take 20 and 60 ms more. `play` does not count these."""

    says_so = True

    def __init__(self, *args):
        super().__init__(*args)
        self.seen: dict[tuple, int] = defaultdict(int)
        self.rounds = 0

    def tell(self, strategy, report):
        self.rounds += 1
        shape = (report.plan, batch_bucket(report.batch_size), self.rounds // 60)  # what is looked at grows
        more = (0.02, 0.06)[self.seen[shape]] if self.seen[shape] < 2 else 0.0
        self.seen[shape] += 1
        strategy.observe(report._replace(seconds=report.seconds + more, first=self.says_so and more > 0))


def check_learns_from_usual_rounds(strategy: Strategy, times: tuple, right: float, says_so: bool):
    machine = Recording(*times, {"eagle": right, "ngram": 0.3})
    machine.says_so = says_so
    check_near_the_best(strategy, machine, 1.1)


@pytest.mark.parametrize(
    ("strategy", "times", "right"),
    [(Goodput, (1.0, 0.2, 0.3, 0.2), 0.3), (BegMab, (1.3, 0.17, 0.2, 0.09), 0.87)],
)
def test_nobody_learns_from_first_rounds(strategy, times, right):
    check_learns_from_usual_rounds(strategy(plans_for(KINDS)), times, right, True)
    caught(check_learns_from_usual_rounds, strategy(plans_for(KINDS)), times, right, False)


class Listening(Strategy):
    """Drafts 0 to 3 tokens in turn and checks what it is told."""

    def __init__(self):
        super().__init__()
        self.heard: list[tuple[int, int]] = []  # (rows, right guesses) of each round

    def choose(self, running):
        return DraftPlan("eagle", len(self.heard) % 4)

    def observe(self, report):
        assert len(report.drafted) == len(report.accepted) == report.plan.k
        assert report.seconds > 0
        assert all(report.batch_size >= tried >= right for tried, right in zip(report.drafted, report.accepted))
        assert report.drafted[:1] in ([], [report.batch_size])
        self.heard.append((report.batch_size, sum(report.accepted)))


def test_the_engine_tells_what_happened():
    rng = random.Random(1)
    groups = []
    for i in range(12):
        prompt = [rng.randrange(2, 118) for _ in range(rng.randint(1, 20))]
        groups.append(Group(i, prompt, [sequence_seed(0, i, k) for k in range(rng.randint(1, 4))]))
    model = tiny()
    engine = Engine(model, {1}, 10, 100, proposers={"eagle": EagleProposer(Drafter(model))})
    strategy = Listening()
    responses = list(engine.generate(groups, Sampling(max_new=30), strategy))
    sampled = sum(rows + right for rows, right in strategy.heard)  # some stand behind a stop token
    tokens = sum(len(r.tokens) for r in responses)
    assert engine.stats.rounds == len(strategy.heard)
    assert tokens <= sampled <= 1.3 * tokens
    assert sum(engine.stats.accepted) == sum(right for _, right in strategy.heard)


def test_names():
    assert make_strategy("0", ["eagle"]).choose([1]) == make_strategy("off", []).choose([1]) == DraftPlan()
    assert make_strategy("goodput", []).choose([1]) == DraftPlan()  # nobody can draft
    assert make_strategy("3", KINDS).choose([1]) == DraftPlan("eagle", 3)
    assert make_strategy("3", ["ngram"]).choose([1]).kind == "ngram"
    for wrong in ("best", "-1", "1.5", "", "17"):
        with pytest.raises(UserError, match="goodput, beg-mab"):
            make_strategy(wrong, [])
