"""What `bench gpu` and its parts share: claims, and what became of them."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """A claim, and what became of it."""

    claim: str
    measured: float | None  # None: not tested
    bound: float
    at_least: bool = True  # or at most

    @property
    def word(self) -> str:
        """CONFIRMED, REFUTED or NOT TESTED."""
        if self.measured is None:
            return "NOT TESTED"
        good = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "CONFIRMED" if good else "REFUTED"


class Place(NamedTuple):
    """Where the parts run."""

    device: str  # cpu or cuda
    responses: int  # in `exact`
    traces: int  # for the policy that learns on the spot; 0: base/ is taken

    @property
    def gpu(self) -> bool:
        """Whether it is one."""
        return self.device == "cuda"


class Found(NamedTuple):
    """What a part found: lines of figures, and verdicts."""

    rows: list[dict]
    verdicts: list[Verdict]
