"""Pre- against post-optimization: a model's best stack, what it is worth as a whole, and what each part of it is worth.

The stack is the one that a search left (`lib.optimizations.common.recipe`), or else one chosen here by a fixed rule on
text that never judges. Every subset of the stack is made once, so that gains can be attributed by Shapley values;
applying is timed and its joules are read, so that a return can be stated. Composing itself is `modular_components`.
Names no optimization.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.compare.speed import Timed
from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.catalogue import SPEED_MARGIN
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import evaluate
from lib.measure.roofline import cost_model
from lib.measure.timing import disturbance, interleaved
from lib.measure.timing import workloads as work
from lib.measure.timing.interleaved import Rounds, warm_up, with_control
from lib.measure.trackers import energy
from lib.models.loading import Loaded
from lib.models.tasks.tasks import text_windows
from lib.optimizations.common import interactions, shapley
from lib.optimizations.common import recipe as stacks
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import attempts
from lib.optimizations.modular_components import method as composing

NAME = "pre_vs_post_optimization"
MOST_LOSS = 0.1  # nats per token that the default stack may lose on search text
SEARCH_WINDOWS, WINDOW_TOKENS = 8, 256
ROUNDS = 6


@dataclass(frozen=True)
class Chosen:
    """A stack in pipeline order, who chose it, and a row per step that was considered (empty for a stored stack)."""

    steps: list[RecipeStep]
    origin: str
    considered: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Applied:
    """The model behind a stack, and what applying it took; `provenance` and `source` are those of the joules."""

    model: nn.Module = field(repr=False)
    steps: list[RecipeStep]
    seconds: float
    joules: float
    provenance: str
    source: str


def applies_to(model: nn.Module) -> str | None:
    """Return None, or that no optimization applies, so that there is no after."""
    return None if composing.applicable(model)[0] else "no optimization that can be composed applies to this model"


# --- which stack -----------------------------------------------------------------------------------------------------


def chosen(
    loaded: Loaded, calibration: Sequence[dict[str, torch.Tensor]], *, most_loss: float = MOST_LOSS, seed: int = 0
) -> Chosen:
    """Return the stack that a search stored for this model at this scale, or else the default stack.

    Where the search chose to change nothing there is no after to compare; then it is the default stack too, and
    `origin` says so. Raises UserError for a stored stack that is damaged, belongs to another model, or cannot be
    ordered.
    """
    composing.parts()  # imported before models are tried: what an import leaves may hold the frames that led to it
    stored = stacks.find(loaded.name, loaded.scale)
    if stored is not None and stored.stack:
        origin = f"{stored.chosen_by}, effort {stored.effort or 'not stated'}"
        return Chosen(composing.order(stored.stack, loaded.model), origin)
    found = default_stack(loaded, calibration, most_loss=most_loss, seed=seed)
    gc.collect()  # models refer to themselves: those that were tried are given back now, not some time
    if stored is not None:
        return replace(found, origin=f"{stored.chosen_by} chose to change nothing; instead {found.origin}")
    return found


def default_stack(
    loaded: Loaded, calibration: Sequence[dict[str, torch.Tensor]], *, most_loss: float = MOST_LOSS, seed: int = 0
) -> Chosen:
    """Return the parts, at their trial knobs and in pipeline order, that each pay on what stands before them.

    A part pays if with it the loss on search text stays within `most_loss` nats of the baseline, and it is either
    faster by the practical margin (mean of prefill and decode, in logarithms), or smaller and not slower by that
    margin. Where none pays, the one that loses least is taken, so that there is something to compare.
    """
    ids_NT = text_windows(loaded, "search", SEARCH_WINDOWS, WINDOW_TOKENS, seed)
    sample_BT, prompt_BT = ids_NT[:4, :128], ids_NT[:1]
    known = None if loaded.random_weights else float(evaluate.read(loaded.model, ids_NT).loss_N.mean())
    wanted = [composing.trial(stem) for stem in composing.applicable(loaded.model)[0]]
    kept, current, rows, fallback = [], loaded.model, [], None
    arranged, left = composing.orderable(wanted, loaded.model)
    rows += [{"step": stem, "state": "refused", "kept": False, "why": why} for stem, why in left.items()]
    for step in arranged:
        options = {"random_weights": loaded.random_weights, "seed": seed}
        made = attempts.attempt(current, calibration, [step], sample_BT, **options)
        row = {"step": step.optimization, "state": made.state, "kept": False, "why": made.reason or ""}
        rows.append(row)
        if made.state != "works":
            continue
        loss = None if known is None else float(evaluate.read(made.model, ids_NT).loss_N.mean()) - known
        faster = _faster(current, made.model, prompt_BT, seed)
        smaller = 1 - cost_model.weights_bytes(made.model) / cost_model.weights_bytes(current)
        row |= {"loss more, nats": loss, "log-speed": faster, "bytes less": smaller}
        within = loss is None or loss <= most_loss
        if fallback is None or (loss or 0) < fallback[0]:
            fallback = (loss or 0, [step]) if not kept else fallback
        if within and (faster > SPEED_MARGIN or (smaller > 0.01 and faster > -SPEED_MARGIN)):
            row["kept"], current = True, made.model
            kept.append(step)
        else:
            row["why"] = "loses too much" if not within else "neither faster, nor smaller at the same speed"
    if not kept and fallback is None:
        raise UserError(f"{NAME}: no part works alone on this model; there is no stack to compare")
    rule = f"the default rule: within {most_loss} nats, and faster or smaller"
    return Chosen(
        kept or fallback[1], rule if kept else "the part that loses least; none pays by the default rule", rows
    )


def _faster(before: nn.Module, after: nn.Module, prompt_BT: torch.Tensor, seed: int) -> float:
    """Return the mean over prefill and decode of the median log-speed of `after` against `before`."""
    arms = {interactions.BASELINE: before, "after": after}
    timed = interactions.time_arms(arms, prompt_BT, ROUNDS, seed, control=False)
    weights = {"after": 1, interactions.BASELINE: -1}
    return float(np.mean([-np.median(one.contrast(weights)) for one in timed.values()]))


# --- applying it -----------------------------------------------------------------------------------------------------


def apply_stack(
    model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], steps: Sequence[RecipeStep], *, seed: int = 0
) -> Applied:
    """Apply the steps to a copy and return it with the seconds and the joules that this took."""
    counter = energy.counter(next(model.parameters()).device.type)
    start, before = time.perf_counter(), counter.joules()
    made = composing.compose(model, calibration, steps, seed=seed)
    joules = counter.joules() - before
    return Applied(made.model, made.steps, time.perf_counter() - start, joules, counter.provenance, counter.scope)


def groups(steps: Sequence[RecipeStep], most: int = shapley.MOST_PARTS) -> dict[str, list[RecipeStep]]:
    """Return at most `most` parts of the stack by name, in order; what is more than that forms the last part together.

    A part is named after its optimizations; a name that comes again gets a number.
    """
    cut = [[step] for step in steps[: most - 1]] + ([list(steps[most - 1 :])] if len(steps) >= most else [])
    found: dict[str, list[RecipeStep]] = {}
    for part in cut:
        name = base = " + ".join(step.optimization for step in part)
        number = 1
        while name in found:
            number += 1
            name = f"{base} {number}"
        found[name] = part
    return found


def every_subset(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    parts: Mapping[str, list[RecipeStep]],
    *,
    whole: nn.Module | None = None,
    seed: int = 0,
) -> dict[tuple[str, ...], nn.Module]:
    """Return the model of every subset of the parts, () being `model` itself. Each is made from the subset that lacks
    its last part, as the pipeline would. `whole`: the model behind all parts, where it was made already.

    Raises UserError where a part refuses a subset: then nothing can be attributed.
    """
    made: dict[tuple[str, ...], nn.Module] = {}
    for subset in shapley.subsets(list(parts)):
        if not subset:
            made[subset] = model
            continue
        if whole is not None and len(subset) == len(parts):
            made[subset] = whole
            continue
        steps = parts[subset[-1]]
        made[subset] = composing.compose(made[subset[:-1]], calibration, steps, arrange=False, seed=seed).model
    return made


def one_part(name: str, timed: Mapping[str, Timed]) -> dict[str, Rounds]:
    """Return the judged blocks of prefill and decode as rounds of two arms, the baseline and the only part: the whole
    gain is its own, and nothing has to be timed again.
    """
    return {
        what: Rounds(
            {interactions.BASELINE: one.pairs.baseline_seconds, name: one.pairs.optimized_seconds},
            one.pairs.iterations,
            one.pairs.disturbed,
            [
                [interactions.BASELINE, name][:: 1 if order == interleaved.BASELINE_FIRST else -1]
                for order in one.pairs.order
            ],
        )
        for what, one in timed.items()
        if what in interactions.AXIS_LABELS
    }


def attribute(
    names: Sequence[str], timed: Mapping[str, Rounds], lost: Mapping[str, np.ndarray], seed: int = 0
) -> list[dict]:
    """Return a row per part and for the whole: Shapley value in log-speed of each workload and in loss, with intervals.

    Arms are named by `interactions.named(*subset)`. The parts' values add up to the whole in every round and window.
    """
    subsets = shapley.subsets(list(names))
    values = {
        work_name: {subset: -one.logs(interactions.named(*subset)) for subset in subsets}
        for work_name, one in timed.items()
    }
    if lost:
        values["loss"] = {subset: lost[interactions.named(*subset)] for subset in subsets}
    rows = []
    for what, of_subset in values.items():
        shares = shapley.shapley(list(names), of_subset)
        shares["the whole stack"] = of_subset[tuple(names)] - of_subset[()]
        for part, values_S in shares.items():
            one = shapley.over_items(values_S, seed=seed) if what == "loss" else shapley.over_rounds(values_S)
            mean = float(np.mean(values_S))
            rows.append(
                {"what": what, "part": part, "value": one.value, "low": one.low, "high": one.high, "mean": mean}
            )
    return rows


# --- at several lengths and batch sizes ------------------------------------------------------------------------------


def sweep(
    baseline: nn.Module,
    optimized: nn.Module,
    prompt_BT: torch.Tensor,
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    new_tokens: int = 8,
    blocks: int = paired_stats.MINIMUM_BLOCKS,
    seed: int = 0,
) -> list[Measurement]:
    """Return the prefill rate at every length and the decode rate at every batch size, each with its A/A control.

    A prompt longer than `prompt_BT` is made by repeating it; sequences of a batch are rolled by one token each.
    """
    found = []
    for length in lengths:
        times = -(-length // prompt_BT.shape[1])
        long_BT = prompt_BT[:1].repeat(1, times)[:, :length]
        arms = [work.prefill(model, long_BT) for model in (baseline, optimized)]
        found.append(_rate("prefill_tokens_per_second", f"prefill, {length} tokens", arms, blocks, seed))
    for batch in batches:
        short_BT = prompt_BT[:1, :128]
        rolled_BT = torch.cat([short_BT.roll(shift, 1) for shift in range(batch)])
        arms = [work.steps(model, rolled_BT, new_tokens) for model in (baseline, optimized)]
        found.append(_rate("batch_decode_tokens_per_second", f"decode, batch of {batch}", arms, blocks, seed))
    return found


def _rate(metric: str, name: str, arms: list, blocks: int, seed: int) -> Measurement:
    options = {"lasted": warm_up(*arms), "blocks": blocks, "seconds": 0.02, "disturbance": disturbance.watch}
    pairs, control = with_control(*arms, seed=seed, **options)
    return measurement.from_pairs(metric, name, pairs, arms[0].tokens, control)


def points_known(measurements: Sequence[Measurement], prompt_tokens: int, batch: int) -> list[Measurement]:
    """Return those standard workloads that are points of a sweep, under the names that they have there."""
    names = {
        ("prefill_tokens_per_second", "prefill"): f"prefill, {prompt_tokens} tokens",
        ("decode_tokens_per_second", "decode"): "decode, batch of 1",
        ("batch_decode_tokens_per_second", "batch_decode"): f"decode, batch of {batch}",
    }
    named = [(one, names.get((one.metric, one.workload))) for one in measurements if one.ratio is not None]
    return [one.model_copy(update={"workload": name}) for one, name in named if name]


def gains(swept: Sequence[Measurement]) -> list[dict]:
    """Return a row per point of a sweep, in order, for a figure: `arm`, `strength`, `value`, `low`, `high`."""
    rows = []
    for one in swept:
        arm, _, told = one.workload.partition(", ")
        low, high = one.ci or (None, None)
        number = int("".join(letter for letter in told if letter.isdigit()))
        rows.append({"arm": arm, "strength": number, "value": one.ratio, "low": low, "high": high})
    return sorted(rows, key=lambda row: (row["arm"], row["strength"]))


def retrieval(
    loaded: Loaded, optimized: nn.Module, size: Effort, distances: Sequence[int], *, resamples: int, seed: int = 0
) -> list[Measurement]:
    """Return exact match of generated values at further distances in tokens, each a workload of its own."""
    found = []
    for distance in distances:
        arms = [evaluate.retrieval(replace(loaded, model=one), distance, size.retrieval_prompts, seed)
                for one in (loaded.model, optimized)]  # fmt: skip
        one = evaluate.compare_recalled(*arms, resamples=resamples, seed=seed)
        found.append(one.model_copy(update={"workload": f"generate, {distance} tokens back"}))
    return found


# --- what it returns -------------------------------------------------------------------------------------------------


def returns(applied: Applied, measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return what applying cost, in seconds and joules, and after how many tokens each saving has paid for it.

    A saving counts where the rate (or the energy per token) got better; elsewhere there is no such number, and why.
    """
    made = measurement.informative
    found = [
        made("apply_seconds", "apply", 0.0, applied.seconds, "perf_counter, once", ratio=None),
        made("apply_joules", "apply", 0.0, applied.joules, applied.source, applied.provenance, ratio=None),
    ]
    for one in measurements:
        joules = one.metric == "energy_joules_per_token"
        rate = one.metric in ("prefill_tokens_per_second", "decode_tokens_per_second", "batch_decode_tokens_per_second")
        if not joules and not rate:
            continue
        name = f"{one.workload}, by {'energy' if joules else 'time'}"
        if one.verdict != "better":
            reason = f"no gain was shown ({one.verdict})"
            found.append(measurement.unavailable("break_even_tokens", name, reason))
            continue
        spent = applied.joules if joules else applied.seconds
        saved = one.baseline - one.optimized if joules else 1 / one.baseline - 1 / one.optimized
        source = f"{'joules' if joules else 'seconds'} of applying over those saved per token, {one.workload}"
        provenance = "estimated" if joules and applied.provenance == "estimated" else "derived"
        reason = "the baseline needs none"
        found.append(made("break_even_tokens", name, None, spent / saved, source, provenance, reason=reason))
    return found


def account(applied: Applied, rate: Measurement, points: int = 24) -> list[dict]:
    """Return rows `strength` (tokens, in thousands), `value` (seconds), `arm`: what so many tokens take, all told.

    The optimized arm starts with the seconds of applying. The range ends at twice the break-even, or where applying
    would be a tenth of the baseline's time.
    """
    before, after = 1 / rate.baseline, 1 / rate.optimized
    end = 2 * applied.seconds / (before - after) if after < before else 10 * applied.seconds / before
    rows = []
    for tokens in np.linspace(0, end, points):
        rows.append({"strength": tokens / 1000, "value": before * tokens, "arm": "before"})
        rows.append(
            {"strength": tokens / 1000, "value": applied.seconds + after * tokens, "arm": "after, with applying"}
        )
    return rows
