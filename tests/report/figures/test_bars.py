"""Bars with their physical bounds: no text is placed outside of the axes, which would leave them no room."""

import warnings

import pandas as pd

from lib.report.figures import style


def test_an_interval_far_beyond_its_bar_leaves_room_for_the_text():
    times = {"time": [10.0, 12.0], "bound": [1.0, 1.0], "low": [9.0, 11.0], "high": [11.0, 200.0]}
    frame = pd.DataFrame({"workload": ["prefill"] * 2, "arm": ["baseline", "optimized"]} | times)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = style.bound(frame)
        assert style.png(figure)
    (axes,) = figure.axes
    assert all(text.get_position()[0] < axes.get_xlim()[1] for text in axes.texts)


def test_a_token_is_visible_beside_a_prompt_that_takes_a_hundred_times_as_long():
    """Previously, on one axis, the decoding bars were narrower than the mark of their bound."""
    lines = [("prefill", "baseline", 1214.0, 780.0), ("prefill", "optimized", 1271.0, 660.0)]
    lines += [("decode", "baseline", 6.7, 1.4), ("decode", "optimized", 7.1, 0.9)]
    figure = style.bound(pd.DataFrame(lines, columns=["workload", "arm", "time", "bound"]))
    assert style.png(figure)
    widest = [max(bar.get_width() for bar in axes.patches) / axes.get_xlim()[1] for axes in figure.axes]
    assert len(widest) == 2 and min(widest) > 0.5
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "time (ms)"] and len(figure.legends) == 1
