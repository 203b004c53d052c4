"""Two sentences on how to read a figure, computed from the numbers that it shows.

The first sentence says what the figure shows for this run, the second what follows from it, or what does not. Each
function takes the tidy frame that the figure was drawn from. Knows no optimization: a figure that only one of them
draws is explained in its `experiment.py`.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lib.report.text.brief import MOST_WORDS, count
from lib.report.text.quantities import counted, figures, times
from lib.report.text.sentence import ratio

if TYPE_CHECKING:
    import pandas as pd

END = re.compile(r"""[.!?]["”’)\]]*(?=\s|$)""")
ALIKE = 0.01  # relative: strengths that differ by less count as equal
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|cf|ca|al|approx|incl|resp|Fig|Eq|No)\.$")


def two(first: str, second: str) -> str:
    """Return two sentences as one text. Raises ValueError unless each of them is exactly one sentence.

    A decimal point (`1.31×`) and the full stop of an abbreviation (`e.g.`) do not end a sentence.
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
    """Return how to read `style.forest` of a record's tidy frame: how many ratios show an effect, and the largest."""
    fell = frame["ratio"] == 0 if "ratio" in frame else frame["gain"] == 0  # has no place on an axis of ratios
    shown = frame[frame["gain"].notna() | fell]
    if not len(shown):
        return two("No ratio could be shown.", "The table of sources gives the reasons.")
    judged = shown[shown["verdict"].isin(["better", "worse", "not_maintained"])]
    differ = "differs" if len(judged) == 1 else "differ"
    first = f"{len(judged)} of {counted(len(shown), 'ratio')} {differ} from 1 by more than the noise and the margin."
    if not len(judged):
        return two(first, "An interval that crosses the line shows neither an effect nor its absence.")
    lost = judged[judged["gain"].isna()]
    if len(lost):
        return two(first, f"The largest change is {lost.iloc[0].label}: it fell to 0, which the axis cannot show.")
    largest = judged.iloc[int(judged["gain"].astype(float).map(_factor).argmax())]
    known = largest.gain_low == largest.gain_low  # not NaN
    shown, ends = ratio(largest.gain, *((largest.gain_low, largest.gain_high) if known else (None, None)))
    spread = f" ({ends})" if ends else ""
    return two(first, f"The largest change is {largest.label} at {shown}{spread}; above 1 is better.")


def _factor(gain: float) -> float:
    """Return the factor of a change in either direction, at least 1."""
    return max(gain, 1 / gain) if gain > 0 else math.inf


def bound(frame: "pd.DataFrame") -> str:
    """Return how to read `style.bound` (columns `workload`, `arm`, `time`, `bound`): times against physical bounds."""
    columns = frame.reindex(columns=["workload", "arm", "time", "bound"])  # a frame without rows may have none
    known = columns[columns["time"].notna() & columns["bound"].notna()]
    factors = known["time"].astype(float) / known["bound"].astype(float)
    if not len(factors):
        return two("No bound could be computed.", "So it is unknown how fast this machine could be.")
    far, near = known.iloc[int(factors.argmax())], known.iloc[int(factors.argmin())]
    first = f"The {near.arm} arm of {near.workload} takes {times(factors.min())} as long as its physical bound"
    if len(factors) > 1:
        first += f", the {far.arm} arm of {far.workload} {times(factors.max())}"
    return two(
        f"{first}.", "A workload far above its bound is limited by something else: fewer operations may not save time."
    )


def controls(frame: "pd.DataFrame", chosen: str, others: str = "the others") -> str:
    """Return how to read `style.bars` of controls (columns `arm`, `value`, `low`, `high`; lower is better).

    `chosen` is the arm that the claim is about; it is compared with the best of the other rows of `frame`. `others` is
    the collective name of those rows in the text.
    """
    numbers = frame.astype({"value": float, "low": float, "high": float})
    chosen_rows, rivals = numbers[numbers["arm"] == chosen], numbers[numbers["arm"] != chosen]
    if not len(chosen_rows) or not len(rivals):
        return two(f"There is nothing to compare {chosen} with.", "Without a control no effect of the choice is shown.")
    own, best = chosen_rows.iloc[0], rivals.iloc[int(rivals["value"].argmin())]
    reached = f"{chosen} reaches {figures(own.value)}, the best of {others} ({best.arm}) {figures(best.value)}"
    first = f"{reached}; lower is better."
    if own.high < best.low:
        return two(first, "Their intervals do not overlap, so the choice matters here.")
    if best.high < own.low:
        return two(first, "Their intervals do not overlap, and the other arm does better.")
    if own[["low", "high"]].isna().any() or best[["low", "high"]].isna().any():
        return two(first, "Without both intervals this run does not tell them apart.")
    return two(first, "Their intervals overlap, so this run does not tell them apart.")


