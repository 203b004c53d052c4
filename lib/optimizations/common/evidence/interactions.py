"""Effects of pipeline parts alone, in pairs and in either order: timed in shared rounds, losses on the same windows.

An arm is a model under a name; `named` names pairs. Effects are in natural logarithms of speed (above 0 is faster) and
in nats of loss per token (above 0 is worse). The interaction of times is the time a pair saves beyond the sum of its
parts, as a share of the baseline's time: the times of parts that do different work add up, their logarithms do not.
"""

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from lib.measure.compare import replication
from lib.measure.metrics import paired_stats, process_variance
from lib.measure.quality import evaluate
from lib.measure.timing import control, disturbance, interleaved, workloads
from lib.measure.timing.interleaved import Rounds, rounds
from lib.models.structure.anatomy import reset_rope_deltas
from lib.optimizations.common.evidence import shapley
from lib.optimizations.common.evidence.shapley import Estimate

BASELINE = "baseline"
DECODE_PROMPT, DECODE_TOKENS = 64, 4
Arm = TypeVar("Arm", str, tuple[str, str])
States = Mapping[tuple[str, str], tuple[str, str | None]]  # (first, second) → state and reason
WORKLOADS = ("prefill", "decode")
AXIS_LABELS = {
    "prefill": "time saved beyond the sum, prefill",
    "decode": "time saved beyond the sum, decode",
    "loss": "loss beyond the sum, nats/token",
}


def named(*stems: str) -> str:
    """Return the name of the arm to which the steps `stems` are applied in this order."""
    return " → ".join(stems) if stems else BASELINE


def time_arms(
    models: Mapping[str, nn.Module],
    prompt_BT: torch.Tensor,
    count: int,
    seed: int = 0,
    fewest: int = paired_stats.MINIMUM_BLOCKS,
    decoded: int = DECODE_TOKENS,
) -> dict[str, Rounds]:
    """Time prefill of the prompt and a short decode (`decoded` tokens) of all arms, one of which is BASELINE.

    Small models are timed on copies of equal age (`of_one_age`), which are freed afterwards. Raises UserError for fewer
    than `fewest` rounds.
    """
    try:
        return _timed(*of_one_age(models, prompt_BT[:, :DECODE_PROMPT], seed), prompt_BT, count, seed, fewest, decoded)
    finally:
        gc.collect()  # a copy with a method bound to itself, such as one that reads in chunks, is a reference cycle


def _timed(
    models: Mapping[str, nn.Module],
    copied: bool,
    prompt_BT: torch.Tensor,
    count: int,
    seed: int,
    fewest: int,
    decoded: int,
) -> dict[str, Rounds]:
    short_BT = prompt_BT[:, :DECODE_PROMPT]
    works = {
        "prefill": {name: workloads.prefill(model, prompt_BT) for name, model in models.items()},
        "decode": {name: workloads.steps(model, short_BT, decoded) for name, model in models.items()},
    }
    timed = {}
    for name, calls in works.items():
        iterations = interleaved.iterations_for(calls[BASELINE], 0.02)
        options: dict[str, Any] = {"seed": seed, "fewest": fewest, "disturbance": disturbance.watch}
        timed[name] = replace(rounds(calls, count, iterations=iterations, **options), copied=copied)
    return timed


def of_one_age(
    models: Mapping[str, nn.Module], prompt_BT: torch.Tensor, seed: int = 0
) -> tuple[Mapping[str, nn.Module], bool]:
    """Return fresh copies of small models on a CPU, created in an order drawn from `seed`, and True.

    A baseline loaded early is slower for its age alone (`control.fresh_copies`). Returns the models themselves and
    False if any is not small, cannot be copied, or has a copy that answers the prompt differently.
    """
    if not replication.are_small([*models.values()]):
        return models, False
    fresh = control.fresh_copies(models, seed)
    copies = {name: model for name, (model, _) in fresh.items()}
    if any(reason for _, reason in fresh.values()):
        return models, False
    same = all(torch.equal(_read(copies[name], prompt_BT), _read(model, prompt_BT)) for name, model in models.items())
    return (copies, True) if same else (models, False)


@torch.inference_mode()
def _read(model: nn.Module, prompt_BT: torch.Tensor) -> torch.Tensor:
    """Return the most likely token after every token of the prompt, [B, T]."""
    reset_rope_deltas(model)
    return model(input_ids=prompt_BT.to(next(model.parameters()).device), use_cache=False).logits.argmax(-1)


def timed_on(timed: Iterable[Mapping[str, Rounds]]) -> str:
    """Return in words what was timed: copies made by each call of `time_arms`, or the models themselves."""
    copied = [all(rounds.copied for rounds in each.values()) for each in timed]
    if all(copied):
        return "copies made for them"
    if not any(copied):
        return "the models themselves"
    return f"copies made for them, in {copied.count(False)} of {len(copied)} cases the models themselves"


def process_sigma(workload: str, weights: Iterable[float]) -> float:
    """Return the standard deviation between processes of Σ weight · ln(seconds) over arms that are separate models.

    The value pooled from other runs is that of two arms, ln(copy / baseline): each arm contributes half its variance.
    """
    return process_variance.between_processes(workload).sigma * float(np.sqrt(sum(w**2 for w in weights) / 2))


def losses(models: Mapping[Arm, nn.Module], ids_NT: torch.Tensor) -> dict[Arm, np.ndarray]:
    """Return the loss of every arm on held-out windows: nats per token for each window, [N]."""
    return {name: evaluate.read(model, ids_NT).loss_N for name, model in models.items()}


