"""Rivals of the factored model: other factorizations, structured pruning at equal bytes, and int8 and int4 weights.

Also compares factors calibrated on text of two domains. Returns plain data; independent of tables, figures and records.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import paired_samples, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import evaluate
from lib.measure.quality.answers import Text
from lib.measure.timing import interleaved, workloads
from lib.models.calibration.activations import observe
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import factored
from lib.models.tasks import tasks as prompts
from lib.optimizations.common import rival_arms
from lib.optimizations.common.compression import calibration_text, weight_only
from lib.optimizations.common.evidence import claims
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.tensor_decomposition import allocation
from lib.optimizations.tensor_decomposition import method as decomposition
from lib.optimizations.tensor_decomposition.experiment import (
    BARE,
    FITTED,
    FactoredModel,
    FactoringSetup,
    factors,
    removed_share,
    weighed_blocks,
)

PRUNED, EVEN, BARE_EVEN = "structured pruning", f"{FITTED}, uniform ranks", f"{BARE}, uniform ranks"
AT_BYTES = {weight_only.NAMES[8]: "at int8's bytes", weight_only.NAMES[4]: "at int4's bytes"}
STRENGTHS, STRENGTHS_OF_RANDOM_WEIGHTS, STRENGTHS_QUICKLY = (0.2, 0.4, 0.6), (0.6,), (0.4,)
WINDOWS = 8  # windows of held-out text on which rivals are judged
SPEED_TOKENS, SPEED_BLOCKS = 256, 6  # prompt tokens and timing blocks of the prefill that times a rival
PREVIEW_TOKENS = 64  # prompt tokens at effort preview
TURN_SECONDS = 0.03  # minimum length of a timed turn, except at effort preview
SHOWN = {
    "strength": "asked for, %",
    "prefill speed-up": "prefill, ×",
    "speed_low": "prefill, low",
    "speed_high": "prefill, high",
    "value": "KL, nats/token",
    "low": "KL, low",
    "high": "KL, high",
}


@dataclass
class Sweep:
    """Rivals over strengths: table rows, the arms at the run's own strength (yardsticks included), and skipped rivals
    with the reason.
    """

    rows: list[dict[str, object]] = field(default_factory=list)
    arms: list[ThirdArm] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    yardsticks: list[ThirdArm] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """Return the rows under readable column names with units."""
        return pd.DataFrame(self.rows).rename(columns=SHOWN)

    def divergence(self) -> pd.DataFrame:
        """Return divergence by bytes removed, `value` in nats per token; empty without text."""
        rows = pd.DataFrame(self.rows)
        return rows if "value" in rows else rows.head(0)

    def speed(self) -> pd.DataFrame:
        """Return the prefill speed-up by bytes removed, as `value`, `low`, `high`."""
        rows = pd.DataFrame(self.rows).drop(columns=["value", "low", "high"], errors="ignore")
        return rows.rename(columns={"prefill speed-up": "value", "speed_low": "low", "speed_high": "high"})


def sweep(
    setup: FactoringSetup,
    chosen: FactoredModel,
    text: Text | None,
    prompt_BT: torch.Tensor,
    compression: float,
    prune: Callable[..., nn.Module],
) -> Sweep:
    """Return every rival at several strengths, judged on the first windows of `text` and timed on `prompt_BT`, plus the
    yardsticks.

    `prune` is `structured_pruning`'s `apply`: it removes parts and refits the rest in closed form, as whitening does. A
    strength that a rival cannot reach is skipped, with the reason. Factors use the run's budget, except those with
    uniform ranks. Models of equal ranks are timed once.
    """
    untrained = setup.random_weights
    reference = None if text is None else rival_arms.reference(setup.baseline, text, setup.effort, WINDOWS)
    observation = None if untrained else observe(setup.baseline, setup.calibration)

    def model_of(arm: str, strength: float) -> nn.Module:
        if (arm, strength) == (setup.method, compression):
            return chosen.optimized
        if arm == PRUNED:
            options: dict[str, Any] = {
                "saliency": "random" if untrained else "activation",
                "compensate": False if untrained else None,  # refitted like the factors it competes with
                "observation": observation,
                "seed": setup.seed,
            }
            return prune(setup.baseline, setup.calibration, ratio=strength, **options)
        uniform = untrained or arm in (EVEN, BARE_EVEN)
        return factors(setup, strength, arm.split(",")[0], "uniform" if uniform else setup.budget)

    result = Sweep()
    rates: dict[str, Measurement] = {}
    strengths = STRENGTHS_OF_RANDOM_WEIGHTS if untrained else STRENGTHS_QUICKLY if setup.effort.brief else STRENGTHS
    for strength in sorted({*strengths, compression}):
        for arm in _names(setup):
            if strength != compression and (too_short := _reason_to_skip(setup, arm)):
                result.left_out[f"{arm} at {strength:g}"] = too_short
                continue
            try:
                model = model_of(arm, strength)
            except UserError as reason:
                result.left_out[f"{arm} at {strength:g}"] = str(reason)
                continue
            removed = removed_share(setup, model)
            purpose = f"other means, {100 * removed:.1f} % of the decoder's bytes removed"
            rival = rival_arms.judged(setup.baseline, reference, arm, purpose, model)
            if strength == compression and reference is not None:
                result.arms.append(rival)
            shape = str(factored.ranks(model) or allocation.decoder_bytes(model))
            if shape not in rates:
                rates[shape] = _prefill_rate(setup, model, prompt_BT)
            result.rows.append(_row(rival, strength, removed, rates[shape]))
            del model
    _add_yardsticks(setup, reference, prompt_BT, result)
    return result


def optimized_arm(setup: FactoringSetup, arms: Sequence[ThirdArm]) -> ThirdArm | None:
    """Return the arm of a sweep that is the optimized model, or None if it was not judged."""
    return next((arm for arm in arms if arm.name == setup.method), None)


def _add_yardsticks(setup: FactoringSetup, reference: Text | None, prompt_BT: torch.Tensor, result: Sweep) -> None:
    """Add weight-only int8 and int4 to the arms, and whitened factors with as many bytes as each of them."""
    arms = rival_arms.yardsticks(setup.baseline, reference, prompt_BT, setup.effort, seed=setup.seed)
    result.yardsticks = list(arms)
    decoder = allocation.decoder_bytes(setup.baseline)
    for arm in rival_arms.made(arms) if reference is not None else ():
        removed, name = rival_arms.removed_bytes(arm), f"{FITTED} {AT_BYTES[arm.name]}"
        try:
            model = factors(setup, removed / decoder, FITTED, setup.budget)
        except UserError as reason:
            result.left_out[name] = str(reason)
            continue
        result.yardsticks.append(rival_arms.judged(setup.baseline, reference, name, rival_arms.EQUAL_BYTES, model))
    result.arms += result.yardsticks


def _short_of_time(setup: FactoringSetup) -> bool:
    """Whether a real model is measured at effort quick: ten minutes suffice for one analysis of its text."""
    return setup.loaded.scale == "full" and setup.effort.brief


def _reason_to_skip(setup: FactoringSetup, arm: str) -> str:
    """Return why `arm` is measured only at the run's own strength; empty if there is time for the others."""
    if setup.effort.preview and arm in (EVEN, BARE_EVEN, setup.taught):
        return "at effort preview"
    return "at effort quick on a real model" if arm in (EVEN, BARE_EVEN) and _short_of_time(setup) else ""