def curves(frame: "pd.DataFrame", x: str, *, lower_is_better: bool = True, strongest: str = "largest") -> str:
    """Return how to read `style.impact` (columns `strength`, `value`, `arm`, and `low`, `high` where known): which arm
    is best at the strongest setting shared by all arms, and whether its interval excludes the second best.

    `x` is the label of the strength axis; `strongest` is the end of it (`largest` or `smallest`) that changes the
    model most.
    """
    if not len(frame):
        return two("There is no curve to show.", "No effect of the setting was recorded, so none is claimed.")
    ordered = frame.sort_values("strength")
    arms = ordered["arm"].unique()
    if len(arms) == 1:
        return two(_course(ordered, x), "It is the only curve, so there is nothing to compare it with.")
    known = [at for at in ordered["strength"] if all(len(_near(ordered, arm, at)) for arm in arms)]
    if not known:
        return two("The curves have no point in common.", "So none of them can be called better.")
    at = max(known) if strongest == "largest" else min(known)
    points = [_near(ordered, arm, at).iloc[-1] for arm in arms]
    best, *others = sorted(points, key=lambda point: point.value if lower_is_better else -point.value)
    different = [point for point in others if not _same(best, point)]
    twin = next((point.arm for point in others if _same(best, point)), None) if different else None
    following, *rest = different or others
    named = f"{best.arm}, the same as {twin}," if twin else best.arm
    first = f"{named} is best with {figures(best.value)}"
    ranked = _ranked(f"At {_figures(at)} ({x})", strongest, first, following, rest)
    return two(ranked, _told_apart(best, following))


def _ranked(setting: str, strongest: str, first: str, following: "pd.Series", rest: Sequence["pd.Series"]) -> str:
    """Return a sentence on the best curve (`first`), the second best and the worst at a setting. To keep it within
    MOST_WORDS words, it leaves out the worst curve first, then the remark that all arms share this setting.
    """
    why = f", the {strongest} shared by all,"
    second = f"{following.arm} next with {figures(following.value)}"
    texts = [f"{setting}{why} {first} and {second}.", f"{setting} {first} and {second}."]
    if rest:
        last = f"{rest[-1].arm} last with {figures(rest[-1].value)}"
        texts.insert(0, f"{setting}{why} {first}, {second} and {last}.")
    return next((text for text in texts if count(text) <= MOST_WORDS), texts[-1])


def _same(point: "pd.Series", other: "pd.Series") -> bool:
    """Return whether two points are the same measurement: equal in value and interval, as when it was timed once."""
    return all(point.get(name) is not None and point.get(name) == other.get(name) for name in ("value", "low", "high"))


def _course(curve: "pd.DataFrame", x: str) -> str:
    """Return a sentence on where a curve begins and ends."""
    start, end = curve.iloc[0], curve.iloc[-1]
    if len(curve) == 1:
        return f"The curve of {end.arm} is one point, {figures(end.value)} at {_figures(end.strength)} ({x})."
    ends = (
        f"from {figures(start.value)} at {_figures(start.strength)} to {figures(end.value)} at {_figures(end.strength)}"
    )
    return f"The curve of {end.arm} goes {ends} ({x})."


def _near(frame: "pd.DataFrame", arm: str, strength: float) -> "pd.DataFrame":
    """Return the points of an arm at a strength, or within the relative distance ALIKE of it."""
    return frame[(frame["arm"] == arm) & ((frame["strength"] - strength).abs() <= ALIKE * abs(strength))]


def _told_apart(best: "pd.Series", following: "pd.Series") -> str:
    """Return a sentence on whether the intervals of two points overlap."""
    known = [point.get(end) for point in (best, following) for end in ("low", "high")]
    ends = [math.nan if end is None else float(end) for end in known]
    both = f"{best.arm} and {following.arm}"
    if any(math.isnan(end) for end in ends):
        return f"Without intervals this run does not tell {both} apart."
    if ends[0] <= ends[3] and ends[2] <= ends[1]:
        return f"The intervals of {both} overlap, so this run does not tell these two apart."
    return f"The intervals of {both} do not overlap."


def _figures(value: float) -> str:
    """Return a setting as text: a whole number in full, any other with three significant figures."""
    return figures(int(value) if float(value).is_integer() else float(value))
