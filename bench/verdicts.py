"""What the parts of `bench gpu` share: where they run, and their rows: figures, and claims with verdicts."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where the parts run."""

    device: str  # cpu or cuda
    responses: int  # in `exact`
    traces: int  # for the policy that learns on the spot; 0: base/ is taken

    @property
    def gpu(self) -> bool:
        """Return whether it is a GPU."""
        return self.device == "cuda"

    def on_gpu(self, value: float) -> float | None:
        """Return the value if it was measured on a GPU, else None: then the claim is not tested."""
        return value if self.gpu else None


def figure(name: str, value: float, unit: str = "") -> dict:
    """Return the row of a figure."""
    return {"name": name, "value": value, "unit": unit}


def claim(text: str, measured: float | None, sign: str, bound: float) -> dict:
    """Return the row of a claim with its verdict. measured: None if it was not tested; sign: >= or <=."""
    word = "NOT TESTED"
    if measured is not None:
        holds = measured >= bound if sign == ">=" else measured <= bound
        word = "CONFIRMED" if holds else "REFUTED"
    return {"claim": text, "verdict": word, "measured": measured, "bound": f"{sign} {bound:g}"}
