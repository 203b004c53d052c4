"""Two sentences on how to read a figure, computed from the numbers that it shows.

The first says what the figure shows of this run, the second what follows, or what does not. Each takes the tidy frame
that the figure was drawn from. Knows no optimization; what only one of them draws is read in its `experiment.py`.
"""

import re
from typing import TYPE_CHECKING

from lib.report.text.quantities import counted, interval, times

if TYPE_CHECKING:
    import pandas as pd

SENTENCE = re.compile(r"[.!?](?=\s|$)")


def two(first: str, second: str) -> str:
    """Return two sentences as one text. Raises ValueError where either is not one sentence."""
    for text in (first, second):
        if len(SENTENCE.findall(text)) != 1 or not SENTENCE.search(text[-1:]):
            raise ValueError(f"not one sentence: {text!r}")
    return f"{first} {second}"


def forest(frame: "pd.DataFrame") -> str:
    """Return how to read `style.forest` of a record's tidy frame: how many ratios say anything, and which the most."""
    shown = frame[frame["gain"].notna()]
    if not len(shown):
        return two("No ratio could be shown.", "The reasons stand in the table of sources.")
    judged = shown[shown["verdict"].isin(["better", "worse", "not_maintained"])]
    first = f"{len(judged)} of {counted(len(shown), 'ratio')} differ from no change by more than noise and margin."
    if not len(judged):
        return two(first, "An interval that crosses the line claims nothing, and that includes no effect.")
    far = judged.loc[(judged["gain"].astype(float) - 1).abs().idxmax()]
    span = f" ({interval(far.gain_low, far.gain_high)})" if far.gain_low == far.gain_low else ""
    return two(first, f"The largest is {far.label} at {times(far.gain)}{span}; above 1 is better.")


def bound(frame: "pd.DataFrame") -> str:
    """Return how to read `style.bound` (columns `workload`, `arm`, `time`, `bound`): how far from physics each is."""
    if not len(frame):
        return two("No bound could be computed.", "Without one, nothing is said on what the machine would allow.")
    factor = frame["time"] / frame["bound"]
    far, near = frame.loc[factor.idxmax()], frame.loc[factor.idxmin()]
    first = (
        f"The {near.arm} arm of {near.workload} takes {times(factor.min())} its bound, the {far.arm} arm of "
        f"{far.workload} {times(factor.max())}."
    )
    return two(
        first, "Far above its bound a workload waits for something else, and fewer operations need not save time."
    )


def controls(frame: "pd.DataFrame", chosen: str) -> str:
    """Return how to read `style.bars` of controls (columns `arm`, `value`, `low`, `high`; lower is better).

    `chosen` is the arm that the claim is about: it is held against the best of the others.
    """
    others = frame[frame["arm"] != chosen]
    own = frame[frame["arm"] == chosen]
    if not len(own) or not len(others):
        return two(f"There is nothing to hold {chosen} against.", "Without a control no choice is shown to matter.")
    own, best = own.iloc[0], others.loc[others["value"].idxmin()]
    first = f"{chosen} stands at {own.value:.3g}, the best of the others ({best.arm}) at {best.value:.3g}."
    if own.high < best.low:
        return two(first, "Their intervals do not overlap, so the choice matters here.")
    if best.high < own.low:
        return two(first, "Their intervals do not overlap, and the other arm does better.")
    return two(first, "Their intervals overlap, so this run does not tell them apart.")


def curves(frame: "pd.DataFrame", x: str, *, lower_is_better: bool = True) -> str:
    """Return how to read `style.impact` (columns `strength`, `value`, `arm`): where each curve ends, and what is best.

    `x` names the axis of strengths.
    """
    if not len(frame):
        return two("There is no curve to show.", "Where strength has no effect on record, none is claimed.")
    ends = frame.sort_values("strength").groupby("arm", sort=False).tail(1).sort_values("value")
    best, worst = (ends.iloc[0], ends.iloc[-1]) if lower_is_better else (ends.iloc[-1], ends.iloc[0])
    first = f"At its end ({x} {best.strength:.3g}) the curve of {best.arm} stands at {best.value:.3g}."
    if len(ends) == 1:
        return two(first, "There is one curve, so its slope is all that it says.")
    return two(first, f"The curve of {worst.arm} ends at {worst.value:.3g}; the distance is what the choice is worth.")
