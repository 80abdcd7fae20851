"""The search strategies. Each is a generator: it yields Requests, is sent the continued attempts, and returns its
attempts.

A strategy is written as if there were one question, one policy and no batches. The package's docstring describes the
strategies, attempts.py what they yield. (How many tokens to draft is decided elsewhere: ../strategy.py.)

    def parallel(seed, n):
        starts = [Attempt(seed(k)) for k in range(n)]
        results = yield [Request(starts)]           # one Request of n attempts, so one list of n attempts comes back
        return results[0]

`seed(k)` returns the seed of attempt k and is the only source of randomness. An attempt that is continued keeps its
seed, and its sampling noise continues where it stopped. So an attempt made in pieces is the same as one made at once.
"""

from collections.abc import Generator
from dataclasses import replace
from functools import partial

from parts.engine.sampling import sequence_seed
from test_time.attempts import Attempt, Request, Search, SeedFunction, score

BRANCHING = 4  # M: continuations of each partial attempt in the beam searches that are compared
CHAIN = 8  # attempts of a chain of revisions, unless it is told otherwise
EARLIER_ATTEMPTS = 4  # shown in a prompt, at most


def parallel(seed: SeedFunction, n: int, greedy: bool = False) -> Search:
    """Make n independent attempts."""
    starts = [Attempt(seed(k)) for k in range(n)]
    results = yield [Request(starts, greedy=greedy)]
    return results[0]


def beam(seed: SeedFunction, n: int, m: int, lookahead: int = 0, diverse: bool = False) -> Search:
    """Hold n partial attempts; after each step keep n / m of them, and continue each in m ways.

    lookahead: greedy steps further on at which an attempt is judged. diverse: keep the best of each of the n / m trees,
    instead of the best of all. With m = 1 this is parallel(n), token by token: a first continuation keeps its seed.
    """
    starts = [Attempt(seed(k), tree=k // m) for k in range(n)]
    results = yield [Request(starts, step=True)]
    attempts = results[0]
    while not all(attempt.done for attempt in attempts):
        values = yield from scores_ahead(attempts, lookahead)
        ranked = sorted(range(len(attempts)), key=lambda i: -values[i])  # stable: of equal ones the earlier
        if diverse:
            chosen = {attempts[i].tree: i for i in reversed(ranked)}.values()  # of each tree the best one, written last
        else:
            chosen = ranked[: max(1, n // m)]
        kept = [attempts[i] for i in sorted(chosen)]
        results = yield [Request(continuations(attempt, m), step=True) for attempt in kept if not attempt.done]
        attempts = [attempt for attempt in kept if attempt.done]
        for result in results:
            attempts += result
    return attempts


def continuations(attempt: Attempt, m: int) -> list[Attempt]:
    """Return the attempt m times, to be continued in m ways: first with its own seed, then with new ones."""
    others = [replace(attempt, seed=sequence_seed(attempt.seed, len(attempt.tokens), j)) for j in range(1, m)]
    return [attempt, *others]


def scores_ahead(attempts: list[Attempt], steps: int) -> Generator[list[Request], list, list[float]]:
    """Return each attempt's score after so many more greedy steps, which are thrown away. Part of a Search."""
    ahead = list(attempts)
    for _ in range(steps):
        unfinished = [i for i, attempt in enumerate(ahead) if not attempt.done]
        if not unfinished:
            break
        results = yield [Request([ahead[i]], step=True, greedy=True) for i in unfinished]
        for i, result in zip(unfinished, results):
            ahead[i] = result[0]
    return [score(attempt) for attempt in ahead]


def revise(seed: SeedFunction, n: int, length: int = CHAIN) -> Search:
    """Make n / length chains of attempts, each attempt with the last four of its chain in the prompt. n may be 0."""
    if n == 0:
        return []
    length = min(n, length)
    results = yield [Request([Attempt(seed((c, 0)), tree=c) for c in range(n // length)])]  # they share the prompt
    chains = [[first] for first in results[0]]
    for i in range(1, length):
        requests = []
        for c, chain in enumerate(chains):
            earlier = tuple(attempt.tokens for attempt in chain[-EARLIER_ATTEMPTS:])
            requests.append(Request([Attempt(seed((c, i)), earlier=earlier, tree=c)]))
        results = yield requests
        for chain, result in zip(chains, results):
            chain.append(result[0])
    return [attempt for chain in chains for attempt in chain]


# by name; the number of attempts n is still to be bound
SEARCHES = {
    "greedy": partial(parallel, greedy=True),
    "majority": parallel,
    "parallel": parallel,
    "beam": partial(beam, m=BRANCHING),
    "lookahead": partial(beam, m=BRANCHING, lookahead=1),
    "dvts": partial(beam, m=BRANCHING, diverse=True),
    "revise": revise,
}
