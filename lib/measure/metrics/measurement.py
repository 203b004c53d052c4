"""One metric of both arms, as a record holds it. Knows how to judge numbers, not how they came about.

`ratio` is always optimized / baseline of the metric itself: above 1 is better for tokens per second, below 1 for
milliseconds. `ci` is the 95 % interval of `ratio`; where the baseline is zero there is no ratio, and `ci` is of
`optimized`. `ratio` of paired times is the median of the blocks' ratios, or the mean over processes where there are
several; it need not equal the ratio of the two medians shown. `noise_floor` and `mde` are shares (natural logarithms,
which are the same thing while they are small). A number that is not available is null, with a reason.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from lib.measure.metrics import paired_stats, process_variance
from lib.measure.metrics.catalogue import metric as metric_named
from lib.measure.metrics.decision import BUSY, BUSY_FLOOR, Ruling, decide, detectable
from lib.measure.metrics.pairs import Pairs
from lib.measure.metrics.process_variance import Pooled

Verdict = Literal[
    "better",
    "worse",
    "equivalent",
    "inconclusive",
    "maintained",
    "not_maintained",
    "not_exercised",
    "unavailable",
    "invalid",
    "informative",
]
Provenance = Literal["measured", "derived", "estimated", "unavailable"]


class Measurement(BaseModel):
    """One metric of both arms. The fields are the record's; the module describes `ratio`, `ci`, `noise_floor` and
    `mde`.

    `margin` is the practical margin behind the verdict, as in the catalogue (a share of the baseline, or in the
    metric's unit), and `bound` the one-sided 95 % bound of the change that was compared with it, in the same terms;
    both None where no margin was applied. `reason` says why a number is missing, why the result is inconclusive, or why
    the realised gain differs from the predicted one. `process_sigma` is the standard deviation between processes
    (natural logarithm) that interval and floor include, `processes` the number of processes that were timed; both None
    where neither applies. `documents` is the number of documents that the `n` items or windows come from, where several
    share one: these are what is independent behind the interval. `disturbed` counts the pairs that were disturbed and
    could not be repeated. `predicted` is the speed-up that the physical bounds allow, `realised` the share of it that
    was measured.
    """

    model_config = ConfigDict(extra="forbid")

    metric: str
    workload: str
    dimension: str
    unit: str
    higher_is_better: bool
    baseline: float | None
    optimized: float | None
    ratio: float | None
    ci: tuple[float, float] | None
    n: int | None
    noise_floor: float | None
    mde: float | None
    margin: float | None = None
    bound: float | None = None
    verdict: Verdict
    provenance: Provenance
    source: str
    reason: str | None = None
    samples: dict[str, list[float]] | None = None
    process_sigma: float | None = None
    processes: int | None = None
    documents: int | None = None
    disturbed: int | None = None
    predicted: float | None = None
    realised: float | None = None

    @field_validator(
        "baseline",
        "optimized",
        "ratio",
        "noise_floor",
        "mde",
        "margin",
        "bound",
        "process_sigma",
        "predicted",
        "realised",
        mode="before",
    )
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is None:
            return None
        if not math.isfinite(value):
            raise ValueError("not a finite number: what is unknown is null, with a reason")
        return float(value)

    @field_validator("ci", mode="before")
    @classmethod
    def _finite_interval(cls, value: Sequence[float] | None) -> tuple[float, float] | None:
        return None if value is None or not np.isfinite(value).all() else (float(value[0]), float(value[1]))

    @model_validator(mode="after")
    def _labelled(self) -> "Measurement":
        listed = metric_named(self.metric)
        if (self.unit, self.dimension, self.higher_is_better) != (
            listed.unit,
            listed.dimension,
            listed.higher_is_better,
        ):
            raise ValueError(f"{self.metric}: unit, dimension and direction must be those of the catalogue")
        missing = self.baseline is None and self.optimized is None
        if missing != (self.provenance == "unavailable"):
            raise ValueError(
                f"{self.metric}: a missing number is unavailable, a number is measured, derived or estimated"
            )
        if missing and (not self.reason or self.verdict not in ("unavailable", "invalid")):
            raise ValueError(f"{self.metric}: a missing number needs its reason and the verdict unavailable or invalid")
        if not self.source:
            raise ValueError(f"{self.metric}: every number needs its source")
        return self


def _make(metric: str, workload: str, **fields: Any) -> Measurement:
    listed = metric_named(metric)
    empty = {"ratio": None, "ci": None, "n": None, "noise_floor": None, "mde": None}
    return Measurement(
        metric=metric,
        workload=workload,
        dimension=listed.dimension,
        unit=listed.unit,
        higher_is_better=listed.higher_is_better,
        **{**empty, **fields},
    )


def _ratio(baseline: float | None, optimized: float | None) -> float | None:
    return optimized / baseline if baseline and optimized is not None else None


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
    """Return a rate or a latency from timed pairs.

    `quantity` is what one call does, in the metric's terms: tokens (or requests) for a rate, tokens or calls to divide
    by for a latency. `floor` is the A/A control, as its Pairs or as a number. `margin` replaces the metric's practical
    margin; `process_sigma` as in `from_samples`.
    """
    unit = metric_named(metric).unit
    if unit.endswith("/s"):
        convert = lambda seconds: quantity / seconds  # noqa: E731
    elif unit in ("ms", "s"):
        convert = lambda seconds: seconds * (1000 if unit == "ms" else 1) / quantity  # noqa: E731
    else:
        raise ValueError(f"{metric} is in {unit}: times make only rates and latencies")
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
) -> Measurement:
    """Return a measurement from samples of both arms that were taken in pairs, in the metric's unit.

    `floor` is the A/A control, as its Pairs or as the half-width of its interval within the process. `process[i]` is
    the process of pair i: with several, the interval is over processes. With one, what the process hides is added in
    quadrature to interval and floor: `process_sigma`, by default that of other runs for this workload
    (`lib.measure.metrics.process_variance`), or 0 for an estimate and for resources, of which times tell nothing.
    `disturbed` holds what was seen in the pairs that could not be repeated: nothing is decided then.

    Without a `floor` (no A/A control ran), or with too few pairs or a control of too few for an interval, or for a
    metric without a margin, the verdict is informative. Above a floor of BUSY_FLOOR it is inconclusive, whatever the
    interval: the same model differs from itself by more than most optimizations gain.
    """
    listed = metric_named(metric)
    margin = listed.margin if margin is None else margin
    d_N = paired_stats.differences(baseline, optimized)
    several = process is not None and len(set(process)) >= paired_stats.MINIMUM_PROCESSES
    of_times = listed.dimension in ("performance", "efficiency")
    between = None if several else _between(workload, provenance if of_times else None, process_sigma)
    sigma = between.sigma if between else 0.0
    effect = paired_stats.effect(d_N, process, sigma)
    if isinstance(floor, Pairs):
        floor = floor.floor(sigma)
    elif floor is not None:
        floor = math.hypot(floor, paired_stats.NORMAL * sigma)
    reason, mde = None, None
    fewest = paired_stats.MINIMUM_PROCESSES if several else paired_stats.MINIMUM_BLOCKS
    busy = f"{disturbed[-1]}, in {len(disturbed)} of {effect.n} pairs" if disturbed else None
    if floor is None or math.isinf(floor) or effect.n < fewest or margin is None:
        verdict: Verdict = "informative"
        if margin is not None:
            few = f"{effect.n} pairs" if effect.n < fewest else "the control's pairs"
            reason = "no A/A control ran" if floor is None else f"{few} are too few for an interval"
            reason = f"{BUSY}: {busy}; {reason}" if busy else reason  # which withholds what else was timed
    else:
        decision = decide(
            effect.median,
            effect.low,
            effect.high,
            n=effect.n,
            floor=floor,
            margin=margin,
            higher_is_better=listed.higher_is_better,
            busy=busy,
            processes=effect.processes if several else None,
        )
        verdict, reason = decision.verdict, decision.reason
        if floor > BUSY_FLOOR:
            reason = f"{reason}{_load()}"
        mde = detectable(effect.half_width, effect.scatter, floor=floor, margin=margin)
    return _make(
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


MOST_SAMPLES = 60  # that a record keeps of a measurement


def _grouped(values: Sequence[float], process: Sequence[int] | None) -> list[float]:
    """Return the samples; of more than MOST_SAMPLES the means of neighbours, as many of every process."""
    if len(values) <= MOST_SAMPLES:
        return [float(value) for value in values]
    processes = len(set(process or [0]))
    each = len(values) // processes
    if each * processes != len(values):
        return [float(value) for value in values]
    most = min(each, max(2, MOST_SAMPLES // processes))
    groups = next((n for n in range(most, most // 2, -1) if each % n == 0), most)  # of one size, where that leaves many
    by_process = np.asarray(values, dtype=float).reshape(processes, each)
    return [float(part.mean()) for row in by_process for part in np.array_split(row, groups)]


def _load() -> str:
    """Return the machine's load as a clause, or nothing on a system that does not say."""
    if not hasattr(os, "getloadavg"):
        return ""
    return f"; load {os.getloadavg()[0]:.1f} on {os.cpu_count() or 1} cores"


def _between(workload: str, provenance: Provenance | None, process_sigma: float | None) -> Pooled:
    """Return τ of the times that a number of this `provenance` is made of (None: it is made of none)."""
    if process_sigma is not None:
        return Pooled(process_sigma, 0)
    timed = provenance in ("measured", "derived")  # an estimate is made of something else
    return process_variance.between_processes(workload) if timed else Pooled(0.0, 0)


def judge_again(stored: Measurement) -> Ruling | None:
    """Return the ruling on a stored measurement from its fields, by the rule of paired samples; None where its verdict
    does not come from that rule (counted, informative, quality).
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


def counted(
    metric: str,
    workload: str,
    baseline: float | None,
    optimized: float | None,
    source: str,
    provenance: Provenance = "derived",
    margin: float | None = None,
    reason: str | None = None,
) -> Measurement:
    """Return a number without spread (parameters, bytes, FLOPs, a single reading): better or worse beyond the margin.

    One arm may be None, with `reason`; the result is then informative.
    """
    listed = metric_named(metric)
    margin = listed.margin if margin is None else margin
    if baseline is None and optimized is None:
        return unavailable(metric, workload, reason or "not reported", source)
    if baseline is None or optimized is None or margin is None:
        verdict = "informative"
    else:
        scale = 1 if listed.margin_kind == "absolute" else abs(baseline)
        change = optimized - baseline
        verdict = (
            "equivalent"
            if abs(change) <= margin * scale
            else "better"
            if (change > 0) == listed.higher_is_better
            else "worse"
        )
    return _make(
        metric,
        workload,
        baseline=baseline,
        optimized=optimized,
        ratio=_ratio(baseline, optimized),
        margin=None if verdict == "informative" else margin,
        verdict=verdict,
        provenance=provenance,
        source=source,
        reason=reason,
    )


def informative(
    metric: str,
    workload: str,
    baseline: float | None,
    optimized: float | None,
    source: str,
    provenance: Provenance = "measured",
    **fields: Any,
) -> Measurement:
    """Return a number that is not judged; `fields` are further fields of Measurement (n, ci, reason, samples …)."""
    fields = {"ratio": _ratio(baseline, optimized), **fields}
    return _make(
        metric,
        workload,
        baseline=baseline,
        optimized=optimized,
        verdict="informative",
        provenance=provenance,
        source=source,
        **fields,
    )


def unjudged(measurement: Measurement, reason: str) -> Measurement:
    """Return the measurement as informative: shown with its interval, never judged, for `reason`; what disturbed it is
    still said.
    """
    if measurement.disturbed and measurement.reason:
        reason = f"{measurement.reason}; {reason}"
    return measurement.model_copy(
        update={"verdict": "informative", "margin": None, "bound": None, "mde": None, "reason": reason}
    )


def judged(metric: str, workload: str, **fields: Any) -> Measurement:
    """Return a measurement whose verdict was reached elsewhere (quality); `fields` are the other fields."""
    return _make(metric, workload, **fields)


def unavailable(metric: str, workload: str, reason: str, source: str = "none") -> Measurement:
    """Return a metric that is not available: null with its reason, never 0, never blank."""
    return _missing(metric, workload, "unavailable", reason, source)


def invalid(metric: str, workload: str, reason: str, source: str = "sanity gate") -> Measurement:
    """Return a metric that must not be shown: an arm's output has degenerated (`lib.measure.quality.sanity`)."""
    return _missing(metric, workload, "invalid", reason, source)


def _missing(metric: str, workload: str, verdict: Verdict, reason: str, source: str) -> Measurement:
    fields = {"baseline": None, "optimized": None, "provenance": "unavailable"}
    return _make(metric, workload, **fields, verdict=verdict, source=source, reason=reason)


def lint(measurements: Iterable[Measurement | dict]) -> list[str]:
    """Return one line for each measurement that is unlabelled, unlisted or malformed; empty where there is none."""
    faults = []
    for entry in measurements:
        fields = entry.model_dump() if isinstance(entry, Measurement) else entry
        try:
            Measurement.model_validate(fields)
        except Exception as error:
            faults.append(
                f"{fields.get('metric', 'a measurement without a name')}: {str(error).splitlines()[-1].strip()}"
            )
    return faults
