"""The protocol of the search over configurations: components and study, the interrupted search, finalists, controls.

Every choice is made on text and items of the split "search"; `outcome` computes targets and answers. The parameters
declared by templates are passed in as names.
"""

import contextlib
import copy
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from lib.measure.compare import replication
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import evaluate
from lib.models.checkpoints import io, placement
from lib.models.loading import Loaded
from lib.models.tasks import corpus, tasks
from lib.optimizations.automl_components import controls, finalists, method, successive_filtering
from lib.optimizations.automl_components.controls import EqualSeconds, SmallGrid, seconds
from lib.optimizations.automl_components.finalists import Finalist
from lib.optimizations.automl_components.method import Component
from lib.optimizations.automl_components.successive_filtering import Bench, JudgedStack
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.common.judgement import Judgement
from lib.optimizations.common.recipe import Recipe, RecipeStep
from lib.optimizations.common.search import search_quality, study
from lib.optimizations.common.search.study import Study

# The measurement that decides the verdict of each dimension, declared before anything is measured.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
FACTORS = {"preview": 1, "quick": 1, "standard": 2, "thorough": 8}  # on trials and text, by effort
PAIRS = {"preview": 2, "quick": 6, "standard": 6, "thorough": 6}  # timed pairs per configuration; their median counts
MOST_STEPS = {"preview": 1, "quick": 4, "standard": 4, "thorough": 16}  # of training in a search, above the minimum
PREVIEW_STORE = 32  # proxy models cached at effort preview, so that few are built twice
GRID_SEEDS = 3
LEFT_TO_A_PERSON = ("memory budget", "margin", "trials", "finalists", "request", "tasks")


