"""Planted idle parts go first; budgets are met or refused; a stop changes no answer; scores survive a drift."""

import gc
import itertools
import math
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.measure.metrics import settings
from lib.models.calibration.activations import observe
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.search import study
from lib.optimizations.continuous_nas import additivity, drift, experiment, replacement_library, rivals
from lib.optimizations.continuous_nas import method as nas
from lib.optimizations.continuous_nas.costs import cost_processes, request_costs
from lib.optimizations.continuous_nas.costs.subblock_costs import BlockTimes
from lib.optimizations.continuous_nas.mip import CostTable
from lib.optimizations.continuous_nas.replacement_library import WHOLE, child
from lib.optimizations.continuous_nas.scoring import divergence, probe

PREFILL, MEMORY = request_costs.PROFILES["prefill_heavy"], request_costs.PROFILES["memory_limited"]


def _times(shelf) -> dict:
    """Return seconds by number of parameters, which no clock disturbs."""
    seconds = {
        slot: {name: 1e-6 * sum(p.numel() for p in module.parameters()) for name, module in options.items()}
        for slot, options in shelf.modules.items()
    }
    return {"prefill": seconds, "decode": seconds, "prefill_rest": 0.001, "decode_rest": 0.001}


def _begin(model, batch, **options):
    shelf = nas.build(model, observe(model, [batch]))
    return nas.Search(shelf, probe(model, [batch]), **options), request_costs.tables(
        model, shelf, PREFILL, _times(shelf)
    )


