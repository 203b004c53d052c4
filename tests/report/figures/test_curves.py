"""Curves: what is drawn between two points."""

import pandas as pd
import pytest

from lib.report.figures import style


@pytest.mark.parametrize(("steps", "drawn"), [(True, "steps-post"), (False, "default")])
def test_a_front_draws_nothing_between_two_points(steps, drawn):
    """Joined by a straight line, a front of few points seemed to dominate values that nothing on it reaches."""
    points = pd.DataFrame({"strength": [90, 40, 60], "value": [0.1, 0.9, 0.4], "arm": "search"})
    figure = style.impact(points, x_label="cost, %", y_label="KL, nats/token", steps=steps)
    (line,) = figure.axes[0].lines
    assert line.get_drawstyle() == drawn and list(line.get_xdata()) == [40, 60, 90]
