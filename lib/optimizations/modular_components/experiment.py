"""The protocol of composing: every ordered pair of parts, refusals forced through, interactions, a live exchange."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.errors import NotApplicable, UserError
from lib.measure.compare import speed
from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, paired_samples
from lib.measure.metrics.busy import withhold_if_busy
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.models.checkpoints import io
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.evidence import claims
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search import search_quality
from lib.optimizations.modular_components import hot_swap, maintenance, method, pair_rounds, strength, traits
from lib.optimizations.modular_components.hot_swap import LiveExchange
from lib.optimizations.modular_components.pair_study import Contrasts, PairStudy
from lib.optimizations.modular_components.parts_setup import PartsSetup
from lib.optimizations.modular_components.strength import AppliedStep, Weakened

CLAIMS = (
    "A pair crashes instead of being refused with a reason.",
    "A refused pair would have worked.",
    "Interactions exclude zero in more pairs than chance explains.",
    "The identity pipeline is slower than the noise floor.",
    "A reverted model differs in a single bit.",
    "Fewer than two parts keep the margins together.",
)
# The measurement that decides the verdict of each dimension, declared before anything is measured.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
OVERHEAD_MARGIN = 0.01
EXCHANGED_TOKENS = 12
EXCHANGED = "exchanged in the middle, or between requests or not at all where a row says so"


def arranged(setup: PartsSetup, steps: str) -> tuple[list[RecipeStep], dict[str, str]]:
    """Return the steps of the whole pipeline, and by stem the reason why a part was left out.

    `steps`: stems joined by + in the order to apply, or "auto" for all that fit together, ordered. Raises NotApplicable
    if a requested optimization is not a part, or does not apply to this model or in this order.
    """
    if steps == "auto":
        return method.orderable([method.trial(stem) for stem in setup.fitting], setup.loaded.model)
    try:
        wanted = [method.trial(stem.strip()) for stem in steps.split("+")]
    except UserError as error:
        raise NotApplicable(str(error)) from None
    unfit = [f"{step.optimization}: {why}" for step in wanted if (why := setup.unfit.get(step.optimization))]
    if why := "; ".join(unfit) or method.refusal(wanted, setup.loaded.model):
        raise NotApplicable(f"{method.NAME}: steps {steps}: {why}")
    return wanted, {}


def shapes_of_middle_block(setup: PartsSetup, steps: list[RecipeStep]) -> pd.DataFrame:
    """Return the shapes of the middle block's matrices after each step, one column per step.

    A step that refuses the model left by the steps before it is skipped, and its column gives the reason.
    """
    model = setup.loaded.model
    middle = len(anatomy(model).blocks) // 2
    columns: dict[str, dict[str, str]] = {"baseline": traits.shapes(model, middle)}
    applied: list[RecipeStep] = []
    for step in steps:
        start = time.perf_counter()
        try:
            model = method.compose(model, setup.calibration, [step], arrange=False, seed=setup.seed).model
        except UserError as refusal:
            first = next(iter(columns["baseline"]))
            columns[step.optimization] = dict.fromkeys(columns["baseline"], "not applied")
            columns[step.optimization][first] = f"not applied: {refusal}"
            continue
        seconds = time.perf_counter() - start
        applied.append(step)
        columns[step.optimization] = traits.shapes(model, middle)
        if setup.keeps_singles:
            setup.applied_before[strength.named(applied)] = AppliedStep(model, seconds)
    return pd.DataFrame(columns).fillna("–").rename_axis("tensor").reset_index()


def composed(
    setup: PartsSetup, steps: list[RecipeStep], contrasts: Contrasts | None = None
) -> tuple[Weakened, list[Weakened]]:
    """Return the strongest stack of these steps within the margins, and every strength tried: only full and half
    strength if time is short.

    With `contrasts`, parts that only slow the model down are left out, and, if no strength of the whole stack keeps the
    margins, those that lose most. Asserts that composing changed no weight of the baseline.
    """
    quality = search_quality.prepare(setup.loaded, setup.quick, setup.seed)
    apart = strength.LEVELS // 2 if setup.hurried else 1
    options: dict[str, Any] = {
        "apart": apart,
        "applied_before": setup.applied_before,
        "keep_first": setup.keeps_singles,
    }
    slow: dict[str, str] = {}
    if contrasts is not None:
        slow, options["losses"] = contrasts.only_slower(), contrasts.losses_alone
        steps = [step for step in steps if step.optimization not in slow]
    chosen, levels = strength.find(quality, setup.calibration, steps, setup.sample_BT, setup.seed, **options)
    setup.applied_before.clear()
    assert io.weights_hash(setup.loaded.model) == setup.weights, "composing changed the baseline"
    return replace(chosen, left_out=chosen.left_out | slow), levels


def stack_table(chosen: Weakened) -> pd.DataFrame:
    """Return a row per step of the stack and per part left out of it, with the reason."""
    rows = [{"step": step.optimization, "knobs": str(step.knobs or "defaults")} for step in chosen.steps]
    rows += [{"step": stem, "knobs": f"left out: {why}"} for stem, why in chosen.left_out.items()]
    return pd.DataFrame(rows, columns=["step", "knobs"])


def identity(setup: PartsSetup) -> nn.Module:
    """Return the model of the identity pipeline, which has no steps. Asserts that its weights are the baseline's."""
    copied = method.compose(setup.loaded.model, setup.calibration, []).model
    assert io.weights_hash(copied) == setup.weights, "the identity pipeline changed a weight"
    return copied


