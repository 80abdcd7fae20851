"""Strategies on simulated machines: the time they need, against the best that anyone could have done, and what the engine tells them."""

import random

import pytest
from conftest import caught, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_drafter import make_engine
from test_rollout import groups_of

from rollout import Draft, Sampling
from strategy import Bandit, Goodput, arms, make_strategy
from tasks import UserError


class Machine:
    """Rounds that take start + row B + guess k + both B k milliseconds (each with 3 % noise), and drafters right with a chance for each kind."""

    def __init__(self, start, row, guess, both, right, seed=0):
        self.costs, self.right, self.rng = (start, row, guess, both), right, random.Random(seed)

    def seconds(self, rows, k):
        start, row, guess, both = self.costs
        return (start + row * rows + guess * k + both * rows * k) / 1e3

    def expected(self, arm):
        c = self.right.get(arm.kind, 0.0)
        return sum(c ** j for j in range(arm.k + 1))

    def best(self, rows):
        """Seconds per token and row of the best arm: nobody can do better."""
        return min(self.seconds(rows, arm.k) / self.expected(arm) for arm in arms(["learned", "n-gram"]))

    def play(self, strategy, sizes):
        """-> (seconds needed, seconds that the best arm, or plain decoding, would have needed for the same tokens)."""
        spent = ideal = plain = 0.0
        row = type("Row", (), {"length": 100})()
        for rows in sizes:
            live = [row] * rows
            arm = strategy(live)
            lengths = []
            for _ in live:
                n = 0
                while n < arm.k and self.rng.random() < self.right.get(arm.kind, 0.0):
                    n += 1
                lengths.append(n)
            reached = [sum(n >= j for n in lengths) for j in range(arm.k + 1)]
            t = self.seconds(rows, arm.k) * self.rng.uniform(0.97, 1.03)
            if hasattr(strategy, "observe"):
                strategy.observe(rows, arm, t, reached[:-1], reached[1:])
            tokens = (rows + sum(lengths)) / rows
            spent, ideal, plain = spent + t, ideal + tokens * self.best(rows), plain + tokens * self.seconds(rows, 0)
        return spent, ideal, plain


SIZES = [64] * 400 + [b for b in range(64, 0, -1) for _ in range(12)] + [1] * 600
LIKE_OURS = Machine(1.3, 0.17, 0.2, 0.09, {"learned": 0.87, "n-gram": 0.3})


def check_near_the_best(strategy, machine, limit):
    spent, ideal, _ = machine.play(strategy, SIZES)
    assert spent < ideal * limit


def test_goodput_is_near_the_best_and_poor_lengths_are_not():
    check_near_the_best(Goodput(arms(["learned", "n-gram"])), LIKE_OURS, 1.05)
    for other in (make_strategy(k, ["learned"]) for k in ("off", "1", "8")):
        caught(check_near_the_best, other, LIKE_OURS, 1.05)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.5, 5), st.floats(0.01, 0.4), st.floats(0.02, 0.5), st.floats(0.0, 1.0), st.floats(0.3, 0.97))
def test_goodput_is_near_the_best_on_any_machine(start, row, guess, share, right):
    """share: what verifying one more token of a row costs, as a share of what the row itself costs."""
    machine = Machine(start, row, guess, row * share, {"learned": right, "n-gram": 0.2})
    check_near_the_best(Goodput(arms(["learned", "n-gram"])), machine, 1.06)


def check_no_slower_than_plain(strategy):
    machine = Machine(1.0, 0.2, 0.3, 0.2, {"learned": 0.02})
    machine.play(strategy, SIZES)  # the first rollout finds out
    if hasattr(strategy, "begin"):
        strategy.begin(["learned"])
    spent, _, plain = machine.play(strategy, SIZES)
    assert spent < plain * 1.02


def test_a_useless_drafter_costs_less_than_two_percent():
    check_no_slower_than_plain(Goodput(arms(["learned", "n-gram"])))
    caught(check_no_slower_than_plain, Bandit(arms(["learned", "n-gram"])))


def check_notices_a_better_drafter(strategy):
    machine = Machine(1.3, 0.17, 0.2, 0.09, {"learned": 0.02})
    machine.play(strategy, [32] * 500)
    machine.right["learned"] = 0.87
    if hasattr(strategy, "begin"):
        strategy.begin(["learned"])
    spent, ideal, _ = machine.play(strategy, [32] * 300)
    assert spent < ideal * 1.1


def test_goodput_notices_that_the_drafter_has_learned():
    check_notices_a_better_drafter(Goodput(arms(["learned"])))

    class Deaf(Goodput):
        begin = PROBES = None

        def begin(self, changed):
            """Keeps what it knew, and never tries again."""
        PROBES = 0.0
    caught(check_notices_a_better_drafter, Deaf(arms(["learned"])))


def test_the_bandit_knows_its_buckets():
    bandit = Bandit(arms(["learned"]), epsilon=0.0)
    machine = Machine(1.0, 0.1, 0.05, 0.2, {"learned": 0.8})
    machine.play(bandit, [1] * 100 + [64] * 100)
    row = type("Row", (), {"length": 1})()
    assert bandit([row]).k > bandit([row] * 64).k


def test_the_engine_tells_what_happened():
    heard = []

    class Listening:
        def __call__(self, live):
            return Draft("learned", len(heard) % 4)

        def observe(self, rows, arm, seconds, tried, right):
            assert len(tried) == len(right) == arm.k and seconds > 0 and all(rows >= a >= b for a, b in zip(tried, right)) and tried[:1] in ([], [rows])
            heard.append((rows, sum(right)))
    engine = make_engine(tiny())
    responses = list(engine.generate(groups_of(12, random.Random(1)), Sampling(max_new=30), Listening()))
    made = sum(rows + right for rows, right in heard)  # some stand behind a stop token
    assert engine.stats["rounds"] == len(heard) and sum(len(r.tokens) for r in responses) <= made <= 1.3 * sum(len(r.tokens) for r in responses)
    assert sum(engine.stats["accepted"]) == sum(right for _, right in heard)


def test_names():
    assert make_strategy("0", ["learned"])([1]) == make_strategy("off", [])([1]) == Draft()
    assert make_strategy("3", ["learned", "n-gram"])([1]) == Draft("learned", 3) and make_strategy("3", ["n-gram"])([1]).kind == "n-gram"
    for wrong in ("best", "-1", "1.5", ""):
        with pytest.raises(UserError, match="goodput, beg-mab"):
            make_strategy(wrong, [])
