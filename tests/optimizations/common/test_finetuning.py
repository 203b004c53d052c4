"""Steps of distillation by default: on proxy models alone."""

from types import SimpleNamespace

import pytest

from lib.measure.metrics import settings
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
def test_steps_by_default_and_asked_for(scale, random_weights, asked, effort, steps):
    loaded = SimpleNamespace(scale=scale, random_weights=random_weights)
    assert finetuning.steps_of(loaded, asked, 30, settings.read(effort, scale)) == steps
