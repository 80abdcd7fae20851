"""Search strategies, picking answers, the ledger, the verifier, the command. (The statistics: test_optimal.py.)"""

import contextlib
import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import cases, caught
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import rollout
from base import pretrain
from parts.cli import UserError
from parts.engine.interfaces import DraftPlan, Group, Strategy
from parts.engine.sampling import Sampling
from tasks import Chain
from test_time import answer, learn, optimal, strategies, sweep, verifier
from test_time.__main__ import main
from test_time.attempts import Attempt, ModelSizes, pick, score, shown_in_prompt, vote
from test_time.config import Config
from test_time.learn import labelled_steps, questions_of
from test_time.results import Choices, Key, Results, read_rows
from test_time.solver import Solver
from test_time.strategies import beam, parallel, revise

FOLDER = Path(__file__).resolve().parent.parent / "base/chain"
SOME_COLUMNS = [
    ("probe", 1, "weighted"),
    ("oracle", 16, "weighted"),
    ("greedy", 1, "majority"),
    ("parallel", 1, "majority"),
    ("beam", 4, "max"),
]
PROBLEMS = [Chain().problem("test", i) for i in range(12)]


@pytest.fixture(scope="module")
def solver():
    return Solver(FOLDER, Chain(), speculate=False, slots=64)


@pytest.fixture(scope="module")
def speculative():
    """Always drafts, since how far `Goodput` drafts depends on how busy the machine is."""
    solver = Solver(FOLDER, Chain(), slots=64)
    solver.strategy = Strategy(DraftPlan("eagle", 2))
    return solver


def solve(solver, strategy, problems=PROBLEMS):
    return solver.solve(problems, strategy, 0, "test")


def tokens_of(attempts):
    return [attempt.tokens for attempt in attempts]


def tokens(solutions):
    """Return the tokens of each attempt at each question."""
    return [tokens_of(solution.attempts) for solution in solutions]


def total(solutions, entry):
    """Return the sum of an entry over the ledgers."""
    return sum(getattr(solution.ledger, entry) for solution in solutions)


# ---------------------------------------------------------------- strategies


def test_beam_with_one_continuation_each_is_parallel_sampling(solver, monkeypatch):
    def check():
        in_pieces = solve(solver, partial(beam, n=5, m=1))
        by_tree = [tokens_of(sorted(attempts, key=lambda attempt: attempt.tree)) for attempts, _ in in_pieces]
        assert tokens(solve(solver, partial(parallel, n=5))) == by_tree

    check()
    original = strategies.continuations

    def with_new_seeds(attempt, m):
        return [replace(piece, seed=piece.seed + 1) for piece in original(attempt, m)]

    monkeypatch.setattr(strategies, "continuations", with_new_seeds)
    caught(check)


def test_lookahead_of_no_steps_is_beam_search(solver):
    """A lookahead of one step costs more, since its tokens are paid for (here it changes no choice)."""
    plain = solve(solver, partial(beam, n=8, m=4))
    none = solve(solver, partial(beam, n=8, m=4, lookahead=0))
    one = solve(solver, partial(beam, n=8, m=4, lookahead=1))
    assert tokens(plain) == tokens(none)
    assert total(plain, "decode") == total(none, "decode") < total(one, "decode")


def run_by_hand(strategy, extend):
    """Run a strategy with a function that extends an attempt instead of a model -> (attempts, lists of requests)."""
    search = strategy(hash)
    history = []
    results = None
    while True:
        try:
            requests = search.send(results)
        except StopIteration as end:
            return end.value, history
        history.append(requests)
        results = []
        for request in requests:
            results.append([extend(attempt) for attempt in request.attempts])


def add_digit(attempt, steps=3):
    """A step adds a digit that the seed determines; the score is the sum of the digits so far."""
    digit = random.Random(f"{attempt.seed} {len(attempt.tokens)}").randrange(10)
    digits = attempt.tokens + (digit,)
    scores = attempt.scores + (sum(digits),)
    return replace(attempt, tokens=digits, scores=scores, done=len(digits) == steps, answer=str(sum(digits)))