def _names(setup: FactoringSetup) -> list[str]:
    names = ["random"] if setup.random_weights else [BARE, FITTED, setup.taught, EVEN, BARE_EVEN]
    names += [setup.method] if setup.method not in names else []  # the optimized model is listed among its rivals
    blocks = anatomy(setup.baseline).blocks
    if not setup.random_weights or all(block.feed_forward.kind == "dense" for block in blocks):
        names.append(PRUNED)  # at real dimensions a copy of all experts does not fit next to both models
    return names


def _prefill_rate(setup: FactoringSetup, model: nn.Module, prompt_BT: torch.Tensor) -> Measurement:
    tokens = PREVIEW_TOKENS if setup.effort.preview else SPEED_TOKENS
    arms = [workloads.prefill(arm, prompt_BT[:, :tokens]) for arm in (setup.baseline, model)]
    iterations = interleaved.iterations_for(arms[0], interleaved.TURN_SECONDS if setup.effort.preview else TURN_SECONDS)
    pairs = interleaved.paired(*arms, blocks=SPEED_BLOCKS, iterations=iterations, warmup=1, seed=setup.seed)
    return paired_samples.from_pairs("prefill_tokens_per_second", "prefill", pairs, arms[0].tokens, None)


def _row(arm: ThirdArm, strength: float, removed: float, rate: Measurement) -> dict[str, object]:
    low, high = rate.ci or (None, None)
    row = {"arm": arm.name, "strength": 100 * strength, "bytes removed, %": 100 * removed}
    row |= {"prefill speed-up": rate.ratio, "speed_low": low, "speed_high": high}
    divergence = claims.interval([arm], [arm.name])
    return row | (divergence._asdict() if divergence else {})


