"""Calibration text grows with the width of a model, so that sums over it have an inverse."""

from dataclasses import replace

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


@pytest.mark.parametrize("width", [64, 4096, 9728])
def test_there_are_more_tokens_than_inputs_at_every_width(width):
    described = read("qwen3-4b-instruct-2507")
    config = merge(described.full, TINY["qwen3-4b-instruct-2507"] | {"intermediate_size": width})
    model = io.build(config, described.architecture, device="meta")
    for effort in (QUICK, replace(QUICK, calibration_tokens=2048)):
        count = calibration_text.sequences(model, effort)
        assert count * effort.calibration_tokens >= calibration_text.TOKENS_PER_INPUT * width
        assert count == effort.calibration_sequences or (count - 1) * effort.calibration_tokens < 2 * width
    few = calibration_text.sequences(model, QUICK, 2)
    assert few == 2 if width == 64 else few * QUICK.calibration_tokens >= 2 * width


def test_what_was_counted_is_what_is_summed(tiny, batch):
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
