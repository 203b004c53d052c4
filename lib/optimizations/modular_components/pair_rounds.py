"""Measure every pair of parts in its own rounds: the baseline, each part alone, and both in either order.

So few models are in memory at once that real checkpoints can be measured. The effect of a part alone is taken over the
rounds of all its pairs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.timing.interleaved import Rounds
from lib.models.calibration.activations import Observation, observe
from lib.models.tasks import tasks
from lib.optimizations.common.evidence import interactions
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import attempts, method, strength
from lib.optimizations.modular_components.attempts import Attempt
from lib.optimizations.modular_components.pair_study import Contrasts, Pair, PairStudy
from lib.optimizations.modular_components.parts_setup import PartsSetup

MOST_BLOCKS = 8  # rounds per pair: contrasts get no verdict
HURRIED_WINDOWS = 4  # windows to read if time is short
PREVIEW_BLOCKS, PREVIEW_TOKENS = 2, 2  # at effort preview: rounds per pair, too few for an interval; decoded tokens
NOT_TRIED = "effort quick tries only neighbours in the pipeline; effort standard tries every pair"
NOT_AT_PREVIEW = (
    "effort preview tries two pairs of neighbours; effort quick tries all neighbours, effort standard every pair"
)


def alone(setup: PartsSetup, stem: str, observation: Observation | None = None) -> Attempt:
    """Try one part alone; `observation`: the statistics of the model on the calibration text, if known."""
    steps = [method.trial(stem)]
    options: dict[str, Any] = {"made": _made(setup, steps), "observation": observation, **setup.options}
    return attempts.attempt(setup.loaded.model, setup.calibration, steps, setup.sample_BT, **options)


def _made(setup: PartsSetup, steps: Sequence[RecipeStep]) -> nn.Module | None:
    """Return the model after these steps if it was already built as the start of the pipeline, else None."""
    known = setup.applied_before.get(strength.named(steps))
    return known.model if known else None


def with_model(setup: PartsSetup, single: Attempt) -> Attempt:
    """Return the attempt with its model, built again if it works but was not kept."""
    if single.model is not None or single.state != "works":
        return single
    return alone(setup, single.steps[0].optimization)


def chosen(setup: PartsSetup) -> list[Pair]:
    """Return the unordered pairs to try: all, at effort quick only neighbours in the pipeline, at effort preview only
    the first and the last of these.

    There are dozens of pairs, and applying a part to a real model takes a minute.
    """
    neighbours = list(itertools.pairwise(setup.fitting))
    if setup.effort.preview:
        return list(dict.fromkeys(neighbours[:1] + neighbours[-1:]))
    if setup.effort.brief:
        return neighbours
    return list(itertools.combinations(setup.fitting, 2))


def run(setup: PartsSetup, prompt_BT: torch.Tensor) -> tuple[PairStudy, Contrasts]:
    """Try each part alone and every ordered pair, force refused pairs through unchecked, and time each pair in rounds
    of baseline, both parts and both orders.

    All arms read the same held-out windows, of the split "search", since the loss of a part alone may decide whether it
    stays in the stack. No model of a pair is kept. Pairs that are not `chosen` are listed as not tried.
    """
    loaded, seed = setup.loaded, setup.seed
    before = None if loaded.random_weights else observe(loaded.model, setup.calibration)
    singles = {stem: _kept(setup, alone(setup, stem, before)) for stem in setup.fitting}
    count = HURRIED_WINDOWS if setup.hurried else 2 * setup.quick.windows
    length = setup.quick.window_tokens // (2 if setup.effort.preview else 1)
    size = "search", count, length, seed + 1
    windows_NT = None if loaded.random_weights else tasks.text_windows(loaded, *size)
    source_N = None if loaded.random_weights else tasks.window_sources(loaded, *size)
    pairs: dict[Pair, Attempt] = {}
    forced: dict[Pair, Attempt] = {}
    lost: dict[str, np.ndarray] = {}
    outdated: dict[Pair, np.ndarray] = {}
    timed: dict[frozenset[str], dict[str, Rounds]] = {}
    blocks = PREVIEW_BLOCKS if setup.effort.preview else min(setup.effort.blocks, MOST_BLOCKS)
    few = (PREVIEW_BLOCKS, PREVIEW_TOKENS) if setup.effort.preview else ()
    tried = chosen(setup)
    for both in itertools.combinations(setup.fitting, 2):
        if both not in tried:
            pairs |= {pair: _not_tried(setup, singles, pair) for pair in (both, both[::-1])}
            continue
        parts = {stem: with_model(setup, singles[stem]) for stem in both}
        arms = {interactions.BASELINE: loaded.model}
        arms |= {stem: part.model for stem, part in parts.items() if part.model is not None}
        for first, second in (both, both[::-1]):
            pair, anyway = _tried(setup, parts[first], parts[second])
            pairs[first, second] = replace(pair, model=None)
            if anyway is not None:
                forced[first, second] = replace(anyway, model=None)
            if pair.model is not None and windows_NT is not None:
                known: dict[str, Any] = {"before": before, "begun": {first: parts[first].model}, "seed": seed}
                stale = attempts.stale(loaded.model, setup.calibration, {(first, second): pair}, **known)
                outdated |= interactions.losses(stale, windows_NT)
            if pair.model is not None:
                arms[interactions.named(first, second)] = pair.model
        timed[frozenset(both)] = interactions.time_arms(arms, prompt_BT, blocks, seed, *few)
        if windows_NT is not None:
            lost |= interactions.losses({name: arm for name, arm in arms.items() if name not in lost}, windows_NT)
    study = PairStudy(singles, pairs, forced)
    source = f"{blocks} rounds of each pair on {prompt_BT.shape[1]} tokens: baseline, both parts, both orders"
    source += f", on {interactions.timed_on(timed.values())}" if timed else ""
    return study, _contrasts(setup, study, timed, lost, outdated, source, source_N)


def _not_tried(setup: PartsSetup, singles: dict[str, Attempt], pair: Pair) -> Attempt:
    why = NOT_AT_PREVIEW if setup.effort.preview else NOT_TRIED
    return Attempt([*singles[pair[0]].steps, *singles[pair[1]].steps], "not tried", why)


def _kept(setup: PartsSetup, single: Attempt) -> Attempt:
    return single if setup.keeps_singles else replace(single, model=None)


def _tried(setup: PartsSetup, first: Attempt, second: Attempt) -> tuple[Attempt, Attempt | None]:
    """Return the attempt of one order and, if it was refused, the attempt without checks."""
    arguments = (setup.loaded.model, setup.calibration, first, second, setup.sample_BT)
    pair = attempts.both(*arguments, made=_made(setup, [*first.steps, *second.steps]), **setup.options)
    refused = pair.state == "refused" and first.model is not None
    return pair, attempts.both(*arguments, checked=False, **setup.options) if refused else None


def _contrasts(
    setup: PartsSetup,
    study: PairStudy,
    timed: dict[frozenset[str], dict[str, Rounds]],
    lost: dict[str, np.ndarray],
    outdated: dict[Pair, np.ndarray],
    source: str,
    source_N: np.ndarray | None,
) -> Contrasts:
    tried: set[str] = set().union(*timed)
    works = [stem for stem, single in study.singles.items() if single.state == "works" and stem in tried]
    rows: list[dict] = []
    orders: list[dict] = []
    for both, rounds in timed.items():
        states = {key: state for key, state in study.states.items() if set(key) == both}
        measured = both <= set(works)
        rows += (
            interactions.interactions(rounds, lost, states, source_N) if measured else interactions.unmeasured(states)
        )
        orders += interactions.order_effects(rounds, lost, states, source_N)
    rows += interactions.unmeasured({key: state for key, state in study.states.items() if state[0] == "not tried"})
    stale = interactions.staleness(lost, outdated, source_N)
    return Contrasts(
        lost,
        alone=pd.DataFrame(interactions.singles(timed.values(), lost, works, source_N)),
        pairs=pd.DataFrame(rows),
        orders=pd.DataFrame(orders),
        stale=pd.DataFrame(stale, columns=["pair", "loss", "loss_low", "loss_high"]),
        source=f"{source}; {len(next(iter(lost.values()), []))} windows of the split search",
    )
