"""A simulated schedule, repeated on the real model: the same calls, the same cache."""

import pytest
import torch

from lib.measure.serving import policy_comparison, slo
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.policy_comparison import ServingSetup
from lib.measure.serving.protocol import Limits
from lib.measure.serving.slo import Single
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths
from lib.models.decoding import batch_cache
from lib.optimizations.adaptive_batch_sizes import schedule
from lib.optimizations.adaptive_batch_sizes.rivals import Chunked, FixedSize


@pytest.fixture
def setup(tiny):
    """A synthetic machine whose cache is that of the tiny model; at this load prompts arrive while rows are running."""
    row = batch_cache.prefill(tiny("qwen3-4b-instruct-2507"), [torch.arange(8, 24)])
    dense = tuple((4e-3 + 1e-3 * rows,) * 20 for rows in range(1, 5))
    per_token = row.bytes / row.length
    times = StepTimes(dense, (1e-3, 1e-4, 0.0), (0.0, 0.0), (1.0,), (1.0,), per_token, 0)
    chat, documents = Lengths(8, 6), Lengths(24, 4)
    single = Single.of(times, documents)
    limits = Limits(4, None, per_token, None)
    return ServingSetup(times, slo.objectives(single, 20.0, 20.0), single, limits, "iteration", chat, documents)


@pytest.mark.parametrize("make", [lambda: FixedSize(3), lambda: Chunked(8, 4)])
def test_the_real_model_repeats_the_recorded_calls_and_cache_growth(tiny, setup, make, monkeypatch):
    traces = policy_comparison.traces(setup, "changing", 6, (0, 1, 2))
    calls, peak = schedule.largest(setup, traces, make)
    assert peak == max(schedule.record(setup, trace, make)[1] for trace in traces)
    engines, most, init = [], [], ModelEngine.__init__
    monkeypatch.setattr(ModelEngine, "__init__", lambda self, *rest: (init(self, *rest), engines.append(self))[0])
    for name in ("prefill", "decode", "shared"):
        call = getattr(ModelEngine, name)
        monkeypatch.setattr(
            ModelEngine, name, lambda self, *rest, call=call: (call(self, *rest), most.append(self.bytes))[0]
        )
    schedule.workload(tiny("qwen3-4b-instruct-2507"), calls)()
    assert max(most) == peak and engines[0].rows is None and not engines[0].reading
    assert len(most) == sum(name != "leave" for name, *_ in calls)
    if make().name.startswith("chunked"):
        assert any(name == "shared" for name, *_ in calls)
