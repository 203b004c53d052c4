"""The protocol of continuous architecture search: library and study, the interrupted search, and the test whether times
add up.

Additivity of divergences is in `additivity`, controls with as many evaluations in `equal_effort`, rivals at equal
latency in `rivals`, drifts in `drift`, answers to the claims in `outcome`.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import paired_samples
from lib.measure.metrics.settings import Effort
from lib.measure.timing import interleaved, workloads
from lib.measure.timing.control import fresh_copy
from lib.models.calibration.activations import Observation, observe
from lib.models.checkpoints import io, placement
from lib.models.loading import Loaded
from lib.models.tasks import corpus, tasks
from lib.optimizations.common import finetuning
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.common.search import pareto, study
from lib.optimizations.common.search.study import Study
from lib.optimizations.continuous_nas import equal_effort, method, prefix_views, replacement_library, rivals, scoring
from lib.optimizations.continuous_nas.costs import cost_processes, request_costs, subblock_costs
from lib.optimizations.continuous_nas.costs.request_costs import PROFILES, RequestCosts, RequestProfile
from lib.optimizations.continuous_nas.equal_effort import EqualEffort
from lib.optimizations.continuous_nas.method import ChoiceEvaluation, Search, SearchLimits
from lib.optimizations.continuous_nas.replacement_library import Library
from lib.optimizations.structured_pruning import method as pruning

# The measurement that decides the verdict of each dimension, declared before anything is measured.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
PROXY_STEPS = 30  # of distillation by default
COST_ROUNDS = 2  # of timing the parts at effort preview: parts of one shape share their samples
PAIRS = 6  # timed per choice
COPIES = 3  # of the model at once: sorted parts, the chosen architecture, and its recovered version


@dataclass
class SearchSetup:
    """A model with its library, the text on which choices are judged, and the timed prompt.

    `rows` × `length` are the tokens of the search text. `seconds` is the time spent so far on preparing, measuring the
    first profile, scoring the library, searching and recovering, including the measurements and evaluations of earlier
    runs of a resumed study.
    """

    loaded: Loaded
    effort: Effort
    seed: int
    observation: Observation
    library: Library
    probe: scoring.Probe
    text: list[dict[str, torch.Tensor]]
    prompt_BP: torch.Tensor
    rows: int
    length: int
    seconds: float

    def described(self) -> pd.DataFrame:
        """Return the model, the size of the search space, and the amount of text on which a choice is judged."""
        architectures = float(np.prod([float(len(options)) for options in self.library.space.values()]))
        facts: dict[str, object] = {"model": f"{self.loaded.parameters.name}, {self.loaded.scale}"}
        facts |= {"blocks": len(self.observation.blocks), "architectures": f"{architectures:,.0f}"}
        facts |= {"judged on": f"{self.probe.tokens:,} tokens"}
        return pd.DataFrame(facts.items(), columns=["", "value"])

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the duration of the block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def costs_of(self, profile: str, study: Study) -> RequestCosts:
        """Return the costs under a profile after a drift, measured in this process; see `costs_in_processes`."""
        rounds = COST_ROUNDS if self.effort.preview else self.effort.blocks // 2
        return self._costs(profile, study, processes=1, rounds=rounds)[0]

    def costs_in_processes(self, profile: str, study: Study) -> RequestCosts:
        """Return the costs under a profile; seconds are measured once, in `processes`, then read from the study."""
        start = time.perf_counter()
        rounds = COST_ROUNDS if self.effort.preview else self.effort.blocks // (2 if self.effort.brief else 1)
        costs, taken = self._costs(profile, study, processes=self.processes, rounds=rounds)
        self.seconds += max(0.0, taken - (time.perf_counter() - start))  # what an earlier run spent on them
        return costs

    def scores_of(self, search: Search) -> dict[str, dict[str, float]]:
        """Return the divergence of each replacement alone, in nats per token; see `method.score`."""
        with self.timed():
            return method.score(search)

    @property
    def processes(self) -> int:
        """The number of processes in which the costs for the search are measured."""
        return 1 if self.effort.brief else cost_processes.PROCESSES

    def _costs(self, profile: str, study: Study, *, processes: int, rounds: int) -> tuple[RequestCosts, float]:
        """Return the costs and the seconds it took to measure them, from the study if it holds them.

        The study keeps them by number of rounds and processes: costs measured in one process after a drift do not serve
        a search that needs several.
        """
        measured, start = PROFILES[profile].within(self.effort), time.perf_counter()
        name = f"{profile}, {rounds} rounds in {processes} process{'es' if processes > 1 else ''}"
        times: Any = study.fact(
            f"times: {name}",
            lambda: self.times_of(self.library, None, measured, rounds=rounds, processes=processes),
        )
        taken: Any = study.fact(f"seconds: {name}", lambda: time.perf_counter() - start)
        return request_costs.tables(self.loaded.model, self.library, measured, times), taken

    def times_of(
        self,
        library: Library,
        options: Mapping[str, Sequence[str]] | None,
        profile: RequestProfile,
        *,
        rounds: int,
        processes: int,
    ) -> dict:
        """Return the seconds of the replacements of a library of `options`, measured now."""
        model = self.loaded.model
        saliency = method.saliency(model, self.observation)
        arguments = (model, library, saliency, options, profile, self.prompt_BP)
        return cost_processes.measure(*arguments, rounds=rounds, processes=processes, seed=self.seed)


def prepare(loaded: Loaded, effort: Effort, seed: int, *, short: bool) -> SearchSetup:
    """Return the setup: saliency from calibration text, judging on text of the split "search".

    `short`: judge on two windows of 128 tokens, or on one at effort preview or on a real model at a brief effort.
    Raises NotApplicable if memory has no room for the search and the recovery after it.
    """
    placement.require_room(loaded.model, COPIES, "a search over replacements")
    calibration = calibration_text.batches(loaded, effort, seed)
    rows, length = (2, 128) if short else (effort.calibration_sequences // 8, effort.calibration_tokens)
    rows = (
        1 if effort.preview or (loaded.scale == "full" and effort.brief) else rows
    )  # a thousand evaluations take a second each there
    text = tasks.calibration(loaded, rows, length, seed, split="search")
    start = time.perf_counter()
    observation = observe(loaded.model, calibration)
    library = method.build(loaded.model, observation, replacement_library.FEWEST if effort.preview else None)
    probe = scoring.probe(loaded.model, text)
    prompt_BP = tasks.text_windows(loaded, "search", 1, 512, seed)
    seconds = time.perf_counter() - start
    return SearchSetup(loaded, effort, seed, observation, library, probe, text, prompt_BP, rows, length, seconds)


@contextlib.contextmanager
def opened(setup: SearchSetup, folder: Path | str, name: str, settings: Sequence[object]) -> Iterator[Study]:
    """Yield the study `name` for these weights, data, code, library and settings on this machine.

    Raises UserError if another process holds it.
    """
    costs = request_costs, cost_processes, subblock_costs
    space = {
        "options": setup.library.space,
        "weights": io.weights_hash(setup.loaded.model),
        "data": corpus.data_hash(),
        "code": study.code(method, *costs, replacement_library, prefix_views, scoring, pruning, tasks),
        "settings": [*settings, setup.rows, setup.length, study.machine()],
    }
    with study.opened(Path(folder) / f"{name}.db", name, space, objectives=1) as stored:
        yield stored


def options_of_middle_block(
    setup: SearchSetup, costs: RequestCosts, scores: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """Return a row per option of the middle block's slots: parameters, divergence alone, shares of time and memory, and
    for an option without a score the reason why it is left out.
    """
    rows, block = [], len(setup.observation.blocks) // 2
    for slot, options in setup.library.modules.items():
        if replacement_library.locate(slot)[0] != block:
            continue
        for option, module in options.items():
            parameters = sum(parameter.numel() for parameter in module.parameters())
            row = {"slot": slot, "option": option, "parameters": parameters}
            row["KL alone, nats/token"] = scores[slot].get(option)
            for table in (costs.time, costs.memory):
                share = table.values[slot][option] / table.of(setup.library.whole)
                row[f"{table.name}, % of the model"] = 100 * share
            row |= {} if option in scores[slot] else {"left out": method.NO_NUMBER}
            rows.append(row)
    return pd.DataFrame(rows)


def interrupted(
    setup: SearchSetup, search: Search, costs: RequestCosts, limits: SearchLimits
) -> tuple[Search, ChoiceEvaluation]:
    """Run the search to half its refinements, then resume it from its study; return the second search and its winner.

    The seconds of evaluations taken over from an earlier run are added to those of the setup. Asserts that the winner
    is within the budgets, and that an uninterrupted search with the same initial evaluations ends at the same choice.
    The study may hold evaluations from other budgets or from more refinements.
    """
    options = asdict(limits)
    setup.seconds += search.taken_over
    unstopped = search.afresh()
    unstopped.evaluations += search.evaluations
    with setup.timed():
        search.stop_after = len(search.evaluations) + max(1, limits.refinements // 2)
        with contextlib.suppress(method.SearchStopped):
            method.run(search, costs, **options)
        shared: dict[str, Any] = {"known": search.known, "solved": search.solved, "workload": search.workload}
        search = Search(search.library, search.probe, search.study, search.seed, **shared)
        winner = method.run(search, costs, **options)
    assert method.run(unstopped, costs, **options).choice == winner.choice, "stopping changed the answer"
    budgets = costs.budgets(limits.time_share, limits.memory_share)
    assert all(limit.held_by(winner.choice) for limit in budgets), "over a budget"
    return search, winner


def replaced(winner: ChoiceEvaluation) -> pd.DataFrame:
    """Return the slots that the winner replaces, with their options; columns slot, option."""
    chosen = {slot: name for slot, name in winner.choice.items() if name != replacement_library.WHOLE}
    return pd.DataFrame(chosen.items(), columns=["slot", "option"])


def times_add_up(setup: SearchSetup, costs: RequestCosts, judged: Sequence[ChoiceEvaluation]) -> list[dict]:
    """Return predicted and measured request time, as shares of the baseline's, for up to three choices of the front."""
    baseline, new_tokens = setup.loaded.model, costs.profile.new_tokens
    prompt_BP = request_prompt(setup, costs)
    front = [judged[at] for at in pareto.front([(costs.share(e.choice, costs.time), e.divergence) for e in judged])]
    chosen = [front[index] for index in sorted({0, len(front) // 2, len(front) - 1})] if front else []
    rows = []
    for evaluation in chosen:
        models = baseline, replacement_library.swap(setup.library, evaluation.choice)
        whole, arm = (workloads.generate(fresh_copy(model), prompt_BP, new_tokens) for model in models)
        options: dict[str, Any] = {"fewest": rivals.PREVIEW_PAIRS, "warmup": 1, "seed": setup.seed}
        pairs = interleaved.paired(whole, arm, blocks=rivals.pairs(setup.effort, PAIRS), **options)
        speed = paired_samples.from_pairs("generate_tokens_per_second", "generate", pairs, arm.tokens, None)
        assert speed.ratio is not None
        row: dict[str, Any] = {"predicted": costs.share(evaluation.choice, costs.time), "measured": 1 / speed.ratio}
        low, high = speed.ci or (None, None)  # two pairs have no interval
        rows.append(row | {"low": high and 1 / high, "high": low and 1 / low})
    replacement_library.swap(setup.library, setup.library.whole)
    return rows


def request_prompt(setup: SearchSetup, costs: RequestCosts) -> torch.Tensor:
    """Return the prompts of one request under the profile of `costs`, ids [B, P]."""
    return setup.prompt_BP[:, : costs.profile.prompt_tokens].repeat(costs.profile.batch, 1)


def against_uniform(
    setup: SearchSetup, equal: EqualEffort, costs: RequestCosts, winner: ChoiceEvaluation, plain: nn.Module
) -> tuple[pd.DataFrame, list[nn.Module], rivals.Race]:
    """Time uniform choices against `plain`, the winner without recovery: those five of the front (three at effort
    preview) that are nearest to its share of the time.

    Returns a row for each, the one or two models that bracket the winner's speed (`rivals.bracketing`), and the race.
    Only one rival is in memory at a time while they race.
    """
    uniform, uniform_costs = equal.uniform, equal.uniform_costs
    race = rivals.race(plain, request_prompt(setup, costs), costs.profile, setup.seed)
    predicted = [
        (uniform_costs.share(evaluation.choice, uniform_costs.time), divergence)
        for evaluation, (_, divergence) in zip(uniform.evaluations, uniform.points(uniform_costs))
    ]
    finite = [at for at, (_, divergence) in enumerate(predicted) if np.isfinite(divergence)]
    share, count = costs.share(winner.choice, costs.time), rivals.near(setup.effort)
    near = [finite[at] for at in rivals.around([predicted[at] for at in finite], share, count)]

    def rival(at: int) -> nn.Module:
        return replacement_library.child(uniform.library, uniform.evaluations[at].choice)

    raced = {at: race(rival(at), rivals.pairs(setup.effort, PAIRS)) for at in near}
    gains = {at: speed.ratio for at, speed in raced.items() if speed.ratio}
    rows = [(100 * predicted[at][0], predicted[at][1], gain) for at, gain in gains.items()]
    columns = ["predicted time, % of the baseline", "KL, nats/token", "speed of the search's choice ÷ this one's"]
    return pd.DataFrame(rows, columns=columns), [rival(at) for at in rivals.bracketing(gains)], race


def controls(setup: SearchSetup, search: Search, costs: RequestCosts) -> EqualEffort:
    """Return the controls with as many evaluations as the search, or as many as there are; see `equal_effort`."""
    seeds = equal_effort.FEWEST_RANDOM_SEEDS if setup.effort.brief else equal_effort.RANDOM_SEEDS
    rounds = 1 if setup.effort.preview else 3
    alike = replacement_library.FEWEST_UNIFORM if setup.effort.preview else replacement_library.UNIFORM

    def times_of(library: Library, options: Mapping[str, Sequence[str]]) -> dict:
        return setup.times_of(library, options, costs.profile, rounds=rounds, processes=setup.processes)

    return equal_effort.equal_effort(setup.loaded.model, setup.observation, search, costs, times_of, seeds, alike)


def recovered(
    setup: SearchSetup, winner: ChoiceEvaluation, finetune_steps: int
) -> tuple[nn.Module, nn.Module, int, str]:
    """Return the chosen architecture as a separate model, the same after distillation from the baseline, the number of
    steps, and one sentence on their effect.

    By default (-1) there are PROXY_STEPS steps on a proxy model and none at real size. At effort preview each step
    reads a quarter of the text.
    """
    effort, seed = setup.effort, setup.seed
    steps = finetuning.steps_of(setup.loaded, finetune_steps, PROXY_STEPS, effort)
    share = 1 if effort.preview else 4
    sequences, length = share * effort.calibration_sequences, effort.calibration_tokens
    batches = tasks.calibration(setup.loaded, sequences, length, seed, tokens_at_once=256 * share)
    with setup.timed():
        plain = replacement_library.child(setup.library, winner.choice)
        optimized, lessons = pruning.recover(plain, setup.loaded.model, batches, steps=steps, seed=seed)
    return plain, optimized, steps, finetuning.read(lessons)