def test_the_search_removes_planted_idle_parts(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    blocks = anatomy(model).blocks
    blocks[2].attention.output.weight.zero_()
    blocks[1].feed_forward.down.weight.zero_()
    search, costs = _begin(model, batch)
    idle = search.library.whole | {"02.attention": "none", "01.feed_forward": "none"}
    best = nas.run(search, costs, time_share=costs.share(idle) + 1e-9, memory_share=1.0, refinements=3)
    assert best.choice == idle and best.divergence < 1e-6


def test_an_option_that_always_yields_nan_is_left_out_with_its_reason(tiny, batch, tmp_path, monkeypatch):
    """Previously one NaN ended the run: no study stores it. Planted in one option, and in two that are each finite
    alone.
    """
    model, present, swap, measure = tiny("qwen3-4b-instruct-2507"), {}, nas.swap, nas.divergence

    def planted(*arguments):
        both = present["00.feed_forward"] == present["01.feed_forward"] == "none"
        return float("nan") if present["02.attention"] == "none" or both else measure(*arguments)

    monkeypatch.setattr(nas, "swap", lambda library, choice: present.update(choice) or swap(library, choice))
    monkeypatch.setattr(nas, "divergence", planted)
    options = {"time_share": 0.7, "memory_share": 1.0, "refinements": 12}
    ends = []
    for _ in range(2):
        with study.opened(tmp_path / "s.db", "s", {}, 1) as stored:
            search, costs = _begin(model, batch, study=stored)
            scores = nas.score(search)
            ends.append((nas.run(search, costs, **options), len(stored.trials)))
    assert ends[0] == ends[1], "what was stored resumes"
    best = ends[0][0]
    assert math.isfinite(best.divergence) and search.open_to(best.choice)
    assert search.left_out == {("02.attention", "none"): nas.NO_NUMBER} and "none" not in scores["02.attention"]
    assert [e.phase for e in search.evaluations if not search.open_to(e.choice)] == ["library"], "it is tried once"
    assert all(search.open_to(choice) for choice in nas.greedy(scores, costs, 1000))
    added = additivity.compare(search, scores)
    assert added.left_out == {"02.attention: none": nas.NO_NUMBER}
    assert np.isfinite(added.pairs[["x", "y"]].to_numpy()).all()
    setup = SimpleNamespace(observation=SimpleNamespace(blocks=[None] * 4), library=search.library)
    shown = experiment.options_of_middle_block(setup, costs, scores).set_index(["slot", "option"])["left out"].dropna()
    assert shown.to_dict() == {("02.attention", "none"): nas.NO_NUMBER}


def test_a_model_with_nan_outputs_is_named(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    model.lm_head.weight = torch.nn.Parameter(torch.full_like(model.lm_head.weight, math.nan), requires_grad=False)
    with pytest.raises(UserError, match="the model's own outputs on the search text are not numbers"):
        probe(model, [batch])


def test_any_seed_gives_proposals(tiny, batch):
    search, costs = _begin(tiny("qwen3-4b-instruct-2507"), batch, seed=2**31 - 1)
    nas.run(search, costs, time_share=0.9, memory_share=1.0, refinements=1)
    assert [evaluation.phase for evaluation in search.evaluations][-1] == "prefill_heavy: refine"


def test_a_search_ends_when_the_space_is_exhausted(tiny, batch, monkeypatch):
    """A model of few blocks can have fewer choices than requested refinements: previously the search never ended."""
    proposal = nas._proposal

    def watched(search, *others):
        assert not search.exhausted, "there is nothing left to propose"
        return proposal(search, *others)

    monkeypatch.setattr(nas, "_proposal", watched)
    model = tiny("qwen3-4b-instruct-2507")
    shelf = nas.build(model, observe(model, [batch]), {"attention": (WHOLE,), "dense": (WHOLE, "none")})
    search = nas.Search(shelf, probe(model, [batch]))
    costs = request_costs.tables(model, shelf, PREFILL, _times(shelf))
    best = nas.run(search, costs, time_share=0.9, memory_share=1.0, refinements=1000)
    assert search.exhausted and len(search.evaluations) == 2 ** len(anatomy(model).blocks)
    assert costs.share(best.choice) <= 0.9


def test_front_levels_with_the_same_choice_are_evaluated_once():
    """One cheap replacement is the best under several budgets: previously it took the places of different choices."""
    names = {slot: (WHOLE, "half", "none") for slot in ("00.feed_forward", "01.feed_forward", "02.feed_forward")}
    scores = {
        slot: {WHOLE: 0.0, "half": 0.1 * (at + 1), "none": 1.0 * (at + 1)} for at, slot in enumerate(sorted(names))
    }
    seconds = {slot: {WHOLE: 1.0, "half": 0.4, "none": 0.1} for slot in names}
    whole = dict.fromkeys(names, WHOLE)
    costs = request_costs.RequestCosts(PREFILL, CostTable("time", seconds), CostTable("memory", seconds), whole)
    limits = [level for level in nas.LEVELS if level >= 0.8]
    least = {tuple(nas.mip.solve(scores, [nas.Budget(costs.time, 3 * level)])[0].items()) for level in limits}
    assert len(limits) == 3 and len(least) == 1, "planted: one choice serves three levels"
    choices = nas.candidates(scores, costs, 0.8, 1.0, count=6)
    assert len(choices) == len({tuple(choice.items()) for choice in choices}) == 6


def test_answers_are_within_the_budgets(tiny, name, batch):
    model = tiny(name)
    search, costs = _begin(model, batch)
    best = nas.run(search, costs, time_share=0.7, memory_share=0.8, refinements=4)
    assert costs.share(best.choice, costs.time) <= 0.7 and costs.share(best.choice, costs.memory) <= 0.8
    measured = nas.swap(search.library, best.choice)
    assert divergence(measured, search.probe) == pytest.approx(best.divergence, rel=1e-4)
    within = [
        evaluation.divergence
        for evaluation in search.evaluations
        if costs.share(evaluation.choice, costs.time) <= 0.7 and costs.share(evaluation.choice, costs.memory) <= 0.8
    ]
    assert best.divergence <= min(within) * (1 + nas.NEAR)


def test_scores_add_up_best_where_little_changes(tiny, batch):
    """The program's sum is exact for one replacement: the check of its prediction must confirm that."""
    search, _ = _begin(tiny("qwen3-coder-30b"), batch)
    scores = nas.score(search)
    table = CostTable("", scores)
    singles = [
        evaluation
        for evaluation in search.evaluations
        if sum(option != WHOLE for option in evaluation.choice.values()) == 1
    ]
    assert len(singles) == len(search.evaluations) > 10
    assert all(table.of(evaluation.choice) == pytest.approx(evaluation.divergence) for evaluation in singles)


def test_unreachable_budgets_name_the_nearest(tiny, batch):
    search, costs = _begin(tiny("qwen3-4b-instruct-2507"), batch)
    with pytest.raises(NotApplicable, match=r"no choice has time of at most .* the nearest within reach is"):
        nas.run(search, costs, time_share=0.001, memory_share=1.0, refinements=1)
    with pytest.raises(NotApplicable, match=r"no choice has memory of at most .* bytes; the nearest within reach is"):
        nas.run(search, costs, time_share=1.0, memory_share=0.01, refinements=1)


def test_a_search_stopped_anywhere_and_resumed_ends_the_same(tiny, name, batch, tmp_path):
    model = tiny(name)
    options = {"time_share": 0.8, "memory_share": 1.0, "refinements": 5}
    whole, costs = _begin(model, batch)
    expected = nas.run(whole, costs, **options)
    for stop in (3, len(whole.evaluations) - 3, None):
        with study.opened(tmp_path / "s.db", "s", {"name": name}, 1) as stored:
            search = nas.Search(whole.library, whole.probe, stored, stop_after=stop)
            if stop is None:
                best = nas.run(search, costs, **options)
                continue
            with pytest.raises(nas.SearchStopped):
                nas.run(search, costs, **options)
            assert len(search.evaluations) == stop
    assert best.choice == expected.choice and best.divergence == pytest.approx(expected.divergence, rel=1e-5)
    assert [evaluation.choice for evaluation in search.evaluations] == [
        evaluation.choice for evaluation in whole.evaluations
    ]


def test_a_drift_keeps_scores_and_renews_costs(tiny, batch):
    model = tiny("qwen3-coder-30b")
    search, costs = _begin(model, batch)
    nas.run(search, costs, time_share=0.8, memory_share=1.0, refinements=2)
    before = len(search.evaluations)
    drifted = request_costs.tables(model, search.library, MEMORY, _times(search.library))
    followed = drift.adapt(search, drifted, time_share=1.0, memory_share=0.8, refinements=2)
    assert len(followed.warm) == len(search.evaluations) - before + 1 and followed.warm[0] > 0
    assert followed.evaluations_until(0.95) < len(followed.cold) / 3
    phases = [evaluation.phase for evaluation in search.evaluations[before:]]
    assert "library" not in phases and len(phases) <= 12
    assert drifted.share(nas.best(search, drifted, 1.0, 0.8).choice) <= 0.8
    assert costs.scarce.unit == "s" and drifted.scarce.unit == "bytes"


@pytest.mark.parametrize("workload", ["prefill_heavy", "memory_limited"])
def test_a_budget_of_one_leaves_something_to_swap_after_a_drift(tiny, batch, workload):
    model = tiny("qwen3-coder-30b")
    search, _ = _begin(model, batch)
    search.study = study._make(None, "s", {}, 1)

    def costs_of(name, _):
        return request_costs.tables(model, search.library, request_costs.PROFILES[name], _times(search.library))

    followed = drift.follow(search, nas.score(search), costs_of, workload, nas.SearchLimits(1.0, 1.0, 2, 2))
    assert all(row["budget asked"] <= drift.MOST and row["share of the scarce"] < 1 for row in followed.rows)
    drift.assert_exact_swaps(search, model, batch)


def test_an_unreachable_budget_after_a_drift_is_made_relative(tiny, batch):
    """The parts are a tenth of the request, as on a busy machine: no share of 0.8 can be met, and none fails."""
    model = tiny("qwen3-coder-30b")
    search, costs = _begin(model, batch)
    nas.run(search, costs, time_share=0.8, memory_share=1.0, refinements=2)

    def costs_of(name, study):
        times = _times(search.library)
        whole = sum(options[WHOLE] for options in times["prefill"].values())
        rest = {"prefill_rest": 9 * whole, "decode_rest": 9 * whole}
        return request_costs.tables(model, search.library, request_costs.PROFILES[name], times | rest)

    hard = costs_of("decode_heavy", None)
    assert hard.reach(hard.time) > 0.85
    with pytest.raises(NotApplicable, match="no choice has time"):
        nas.candidates(nas.score(search), hard, 0.8, 1.0)
    relative = hard.relative(hard.time, 0.8)
    assert hard.reach(hard.time) < relative < 1 and nas.candidates(nas.score(search), hard, relative, 1.0)
    assert costs.relative(costs.time, 0.8) == 0.8, "what can be met stays as it was asked"


def _setup(model, shelf, seconds: float = 0.0) -> experiment.SearchSetup:
    loaded, effort = SimpleNamespace(model=model), SimpleNamespace(brief=True, preview=True, blocks=2)
    return experiment.SearchSetup(loaded, effort, 0, None, shelf, None, [], None, 1, 24, seconds)


def test_the_price_of_a_search_includes_evaluations_of_earlier_runs(tiny, batch, tmp_path, monkeypatch):
    """Judging and measuring sleep: however the work is split over two runs, the price covers all of it."""
    judging, measuring = 0.01, 0.2
    model = tiny("qwen3-4b-instruct-2507")
    shelf, limits = nas.build(model, observe(model, [batch])), nas.SearchLimits(0.9, 1.0, 2, 2)
    monkeypatch.setattr(nas, "divergence", lambda *_: time.sleep(judging) or 0.1)
    monkeypatch.setattr(experiment.io, "weights_hash", lambda _: "")
    monkeypatch.setattr(experiment.SearchSetup, "times_of", lambda *_, **__: time.sleep(measuring) or _times(shelf))
    prices, evaluations = [], 0
    for _ in range(2):
        setup = _setup(model, shelf)
        with experiment.opened(setup, tmp_path, "s", []) as stored:
            search = nas.Search(shelf, None, stored)
            with setup.timed():
                costs = setup.costs_in_processes("prefill_heavy", stored)
            assert setup.scores_of(search) and setup.seconds > measuring
            experiment.interrupted(setup, search, costs, limits)
            evaluations = len(stored.trials)
        prices.append(setup.seconds)
    assert evaluations > 20 and min(prices) >= evaluations * judging + measuring


def test_a_search_resumed_after_its_drifts_equals_the_first_one(tiny, batch, tmp_path, monkeypatch):
    """Planted: later evaluations diverge less, so that the choices of the drifts are the best of all."""
    model, later = tiny("qwen3-coder-30b"), itertools.count(1)
    shelf, limits = nas.build(model, observe(model, [batch])), nas.SearchLimits(0.9, 1.0, 4, 2)
    monkeypatch.setattr(nas, "divergence", lambda *_: 1 / next(later))
    monkeypatch.setattr(experiment.io, "weights_hash", lambda _: "")
    monkeypatch.setattr(experiment.SearchSetup, "times_of", lambda *_, **__: _times(shelf))
    found, charged, warm = [], [], []
    for _ in range(2):
        setup = _setup(model, shelf)
        with experiment.opened(setup, tmp_path, "s", []) as stored:
            search = nas.Search(shelf, None, stored, workload="prefill_heavy")
            charged.append(search.taken_over)
            costs, scores = setup.costs_in_processes("prefill_heavy", stored), setup.scores_of(search)
            search, winner = experiment.interrupted(setup, search, costs, limits)
            found.append((winner.choice, len(search.evaluations)))
            followed = drift.follow(search, scores, setup.costs_of, "prefill_heavy", limits)
            warm.append([adaptation.warm for adaptation in followed.adaptations])
            phases = [trial.user_attrs["phase"] for trial in stored.trials]
    assert found[0] == found[1] and warm[0] == warm[1]
    assert {phase.partition(":")[0] for phase in phases} == {"library", *request_costs.PROFILES}
    first = [phase.partition(":")[0] in ("library", "prefill_heavy") for phase in phases]
    seconds = sum(trial.user_attrs["seconds"] for trial, kept in zip(stored.trials, first) if kept)
    assert charged == pytest.approx([0, seconds]) and len(phases) > sum(first) == found[1][1]


def test_a_study_serves_smaller_requests_and_other_budgets(tiny, batch, tmp_path, monkeypatch):
    """Planted: later evaluations diverge less. What another run refined is the best of this one too, and the search
    from scratch that it was compared with had never seen it: "stopping changed the answer".
    """
    model, later = tiny("qwen3-coder-30b"), itertools.count(1)
    shelf = nas.build(model, observe(model, [batch]))
    monkeypatch.setattr(nas, "divergence", lambda *_: 1 / next(later))
    monkeypatch.setattr(experiment.io, "weights_hash", lambda _: "")
    monkeypatch.setattr(experiment.SearchSetup, "times_of", lambda *_, **__: _times(shelf))
    winners = []
    for time_share, refinements in ((0.9, 6), (0.9, 0), (0.7, 2)):
        setup, limits = _setup(model, shelf), nas.SearchLimits(time_share, 1.0, refinements, 2)
        with experiment.opened(setup, tmp_path, "s", []) as stored:
            search = nas.Search(shelf, None, stored, workload="prefill_heavy")
            costs = setup.costs_in_processes("prefill_heavy", stored)
            setup.scores_of(search)
            _, winner = experiment.interrupted(setup, search, costs, limits)
            winners.append(winner.choice)
            assert costs.share(winner.choice) <= time_share
    assert winners[0] == winners[1], "what was refined before is known still"


def test_single_process_costs_do_not_serve_requests_for_several(tiny, batch, tmp_path, monkeypatch):
    """After a drift, costs are measured in one process; the next run may search under that very profile."""
    model, asked = tiny("qwen3-4b-instruct-2507"), []
    shelf = nas.build(model, observe(model, [batch]))

    def times_of(*_, processes, rounds):
        asked.append((processes, rounds))
        return _times(shelf)

    monkeypatch.setattr(experiment.io, "weights_hash", lambda _: "")
    monkeypatch.setattr(experiment.SearchSetup, "times_of", times_of)
    setup = _setup(model, shelf)
    setup.effort = settings.read("standard")
    with experiment.opened(setup, tmp_path, "s", []) as stored:
        for _ in range(2):
            setup.costs_of("decode_heavy", stored)
            setup.costs_in_processes("decode_heavy", stored)
    assert asked == [(1, setup.effort.blocks // 2), (cost_processes.PROCESSES, setup.effort.blocks)]


def test_rivals_are_raced_one_at_a_time(tiny, batch, monkeypatch):
    """Previously five copies of a real model were held at once, without a check that there is room."""
    model = tiny("qwen3-4b-instruct-2507")
    search, costs = _begin(model, batch)
    alike = replacement_library.uniform_choices(search.library.space, 8)
    search.evaluations += [nas.ChoiceEvaluation(choice, 1 - costs.share(choice), "uniform") for choice in alike]
    alive, most, child_of = [], [], replacement_library.child

    def watched(library, choice):
        made = child_of(library, choice)
        alive.append(weakref.ref(made))
        return made

    def race(*_):
        def against(rival, blocks):
            gc.collect()
            most.append(sum(made() is not None for made in alive))
            return SimpleNamespace(ratio=1.0 + 0.1 * (-1) ** len(most))

        return against

    monkeypatch.setattr(replacement_library, "child", watched)
    monkeypatch.setattr(rivals, "race", race)
    setup = replace(_setup(model, search.library), effort=settings.read("quick"), prompt_BP=batch["input_ids"][:1])
    equal, winner = SimpleNamespace(uniform=search, uniform_costs=costs), search.evaluations[0]
    frame, near, _ = experiment.against_uniform(setup, equal, costs, winner, None)
    assert len(frame) == len(most) == rivals.near(setup.effort) and max(most) == 1 and len(near) == 2


def test_greedy_choices_replace_least_divergence_per_cost_first(tiny, batch):
    search, costs = _begin(tiny("qwen3-4b-instruct-2507"), batch)
    scores = nas.score(search)
    path = nas.greedy(scores, costs, 1000)
    shares = [costs.share(choice) for choice in path]
    assert shares == sorted(shares, reverse=True) and shares[-1] == pytest.approx(costs.reach(costs.scarce))
    rates = {
        (slot, option): scores[slot][option] / (costs.scarce.values[slot][WHOLE] - costs.scarce.values[slot][option])
        for slot, options in search.library.space.items()
        for option in options
        if option != WHOLE
    }
    slot, option = min(rates, key=rates.__getitem__)
    assert path[0] == search.library.whole | {slot: option}
    assert len(nas.greedy(scores, costs, 3)) == 3 and nas.greedy(scores, costs, 3)[-1] == path[-1]


def test_memory_is_counted_as_the_model_holds_it(tiny, name, batch):
    from lib.measure.roofline import cost_model

    model = tiny(name)
    search, costs = _begin(model, batch)
    tokens = PREFILL.batch * (PREFILL.prompt_tokens + PREFILL.new_tokens)
    for choice in (search.library.whole, {slot: options[-1] for slot, options in search.library.space.items()}):
        built = child(search.library, choice)
        bytes_held = cost_model.weights_bytes(built) + tokens * cost_model.kv_cache_bytes_per_token(built)
        assert costs.memory.of(choice) == pytest.approx(bytes_held)


def test_the_first_new_token_of_a_request_comes_from_the_prompt():
    """A request of eight tokens decodes seven, as where it is timed; previously eight were predicted."""
    slots = {"00.feed_forward": {WHOLE: 1.0}}
    times = BlockTimes(slots, {"00.feed_forward": {WHOLE: 0.25}}, 0.5, 0.125)
    assert request_costs.time_table(times, PREFILL).of({"00.feed_forward": WHOLE}) == 1.0 + 0.5 + 7 * (0.25 + 0.125)
    one = replace(PREFILL, new_tokens=1)
    assert request_costs.time_table(times, one).of({"00.feed_forward": WHOLE}) == 1.5


def test_times_are_measured_for_every_option(tiny, name, batch):
    model = tiny(name)
    shelf = nas.build(model, observe(model, [batch]))
    indices = [block.attention.module.layer_idx for block in anatomy(shelf.student).blocks]
    small = request_costs.RequestProfile("small", 16, 2, 2, "time")
    times = request_costs.measure(model, shelf, small, batch["input_ids"][:1], rounds=2)
    costs = request_costs.tables(model, shelf, small, times)
    assert {slot: tuple(options) for slot, options in times["prefill"].items()} == shelf.space
    assert all(value > 0 for options in costs.time.values.values() for value in options.values())
    assert costs.time.values["01.attention"]["none"] < costs.time.values["01.attention"]["whole"]
    assert [block.attention.module.layer_idx for block in anatomy(shelf.student).blocks] == indices
    prompt = {"input_ids": batch["input_ids"][:1]}
    assert torch.equal(shelf.student.generate(**prompt, max_new_tokens=4), model.generate(**prompt, max_new_tokens=4))


def test_controls(tiny, name, batch):
    model = tiny(name)
    shelf = nas.build(model, observe(model, [batch]), replacement_library.UNIFORM)
    alike = replacement_library.uniform_choices(shelf.space, 12)
    assert 4 <= len(alike) <= 12 and len({tuple(choice.items()) for choice in alike}) == len(alike)
    for choice in alike:
        kinds = {}
        for slot, option in choice.items():
            kinds.setdefault((slot[3:], shelf.space[slot]), set()).add(option)
        assert all(len(options) == 1 for options in kinds.values())
    drawn = replacement_library.random_choices(shelf.space, 40, 1)
    assert (
        drawn
        == replacement_library.random_choices(shelf.space, 40, 1)
        != replacement_library.random_choices(shelf.space, 40, 2)
    )
    replaced = [sum(option != WHOLE for option in choice.values()) for choice in drawn]
    assert min(replaced) <= 2 and max(replaced) >= len(shelf.space) - 2
    assert set(itertools.chain(*(choice.values() for choice in drawn))) > {WHOLE}


def test_random_choices_are_distinct_and_end_with_the_space():
    space = {"00.attention": ("whole", "none"), "00.feed_forward": ("whole", "channels_50", "none")}
    drawn = replacement_library.random_choices(space, 9, 0)
    assert len(drawn) == len({tuple(choice.items()) for choice in drawn}) == 6


def test_rivals_are_the_nearest_undominated_ones_on_both_sides():
    points = [(0.9, 0.1), (0.8, 0.2), (0.85, 0.3), (0.7, 0.4), (0.5, 0.9), (0.95, 0.05), (0.4, 2.0)]
    assert rivals.around(points, 0.78, 3) == [1, 3, 0], "a choice that another one beats in both is no rival"
    assert rivals.bracketing({4: 0.97, 1: 1.06, 3: 1.02, 0: 1.3, 2: 0.8}) == [3, 4]
    assert rivals.bracketing({4: 0.97, 1: 0.99}) == [1], "all are faster: the nearest alone"


def test_a_rival_is_interpolated_to_equal_speed_and_never_extrapolated():
    assert rivals.at_equal_speed([1.1, 1 / 1.1], [0.1, 0.4]) == pytest.approx(0.2)
    assert rivals.at_equal_speed([1 / 1.1, 1.1], [0.4, 0.1]) == pytest.approx(0.2)
    assert rivals.at_equal_speed([1.0, 0.9], [0.1, 0.4]) == pytest.approx(0.1)
    assert rivals.at_equal_speed([1.05, 1.02], [0.1, 0.15]) == pytest.approx(0.15), "beyond both: the nearer one"
    assert rivals.at_equal_speed([0.97], [0.3]) == pytest.approx(0.3)
