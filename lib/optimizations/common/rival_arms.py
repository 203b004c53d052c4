"""Third arms shared by the compression methods: a changed model judged on held-out text and by its bytes, and the
yardstick of weight-only int8 and int4.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.compare import speed
from lib.measure.metrics import measurement
from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.decision import BUSY_FLOOR
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate
from lib.measure.quality.answers import Text
from lib.measure.roofline import cost_model
from lib.models.structure.replacements.quantized import FEW_TOKENS
from lib.optimizations.common.compression import weight_only
from lib.optimizations.common.evidence import claims
from lib.optimizations.common.evidence.claims import ThirdArm

TIMED = ("prefill", "decode")
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")
PREVIEW_WINDOWS, PREVIEW_TOKENS = 4, 128  # of held-out text for judging rivals at effort preview
EQUAL_BYTES = "as large as the yardstick"  # the purpose of an arm starts with it
LEFT_OUT = "left out"  # starts the last part of the purpose of an arm that could not be built
UNTOLD = "not told apart"
NO_KERNEL = "no kernel for"  # followed by a number of matrices: starts a part of a purpose


def reference(baseline: nn.Module, text: Text, effort: Effort, windows: int | None = None) -> Text:
    """Return the baseline's results on the text for judging rivals: the first `windows` of `text` (by default all), at
    effort preview the beginnings of a few windows. The windows keep their documents, and the text its name.
    """
    if windows is None and not effort.preview:
        return text
    few = slice(PREVIEW_WINDOWS if effort.preview else windows)
    sources = None if text.source_N is None else text.source_N[few]
    if effort.preview:
        return replace(evaluate.read(baseline, text.ids_NT[few, :PREVIEW_TOKENS]), source_N=sources, name=text.name)
    return replace(
        text, ids_NT=text.ids_NT[few], loss_N=text.loss_N[few], hidden_NTH=text.hidden_NTH[few], source_N=sources
    )


def judged(baseline: nn.Module, reference: Text | None, name: str, purpose: str, model: nn.Module) -> ThirdArm:
    """Return an arm with the bytes of `model` and its perplexity, divergence and agreement on the windows of the
    baseline's `reference`. Without a reference only the bytes are measured.
    """
    bytes_ = size(baseline, model)
    if reference is None:
        return ThirdArm(name, purpose, [bytes_])
    text = evaluate.read(model, reference.ids_NT)
    return ThirdArm(name, purpose, [*answer_comparison.compare_text(reference, text), bytes_])


def left_out(name: str, purpose: str, reason: object) -> ThirdArm:
    """Return an arm that could not be built: without measurements, the reason appended to its purpose."""
    return ThirdArm(name, f"{purpose}; {LEFT_OUT}: {reason}", [])


def made(arms: Sequence[ThirdArm]) -> list[ThirdArm]:
    """Return the arms that could be built: those with measurements."""
    return [arm for arm in arms if arm.measurements]


def size(baseline: nn.Module, model: nn.Module) -> Measurement:
    """Return the bytes of all weights of both models."""
    before, after = cost_model.weights_bytes(baseline), cost_model.weights_bytes(model)
    return measurement.counted("weights_bytes", "load", before, after, "parameters and buffers as stored")


def yardsticks(
    baseline: nn.Module,
    reference: Text | None,
    prompt_BT: torch.Tensor,
    effort: Effort,
    *,
    part: str = "all",
    seed: int = 0,
) -> list[ThirdArm]:
    """Return weight-only int8 and int4 of the decoder's matrices in `part`: quality, bytes, and prefill and decode
    timed against the baseline. At effort preview only the first arm that can be built is timed.

    An arm that cannot be built (int4 cannot pack every width) is `left_out`, with the reason.
    """
    arms: list[ThirdArm] = []
    for bits, name in weight_only.NAMES.items():
        try:
            model = weight_only.weight_only(baseline, bits, part)
        except UserError as reason:
            arms.append(left_out(name, weight_only.PURPOSE, reason))
            continue
        missing = weight_only.without_kernel(baseline, bits, part)
        purpose = weight_only.PURPOSE + (
            f"; {NO_KERNEL} {missing} matrices, restored for each product" if missing else ""
        )
        if bits == 8 and weight_only.rounds_few_tokens(baseline, part):
            purpose += f"; up to {FEW_TOKENS} tokens are multiplied in bfloat16, the judged text by restored matrices"
        if bits == 4 and (groups := weight_only.other_groups(baseline, part)):
            purpose += f"; {groups}"
        if dense := weight_only.left_dense(baseline, part):
            purpose += f"; {dense} matrices that expand latents stay dense, as engines keep them restored"
        timed = not (effort.preview and made(arms))
        if not timed:
            purpose += "; not timed at effort preview"
        arm = judged(baseline, reference, name, purpose, model)
        if timed:
            options: dict[str, Any] = {"names": TIMED, "with_energy": False, "fallback": bool(missing), "seed": seed}
            arm.measurements.extend(speed.compare(baseline, model, prompt_BT, effort, **options).measurements)
        arms.append(arm)
        del model
    return arms


def by_gptq(
    baseline: nn.Module,
    reference: Text,
    calibration: Sequence[dict[str, torch.Tensor]],
    part: str = "all",
) -> list[ThirdArm]:
    """Return int4 by GPTQ: quality and bytes. Its speed is that of int4 rounded to nearest, with the same kernel and
    the same number of bytes. If it cannot be built, it is `left_out`, with the reason.
    """
    try:
        model = weight_only.weight_only(baseline, 4, part, calibration)
    except UserError as reason:
        return [left_out(weight_only.BY_GPTQ, weight_only.GPTQ_PURPOSE, reason)]
    groups = weight_only.other_groups(baseline, part)
    purpose = "; ".join(filter(None, [weight_only.GPTQ_PURPOSE, groups]))
    return [judged(baseline, reference, weight_only.BY_GPTQ, purpose, model)]


def removed_bytes(arm: ThirdArm) -> float:
    """Return how many bytes smaller the weights of an arm are than the baseline's."""
    sizes = next(m for m in arm.measurements if m.metric == "weights_bytes")
    return (sizes.baseline or 0.0) - (sizes.optimized or 0.0)


