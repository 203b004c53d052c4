"""What two models take: parameters, bytes in memory, on disk and in the cache, true peaks, processor use.

The composition that every template uses for the dimension "resources", and for what applying an optimization costs
against what it saves. Knows nothing of how the models differ.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from lib.measure import cost, energy, measurement, memory, processor
from lib.measure import speed as speeds
from lib.measure.effort import Effort
from lib.measure.measurement import Measurement
from lib.models import loading


def resources(baseline: nn.Module, optimized: nn.Module, prompt_BT: torch.Tensor, effort: Effort) -> list[Measurement]:
    """Return parameters, bytes (memory, disk, cache per token), true peaks, load and first call, and processor use.

    Both models are saved to a temporary folder and loaded again in child processes of their own.
    """
    shapes, dtype = "counted from the tensors' shapes", str(next(baseline.parameters()).dtype).removeprefix("torch.")
    counted = {
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "weights_bytes": cost.weights_bytes,
        "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token,
    }
    found = [
        measurement.counted(metric, "any", count(baseline), count(optimized), shapes)
        for metric, count in counted.items()
    ]
    device = next(baseline.parameters()).device.type
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / "baseline", Path(folder) / "optimized"]
        for model, place in zip((baseline, optimized), places):
            loading.save(model, place)
        size = [cost.checkpoint_bytes(place) for place in places]
        found.append(measurement.counted("checkpoint_bytes", "any", *size, "sizes of the saved files", "measured"))
        options = {"prompt_tokens": effort.prompt_tokens, "new_tokens": 4, "dtype": dtype, "device": device}
        arms = [memory.Arm(folder=str(place), workload="generate", **options) for place in places]
        found += memory.measurements(*memory.peaks(*arms))
    return [*found, *utilisation(baseline, optimized, prompt_BT, effort)]


def utilisation(
    baseline: nn.Module, optimized: nn.Module, prompt_BT: torch.Tensor, effort: Effort
) -> list[Measurement]:
    """Return how busy the given cores (and the GPU, where there is one) are while each model reads a prompt."""
    used = [processor.use(speeds.make(model, prompt_BT, effort, "prefill")) for model in (baseline, optimized)]
    values = [use.utilisation for use in used]
    found = [measurement.informative("processor_utilisation", "prefill", *values, used[0].source, n=1)]
    if used[0].gpu is not None:
        source = "NVML, mean of samples at 20 Hz"
        found.append(measurement.informative("gpu_utilisation", "prefill", *[use.gpu for use in used], source, n=1))
    return found


def efficiency(
    baseline: nn.Module, optimized: nn.Module, prompt_BT: torch.Tensor, effort: Effort, *, seed: int = 0
) -> list[Measurement]:
    """Return energy per token of prefill and decode, and FLOPs and bytes per token by formula."""
    found = []
    for name in ("prefill", "decode"):
        arms = [speeds.make(model, prompt_BT, effort, name) for model in (baseline, optimized)]
        device = next(baseline.parameters()).device.type
        found += energy.per_token(*arms, workload=name, blocks=effort.blocks, device=device, seed=seed)
        costs = [cost.of(model, arm) for model, arm in zip((baseline, optimized), arms)]
        metric, amounts = (
            ("prefill_flops_per_token", [one.flops for one in costs])
            if name == "prefill"
            else ("decode_bytes_per_token", [one.bytes for one in costs])
        )
        per_token = [amount / arms[0].tokens for amount in amounts]
        found.append(measurement.counted(metric, name, *per_token, "formula over shapes, top-k routing counted"))
    return found


def return_on_cost(apply_seconds: float, found: list[Measurement], what: str) -> list[Measurement]:
    """Return what applying cost, and after how many prompt tokens the time saved in prefill has paid for it.

    `found` holds the measurement of prefill_tokens_per_second; without a proven gain there is no break-even.
    """
    spent = measurement.informative("apply_seconds", "apply", 0.0, apply_seconds, what, n=1, ratio=None)
    rate = next((one for one in found if one.metric == "prefill_tokens_per_second"), None)
    source = "seconds to apply ÷ seconds saved per prompt token"
    if rate is None or rate.verdict != "better":
        reason = "prefill is not proven faster, so nothing is paid back in time"
        return [spent, measurement.unavailable("break_even_tokens", "prefill", reason, source)]
    saved = 1 / rate.baseline - 1 / rate.optimized
    tokens = apply_seconds / saved
    return [spent, measurement.informative("break_even_tokens", "prefill", None, tokens, source, "derived", ratio=None)]