@given(st.sampled_from([(4, 2), (8, 4), (6, 3), (16, 4), (4, 4)]))
def test_beam_keeps_the_best_and_continues_each_in_m_ways(shape):
    n, m = shape
    attempts, history = run_by_hand(partial(beam, n=n, m=m), add_digit)
    assert len(attempts) == n and [len(requests) for requests in history] == [1, n // m, n // m]
    first = [add_digit(attempt).scores[0] for attempt in history[0][0].attempts]
    kept = [request.attempts[0].scores[0] for request in history[1]]
    assert sorted(kept, reverse=True) == sorted(first, reverse=True)[: n // m]
    for requests in history[1:]:
        for request in requests:
            assert len({attempt.seed for attempt in request.attempts}) == m
            assert len({attempt.tokens for attempt in request.attempts}) == 1


def test_diverse_beams_keep_one_in_each_tree():
    attempts, history = run_by_hand(partial(beam, n=12, m=4, diverse=True), add_digit)
    assert len(attempts) == 12
    for requests in history[1:]:
        assert [request.attempts[0].tree for request in requests] == [0, 1, 2]


def test_finished_attempts_stay_and_are_not_continued():
    def one_is_short(attempt):
        return add_digit(attempt, steps=1 if attempt.tree == 0 else 3)

    attempts, history = run_by_hand(partial(beam, n=4, m=1), one_is_short)
    assert [len(requests) for requests in history] == [1, 3, 3]
    assert sorted(len(attempt.tokens) for attempt in attempts) == [1, 3, 3, 3]


def test_lookahead_judges_by_later_steps():
    """An attempt whose first step scores low but whose greedy next step scores high is kept only with lookahead."""

    def extend(attempt):
        digits = attempt.tokens + (0 if attempt.tokens else attempt.seed,)
        late = digits[0] % 2 == 1 and len(digits) >= 2
        value = 0.9 if late else 0.1 + 0.5 * (digits[0] % 2 == 0)
        return replace(attempt, tokens=digits, scores=attempt.scores + (value,), done=len(digits) == 3)

    def first_digits_kept(steps):
        _, history = run_by_hand(partial(beam, n=4, m=2, lookahead=steps), extend)
        return [request.attempts[0].tokens[0] % 2 for request in history[1 + steps]]

    assert first_digits_kept(0) == [0, 0] and first_digits_kept(1) == [1, 1]


def test_revisions_see_the_last_four_attempts():
    def extend(attempt):
        return replace(attempt, tokens=(len(shown_in_prompt(attempt.earlier, (7,))), 99), done=True)

    attempts, history = run_by_hand(partial(revise, n=12, length=6), extend)
    assert len(attempts) == 12 and [attempt.tree for attempt in attempts] == [0] * 6 + [1] * 6
    first_chain = [shown_in_prompt(requests[0].attempts[0].earlier, (7,)) for requests in history]
    assert [len(shown) for shown in first_chain] == [0, 2, 4, 6, 8, 8]
    assert first_chain[5] == [2, 7, 4, 7, 6, 7, 8, 7]  # without their stop tokens, the newest last
    assert [len(requests) for requests in history] == [1, 2, 2, 2, 2, 2]  # first attempts share a prompt, and its cost


# ---------------------------------------------------------------- picking


def attempt_of(answer, value, tree=0):
    return Attempt(0, scores=(value,), answer=answer, tree=tree, done=True)


def test_picks_differ_where_they_should():
    attempts = [attempt_of("1", 0.9), attempt_of("2", 0.5), attempt_of("2", 0.5)]
    attempts += [attempt_of("3", 0.1), attempt_of("3", 0.1), attempt_of("3", 0.1), attempt_of(None, 1.0)]
    assert [pick(attempts, how) for how in ("max", "weighted", "majority")] == ["1", "2", "3"]
    assert pick([attempt_of(None, 1.0)], "max") is None and vote([], []) == (None, 0.0)


def test_chains_vote_with_their_own_winners():
    """Each chain votes for its best answer: "1" (0.5), "2" (0.6), "2" (0.7). So "2" wins, although "3" has the largest
    sum over all attempts.
    """
    chains = [attempt_of("1", 0.5, 0), attempt_of("3", 0.45, 0)]
    chains += [attempt_of("2", 0.6, 1), attempt_of("3", 0.55, 1)]
    chains += [attempt_of("2", 0.7, 2), attempt_of("3", 0.6, 2)]
    assert pick(chains, "chains") == "2" and pick(chains, "weighted") == "3"


def test_an_attempts_score_is_its_last_its_lowest_or_the_product():
    attempt = Attempt(0, scores=(0.5, 0.2, 0.9))
    assert [round(score(attempt, how), 3) for how in ("last", "min", "product")] == [0.9, 0.2, 0.09]


def test_a_perfect_verifier_makes_pass_at_n(solver):
    for problem, (attempts, _) in zip(PROBLEMS, solve(solver, partial(parallel, n=8))):
        right = [solver.grade(problem, list(attempt.tokens)) for attempt in attempts]
        scored = [replace(attempt, scores=(float(is_right),)) for attempt, is_right in zip(attempts, right)]
        assert (pick(scored, "max") == str(problem.answer[2])) == any(right)


def test_an_inverted_verifier_picks_fewer_right_answers(solver):
    problems = [Chain().problem("test", i) for i in range(100, 160)]
    solutions = solve(solver, partial(parallel, n=8), problems)

    def inverted(attempt):
        return replace(attempt, scores=tuple(1 - s for s in attempt.scores))

    right = 0
    right_inverted = 0
    for problem, (attempts, _) in zip(problems, solutions):
        right += pick(attempts, "max") == str(problem.answer[2])
        right_inverted += pick(list(map(inverted, attempts)), "max") == str(problem.answer[2])
    assert right > right_inverted + 10


# ---------------------------------------------------------------- engine, ledger


@cases(10)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_a_response_made_in_pieces_is_the_same(solver, index, cut):
    prompt = solver.encode(Chain().problem("test", index))
    (whole,) = solver.generate([Group(0, prompt, [index])])
    if cut < len(whole.tokens):
        (rest,) = solver.generate([Group(0, prompt + whole.tokens[:cut], [index], cut)])
        assert whole.tokens[:cut] + rest.tokens == whole.tokens


def test_sampling_noise_that_restarts_gives_another_response(solver):
    prompt = solver.encode(PROBLEMS[0])
    responses = sorted(solver.generate([Group(0, prompt, list(range(40)))]), key=lambda r: r.sample)

    def second_pieces(response_prefix_len):
        groups = [Group(k, prompt + r.tokens[:2], [k], response_prefix_len) for k, r in enumerate(responses)]
        return [r.tokens for r in sorted(solver.generate(groups), key=lambda r: r.group)]

    assert second_pieces(2) == [r.tokens[2:] for r in responses] != second_pieces(0)
    with pytest.raises(UserError, match="leave nothing of max_new"):
        list(solver.engine.generate([Group(0, prompt + [5] * 48, [1], 48)], Sampling(max_new=48)))


@pytest.mark.parametrize(
    "strategy", [partial(parallel, n=1), partial(beam, n=1, m=1), partial(beam, n=1, m=1, lookahead=1)]
)
@pytest.mark.parametrize("which", ["solver", "speculative"])
def test_ledger_equals_an_independent_count(strategy, which, monkeypatch, request):
    """With one sequence nothing is padded: the policy tokens in the ledger are exactly those that the model was fed."""
    solver = request.getfixturevalue(which)
    forward = rollout.forward
    fed = []

    def counting(model, cache, slots, ids, *args, **kwargs):
        fed.append(ids.numel())
        return forward(model, cache, slots, ids, *args, **kwargs)

    monkeypatch.setattr(rollout, "forward", counting)
    for problem in PROBLEMS[:4]:
        fed.clear()
        ((_, ledger),) = solve(solver, strategy, [problem])
        assert ledger.prefill + ledger.decode + ledger.rejected == sum(fed)
        assert which == "speculative" or (ledger.drafter == 0 and ledger.rejected == 0)
        assert ledger.flops(ModelSizes(1, 0, 0, 0, 0)) == 2 * sum(fed)
        assert ledger.flops(ModelSizes(0, 1, 0, 0, 0)) == 2 * (sum(fed) - ledger.prefill)


def test_the_drafter_reads_a_prompt_once_for_all_samples(speculative):
    for problem, (_, ledger) in zip(PROBLEMS, solve(speculative, partial(parallel, n=8))):
        prompt = len(speculative.encode(problem))
        assert ledger.drafted > 0 and prompt < ledger.drafter - ledger.drafted <= ledger.decode + prompt
        flops = 2 * (ledger.drafter * 3 + ledger.drafted * 5)
        assert ledger.flops(ModelSizes(0, 0, 3, 5, 0)) == flops


def test_speculation_changes_only_seconds(solver, speculative):
    for strategy in (partial(parallel, n=6), partial(beam, n=4, m=2), partial(beam, n=4, m=4, lookahead=1)):
        plain = solve(solver, strategy)
        drafted = solve(speculative, strategy)
        assert tokens(plain) == tokens(drafted)
        for (_, costs), (_, with_drafts) in zip(plain, drafted):
            assert replace(costs, seconds=0.0) == replace(with_drafts.without_speculation(), seconds=0.0)
    assert total(drafted, "seconds") > 0 and total(solve(speculative, partial(parallel, n=6)), "drafted") > 0


def test_a_search_may_yield_no_request(solver):
    """A beam search does so when all that it keeps is finished."""

    def hesitating(seed):
        assert (yield []) == []
        return (yield from parallel(seed, 2))

    assert tokens(solve(solver, hesitating)) == tokens(solve(solver, partial(parallel, n=2)))


def test_questions_do_not_depend_on_each_other(solver):
    together = tokens(solve(solver, partial(beam, n=4, m=2)))
    alone = [tokens(solve(solver, partial(beam, n=4, m=2), [problem]))[0] for problem in PROBLEMS]
    assert together == alone


def test_each_question_may_have_its_own_strategy(solver):
    """A chain that is stopped early has the first attempts of the whole one."""
    chains = [partial(revise, n=n, length=n) for n in range(len(PROBLEMS))]
    stopped = tokens(solver.solve_each(PROBLEMS, chains, 0, "test"))
    whole = tokens(solve(solver, partial(revise, n=len(PROBLEMS), length=len(PROBLEMS))))
    assert stopped == [attempts[:n] for n, attempts in enumerate(whole)] and stopped[0] == []


# ---------------------------------------------------------------- the verifier


def plain_features(policy, response, start, ends):
    """Return the features of a response's steps from one sequence through the stock model."""
    row = response.prompt + response.tokens
    with torch.no_grad():
        out = policy(input_ids=torch.tensor([row]), output_hidden_states=True)
    logp = out.logits[0].log_softmax(-1)
    hidden = out.hidden_states[-1][0]
    features = []
    begin = start
    for end in range(start, len(row)):
        if row[end] not in ends:
            continue
        own = torch.stack([logp[i - 1, row[i]] for i in range(begin, end + 1)])
        gap = torch.stack([logp[i - 1].max() - logp[i - 1, row[i]] for i in range(begin, end + 1)])
        riskiest = hidden[begin - 1 + own.argmin()]
        features.append(torch.cat([hidden[end - 1], riskiest, own.min()[None], gap.max()[None]]))
        begin = end + 1
    return features


def test_step_features_are_those_of_a_plain_forward(solver):
    """Responses of unequal length, some with first steps in the prompt, against the stock model, one at a time."""
    prompts = [solver.encode(problem) for problem in PROBLEMS]
    whole = list(solver.generate([Group(i, prompt, [1, 2]) for i, prompt in enumerate(prompts)]))
    long = [r for r in whole if len(r.tokens) > 3]
    cut = list(solver.generate([Group((r.group, r.sample), r.prompt + r.tokens[:3], [9], 3) for r in long]))
    responses = whole + cut
    starts = [len(r.prompt) for r in whole] + [len(r.prompt) - 3 for r in cut]

    def check(responses):
        features, counts = verifier.step_features(solver.policy, responses, starts, solver.ends)
        place = 0
        for r, start, count in zip(responses, starts, counts):
            wanted = plain_features(solver.policy, r, start, solver.ends)
            assert len(wanted) == count
            for row in wanted:
                assert torch.allclose(features[place], row, atol=2e-3)
                place += 1
        assert place == len(features)

    check(responses)
    caught(check, [replace(r, hidden=r.hidden.roll(1, 0)) for r in responses])  # the classic shift


def test_scores_of_an_attempt_do_not_change_when_it_grows(solver):
    for strategy in (partial(beam, n=4, m=2), partial(beam, n=4, m=1)):
        for attempts, _ in solve(solver, strategy):
            for attempt in attempts:
                assert len(attempt.scores) == sum(token in solver.ends for token in attempt.tokens)


def test_labels_are_soft_and_right_at_the_end(solver):
    questions = questions_of(solver, "test", 0, len(PROBLEMS))
    features, counts, labels, outcomes, place, _ = labelled_steps(solver, questions, 2, 4, 0)
    assert len(features) == sum(counts) == len(labels) == len(outcomes) == len(place)
    assert {0.0, 1.0} < set((labels * 4).round().div(4).tolist()) and set(outcomes.tolist()) <= {0.0, 1.0}
    assert torch.equal(labels * 4, (labels * 4).round())
    lasts = [i for i in range(len(place)) if i + 1 == len(place) or place[i + 1, 1] == 0]
    assert torch.equal(labels[lasts], outcomes[lasts])  # nothing is random after the last step


def test_few_steps_are_labelled_by_samples_and_the_others_by_the_outcome(solver, monkeypatch, tmp_path):
    questions = questions_of(solver, "test", 0, len(PROBLEMS))
    every = labelled_steps(solver, questions, 2, 4, 0)
    some = labelled_steps(solver, questions, 2, 4, 0, labelled=2)
    known = ~some.labels.isnan()
    assert torch.equal(some.labels[known], every.labels[known])
    shares = zip(known.split(some.counts), some.counts)
    assert all(part.sum() == min(3, count) and part[-1] for part, count in shares)

    fitted = {}

    def fit(features, counts, labels):
        fitted[len(fitted)] = labels
        return verifier.Verifier(solver.policy.config.hidden_size)

    monkeypatch.setattr(learn, "fit_verifier", fit)
    monkeypatch.setattr(solver, "folder", tmp_path)
    settings = Config("learn", attempts=2, labelled=2, continuations=4, drafter_seconds=0.0)
    learn.train_helpers(solver, questions, questions, settings)
    process, outcome, _ = fitted.values()
    assert torch.equal(outcome, some.outcomes)
    assert torch.equal(process[known], some.labels[known]) and torch.equal(process[~known], some.outcomes[~known])


def test_a_drafter_is_trained_further_from_the_one_that_is_named(solver, monkeypatch, tmp_path):
    def check():
        learn.train_drafter(solver, [], Config("learn", drafter_seconds=0.0), str(FOLDER / "drafter"))
        started, saved = (load_file(folder / "drafter/drafter.safetensors") for folder in (FOLDER, tmp_path))
        assert all(torch.equal(started[name], saved[name]) for name in started)

    monkeypatch.setattr(solver, "folder", tmp_path)
    check()
    monkeypatch.setattr(learn.Drafter, "load", lambda self, folder: None)
    caught(check)


def test_auc_by_hand():
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    scores = torch.tensor([0.9, 0.8, 0.2, 0.1])
    place = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]])
    assert verifier.auc(scores, labels) == 0.75 and verifier.auc(scores, labels, place) == 1.0
    unknown = torch.tensor([1.0, torch.nan, 1.0, 0.0])
    assert verifier.auc(scores, unknown, place) == 1.0 and verifier.auc(scores, unknown) == 1.0
    assert verifier.auc(torch.zeros(4), labels) == 0.5 and np.isnan(verifier.auc(scores, torch.ones(4)))


