"""Default distillation steps: on proxy models only."""

from types import SimpleNamespace

import pytest

from lib.measure.metrics import settings
from lib.models.calibration.distillation import Lessons
from lib.optimizations.common import finetuning


@pytest.mark.parametrize(
    ("scale", "random_weights", "asked", "effort", "steps"),
    [
        ("proxy", False, -1, "quick", 30),
        ("proxy", False, -1, "preview", 5),
        ("proxy", False, 7, "preview", 7),
        ("full", False, -1, "quick", 0),
        ("full", False, 7, "quick", 7),
        ("proxy", False, 0, "quick", 0),
        ("slice", True, -1, "quick", 0),
        ("proxy", True, 7, "quick", 0),
    ],
)
def test_steps_follow_the_default_or_the_request(scale, random_weights, asked, effort, steps):
    loaded = SimpleNamespace(scale=scale, random_weights=random_weights)
    assert finetuning.steps_of(loaded, asked, 30, settings.read(effort, scale)) == steps


def test_the_effect_of_training_is_reported():
    assert finetuning.read(Lessons([], {})) == ""
    in_vain = Lessons([0.001, 0.09, 0.04], {0: 0.0005, 1: 0.02, 3: 0.01})
    assert in_vain.kept == 0 and finetuning.read(in_vain) == (
        "3 steps of training did not lower the divergence "
        "(0.01 nats per token on text set aside at best, 0.0005 before); none was kept."
    )
    early = finetuning.read(Lessons([0.1, 0.2, 0.3], {0: 0.1, 1: 0.05, 3: 0.07}))
    assert early.endswith("from 0.1 to 0.05 nats per token on text set aside; the state after 1 was kept.")
    assert finetuning.read(Lessons([0.1], {0: 0.1, 1: 0.05})).endswith("; the last was kept.")
