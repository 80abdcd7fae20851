"""The statistics of "compute-optimal", and the questions that they are computed from."""

import numpy as np
import pytest
from conftest import caught
from hypothesis import given
from hypothesis import strategies as st

from tasks import Chain, Countdown, Task
from test_time import optimal
from test_time.optimal import compute_optimal, interval, matched_samples, quintiles
from test_time.results import Key, Results
from test_time.sweep import distinct


def test_matched_samples():
    assert matched_samples(14, 0.16) == 257.75 and matched_samples(14, 0.16, backward=1.5) == 135.875


@given(st.lists(st.floats(0, 1), min_size=5, max_size=60))
def test_quintiles_are_even_and_ordered(easiness):
    bins = quintiles(easiness)
    sizes = np.bincount(bins, minlength=5)
    assert max(sizes) - min(sizes) <= 1
    for i in range(len(bins)):
        assert all(easiness[i] >= easiness[j] for j in range(len(bins)) if bins[i] < bins[j])


def test_folds_do_not_leak(monkeypatch):
    """Strategy "a" is right exactly on fold 0, "b" on fold 1. Chosen on the other fold, each fold gets the one that
    fails on it.
    """
    folds = np.arange(40) % 2
    bins = np.arange(40) % 5
    right = {"a": (folds == 0).astype(float), "b": (folds == 1).astype(float)}
    cost = {"a": np.ones(40), "b": np.ones(40)}

    def check():
        assert compute_optimal(right, cost, bins, folds, 1.0).right.mean() == 0.0

    check()

    def with_the_other_half(original):
        def leaking(right, cost, questions, *rest):
            return original(right, cost, ~questions, *rest)

        return leaking

    for name in ("best_within", "allocate"):
        monkeypatch.setattr(optimal, name, with_the_other_half(getattr(optimal, name)))
    caught(check)


def test_budgets_are_kept_and_the_best_is_found():
    rng = np.random.default_rng(0)
    bins = np.repeat(np.arange(5), 40)
    folds = np.tile([0, 1], 100)
    cheap = (rng.random(200) < 0.5).astype(float)
    right = {"cheap": cheap, "expensive": np.ones(200), "odd": (bins == 2).astype(float)}
    cost = {"cheap": np.full(200, 1.0), "expensive": np.full(200, 10.0), "odd": np.full(200, 2.0)}
    _, paid, chosen = compute_optimal(right, cost, bins, folds, 3.0)
    assert paid.mean() <= 3.0
    assert chosen[0, 2] == chosen[1, 2] == "odd" and chosen[0, 0] == "cheap"
    assert compute_optimal(right, cost, bins, folds, 10.0).right.mean() == 1.0
    assert compute_optimal(right, cost, bins, folds, 0.5) is None


def check_distinct(choose, count=300):
    """The first question of each prompt is chosen, in order: short ones, which occur often, are not left out."""
    prompts = [Chain().problem("test", i).prompt for i in range(10 * count)]
    first = [i for i, prompt in enumerate(prompts) if prompt not in prompts[:i]]
    assert choose(Chain(), count) == first[:count]


def last_of_each(task, count):
    """A broken variant: a dict keeps the place of a key's first entry, so this leaves out what occurs often."""
    by_prompt = {task.problem("test", i).prompt: i for i in reversed(range(10 * count))}
    return list(by_prompt.values())[: -count - 1 : -1]


def test_no_question_is_asked_twice():
    check_distinct(distinct)
    caught(check_distinct, last_of_each)


def test_the_same_numbers_in_another_order_are_no_other_question(monkeypatch):
    def check():
        task = Countdown(sizes=(3,))
        answers = [task.problem("test", i).answer for i in distinct(task, 60)]
        questions = {(tuple(sorted(numbers)), target) for numbers, target in answers}
        assert len(questions) == len(answers) == 60

    check()
    monkeypatch.setattr(Countdown, "identity", Task.identity)
    caught(check)


def test_hard_questions_may_cost_more_than_easy_ones():
    """A budget of 3 on average: 1 for the easy half, 5 for the hard one. With a limit of 3 in each bin, the hard half
    would stay unsolved.
    """
    bins = np.repeat([0, 1], 20)
    folds = np.arange(40) % 2
    right = {"cheap": (bins == 0).astype(float), "expensive": np.ones(40)}
    cost = {"cheap": np.ones(40), "expensive": np.full(40, 5.0)}
    outcome, paid, _ = compute_optimal(right, cost, bins, folds, 3.0)
    assert outcome.mean() == 1.0 and paid.mean() == 3.0
    assert compute_optimal(right, cost, bins, folds, 2.9).right.mean() == 0.5


def test_rows_of_a_question_are_not_independent():
    """Copies of all rows do not make the interval narrower."""
    x = np.random.default_rng(1).random(60)
    question = np.arange(60)
    once = interval(x, question)
    assert once == pytest.approx(interval(np.tile(x, 3), np.tile(question, 3)))
    assert once == pytest.approx(1.96 * x.std() / 60**0.5, rel=0.2)
    assert interval(np.tile(x, 3), np.arange(180)) < 0.7 * once  # as if they were independent


def test_savings_by_hand():
    """Best-of-1, 2, 4, 8 with 10, 20, 40, 80 tokens; four samples are no better than two."""
    rights = {1: 0.2, 2: 0.4, 4: 0.4, 8: 0.8}

    class Fake:
        right = {}
        cost = {"tokens": {}}
        choices = {1: None, 2: (0.2, 9), 3: (0.4, 15), 4: (0.6, 16), 5: (0.6, 16), 6: (0.9, 50)}
        budgets = staticmethod(lambda unit: [1, 2, 3, 4, 5, 6])

        def interval(self, x):
            return 0.1

        def optimal(self, unit, budget, difficulty):
            found = self.choices[budget]
            return found and optimal.Optimal(np.array([found[0]]), np.array([found[1]]), {})

    for n, right in rights.items():
        Fake.right[Key("parallel", n, "max")] = np.array([right])
        Fake.right[Key("parallel", n, "weighted")] = np.array([right - 0.05])
        Fake.cost["tokens"][Key("parallel", n, "max")] = np.array([10.0 * n])
    found = [(accuracy, tokens, *needed) for accuracy, tokens, needed in Results.savings(Fake())]
    # 0.4 takes two samples; half way from 0.4 to 0.8 is the geometric mean of 20 and 80 tokens; 0.9 is out of reach
    low, high = 10 * 2**0.5, 20 * 2**0.5
    inf = np.inf
    wanted = [(0.4, 15, 20, low, high), (0.6, 16, 40, high, 80 / 2**0.5), (0.9, 50, inf, 80, inf)]
    assert np.allclose(found, wanted)
