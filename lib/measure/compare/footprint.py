"""What two models take on disk and at their peak in memory: both are saved, then loaded and run in fresh processes.

Complements `lib.measure.compare.speed.resources`, which counts. Knows nothing of how the models differ.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from lib.measure.metrics import measurement, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.measure.timing import workloads
from lib.measure.trackers import memory
from lib.models.checkpoints import io, placement
from lib.models.checkpoints.parking import parked

NEW_TOKENS = 4  # enough for prompt, cache and a step to be in memory at once
ACTIVATIONS = 0.1  # room on a device for what running a model takes besides its weights, as a share of these


def footprint(baseline: nn.Module, optimized: nn.Module, effort: Effort | str) -> list[Measurement]:
    """Return bytes on disk, true peaks after load and at work, time to load and of the first call, of both models.

    The work is one prompt of `effort.prompt_tokens` tokens and a few generated ones. Needs room on the temporary disk
    for both checkpoints; while the processes run, the models' weights are nowhere else. For models on a GPU without
    that room, the peaks are read from this process's allocator.
    """
    if not settings.wants("performance", "resources"):
        return []
    effort = settings.read(effort) if isinstance(effort, str) else effort
    if reason := _lack_of_room(baseline, optimized):
        return _in_place(baseline, optimized, effort, reason)
    weight = next(baseline.parameters())
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / arm for arm in ("baseline", "optimized")]
        for model, place in zip((baseline, optimized), places):
            io.save(model, place)
        sizes = [cost_model.checkpoint_bytes(place) for place in places]
        arms = [
            memory.Arm(
                folder=str(place),
                prompt_tokens=effort.prompt_tokens,
                new_tokens=NEW_TOKENS,
                dtype=str(weight.dtype).removeprefix("torch."),
                device=weight.device.type,
            )
            for place in places
        ]
        with parked(*zip((baseline, optimized), places)):
            peaks = memory.measurements(*memory.peaks(*arms))
    source = "sizes of the saved files"
    return [measurement.counted("checkpoint_bytes", "load", sizes[0], sizes[1], source, "measured"), *peaks]


def _lack_of_room(*models: nn.Module) -> str | None:
    """Return why models on a GPU cannot be saved and loaded once more, or None where they can."""
    weight = next(models[0].parameters())
    if not weight.is_cuda:
        return None
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


def _in_place(baseline: nn.Module, optimized: nn.Module, effort: Effort, reason: str) -> list[Measurement]:
    """Return what can be read without another copy, the allocator's peaks; the rest is unavailable for `reason`."""
    peaks = []
    for model in (baseline, optimized):
        prompt_BT = workloads.random_prompt(model, 1, effort.prompt_tokens)
        peaks.append(memory.allocated(workloads.generate(model, prompt_BT, NEW_TOKENS), model, reason))
    return [
        measurement.unavailable("checkpoint_bytes", "load", reason, "sizes of the saved files"),
        *memory.measurements(*peaks),
    ]