# --- calibration on another domain -----------------------------------------------------------------------------------


def domains(setup: FactoringSetup, compression: float) -> tuple[pd.DataFrame, str]:
    """Return a table and its caption: the divergence, in nats per token, of whitened factors calibrated on each of two
    kinds of text and judged on each. If skipped, an empty table and the reason.
    """
    if setup.random_weights:
        return pd.DataFrame(), f"No text to judge on: {setup.loaded.quality_unavailable}."
    if _short_of_time(setup):
        return pd.DataFrame(), "Skipped at effort quick on a real model: it needs another analysis of all matrices."
    loaded, effort, seed = setup.loaded, setup.effort, setup.seed
    own = prompts.corpus_of(loaded)
    foreign = "code" if own == "docs" else "docs"
    task = {"code": "code_origin", "docs": "topic"}[foreign]
    with_task = dataclasses.replace(loaded, parameters=loaded.parameters.model_copy(update={"tasks": [task]}))
    count = calibration_text.sequences(loaded.model, effort)  # as many as of the run's own text
    calibration = prompts.calibration(with_task, count, effort.calibration_tokens, seed)
    options: dict[str, Any] = {"weighed_blocks": weighed_blocks(effort)}
    spectra = {own: setup.spectra[FITTED], foreign: decomposition.analyse(setup.baseline, calibration, **options)}
    lost: dict[tuple[str, str], np.ndarray] = {}
    documents: dict[str, np.ndarray | None] = {}
    for judged, source in ((own, loaded), (foreign, with_task)):
        windows = rival_arms.PREVIEW_WINDOWS if effort.preview else WINDOWS
        size = "final", windows, effort.window_tokens, seed
        ids_NT, documents[judged] = prompts.text_windows(source, *size), prompts.window_sources(source, *size)
        reference = evaluate.read(setup.baseline, ids_NT)
        for calibrated, source_spectra in spectra.items():
            chosen: dict[str, Any] = {"method": FITTED, "budget": setup.budget, "spectra": source_spectra}
            model = decomposition.apply(setup.baseline, [], compression=compression, **chosen)
            lost[judged, calibrated] = evaluate.divergence(reference, evaluate.read(model, ids_NT))[0]
    removed = f"{100 * compression:g} % of the decoder's bytes removed"
    return domain_table(lost, seed, documents), f"Whitened factors, {removed}. {read_domains(lost, seed, documents)}"


def domain_table(
    lost: Mapping[tuple[str, str], np.ndarray], seed: int, documents: Mapping[str, np.ndarray | None]
) -> pd.DataFrame:
    """Return the mean divergence with its interval, in nats per token, a row for each pair in `lost`.

    Arguments as for `read_domains`.
    """
    rows = []
    for (judged, calibrated), kl_N in lost.items():
        low, high = paired_stats.bootstrap_interval(kl_N, seed=seed, source=documents.get(judged))
        row = {"judged on": judged, "calibrated on": calibrated, "KL, nats/token": float(kl_N.mean())}
        rows.append(row | {"low": low, "high": high})
    return pd.DataFrame(rows)


def read_domains(
    lost: Mapping[tuple[str, str], np.ndarray], seed: int = 0, documents: Mapping[str, np.ndarray | None] | None = None
) -> str:
    """Return a sentence for each domain that factors were judged on: whether the calibration domain matters there.

    lost: (judged on, calibrated on) → divergence of each window. documents: judged on → the document of each window;
    windows of one document are resampled together.
    """
    sentences = []
    for judged in dict.fromkeys(judged for judged, _ in lost):
        same = lost[judged, judged]
        other = next(kl_N for pair, kl_N in lost.items() if pair[0] == judged and pair[1] != judged)
        low, high = paired_stats.bootstrap_interval(other - same, seed=seed, source=(documents or {}).get(judged))
        word = "nearer than" if low > 0 else "further off than" if high < 0 else "not told apart from"
        kinds = f"factors calibrated on such text are {word} those calibrated on the other"
        sentences.append(f"Judged on {judged}, {kinds} ({same.mean():.3g}, {other.mean():.3g}).")
    return " ".join(sentences)
