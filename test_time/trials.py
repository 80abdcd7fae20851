"""What is compared: every strategy with its number of attempts, who runs it, and how its answer may be picked."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from test_time.attempts import SearchStrategy
from test_time.strategies import beam, parallel, revise

WAYS = 4  # M, in which a beam search continues a beginning
RATIOS = (1, 2, 4, 8, 16)  # lengths of the chains among 16 revisions
CHAIN_LENGTHS = {4: (1, 4), 16: RATIOS}  # N -> lengths of its chains
PICKS = ("max", "weighted", "majority", "outcome")


class Trial(NamedTuple):
    """A strategy that is compared with others."""

    solver: str  # a key of solver_folders
    name: str
    n: int
    search: SearchStrategy
    picks: tuple[str, ...]


def solver_folders(folder: Path, large: str = "") -> dict[str, Path]:
    """Where the solvers' policies are, by name; only those that are there. large: "" for none."""
    folders = {
        "base": folder,
        "noisy": folder,  # the same, with noise on its verifier's scores
        "revise": folder / "revise",
        "refit": folder / "refit",
    }
    if large:
        folders["large"] = Path(large)
    return {name: path for name, path in folders.items() if (path / "config.json").exists()}


def trials(again: dict[str, tuple[int, ...]]) -> list[Trial]:
    """All of them. again: of the solvers that are there, by name, the tokens that part attempts."""
    rows = [
        Trial("base", "greedy", 1, partial(parallel, n=1, greedy=True), ("majority",)),
        Trial("base", "probe", 1, partial(parallel, n=1), ("weighted",)),  # predicts difficulty
        Trial("base", "oracle", 16, partial(parallel, n=16), ("weighted",)),  # knows difficulty
    ]
    for n in (1, 2, 4, 8, 16, 32, 64):
        rows.append(Trial("base", "parallel", n, partial(parallel, n=n), PICKS))
    with_verifier = ("max", "weighted")
    for n in (4, 8, 16, 32, 64):
        rows.append(Trial("base", "beam", n, partial(beam, n=n, m=WAYS), with_verifier))
    for n in (4, 16):
        rows.append(Trial("base", "lookahead", n, partial(beam, n=n, m=WAYS, look=1), with_verifier))
    for n in (16, 64):
        rows.append(Trial("base", "dvts", n, partial(beam, n=n, m=WAYS, diverse=True), with_verifier))
    rows.append(Trial("noisy", "noisy parallel", 16, partial(parallel, n=16), with_verifier))
    rows.append(Trial("noisy", "noisy beam", 16, partial(beam, n=16, m=WAYS), with_verifier))
    if "revise" in again:
        rows += revision_trials(again["revise"])
    if "large" in again:
        rows.append(Trial("large", "large greedy", 1, partial(parallel, n=1, greedy=True), ("majority",)))
    return rows


def revision_trials(again: tuple[int, ...]) -> list[Trial]:
    """Chains of revisions of several lengths, and the control that was tuned without attempts in view."""
    rows = []
    for n, lengths in CHAIN_LENGTHS.items():
        for length in lengths:
            chains = partial(revise, n=n, length=length, again=again)
            rows.append(Trial("revise", f"revise {length}", n, chains, ("chains", "weighted", "majority")))
    for n in (1, 16):
        rows.append(Trial("refit", "refit parallel", n, partial(parallel, n=n), ("majority",)))
    return rows
