"""Size on disk and peak memory of two models: both are saved, then loaded and run in fresh processes.

Complements the counted resources of `lib.measure.compare.costs.resources`. Knows nothing about how the models differ.
"""

import errno
import tempfile
from dataclasses import replace

from torch import nn

from lib.measure.compare import saved
from lib.measure.metrics import measurement, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.measure.timing import workloads
from lib.measure.trackers import memory

SIZES = "sizes of the saved files"
FEWEST_TURNS, MOST_TURNS = memory.TURNS, 5


def footprint(baseline: nn.Module, optimized: nn.Module, effort: Effort | str) -> list[Measurement]:
    """Return, for both models, bytes on disk, true memory peaks after loading and at work, and the times to load and of
    the first call.

    The work is the timed generation: one prompt of `effort.prompt_tokens` tokens and `effort.new_tokens` new tokens.
    The number of processes per arm grows with `effort.blocks`. Needs room on the temporary disk for both checkpoints:
    while the processes run, the models' weights exist only there. Without that room, the peaks of models on a GPU are
    read from this process's allocator, and all is unavailable for models on a CPU.
    """
    if not settings.wants("performance", "resources"):
        return []
    effort = settings.read(effort) if isinstance(effort, str) else effort
    if reason := saved.lack_of_room(baseline, optimized):
        return _in_place(baseline, optimized, effort, reason)
    try:
        with saved.saved(baseline, optimized) as places:
            arms = [replace(arm, prompt_tokens=effort.prompt_tokens, new_tokens=effort.new_tokens) for arm in places]
            sizes = [cost_model.checkpoint_bytes(str(arm.folder)) for arm in arms]
            peaks = memory.measurements(*memory.peaks(*arms, turns=turns(effort, arms[0].device)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = f"no room for both checkpoints in {tempfile.gettempdir()}; set TMPDIR to a folder on a larger disk"
        nothing = memory.Peaks([memory.failed(reason)])
        return [
            measurement.unavailable("checkpoint_bytes", "load", reason, SIZES),
            *memory.measurements(nothing, nothing),
        ]
    return [measurement.counted("checkpoint_bytes", "load", sizes[0], sizes[1], SIZES, "measured"), *peaks]


def turns(effort: Effort, device: str = "cpu") -> int | None:
    """Return the number of processes per arm that measure peaks: 1 at effort preview, 3 at quick, 4 at standard, 5 at
    thorough. None for other devices than the CPU, which have their own default.
    """
    if effort.preview and device == "cpu":
        return 1
    return max(FEWEST_TURNS, min(MOST_TURNS, effort.blocks // 3)) if device == "cpu" else None


def _in_place(baseline: nn.Module, optimized: nn.Module, effort: Effort, reason: str) -> list[Measurement]:
    """Return the allocator's peaks, which need no second copy of a model; the rest is unavailable, with `reason`."""
    peaks = []
    for model in (baseline, optimized):
        prompt_BT = workloads.random_prompt(model, 1, effort.prompt_tokens)
        peaks.append(memory.allocated(workloads.generate(model, prompt_BT, effort.new_tokens), model, reason))
    return [
        measurement.unavailable("checkpoint_bytes", "load", reason, SIZES),
        *memory.measurements(*peaks),
    ]
