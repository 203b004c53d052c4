"""Builds measurements from paired samples of both arms, judged by interval, noise floor and margin.

Knows how to judge samples, not how they were taken. `lib.measure.metrics.measurement` describes the fields.
"""

import math
import os
from collections.abc import Sequence

import numpy as np

from lib.measure.metrics import measurement, paired_stats, process_variance
from lib.measure.metrics.catalogue import metric as metric_named
from lib.measure.metrics.decision import BUSY, BUSY_FLOOR, Ruling, decide, detectable
from lib.measure.metrics.measurement import Measurement, Provenance, Verdict
from lib.measure.metrics.paired_stats import Effect
from lib.measure.metrics.pairs import Pairs
from lib.measure.metrics.process_variance import Pooled

MOST_SAMPLES = 60  # per arm of a measurement in a record


def from_pairs(
    metric: str,
    workload: str,
    pairs: Pairs,
    quantity: float,
    floor: Pairs | float | None,
    margin: float | None = None,
    samples: bool = True,
    process_sigma: float | None = None,
) -> Measurement:
    """Return a rate or a latency measured by timed pairs.

    `quantity` is what one call processes: tokens (or requests) for a rate, the tokens or calls to divide by for a
    latency. `floor` is the A/A control, as Pairs or as a number. `margin` replaces the metric's practical margin.
    `process_sigma` is as in `from_samples`. Raises ValueError for a metric that is neither a rate nor a latency.
    """
    unit = metric_named(metric).unit
    if unit.endswith("/s"):
        convert = lambda seconds: quantity / seconds  # noqa: E731
    elif unit in ("ms", "s"):
        convert = lambda seconds: seconds * (1000 if unit == "ms" else 1) / quantity  # noqa: E731
    else:
        raise ValueError(f"{metric} is in {unit}: only rates and latencies can be computed from times")
    return from_samples(
        metric,
        workload,
        [convert(t) for t in pairs.baseline_seconds],
        [convert(t) for t in pairs.optimized_seconds],
        source=pairs.describe(),
        floor=floor,
        margin=margin,
        samples=samples,
        process=pairs.process,
        process_sigma=process_sigma,
        disturbed=[reason for reason in pairs.disturbed if reason],
    )


def from_samples(
    metric: str,
    workload: str,
    baseline: Sequence[float],
    optimized: Sequence[float],
    *,
    source: str,
    floor: Pairs | float | None,
    provenance: Provenance = "measured",
    margin: float | None = None,
    samples: bool = True,
    process: Sequence[int] | None = None,
    process_sigma: float | None = None,
    disturbed: Sequence[str] = (),
    resolution: float = 0.0,
) -> Measurement:
    """Return a measurement from paired samples of both arms, given in the metric's unit.

    `floor` is the A/A control, as Pairs or as the half-width of its interval within the process. `process[i]` is the
    process of pair i. With several processes the interval is over processes. With one, the variation between processes
    that it cannot show is added in quadrature to interval and floor: `process_sigma`, by default that of other runs of
    this workload (`lib.measure.metrics.process_variance`), but 0 for estimates and for resources, about which times say
    nothing. `disturbed` lists the disturbances of pairs that could not be repeated; with any, nothing is decided.
    `resolution` is the step of the reading (natural logarithm): the interval reaches at least that far to either side.

    The verdict is informative without a `floor` (no A/A control ran), with too few pairs for an interval (of the arms
    or of the control), and for a metric without a margin. Above a floor of BUSY_FLOOR it is inconclusive, whatever the
    interval: the model then differs from itself by more than most optimizations gain.
    """
    listed = metric_named(metric)
    margin = listed.margin if margin is None else margin
    d_N = paired_stats.differences(baseline, optimized)
    replicated = process is not None and len(set(process)) >= paired_stats.MINIMUM_PROCESSES
    timed = listed.dimension in ("performance", "efficiency")
    between = None if replicated else _between(workload, provenance if timed else None, process_sigma)
    sigma = between.sigma if between else 0.0
    effect = paired_stats.effect(d_N, process, sigma).at_resolution(resolution)
    if isinstance(floor, Pairs):
        floor = floor.floor(sigma)
    elif floor is not None:
        floor = math.hypot(floor, paired_stats.NORMAL * sigma)
    verdict, reason, mde = _ruling(effect, floor, margin, listed.higher_is_better, replicated, disturbed)
    return measurement.judged(
        metric,
        workload,
        baseline=float(np.median(baseline)),
        optimized=float(np.median(optimized)),
        ratio=math.exp(effect.median),
        ci=(math.exp(effect.low), math.exp(effect.high)) if math.isfinite(effect.low) else None,
        n=effect.n,
        noise_floor=floor if floor is not None and math.isfinite(floor) else None,
        mde=mde if mde is not None and math.isfinite(mde) else None,
        margin=None if verdict == "informative" else margin,
        verdict=verdict,
        provenance=provenance,
        source=f"{source}; {between.source}" if between and between.sigma else source,
        reason=reason,
        samples={"baseline": _grouped(baseline, process), "optimized": _grouped(optimized, process)}
        if samples
        else None,
        process_sigma=sigma if between else effect.scatter * math.sqrt(effect.processes),
        processes=effect.processes,
        disturbed=len(disturbed) or None,
    )


