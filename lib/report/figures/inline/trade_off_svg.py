"""Charts of the index as SVG: quality against speed, readable on a phone, in print and without colour.

A point is a shape that shows whether quality was maintained, with a number; a line joins the best trade-offs. Takes
plain points and returns text; the colours are the page's (`style.css`). Knows no records.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 14, 46
PLACES = ((0, -15), (14, -9), (16, 4), (12, 16), (0, 20), (-13, 15), (-16, 4), (-14, -9), (24, -16), (-24, -16),
          (26, 20), (-26, 20), (0, -30), (0, 34))  # fmt: skip
STEPS = (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)

COLOURS = """
svg { --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --shade: #eef2f6; --good: #005f99;
  --bad: #a33d00; --open: #5b5f66; }
@media (prefers-color-scheme: dark) { svg { --paper: #14171b; --ink: #e4e8ec; --soft: #a2abb5; --line: #353c45;
  --shade: #232a32; --good: #8cc8f5; --bad: #ffab7d; --open: #b5bcc4; } }
text { font: 12.5px system-ui, sans-serif; fill: var(--soft); }
.paper { fill: var(--paper); stroke: var(--line); }
.title { font-size: 18px; font-weight: 600; fill: var(--ink); }
.name { font-size: 15px; fill: var(--ink); }
.axis { fill: var(--ink); }
.mark { font-weight: 700; fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.grid { stroke: var(--line); stroke-width: .7; }
.zero { stroke: var(--soft); stroke-width: 1.2; }
.band { fill: var(--shade); }
.front { fill: none; stroke: var(--ink); stroke-width: 1.6; stroke-dasharray: 5 3; }
.spread { stroke: var(--soft); stroke-width: 1; opacity: .75; }
.leader { stroke: var(--soft); stroke-width: .7; }
.kept { fill: var(--good); }
.open { fill: var(--paper); stroke: var(--open); stroke-width: 2; }
.lost { fill: none; stroke: var(--bad); stroke-width: 2.6; }
"""  # for a picture without a page; the same as in style.css


@dataclass(frozen=True)
class TradeOff:
    """A trade-off: `x` is the gain in speed, `y` the change of quality in points, both with their spread; `mark` is the
    text next to the point, `name` its name, `state` the verdict on quality; `own` marks the run that a page is about.
    `judged` says whether its speed was decided; undecided or estimated points are drawn, but are never best trade-offs.
    `of_several` marks a mean over several models; its `state` is the worst of theirs.
    """

    mark: str
    name: str
    x: float
    y: float
    x_low: float | None
    x_high: float | None
    y_low: float | None
    y_high: float | None
    state: str
    own: bool = False
    judged: bool = True
    of_several: bool = False

    @property
    def called(self) -> str:
        """Mark and name, and whether quality was not maintained (for a mean: on some model)."""
        lost = f", quality not maintained{_on_some(self.of_several)}" if self.state == "not_maintained" else ""
        return f"{self.mark} {self.name}{lost}"


def _on_some(of_several: bool) -> str:
    return " on some model" if of_several else ""


def front(points: Sequence[TradeOff], margin: float = 0.0) -> list[TradeOff]:
    """Return the Pareto front of speed and quality, from slow to fast: points beaten neither by another point nor by
    the baseline.

    The baseline beats a point that is no faster and gains at most `margin` points of quality. Points that are not
    `judged` are left out and beat no other.
    """
    gains = [p for p in points if p.judged and (p.x > 1 or p.y > margin)]
    best = [p for p in gains if not any(q.x >= p.x and q.y >= p.y and (q.x > p.x or q.y > p.y) for q in gains)]
    return sorted(best, key=lambda p: p.x)


def words(points: Sequence[TradeOff], title: str, margin: float = 0.0) -> str:
    """Return the chart's alternative text."""
    if not points:
        return f"{title}: no run has both numbers."
    named = ", ".join(f"{p.called} ({p.x:.2f}×, {p.y:+.1f})" for p in front(points, margin)) or "none"
    lost = f"{sum(p.state == 'not_maintained' for p in points)} lose quality beyond the margin"
    lost += _on_some(any(p.of_several for p in points))
    own = next((f" This run: {p.mark} {p.name} ({p.x:.2f}×, {p.y:+.1f})." for p in points if p.own), "")
    return f"{title}: {len(points)} points; {lost}; best trade-offs: {named}.{own}"


def trade_off(points: Sequence[TradeOff], title: str, margin: float, y_label: str = "F1, change in points") -> str:
    """Return the chart as an SVG element; its title is the alternative text."""
    alt = escape(words(points, title, margin))
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{alt}"><title>{alt}</title>'
    return "".join([head, *_drawing(points, margin, y_label), "</svg>"])


def _drawing(points: Sequence[TradeOff], margin: float, y_label: str) -> list[str]:
    """Return the elements of the chart, without the enclosing SVG element."""
    across = _Axis([p.x for p in points] + [v for p in points for v in (p.x_low, p.x_high) if v], LEFT, WIDTH - RIGHT)
    ends = [v for p in points for v in (p.y_low, p.y_high) if v is not None]
    low, high = min([*ends, *(p.y for p in points), -margin * 1.2]), max([*ends, *(p.y for p in points), margin * 1.2])
    pad = 0.08 * (high - low)
    low, high = low - pad, high + pad

    def down(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    band = down(-margin) - down(margin)
    parts = [
        f'<rect class="band" x="{LEFT}" y="{down(margin):.1f}" width="{WIDTH - LEFT - RIGHT}" height="{band:.1f}"/>'
    ]
    parts += _grid(across, down, low, high, y_label)
    best = front(points, margin)
    path = " ".join(f"{across(p.x):.1f},{down(p.y):.1f}" for p in best)
    parts.append(f'<polyline class="front" points="{path}"/>')
    for p in points:
        parts += _whiskers(p, across, down)
    placed: list[tuple[float, float]] = [(across(p.x), down(p.y)) for p in points]
    for p in sorted(points, key=lambda p: p not in best):
        parts += _point(p, across(p.x), down(p.y), placed)
    return parts


def picture(points: Sequence[TradeOff], title: str, margin: float, legend: Sequence[tuple[str, str]]) -> str:
    """Return the chart as a standalone SVG file: with its colours, a background, and a legend of (mark, name).

    It follows the reader's colour scheme; shapes repeat the meaning of the colours.
    """
    width, height, scale = 920, 540, 1.4
    alt = escape(words(points, title, margin))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">'
        f"<title>{alt}</title><style>{COLOURS}</style>",
        f'<rect class="paper" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="24" y="34">{escape(title)}</text>',
        f'<svg x="14" y="50" width="{WIDTH * scale:.0f}" height="{HEIGHT * scale:.0f}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        *_drawing(points, margin, "F1, change in points"),
        "</svg>",
        *_legend(legend, margin, 640, 84),
        "</svg>\n",
    ]
    return "".join(parts)


def _legend(names: Sequence[tuple[str, str]], margin: float, x: float, y: float) -> list[str]:
    """Return the legend of a picture: one line per mark, shape, line and band."""
    step = min(24, 250 / max(len(names), 1))
    parts = []
    for number, (mark, name) in enumerate(names):
        at = y + step * number
        parts.append(f'<text class="mark" x="{x - 10}" y="{at:.0f}" text-anchor="end">{escape(mark)}</text>')
        parts.append(f'<text class="name" x="{x}" y="{at:.0f}">{escape(name)}</text>')
    at = y + step * len(names) + 20
    states = {
        "maintained": "quality maintained",
        "inconclusive": "inconclusive on some model",
        "not_maintained": "not maintained on some model",
    }
    for state, name in states.items():
        parts += [_shape(state, x - 16, at - 5), f'<text class="name" x="{x}" y="{at:.0f}">{name}</text>']
        at += 24
    strokes = {
        "spread": "range over the models",
        "front": "the best trade-offs",
        "band": f"less than the margin of {margin:g} points",
    }
    for kind, name in strokes.items():
        if kind == "band":
            parts.append(f'<rect class="band" x="{x - 30}" y="{at - 13:.0f}" width="22" height="16"/>')
        else:
            parts.append(_line(kind, x - 30, at - 5, x - 8, at - 5))
        parts.append(f'<text class="name" x="{x}" y="{at:.0f}">{name}</text>')
        at += 24
    return parts


class _Axis:
    """A logarithmic axis of ratios."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        self.low = math.log(min([*values, 0.92])) - 0.03
        self.high = math.log(max([*values, 1.1])) + 0.05
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (math.log(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round ratios that are far enough apart for their labels."""
        steps: list[float] = []
        for step in sorted(STEPS, key=lambda s: (s != 1, abs(math.log(s)))):
            inside = self.low <= math.log(step) <= self.high
            if inside and all(abs(self(step) - self(tick)) > 38 for tick in steps):
                steps.append(step)
        return sorted(steps)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _grid(across: _Axis, down: Callable[[float], float], low: float, high: float, y_label: str) -> list[str]:
    parts, floor, end = [], HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in across.ticks():
        parts.append(_line("zero" if tick == 1 else "grid", across(tick), TOP, across(tick), floor))
        parts.append(f'<text x="{across(tick):.1f}" y="{floor + 17}" text-anchor="middle">{tick:g}×</text>')
    widest = 10 ** math.ceil(math.log10((high - low) / 7))
    step = next((s for s in (0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 7), widest)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        at, text = down(number * step), f"{number * step:+g}".replace("-", "−") if number else "0"
        parts.append(_line("grid" if number else "zero", LEFT, at, end, at))
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    axis = '<text class="axis" text-anchor="middle" transform'
    parts.append(f'{axis}="translate({(LEFT + end) / 2} {HEIGHT - 8})">speed, gain over the baseline</text>')
    parts.append(f'{axis}="translate(13 {(TOP + floor) / 2}) rotate(-90)">{escape(y_label)}</text>')
    return parts


def _whiskers(p: TradeOff, across: _Axis, down: Callable[[float], float]) -> list[str]:
    parts = []
    if p.x_low and p.x_high:
        parts.append(_line("spread", across(p.x_low), down(p.y), across(p.x_high), down(p.y)))
    if p.y_low is not None and p.y_high is not None:
        parts.append(_line("spread", across(p.x), down(p.y_low), across(p.x), down(p.y_high)))
    return parts


def _point(p: TradeOff, x: float, y: float, placed: list[tuple[float, float]]) -> list[str]:
    """Return shape, label and its leader line; the label is placed as far as possible from everything drawn so far."""

    def room(place: tuple[int, int]) -> float:
        at = x + place[0], y + place[1]
        inside = LEFT + 8 < at[0] < WIDTH - RIGHT - 8 and TOP + 8 < at[1] < HEIGHT - BOTTOM - 4
        nearest = min((math.dist(at, other) for other in placed), default=99)
        return min(nearest, 15) - 0.02 * math.hypot(*place) - (0 if inside else 50)

    dx, dy = max(PLACES, key=room)
    placed.append((x + dx, y + dy))
    leader = _line("leader", x, y, x + dx, y + dy)
    label = f'<text class="mark" x="{x + dx:.1f}" y="{y + dy + 4:.1f}" text-anchor="middle">{escape(p.mark)}</text>'
    ring = f'<circle class="own" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' if p.own else ""
    return [leader if math.hypot(dx, dy) > 18 else "", ring, _shape(p.state, x, y), label]


def _shape(state: str, x: float, y: float) -> str:
    """Return the shape for a verdict on quality: a disc for maintained, a cross for not maintained, else a ring."""
    if state in ("maintained", "better"):
        return f'<circle class="kept" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if state == "not_maintained":
        return f'<path class="lost" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
    return f'<circle class="open" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
