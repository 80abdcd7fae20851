"""Test-time compute: what a trained policy and its drafter are good for. How should an inference budget be spent on a question?

After *Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters* (Snell, Lee, Xu, Kumar 2024, arXiv 2408.03314).

    parallel(N)          N attempts, independent of each other
    beam(N, M)           step by step: of N beginnings keep the N / M that the verifier likes best, continue each in M ways
    beam(N, M, look=k)   judge a beginning by the verifier's score k greedy steps further on (lookahead); those steps are thrown away, and paid for
    beam(N, M, diverse)  N / M separate trees, in each keep the best one (DVTS)
    revise(N, L)         N / L chains of L attempts, each made with the last four attempts of its chain in view, by a policy that was fine-tuned for it

"Width" has three meanings in the wild: N (beginnings held), N / M (kept) and M (ways to continue). Here it is always said which.

An attempt's score is the verifier's after its last step (or the lowest, or the product: --aggregate). The answer is picked from all attempts by

    max        the answer of the best attempt
    weighted   the answer with the largest sum of scores
    majority   the answer that most attempts give: needs no verifier
    chains     (revise) the weighted answer within each chain, then the one with the largest sum over chains

Ledger. Each strategy pays for policy tokens (prefilled, once for all that share a prefix; emitted; spent on drafts that were wrong), drafter tokens, steps that
the verifier read, FLOPs (2 x weights x tokens; attention left out) and seconds. Speculation adds FLOPs and saves seconds.

Compute-optimal: for each difficulty (quintile) and budget the strategy that was best on one half of the questions, reported on the other half.
Difficulty is predicted: the score of one attempt made for that purpose alone, and paid for (four tell more, but cost more than they win); or, as a bound,
known: pass@1 over sixteen others. Budgets hold on average: hard questions may get more than easy ones.

A strategy is a generator: it yields what it wants written, gets it, and returns its attempts. So the code reads as if for one question, while all questions that
are asked at once share the engine's batches.

    python test_time.py --prompt "7:cfa="          answers one question and shows what was tried
    python test_time.py learn                      verifier, revision policy and drafters for a policy
    python test_time.py sweep, report, speed       the figures in the README (`make test-time`)

Left out: prefix sharing between requests (a beginning is prefilled again at each of its steps, and charged), Monte-Carlo tree search, ReST-EM for revisions.
"""

import argparse
import difflib
import json
import math
import random
import time
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pretrain
from drafter import Drafter, LearnedDrafts, warm_start
from report import pyplot
from rollout import Engine, Group, Sampling, load_model, run, sequence_seed, stop_tokens
from strategy import Goodput, arms
from tasks import Problem, UserError, encode_prompt, make_task
from train_grpo import write_atomically
from verifier import Verifier, auc, fit, labelled_steps, step_features

# ---------------------------------------------------------------- attempts and what they cost


@dataclass(frozen=True)
class Attempt:
    """An attempt, whole or begun."""
    seed: int
    tokens: tuple = ()      # so far
    scores: tuple = ()      # of its steps, by the process verifier
    outcome: float = 0.0    # by the outcome verifier
    done: bool = False
    answer: str = None      # when done; None: it gives none
    before: tuple = ()      # tokens between question and attempt: earlier attempts
    tree: int = 0           # the tree or chain it belongs to


@dataclass(frozen=True)
class Want:
    """Continuations that a strategy asks for, one of each path; they share one prefix. step: only to the end of the next step."""
    paths: list
    step: bool = False
    greedy: bool = False


@dataclass
class Ledger:
    """What a question has cost, in tokens (verifier: in steps) and seconds."""
    prefill: int = 0
    decode: int = 0
    rejected: int = 0
    drafter: int = 0
    verifier: int = 0
    seconds: float = 0.0

    def flops(self, sizes):
        """sizes: weights of policy, drafter, verifier."""
        return 2.0 * (sizes[0] * (self.prefill + self.decode + self.rejected) + sizes[1] * self.drafter + sizes[2] * self.verifier)


# ---------------------------------------------------------------- strategies


def parallel(seed, n, greedy=False):
    """seed(k): of attempt k."""
    return (yield [Want([Attempt(seed(k)) for k in range(n)], greedy=greedy)])[0]


