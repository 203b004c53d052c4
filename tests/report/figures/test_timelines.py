"""Timelines: panels share one axis, objectives and marks are drawn, and invalid panels are refused."""

import pandas as pd
import pytest

from lib.report.figures import style, timelines
from lib.report.figures.timelines import Panel


def _frame(**columns):
    return pd.DataFrame({"seconds": [0.0, 1.0, 2.0], "value": [1.0, 4.0, 2.0], **columns})


def test_every_kind_is_drawn_on_one_axis():
    panels = [
        Panel(_frame(), "arrivals/s", "bars", width=1.0),
        Panel(_frame(arm=["ours", "ours", "fixed"]), "batch (rows)", "steps"),
        Panel(_frame(), "latency (ms)", "points", objective=3.0, log=True),
        Panel(_frame(), "queue"),
    ]
    figure = timelines.timeline(panels, marks=[(1.0, "more load")], title="A run")
    drawn = figure.axes
    assert [axes.get_ylabel() for axes in drawn] == ["arrivals/s", "batch (rows)", "latency (ms)", "queue"]
    assert len({axes.get_xlim() for axes in drawn}) == 1 and drawn[-1].get_xlabel() == "time (s)"
    assert drawn[2].get_yscale() == "log" and "more load" in [text.get_text() for text in drawn[0].texts]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"ours", "fixed", "objective"} <= set(names)
    assert style.png(figure)[:4] == b"\x89PNG"


def test_only_an_objective_is_labeled_as_one():
    figure = timelines.timeline([Panel(_frame(), "disagreement", objective=3.0, objective_name="bound of the guard")])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["bound of the guard"]


def test_all_zero_data_is_drawn_on_a_unit_scale():
    """Previously a profile that was never active had an axis from 0 to 0.05, on which nothing was visible."""
    never = _frame().assign(value=0.0)
    figure = timelines.timeline([Panel(never, "fast in charge", "steps"), Panel(_frame(), "queue")])
    assert figure.axes[0].get_ylim() == (0, 1) and figure.axes[1].get_ylim()[1] > 4


def test_invalid_panels_are_refused():
    with pytest.raises(ValueError, match="at least one panel"):
        timelines.timeline([])
    with pytest.raises(ValueError, match="panel x"):
        timelines.timeline([Panel(_frame(), "x", "pie")])
    with pytest.raises(ValueError, match="columns seconds and value"):
        timelines.timeline([Panel(pd.DataFrame({"seconds": [1.0]}), "x")])