def at_yardsticks(arms: list[ThirdArm]) -> list[ThirdArm]:
    """Return the yardsticks among `arms`, and the arms built to have as many bytes."""
    return [arm for arm in arms if arm.purpose.startswith((EQUAL_BYTES, "weight-only"))]


def table(arms: list[ThirdArm]) -> pd.DataFrame:
    """Return a row per arm: weights and rates relative to the baseline, divergence in nats per token, perplexity, and
    its purpose, which names the limits of its rates.

    Columns without a measurement are None; an arm that was left out has only its name and the reason.
    """
    return pd.DataFrame([_line(arm) for arm in arms])


def beside(chosen: ThirdArm | None, arms: Sequence[ThirdArm]) -> str:
    """Return a sentence per yardstick among `arms`: is it smaller than the optimized model, and nearer to the baseline?

    `chosen` is the optimized model judged on the same text, or None if it was not judged.
    """
    if chosen is None or (own := claims.interval([chosen], [chosen.name])) is None:
        return "No text was judged, so it is not known which model is nearer to the baseline."
    sentences, weights = [], _weights(chosen)
    for arm in _yardsticks(arms):
        divergence = claims.interval([arm], [arm.name])
        if divergence is None:
            continue
        smaller = _weights(arm) < weights
        nearer = True if divergence.high < own.low else False if divergence.low > own.high else None
        size = f"{'smaller' if smaller else 'larger'} than the optimized model"
        size += f" ({_weights(arm):.3g}× of the weights against {weights:.3g}×)"
        joined = "and" if nearer is smaller else "but"
        word = "nearer to the baseline" if nearer else "further from the baseline"
        word = f"{joined} {word}" if nearer is not None else "and not told apart in its distance from the baseline"
        sentences.append(f"{arm.name} is {size} {word} (KL {divergence.value:.3g} against {own.value:.3g}).")
    return " ".join(sentences) or "No yardstick was judged."


def raced(measurements: Sequence[Measurement], arms: Sequence[ThirdArm]) -> str:
    """Return a sentence per timed yardstick among `arms`: where is the optimized model faster, where slower?

    The optimized model's rates are among `measurements`. Faster and slower are stated only if intervals and noise
    floors allow it and both were timed on a quiet machine. Matrices without a kernel are named after the yardstick.
    """
    own = {m.workload: m for m in measurements if m.metric in RATES}
    sentences = []
    for arm in _yardsticks(arms):
        words: dict[str, list[str]] = {}
        quiet = why_busy(measurements) is None and why_busy(arm.measurements) is None
        for rate in arm.measurements:
            mine = own.get(rate.workload)
            if rate.metric in RATES and rate.ratio and mine is not None and mine.ratio:
                where = f"{rate.workload} ({mine.ratio:.3g}× against {rate.ratio:.3g}×)"
                words.setdefault(_faster(mine, rate) if quiet else UNTOLD, []).append(where)
        if words:
            parts = [f"{word} in {' and '.join(where)}" for word, where in words.items()]
            lacks = [part for part in arm.purpose.split("; ") if part.startswith(NO_KERNEL)]
            name = f"{arm.name} ({lacks[0]})" if lacks else arm.name
            sentences.append(f"Compared with {name} the optimized model is {', and '.join(parts)}.")
    return " ".join(sentences)


def _faster(own: Measurement, their: Measurement) -> str:
    """Return "faster", "slower" or UNTOLD for one rate (relative to the baseline) against another."""
    floor = max(own.noise_floor or 0.0, their.noise_floor or 0.0)
    assert own.ratio and their.ratio
    if own.ci and their.ci and floor <= BUSY_FLOOR and abs(math.log(own.ratio / their.ratio)) > floor:
        if own.ci[0] > their.ci[1]:
            return "faster"
        if own.ci[1] < their.ci[0]:
            return "slower"
    return UNTOLD


def _yardsticks(arms: Sequence[ThirdArm]) -> list[ThirdArm]:
    return [arm for arm in arms if arm.name in weight_only.NAMES.values()]


def _weights(arm: ThirdArm) -> float:
    return next(m.ratio or 1.0 for m in arm.measurements if m.metric == "weights_bytes")


def _line(arm: ThirdArm) -> dict[str, object]:
    ratios = {m.metric: m.ratio for m in reversed(arm.measurements)}
    values = {m.metric: m.optimized for m in reversed(arm.measurements)}
    return {
        "arm": arm.name,
        "weights, ×": ratios.get("weights_bytes"),
        "KL, nats/token": values.get("kl_divergence_nats"),
        "perplexity": values.get("perplexity"),
        "prefill, ×": ratios.get("prefill_tokens_per_second"),
        "decode, ×": ratios.get("decode_tokens_per_second"),
        "what it is": arm.purpose,
    }
