"""The settings of a run: one of four named efforts, and the dimensions to measure.

`preview` shows every part of a run on little data. `quick` detects large effects. `standard` detects a 5 % difference
at a paired spread of 3 %. `thorough` is for figures worth publishing. All four dimensions are measured unless the
environment variable `WORKBENCH_DIMENSIONS` names some (the runner's `--dimension`). Functions that measure a whole
dimension then skip the others, and `lib.report.records.record.build` records only the requested dimensions, so that
templates need no code for it.
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

    `prompt_tokens`, `new_tokens`, `batch`: sizes of the timed workloads. `retrieval_prompts`: generated answers at
    `retrieval_distance` tokens; at least 149 answers without a flip are needed to show a loss below 2 points.
    `calibration_sequences` × `calibration_tokens`: text for calibration. `resamples`: bootstrap resamples.
    `timing_share`: the share of the usual timing seconds per block.
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
        """Whether this is effort preview, which only shows what a run does."""
        return self.timing_share < EFFORTS["quick"].timing_share

    @property
    def brief(self) -> bool:
        """Whether this is effort preview or quick, at which sweeps take their fewest points."""
        return self.blocks <= paired_stats.MINIMUM_BLOCKS


EFFORTS: dict[str, Effort] = {
    "preview": Effort(6, 16, 6, 256, 128, 4, 4, 8, 256, 8, 256, 1000, 0.1),
    "quick": Effort(6, 48, 8, 256, 256, 16, 8, 16, 256, 16, 256, 2000, 0.5),
    "standard": Effort(12, 400, 32, 256, 512, 16, 8, 160, 256, 64, 256, 4000),
    "thorough": Effort(30, 1200, 128, 256, 1024, 64, 16, 256, 256, 128, 256, 10000),
}
BRIEF = tuple(name for name, effort in EFFORTS.items() if effort.brief)


def read(name: str, scale: str = "proxy") -> Effort:
    """Return the effort called `name` at `scale`. Raises UserError for an unknown name, with the nearest valid one.

    On a slice one decoding step takes as long as many steps of a proxy model, and weights are random: fewer steps,
    smaller batches, a shorter prompt and less calibration text are equally informative.
    """
    if name not in EFFORTS:
        valid = ", ".join(EFFORTS)
        raise UserError(f'unknown effort "{name}": expected one of {valid}.{suggest(name, EFFORTS)}')
    effort = EFFORTS[name]
    if scale == "slice":
        return replace(effort, prompt_tokens=256, new_tokens=2, batch=4, calibration_sequences=8)
    return effort


def requested_dimensions() -> tuple[str, ...] | None:
    """Return the requested dimensions in catalogue order; None if all are. Raises UserError for an unknown name."""
    names = [name.strip() for name in os.environ.get(DIMENSIONS_VARIABLE, "").split(",") if name.strip()]
    for name in names:
        if name not in DIMENSIONS:
            raise UserError(f'{DIMENSIONS_VARIABLE}: unknown dimension "{name}".{suggest(name, DIMENSIONS)}')
    requested = tuple(name for name in DIMENSIONS if name in names)
    return None if not requested or requested == DIMENSIONS else requested


def wants(*dimensions: str) -> bool:
    """Return whether any of `dimensions` is to be measured."""
    requested = requested_dimensions()
    return requested is None or bool(set(dimensions) & set(requested))


def why_left_out() -> str:
    """Return the `reason` of a measurement whose dimension was not requested."""
    return f"left out: only {' and '.join(requested_dimensions() or DIMENSIONS)} was requested"