def test_noise_inverts_its_share_of_the_scores_and_changes_no_token(solver):
    noisy = Solver(FOLDER, Chain(), speculate=False, slots=64, noise=0.25)
    clean = solve(solver, partial(parallel, n=8))
    dirty = solve(noisy, partial(parallel, n=8))
    assert tokens(clean) == tokens(dirty)
    changed = []
    for a, b in zip(clean, dirty):
        for p, q in zip(a.attempts, b.attempts):
            changed += [abs(x - y) > 1e-6 for x, y in zip(p.scores, q.scores)]
    assert 0.17 < sum(changed) / len(changed) < 0.33


class Words:
    """A tokenizer of a few words, some of them with line breaks."""

    TEXTS = ("<pad>", "\n", "\n\n", "a", ")\n", "b")

    def __len__(self):
        return len(self.TEXTS)

    def batch_decode(self, rows):
        return [self.TEXTS[token] for (token,) in rows]


def check_ends(tokens_with):
    """A step ends at every token that has a line break in it."""
    solver = SimpleNamespace(tokenizer=Words(), folder="x")
    assert tokens_with(solver, "\n") == {1, 2, 4}
    with pytest.raises(UserError, match="no token for ';'"):
        tokens_with(solver, ";")


def test_steps_end_at_all_tokens_with_their_end():
    check_ends(Solver.tokens_with)
    caught(check_ends, lambda solver, text: {Words.TEXTS.index(text)})


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("most", [4, 8, 64])
def test_trials_of_a_sweep(most):
    """Each strategy once, none with too many attempts, and those at equal number that the tables compare."""
    found = [(trial.name, n) for trial in sweep.trials(most) for n in trial.counts()]
    assert len(found) == len(set(found))
    assert max(n for name, n in found if name != "oracle") == most
    compared = min(16, most)
    without_steps = {trial.name for trial in sweep.trials(most, skip_steps=True)}
    left_out = {name for name, _ in found} - without_steps
    assert left_out == {"beam", "lookahead", "dvts", "noisy beam", "noisy parallel"}
    names = {name for name, n in found if n == compared}
    assert {"parallel", "beam", "dvts", "noisy parallel", "noisy beam", "revise 1", f"revise {compared}"} <= names
    assert {trial.name for trial in sweep.timed(most)} == {
        "greedy",
        "parallel",
        *{f"revise {n}" for n in (1, 4, compared)},
    }


