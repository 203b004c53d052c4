"""What an optimization costs and saves besides time: counted resources, peaks of memory, and when applying pays off.

Combines `speed.resources`, `footprint` and `speed.break_even`, as every notebook that changes a model needs them. Knows
no optimization.
"""

from torch import nn

from lib.measure.compare import speed
from lib.measure.compare.footprint import footprint
from lib.measure.compare.speed import Compared
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort


def costs(
    baseline: nn.Module,
    optimized: nn.Module,
    effort: Effort,
    compared: Compared,
    apply_seconds: float | None = None,
    rate: str = "prefill_tokens_per_second",
) -> list[Measurement]:
    """Return counted resources, peaks of memory from child processes, and, given `apply_seconds`, the break-even.

    The break-even follows from the first measurement of `rate` in `compared`, whose own measurements are not repeated.
    """
    measurements = [
        *speed.resources(baseline, optimized, tokens=effort.prompt_tokens),
        *footprint(baseline, optimized, effort),
    ]
    if apply_seconds is None:
        return measurements
    gain = next(measurement for measurement in compared.measurements if measurement.metric == rate)
    return [*measurements, *speed.break_even(apply_seconds, gain)]
