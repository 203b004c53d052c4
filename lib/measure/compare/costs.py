"""What an optimization costs and saves besides time: counted resources, peaks of memory, and when applying has paid.

Puts `speed.resources`, `footprint` and `speed.break_even` together, as every notebook that changes a model needs them.
Knows no optimization.
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

    The break-even is told by the first measurement of `rate` among those of `compared`. What `compared` measured is not
    repeated.
    """
    found = [
        *speed.resources(baseline, optimized, tokens=effort.prompt_tokens),
        *footprint(baseline, optimized, effort),
    ]
    if apply_seconds is None:
        return found
    gain = next(one for one in compared.measurements if one.metric == rate)
    return [*found, *speed.break_even(apply_seconds, gain)]
