"""The protocol on a planted machine: what would refute it is decided by the numbers, and figures are read in two
sentences.
"""

from types import SimpleNamespace

import pandas as pd
import pytest

from lib.measure.serving import policy_comparison, slo
from lib.measure.serving.policy_comparison import DOCUMENTS, ServingSetup
from lib.measure.serving.server import Limits
from lib.measure.serving.slo import Single
from lib.measure.serving.step_times import StepTimes
from lib.optimizations.adaptive_batch_sizes import experiment, real_time, study
from lib.report.text import reading


@pytest.fixture(scope="module")
def traffic():
    dense = tuple(tuple(4e-3 + 2.5e-4 * b + 1.2e-6 * b * c for c in range(0, 1040, 16)) for b in range(1, 33))
    times = StepTimes(dense, (5e-3, 1.2e-4, 2e-8), (1e-4, 2e-10), (0.95, 1.0, 1.05), (1.0,), 6144.0, 0)
    single = Single.of(times, DOCUMENTS)
    setup = ServingSetup(times, slo.objectives(single, 8.0, 3.0), single, Limits(32, None, 6144.0, 1.0))
    changing = tuple(policy_comparison.traces(setup, "changing", 5, (0, 1)))
    return study.TrafficStudy(setup, 0.1, 5, (0, 1), changing)


def test_sizes_are_read_in_two_sentences_and_the_oracle_is_no_worse_than_its_start(traffic):
    oracle = experiment.oracle_goodput(traffic, 4)
    frame = experiment.over_sizes(traffic, 4, oracle)
    assert set(frame.arm) == {"fixed size", "time-out", "AIMD", "adaptive", "oracle"}
    assert oracle >= float(frame[(frame.arm == "fixed size") & (frame.strength == 4)].value.iloc[0])
    reading.two(*experiment.read_sizes(frame))
    reading.two(*experiment.read_sizes(frame.assign(value=0.0)))


def test_a_run_is_read_in_two_sentences(traffic):
    served = traffic.setup.run(traffic.changing[0], traffic.adaptive())
    reading.two(*real_time.read_timeline(served, traffic.setup.objective))


def test_the_interval_at_constant_rates_is_one_where_both_arms_serve_alike(traffic, monkeypatch):
    monkeypatch.setattr(study.TrafficStudy, "adaptive", lambda self: experiment.FixedSize(8))
    rows = [{"traffic": name, "best size": 8} for name in policy_comparison.CONSTANT]
    assert experiment.constant_interval(traffic, rows) == pytest.approx((1.0, 1.0))
    assert experiment.constant_interval(traffic, rows[:2]) == (None, None)


@pytest.mark.parametrize(
    "error, real, disturbed, refuted",
    [(0.05, 9.0, "nothing", False), (0.5, 9.0, "nothing", True), (0.5, 9.0, "load", None), (0.5, 2.0, "nothing", None)],
)
def test_a_simulation_strays_only_beyond_its_own_jitter(error, real, disturbed, refuted):
    row = {"policy": "adaptive", "error": error, "least": 1.0, "most": 3.0, "real": real}
    trial = SimpleNamespace(
        rows=[row] * 5,
        served=SimpleNamespace(policy="adaptive"),
        error=SimpleNamespace(optimized=error),
        disturbed=disturbed,
    )
    decided, evidence = real_time.simulation_refuted(trial)
    assert decided is refuted and f"{error:.3f}" in evidence


def test_targets_without_a_number_are_unknown():
    trial = SimpleNamespace(error=SimpleNamespace(optimized=None), earlier=SimpleNamespace(optimized=0.05))
    rows = [{"traffic": "constant 0.4", "adaptive ÷ best": 0.97}]
    frame = pd.DataFrame(experiment.targets(rows, SimpleNamespace(ratio=1.1), trial))
    assert list(frame.reached) == [True, False, "unknown", True]
