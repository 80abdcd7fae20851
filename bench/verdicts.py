"""The rows of `bench gpu` and its parts: figures, and claims with verdicts."""


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
