"""A small forest plot as SVG: the changes of a few metrics with their intervals; right of the line is better.

The axis is the change of each metric itself in percent, signed so that right is better: 26 % smaller and 19 % faster
are both on the right. Takes plain values and returns text; the colours are the page's (`style.css`). Knows no records.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, RIGHT, ROW, TOP, BOTTOM = 420, 14, 25, 8, 36
LEAST_LEFT, GAP, LETTER = 100, 8, 7.6  # space for names: the minimum, the gap to the plot, a letter of a wide font
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
MOST = 300.0  # percent; larger changes are drawn at the edge
KEPT, LOST = ("better", "maintained"), ("worse", "not_maintained", "invalid")


@dataclass(frozen=True)
class ForestLine:
    """A line of the plot, in percent, signed so that above 0 is better. `text` is the change in words, `floor` the
    noise floor in percent, `state` the verdict.
    """

    name: str
    text: str
    value: float
    low: float | None
    high: float | None
    floor: float | None
    state: str


def forest(changes: Sequence[ForestLine], title: str) -> str:
    """Return the plot as an SVG element with an alternative text; empty where there are no changes."""
    if not changes:
        return ""
    height = TOP + ROW * len(changes) + BOTTOM
    left = max(LEAST_LEFT, GAP + LETTER * max(len(change.name) for change in changes))
    ends = [v for c in changes for v in (c.value, c.low, c.high) if v is not None]
    reach = min(max(abs(v) for v in [*ends, 5.0]), MOST)
    low, high = max(min([*ends, -0.3 * reach]), -reach) * 1.08, min(max([*ends, 0.3 * reach]), reach) * 1.08

    def across(value: float) -> float:
        inside = min(max(value, low), high)
        return left + (inside - low) / (high - low) * (WIDTH - left - RIGHT)

    alt = escape(f"{title}: {'; '.join(f'{c.name} {c.text}' for c in changes)}.")
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{alt}"><title>{alt}</title>']
    floor = TOP + ROW * len(changes)
    apart = LETTER * len("−100 %") * (high - low) / (WIDTH - left - RIGHT)  # width of a label, in percent
    step = next((s for s in STEPS if (high - low) / s <= 6 and s >= apart), STEPS[-1])
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        at, kind = across(number * step), "grid" if number else "zero"
        text = f"{number * step:+d} %".replace("-", "−") if number else "0"
        parts.append(f'<line class="{kind}" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{floor}"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 14}" text-anchor="middle">{text}</text>')
    for at, change in enumerate(changes):
        parts += _line(change, TOP + ROW * (at + 0.5), left, across)
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{floor + 30}" text-anchor="middle">right is better</text>')
    return "".join([*parts, "</svg>"])


def _line(change: ForestLine, y: float, left: float, across: Callable[[float], float]) -> list[str]:
    """Return name, noise band, interval and mark of one metric."""
    parts = [f'<text class="axis" x="{left - GAP:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(change.name)}</text>']
    if change.floor:
        start, end = across(-change.floor), across(change.floor)
        parts.append(
            f'<rect class="band" x="{start:.1f}" y="{y - 9:.1f}" width="{max(end - start, 0.5):.1f}" height="18"/>'
        )
    if change.low is not None and change.high is not None:
        parts.append(
            f'<line class="interval" x1="{across(change.low):.1f}" y1="{y:.1f}" x2="{across(change.high):.1f}" '
            f'y2="{y:.1f}"/>'
        )
    return [*parts, _mark(change.state, across(change.value), y)]


def _mark(state: str, x: float, y: float) -> str:
    """Return the shape of a verdict: a disc for better or maintained, a cross for a loss, a ring for all others."""
    if state in KEPT:
        return f'<circle class="kept" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if state in LOST:
        return f'<path class="lost" d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0 -9l-9 9"/>'
    return f'<circle class="open" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
