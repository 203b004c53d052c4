"""A slice scaled to full depth: exact for counted numbers, and for times on a clock with known ticks."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from lib.measure.metrics import measurement, paired_stats
from lib.measure.roofline import cost_model, full_depth
from lib.measure.timing import workloads
from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.structure import slice_depth
from lib.models.structure.anatomy import anatomy

COUNTS = {
    "glm-4.7-flash": 29_943_390_976,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "qwen3-coder-30b": 30_532_122_624,
    "qwen3-vl-2b": 2_127_532_032,
}


def slice_of(name: str, layers: int | None = None, device: str = "meta"):
    described = parameters.read(name)
    config = described.config("slice")
    if layers is not None:
        config = parameters.merge(config, {"num_hidden_layers": layers})
    model = io.build(config, described.architecture, device=device)
    return slice_depth.state(model, described.full, described.architecture)


def as_slice(model, whole: list[str]):
    setattr(anatomy(model).config, slice_depth.NAME, whole)
    return model


def test_a_gpu_is_waited_for_only_if_it_is_in_use(waited):
    in_use, times = waited
    full_depth._synchronize()
    assert bool(times) is in_use


def test_parameters_of_a_slice_scale_to_the_whole_model(name):
    model = slice_of(name)
    sizes = {m.metric: m for m in full_depth.sizes((model, model))}
    assert sizes["full_depth_parameters"].baseline == COUNTS[name]
    assert len(slice_depth.whole(model)) == parameters.read(name).config("full").get("num_hidden_layers", 28)
    assert all(m.provenance == "derived" and m.verdict == "informative" for m in sizes.values())
    assert measurement.lint(sizes.values()) == []


def test_the_size_of_a_slice_is_estimated_from_its_configuration(name):
    about = parameters.about_slice_parameters(parameters.read(name))
    assert about == pytest.approx(cost_model.parameters(slice_of(name)), rel=0.15)


def test_the_cache_of_the_whole_model_follows_from_its_blocks():
    latent, grouped = slice_of("glm-4.7-flash"), slice_of("qwen3-coder-30b")
    size = {m: next(m.parameters()).element_size() for m in (latent, grouped)}
    cache = {m: full_depth.sizes((m, m))[-1].baseline for m in (latent, grouped)}
    assert cache[latent] == 47 * (512 + 64) * size[latent]
    assert cache[grouped] == 48 * 2 * 4 * 128 * size[grouped]


def test_each_blocks_time_is_multiplied_by_the_blocks_it_represents(tiny, monkeypatch):
    model = as_slice(tiny("glm-4.7-flash"), ["dense"] + ["experts"] * 46)
    counts, clock = slice_depth.stands_for(model), [0.0]
    assert counts == [1.0, *[46 / 3] * 3]
    monkeypatch.setattr(full_depth, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    ticks = {block.module: 2.0 if block.feed_forward.kind == "dense" else 3.0 for block in anatomy(model).blocks}
    ticks[anatomy(model).head] = 7.0
    for module, seconds in ticks.items():
        module.register_forward_hook(lambda *_, seconds=seconds: clock.__setitem__(0, clock[0] + seconds))
    work = workloads.prefill(model, torch.randint(8, 90, (1, 16)))
    assert full_depth.whole_seconds(work, model, counts) == pytest.approx(7 + 2 + 46 * 3)
    assert full_depth.whole_seconds(work, model, [1.0] * 4) == pytest.approx(7 + 2 + 3 * 3)
    assert full_depth.times_longer(work, model, counts) == pytest.approx(147 / 18)
    (rate,) = full_depth.speed("prefill", (work, work), (model, model), ([18.0] * 6, [9.0] * 6))
    assert rate.baseline == pytest.approx(16 / 147) and rate.ratio == pytest.approx(2) and rate.provenance == "derived"
    steps = workloads.steps(model, torch.randint(8, 90, (1, 16)), 4)
    (rate,) = full_depth.speed("decode", (steps, steps), (model, model), ([18.0 * 4] * 6, [18.0 * 4] * 6))
    assert rate.baseline == pytest.approx(1 / 147) and not steps.step_seconds
    assert measurement.lint([rate]) == []
    assert rate.process_sigma and rate.ci[0] < 1 < rate.ci[1], "what one process hides is in the interval"
    uneven = [18.0] * 6, [9.0, 9.0, 6.0, 6.0, 12.0, 12.0]
    (rate,) = full_depth.speed("prefill", (work, work), (model, model), uneven, process=[0, 0, 1, 1, 2, 2])
    low, high = paired_stats.student_interval([math.log(18 / seconds) for seconds in (9, 6, 12)])
    assert rate.processes == 3 and rate.ci == pytest.approx((math.exp(low), math.exp(high)))


def test_blocks_of_a_unique_kind_represent_only_themselves(tiny):
    """The first blocks of a model may be treated differently, and a deeper model has no more of them."""
    model = as_slice(tiny("qwen3-4b-instruct-2507"), ["dense"] * 36)
    assert slice_depth.stands_for(model) == [9.0] * 4 and not slice_depth.alone(model)
    assert slice_depth.stands_for(model, {0, 1}) == [1.0, 1.0, 17.0, 17.0]
    assert slice_depth.stands_for(model, {0, 1, 2, 3}) == [9.0] * 4, "or nothing would stand for the others"
    latent = as_slice(tiny("glm-4.7-flash"), ["dense"] + ["experts"] * 46)
    assert slice_depth.stands_for(latent, {0, 1}) == [1.0, 1.0, 22.5, 22.5]
    optimized = copy.deepcopy(model)
    for block in anatomy(optimized).blocks[:2]:
        setattr(block.module, slice_depth.ALONE, True)
    assert slice_depth.alone(optimized) == {0, 1} and full_depth._counts((model, optimized)) == [1.0, 1.0, 17.0, 17.0]
    every = {m.metric: m.optimized for m in full_depth.sizes((model, model))}
    assert {m.metric: m.optimized for m in full_depth.sizes((model, optimized))} == every


def test_hooks_are_removed_afterwards(tiny, name):
    model = as_slice(tiny(name), ["dense"] * 9)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    full_depth.whole_seconds(workloads.prefill(model, torch.randint(8, 90, (1, 8))), model, [1.0] * 4)
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_a_whole_model_is_not_scaled(tiny, name):
    model = tiny(name)
    work = workloads.prefill(model, torch.randint(8, 90, (1, 8)))
    assert full_depth.sizes((model, model)) == full_depth.speed("prefill", (work, work), (model, model), ([], [])) == []


@pytest.mark.parametrize("case", ["kind", "count", "streamed"])
def test_metrics_that_cannot_be_scaled_give_the_reason(tiny, case):
    if case == "kind":
        base = other = slice_of("glm-4.7-flash", layers=1)
        reason = "no block of kind experts, of which the whole model has 46"
    else:
        base = as_slice(tiny("qwen3-4b-instruct-2507"), ["dense"] * 36)
        other = copy.deepcopy(base)
        if case == "count":
            del anatomy(other).decoder.layers[-1]
            reason = "3 blocks, the baseline 4"
        else:
            other.weights_in_memory_bytes = 1000
            reason = "streamed"
    metrics = full_depth.sizes((base, other)) + full_depth.speed("prefill", (), (base, other), ([], []))
    assert {m.provenance for m in metrics} == {"unavailable"} and all(reason in m.reason for m in metrics)


def test_a_copied_or_saved_slice_still_describes_the_whole_model(tiny, tmp_path):
    model = as_slice(tiny("qwen3-4b-instruct-2507"), ["dense"] * 36)
    io.save(model, tmp_path)
    assert slice_depth.whole(copy.deepcopy(model)) == slice_depth.whole(io.load_folder(tmp_path)) == ["dense"] * 36