def overhead(setup: PartsSetup, identity: nn.Module, prompt_BT: torch.Tensor) -> list[Measurement]:
    """Return prefill and decode (at effort preview only prefill) of the identity pipeline against the uncomposed model,
    with OVERHEAD_MARGIN as the margin.
    """
    arms = (setup.loaded.model, identity, prompt_BT, setup.effort)
    names = ("prefill",) if setup.effort.preview else ("prefill", "decode")
    unchanged = speed.compare(*arms, names=names, with_energy=False, seed=setup.seed)
    rates = [
        paired_samples.from_pairs(
            speed.METRICS_OF[name][0], name, timed.pairs, timed.baseline.tokens, timed.control, margin=OVERHEAD_MARGIN
        )
        for name, timed in unchanged.timed.items()
    ]
    return withhold_if_busy(rates)


def exchange_live(setup: PartsSetup, study: PairStudy, prompt_BT: torch.Tensor) -> LiveExchange:
    """Swap the model of each part into the live baseline in mid-request, restore the baseline, and check that weights,
    logits and an answer are unchanged; see `hot_swap.exchange_all`.
    """
    model = setup.loaded.model
    attempts = ((stem, pair_rounds.with_model(setup, single).model) for stem, single in study.singles.items())
    exchanged = ((stem, other) for stem, other in attempts if other is not None)
    question_BT = prompt_BT[:, :64].to(next(model.parameters()).device)
    return hot_swap.exchange_all(model, exchanged, question_BT, EXCHANGED_TOKENS, setup.weights)


def spending(study: PairStudy, exchanged: LiveExchange, grown: maintenance.Addition | None) -> list[Measurement]:
    """Return the modularity score, the longest wait of an exchange, and the maintenance cost of one more part."""
    informative = measurement.informative
    count: dict[str, Any] = {"n": study.count, "reason": "the baseline is one part"}
    source = "working ordered pairs ÷ all that were tried"
    rows = [informative("modularity_score", "compose", None, study.score, source, "derived", **count)]
    if exchanged.waits:
        source = "perf_counter around each exchange, while a request was under way or just over"
        why: dict[str, Any] = {"n": len(exchanged.waits), "reason": "the baseline is never swapped"}
        rows.append(informative("swap_ms", "hot swap", None, exchanged.longest_ms, source, **why))
    if grown:
        source = "a twelfth optimization, added to a temporary copy; lines that are not blank"
        for metric, value in (("files_touched", grown.touched), ("lines_written", grown.lines)):
            rows.append(informative(metric, "maintenance", None, value, source, reason="nothing to add"))
    return rows


def impact(contrasts: Contrasts, whole: Measurement | None, steps: int) -> list[dict[str, object]]:
    """Return the gain of prefill by number of parts: mean, lowest and highest of single parts, of pairs, and of the
    whole stack.

    `whole` is the prefill rate of the judged stack of `steps` parts; left out if it has two or fewer.
    """
    works = contrasts.pairs[contrasts.pairs.state == "works"]
    together: dict[int, list[float]] = {
        parts: [float(log) for log in frame[column].dropna()] if column in frame else []
        for parts, frame, column in ((1, contrasts.alone, "prefill"), (2, works, "prefill_both"))
    }
    if whole is not None and whole.ratio and steps > 2:
        together[steps] = [float(np.log(whole.ratio))]
    return [
        {"arm": "mean, least and most", "strength": parts, "value": float(np.exp(np.mean(logs)))}
        | {"low": float(np.exp(min(logs))), "high": float(np.exp(max(logs)))}
        for parts, logs in together.items()
        if logs
    ]


