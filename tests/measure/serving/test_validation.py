"""What a simulated number carries: planted errors of the simulation widen its interval, large ones forbid a verdict."""

import math

import pytest

from lib.measure.metrics import measurement
from lib.measure.serving import traffic, validation
from lib.measure.serving.protocol import RequestOutcome, Served
from lib.measure.serving.slo import Objectives
from lib.measure.serving.traffic import Lengths, ServingRequest, Trace

OBJECTIVE = Objectives(1.0, 0.1)


def run(seconds, count=40):
    """A run in which a request a second takes `seconds`, a tenth of it to the first token."""
    requests = tuple(ServingRequest(i, float(i), 8, 11) for i in range(count))
    trace = Trace("by hand", 0, (traffic.Phase(float(count), 1.0, Lengths(8, 11)),), requests)
    outcomes = [
        RequestOutcome(request, request.arrival, request.arrival + seconds / 10, request.arrival + seconds, 11)
        for request in requests
    ]
    return Served(trace, "planted", outcomes, end=float(count))


def measured(gain, spread=0.01, floor=0.005):
    baseline = [10 * (1 + spread * step) for step in (-3, -2, -1, 1, 2, 3, 0, 0)]
    optimized = [value * gain * (1 + spread / 2 * sign) for value, sign in zip(baseline, (1, -1, 1, -1, 1, -1, 1, -1))]
    return measurement.from_samples(
        "goodput_requests_per_second",
        "serve",
        baseline,
        optimized,
        source="simulated",
        floor=floor,
        provenance="estimated",
    )


def test_a_simulation_is_beside_itself_without_error_and_a_planted_one_is_seen():
    real = {"fixed": [run(0.5), run(0.5)], "ours": [run(0.6), run(0.6)]}
    rows = validation.beside({name: [runs, runs] for name, runs in real.items()}, real, OBJECTIVE)
    assert {row["quantity"] for row in rows} == set(validation.COMPARED) and len(rows) == 10
    assert all(row["error"] == 0 and row["least"] == row["simulated"] == row["most"] for row in rows)
    slower = {"fixed": [[run(0.5), run(0.5)]], "ours": [[run(0.9), run(0.9)]]}
    error = validation.simulation_error(validation.beside(slower, real, OBJECTIVE), "planted")
    # Ours: three of the five quantities are half as long again, goodput and tokens are the same.
    assert error.baseline == 0 and error.optimized == pytest.approx(3 * 0.5 / 5)
    assert validation.error_of(error) == error.optimized


def test_without_replays_the_error_is_unknown():
    assert validation.simulation_error([], "planted").verdict == "unavailable"
    assert validation.error_of(validation.simulation_error([], "planted")) is None
    assert validation.carried(measured(1.3), None).verdict == "informative"


def test_the_error_adds_in_quadrature_to_the_interval():
    plain = measured(1.3)
    carried = validation.carried(plain, 0.05)
    half = math.log(carried.ci[1] / carried.ratio)
    assert half == pytest.approx(math.hypot(math.log(plain.ci[1] / plain.ratio), 0.05))
    assert carried.verdict == plain.verdict == "better" and "5.0%" in carried.source
    assert validation.carried(plain, 0.0).ci == pytest.approx(plain.ci)


def test_an_error_as_large_as_the_effect_leaves_it_open():
    assert measured(1.06).verdict == "better"
    assert validation.carried(measured(1.06), 0.08).verdict == "inconclusive"
    assert measured(0.9).verdict == validation.carried(measured(0.9), 0.02).verdict == "worse"


def test_beyond_a_tenth_nothing_is_judged_and_the_reason_is_said():
    carried = validation.carried(measured(1.5), 0.12)
    assert carried.verdict == "informative" and "12%" in carried.reason and "limit 10%" in carried.reason
    assert carried.ci[0] < measured(1.5).ci[0]
