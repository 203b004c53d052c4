"""Formats numbers with their intervals: as many digits as the interval justifies, ends rounded outwards, a true minus
sign. Knows nothing about metrics or verdicts.
"""

import math

MINUS = "−"
DASH = "–"
MOST_PLACES = 6
ROUNDING = 1e-6  # tolerance in units of the last digit, so that 1.28 is not rounded to 1.27


def signed(value: float, form: str = ".1f") -> str:
    """Return `value` with its sign: a true minus for negative numbers, no sign for numbers that round to zero."""
    text = f"{value:+{form}}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def percent(share: float, decimals: int = 0) -> str:
    """Return `share` in per cent, with `decimals` decimals: `12 %`, `−0.4 %`."""
    return f"{100 * share:.{decimals}f} %".replace("-", MINUS)


def interval(low: float | None, high: float | None, form: str = ".2f") -> str:
    """Return `1.27–1.35`, or with a negative end `−5.6 to −2.6`, `−1 to +3`; a dash where there is no interval."""
    if low is None or high is None:
        return DASH
    if low >= 0 and high >= 0:
        return f"{low:{form}}{DASH}{high:{form}}"
    return f"{signed(low, form)} to {signed(high, form)}"


def places(low: float, high: float, neutral: float | None = None) -> int:
    """Return how many decimals an interval justifies: those that show two significant figures of its half-width, and
    more where an end would otherwise be printed as `neutral` although the interval excludes it.
    """
    half = abs(high - low) / 2
    if not math.isfinite(half):
        return 2
    digits = min(max(1 - math.floor(math.log10(half)), 0), MOST_PLACES) if half > 0 else 2
    if neutral is not None and not low <= neutral <= high:
        while digits < MOST_PLACES and neutral in outward(low, high, digits):
            digits += 1
    return digits


def outward(low: float, high: float, digits: int) -> tuple[float, float]:
    """Return both ends with `digits` decimals, rounded outwards: the printed interval contains the exact one."""
    scale = 10.0**digits
    return math.floor(low * scale + ROUNDING) / scale, math.ceil(high * scale - ROUNDING) / scale


def with_ends(
    value: float, low: float | None, high: float | None, neutral: float = 1.0, signs: bool = False
) -> tuple[str | None, str]:
    """Return a value and its interval as text, with the digits that the interval justifies (`places`).

    Without an interval the text of the value is None, and the caller formats it. `neutral` is the value of no change.
    With `signs` every number carries its sign.
    """
    if low is None or high is None or not math.isfinite(low) or not math.isfinite(high):
        return None, ""
    digits = places(low, high, neutral)
    form = f".{digits}f"
    rounded = outward(low, high, digits)
    if signs:
        return signed(value, form), f"{signed(rounded[0], form)} to {signed(rounded[1], form)}"
    return f"{value:{form}}".replace("-", MINUS), interval(*rounded, form=form)