def rows_of_samples(*counts):
    """Return the rows of independent attempts made at once, without what depends on time."""
    trial = sweep.samples_of("base", "parallel", counts, ("max", "majority"))
    rows = sweep.run_trial(sweep.Job(Config("sweep"), trial, FOLDER, [0, 1, 2], 0))
    for row in rows:
        row["ledger"] = {**row["ledger"], "seconds": 0.0}
        row["score"] = round(row["score"], 4)  # sums are rounded otherwise in a larger batch
    return sorted(map(json.dumps, rows))


def check_that_fewer_samples_are_the_first_of_more():
    assert rows_of_samples(1, 3, 4) == sorted(rows_of_samples(1) + rows_of_samples(3) + rows_of_samples(4))


def test_fewer_samples_are_the_first_of_more(monkeypatch):
    """Their rows, costs included, are those of a search with so many samples."""
    check_that_fewer_samples_are_the_first_of_more()
    right = sweep.first_attempts

    def last_attempts(solution, n):
        return right(solution._replace(attempts=solution.attempts[-n:]), n)

    monkeypatch.setattr(sweep, "first_attempts", last_attempts)
    caught(check_that_fewer_samples_are_the_first_of_more)


class ThisProcess(contextlib.nullcontext):
    """Stands for a pool of processes."""

    def __init__(self, count):
        super().__init__(self)

    def map(self, function, *iterables):
        return map(function, *iterables)