def beam(seed, n, m, look=0, diverse=False, aggregate="last"):
    """See above. m = 1 is parallel(n), token by token: a path's first continuation keeps its seed."""
    paths = (yield [Want([Attempt(seed(k), tree=k // m) for k in range(n)], step=True)])[0]
    while not all(p.done for p in paths):
        value = yield from ahead(paths, look, aggregate)
        order = sorted(range(len(paths)), key=lambda i: -value[i])  # stable: equal ones in the order they were made
        if diverse:
            first = {paths[i].tree: i for i in reversed(order)}  # the best of each tree
            kept = [paths[i] for i in sorted(first.values())]
        else:
            kept = [paths[i] for i in sorted(order[:max(1, n // m)])]
        wants = [Want([replace(p, seed=sequence_seed(p.seed, len(p.tokens), j) if j else p.seed) for j in range(m)], step=True) for p in kept if not p.done]
        paths = [p for p in kept if p.done] + [p for part in (yield wants) for p in part]
    return paths


def ahead(paths, look, aggregate):
    """The verifier's opinion of each path after `look` more greedy steps."""
    probes = list(paths)
    for _ in range(look):
        rest = [i for i, p in enumerate(probes) if not p.done]
        for i, (p,) in zip(rest, (yield [Want([probes[i]], step=True, greedy=True) for i in rest]) if rest else ()):
            probes[i] = p
    return [score(p, aggregate) for p in probes]


def revise(seed, n, length, again, view=4):
    """again: the tokens that part attempts."""
    chains = [[] for _ in range(max(1, n // length))]
    for i in range(length):
        befores = [tuple(t for p in chain[-view:] for t in (*p.tokens[:-1], *again)) for chain in chains]
        found = yield [Want([Attempt(seed((c, i)), before=before, tree=c)]) for c, before in enumerate(befores)]
        for chain, (p,) in zip(chains, found):
            chain.append(p)
    return [p for chain in chains for p in chain]


# ---------------------------------------------------------------- picking an answer


def score(path, aggregate="last"):
    """Of an attempt, from the scores of its steps (0 if it has none)."""
    return {"last": lambda s: s[-1], "min": min, "product": math.prod}[aggregate](path.scores) if path.scores else 0.0


def vote(paths, weight=lambda path: 1.0):
    """(answer with the largest sum of weights, that sum); (None, 0) if no attempt gives an answer. The first one given wins ties."""
    totals = defaultdict(float)
    for p in paths:
        if p.answer is not None:
            totals[p.answer] += weight(p)
    return max(totals.items(), key=lambda item: item[1], default=(None, 0.0))


def pick(paths, how, aggregate="last"):
    """The answer to a question, from all attempts at it."""
    weight = partial(score, aggregate=aggregate)
    if how == "max":
        return max((p for p in paths if p.answer is not None), key=weight, default=Attempt(0)).answer
    if how == "outcome":
        return max((p for p in paths if p.answer is not None), key=lambda p: p.outcome, default=Attempt(0)).answer
    if how == "chains":
        totals = defaultdict(float)
        for tree in sorted({p.tree for p in paths}):
            answer, total = vote([p for p in paths if p.tree == tree], weight)
            totals[answer] += total
        return max(totals, key=totals.get, default=None)
    return vote(paths, weight if how == "weighted" else lambda p: 1.0)[0]


# ---------------------------------------------------------------- the engine behind them


class Solver:
    """A policy with its verifiers and its drafter, from their folder, and the bookkeeping. noise: share of the verifier's scores that are turned round."""

    def __init__(self, folder, task, speculate=True, verify=True, slots=256, noise=0.0):
        if not hasattr(task, "step_end"):
            raise UserError(f"--task {type(task).__name__.lower()}: search needs a task that tells steps and final answers (see tasks.py): chain or gsm8k")
        self.task, self.noise, self.max_new = task, noise, task.longest
        self.policy, self.tokenizer = load_model(str(folder), "cuda" if torch.cuda.is_available() else "cpu")
        self.stops, width = stop_tokens(self.policy, self.tokenizer), self.policy.config.hidden_size
        step_end = self.tokenizer.encode(task.step_end, add_special_tokens=False)
        if len(step_end) != 1:
            raise UserError(f"{folder}: its tokenizer has no single token for the end of a step, {task.step_end!r}")
        self.ends = self.stops | set(step_end)
        self.again = tuple(self.tokenizer.encode(task.again, add_special_tokens=False))
        self.verifiers = {name: Verifier.load(Path(folder) / name, width) for name in ("process", "outcome") if verify and (Path(folder) / name).exists()}
        drafters = {}
        if speculate and (Path(folder) / "drafter").exists():
            drafter = Drafter(self.policy)
            drafter.load(Path(folder) / "drafter")
            drafters = {"learned": LearnedDrafts(drafter)}
        self.choose = Goodput(arms(["learned"])) if drafters else None
        self.engine = Engine(self.policy, self.stops, slots, keep_hidden=True, drafters=drafters, frozen=True)
        count = lambda module: sum(p.numel() for p in module.parameters()) if module else 0
        looked_up = self.policy.get_input_embeddings().weight  # not multiplied with, unless it is the head, too
        self.sizes = (count(self.policy) - looked_up.numel() * (looked_up is not self.policy.get_output_embeddings().weight), count(drafters and drafter), count(self.verifiers.get("process")))

    def encode(self, problem):
        return encode_prompt(problem, self.tokenizer)

    def grade(self, problem, tokens):
        return self.task.grade(problem, self.tokenizer.decode(tokens)).strict

    def generate(self, groups, title="", step=False, greedy=False):
        self.engine.stop_at(self.ends if step else self.stops)
        self.engine.reserve(max(len(g.prompt) - g.begun for g in groups) + self.max_new)
        sampling = Sampling(0.0 if greedy else 1.0, max_new=self.max_new)
        choose = None if step else self.choose  # steps are shorter than what the drafter would have to read before its first guess: 0.6x with it
        return tqdm(self.engine.generate(groups, sampling, choose), total=sum(len(g.seeds) for g in groups), desc=title, disable=not title, mininterval=1)

    def solve(self, problems, strategy, *seed):
        """strategy(seed function) -> a generator. -> for each problem its attempts, and its Ledger."""
        started, ids = time.time(), [self.encode(p) for p in problems]
        books, found, asked = [Ledger() for _ in problems], [None] * len(problems), {}
        running = [strategy(lambda k, name=tuple(i): sequence_seed(*seed, name, k)) for i in ids]

        def go(i, answer):
            try:
                asked[i] = running[i].send(answer)
            except StopIteration as end:
                found[i] = end.value

        for i in range(len(problems)):
            go(i, None)
        while asked:
            now = dict(asked)
            asked.clear()
            replies = {(i, j): [None] * len(want.paths) for i, wants in now.items() for j, want in enumerate(wants)}
            for step, greedy in sorted({(w.step, w.greedy) for wants in now.values() for w in wants}):
                groups, wanted = [], {}
                for i, wants in now.items():
                    for j, w in enumerate(wants):
                        if (w.step, w.greedy) == (step, greedy):
                            p, wanted[i, j] = w.paths[0], w
                            groups.append(Group((i, j), ids[i] + list(p.before + p.tokens), [x.seed for x in w.paths], len(p.tokens)))
                            books[i].prefill += len(groups[-1].prompt) - 1
                made = list(self.generate(groups, step=step, greedy=greedy))
                for r, path in zip(made, self.judge(made, [len(ids[r.group[0]]) for r in made], [wanted[r.group].paths[r.sample] for r in made])):
                    book = books[r.group[0]]
                    book.decode += len(r.tokens)
                    book.rejected += r.rounds + r.drafts - len(r.tokens)
                    book.drafter += r.drafts + (len(r.prompt) + len(r.tokens) if r.drafts else 0)  # guesses, and true tokens that it caught up with
                    book.verifier += len(path.scores) - len(wanted[r.group].paths[r.sample].scores)
                    replies[r.group][r.sample] = path
            for i, wants in now.items():
                go(i, [replies[i, j] for j in range(len(wants))])
        for book in books:
            book.seconds = (time.time() - started) / len(problems)
        return list(zip(found, books))

    def judge(self, made, questions, paths):
        """The paths with what was written, scored. questions: lengths of the questions in tokens."""
        scores = {name: [[] for _ in made] for name in ("process", "outcome")}
        if self.verifiers and made:
            features, counts = step_features(self.policy, made, [q + len(p.before) for q, p in zip(questions, paths)], self.ends)
            scores.update({name: [x.tolist() for x in v(features, counts).split(counts)] for name, v in self.verifiers.items()})
        for r, path, process, outcome in zip(made, paths, scores["process"], scores["outcome"]):
            tokens = path.tokens + tuple(r.tokens)
            done = tokens[-1] in self.stops or len(tokens) >= self.max_new
            fresh = process[len(path.scores):]
            if self.noise:
                fresh = [1 - s if sequence_seed("noise", path.seed, len(path.scores) + j) < self.noise * 2**63 else s for j, s in enumerate(fresh)]
            yield replace(path, tokens=tokens, scores=(*path.scores, *fresh), outcome=outcome[-1] if outcome else 0.0, done=done,
                          answer=self.task.final(self.tokenizer.decode(list(tokens))) if done else None)


# ---------------------------------------------------------------- learning what search needs


def learn(args):
    """For the policy in --model: process and outcome verifier, drafter, and a revision policy (--model/revise) with its own; --model/refit is the control that was
    tuned on the same right answers without earlier attempts in view."""
    task, folder = make_task(args.task, args.data), Path(args.model)
    problems = lambda split, first, count: [task.problem(split, i) for i in range(first, first + count)]
    solver = Solver(folder, task, speculate=False, verify=False)
    plain = lambda some: [(p, solver.encode(p)) for p in some]
    teach(solver, folder, plain(problems("train", 0, args.questions)), plain(problems("test", 10**6, 200)), args)

    rng = random.Random(args.seed)
    for name, rows in revision_rows(solver, plain(problems("train", 2 * 10**6, args.questions)), rng).items():
        model, tokenizer = load_model(str(folder))
        pretrain.learn(model.train(), [b for _ in range(args.epochs) for b in pretrain.batches(rows, 2048, rng)], 1.5e-3, name)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    reviser = Solver(folder / "revise", task, speculate=False, verify=False)

    def in_chains(split, first, count):  # its verifier learns where it will be used: with its own earlier attempts in view
        some = problems(split, first, count)
        chains = reviser.solve(some, partial(revise, n=4, length=4, again=reviser.again), args.seed, "chains")
        return [(p, reviser.encode(p) + [t for a in paths[:rng.randint(0, 4)] for t in (*a.tokens[:-1], *reviser.again)]) for p, (paths, _) in zip(some, chains)]

    teach(reviser, folder / "revise", in_chains("train", 3 * 10**6, args.questions), in_chains("test", 2 * 10**6, 200), args)


def revision_rows(solver, asked, rng, right_in_view=0.6):
    """name -> (prompt ids, right attempt) to tune on: "refit" has only the question in its prompts, "revise" also 0 to 4 attempts at it.

    Those are wrong ones, as in the paper, and, with the chance right_in_view, any number of them right ones: whoever has seen wrong ones only learns that what it sees is
    wrong, and its second attempt is right less often than its first (0.66 after 0.91)."""
    tries, rows = defaultdict(lambda: ([], [])), {"revise": [], "refit": []}  # question -> (wrong, right) attempts
    for r in solver.generate([Group(i, ids, [sequence_seed("tries", i, k) for k in range(8)]) for i, (_, ids) in enumerate(asked)], "attempts"):
        tries[r.group][solver.grade(asked[r.group][0], r.tokens)].append(r.tokens)
    for i, (wrong, right) in sorted(tries.items()):
        for goal in rng.sample(right, min(2, len(right))) if wrong else ():
            count = rng.randint(0, 4)
            good = rng.randint(0, count) if rng.random() < right_in_view else 0
            shown = rng.sample(wrong, min(count - good, len(wrong)))
            shown.sort(key=lambda t: difflib.SequenceMatcher(None, t, goal).ratio())  # the nearest last: what is right in it can be kept
            shown += [goal] * good
            if good and rng.random() < 0.5:
                rng.shuffle(shown)
            rows["revise"].append((asked[i][1] + [t for attempt in shown for t in (*attempt[:-1], *solver.again)], goal))
            rows["refit"].append((asked[i][1], goal))
    return rows


def teach(solver, folder, asked, held, args):
    """Train both verifiers and the drafter on a policy's own attempts, and say how well the verifiers tell good steps from bad."""
    features, counts, labels, outcomes, _ = labelled_steps(solver, asked, 1, args.continuations, args.seed)
    blind = features.clone()
    blind[:, -2:] = 0  # without the log-probabilities
    made = {"process": fit(features, counts, labels), "outcome": fit(features, counts, outcomes), "hidden state only": fit(blind, counts, labels)}
    for name in ("process", "outcome"):
        made[name].save(folder / name)
    features, counts, labels, _, place = labelled_steps(solver, held, 8, 8, (args.seed, "held out"))
    lowest = torch.cat([part.cummin(0).values for part in features[:, -2].split(counts)])
    scores = {**{name: v(features, counts) for name, v in made.items()}, "lowest log p so far": lowest, "lowest log p of the step": features[:, -2]}
    print(f"{folder}: AUC of steps of {len(held)} held-out questions   pooled   within question and step")
    for name, s in scores.items():
        print(f"{name:>50} {auc(s, labels):9.3f} {auc(s, labels, place):9.3f}")
    torch.manual_seed(args.seed)
    drafter = Drafter(solver.policy)
    groups = [Group(i, ids, [sequence_seed(args.seed, "drafter", i, k) for k in range(4)]) for i, (_, ids) in enumerate(asked[:2000])]
    solver.engine.stop_at(solver.stops)
    solver.engine.reserve(max(len(g.prompt) for g in groups) + solver.max_new)
    warm_start(drafter, solver.engine, groups, Sampling(max_new=solver.max_new), args.drafter_seconds, args.seed)
    drafter.save(folder / "drafter")


# ---------------------------------------------------------------- the sweep


def searches(again, m=4):
    """(solver, search, n, strategy, picks) of everything that is compared. again: of the solvers that are there, by name, the tokens that part attempts."""
    picks = ("max", "weighted", "majority", "outcome")
    found = [("base", "greedy", 1, partial(parallel, n=1, greedy=True), ("majority",)), ("base", "probe", 1, partial(parallel, n=1), ("weighted",)),
             ("base", "oracle", 16, partial(parallel, n=16), ("weighted",))]
    found += [("base", "parallel", n, partial(parallel, n=n), picks) for n in (1, 2, 4, 8, 16, 32, 64)]
    found += [("base", "beam", n, partial(beam, n=n, m=m), picks[:2]) for n in (4, 8, 16, 32, 64)]
    found += [("base", "lookahead", n, partial(beam, n=n, m=m, look=1), picks[:2]) for n in (4, 16)]
    found += [("base", "dvts", n, partial(beam, n=n, m=m, diverse=True), picks[:2]) for n in (16, 64)]
    found += [("noisy", name, n, s, ("max", "weighted")) for name, s, n in (("noisy parallel", partial(parallel, n=16), 16), ("noisy beam", partial(beam, n=16, m=m), 16))]
    if "revise" in again:
        found += [("revise", f"revise {length}", n, partial(revise, n=n, length=length, again=again["revise"]), ("chains", "weighted", "majority"))
                  for n, lengths in ((4, (1, 4)), (16, (1, 2, 4, 8, 16))) for length in lengths]
        found += [("refit", "refit parallel", n, partial(parallel, n=n), ("majority",)) for n in (1, 16)]
    if "large" in again:
        found += [("large", "large greedy", 1, partial(parallel, n=1, greedy=True), ("majority",))]
    return found


def sweep_part(job):
    """All strategies on some questions, in a process of its own -> rows."""
    args, indices, seed = job
    torch.set_num_threads(1)
    task, folder, rows = make_task(args.task, args.data), Path(args.model), []
    problems = [task.problem("test", i) for i in indices]
    folders = {"base": folder, "noisy": folder, "revise": folder / "revise", "refit": folder / "refit", "large": Path(args.large or "nowhere")}
    solvers = {name: Solver(where, task, speculate=False, noise=args.verifier_noise * (name == "noisy")) for name, where in folders.items() if (where / "config.json").exists()}
    for name, search, n, strategy, picks in searches({k: s.again for k, s in solvers.items()}):
        key = search if search in ("probe", "oracle") else "attempts"  # samples that judge difficulty are others than those that are spent
        for problem, (paths, book) in zip(problems, solvers[name].solve(problems, strategy, seed, key)):
            row = {"prompt": problem.trace or problem.prompt, "search": search, "n": n, "seed": seed, "aggregate": args.aggregate, "noise": args.verifier_noise, "weights": solvers[name].sizes[0], "ledger": asdict(book),
                   "attempts": [int(solvers[name].grade(problem, list(p.tokens))) for p in paths], "score": sum(score(p, args.aggregate) for p in paths) / len(paths)}
            for how in picks:
                answer = pick(paths, how, args.aggregate)
                right = next((good for p, good in zip(paths, row["attempts"]) if p.answer == answer), 0)
                policy, drafter, verifier = solvers[name].sizes
                rows.append({**row, "pick": how, "answer": answer, "right": right, "flops": book.flops((policy, drafter, verifier * (how != "majority")))})
    return rows


def distinct(task, count):
    """Indices of the first `count` held-out questions of which no two are alike (fewer, if ten times as many do not hold so many)."""
    first = {}
    for i in range(10 * count):
        first.setdefault(task.problem("test", i).prompt, i)
    return list(first.values())[:count]


def sweep(args):
    """Every strategy on --count held-out questions, no two of them alike -> rows in --json, one per question, strategy and way to pick: what `report` draws from."""
    for name, folder in (("model", args.model), ("large", args.large or args.model)):
        if not (Path(folder) / "config.json").exists():
            raise UserError(f"--{name} {folder}: no policy there")
    if not (Path(args.model) / "process").exists():
        raise UserError(f"--model {args.model}: it has no verifier to search with; `python test_time.py learn --model {args.model}` makes one")
    task = make_task(args.task, args.data)
    indices = distinct(task, args.count)
    jobs = [(args, indices[first:first + args.chunk], seed) for seed in range(args.seed, args.seed + args.seeds) for first in range(0, len(indices), args.chunk)]
    with ProcessPoolExecutor(args.workers, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        parts = list(tqdm(pool.map(sweep_part, jobs), total=len(jobs), desc="sweep", unit="part"))
    write_atomically(Path(args.json), "".join(json.dumps(row) + "\n" for part in parts for row in part))
    print(f"wrote {args.json}")


# ---------------------------------------------------------------- statistics


def quintiles(easiness):
    """0 (easiest) to 4 (hardest), of equal size; ties in the order of the questions."""
    rank = np.empty(len(easiness), int)
    rank[np.argsort(-np.asarray(easiness), kind="stable")] = np.arange(len(easiness))
    return rank * 5 // len(easiness)


def best_within(right, cost, questions, budget):
    """The strategy whose mean cost over these questions is within the budget and that is right most often, the cheaper one of equals; None: all are too dear."""
    good = [k for k in right if questions.any() and cost[k][questions].mean() <= budget]
    return max(good, key=lambda k: (right[k][questions].mean(), -cost[k][questions].mean()), default=None)


def allocate(right, cost, questions, bins, budget):
    """{bin: strategy} that is right most often at a mean cost within the budget. In each bin the best of right - price * cost, at the lowest price that keeps the budget
    (a Lagrange multiplier): so hard questions may cost more than easy ones. None: not even the cheapest strategies are within it, or a bin is empty."""
    where, names = [questions & (bins == b) for b in sorted(set(bins))], list(right)
    if not all(w.any() for w in where):
        return None
    r, c = (np.array([[x[k][w].mean() for k in names] for w in where]) for x in (right, cost))  # (bins, strategies)
    share = np.array([w.sum() for w in where]) / questions.sum()
    for price in np.geomspace(1e-6, 1e3, 500) / budget:
        best = (r - price * c).argmax(1)
        if share @ c[range(len(c)), best] <= budget:
            return {b: names[i] for b, i in zip(sorted(set(bins)), best)}


def compute_optimal(right, cost, bins, folds, budget, look=0.0, question=None):
    """right, cost: strategy -> array over questions. Strategies are allotted to bins on one fold, and reported on the other. look: what it costs to see the bin, paid
    where the bins are used. They are used if, on the first fold, they beat the best strategy for all (that does not look) by three standard errors: they are the best
    of many, so they look better than they are. question: whose rows they are, see `interval`; each its own if None.

    -> (right (Q,), cost (Q,), {(fold, bin): strategy}); None where the budget buys nothing."""
    outcome, paid, chosen = np.zeros(len(bins)), np.zeros(len(bins)), {}
    looked, question = {k: c + look for k, c in cost.items()}, np.arange(len(bins)) if question is None else question
    for fold in (0, 1):
        known = folds != fold
        one = best_within(right, cost, known, budget)
        if one is None:
            return None
        each = allocate(right, looked, known, bins, budget) or {}
        gain = sum(((right[k] - right[one]) * (bins == b) for b, k in each.items()), np.zeros(len(bins)))[known]
        gain = np.bincount(np.unique(question[known], return_inverse=True)[1], gain)  # by question
        use, price = (each, looked) if gain.sum() > 3 * gain.std() * len(gain)**0.5 else (dict.fromkeys(set(bins), one), cost)
        for b, k in use.items():
            here = (bins == b) & (folds == fold)
            outcome[here], paid[here], chosen[fold, b] = right[k][here], price[k][here], k
    return outcome, paid, chosen


def interval(x, question, draws=1000):
    """Half the width of the 95 % bootstrap interval of a mean over rows x (R,). question (R,): whose rows they are; all rows of a question are drawn together, since
    they are not independent. Of a difference: paired."""
    rng = np.random.default_rng(0)
    total, count = np.bincount(question, x), np.bincount(question)
    drawn = rng.integers(0, len(count), (draws, len(count)))
    return 1.96 * np.std(total[drawn].sum(1) / count[drawn].sum(1))


def matched_samples(m, r, backward=3.0):
    """How many samples of a small model cost, training included, what one sample of an m times larger model costs; r: tokens inferred per token of training.
    backward: 3 as in the paper's first version (6 N D for training against 2 N D), 1.5 as in the conference version."""
    return m + backward * (m - 1) / r


# ---------------------------------------------------------------- what came of the sweep


class Sweep:
    """The rows of a sweep as arrays over the questions, always in the same order. key: (search, n, pick)."""

    def __init__(self, path):
        rows = sorted((json.loads(line) for line in open(path)), key=lambda r: (r["prompt"], r["seed"]))
        columns = defaultdict(list)
        for r in rows:
            columns[r["search"], r["n"], r["pick"]].append(r)
        self.right = {key: np.array([r["right"] for r in mine], float) for key, mine in columns.items()}
        self.attempts = {key: np.array([r["attempts"] for r in mine], float) for key, mine in columns.items() if key[0] not in ("beam", "lookahead", "dvts", "noisy beam")}
        self.cost = {unit: {key: np.array([of(r) for r in mine], float) for key, mine in columns.items()}
                     for unit, of in (("tokens", lambda r: r["ledger"]["decode"]), ("flops", lambda r: r["flops"]))}
        self.weights, self.settings = {r["search"]: r["weights"] for r in rows}, rows[0]
        looks = columns["probe", 1, "weighted"]
        self.easiness = np.array([r["score"] for r in looks])
        self.bins = {"predicted": quintiles(self.easiness), "known": quintiles(self.attempts["oracle", 16, "weighted"].mean(1))}
        self.folds = np.array([zlib.crc32(r["prompt"].encode()) % 2 for r in looks])  # all that is known of a question is in one fold
        self.plain = [key for key in columns if key[0] in ("greedy", "parallel", "beam", "lookahead", "dvts") and key[2] != "outcome"]
        self.question = np.unique([r["prompt"] for r in looks], return_inverse=True)[1]  # seeds are further rows of a question

    def interval(self, x, where=slice(None)):
        return interval(x[where], np.unique(self.question[where], return_inverse=True)[1])

    def by_bin(self, x, of=lambda x, where: x[where].mean()):
        return [of(x, self.bins["known"] == b) for b in range(5)]

    def choices(self, unit):
        """(right, cost) of what may be chosen from."""
        return {k: self.right[k] for k in self.plain}, {k: self.cost[unit][k] for k in self.plain}

    def budgets(self, unit, count):
        cost = self.cost[unit]
        return np.geomspace(cost["greedy", 1, "majority"].mean() * 1.01, max(cost[k].mean() for k in self.plain) * 1.01, count)

    def optimal(self, unit, budget, difficulty):
        """compute_optimal by known or predicted difficulty, or None: for all questions alike. What prediction costs is charged."""
        bins = np.zeros(len(self.folds), int) if difficulty is None else self.bins[difficulty]
        return compute_optimal(*self.choices(unit), bins, self.folds, budget, self.cost[unit]["probe", 1, "weighted"] if difficulty == "predicted" else 0.0, self.question)


RATIOS = (1, 2, 4, 8, 16)  # lengths of the chains among 16 revisions


def report(args):
    """Tables and figures from the rows of `sweep`, and the choices that --strategy auto makes, in --model/choice.json."""
    s = Sweep(args.json)
    numbers = lambda values: "  ".join(f"{x:6.3f}" for x in values)
    print(f"{s.question.max() + 1} questions, {len(s.folds)} rows for each strategy\n{'strategy':>24} {'pick':>9} {'right':>7} {'+-':>6} {'tokens':>8} {'MFLOPs':>8}")
    for key in sorted(s.right):
        print(f"{key[0] + ' ' + str(key[1]):>24} {key[2]:>9} {s.right[key].mean():7.3f} {s.interval(s.right[key]):6.3f} {s.cost['tokens'][key].mean():8.0f} {s.cost['flops'][key].mean() / 1e6:8.0f}")
    for unit in ("tokens", "flops"):
        print(f"\nthe best strategy for all at equal budget in {unit}, and compute-optimal ones\n{'budget':>10} {'for all':>8} {'by predicted difficulty':>26} {'by known difficulty':>26}")
        for budget in s.budgets(unit, 12):
            alike, *others = (s.optimal(unit, budget, d) for d in (None, "predicted", "known"))
            if alike:
                print(f"{budget:10.3g} {alike[0].mean():8.3f} " + " ".join(f"{x[0].mean():8.3f} ({x[0].mean() - alike[0].mean():+.3f} +- {s.interval(x[0] - alike[0]):.3f})" for x in others))
    right, cost = s.choices("tokens")
    everyone, bins = np.ones(len(s.folds), bool), s.bins["predicted"]
    table = {float(b): [(allocate(right, cost, everyone, bins, b) or {}).get(x, ("greedy", 1, "majority")) for x in range(5)] for b in s.budgets("tokens", 12)}
    edges = [float(s.easiness[bins == b].min()) for b in range(4)]
    write_atomically(Path(args.model) / "choice.json", json.dumps({"aggregate": s.settings["aggregate"], "edges": edges, "choices": table}))

    print("\nN = 16, right by difficulty (fifths by pass@1 in 16 other attempts)")
    for key in (("parallel", 1, "majority"), ("parallel", 16, "majority"), ("parallel", 16, "max"), ("parallel", 16, "weighted"), ("beam", 16, "weighted"),
                ("noisy parallel", 16, "weighted"), ("noisy beam", 16, "weighted")):
        print(f"{' '.join(map(str, key)):>28}  {numbers(s.by_bin(s.right[key]))}")
    lead = s.right["noisy parallel", 16, "weighted"] - s.right["noisy beam", 16, "weighted"]
    print(f"{'noisy: parallel - beam, +-':>28}  {numbers(s.by_bin(lead))}\n{'':>28}  {numbers(s.by_bin(lead, s.interval))}")
    if ("revise 1", 16, "weighted") in s.right:
        chains = s.attempts["revise 16", 16, "weighted"]
        print(f"\nrevisions, pass@1 by attempt: {numbers(chains.mean(0))}\ncontrols: the same policy without attempts in view {s.attempts['revise 1', 16, 'weighted'].mean():.3f}, "
              f"tuned without attempts {s.attempts['refit parallel', 16, 'majority'].mean():.3f}, before tuning {s.attempts['parallel', 16, 'majority'].mean():.3f}")
        before, after = chains[:, :-1], chains[:, 1:]
        print(f"right attempts revised to wrong {1 - after[before == 1].mean():.1%}, wrong ones to right {after[before == 0].mean():.1%}")
        for length in RATIOS:
            mine = {how: s.right[f"revise {length}", 16, how] for how in ("chains", "weighted", "majority")}
            print(f"{'chains of ' + str(length):>14}: " + "  ".join(f"{how} {x.mean():.3f}" for how, x in mine.items()) + f"   by difficulty {numbers(s.by_bin(mine['chains']))}")
    if "large greedy" in s.weights:
        large = s.right["large greedy", 1, "majority"]
        print(f"\na model {s.weights['large greedy'] / s.weights['parallel']:.1f} times larger, greedy: {large.mean():.3f}, by difficulty {numbers(s.by_bin(large))}\n"
              "the small one with compute-optimal search (predicted difficulty) at equal FLOPs, minus that:")
        for version, r, n, small in matched(s):
            print(f"{version:>6} R = {r:<5} {n:6.1f} samples   all {(small - large).mean():+.3f}   by difficulty  " + "  ".join(f"{x:+.3f}" for x in s.by_bin(small - large)))
    draw(s, args, Path(args.json).with_suffix(".png"))
    print(f"wrote {Path(args.json).with_suffix('.png')} and {args.model}/choice.json")


def matched(s):
    """(version of the multiplier, R, samples, right (Q,)) of the small model with as many FLOPs as the large one."""
    for version, backward in (("v1", 3.0), ("ICLR", 1.5)):
        for r in (0.16, 0.79, 22.0):
            n = matched_samples(s.weights["large greedy"] / s.weights["parallel"], r, backward)
            party = s.optimal("flops", n * s.cost["flops"]["parallel", 1, "majority"].mean(), "predicted")
            if party:
                yield version, r, n, party[0]


def draw(s, args, path):
    """Accuracy against tokens, FLOPs and (from `speed`) seconds; the noisy verifier; best strategy by difficulty and budget; sequential against parallel; small against large."""
    figure, axes = pyplot().subplots(2, 4, figsize=(21, 9))
    shown = {"best-of-N": ("parallel", "max"), "weighted": ("parallel", "weighted"), "majority": ("parallel", "majority"), "beam": ("beam", "weighted"),
             "lookahead": ("lookahead", "weighted"), "DVTS": ("dvts", "weighted")}
    for axis, unit in zip(axes[0], ("tokens", "flops")):
        cost = s.cost[unit]
        for name, (search, how) in shown.items():
            axis.plot(*zip(*sorted((cost[k].mean(), s.right[k].mean()) for k in s.right if (k[0], k[2]) == (search, how))), "o-", ms=3, label=name)
        axis.plot(*zip(*sorted((cost[k].mean(), s.attempts[k].max(1).mean()) for k in s.right if (k[0], k[2]) == ("parallel", "majority"))), ":", color="0.6", label="any of N right (ceiling)")
        axis.plot(cost["greedy", 1, "majority"].mean(), s.right["greedy", 1, "majority"].mean(), "k*", label="greedy")
        for difficulty, style in (("predicted", "k-"), ("known", "k:")):
            line = [x for b in s.budgets(unit, 12) if (x := s.optimal(unit, b, difficulty))]
            axis.plot([x[1].mean() for x in line], [x[0].mean() for x in line], style, label=f"compute-optimal, {difficulty} difficulty")
        axis.set(xscale="log", xlabel={"tokens": "tokens emitted for a question", "flops": "FLOPs for a question"}[unit], ylabel="right")
    ticks = dict(xlabel="difficulty (fifths; 5: hardest)", xticks=range(5), xticklabels=range(1, 6))
    for name, search, style in (("weighted", "parallel", "o-"), ("beam", "beam", "o-"), ("weighted, noisy verifier", "noisy parallel", "o--"), ("beam, noisy verifier", "noisy beam", "o--")):
        axes[0, 3].plot(s.by_bin(s.right[search, 16, "weighted"]), style, label=name)
    axes[0, 3].set(title=f"N = 16; noise turns {s.settings['noise']:.0%} of the scores round", **ticks)
    budgets = s.budgets("tokens", 6)
    grid = [[best_within(*s.choices("tokens"), s.bins["known"] == b, budget) for budget in budgets] for b in range(5)]
    names = sorted({k[0] + k[2] for line in grid for k in line if k})
    axes[1, 0].imshow([[names.index(k[0] + k[2]) if k else np.nan for k in line] for line in grid], aspect="auto", cmap="Pastel1")
    for b, line in enumerate(grid):
        for x, k in enumerate(line):
            axes[1, 0].text(x, b, f"{k[0]}\n{k[2]}\n{k[1]}" if k else "", ha="center", va="center", fontsize=6)
    axes[1, 0].set(title="best strategy", xlabel="tokens", xticks=range(6), xticklabels=[f"{x:.0f}" for x in budgets], yticks=range(5), yticklabels=range(1, 6), ylabel="difficulty")
    for b in range(5) if ("revise 1", 16, "chains") in s.right else ():
        axes[1, 1].plot(RATIOS, [s.by_bin(s.right[f"revise {length}", 16, "chains"])[b] for length in RATIOS], "o-", label=f"difficulty {b + 1}")
    axes[1, 1].set(xscale="log", xticks=RATIOS, xticklabels=[f"{x}:{16 // x}" for x in RATIOS], xlabel="sequential : parallel", title="16 attempts of the revision policy")
    if "large greedy" in s.weights:
        axes[1, 2].plot(s.by_bin(s.right["large greedy", 1, "majority"]), "k*-", label="large model, greedy")
        for version, r, n, small in matched(s):
            axes[1, 2].plot(s.by_bin(small), "o-" if version == "v1" else "o:", label=f"small, {version}, R = {r} ({n:.0f} samples)")
    axes[1, 2].set(title="small model with search, FLOPs-matched", **ticks)
    timed = Path(args.json).with_suffix(".speed.jsonl")
    for row in map(json.loads, timed.read_text().splitlines()) if timed.exists() else ():
        right = next(s.right[row["search"], row["n"], how].mean() for how in ("chains", "weighted", "majority") if (row["search"], row["n"], how) in s.right)
        line, = axes[0, 2].plot([row["plain"], row["speculative"]], [right, right], "-")
        axes[0, 2].plot(row["plain"], right, "o", mfc="w", color=line.get_color())
        axes[0, 2].plot(row["speculative"], right, "o", color=line.get_color(), label=f"{row['search']}, N = {row['n']}")
    axes[0, 2].set(title="one question at a time: plain (white), with the drafter", xlabel="seconds for a question", ylabel="right")
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), title="first two panels", loc="center")
    for axis in axes.flat[2:]:
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


# ---------------------------------------------------------------- one question at a time


TIMED = (("greedy", 1), ("parallel", 8), ("revise 1", 16), ("revise 4", 16), ("revise 16", 16))  # the others decode step by step, plainly


def speed(args):
    """Seconds for a question with and without speculation, one question at a time: what the drafter is worth here. The answers must be the same. Rows go beside --json, to *.speed.jsonl."""
    torch.set_num_threads(1)
    task, folder, rows = make_task(args.task, args.data), Path(args.model), []
    problems = [task.problem("test", 10**6 + i) for i in range(args.count)]
    solvers = {(name, on): Solver(folder / where, task, speculate=on, slots=64) for name, where in (("base", ""), ("revise", "revise")) for on in (False, True)}
    print(f"{'':>16} {'plain s':>8} {'spec. s':>8} {'ratio':>6} {'same':>7} {'MFLOPs plain / speculative':>28}")
    for name, search, n, strategy, _ in searches({name: solver.again for (name, _), solver in solvers.items()}):
        if (search, n) not in TIMED:
            continue
        seconds, flops, same = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}, 0
        for turn in range(2):  # the first turn does not count
            for i, problem in enumerate(tqdm(problems, desc=search, leave=False)):
                made = {on: solvers[name, on].solve([problem], strategy, args.seed)[0] for on in ((False, True) if i % 2 else (True, False))}
                for on, (_, book) in made.items():
                    seconds[on] += book.seconds * turn / len(problems)
                    flops[on] += book.flops(solvers[name, on].sizes) * turn / len(problems)
                same += turn * ([p.tokens for p in made[False][0]] == [p.tokens for p in made[True][0]])
        rows.append({"search": search, "n": n, "plain": seconds[False], "speculative": seconds[True], "same": same, "questions": len(problems), "flops": [flops[False], flops[True]]})
        print(f"{search + ' ' + str(n):>16} {seconds[False]:8.4f} {seconds[True]:8.4f} {seconds[False] / seconds[True]:6.2f} {same:>3}/{len(problems)} {flops[False] / 1e6:18.1f} / {flops[True] / 1e6:.1f}")
    write_atomically(Path(args.json).with_suffix(".speed.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def answer(args):
    """Answer --prompt, and show what was tried and what it cost."""
    if not args.prompt:
        raise UserError('--prompt "7:cfa=": a question is wanted')
    task = make_task(args.task, args.data)
    solver, problem = Solver(args.model, task), Problem(args.prompt, args.prompt, None)
    if solver.tokenizer.init_kwargs.get("prompt_style") == "trace" and solver.tokenizer.pad_token_id in solver.encode(problem):  # what a symbol becomes that the tiny tokenizers lack
        raise UserError(f"--prompt {args.prompt!r}: holds symbols that {args.model} does not know")
    if not solver.verifiers and args.strategy not in ("majority", "greedy"):
        raise UserError(f"--strategy {args.strategy}: {args.model} has no verifier (`python test_time.py learn`); only majority and greedy work without one")
    if not 1 <= args.n <= solver.engine.slots:
        raise UserError(f"--n {args.n}: must be 1 to {solver.engine.slots}")
    search, n, how, aggregate, look = args.strategy, args.n, "weighted", args.aggregate, Ledger()
    if search == "auto":
        path = Path(args.model) / "choice.json"
        if not path.exists():
            raise UserError(f"--strategy auto: no {path}; `python test_time.py sweep` and `report` find out what is best when")
        known = json.loads(path.read_text())
        aggregate = known["aggregate"]
        (paths, look), = solver.solve([problem], partial(parallel, n=1), args.seed, "probe")
        easy = score(paths[0], aggregate)
        hardness = sum(easy < edge for edge in known["edges"])
        budget = max((b for b in map(float, known["choices"]) if b <= args.budget - look.decode), default=min(map(float, known["choices"])))
        search, n, how = known["choices"][str(budget)][hardness]
        print(f"an attempt for a look: score {easy:.2f}, difficulty {hardness + 1} of 5, {look.decode} tokens -> {search} {n}, {how}")
    strategies = {"greedy": partial(parallel, n=1, greedy=True), "majority": partial(parallel, n=n), "parallel": partial(parallel, n=n), "beam": partial(beam, n=n, m=4),
                  "lookahead": partial(beam, n=n, m=4, look=1), "dvts": partial(beam, n=n, m=4, diverse=True), "revise": partial(revise, n=n, length=min(n, 8), again=solver.again)}
    if search == "revise":
        solver = Solver(Path(args.model) / "revise", task)
    (paths, book), = solver.solve([problem], strategies[search], args.seed, "answer")
    for p in sorted(paths, key=partial(score, aggregate=aggregate))[-8:]:
        print(f"  {score(p, aggregate):.3f}  {solver.tokenizer.decode(list(p.tokens), skip_special_tokens=True)}")
    how = {"majority": "majority", "greedy": "majority", "revise": "chains"}.get(search, how)
    book = Ledger(**{name: value + getattr(look, name) for name, value in asdict(book).items()})
    print(f"answer: {pick(paths, how, aggregate)}   ({search} {n}, {how}; {len(paths)} attempts in the end)\ntokens (of the verifier: steps), the look included: "
          + ", ".join(f"{k} {v}" for k, v in asdict(book).items() if k != "seconds") + f"; {book.flops(solver.sizes) / 1e6:.1f} MFLOPs, {book.seconds:.2f} s")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("command", nargs="?", default="answer", choices=["answer", "learn", "sweep", "report", "speed"])
    flags.add_argument("--model", default="base/chain", help="folder of the policy; verifiers, drafter and revise/ lie in it")
    flags.add_argument("--task", default="chain", help="chain or gsm8k")
    flags.add_argument("--data", default="")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--prompt", default="", help="(answer) the question")
    flags.add_argument("--strategy", default="auto", choices=["auto", "greedy", "majority", "parallel", "beam", "lookahead", "dvts", "revise"], help="(answer)")
    flags.add_argument("--n", type=int, default=16, help="(answer) N, unless auto")
    flags.add_argument("--budget", type=int, default=1000, help="(answer) tokens, for auto; hard questions may get more, easy ones less")
    flags.add_argument("--questions", type=int, default=8000, help="(learn) training questions")
    flags.add_argument("--continuations", type=int, default=2, help="(learn) from the end of each step")
    flags.add_argument("--epochs", type=int, default=12, help="(learn) of tuning for revisions")
    flags.add_argument("--drafter-seconds", type=float, default=60, help="(learn) training time of each drafter")
    flags.add_argument("--count", type=int, default=1000, help="(sweep, speed) held-out questions")
    flags.add_argument("--seeds", type=int, default=1, help="(sweep) repetitions with other samples")
    flags.add_argument("--chunk", type=int, default=100, help="(sweep) questions in a part")
    flags.add_argument("--workers", type=int, default=2, help="(sweep) processes")
    flags.add_argument("--aggregate", default="last", choices=["last", "min", "product"], help="(sweep, answer) an attempt's score from those of its steps")
    flags.add_argument("--verifier-noise", type=float, default=0.2, help="(sweep) share of the scores that are turned round for the noisy strategies")
    flags.add_argument("--large", default="", help="(sweep) folder of a larger model to compare with")
    flags.add_argument("--json", default="runs/test-time.jsonl", help="(sweep, report) the rows; (speed) its own go beside them")
    args = flags.parse_args()
    {"answer": answer, "learn": learn, "sweep": sweep, "report": report, "speed": speed}[args.command](args)


if __name__ == "__main__":
    run(main)
