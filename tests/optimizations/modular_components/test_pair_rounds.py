"""Pairs in their own rounds, on a tiny model: every pair has an outcome, and few models are held at a time."""

import gc
import types
import weakref

import torch

from lib.measure.metrics import settings
from lib.optimizations.common.evidence import interactions
from lib.optimizations.modular_components import attempts, experiment, method, pair_rounds
from lib.optimizations.modular_components.parts_setup import PartsSetup


def _setup(model, batch, keeps: bool, effort: str = "quick") -> PartsSetup:
    loaded = types.SimpleNamespace(model=model, random_weights=True, scale="proxy")
    quick = settings.read("quick")
    sample = batch["input_ids"]
    return PartsSetup(
        loaded, settings.read(effort), quick, 0, ["copy", "other", "third"], {}, [batch], sample, "", keeps
    )


def _copies(monkeypatch):
    described = {"touches": (), "needs": (), "invalidates": (), "trial": {}}

    def copy(model, calibration):
        return method.copy.deepcopy(model)

    modules = {
        stem: types.SimpleNamespace(COMPOSES=described, SEARCH_SPACE={}, apply=copy, applies_to=lambda model: None)
        for stem in ("copy", "other", "third")
    }
    monkeypatch.setattr(method, "parts", lambda: modules)


def test_each_pair_is_timed_with_its_parts_and_nothing_is_kept(tiny, batch, monkeypatch):
    _copies(monkeypatch)
    references, timed, attempt = [], [], attempts.attempt

    def watched(*arguments, **options):
        outcome = attempt(*arguments, **options)
        references.append(weakref.ref(outcome.model))
        return outcome

    def counted(models, *arguments):
        gc.collect()
        timed.append((set(models), sum(model() is not None for model in references)))
        return rounds(models, *arguments)

    rounds = interactions.time_arms
    monkeypatch.setattr(attempts, "attempt", watched)
    monkeypatch.setattr(interactions, "time_arms", counted)
    setup = _setup(tiny("qwen3-4b-instruct-2507"), batch, keeps=False, effort="standard")
    study, contrasts = pair_rounds.run(setup, batch["input_ids"][:1])
    assert study.score == 1.0 and len(study.pairs) == 6 and study.forced == {}
    assert timed[0][0] == {"baseline", "copy", "other", "copy → other", "other → copy"}
    assert len(timed) == 3 and max(held for _, held in timed) <= 4
    assert all(attempt.model is None for attempt in [*study.pairs.values(), *study.singles.values()])
    assert len(contrasts.alone) == 3 and len(contrasts.pairs) == 6 and len(contrasts.orders) == 3
    assert set(contrasts.headings) == {"prefill", "decode"} and contrasts.reading()
    rows = experiment.impact(contrasts, None, 0)
    assert [row["strength"] for row in rows] == [1, 2]
    assert pair_rounds.with_model(setup, study.singles["copy"]).model is not None


def test_parts_are_kept_where_there_is_room(tiny, batch, monkeypatch):
    _copies(monkeypatch)
    study, _ = pair_rounds.run(_setup(tiny("qwen3-4b-instruct-2507"), batch, keeps=True), batch["input_ids"][:1])
    assert all(single.model is not None for single in study.singles.values())
    assert pair_rounds.with_model(None, study.singles["copy"]) is study.singles["copy"]


def test_quick_tries_only_neighbors_and_says_so(tiny, batch, monkeypatch):
    _copies(monkeypatch)
    model = tiny("qwen3-4b-instruct-2507")
    study, contrasts = pair_rounds.run(_setup(model, batch, True), batch["input_ids"][:1])
    assert study.count == 4 and study.score == 1.0 and len(study.pairs) == 6
    assert study.named("not tried") == ["copy → third", "third → copy"]
    assert study.pairs["copy", "third"].reason == pair_rounds.NOT_TRIED
    assert len(contrasts.pairs) == 6 and len(contrasts.orders) == 2
    assert len(pair_rounds.chosen(_setup(model, batch, True, "standard"))) == 3


def test_a_preview_tries_two_pairs_without_intervals(tiny, batch, monkeypatch):
    _copies(monkeypatch)
    setup = _setup(tiny("qwen3-4b-instruct-2507"), batch, True, "preview")
    setup.fitting.append("fourth")
    assert pair_rounds.chosen(setup) == [("copy", "other"), ("third", "fourth")]
    setup.fitting[:] = ["copy", "other", "third"]
    monkeypatch.setattr(pair_rounds, "chosen", lambda setup: [("copy", "other")])
    study, contrasts = pair_rounds.run(setup, batch["input_ids"][:1])
    assert study.pairs["other", "third"].reason == pair_rounds.NOT_AT_PREVIEW
    assert list(contrasts.alone.part) == ["copy", "other"], "what was in no round has no effect"
    assert contrasts.clear() == {"prefill": (0, 0), "decode": (0, 0)} and "prefill 0 of none" in contrasts.reading()
    assert contrasts.refuted() == (None, "too few rounds for an interval")
    monkeypatch.undo()
    for few in (["copy"], []):
        setup.fitting[:] = few
        assert pair_rounds.chosen(setup) == []


def test_the_omitted_part_is_chosen_on_text_that_judges_nothing(tiny, batch, monkeypatch):
    """Losses of single parts came from the split on which the stack is judged afterwards."""
    splits = []

    def windows(loaded, split, count, length, seed):
        splits.append(split)
        return torch.randint(8, 96, (4, 16), generator=torch.Generator().manual_seed(seed))

    _copies(monkeypatch)
    monkeypatch.setattr(pair_rounds.tasks, "text_windows", windows)
    monkeypatch.setattr(pair_rounds.tasks, "window_sources", lambda loaded, split, *_: splits.append(split))
    monkeypatch.setattr(attempts.sanity, "check", lambda *_, **__: None)
    monkeypatch.setattr(pair_rounds, "chosen", lambda setup: [("copy", "other")])
    setup = _setup(tiny("qwen3-4b-instruct-2507"), batch, True)
    setup.loaded.random_weights = False
    _, contrasts = pair_rounds.run(setup, batch["input_ids"][:1])
    assert set(splits) == {"search"} and contrasts.losses_alone == {"copy": 0.0, "other": 0.0}


def test_pairs_are_timed_on_the_given_prompt(tiny, batch, monkeypatch):
    """If time was short the prompt was cut to 64 tokens, whatever `pair_tokens` said."""
    _copies(monkeypatch)
    rounds, timed = interactions.time_arms, []

    def noted(arms, ids_BT, *more):
        timed.append(ids_BT.shape[1])
        return rounds(arms, ids_BT, *more)

    monkeypatch.setattr(interactions, "time_arms", noted)
    setup = _setup(tiny("qwen3-4b-instruct-2507"), batch, keeps=True, effort="preview")
    pair_rounds.run(setup, batch["input_ids"][:1, :1].repeat(1, 96))
    assert setup.hurried and set(timed) == {96} and setup.pair_tokens == 64
