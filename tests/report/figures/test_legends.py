"""Legends and axes of figures with many arms, long names or a spare slot: all of it is legible."""

import pandas as pd
import pytest
from matplotlib.figure import Figure

from lib.report.figures import curves, small_multiples, style, timelines
from lib.report.figures.timelines import Panel

LONG = [f"sparse neural networks, a control with a long name {number}" for number in range(9)]


def _curves(arms: list[str]) -> pd.DataFrame:
    lines = [(strength, 1 + 0.1 * at, arm, "a-model") for at, arm in enumerate(arms) for strength in (0.1, 0.3)]
    frame = pd.DataFrame(lines, columns=["strength", "value", "arm", "model"])
    return frame.assign(low=frame["value"] - 0.01, high=frame["value"] + 0.01)


def _points(arms: list[str], models: list[str]) -> pd.DataFrame:
    lines = [(1 + 0.1 * at, -0.1 * at, arm, model) for model in models for at, arm in enumerate(arms)]
    frame = pd.DataFrame(lines, columns=["x", "y", "arm", "label"])
    return frame.assign(x_low=0.9, x_high=1.9, y_low=-2.0, y_high=2.0)


def _names(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: style.impact(_curves(LONG), x_label="x", y_label="y"),
        lambda: style.trade_off(_points(LONG, ["m"]), x_label="x", y_label="y"),
        lambda: small_multiples.panels(_curves(LONG), x_label="x", y_label="y"),
        lambda: small_multiples.trade_offs(_points(LONG, ["m"]), x_label="x", y_label="y"),
        lambda: timelines.timeline([Panel(_curves(LONG[:4]).assign(seconds=1.0), "rows", "steps")] * 2),
    ],
)
def test_a_legend_of_long_names_is_at_most_as_wide_as_its_figure(drawn):
    figure = drawn()
    assert style.png(figure)
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and set(_names(figure)) <= set(LONG)


def test_short_legend_names_are_side_by_side():
    figure = small_multiples.trade_offs(_points(["a", "b", "c"], ["m"]), x_label="x", y_label="y")
    assert style.png(figure)
    heights = {round(text.get_window_extent().y0) for text in figure.legends[0].get_texts()}
    assert len(heights) == 1


def test_the_names_of_many_curves_are_below_them():
    few, many = (style.impact(_curves(LONG[:count]), x_label="x", y_label="y") for count in (curves.MOST_INSIDE, 9))
    assert not few.legends and few.axes[0].get_legend() is not None
    assert many.axes[0].get_legend() is None and _names(many) == LONG
    assert many.get_figheight() > few.get_figheight()


def test_only_a_baseline_is_labeled_as_one():
    options = {"x_label": "rows", "y_label": "ms", "reference": 1.0}
    for name, named in (("baseline", {}), ("objective", {"reference_name": "objective"})):
        (axes,) = style.impact(_curves(["one"]), **options, **named).axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [name, "one"]


def test_the_band_of_small_multiples_is_named():
    options = {"x_label": "x", "y_label": "y"}
    frame = _points(["one", "other"], ["m"])
    assert _names(small_multiples.trade_offs(frame, **options)) == ["one", "other"]
    assert _names(small_multiples.trade_offs(frame, **options, margin=(-2, 2)))[-1] == "within the margin"


@pytest.mark.parametrize(
    ("low", "high", "side", "lines"),
    [(0.0, 0.9, 0, 2), (0.4, None, 1, 2), (0.4, 0.9, None, 1), (None, None, None, 0), (0.0, None, None, 0)],
)
def test_an_interval_without_an_end_on_the_axis_is_drawn_to_the_edge(low, high, side, lines):
    """Previously a score that may be 0 was drawn without an interval, as if known exactly."""
    row = {"label": "retrieval", "dimension": "accuracy", "gain": 0.6, "gain_low": low, "gain_high": high}
    frame = pd.DataFrame([row | {"noise_floor": None, "verdict": "not_maintained"}])
    frame = frame.astype(dict.fromkeys(["gain_low", "gain_high", "noise_floor"], float))
    figure = style.forest(frame)
    assert style.png(figure)
    (axes,) = figure.axes
    drawn = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
    assert len(drawn) == lines
    if side is not None:
        assert drawn[-1] == [0.6, axes.get_xlim()[side]] and (low or high) in drawn[0]


@pytest.mark.parametrize(
    ("label", "dimension"),
    [
        ("goodput [serve, simulated, within capacity, fixed 12]", "performance"),
        ("key-value retrieval, exact match [generate, 64 tokens back]", "accuracy"),
    ],
)
def test_the_meaning_of_the_ratios_is_written_inside_the_figure(label, dimension):
    """Beside a long workload name the axis was narrower than its label, whose end was cut off."""
    row = {"label": label, "dimension": dimension, "gain": 1.2}
    frame = pd.DataFrame([row | {"gain_low": 1.1, "gain_high": 1.3, "noise_floor": 0.02, "verdict": "better"}])
    figure = style.forest(frame)
    assert style.png(figure)
    box = figure.axes[0].xaxis.label.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_a_run_over_its_budget_is_drawn_completely():
    frame = pd.DataFrame({"seconds": [0.0, 1.0], "cpu_percent": [150.0, 900.0], "memory_bytes": [1e6, 2e6]})
    assert style.process(frame, cores=2).axes[0].get_ylim()[1] > 900
    assert style.process(frame.head(1), cores=2).axes[0].get_ylim()[1] == 250


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_lowest_panel_has_axis_numbers(count):
    """With an odd number of models, the last panel but one is above an empty slot."""
    frame = _points(["one"], [f"m{number}" for number in range(count)])
    figure = small_multiples.trade_offs(frame, x_label="gain (×)", y_label="y")
    assert style.png(figure)
    lowest = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(lowest) == min(count, 2)
    for axes in lowest:
        assert any(tick.label1.get_visible() for tick in axes.xaxis.get_major_ticks())


@pytest.mark.parametrize(("values", "plain"), [((0.3, 2.0), True), ((1e-6, 2.0), False)])
def test_a_log_axis_of_few_decades_has_plain_numbers(values, plain):
    """Previously a speed-up of two appeared beside 2 × 10⁰."""
    frame = _curves(["one"]).drop(columns=["low", "high"]).assign(value=values)
    figure = style.impact(frame, x_label="x", y_label="y", log_y=True)
    assert style.png(figure)
    axis = figure.axes[0].yaxis
    texts = {tick.label1.get_text() for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]}
    assert ("1" in texts) == plain and any("10^" in text for text in texts) != plain


def test_one_far_reaching_interval_does_not_squeeze_the_others():
    """A score whose lower end was almost 0 made the axis three decades wide, and every other ratio a line at 1."""
    rows = [("accuracy", 0.41, 0.0013, 0.82, "not_maintained"), ("prefill rate", 1.1, 1.05, 1.15, "better")]
    frame = pd.DataFrame(rows, columns=["label", "gain", "gain_low", "gain_high", "verdict"])
    figure = style.forest(frame.assign(dimension="accuracy", noise_floor=0.01))
    assert style.png(figure)
    (axes,) = figure.axes
    assert axes.get_xlim()[0] > 0.1
    drawn = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
    assert drawn == [[0.82, 0.41], [1.05, 1.15], [0.41, axes.get_xlim()[0]]], "dashed to the edge"
