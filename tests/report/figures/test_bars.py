"""Bars with their physical bounds: nothing is written outside of the axes, which would leave them no room."""

import warnings

import pandas as pd

from lib.report.figures import style


def test_an_interval_far_beyond_its_bar_leaves_room_for_what_is_written():
    times = {"time": [10.0, 12.0], "bound": [1.0, 1.0], "low": [9.0, 11.0], "high": [11.0, 200.0]}
    frame = pd.DataFrame({"workload": ["prefill"] * 2, "arm": ["baseline", "optimized"]} | times)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = style.bound(frame)
        assert style.png(figure)
    (axes,) = figure.axes
    assert all(text.get_position()[0] < axes.get_xlim()[1] for text in axes.texts)
