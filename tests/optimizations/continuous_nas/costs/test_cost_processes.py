"""Costs of parts from several processes: each builds an identical library, and the result is their mean."""

import pytest
import torch

from lib.measure.timing.processes import ChildFailed
from lib.models.calibration.activations import observe
from lib.models.decoding import mla_absorption
from lib.optimizations.continuous_nas import method
from lib.optimizations.continuous_nas.costs import cost_child, cost_processes, request_costs, subblock_costs

PROFILE = request_costs.RequestProfile("small", 16, 2, 2, "time")
OPTIONS = {"attention": ("whole", "groups_50"), "dense": ("whole", "channels_50"), "experts": ("whole", "experts_50")}


def _setting(tiny, name, batch, options=None):
    model = mla_absorption.absorb(tiny(name))
    seen = observe(model, [batch])
    library = method.build(model, seen, options)
    return model, library, method.saliency(model, seen), options, PROFILE, batch["input_ids"][:1]


def test_the_gpu_is_synchronized_only_where_it_is_in_use(waited):
    in_use, times = waited
    assert len(subblock_costs._rounds({("part",): lambda: None}, 1, 0)["part",]) == 1
    assert len(times) == (4 if in_use else 0)  # on both sides of the warm-up and of the round


def test_several_processes_time_every_option(tiny, name, batch):
    setting = _setting(tiny, name, batch)
    times = cost_processes.measure(*setting, rounds=2, processes=2)
    expected = request_costs.measure(*setting[:2], *setting[4:], rounds=1)
    assert times.keys() == expected.keys()
    for kind in ("prefill", "decode"):
        assert {slot: tuple(options) for slot, options in times[kind].items()} == setting[1].space
        assert all(seconds > 0 for options in times[kind].values() for seconds in options.values())


@pytest.mark.parametrize("options", [None, OPTIONS])
def test_each_process_builds_an_identical_library_with_its_own_seed(tiny, name, batch, options, monkeypatch):
    """The weights and decoding paths are the same; no two processes share a seed."""
    model, library, *rest = _setting(tiny, name, batch, options)
    seen = []

    def capture(there, library_there, profile, prompt_BP, *, rounds, seed):
        seen.append((there, library_there, rounds, seed))
        assert profile == PROFILE and torch.equal(prompt_BP, batch["input_ids"][:1])
        return {"prefill": {}, "decode": {}, "prefill_rest": float(seed), "decode_rest": 0.0}

    monkeypatch.setattr(request_costs, "measure", capture)
    monkeypatch.setattr(cost_processes.children, "run", lambda program, jobs: [cost_child.run(job) for job in jobs])
    assert cost_processes.measure(model, library, *rest, rounds=7, processes=3)["prefill_rest"] == 1.0
    assert [(rounds, seed) for _, _, rounds, seed in seen] == [(4, 0), (4, 1), (4, 2)]
    for there, library_there, _, _ in seen:
        assert mla_absorption.is_absorbed(there) == mla_absorption.is_absorbed(model)
        assert library_there.space == library.space
        for slot, replacements in library.modules.items():
            for option, module in replacements.items():
                tensors = zip(module.parameters(), library_there.modules[slot][option].parameters(), strict=True)
                assert all(torch.equal(*pair) for pair in tensors), (slot, option)


def test_a_mean_is_taken_entry_by_entry():
    tables = [
        {"prefill": {"00.attention": {"whole": a}}, "decode": {"00.attention": {"whole": b}}}
        for a, b in ((1, 4), (3, 8))
    ]
    rests = ({"prefill_rest": 0.0, "decode_rest": 2.0}, {"prefill_rest": 1.0, "decode_rest": 4.0})
    assert cost_processes.mean([table | rest for table, rest in zip(tables, rests)]) == {
        "prefill": {"00.attention": {"whole": 2.0}},
        "decode": {"00.attention": {"whole": 6.0}},
        "prefill_rest": 0.5,
        "decode_rest": 3.0,
    }


def test_a_process_that_fails_is_reported(tiny, batch, monkeypatch):
    setting = _setting(tiny, "qwen3-4b-instruct-2507", batch)
    monkeypatch.setattr(cost_processes.children, "run", lambda program, jobs: [{}, {"failed": "no memory"}])
    with pytest.raises(ChildFailed, match="costs of parts: no memory"):
        cost_processes.measure(*setting, rounds=1, processes=2)


def test_a_single_process_is_the_current_one(tiny, batch, monkeypatch):
    setting = _setting(tiny, "qwen3-4b-instruct-2507", batch)
    monkeypatch.setattr(cost_processes.children, "run", lambda program, jobs: pytest.fail("a process was started"))
    assert cost_processes.measure(*setting, rounds=1, processes=1).keys() >= {"prefill", "decode"}
    monkeypatch.setenv(cost_processes.children.VARIABLE, "none")
    assert cost_processes.measure(*setting, rounds=1).keys() >= {"prefill", "decode"}
