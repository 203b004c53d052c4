"""Planted simulation errors widen the intervals of simulated numbers, and large errors prevent a verdict."""

import math

import pytest

from lib.measure.metrics import measurement, paired_samples
from lib.measure.serving import traffic, validation
from lib.measure.serving.protocol import RequestOutcome, Served
from lib.measure.serving.slo import Objectives
from lib.measure.serving.traffic import Lengths, ServingRequest, Trace
from lib.measure.serving.validation import SimulationError

OBJECTIVE = Objectives(1.0, 0.1)


def run(seconds, count=40):
    """Return a run with one request per second that takes `seconds`, a tenth of it to the first token."""
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
    return paired_samples.from_samples(
        "goodput_requests_per_second",
        "serve",
        baseline,
        optimized,
        source="simulated",
        floor=floor,
        provenance="estimated",
    )


def test_identical_runs_have_zero_error_and_a_planted_one_is_found():
    real = {"fixed": [run(0.5), run(0.5)], "ours": [run(0.6), run(0.6)]}
    rows = validation.compare({name: [runs, runs] for name, runs in real.items()}, real, OBJECTIVE)
    assert {row["quantity"] for row in rows} == set(validation.COMPARED) and len(rows) == 10
    assert all(row["error"] == 0 and row["least"] == row["simulated"] == row["most"] for row in rows)
    slower = {"fixed": [[run(0.5), run(0.5)]], "ours": [[run(0.9), run(0.9)]]}
    error = validation.simulation_error(validation.compare(slower, real, OBJECTIVE), "planted")
    # Ours: three of five quantities are 1.5 times as long; goodput and tokens are the same.
    assert error.baseline == 0 and error.optimized == pytest.approx(3 * 0.5 / 5)
    assert validation.error_of(error).share == error.optimized


@pytest.mark.parametrize("real_finishes", [True, False])
def test_a_tail_that_only_one_side_finishes_is_a_large_error(real_finishes):
    """Its percentile is infinite; without it, the mean of the other quantities called the simulation exact."""
    whole, cut = run(0.5), run(0.5)
    for outcome in cut.outcomes[-4:]:
        outcome.finished = None
    real, simulated = (whole, cut) if real_finishes else (cut, whole)
    arms = ("fixed", "ours")
    rows = validation.compare({name: [[simulated]] for name in arms}, {name: [real] for name in arms}, OBJECTIVE)
    assert {row["error"] for row in rows if row["quantity"] == "latency p95"} == {1.0}
    assert validation.error_of(validation.simulation_error(rows, "planted"), rows).share > validation.MOST_ERROR


def test_goodput_that_the_real_server_lacks_is_a_large_error():
    """All real requests are late, all simulated ones in time: the other quantities agree within a few percent."""
    strict = Objectives(1.0, 0.0455)
    real = {"fixed": [run(0.51)], "ours": [run(0.51)]}
    kind = {name: [[run(0.5)]] for name in real}
    rows = validation.compare(kind, real, strict)
    assert {row["error"] for row in rows if row["quantity"] == validation.GOODPUT} == {1.0}
    error = validation.simulation_error(rows, "planted")
    assert validation.error_of(error, rows).share == 1.0 and error.optimized > validation.MOST_ERROR
    assert validation.with_error(measured(1.5), validation.error_of(error, rows)).verdict == "informative"
    nowhere = validation.compare({name: [[run(0.51)]] for name in real}, real, strict)
    assert all(row["error"] is None for row in nowhere if row["quantity"] == validation.GOODPUT)


def test_quantities_that_agree_do_not_hide_a_goodput_error():
    """A third of the real requests are late: goodput is off by half, everything else hardly at all."""
    strict = Objectives(1.0, 0.0455)
    mixed = run(0.5, 39)
    for outcome in mixed.outcomes[::3]:
        outcome.finished += 0.02
    rows = validation.compare({name: [[run(0.5, 39)]] for name in "ab"}, {name: [mixed] for name in "ab"}, strict)
    error = validation.simulation_error(rows, "planted")
    assert validation.error_of(error).share == pytest.approx(0.1, abs=0.02)
    assert validation.error_of(error, rows).share == pytest.approx(0.5)


def test_without_replays_the_error_is_unknown():
    assert validation.simulation_error([], "planted").verdict == "unavailable"
    assert validation.error_of(validation.simulation_error([], "planted")).share is None
    assert validation.with_error(measured(1.3), SimulationError(None)).verdict == "informative"


def test_the_error_adds_in_quadrature_to_the_interval():
    plain = measured(1.3)
    carried = validation.with_error(plain, SimulationError(0.05, "planted"))
    half = math.log(carried.ci[1] / carried.ratio)
    assert half == pytest.approx(math.hypot(math.log(plain.ci[1] / plain.ratio), 0.05))
    assert carried.verdict == plain.verdict == "better" and "5.0 %" in carried.source
    assert validation.with_error(plain, SimulationError(0.0, "planted")).ci == pytest.approx(plain.ci)


def test_an_error_as_large_as_the_effect_leaves_it_undecided():
    assert measured(1.06).verdict == "better"
    assert validation.with_error(measured(1.06), SimulationError(0.08, "planted")).verdict == "inconclusive"
    assert (
        measured(0.9).verdict
        == validation.with_error(measured(0.9), SimulationError(0.02, "planted")).verdict
        == "worse"
    )


def test_an_error_above_a_tenth_prevents_a_verdict_and_gives_the_reason():
    carried = validation.with_error(measured(1.5), SimulationError(0.12, "planted"))
    assert carried.verdict == "informative" and "12.0 % (planted)" in carried.reason and "limit 10 %" in carried.reason
    assert carried.ci[0] < measured(1.5).ci[0]


def test_the_error_that_prevents_a_verdict_is_named():
    """Both arms' means lie within the limit; one policy's goodput exceeds it, and the reason says so."""
    error = measurement.informative("simulation_error", "serve", 0.05, 0.08, "planted")
    rows = [
        {"policy": name, "quantity": quantity, "error": share}
        for name, shares in (("static", (0.04, 0.06)), ("loop", (0.13, 0.03)))
        for quantity, share in zip((validation.GOODPUT, "latency p50"), shares)
    ]
    worst = validation.error_of(error, rows)
    assert worst == (0.13, f"{validation.GOODPUT}, loop")
    assert worst.forbids == f"{validation.WHAT} is 13.0 % (goodput share, loop), the limit 10 %"
    assert validation.error_of(error, rows[:2]) == (0.08, "mean of all quantities, static")
    assert SimulationError(0.1, "planted").forbids is None and "unknown" in SimulationError(None).forbids


def test_the_error_widens_any_log_scale_interval():
    assert SimulationError(0.04).widened(0.0, -0.03, 0.03) == pytest.approx((-0.05, 0.05))
    assert SimulationError(None).widened(0.0, -0.03, 0.03) == (-0.03, 0.03)