def effects(
    timed: Mapping[str, Rounds],
    lost: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    source_N: np.ndarray | None = None,
) -> dict[str, Estimate]:
    """Return the contrast `weights` (arm → weight) for `prefill` and `decode` (log-speed) and `loss` (nats).

    Here and below `source_N` numbers the document of each window; windows of one document are resampled together.
    """
    estimates = {
        name: shapley.over_rounds(-times.contrast(weights), process_sigma(name, weights.values()))
        for name, times in timed.items()
    }
    if lost:
        weighted = (weight * lost[arm] for arm, weight in weights.items())
        loss_N = sum(weighted, np.zeros_like(next(iter(lost.values()))))
        estimates["loss"] = shapley.over_items(loss_N, source_S=source_N)
    return estimates


def singles(
    timed: Iterable[Mapping[str, Rounds]],
    lost: Mapping[str, np.ndarray],
    stems: Sequence[str],
    source_N: np.ndarray | None = None,
) -> list[dict]:
    """Return a row per part: its effects alone against the baseline, over all rounds in which it was timed."""
    timed, rows = list(timed), []
    for stem in stems:
        estimates: dict[str, Estimate] = {}
        for name in dict.fromkeys(work for times in timed for work in times):
            of_work = [times[name] for times in timed if name in times]
            contrasts = [-r.contrast({stem: 1, BASELINE: -1}) for r in of_work if stem in r.seconds]
            if contrasts:
                estimates[name] = shapley.over_rounds(np.concatenate(contrasts), process_sigma(name, (1, -1)))
        if stem in lost:
            estimates["loss"] = shapley.over_items(lost[stem] - lost[BASELINE], source_S=source_N)
        rows.append({"part": stem, **_flat(estimates)})
    return rows


def interactions(
    timed: Mapping[str, Rounds],
    lost: Mapping[str, np.ndarray],
    states: States,
    source_N: np.ndarray | None = None,
) -> list[dict]:
    """Return a row per ordered pair: state, reason, and (if it works) what the pair saves and loses beyond the sum of
    its parts, as a share of the baseline's time and in nats per token. `<workload>_both` is the log-speed of the pair.
    """
    rows = []
    for (first, second), (state, reason) in states.items():
        row: dict[str, object] = {"first": first, "second": second, "state": state, "reason": reason or ""}
        if state == "works":
            both = named(first, second)
            weights = {both: 1, first: -1, second: -1, BASELINE: 1}
            beyond = effects({}, lost, weights, source_N)
            saved = {name: _beyond(name, times, weights) for name, times in timed.items()}
            together = effects(timed, {}, {both: 1, BASELINE: -1})
            row |= _flat(saved | beyond) | {f"{name}_both": each.value for name, each in together.items()}
        rows.append(row)
    return rows


def _beyond(workload: str, times: Rounds, weights: Mapping[str, float]) -> Estimate:
    """Return `_saved` over the rounds; the interval includes the spread between processes, each arm weighted by its
    share of the baseline's time.
    """
    ratio = {
        arm: float(np.exp(np.median(times.contrast({arm: 1, BASELINE: -1})))) for arm in weights if arm != BASELINE
    }
    shares = [weights[arm] * ratio[arm] for arm in ratio]
    return shapley.over_rounds(_saved(times, weights), process_sigma(workload, [*shares, -sum(shares)]))


def _saved(times: Rounds, weights: Mapping[str, float]) -> np.ndarray:
    """Return −Σ weight · seconds of the arm ÷ seconds of the baseline for each round, [R]."""
    baseline = np.asarray(times.seconds[BASELINE], dtype=float)
    return -sum((w * np.asarray(times.seconds[arm]) for arm, w in weights.items()), np.zeros_like(baseline)) / baseline


def unmeasured(states: States) -> list[dict]:
    """Return a row per ordered pair with state and reason only."""
    return [{"first": a, "second": b, "state": state, "reason": why or ""} for (a, b), (state, why) in states.items()]


def order_effects(
    timed: Mapping[str, Rounds],
    lost: Mapping[str, np.ndarray],
    states: States,
    source_N: np.ndarray | None = None,
) -> list[dict]:
    """Return a row per pair that works in both orders: the effect of one order minus that of the other."""
    rows = []
    for (first, second), (state, _) in states.items():
        if first < second and state == states.get((second, first), ("", None))[0] == "works":
            weights = {named(first, second): 1, named(second, first): -1}
            row: dict[str, object] = {"order": named(first, second), "against": named(second, first)}
            rows.append(row | _flat(effects(timed, lost, weights, source_N)))
    return rows


def staleness(
    lost: Mapping[str, np.ndarray],
    outdated: Mapping[tuple[str, str], np.ndarray],
    source_N: np.ndarray | None = None,
) -> list[dict]:
    """Return a row per pair built from outdated statistics (losses [N]): the loss that these add, in nats per token."""
    rows = []
    for pair, loss_N in outdated.items():
        cost = shapley.over_items(loss_N - lost[named(*pair)], source_S=source_N)
        rows.append({"pair": named(*pair), **_flat({"loss": cost})})
    return rows


def _flat(estimates: Mapping[str, Estimate]) -> dict[str, float | None]:
    """Return estimates as columns `<name>`, `<name>_low`, `<name>_high`; an interval that is not finite is None."""
    flat: dict[str, float | None] = {}
    for name, estimate in estimates.items():
        ends: tuple[float | None, float | None] = (None, None)
        if np.isfinite([estimate.low, estimate.high]).all():
            ends = estimate.low, estimate.high
        flat |= {name: estimate.value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return flat