class TimedRequest(NamedTuple):
    """The request timed in the search: `batch` prompts of `prompt_tokens` tokens, each answered by `new_tokens`."""

    prompt_tokens: int = 256
    new_tokens: int = 8
    batch: int = 1

    def within(self, effort: Effort) -> "TimedRequest":
        """Return the request as timed at `effort`: at preview at most half the length of the effort's own workloads."""
        if not effort.preview:
            return self
        tokens = min(self.prompt_tokens, effort.prompt_tokens // 2), min(self.new_tokens, effort.new_tokens // 2)
        return TimedRequest(*tokens, self.batch)


@dataclass
class SearchBench:
    """The setup of a search: the model, its components with their knobs, and the bench that judges.

    `finalist_seconds`: the seconds spent on judging the finalists, part of the cost of the choice.
    """

    loaded: Loaded
    effort: Effort
    level: str
    factor: int
    seed: int
    parts: list[Component]
    bench: Bench
    finalist_seconds: float = 0.0

    @property
    def knobs(self) -> list[tuple[str, str]]:
        """The name and possible values of every decision, in words."""
        return [(name, method.in_words(distribution)) for name, distribution in method.space(self.parts).items()]


def prepare(
    loaded: Loaded,
    effort: Effort,
    level: str,
    declared: Mapping[str, Collection[str]],
    request: TimedRequest,
    memory_budget: float,
    seed: int,
) -> SearchBench:
    """Return the bench of a search at effort `level`. `declared`: stem → parameters that its template declares.

    Raises NotApplicable if memory cannot hold the models needed at once.
    """
    placement.require_room(loaded.model, Bench.largest_store + 2, "a search over configurations")
    factor = FACTORS[level]
    parts = method.components(declared, most_steps=MOST_STEPS[level])
    method.space(parts)
    few = tasks.calibration(loaded, 2 * factor, 64 if effort.preview else 256, seed)
    windows = (8, 16) if effort.preview else (16, min(128, 64 * factor))
    texts = [tasks.text_windows(loaded, "search", count, 64, seed) for count in windows]
    rungs = [evaluate.read(loaded.model, ids_NT) for ids_NT in texts]
    prompt_BT = tasks.text_windows(loaded, "search", 1, request.prompt_tokens, seed).repeat(request.batch, 1)
    limits: dict[str, Any] = {"memory_budget": memory_budget, "new_tokens": request.new_tokens}
    limits |= {"pairs": PAIRS[level], "seed": seed}
    if effort.preview and loaded.scale == "proxy":
        limits["largest_store"] = PREVIEW_STORE
    bench = Bench(loaded.model, few, rungs, prompt_BT, method.modules(parts), **limits)
    return SearchBench(loaded, effort, level, factor, seed, parts, bench)


@dataclass
class SearchStudy:
    """The study of one search, in a file that is opened for each use.

    `notes` and `trials` (the number stored) are from the first opening; `served` are stacks that served other models,
    as plain JSON.
    """

    path: Path
    space: dict[str, object]
    notes: list[str]
    trials: int
    served: Any

    @property
    def name(self) -> str:
        """The study's name: "<search>--<model>--<effort>"."""
        return self.path.stem

    @property
    def first(self) -> list[list[RecipeStep]]:
        """Stacks that served other models, the first configurations of this search."""
        return [[RecipeStep(**step) for step in stack] for stack in self.served]

    @contextlib.contextmanager
    def opened(self) -> Iterator[Study]:
        """Yield the study. Raises UserError if another process holds it."""
        with study.opened(self.path, self.name, self.space, objectives=2) as stored:
            yield stored


def begin(
    setup: SearchBench, folder: Path | str, stacks: Path | str, name: str, settings: Sequence[object]
) -> SearchStudy:
    """Open the study `name` in `folder` for the first time and return it; it starts with the recipes of other models in
    `stacks`.

    The study belongs to these weights, data, code, search space and settings, and to this machine.
    """
    space: dict[str, object] = {
        "space": [(name, str(distribution)) for name, distribution in method.space(setup.parts).items()],
        "weights": io.weights_hash(setup.loaded.model),
        "data": corpus.data_hash(),
        "code": study.code(method, successive_filtering, parts=setup.bench.modules.values()),
        "settings": [*settings, study.machine()],
    }
    file = SearchStudy(Path(folder) / f"{name}.db", space, [], 0, [])
    with file.opened() as stored:
        others = method.elsewhere(Path(stacks), setup.loaded.name, setup.level, setup.parts)
        served = [[step.model_dump() for step in stack] for stack in others]
        file.served = stored.fact("served others", lambda: served)
        file.notes, file.trials = stored.notes, len(stored.trials)
    return file


def one_configuration(setup: SearchBench) -> dict[str, object]:
    """Judge the first component at its defaults twice, the second time already applied; return a row with the seconds
    of applying and judging, and the outcome.
    """
    first = setup.parts[0]
    stack = [RecipeStep(optimization=first.stem, knobs=first.defaults)]
    start = time.perf_counter()
    outcome = setup.bench.judge(stack)
    whole = time.perf_counter() - start
    start = time.perf_counter()
    setup.bench.judge(stack)
    judging = time.perf_counter() - start
    row = {"stack": first.stem, "applied in, s": whole - judging, "judged in, s": judging}
    row |= {"memory": outcome.memory_share, "KL, nats/token": outcome.divergence, "time": outcome.time_share}
    return row | {"cut because": outcome.reason or "not cut"}


def interrupted(setup: SearchBench, file: SearchStudy, trials: int) -> list[JudgedStack]:
    """Run half of `trials`, close the study, reopen it and finish the search; return all outcomes.

    Asserts that no trial of the first half was lost.
    """
    outcomes: list[JudgedStack] = []
    for until in (trials // 2, trials):
        with file.opened() as stored:
            before = method.outcomes(stored)
            assert [j.stack for j in before[: len(outcomes)]] == [j.stack for j in outcomes], "trials were lost"
            options: dict[str, Any] = {"seed": setup.seed, "first": file.first, "stop_after": until}
            outcomes = method.run(setup.bench, setup.parts, stored, trials, **options)
    return outcomes


def rows(outcomes: Sequence[JudgedStack]) -> pd.DataFrame:
    """Return a row per configuration: its stack, both objectives, memory, seconds, and why it was cut."""
    lines = []
    for judged in outcomes:
        stack = " → ".join(step.optimization for step in judged.stack) or "nothing"
        line = {"stack": stack, "time": judged.time_share, "KL": judged.divergence, "memory": judged.memory_share}
        lines.append(line | {"seconds": judged.seconds, "cut because": judged.reason or ""})
    return pd.DataFrame(lines)


def judge_finalists(setup: SearchBench, outcomes: Sequence[JudgedStack], count: int) -> list[Finalist]:
    """Return the `count` best, timed again and evaluated on enough items of the split "search"; the empty stack comes
    first if the budget allows it. The seconds this takes are kept in `setup.finalist_seconds`.
    """
    start = time.perf_counter()
    quality = search_quality.prepare(setup.loaded, setup.effort, setup.seed)
    share = replication.block_seconds(setup.effort) / replication.BLOCK_SECONDS
    options: dict[str, Any] = {"rounds": finalists.FEWEST_ROUNDS if setup.effort.preview else finalists.ROUNDS}
    best = finalists.judge(setup.bench, outcomes, count, quality, setup.seed, share * finalists.SECONDS, **options)
    setup.finalist_seconds = time.perf_counter() - start
    return best


def choose(setup: SearchBench, outcomes: Sequence[JudgedStack], best: Sequence[Finalist], margin: float) -> JudgedStack:
    """Return the outcome picked by the fixed rule; see `finalists.choose`."""
    shares = [judged.memory_share for judged in outcomes if judged.memory_share is not None]
    budget: dict[str, Any] = {"memory_budget": setup.bench.memory_budget, "smallest": min(shares, default=None)}
    return finalists.choose(best, margin, **budget).outcome


def stored(
    setup: SearchBench, file: SearchStudy, stack: Sequence[RecipeStep], optimized: nn.Module, judged: Judgement
) -> Recipe:
    """Return the recipe of a judged stack, with its verdict and the hashes of the weights before and after."""
    verdicts = {m.verdict for m in judged.measurements if m.dimension == "accuracy"}
    order = ("invalid", "not_maintained", "worse", "inconclusive", "maintained", "better")
    accuracy = "invalid" if judged.degenerate else next((verdict for verdict in order if verdict in verdicts), "")
    return Recipe(
        model=setup.loaded.name,
        scale=setup.loaded.scale,
        effort=setup.level,
        study=file.name,
        chosen_by=method.STEM,
        stack=list(stack),
        weights=io.weights_hash(setup.loaded.model),
        optimized=io.weights_hash(optimized),
        accuracy={"worse": "not_maintained", "better": "maintained"}.get(accuracy, accuracy),
    )


def applied(setup: SearchBench, stack: Sequence[RecipeStep]) -> tuple[nn.Module, float]:
    """Return the model with a stack applied, and the seconds it took; a copy if the stack is empty.

    It uses all of the effort's calibration text (more if the width needs it): this is the model that `build.py apply`
    saves.
    """
    calibration = calibration_text.batches(setup.loaded, setup.effort, setup.seed)
    start = time.perf_counter()
    optimized = replace(setup.bench, calibration=calibration, applied={}).apply(stack)
    seconds = time.perf_counter() - start
    return (copy.deepcopy(optimized) if optimized is setup.bench.model else optimized), seconds


def commands(model: str, stack: Sequence[RecipeStep]) -> list[str]:
    """Return a stack as commands, one line per step."""
    lines = [" ".join(["python build.py run", *step.request(), "--model", model]) for step in stack]
    return lines or ["nothing: no configuration keeps the scores and is surely faster"]


def equal_seconds(setup: SearchBench, outcomes: list[JudgedStack], begun: int = 0) -> EqualSeconds:
    """Compare the search with random configurations that get its first trials and the same seconds: one random arm at
    small efforts, three otherwise. `begun`: the number of stacks of other models among the first trials.
    """
    arms, allowed = {"search": outcomes}, seconds(outcomes)
    first = outcomes[: begun + len(setup.parts)]
    for seed in range(setup.seed, setup.seed + (1 if setup.factor == 1 else 3)):
        arms[f"random {seed + 1}"] = controls.at_random(setup.bench, setup.parts, allowed, seed, first)
    alone = {part.stem: part.defaults for part in setup.parts}
    arms["defaults"] = [
        judged
        for judged in outcomes
        if len(judged.stack) == 1 and judged.stack[0].knobs == alone[judged.stack[0].optimization]
    ]
    return EqualSeconds(arms)


def small_grid(setup: SearchBench, outcomes: Sequence[JudgedStack]) -> SmallGrid:
    """Judge every cell of a 3 × 3 (small efforts) or 5 × 5 grid of stacks, and search it with three seeds."""
    bench, levels = setup.bench, 3 if setup.factor == 1 else 5
    stacks = controls.grid(outcomes, setup.parts, levels)
    judged = [[bench.judge(stack) if stack else method.nothing(bench) for stack in row] for row in stacks]
    areas_LL = np.array([[successive_filtering.utility(cell) for cell in row] for row in judged])
    count = max(2, levels * levels // 4)
    curves = [controls.regret(areas_LL, count, n) for n in range(GRID_SEEDS)] if areas_LL.max() > 0 else []
    chance = controls.by_chance(areas_LL, count)
    rows, columns = stacks[1][0][0].optimization, stacks[0][1][0].optimization
    sure = successive_filtering.surely_faster(cell for row in judged for cell in row)
    return SmallGrid(f"{rows} × {columns}", areas_LL, count, curves, chance, sure)


def spending(outcomes: Sequence[JudgedStack]) -> list[Measurement]:
    """Return the cost of the search: seconds and evaluations."""
    why = "the baseline needs no search"
    took = ("search_seconds", "search", None, seconds(outcomes), "perf_counter, all trials")
    counted = ("search_evaluations", "search", None, len(outcomes), "counted")
    return [measurement.informative(*took, reason=why), measurement.informative(*counted, reason=why)]
