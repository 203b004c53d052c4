"""What two models take on disk and at their peak in memory: both saved, loaded again in processes of their own, run.

Complements `lib.measure.speed.resources`, which counts. Knows nothing of how the models differ.
"""

import tempfile
from pathlib import Path

from torch import nn

from lib.measure import cost, dimensions, measurement, memory
from lib.measure import effort as efforts
from lib.measure.effort import Effort
from lib.measure.measurement import Measurement
from lib.models import loading

NEW_TOKENS = 4  # enough to hold prompt, cache and a step at once; more only takes longer


def footprint(baseline: nn.Module, optimized: nn.Module, effort: Effort | str) -> list[Measurement]:
    """Return bytes on disk, true peaks after load and at work, time to load and of the first call, of both models.

    The work is one prompt of `effort.prompt_tokens` tokens and a few generated ones. Needs room on the temporary disk
    for both checkpoints.
    """
    if not dimensions.wanted("performance", "resources"):
        return []
    effort = efforts.read(effort) if isinstance(effort, str) else effort
    weight = next(baseline.parameters())
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / arm for arm in ("baseline", "optimized")]
        for model, place in zip((baseline, optimized), places):
            loading.save(model, place)
        sizes = [cost.checkpoint_bytes(place) for place in places]
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
        peaks = memory.measurements(*memory.peaks(*arms))
    return [measurement.counted("checkpoint_bytes", "load", *sizes, "sizes of the saved files", "measured"), *peaks]
