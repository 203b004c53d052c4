"""Saves two models as arms for child processes. While these run, the models' weights are on disk only. Features that a
checkpoint cannot hold (absorbed decoding, replaced attention, streamed weights) are restored after loading, as far as
the model records them. Knows nothing about how the models differ or what the processes do.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.measure.roofline import cost_model
from lib.measure.timing import children
from lib.measure.timing.children import Arm
from lib.models.checkpoints import io, placement
from lib.models.checkpoints.parking import parked
from lib.models.decoding import mla_absorption
from lib.models.structure import beyond_files

ABSORBING = f"{mla_absorption.__name__}:{mla_absorption.absorb.__name__}"
RESTORING = f"{beyond_files.__name__}:{beyond_files.restore.__name__}"
REOPENING = f"{beyond_files.__name__}:{beyond_files.reopen.__name__}"
ACTIVATIONS = 0.1  # device memory that a running model needs besides its weights, as a share of the weights


@contextmanager
def saved(baseline: nn.Module, optimized: nn.Module) -> Iterator[tuple[Arm, Arm]]:
    """Save both models and yield them as arms, with the baseline's dtype and device. Inside the context, models on a
    CPU have no weights and cannot run. A model that streams its weights from a file is left as it is: its arm reopens
    that file.

    Beyond the checkpoint, only absorbed decoding and what `beyond_files` records are restored. Needs room on the
    temporary disk for both models.
    """
    weight = next(baseline.parameters())
    dtype, device = str(weight.dtype).removeprefix("torch."), weight.device.type
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(model, Path(folder) / arm) for model, arm in ((baseline, "baseline"), (optimized, "optimized"))]
        kept = [(model, place) for model, place in pairs if beyond_files.opening(model) is None]
        for model, place in kept:
            io.save(model, place)
        first, second = (Arm(dtype=dtype, device=device, **_reload_fields(model, place)) for model, place in pairs)
        with parked(*kept):
            yield first, second


def transform(model: nn.Module) -> str | None:
    """Return the arm's `transform` that makes a freshly loaded model decode as `model` does; None if none is needed."""
    return ABSORBING if mla_absorption.is_absorbed(model) else None


def _reload_fields(model: nn.Module, place: Path) -> dict[str, Any]:
    """Return the `Arm` fields that restore the `model` saved at `place`."""
    recorded = beyond_files.steps(model)
    if opened := beyond_files.opening(model):
        arguments = {"function": opened.function, "arguments": opened.arguments, "steps": recorded}
        return {"folder": opened.folder, "opener": REOPENING, "arguments": arguments}
    if not recorded:
        return {"folder": str(place), "transform": transform(model)}
    steps = [*([(ABSORBING, {})] if mla_absorption.is_absorbed(model) else []), *recorded]
    return {"folder": str(place), "transform": RESTORING, "arguments": {"steps": steps}}


def lack_of_room(*models: nn.Module) -> str | None:
    """Return why models on a GPU cannot or must not be saved and loaded a second time; None where they can."""
    weight = next(models[0].parameters())
    if not weight.is_cuda:
        return None
    if reason := children.why_none():
        return reason
    torch.cuda.empty_cache()  # memory that the allocator holds back is not free for another process
    sizes = [cost_model.weights_bytes(model) for model in models]
    rooms = {
        "the temporary disk": (sum(sizes), shutil.disk_usage(tempfile.gettempdir()).free),
        "the device": (max(sizes) * (1 + ACTIVATIONS), placement.free_bytes(str(weight.device))),
    }
    for place, (needed, free) in rooms.items():
        if needed > free:
            return f"no room on {place} for another copy: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free"
    return None
