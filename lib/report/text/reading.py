"""Two sentences on how to read a figure, computed from the numbers that it shows.

The first says what the figure shows of this run, the second what follows, or what does not. Each takes the tidy frame
that the figure was drawn from. Knows no optimization; what only one of them draws is read in its `experiment.py`.
"""

import math
import re
from typing import TYPE_CHECKING

from lib.report.text.quantities import counted, times
from lib.report.text.sentence import ratio

if TYPE_CHECKING:
    import pandas as pd

END = re.compile(r"""[.!?]["”’)\]]*(?=\s|$)""")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|cf|ca|al|approx|incl|resp|Fig|Eq|No)\.$")


def two(first: str, second: str) -> str:
    """Return two sentences as one text. Raises ValueError unless each of them is exactly one sentence.

    A decimal point (`1.31×`) and the full stop of an abbreviation (`e.g.`) end no sentence.
    """
    for text in (first, second):
        ends = [end for end in END.finditer(text) if not _abbreviated(text, end)]
        if len(ends) != 1 or ends[0].end() != len(text) or not text[: ends[0].start()].strip():
            raise ValueError(f"not one sentence: {text!r}")
    return f"{first} {second}"


def _abbreviated(text: str, end: re.Match) -> bool:
    """Return whether a full stop within the text belongs to an abbreviation."""
    return end.end() < len(text) and bool(ABBREVIATION.search(text[: end.start() + 1]))


def forest(frame: "pd.DataFrame") -> str:
    """Return how to read `style.forest` of a record's tidy frame: how many ratios say anything, and which the most."""
    shown = frame[frame["gain"].notna()]
    if not len(shown):
        return two("No ratio could be shown.", "The reasons stand in the table of sources.")
    judged = shown[shown["verdict"].isin(["better", "worse", "not_maintained"])]
    differ = "differs" if len(judged) == 1 else "differ"
    first = f"{len(judged)} of {counted(len(shown), 'ratio')} {differ} from 1 by more than the noise and the margin."
    if not len(judged):
        return two(first, "An interval that crosses the line shows neither an effect nor that there is none.")
    largest = judged.iloc[int(judged["gain"].astype(float).map(_factor).argmax())]
    known = largest.gain_low == largest.gain_low  # not NaN
    shown, ends = ratio(largest.gain, *((largest.gain_low, largest.gain_high) if known else (None, None)))
    spread = f" ({ends})" if ends else ""
    return two(first, f"The largest change is {largest.label} at {shown}{spread}; above 1 is better.")


def _factor(gain: float) -> float:
    """Return by which factor something changed, in either direction."""
    return max(gain, 1 / gain) if gain > 0 else math.inf


def bound(frame: "pd.DataFrame") -> str:
    """Return how to read `style.bound` (columns `workload`, `arm`, `time`, `bound`): how far from physics each is."""
    known = frame[frame["time"].notna() & frame["bound"].notna()]
    factors = known["time"].astype(float) / known["bound"].astype(float)
    if not len(factors):
        return two("No bound could be computed.", "So what the machine would allow is not known.")
    far, near = known.iloc[int(factors.argmax())], known.iloc[int(factors.argmin())]
    first = f"The {near.arm} arm of {near.workload} takes {times(factors.min())} as long as its physical bound"
    if len(factors) > 1:
        first += f", the {far.arm} arm of {far.workload} {times(factors.max())}"
    return two(
        f"{first}.", "Far above its bound a workload waits for something else, and fewer operations may not save time."
    )


def controls(frame: "pd.DataFrame", chosen: str) -> str:
    """Return how to read `style.bars` of controls (columns `arm`, `value`, `low`, `high`; lower is better).

    `chosen` is the arm that the claim is about: it is compared with the best of the others.
    """
    numbers = frame.astype({"value": float, "low": float, "high": float})
    chosen_rows, others = numbers[numbers["arm"] == chosen], numbers[numbers["arm"] != chosen]
    if not len(chosen_rows) or not len(others):
        return two(f"There is nothing to compare {chosen} with.", "Without a control no choice is shown to matter.")
    own, best = chosen_rows.iloc[0], others.iloc[int(others["value"].argmin())]
    first = f"{chosen} reaches {own.value:.3g}, the best of the others ({best.arm}) {best.value:.3g}; lower is better."
    if own.high < best.low:
        return two(first, "Their intervals do not overlap, so the choice matters here.")
    if best.high < own.low:
        return two(first, "Their intervals do not overlap, and the other arm does better.")
    if own[["low", "high"]].isna().any() or best[["low", "high"]].isna().any():
        return two(first, "Without both intervals this run does not tell them apart.")
    return two(first, "Their intervals overlap, so this run does not tell them apart.")


def curves(frame: "pd.DataFrame", x: str, *, lower_is_better: bool = True) -> str:
    """Return how to read `style.impact` (columns `strength`, `value`, `arm`): where each curve ends, and what is best.

    `x` names the axis of strengths.
    """
    if not len(frame):
        return two("There is no curve to show.", "No effect of the strength was recorded, so none is claimed.")
    ends = frame.sort_values("strength").groupby("arm", sort=False).tail(1).sort_values("value")
    best, worst = (ends.iloc[0], ends.iloc[-1]) if lower_is_better else (ends.iloc[-1], ends.iloc[0])
    first = f"At the largest strength ({x} {best.strength:.3g}) the curve of {best.arm} reaches {best.value:.3g}."
    if len(ends) == 1:
        return two(first, "It is the only curve, so what it shows is its slope.")
    return two(first, f"The curve of {worst.arm} ends at {worst.value:.3g}; the distance is what the choice is worth.")
