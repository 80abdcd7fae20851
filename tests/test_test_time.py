"""Search strategies, the verifier's bookkeeping, the ledger, and the statistics behind "compute-optimal"."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cases, caught
from hypothesis import given
from hypothesis import strategies as st

import rollout
import test_time
import verifier
from rollout import Group, Sampling
from tasks import Chain, UserError
from test_time import Attempt, Solver, beam, compute_optimal, distinct, interval, matched_samples, parallel, pick, quintiles, revise, vote

FOLDER = Path(__file__).resolve().parent.parent / "base/chain"
PROBLEMS = [Chain().problem("test", i) for i in range(12)]


@pytest.fixture(scope="module")
def solver():
    return Solver(FOLDER, Chain(), speculate=False, slots=64)


@pytest.fixture(scope="module")
def fast():
    return Solver(FOLDER, Chain(), slots=64)


def solve(solver, strategy, problems=PROBLEMS):
    return solver.solve(problems, strategy, 0, "test")


def tokens(result):
    return [[p.tokens for p in paths] for paths, _ in result]


# ---------------------------------------------------------------- strategies


def test_beam_with_one_way_to_continue_is_parallel_sampling(solver, monkeypatch):
    def check():
        assert tokens(solve(solver, partial(parallel, n=5))) == [[p.tokens for p in sorted(paths, key=lambda p: p.tree)] for paths, _ in solve(solver, partial(beam, n=5, m=1))]

    check()
    monkeypatch.setattr(test_time, "replace", lambda p, **new: replace(p, **{**new, "seed": new.get("seed", 0) + ("done" not in new)}))  # pieces with noise of their own
    caught(check)


def test_lookahead_of_no_steps_is_beam_search(solver):
    """... and of one step costs more: what is looked at is paid for (here it changes no choice)."""
    plain, none, one = (solve(solver, partial(beam, n=8, m=4, **more)) for more in ({}, {"look": 0}, {"look": 1}))
    cost = lambda found: sum(book.decode for _, book in found)
    assert tokens(plain) == tokens(none) and cost(plain) == cost(none) < cost(one)


def run_by_hand(strategy, write):
    """Drive a strategy with a function from path to path instead of a model -> (attempts, list of what it asked for)."""
    running, asked, reply = strategy(lambda k: hash(k)), [], None
    while True:
        try:
            wants = running.send(reply)
        except StopIteration as end:
            return end.value, asked
        asked.append(wants)
        reply = [[write(p, want) for p in want.paths] for want in wants]


def climb(p, want, steps=3):
    """A step adds a digit that the seed determines; the score is the sum of the digits so far."""
    digit = random.Random(f"{p.seed} {len(p.tokens)}").randrange(10)
    made = p.tokens + (digit,)
    return replace(p, tokens=made, scores=p.scores + (sum(made),), done=len(made) == steps, answer=str(sum(made)))


@given(st.sampled_from([(4, 2), (8, 4), (6, 3), (16, 4), (4, 4)]))
def test_beam_keeps_the_best_and_continues_each_in_m_ways(shape):
    n, m = shape
    paths, asked = run_by_hand(partial(beam, n=n, m=m), climb)
    assert len(paths) == n and [len(wants) for wants in asked] == [1, n // m, n // m]
    first = [climb(p, None) for p in asked[0][0].paths]
    kept = sorted((w.paths[0].scores[0] for w in asked[1]), reverse=True)
    assert kept == sorted((p.scores[0] for p in first), reverse=True)[:n // m]
    for wants in asked[1:]:
        assert all(len({p.seed for p in w.paths}) == m and len({p.tokens for p in w.paths}) == 1 for w in wants)


def test_diverse_beams_keep_one_in_each_tree():
    paths, asked = run_by_hand(partial(beam, n=12, m=4, diverse=True), climb)
    assert all([w.paths[0].tree for w in wants] == [0, 1, 2] for wants in asked[1:]) and len(paths) == 12


def test_finished_attempts_stay_and_are_not_continued():
    short = lambda p, want: climb(p, want, steps=1 if p.tree == 0 else 3)
    paths, asked = run_by_hand(partial(beam, n=4, m=1), short)
    assert [len(w) for w in asked] == [1, 3, 3] and sorted(len(p.tokens) for p in paths) == [1, 3, 3, 3]


def test_lookahead_judges_by_what_comes_later():
    """A path whose first step scores low but whose greedy next step scores high is kept by lookahead only."""
    def write(p, want):
        made = p.tokens + ((p.seed if not p.tokens else 0),)
        late = made[0] % 2 == 1 and len(made) >= 2
        return replace(p, tokens=made, scores=p.scores + (0.9 if late else 0.1 + 0.5 * (made[0] % 2 == 0),), done=len(made) == 3)

    first = lambda k: [w.paths[0].tokens[0] % 2 for w in run_by_hand(partial(beam, n=4, m=2, look=k), write)[1][1 + k]]
    assert first(0) == [0, 0] and first(1) == [1, 1]


def test_revisions_see_the_last_four_attempts():
    write = lambda p, want: replace(p, tokens=(len(p.before), 99), done=True)
    paths, asked = run_by_hand(partial(revise, n=12, length=6, again=(7,)), write)
    assert len(paths) == 12 and [p.tree for p in paths] == [0] * 6 + [1] * 6
    assert [len(wants[0].paths[0].before) for wants in asked] == [0, 2, 4, 6, 8, 8]
    assert asked[5][0].paths[0].before == (2, 7, 4, 7, 6, 7, 8, 7)  # without their ends, the newest last


# ---------------------------------------------------------------- picking


def attempt(answer, score, tree=0):
    return Attempt(0, scores=(score,), answer=answer, tree=tree, done=True)


def test_picks_differ_where_they_should():
    paths = [attempt("1", 0.9), attempt("2", 0.5), attempt("2", 0.5), attempt("3", 0.1), attempt("3", 0.1), attempt("3", 0.1), attempt(None, 1.0)]
    assert [pick(paths, how) for how in ("max", "weighted", "majority")] == ["1", "2", "3"]
    assert pick([attempt(None, 1.0)], "max") is None and vote([]) == (None, 0.0)


def test_hierarchical_selection_by_hand():
    """Within chains: "1" (0.5 of 0.4 + 0.5) and "2", "2"; across: "2" wins with 0.6 + 0.7 although "3" has the largest sum over all attempts."""
    chains = [attempt("1", 0.5, 0), attempt("3", 0.45, 0), attempt("2", 0.6, 1), attempt("3", 0.55, 1), attempt("2", 0.7, 2), attempt("3", 0.6, 2)]
    assert pick(chains, "chains") == "2" and pick(chains, "weighted") == "3"


def test_aggregates():
    p = Attempt(0, scores=(0.5, 0.2, 0.9))
    assert [round(test_time.score(p, how), 3) for how in ("last", "min", "product")] == [0.9, 0.2, 0.09]


def test_a_perfect_verifier_makes_pass_at_n(solver):
    for problem, (paths, _) in zip(PROBLEMS, solve(solver, partial(parallel, n=8))):
        right = [solver.grade(problem, list(p.tokens)) for p in paths]
        chosen = pick([replace(p, scores=(float(good),)) for p, good in zip(paths, right)], "max")
        assert (chosen == str(problem.answer[2])) == any(right)


def test_a_verifier_turned_round_does_harm(solver):
    problems = [Chain().problem("test", i) for i in range(100, 160)]
    found = solve(solver, partial(parallel, n=8), problems)
    hits = lambda change: sum(pick([replace(p, scores=tuple(map(change, p.scores))) for p in paths], "max") == str(problem.answer[2]) for problem, (paths, _) in zip(problems, found))
    assert hits(lambda s: s) > hits(lambda s: 1 - s) + 10


# ---------------------------------------------------------------- engine, ledger


@cases(10)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_a_response_made_in_pieces_is_the_same(solver, index, cut):
    ids = solver.encode(Chain().problem("test", index))
    whole, = solver.generate([Group(0, ids, [index])])

    def check(begun):
        if cut < len(whole.tokens):
            rest, = solver.generate([Group(0, ids + whole.tokens[:cut], [index], begun)])
            assert whole.tokens[:cut] + rest.tokens == whole.tokens

    check(cut)


def test_noise_that_starts_anew_is_another_response(solver):
    ids = solver.encode(PROBLEMS[0])
    made = sorted(solver.generate([Group(0, ids, list(range(40)))]), key=lambda r: r.sample)
    begun = lambda n: [r.tokens for r in sorted(solver.generate([Group(k, ids + r.tokens[:2], [k], n) for k, r in enumerate(made)]), key=lambda r: r.group)]
    assert begun(2) == [r.tokens[2:] for r in made] != begun(0)
    with pytest.raises(UserError, match="leave nothing of max_new"):
        list(solver.engine.generate([Group(0, ids + [5] * 48, [1], 48)], Sampling(max_new=48)))


@pytest.mark.parametrize("strategy", [partial(parallel, n=1), partial(beam, n=1, m=1), partial(beam, n=1, m=1, look=1)])
@pytest.mark.parametrize("which", ["solver", "fast"])
def test_ledger_equals_an_independent_count(strategy, which, monkeypatch, request):
    """With one row nothing is padded: every policy token that the ledger names went through the model, and no other."""
    solver, counted = request.getfixturevalue(which), [0]
    forward = rollout.forward

    def counting(model, cache, rows, ids, *args, **kwargs):
        counted[0] += ids.numel()
        return forward(model, cache, rows, ids, *args, **kwargs)

    monkeypatch.setattr(rollout, "forward", counting)
    for problem in PROBLEMS[:4]:
        counted[0] = 0
        (_, book), = solve(solver, strategy, [problem])
        assert book.prefill + book.decode + book.rejected == counted[0]
        assert (book.drafter > 0) == (which == "fast" and book.drafter > 0) and (which == "fast" or not book.rejected)
        assert book.flops((1, 0, 0)) == 2 * counted[0]


def test_speculation_changes_seconds_only(solver, fast):
    for strategy in (partial(parallel, n=6), partial(beam, n=4, m=2), partial(beam, n=4, m=4, look=1)):
        assert tokens(solve(solver, strategy)) == tokens(solve(fast, strategy))
        assert sum(b.decode for _, b in solve(solver, strategy)) == sum(b.decode for _, b in solve(fast, strategy))


def test_questions_do_not_depend_on_their_company(solver):
    together = tokens(solve(solver, partial(beam, n=4, m=2)))
    assert together == [tokens(solve(solver, partial(beam, n=4, m=2), [p]))[0] for p in PROBLEMS]


# ---------------------------------------------------------------- the verifier


def test_step_features_are_those_of_a_plain_forward(solver):
    """Ragged responses, some with their first steps in the prompt, against one row at a time through the stock model."""
    ids = [solver.encode(p) for p in PROBLEMS]
    whole = list(solver.generate([Group(i, x, [1, 2]) for i, x in enumerate(ids)]))
    cuts = [Group((r.group, r.sample), r.prompt + r.tokens[:3], [9], 3) for r in whole if len(r.tokens) > 3]
    made = whole + list(solver.generate(cuts))
    starts = [len(r.prompt) - 3 * (n >= len(whole)) for n, r in enumerate(made)]

    def check():
        features, counts = verifier.step_features(solver.policy, made, starts, solver.ends)
        place = 0
        for r, start, count in zip(made, starts, counts):
            row = r.prompt + r.tokens
            with torch.no_grad():
                out = solver.policy(input_ids=torch.tensor([row]), output_hidden_states=True)
            logp, hidden = out.logits[0].log_softmax(-1), out.hidden_states[-1][0]
            begin = start
            for end in [i for i in range(start, len(row)) if row[i] in solver.ends]:
                own = torch.stack([logp[i - 1, row[i]] for i in range(begin, end + 1)])
                gap = torch.stack([logp[i - 1].max() - logp[i - 1, row[i]] for i in range(begin, end + 1)])
                want = torch.cat([hidden[end - 1], hidden[begin - 1 + own.argmin()], own.min()[None], gap.max()[None]])
                assert torch.allclose(features[place], want, atol=2e-3)
                begin, place, count = end + 1, place + 1, count - 1
            assert count == 0
        assert place == len(features)

    check()
    broken = [replace(r, hidden=r.hidden.roll(1, 0)) for r in made]  # the classic shift
    made[:] = broken
    caught(check)


def test_scores_of_a_path_do_not_change_when_it_grows(solver):
    for strategy in (partial(beam, n=4, m=2), partial(beam, n=4, m=1)):
        for paths, _ in solve(solver, strategy):
            for p in paths:
                assert len(p.scores) == sum(t in solver.ends for t in p.tokens)


def test_labels_are_soft_and_right_at_the_end(solver):
    asked = [(p, solver.encode(p)) for p in PROBLEMS]
    features, counts, labels, outcomes, place = verifier.labelled_steps(solver, asked, 2, 4, 0)
    assert len(features) == sum(counts) == len(labels) == len(outcomes) == len(place)
    assert {0.0, 1.0} < set((labels * 4).round().div(4).tolist()) and set(outcomes.tolist()) <= {0.0, 1.0}
    assert torch.equal(labels * 4, (labels * 4).round())
    lasts = [i for i in range(len(place)) if i + 1 == len(place) or place[i + 1, 1] == 0]
    assert torch.equal(labels[lasts], outcomes[lasts])  # nothing is left to chance after the last step


def test_auc_by_hand():
    labels, scores = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.9, 0.8, 0.2, 0.1])
    place = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]])
    assert verifier.auc(scores, labels) == 0.75 and verifier.auc(scores, labels, place) == 1.0
    assert verifier.auc(torch.zeros(4), labels) == 0.5 and np.isnan(verifier.auc(scores, torch.ones(4)))


def test_noise_turns_the_asked_share_round_and_no_token(solver):
    noisy = Solver(FOLDER, Chain(), speculate=False, slots=64, noise=0.25)
    clean, dirty = (solve(s, partial(parallel, n=8)) for s in (solver, noisy))
    assert tokens(clean) == tokens(dirty)
    turned = [abs(a - b) > 1e-6 for (x, _), (y, _) in zip(clean, dirty) for p, q in zip(x, y) for a, b in zip(p.scores, q.scores)]
    assert 0.17 < sum(turned) / len(turned) < 0.33


# ---------------------------------------------------------------- statistics


def test_matched_samples():
    assert matched_samples(14, 0.16) == 257.75 and matched_samples(14, 0.16, backward=1.5) == 135.875


@given(st.lists(st.floats(0, 1), min_size=5, max_size=60))
def test_quintiles_are_even_and_ordered(easiness):
    bins = quintiles(easiness)
    assert max(np.bincount(bins, minlength=5)) - min(np.bincount(bins, minlength=5)) <= 1
    assert all(easiness[i] >= easiness[j] for i in range(len(bins)) for j in range(len(bins)) if bins[i] < bins[j])


def test_folds_do_not_leak(monkeypatch):
    """Strategy "a" is right exactly on fold 0, "b" on fold 1. Chosen honestly, each fold gets the strategy that fails on it."""
    folds, bins = np.arange(40) % 2, np.arange(40) % 5
    right = {"a": (folds == 0).astype(float), "b": (folds == 1).astype(float)}
    cost = {"a": np.ones(40), "b": np.ones(40)}

    def check():
        assert compute_optimal(right, cost, bins, folds, 1.0)[0].mean() == 0.0

    check()
    for name in ("best_within", "allocate"):  # look at the answers of the other half
        monkeypatch.setattr(test_time, name, lambda right, cost, questions, *rest, honest=getattr(test_time, name): honest(right, cost, ~questions, *rest))
    caught(check)


def test_budgets_are_kept_and_the_best_is_found():
    rng = np.random.default_rng(0)
    bins, folds = np.repeat(np.arange(5), 40), np.tile([0, 1], 100)
    right = {"cheap": (rng.random(200) < 0.5).astype(float), "dear": np.ones(200), "odd": (bins == 2).astype(float)}
    cost = {"cheap": np.full(200, 1.0), "dear": np.full(200, 10.0), "odd": np.full(200, 2.0)}
    outcome, paid, chosen = compute_optimal(right, cost, bins, folds, 3.0)
    assert paid.mean() <= 3.0 and all(chosen[f, 2] == "odd" for f in (0, 1)) and chosen[0, 0] == "cheap"
    assert compute_optimal(right, cost, bins, folds, 10.0)[0].mean() == 1.0 and compute_optimal(right, cost, bins, folds, 0.5) is None


def check_distinct(pick, count=300):
    """The first of each prompt, in order: short ones, which come often, are not left out."""
    prompts = [Chain().problem("test", i).prompt for i in range(10 * count)]
    assert pick(Chain(), count) == [i for i, p in enumerate(prompts) if p not in prompts[:i]][:count]


def test_no_question_is_asked_twice():
    check_distinct(distinct)
    last = lambda task, count: list({task.problem("test", i).prompt: i for i in reversed(range(10 * count))}.values())[:-count - 1:-1]
    caught(check_distinct, last)  # a dict keeps the place of a key's first entry: this leaves out what comes often


def test_hard_questions_may_cost_more_than_easy_ones():
    """A budget of 3 on average: 1 for the easy half, 5 for the hard one. Held to 3 in each bin, the hard half would stay unsolved."""
    bins, folds = np.repeat([0, 1], 20), np.arange(40) % 2
    right, cost = {"cheap": (bins == 0).astype(float), "dear": np.ones(40)}, {"cheap": np.ones(40), "dear": np.full(40, 5.0)}
    outcome, paid, _ = compute_optimal(right, cost, bins, folds, 3.0)
    assert outcome.mean() == 1.0 and paid.mean() == 3.0
    assert compute_optimal(right, cost, bins, folds, 2.9)[0].mean() == 0.5


def test_rows_of_a_question_are_not_independent():
    """Copies of all rows make no interval narrower."""
    x, question = np.random.default_rng(1).random(60), np.arange(60)
    once = interval(x, question)
    assert once == pytest.approx(interval(np.tile(x, 3), np.tile(question, 3))) and once == pytest.approx(1.96 * x.std() / 60**0.5, rel=0.2)
    assert interval(np.tile(x, 3), np.arange(180)) < 0.7 * once  # as if they were


# ---------------------------------------------------------------- the command


def test_answering_one_question(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["test_time.py", "--prompt", "7:cfa=", "--strategy", "beam", "--n", "8", "--model", str(FOLDER)])
    test_time.main()
    text = capsys.readouterr().out
    assert "answer: " in text and "MFLOPs" in text and "#" in text
    for argv, message in (([], "--prompt"), (["--prompt", "x", "--task", "countdown"], "chain or gsm8k"), (["--prompt", "7:cfa=", "--model", "base"], "symbols that base does not know")):
        monkeypatch.setattr("sys.argv", ["test_time.py", *argv])
        with pytest.raises(UserError, match=message):
            test_time.main()


def test_choosing_by_predicted_difficulty(capsys, monkeypatch):
    for budget in ("30", "400"):
        monkeypatch.setattr("sys.argv", ["test_time.py", "--prompt", "7:cfaponm=", "--budget", budget, "--model", str(FOLDER)])
        test_time.main()
        assert "difficulty" in capsys.readouterr().out
