"""Third arms that the compressions share: a changed model judged on held-out text with its bytes, and the yardstick of
weight-only int8 and int4. Knows no optimization.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.compare import speed
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import evaluate
from lib.measure.quality.evaluate import Text
from lib.measure.roofline import cost_model
from lib.optimizations.common.compression import weight_only
from lib.optimizations.common.evidence.claims import ThirdArm

TIMED = ("prefill", "decode")
PREVIEW_WINDOWS, PREVIEW_TOKENS = 4, 128  # of held-out text, on which rivals are judged at effort preview
EQUAL_BYTES = "as large as the yardstick"  # the purpose of an arm


def reference(baseline: nn.Module, text: Text, effort: Effort, windows: int | None = None) -> Text:
    """Return how the baseline reads what rivals are judged on: the first `windows` of its `text` (by default all of
    it), at effort preview the beginnings of a few.
    """
    if effort.preview:
        return evaluate.read(baseline, text.ids_NT[:PREVIEW_WINDOWS, :PREVIEW_TOKENS])
    if windows is None:
        return text
    return Text(text.ids_NT[:windows], text.loss_N[:windows], text.hidden_NTH[:windows], text.head)


def judged(baseline: nn.Module, reference: Text | None, name: str, purpose: str, model: nn.Module) -> ThirdArm:
    """Return an arm with the bytes of `model` and, against the baseline's `reference`, how it reads the same windows.

    Perplexity, divergence and agreement are read; without a reference only the bytes.
    """
    quality = [] if reference is None else evaluate.compare_text(reference, evaluate.read(model, reference.ids_NT))
    return ThirdArm(name, purpose, [*quality, size(baseline, model)])


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
    timed against the baseline; at effort preview int8 alone is timed.

    A width that int4 cannot pack leaves that arm out.
    """
    arms: list[ThirdArm] = []
    for bits, name in weight_only.NAMES.items():
        try:
            model = weight_only.weight_only(baseline, bits, part)
        except UserError:
            continue
        missing = weight_only.without_kernel(baseline, bits, part)
        purpose = weight_only.PURPOSE + (
            f"; no kernel for {missing} matrices, restored for each product" if missing else ""
        )
        if effort.preview and arms:
            purpose += "; not timed at effort preview"
        arm = judged(baseline, reference, name, purpose, model)
        if not (effort.preview and arms):
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
    """Return int4 chosen by GPTQ: quality and bytes. Its speed is that of int4 rounded to nearest: the same kernel on
    as many bytes. Nothing for a width that int4 cannot pack.
    """
    try:
        model = weight_only.weight_only(baseline, 4, part, calibration)
    except UserError:
        return []
    return [judged(baseline, reference, weight_only.BY_GPTQ, weight_only.GPTQ_PURPOSE, model)]


def removed_bytes(arm: ThirdArm) -> float:
    """Return by how many bytes the weights of an arm are smaller than the baseline's."""
    sizes = next(m for m in arm.measurements if m.metric == "weights_bytes")
    return (sizes.baseline or 0.0) - (sizes.optimized or 0.0)


def at_yardsticks(arms: list[ThirdArm]) -> list[ThirdArm]:
    """Return the yardsticks among some arms, and the arms of equal bytes."""
    return [arm for arm in arms if arm.purpose == EQUAL_BYTES or arm.purpose.startswith("weight-only")]


def table(arms: list[ThirdArm]) -> pd.DataFrame:
    """Return a row for each arm: weights and rates over the baseline's, divergence in nats per token, perplexity.

    What an arm was not measured for is None.
    """
    return pd.DataFrame([_line(arm) for arm in arms])


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
    }
