"""What a run is asked to measure, and how much: one of four named efforts, and the dimensions that are measured.

`preview` shows every part of a run on little data; `quick` finds large effects; `standard` finds a 5 % difference at a
paired spread of 3 %; `thorough` is for figures worth publishing. All four dimensions are measured unless the
environment variable `WORKBENCH_DIMENSIONS` names some (the runner's `--dimension`): functions that measure a whole
dimension then leave it out, and `lib.report.records.record.build` records only the requested ones, so that no template
needs to know of it.
"""

import os
from dataclasses import dataclass, replace

from lib.errors import UserError, suggest
from lib.measure.metrics import paired_stats
from lib.measure.metrics.catalogue import DIMENSIONS

DIMENSIONS_VARIABLE = "WORKBENCH_DIMENSIONS"


@dataclass(frozen=True)
class Effort:
    """Sizes of one run. `blocks`: timed AB/BA blocks. `items`: classified items. `windows` × `window_tokens`: held-out
    text.

    `prompt_tokens`, `new_tokens`, `batch`: the timed workloads. `retrieval_prompts`: generated answers at
    `retrieval_distance` tokens; 149 without a flip are the fewest that can show a loss of less than 2 points.
    `calibration_sequences` × `calibration_tokens`: what an optimization may look at. `resamples`: bootstrap resamples.
    `timing_share`: of the seconds that timing takes for each block.
    """

    blocks: int
    items: int
    windows: int
    window_tokens: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    retrieval_prompts: int
    retrieval_distance: int
    calibration_sequences: int
    calibration_tokens: int
    resamples: int
    timing_share: float = 1.0

    @property
    def preview(self) -> bool:
        """Whether this is effort preview: it shows what a run does, and the few numbers that it needs for that."""
        return self.timing_share < EFFORTS["quick"].timing_share

    @property
    def brief(self) -> bool:
        """Whether this is effort preview or quick: sweeps take their fewest points."""
        return self.blocks <= paired_stats.MINIMUM_BLOCKS


EFFORTS: dict[str, Effort] = {
    "preview": Effort(6, 16, 6, 256, 128, 4, 4, 8, 256, 8, 256, 1000, 0.1),
    "quick": Effort(6, 48, 8, 256, 256, 16, 8, 16, 256, 16, 256, 2000, 0.5),
    "standard": Effort(12, 400, 32, 256, 512, 16, 8, 160, 256, 64, 256, 4000),
    "thorough": Effort(30, 1200, 128, 256, 1024, 64, 16, 256, 256, 128, 256, 10000),
}
BRIEF = tuple(name for name, effort in EFFORTS.items() if effort.brief)


def read(name: str, scale: str = "proxy") -> Effort:
    """Return the effort called `name` at a scale. Raises UserError, with the nearest valid name, for an unknown one.

    On a slice one decoding step takes as long as many of a proxy model, and weights are random: fewer steps, smaller
    batches, a shorter prompt and less calibration text are as informative.
    """
    if name not in EFFORTS:
        valid = ", ".join(EFFORTS)
        raise UserError(f'unknown effort "{name}": expected one of {valid}.{suggest(name, EFFORTS)}')
    effort = EFFORTS[name]
    if scale == "slice":
        return replace(effort, prompt_tokens=256, new_tokens=2, batch=4, calibration_sequences=8)
    return effort


def requested_dimensions() -> tuple[str, ...] | None:
    """Return the requested dimensions in the catalogue's order; None where all are. Raises UserError for an unknown
    one.
    """
    names = [name.strip() for name in os.environ.get(DIMENSIONS_VARIABLE, "").split(",") if name.strip()]
    for name in names:
        if name not in DIMENSIONS:
            raise UserError(f'{DIMENSIONS_VARIABLE}: unknown dimension "{name}".{suggest(name, DIMENSIONS)}')
    requested = tuple(name for name in DIMENSIONS if name in names)
    return None if not requested or requested == DIMENSIONS else requested


def wants(*dimensions: str) -> bool:
    """Return whether any of these dimensions is to be measured."""
    requested = requested_dimensions()
    return requested is None or bool(set(dimensions) & set(requested))


def why_left_out() -> str:
    """Return why a dimension is not measured, as the `reason` of a measurement."""
    return f"left out: only {' and '.join(requested_dimensions() or DIMENSIONS)} was asked for"
