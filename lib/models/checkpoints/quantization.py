"""Checkpoints whose weights are stored quantized: which can be dequantized while they are loaded, and which cannot.

Never weights without their scales: what transformers cannot dequantize here is refused while planning. Reads the
configuration and the stored dtypes; no weight, and no torch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib import memory_limits

DEQUANTIZED = ("fp8",)  # by transformers, while loading
FLOATS = ("F64", "F32", "F16", "BF16")
SCALES = ("_scale", "_scale_inv", "scales", "qzeros", "absmax", "_blocks")  # ends of their names
# What transformers reads as the scale of `X.weight` beside it: `X.weight_scale_inv` and what some checkpoints call it.
SCALED_BY = ("weight_scale_inv", "scale", "qscale_weight")
WHOLE_SHARE = 0.8  # of the free memory, as in `lib.models.checkpoints.placement`
ADVICE = "give the checkpoint before it was quantized, or a GGUF file"


def method(folder: Path) -> str | None:
    """Return how the weights of a checkpoint folder are quantized by its configuration, None if they are not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    described: Any = config.get("quantization_config") if isinstance(config, dict) else None
    if not described:
        return None
    return str(described.get("quant_method", "unknown") if isinstance(described, dict) else described)


def fault(folder: Path, stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Return None, or in one line why the weights cannot be used. `stored`: tensor → (dtype, shape) in the files."""
    quantized = method(folder)
    if quantized is None:
        for name, (dtype, _) in stored.items():
            if name.endswith(SCALES) or (name.endswith(".weight") and dtype not in FLOATS):
                return (
                    f"{folder}: {name} is stored as {dtype} by a quantizer that config.json does not name; without its "
                    f"scales the weights are wrong: {ADVICE}"
                )
        return None
    if quantized not in DEQUANTIZED:
        return f"{folder}: its weights are quantized ({quantized}), which cannot be undone here: {ADVICE}"
    if misfit := _scale_fault(stored):
        return f"{folder}: {misfit}: {ADVICE}"
    needed = 2 * sum(math.prod(shape) for _, shape in stored.values())
    free = memory_limits.free_memory_bytes()
    if needed > WHOLE_SHARE * free:
        return (
            f"{folder}: its weights are quantized ({quantized}) and take {needed / 2**30:.1f} GiB dequantized, "
            f"{free / 2**30:.1f} GiB are free: they cannot be streamed from their files; {ADVICE}"
        )
    return None


def _scale_fault(stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Return what is wrong with the first quantized weight that transformers would take as it stands, since it finds no
    scale, or cannot dequantize, since its scales do not divide it.
    """
    for name, (dtype, shape) in stored.items():
        quantized = dtype.startswith("F8") or (name.endswith(".weight") and dtype not in FLOATS)
        if not quantized or name.endswith((*SCALES, *SCALED_BY)):
            continue
        beside = [f"{name.removesuffix('weight')}{end}" for end in SCALED_BY] if name.endswith(".weight") else []
        scale = next((other for other in beside if other in stored), None)
        if scale is None:
            return f"{name} is stored as {dtype} without its scale ({SCALED_BY[0]} beside it), and is wrong without it"
        grid = stored[scale][1]
        if math.prod(grid) > 1 and (len(grid) < 2 or any(size % parts for size, parts in zip(shape[-2:], grid[-2:]))):
            return f"{name} of the shape {shape} is not divided by its scales {grid}, as transformers asks"
    return None
