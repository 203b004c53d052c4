"""A Measurement is one metric of both arms, as a record stores it. Here are also the constructors for numbers without
samples (counted, informative, unavailable …); those for paired samples are in `lib.measure.metrics.paired_samples`.
Knows nothing about where numbers come from.

`ratio` is always optimized / baseline of the metric itself: above 1 is better for tokens per second, below 1 for
milliseconds. `ci` is the 95 % interval of `ratio`; where the baseline is zero there is no ratio, and `ci` is that of
`optimized`. For paired times, `ratio` is the median of the blocks' ratios, or the mean over several processes, which
need not equal the ratio of the two medians shown. `noise_floor` and `mde` are shares (strictly natural logarithms,
which are nearly equal while small). A number that is not available is null, with a reason.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from lib.measure.metrics.catalogue import metric as metric_named

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
    """Return a measurement without spread (parameters, bytes, FLOPs, a single reading), judged by the margin alone.

    One arm may be None, with a `reason`; the result is then informative.
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
    """Return a measurement that is not judged; `fields` are further fields of it (n, ci, reason, samples …)."""
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
    """Return the measurement as informative, for `reason`: shown with its interval, but not judged. A disturbance stays
    in its reason.
    """
    if measurement.disturbed and measurement.reason:
        reason = f"{measurement.reason}; {reason}"
    return measurement.model_copy(
        update={"verdict": "informative", "margin": None, "bound": None, "mde": None, "reason": reason}
    )


def judged(metric: str, workload: str, **fields: Any) -> Measurement:
    """Return a measurement whose verdict is already decided (in `fields`, which hold all other fields)."""
    return _make(metric, workload, **fields)


def unavailable(metric: str, workload: str, reason: str, source: str = "none") -> Measurement:
    """Return an unavailable metric: null with its reason, never 0, never blank."""
    return _missing(metric, workload, "unavailable", reason, source)


def invalid(metric: str, workload: str, reason: str, source: str = "sanity gate") -> Measurement:
    """Return an invalid metric, whose number must not be shown: an arm's output degenerated (`quality.sanity`)."""
    return _missing(metric, workload, "invalid", reason, source)


def _missing(metric: str, workload: str, verdict: Verdict, reason: str, source: str) -> Measurement:
    fields = {"baseline": None, "optimized": None, "provenance": "unavailable"}
    return _make(metric, workload, **fields, verdict=verdict, source=source, reason=reason)


def lint(measurements: Iterable[Measurement | dict]) -> list[str]:
    """Return one line for each measurement that is unlabelled, unlisted or malformed; empty if all are well-formed."""
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
