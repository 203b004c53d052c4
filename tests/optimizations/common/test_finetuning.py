"""Steps of distillation by default: on proxy models alone."""

from types import SimpleNamespace

import pytest

from lib.optimizations.common import finetuning


@pytest.mark.parametrize(
    ("scale", "random_weights", "asked", "steps"),
    [
        ("proxy", False, -1, 30),
        ("full", False, -1, 0),
        ("full", False, 7, 7),
        ("proxy", False, 0, 0),
        ("slice", True, -1, 0),
        ("proxy", True, 7, 0),
    ],
)
def test_steps_by_default_and_asked_for(scale, random_weights, asked, steps):
    loaded = SimpleNamespace(scale=scale, random_weights=random_weights)
    assert finetuning.steps_of(loaded, asked, on_proxy=30) == steps