def test_learning_sweeping_and_reporting(capsys, monkeypatch, tmp_path):
    """All commands on a policy of which nothing but the weights is there; its helpers are learned in bfloat16, with
    adapters for its revisions.
    """
    folder = tmp_path / "policy"
    parts_of_it = ("process", "outcome", "drafter", "revise", "refit", "choice.json")
    shutil.copytree(FOLDER, folder, ignore=lambda path, names: [name for name in names if name in parts_of_it])
    where = ("--model", str(folder), "--json", str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(learn, "fit_verifier", partial(verifier.fit_verifier, steps=20))
    monkeypatch.setattr(sweep, "process_pool", ThisProcess)
    few = ("--questions", "12", "--held-out", "2", "--continuations", "1", "--drafter-seconds", "0.2")
    run_command(monkeypatch, "learn", *where, *few, "--epochs", "1", "--lora-rank", "2", "--dtype", "bfloat16")
    assert "AUC" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    done = json.loads((folder / "learned.json").read_text())
    del done["helpers of revisions"]  # as if it had been stopped in the last part
    (folder / "learned.json").write_text(json.dumps(done))
    argv = ("learn", *where, *few, "--epochs", "1", "--dtype", "bfloat16", "--resume")
    with pytest.raises(UserError, match="the helpers in .*policy were made with --lora-rank 2, not 0"):
        run_command(monkeypatch, *argv)
    run_command(monkeypatch, *argv, "--lora-rank", "2")
    again = {path.relative_to(folder).parts[:2] for path in made if path.stat().st_mtime_ns != made[path]}
    assert again == {("revise", "process"), ("revise", "outcome"), ("revise", "drafter")}
    run_command(monkeypatch, "sweep", *where, "--count", "10", "--chunk", "10", "--workers", "1", "--most", "4")
    run_command(monkeypatch, "speed", *where, "--count", "1", "--most", "4")
    run_command(monkeypatch, "report", *where)
    text = capsys.readouterr().out
    assert "revise 4 4" in text and "N = 4, right by difficulty" in text
    assert (folder / "choice.json").exists() and (tmp_path / "rows-best.png").exists()
    assert (tmp_path / "rows-speed.png").exists()
    run_command(monkeypatch, "--prompt", "7:cfa=", "--budget", "100", "--model", str(folder))
    assert "answer: " in capsys.readouterr().out
    few = ("--count", "10", "--workers", "1", "--most", "4", "--skip-steps", "--max-new", "12")
    run_command(monkeypatch, "sweep", *where, *few)
    run_command(monkeypatch, "report", *where)
    assert "beam" not in capsys.readouterr().out
    rows = read_rows(tmp_path / "rows.jsonl")
    tokens_of_one = {row["ledger"]["decode"] for row in rows if row["search"] == "probe"}
    assert max(tokens_of_one) == 12
    with pytest.raises(UserError, match="--max-new 0: the choices in .*policy were made with --max-new 12"):
        run_command(monkeypatch, "--prompt", "7:cfa=", "--model", str(folder))
    learned = ("learn", *where, "--questions", "8", "--held-out", "1", "--drafter-seconds", "0", "--epochs", "0")
    run_command(monkeypatch, *learned)
    assert not (folder / "revise").exists() and not (folder / "choice.json").exists()
    run_command(monkeypatch, "sweep", *where, *few, "--resume")
    assert "made with learned" in capsys.readouterr().out  # rows of the verifiers before do not count
    assert {row["learned"] for row in read_rows(tmp_path / "rows.jsonl")}.isdisjoint(row["learned"] for row in rows)


def check_own_drafter_is_kept(folder, start: str) -> None:
    """What `learn` trains further is the drafter that the policy has, unless another is named."""
    path = folder / "drafter" / "drafter.safetensors"
    before = load_file(path)
    solver = Solver(folder, Chain(), speculate=False, verify=False, slots=8)
    learn.train_drafter(solver, [], Config(drafter_seconds=1.0), start)
    assert all(torch.allclose(weights, before[name]) for name, weights in load_file(path).items())


def test_learning_continues_with_the_policys_own_drafter(monkeypatch, tmp_path):
    """Here without a step of training; a variant that starts from random weights is caught."""
    monkeypatch.setattr(learn, "learn_from", lambda *args: None)
    folder = shutil.copytree(FOLDER, tmp_path / "policy", ignore=shutil.ignore_patterns("revise", "refit"))
    for start in ("", str(FOLDER / "drafter")):
        check_own_drafter_is_kept(folder, start)
    monkeypatch.setattr(learn, "start_of_drafter", lambda folder, drafter_from: None)
    caught(check_own_drafter_is_kept, folder, "")


def test_rows_of_another_policy_are_not_reported(monkeypatch, tmp_path):
    """choice.json of one policy must not be written into the folder of another."""
    row = {"model": "another", "prompt": "", "seed": 0, "right": 1}
    row |= {"score": 1.0, "flops": 1.0, "ledger": {"decode": 1}, "attempts": [1], "weights": 1}
    rows = []
    for i in range(8):
        rows += [{**row, "prompt": str(i), "search": name, "n": n, "pick": how} for name, n, how in SOME_COLUMNS]
    sweep.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="--model base/chain: the rows in .* are of --model another"):
        run_command(monkeypatch, "report", "--json", str(tmp_path / "rows.jsonl"))
    sweep.write_rows(tmp_path / "rows.jsonl", rows[:-1])  # the last question lacks its beam search
    results = Results(tmp_path / "rows.jsonl")
    assert results.left_out == [Key("beam", 4, "max")] and Key("beam", 4, "max") not in results.right
    sweep.write_rows(tmp_path / "rows.jsonl", [row for row in rows if row["search"] != "oracle"])
    with pytest.raises(UserError, match="oracle is not finished; `sweep --resume` goes on with it"):
        Results(tmp_path / "rows.jsonl")
    sweep.write_rows(tmp_path / "rows.jsonl", rows[: 4 * len(SOME_COLUMNS)])
    with pytest.raises(UserError, match="4 questions, too few to divide them into 5 parts"):
        run_command(monkeypatch, "report", "--json", str(tmp_path / "rows.jsonl"))


