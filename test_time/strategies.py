"""The search strategies. Each is a generator: it yields what it wants written, gets it, and returns its attempts.

So a strategy reads as if there were one question, one policy and no batches. See the package's docstring for what the
strategies do, and attempts.py for what they yield. (How far to draft is another matter: strategy.py, one folder up.)

    def parallel(seed, n):
        starts = [Attempt(seed(k)) for k in range(n)]
        replies = yield [Want(starts)]              # one Want of n attempts, so one reply of n attempts
        return replies[0]

`seed(k)` gives the seed of attempt k: all the randomness there is. An attempt that is continued keeps its seed, and its
noise goes on where it stopped. So an attempt made in pieces is the same as one made at once.
"""

from collections.abc import Generator
from dataclasses import replace

from parts.engine.sampling import sequence_seed
from test_time.attempts import Attempt, Search, SeedOf, Want, in_view
from test_time.picking import score


def parallel(seed: SeedOf, n: int, greedy: bool = False) -> Search:
    """n independent attempts."""
    starts = [Attempt(seed(k)) for k in range(n)]
    replies = yield [Want(starts, greedy=greedy)]
    return replies[0]


def beam(seed: SeedOf, n: int, m: int, look: int = 0, diverse: bool = False, aggregate: str = "last") -> Search:
    """Hold n beginnings; after each step keep n / m of them and continue each in m ways.

    look: greedy steps ahead by which a beginning is judged. diverse: keep the best of each of the n / m trees, instead
    of the best of all. m = 1 is parallel(n), token by token, since a first continuation keeps its seed.
    """
    starts = [Attempt(seed(k), tree=k // m) for k in range(n)]
    replies = yield [Want(starts, step=True)]
    attempts = replies[0]
    while not all(attempt.done for attempt in attempts):
        values = yield from ahead(attempts, look, aggregate)
        kept = best_of_trees(attempts, values) if diverse else best_of_all(attempts, values, max(1, n // m))
        replies = yield [Want(continuations(attempt, m), step=True) for attempt in kept if not attempt.done]
        attempts = [attempt for attempt in kept if attempt.done]
        for reply in replies:
            attempts += reply
    return attempts


def best_of_all(attempts: list[Attempt], values: list[float], count: int) -> list[Attempt]:
    """The `count` attempts with the largest values (of equal ones the earlier), in their order."""
    ranked = sorted(range(len(attempts)), key=lambda i: -values[i])
    return [attempts[i] for i in sorted(ranked[:count])]


def best_of_trees(attempts: list[Attempt], values: list[float]) -> list[Attempt]:
    """The attempt with the largest value (of equal ones the earlier) of each tree, in their order."""
    best: dict[int, int] = {}  # tree -> index of its best attempt
    for i, attempt in enumerate(attempts):
        if attempt.tree not in best or values[i] > values[best[attempt.tree]]:
            best[attempt.tree] = i
    return [attempts[i] for i in sorted(best.values())]


def continuations(attempt: Attempt, m: int) -> list[Attempt]:
    """The attempt m times, to be continued in m ways: the first with its own seed, the others with new ones."""
    others = [replace(attempt, seed=sequence_seed(attempt.seed, len(attempt.tokens), j)) for j in range(1, m)]
    return [attempt, *others]


def ahead(attempts: list[Attempt], look: int, aggregate: str) -> Generator[list[Want], list, list[float]]:
    """The score of each attempt after `look` more greedy steps, which are thrown away. A part of a Search."""
    probes = list(attempts)
    for _ in range(look):
        unfinished = [i for i, probe in enumerate(probes) if not probe.done]
        if not unfinished:
            break
        replies = yield [Want([probes[i]], step=True, greedy=True) for i in unfinished]
        for i, reply in zip(unfinished, replies):
            probes[i] = reply[0]
    return [score(probe, aggregate) for probe in probes]


def revise(seed: SeedOf, n: int, length: int, again: tuple[int, ...], view: int = 4) -> Search:
    """n / length chains of attempts, each made with the last `view` of its chain in view.

    again: the tokens that part attempts.
    """
    chains: list[list[Attempt]] = [[] for _ in range(max(1, n // length))]
    for i in range(length):
        wants = []
        for c, chain in enumerate(chains):
            before = in_view([attempt.tokens for attempt in chain[-view:]], again)
            wants.append(Want([Attempt(seed((c, i)), before=before, tree=c)]))
        replies = yield wants
        for chain, reply in zip(chains, replies):
            chain.append(reply[0])
    return [attempt for chain in chains for attempt in chain]