def refutations(
    study: PairStudy,
    contrasts: Contrasts,
    measured_overhead: list[Measurement],
    exchanged: LiveExchange,
    stack: Weakened,
) -> list[ClaimAnswer]:
    """Return (claim, whether it is refuted, evidence) for each of CLAIMS."""
    crashed, strict, count = study.named("crashed"), study.too_strict, study.count
    verdicts = {m.verdict for m in measured_overhead}
    slower = True if "worse" in verdicts else False if verdicts <= {"equivalent", "better"} else None
    rates = ", ".join(f"{m.workload} at {_share(m)} of the rate, {m.verdict}" for m in measured_overhead)
    answers = (
        (bool(crashed), f"{len(crashed)} of {count} ordered pairs crash"),
        (
            bool(strict) if study.forced else None,
            f"{len(strict)} of {len(study.forced)} refused pairs work when forced",
        ),
        contrasts.refuted(),
        (slower if measured_overhead else None, rates or "nothing was timed"),
        (not exchanged.identical if exchanged.done else None, exchanged.reverted),
        _together(stack),
    )
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answers)]


def _share(rate: Measurement) -> str:
    """Return a rate relative to the uncomposed model's, with its interval."""
    return claims.ratio_in_words(rate, sign="")


def _together(stack: Weakened) -> tuple[bool | None, str]:
    """Return whether fewer than two parts keep the margins together, and the stack.

    None if there are two only by counting parts that change no answer, since these keep any margin.
    """
    evidence, able = f"the stack is {named(stack)}", len(stack.can_lose)
    if len(stack.steps) < 2 or able > 1:
        return len(stack.steps) < 2, evidence
    return None, f"{evidence}; {able} of its parts can lose quality"


def named(stack: Weakened) -> str:
    """Return the stack's parts in their order, or "nothing"."""
    return " → ".join(step.optimization for step in stack.steps) or "nothing"


def arms(compared: Compared, measured_overhead: list[Measurement]) -> list[ThirdArm]:
    """Return the controls of a record: A/A and the identity pipeline."""
    same = ThirdArm("A/A", "a copy of the baseline", compared.control())
    return [same, ThirdArm("identity pipeline", "composed of no step", measured_overhead)]


def details(
    whole: Weakened,
    levels: Sequence[Weakened],
    study: PairStudy,
    contrasts: Contrasts,
    exchanged: LiveExchange,
) -> dict[str, tuple[object, str, str]]:
    """Return the record's details: name → (value, provenance, source)."""
    how = contrasts.source
    tables: Mapping[str, pd.DataFrame] = {
        "alone": contrasts.alone,
        "interactions": contrasts.pairs,
        "order_effects": contrasts.orders,
        "stale_statistics": contrasts.stale,
    }
    return {
        "order": (
            [step.model_dump() for step in whole.steps],
            "derived",
            "descriptors of the parts, strongest in margin",
        ),
        "strengths": ([level.row() for level in levels], "measured", "text and items of the split search"),
        "left_out": (whole.left_out, "derived", "counts of bytes, and what parts refuse"),
        **{name: (frame.to_dict("records"), "measured", how) for name, frame in tables.items()},
        "refusals_forced": (study.audit(), "measured", "each refused pair applied unchecked"),
        "reverted_bit_identical": (exchanged.identical if exchanged.done else None, "measured", exchanged.reverted),
        "hot_swaps": (exchanged.rows, "measured", f"{EXCHANGED_TOKENS} tokens each; {EXCHANGED}"),
    }


def sentence(
    study: PairStudy,
    contrasts: Contrasts,
    measured_overhead: list[Measurement],
    exchanged: LiveExchange,
    stack: Weakened,
) -> str:
    """Return one sentence each on the judged stack, the pairs, the identity pipeline, the exchanges and the
    interactions.
    """
    works, refused, crashed = (len(study.named(state)) for state in ("works", "refused", "crashed"))
    at = f"{percent(stack.level / strength.LEVELS)} of the strength of each part that can be weakened"
    results = [
        f"The judged stack: {f'{named(stack)}, at {at}' if stack.steps else 'empty'}",
        f"{works} of {study.count} ordered pairs work, {refused} refused with a reason, {crashed} crashed",
    ]
    if measured_overhead:
        worst = max(measured_overhead, key=lambda m: abs((m.ratio or 1) - 1))
        results.append(f"The identity pipeline runs at {_share(worst)} of the {worst.workload} rate, {worst.verdict}")
    results += [f"After reverting: {exchanged.reverted}", f"Interactions: {contrasts.refuted()[1]}"]
    return " ".join(f"{result}." for result in results)
