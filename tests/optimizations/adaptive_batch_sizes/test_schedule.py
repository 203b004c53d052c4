"""A schedule of the simulation, made again on the real model: the same calls, the same cache."""

import pytest

from lib.measure.serving import policy_comparison, slo, step_timing
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.policy_comparison import ServingSetup
from lib.measure.serving.protocol import Limits
from lib.measure.serving.slo import Single
from lib.measure.serving.traffic import Lengths
from lib.optimizations.adaptive_batch_sizes import schedule
from lib.optimizations.adaptive_batch_sizes.rivals import Chunked, FixedSize


@pytest.fixture
def setup(tiny):
    import torch

    text_T = torch.randint(8, 96, (64,), generator=torch.Generator().manual_seed(2))
    times = step_timing.measure(tiny("qwen3-4b-instruct-2507"), text_T, (16, 48), repeats=1, most=4)
    chat, documents = Lengths(8, 6), Lengths(24, 4)
    single = Single.of(times, documents)
    limits = Limits(4, None, times.bytes_per_token, None)
    return ServingSetup(times, slo.objectives(single, 20.0, 20.0), single, limits, "iteration", chat, documents)


@pytest.mark.parametrize("make", [lambda: FixedSize(3), lambda: Chunked(8, 4)])
def test_the_real_model_makes_the_recorded_calls_and_its_cache_grows_as_far(tiny, setup, make, monkeypatch):
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