def check_resumed_sweep(monkeypatch, path):
    """A sweep that is stopped in the middle and resumed does the rest, and has the rows of a whole one."""
    argv = ("--json", str(path), "--count", "4", "--chunk", "2", "--workers", "1", "--most", "4", "--skip-steps")
    run_command(monkeypatch, "sweep", *argv)
    whole = path.read_text().splitlines()
    right = sweep.run_trial
    jobs = []

    def until(last, job):
        if len(jobs) == last:
            raise KeyboardInterrupt
        jobs.append((job.trial.name, job.trial.n, *job.indices))
        return right(job)

    monkeypatch.setattr(sweep, "run_trial", partial(until, 9))
    with pytest.raises(KeyboardInterrupt):
        run_command(monkeypatch, "sweep", *argv)
    assert path.read_text().splitlines() == whole  # of the sweep before, as long as the new one is not finished
    assert 0 < len(path.with_suffix(".unfinished.jsonl").read_text().splitlines()) < len(whole)
    with pytest.raises(UserError, match="made with aggregate last, not min"):
        run_command(monkeypatch, "sweep", *argv, "--resume", "--aggregate", "min")
    monkeypatch.setattr(sweep, "run_trial", partial(until, None))
    run_command(monkeypatch, "sweep", *argv, "--resume")
    assert len(jobs) == len(set(jobs)) and not path.with_suffix(".unfinished.jsonl").exists()
    assert answers_of(path.read_text().splitlines()) == answers_of(whole)
    run_command(monkeypatch, "sweep", *argv, "--resume", "--most", "8")  # what is there is not added again
    rows = read_rows(path)
    assert len(rows) > len(whole) and len(rows) == len({(*sweep.what_row(row), row["pick"]) for row in rows})


