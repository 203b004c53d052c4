"""Tells which checkpoints with quantized weights can be dequantized while loading, and which cannot.

A checkpoint that transformers cannot dequantize here is refused while planning, so that weights are never used without
their scales. Reads the configuration and the stored dtypes, but no weights; needs no torch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib import memory_limits

DEQUANTIZED = ("fp8",)  # methods that transformers dequantizes while loading
FLOATS = ("F64", "F32", "F16", "BF16")
SCALES = ("_scale", "_scale_inv", "scales", "qzeros", "absmax", "_blocks")  # endings of tensor names
# Names under which transformers looks for the scale of `X.weight`: `X.weight_scale_inv` and variants of it.
SCALED_BY = ("weight_scale_inv", "scale", "qscale_weight")
WHOLE_SHARE = 0.8  # of the free memory, as in `lib.models.checkpoints.placement`
ADVICE = "give the checkpoint before it was quantized, or a GGUF file"


def method(folder: Path) -> str | None:
    """Return the quantization method that the configuration of a checkpoint folder names, or None."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    described: Any = config.get("quantization_config") if isinstance(config, dict) else None
    if not described:
        return None
    return str(described.get("quant_method", "unknown") if isinstance(described, dict) else described)


def fault(folder: Path, stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Return None, or one line on why the weights cannot be used. `stored`: tensor → (dtype, shape) in the files."""
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
        return f"{folder}: its weights are quantized ({quantized}) and cannot be dequantized here: {ADVICE}"
    if reason := _scale_fault(stored):
        return f"{folder}: {reason}: {ADVICE}"
    needed = 2 * sum(math.prod(shape) for _, shape in stored.values())
    free = memory_limits.free_memory_bytes()
    if needed > WHOLE_SHARE * free:
        return (
            f"{folder}: its quantized weights ({quantized}) take {needed / 2**30:.1f} GiB when dequantized, but only "
            f"{free / 2**30:.1f} GiB are free, and they cannot be streamed from their files; {ADVICE}"
        )
    return None


def _scale_fault(stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Return None, or a message on the first quantized weight that transformers would load without its scale or cannot
    dequantize, because the shape of its scales does not divide its own.
    """
    for name, (dtype, shape) in stored.items():
        quantized = dtype.startswith("F8") or (name.endswith(".weight") and dtype not in FLOATS)
        if not quantized or name.endswith((*SCALES, *SCALED_BY)):
            continue
        candidates = [f"{name.removesuffix('weight')}{end}" for end in SCALED_BY] if name.endswith(".weight") else []
        scale = next((candidate for candidate in candidates if candidate in stored), None)
        if scale is None:
            return f"{name} is stored as {dtype} without its scale ({SCALED_BY[0]}), and is wrong without it"
        grid = stored[scale][1]
        if math.prod(grid) > 1 and (len(grid) < 2 or any(size % parts for size, parts in zip(shape[-2:], grid[-2:]))):
            return f"{name} has the shape {shape}, which is not a multiple of {grid}, the shape of its scales"
    return None
