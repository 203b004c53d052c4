"""Calibration text grows with the width of a model, so that sums over it are invertible."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lib.measure.metrics import settings
from lib.models.calibration import second_moments
from lib.models.calibration.walk import Walk
from lib.models.checkpoints import io
from lib.models.dimensions import merge
from lib.models.parameters import read
from lib.optimizations.common.compression import calibration_text
from tests.conftest import TINY

QUICK = settings.read("quick")


def _wide(width: int):
    """Return a model without data whose feed-forward parts have `width` channels."""
    described = read("qwen3-4b-instruct-2507")
    config = merge(described.full, TINY["qwen3-4b-instruct-2507"] | {"intermediate_size": width})
    return io.build(config, described.architecture, device="meta")


@pytest.mark.parametrize("width", [64, 4096, 9728])
def test_there_are_more_tokens_than_inputs_at_every_width(width):
    model = _wide(width)
    for effort in (QUICK, replace(QUICK, calibration_tokens=2048)):
        count = calibration_text.sequences(model, effort)
        assert count * effort.calibration_tokens >= calibration_text.TOKENS_PER_INPUT * width
        assert count == effort.calibration_sequences or (count - 1) * effort.calibration_tokens < 2 * width
    few = calibration_text.sequences(model, QUICK, 2)
    assert few == 2 if width == 64 else few * QUICK.calibration_tokens >= 2 * width


def test_the_counted_tokens_are_the_summed_tokens(tiny, batch):
    model = tiny("qwen3-coder-30b")
    walk = Walk(model, [batch, batch, batch])
    next(iter(walk))
    chosen = second_moments.matrices(model, "all", 0)
    first, rest = second_moments.moments_apart(walk, chosen, 1)
    whole = second_moments.block_moments(walk, chosen, gram=True)
    for name, sums in whole.items():
        assert (first[name].tokens + rest[name].tokens == sums.tokens).all()
        assert (2 * first[name].tokens == rest[name].tokens).all()
        assert (first[name].gram + rest[name].gram - sums.gram).norm() <= 1e-5 * sums.gram.norm()


@pytest.mark.parametrize("width", [576, 1536, 9728])
def test_the_text_of_a_stack_grows_with_width_as_for_one_optimization(width, monkeypatch):
    """Widths of proxy models and of SmolLM2-135M need no more than effort quick has; Qwen3-4B's has the full rank."""
    asked = []
    monkeypatch.setattr(calibration_text.tasks, "calibration", lambda loaded, *size: asked.append(size) or [])
    loaded = SimpleNamespace(model=_wide(width), scale="full", random_weights=False)
    calibration_text.of_stack(loaded, QUICK, 3)
    calibration_text.batches(loaded, QUICK, 3)
    count, length, _ = asked[0]
    assert asked[0] == asked[1] == (calibration_text.sequences(loaded.model, QUICK), length, 3)
    assert count == QUICK.calibration_sequences if width < 2000 else count * length >= 2 * width
    loaded.random_weights = True
    calibration_text.of_stack(loaded, QUICK, 3)
    assert asked[2][0] == QUICK.calibration_sequences, "nothing is learned from random weights"


def test_a_stack_uses_the_text_of_the_effort_that_chose_it(monkeypatch):
    asked = []
    monkeypatch.setattr(calibration_text.tasks, "calibration", lambda loaded, *size: asked.append(size[0]) or [])
    loaded = SimpleNamespace(model=_wide(64), scale="full", random_weights=False)
    for effort, chosen_at in (("standard", ""), ("quick", "standard"), ("preview", ""), ("standard", "preview")):
        calibration_text.of_stack(loaded, settings.read(effort), chosen_at=chosen_at)
    expected = [settings.read(name).calibration_sequences for name in ("quick", "standard", "preview", "preview")]
    assert asked == expected, "that of its recipe; else that of the run, quick at most"