def answers_of(lines):
    """Return what does not depend on rounding and time, of each row."""
    names = ("search", "n", "pick", "seed", "prompt", "answer", "right", "attempts", "flops")
    return sorted([json.loads(line)[name] for name in names] for line in lines)


def test_a_stopped_sweep_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "process_pool", ThisProcess)
    check_resumed_sweep(monkeypatch, tmp_path / "rows.jsonl")
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "process_pool", ThisProcess)
    right = sweep.jobs_of
    monkeypatch.setattr(sweep, "jobs_of", lambda config, folders, done: right(config, folders, set()))
    caught(check_resumed_sweep, monkeypatch, tmp_path / "rows.jsonl")


def test_a_reviser_without_verifiers_is_refused(monkeypatch, tmp_path):
    """`learn` may have been stopped behind the tuning."""
    shutil.copytree(FOLDER, tmp_path / "policy")
    shutil.rmtree(tmp_path / "policy/revise/outcome")
    where = ("--model", str(tmp_path / "policy"))
    message = "revise: no verifier in outcome/"
    with pytest.raises(UserError, match=message):
        run_command(monkeypatch, "sweep", *where, "--json", str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match=message):
        run_command(monkeypatch, *where, "--prompt", "7:cfa=", "--strategy", "revise", "--n", "4")


def test_without_examples_there_is_no_reviser(monkeypatch, solver):
    monkeypatch.setattr(solver, "grade", lambda problem, tokens: False)
    with pytest.raises(UserError, match="--questions 3: there is none with a right and a wrong one"):
        learn.tune_revisions(solver, Config("learn", questions=3))


def test_the_control_is_tuned_on_the_same_targets_in_as_many_steps(monkeypatch, solver):
    plans = {}
    batches = pretrain.batches
    monkeypatch.setattr(learn, "tune", lambda folder, name, plan, config: plans.update({name: plan}))
    monkeypatch.setattr(learn.pretrain, "batches", lambda examples, tokens, rng: batches(examples, 128, rng))
    learn.tune_revisions(solver, Config("learn", questions=24, epochs=2))
    targets = {name: [[target for _, target in batch] for batch in plan] for name, plan in plans.items()}
    assert targets["revise"] == targets["refit"] and len(plans["revise"]) > 2
    shown, plain = ([len(prompt) for batch in plans[name] for prompt, _ in batch] for name in ("revise", "refit"))
    assert sum(shown) > sum(plain) and all(a >= b for a, b in zip(shown, plain))