def _ruling(
    effect: Effect,
    floor: float | None,
    margin: float | None,
    higher_is_better: bool,
    replicated: bool,
    disturbed: Sequence[str],
) -> tuple[Verdict, str | None, float | None]:
    """Return the verdict on an effect, its reason, and the minimum detectable effect (None if not judged); see
    `from_samples`.
    """
    fewest = paired_stats.MINIMUM_PROCESSES if replicated else paired_stats.MINIMUM_BLOCKS
    busy = f"{disturbed[-1]}, in {len(disturbed)} of {effect.n} pairs" if disturbed else None
    if margin is None:
        return "informative", None, None
    if floor is None or math.isinf(floor) or effect.n < fewest:
        few = f"{effect.n} pairs" if effect.n < fewest else "the control's pairs"
        why = "no A/A control ran" if floor is None else f"{few} are too few for an interval"
        # The reason names a busy machine, so that the run's other timed verdicts are withheld as well.
        return "informative", f"{BUSY}: {busy}; {why}" if busy else why, None
    decision = decide(
        effect.median,
        effect.low,
        effect.high,
        n=effect.n,
        floor=floor,
        margin=margin,
        higher_is_better=higher_is_better,
        busy=busy,
        processes=effect.processes if replicated else None,
    )
    reason = f"{decision.reason}{_load()}" if floor > BUSY_FLOOR else decision.reason
    return decision.verdict, reason, detectable(effect.half_width, effect.scatter, floor=floor, margin=margin)


def _grouped(values: Sequence[float], process: Sequence[int] | None) -> list[float]:
    """Return the samples; if there are more than MOST_SAMPLES, the means of neighbours, equally many per process."""
    if len(values) <= MOST_SAMPLES:
        return [float(value) for value in values]
    processes = len(set(process or [0]))
    each = len(values) // processes
    if each * processes != len(values):
        return [float(value) for value in values]
    most = min(each, max(2, MOST_SAMPLES // processes))
    groups = next((n for n in range(most, most // 2, -1) if each % n == 0), most)  # of equal size if possible
    by_process = np.asarray(values, dtype=float).reshape(processes, each)
    return [float(part.mean()) for row in by_process for part in np.array_split(row, groups)]


def _load() -> str:
    """Return the machine's load as a clause; empty on systems that do not report it."""
    if not hasattr(os, "getloadavg"):
        return ""
    return f"; load {os.getloadavg()[0]:.1f} on {os.cpu_count() or 1} cores"


def _between(workload: str, provenance: Provenance | None, process_sigma: float | None) -> Pooled:
    """Return τ, the deviation between processes, for a number of this `provenance` (None: not computed from times)."""
    if process_sigma is not None:
        return Pooled(process_sigma, 0)
    timed = provenance in ("measured", "derived")  # estimates are not computed from times
    return process_variance.between_processes(workload) if timed else Pooled(0.0, 0)


def judge_again(stored: Measurement) -> Ruling | None:
    """Return the ruling on a stored measurement, recomputed from its fields by the rule for paired samples; None where
    its verdict does not come from that rule (counted, informative, quality).
    """
    if stored.verdict not in ("better", "worse", "equivalent", "inconclusive") or stored.dimension == "accuracy":
        return None
    if stored.ci is None or stored.ratio is None or stored.noise_floor is None or stored.margin is None:
        return None
    return decide(
        math.log(stored.ratio),
        *(math.log(end) for end in stored.ci),
        n=stored.n or 0,
        floor=stored.noise_floor,
        margin=stored.margin,
        higher_is_better=stored.higher_is_better,
        busy=stored.reason if stored.disturbed else None,
        processes=stored.processes if (stored.processes or 0) >= paired_stats.MINIMUM_PROCESSES else None,
    )
