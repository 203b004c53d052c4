"""Numbers formatted for readers: three significant figures, a unit, a true minus sign. Knows no metric and no verdict.

Numbers with an interval are formatted by `lib.measure.metrics.digits`.
"""

import math

from lib.measure.metrics.digits import DASH, MINUS

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHARES = {"share", "fraction", "ratio", "1", ""}


def figures(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` significant figures, no exponent between 1e-4 and 1e6, and a true minus sign."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value).replace("-", MINUS)
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    text = f"{value:,.{max(digits - 1 - magnitude, 0)}f}"
    return text.replace("-", MINUS).replace(",", " ")


def quantity(value: float | None, unit: str = "") -> str:
    """Return `value` with its unit: bytes and counts with a decimal prefix (1 kB is 1,000 bytes), shares with three
    decimals.
    """
    if value is None:
        return DASH
    if unit == "perplexity":
        return figures(value)
    if unit in _SHARES:
        return f"{value:.3f}".replace("-", MINUS)
    head, _, tail = unit.partition("/")
    per = f"/{tail}" if tail else ""
    if head in ("bytes", "byte", "B"):
        symbol = "B"
    elif head.lower() in ("flop", "flops"):
        symbol = "FLOP"
    elif head in ("parameters", "count", "tokens", "items"):
        symbol = "" if head in ("parameters", "count") else head
    else:
        return f"{figures(value)} {unit}"
    if symbol == head and float(value).is_integer():
        value = int(value)
    elif unit == "tokens" and abs(value) >= 1000:  # a fraction of a token is an estimate: two figures
        value = float(f"{value:.2g}")
    for size, prefix in _PREFIXES:
        if abs(value) >= size and not (symbol == "tokens" and size < 1e6):
            return f"{figures(value / size)} {prefix}{symbol}{per}".strip()
    return f"{figures(value)} {symbol}{per}".strip()


def times(ratio: float | None) -> str:
    """Return a ratio as `1.31×`, with three decimals where it is within 2 % of 1."""
    if ratio is None:
        return DASH
    if ratio >= 100:
        return f"{figures(ratio)}×"
    if 0 < ratio < 0.01:
        return f"{figures(ratio, 2)}×"
    return f"{ratio:.3f}×" if abs(ratio - 1) < 0.02 else f"{ratio:.2f}×"


def counted(number: int, noun: str) -> str:
    """Return `1 core`, `2 cores`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def share(value: float | None) -> str:
    """Return a share as a percentage: `28 %`, `1.8 %`, `0.05 %`."""
    if value is None:
        return DASH
    percent = value * 100
    digits = 0 if abs(percent) >= 10 else 1 if abs(percent) >= 0.1 else 2
    if 99.5 <= abs(percent) < 100:  # something is left
        digits = 1 if abs(percent) < 99.95 else 2
    return f"{percent:.{digits}f} %".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Return `14.2 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def about(seconds: float | None) -> str:
    """Return an estimated duration: `about 4 min`, `about 2.5 h`; empty where it is unknown."""
    if seconds is None:
        return ""
    return f"about {max(round(seconds / 60), 1)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