@cases(50)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=30), st.integers(1, 200))
def test_a_batch_has_at_most_so_many_tokens(lengths, most):
    examples = [([1] * prompt, [i] * completion) for i, (prompt, completion) in enumerate(lengths)]
    batches = pretrain.batches(examples, most, random.Random(0))
    assert sorted(example for batch in batches for example in batch) == sorted(examples)
    for batch in batches:
        longest = max(len(prompt) + len(completion) for prompt, completion in batch)
        assert len(batch) == 1 or longest * len(batch) <= most


def run_command(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["test_time", *argv])
    main()


def test_answering_one_question(capsys, monkeypatch):
    run_command(monkeypatch, "--prompt", "7:cfa=", "--strategy", "beam", "--n", "8", "--model", str(FOLDER))
    text = capsys.readouterr().out
    assert "answer: " in text and "MFLOPs" in text and "#" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--prompt"),
        (["--prompt", "x", "--task", "math", "--data", "nowhere.jsonl"], "search needs a task with steps"),
        (["--prompt", "x", "--task", "countdown"], "no token for '.n', which ends a step"),
        (["sweep", "--most", "5"], "--most 5: must be 4, 8, 16, 32 or 64"),
        (["sweep", "--max-new", "-1"], "--max-new -1: must be at least 0"),
        (["sweep", "--slots", "32"], "--slots 32: must be at least 64 with --most 64"),
        (["sweep", "--json", "tests"], "must be the name of a file"),
        (["sweep", "--json", ""], "must be the name of a file"),
        (["sweep", "--json", "tests/conftest.py/rows.jsonl"], "cannot write tests/conftest.py"),
        (["speed", "--json", "tests/conftest.py/rows.jsonl"], "cannot write tests/conftest.py"),
        (["sweep", "--verifier-noise", "1.5"], "must be a share, 0 to 1"),
        (["report", "--json", "tests/conftest.py", "--model", str(FOLDER)], "not the rows of a sweep"),
        (["learn", "--slots", "4", "--model", str(FOLDER)], "--slots 4: must be at least 8"),
        (["learn", "--drafter-from", "nowhere", "--model", str(FOLDER)], "nowhere"),
        (["--prompt", "7:cfa=", "--strategy", "beam", "--n", "6"], "must be a multiple of 4 for --strategy beam"),
        (["learn", "--held-out", "0"], "--held-out 0: must be at least 1"),
        (["--prompt", "7:cfa=", "--model", "base"], "no token for 'c' of the prompt '7:cfa='"),
        (["learn", "--model", "base/chain/drafter"], "no policy in this folder"),
        (["report", "--json", "nowhere.jsonl", "--model", str(FOLDER)], "test_time sweep"),
    ],
)
def test_mistakes_are_reported(monkeypatch, argv, message):
    with pytest.raises(UserError, match=message):
        run_command(monkeypatch, *argv)


def test_the_policy_is_found_from_any_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_command(monkeypatch, "--prompt", "7:cfa=", "--strategy", "majority", "--n", "2")
    assert "answer: " in capsys.readouterr().out
    with pytest.raises(UserError, match="no policy in this folder"):  # but nothing is written beside the scripts
        run_command(monkeypatch, "learn")


def test_choosing_by_predicted_difficulty(capsys, monkeypatch):
    """A probe attempt is made, and paid for, only where the choice depends on it."""
    single, hard = Key("greedy", 1, "majority"), Key("beam", 4, "weighted")
    contents = Choices("last", [0.9, 0.8, 0.7, 0.6], {"20.0": [single] * 5, "50.0": [single] * 4 + [hard]})
    monkeypatch.setattr(answer, "read_choices", lambda folder: contents)
    monkeypatch.setattr(Choices, "difficulty", lambda self, easiness: 4)
    for budget, probed in (("10", False), ("49", False), ("50", True), ("400", True)):
        run_command(monkeypatch, "--prompt", "7:cfaponm=", "--budget", budget, "--model", str(FOLDER))
        text = capsys.readouterr().out
        assert ("difficulty 5 of 5" in text) == ("(beam 4, weighted" in text) == probed


def test_a_budget_includes_the_probe_attempt():
    """Two fifths of the questions need the strategy of 10 tokens; with the probe's 5 it fits 9 tokens a question, and
    does not fit 8.
    """
    bins = np.arange(1000) % 5
    right = {"cheap": (bins < 3) * 1.0, "dear": (bins >= 3) * 1.0}
    cost = {"cheap": np.full(1000, 1.0), "dear": np.full(1000, 10.0)}
    everything = np.ones(1000, bool)

    def chosen(budget, probe):
        by_bin, predicted = optimal.choose(right, cost, bins, everything, budget, probe, np.arange(1000))
        return predicted and [by_bin[b] for b in range(5)]

    assert chosen(9.7, 5.0) == ["cheap"] * 3 + ["dear"] * 2
    assert not chosen(9.5, 5.0) and chosen(9.5, 0.0)
