"""Comparison of two result sets, metric by metric: what got better or worse, what is unchanged, what is undecided.

Runs are matched by optimization and model; scale, effort, environment, parameters, the chosen stack and the number of
parallel jobs must agree, or the pair is rejected with the reason. The comparison is between the gains of both sets
(optimized against baseline, from paired blocks or the interval over processes), so that a slower machine cancels out;
numbers without spread are compared directly. Primary metrics (PRIMARY, those that decide a dimension in either set, and
the scores of public tasks) are judged with Holm's correction over all of them, and only they count as regressions.
Other metrics, single readings, and metrics judged in neither set are only shown. Knows no files.

`better` and `worse` need significance, and an effect beyond the metric's margin and both noise floors; `equivalent`
needs the whole interval inside the margin; all else is `inconclusive`, as is every single reading. The uncertainty of
each side comes from its blocks, or from its stored interval and noise floor if these are larger: they include the
variance between processes (`lib.report.analysis.noise.gains`). A score is also worse if the new set's output has
degenerated. Holm 1979, A simple sequentially rejective multiple test procedure.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib.measure.metrics import significance
from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.decision import BUSY
from lib.measure.metrics.digits import signed
from lib.measure.metrics.measurement import Measurement, unavailable
from lib.report.analysis.noise import gains
from lib.report.records.record import Record
from lib.report.text.wording import one_line

PRIMARY = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "goodput_requests_per_second",
    "f1_macro",
    "retrieval_exact_match",
    "perplexity",
    "weights_bytes",
    "peak_memory_bytes",
    "peak_tensor_bytes",
    "energy_joules_per_token",
    "cpu_seconds_per_token",
)
OF_PUBLIC_TASKS = ("accuracy", "accuracy_norm", "exact_match")  # where F1 exists they would count it twice
ENVIRONMENT = (
    "cpu", "cores_given", "gpu", "threads", "instructions", "dtype", "device", "attention_backend",
    "experts_backend",
)  # fmt: skip
LEVEL = gains.LEVEL
# Parameters that identify the run or are paths: they do not affect what is measured.
NOT_COMPARED = ("model", "scale", "effort", "checkpoints", "history", "studies", "stacks")
CHOICES = ("stack", "choice")  # entries of a record's details that hold the result of a search
ORDER = ("worse", "better", "inconclusive", "equivalent", "not comparable")


@dataclass(frozen=True)
class Change:
    """One metric in both sets. `ratio` (new gain over old gain) and its interval are above 1 where the new set is
    better; `how` says what they are computed from. `p` is corrected if the metric is primary, `reason` says why nothing
    can be compared, `once` that a side is a single reading. `margin` and `floor` are logarithms.

    `points` are effect and interval (above 0 is better) of a score whose ratio has no interval, as when no answer is
    correct any more; `ratio` is then None, and `margin` is in points too.
    """

    optimization: str
    model: str
    metric: str
    workload: str
    verdict: str
    primary: bool
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    how: str = ""
    reason: str = ""
    margin: float = 0.0
    floor: float = 0.0
    once: bool = False
    points: tuple[float, float, float] | None = None

    @property
    def regression(self) -> bool:
        """Whether this change is a regression: a primary metric got worse, by more than one reading."""
        return self.primary and self.verdict == "worse" and not self.once


def compare(old: Iterable[Record], new: Iterable[Record]) -> list[Change]:
    """Return every change from the `old` to the `new` set, worst first (`ORDER`)."""
    before = {(r.optimization, r.model): r for r in old}
    after = {(r.optimization, r.model): r for r in new}
    changes = [change for key in sorted({*before, *after}) for change in _records(key, before.get(key), after.get(key))]
    judged = [_judge(change) for change in _holm(changes)]
    return sorted(judged, key=lambda c: (ORDER.index(c.verdict), not c.primary, c.optimization, c.model, c.metric))


def _records(key: tuple[str, str], old: Record | None, new: Record | None) -> list[Change]:
    reason = _unlike(old, new)
    if old and new and not reason and old.key and (old.key, old.started) == (new.key, new.started):
        return [Change(*key, "all", "", "not comparable", False, reason="the same run, kept from the older build")]
    before, after = (_by_name(record) for record in (old, new))
    if reason and not (before or after):
        return [Change(*key, "all", "", "not comparable", False, reason=reason)]
    carriers = {(c.metric, c.workload) for r in (old, new) if r for c in r.verdict.carried_by.values()}
    names = {**before, **after}
    return [_measurements(key, name, before.get(name), after.get(name), reason, carriers) for name in names]


def _by_name(record: Record | None) -> dict[tuple[str, str], Measurement]:
    """Return (metric, workload) → measurement; if the machine was busy, timings are replaced by unavailable ones."""
    members = record.measurements if record else []
    busy = why_busy(members)
    timed = [m for m in members if m.noise_floor is not None and m.dimension in ("performance", "efficiency")]
    by_name = {(m.metric, m.workload): m for m in members}
    if busy:
        why = busy if busy.startswith(BUSY) else f"{BUSY}: {busy}"
        by_name |= {(m.metric, m.workload): unavailable(m.metric, m.workload, why) for m in timed}
    return by_name


def _unlike(old: Record | None, new: Record | None) -> str:
    """Return why two runs cannot be compared at all; empty where they can."""
    if old is None or new is None:
        return f"no run in the {'old' if old is None else 'new'} set"
    for record, side in ((old, "old"), (new, "new")):
        if record.status != "ok":
            return f"{record.status.replace('_', ' ')} in the {side} set"
    for name in ("scale", "effort"):
        if getattr(old, name) != getattr(new, name):
            return f"different {name}: {getattr(old, name)}, {getattr(new, name)}"
    for name in ENVIRONMENT:
        before, after = old.environment.get(name), new.environment.get(name)
        if before != after:
            return f"different environment: {name.replace('_', ' ')} {before}, {after}"
    return _unlike_settings(old, new)


def _unlike_settings(old: Record, new: Record) -> str:
    """Return which parameter, choice or number of jobs differs between two runs; empty where none does. Settings that
    only one of them has are not compared.
    """
    for name in sorted({*old.parameters} & {*new.parameters} - {*NOT_COMPARED}):
        before, after = old.parameters[name], new.parameters[name]
        if before != after:
            return f"different parameter: {name} {before}, {after}"
    for name in (name for name in CHOICES if name in old.details and name in new.details):
        before, after = _value(old.details[name]), _value(new.details[name])
        if before != after:
            return f"different choice: {name} {_brief(before)}, {_brief(after)}"
    jobs = [record.process.jobs_side_by_side if record.process else None for record in (old, new)]
    if None not in jobs and jobs[0] != jobs[1]:
        return f"different number of jobs side by side: {jobs[0]}, {jobs[1]}"
    others = [record.environment.get("jobs_beside") for record in (old, new)]
    if None not in others and others[0] != others[1]:
        return f"different number of other jobs: {others[0]}, {others[1]}"
    return ""


def _value(entry: Any) -> Any:
    return entry.get("value", entry) if isinstance(entry, Mapping) else entry


def _brief(value: Any) -> str:
    return one_line(str(value), 60)


def _measurements(
    key: tuple[str, str],
    name: tuple[str, str],
    old: Measurement | None,
    new: Measurement | None,
    reason: str,
    carriers: Collection[tuple[str, str]] = (),
) -> Change:
    change = Change(*key, name[0], name[1], "not comparable", _is_primary(name, carriers))
    if not reason and (broken := _broken(old, new)):
        return replace(change, verdict="worse", how=broken)
    reason = reason or _incomparable(old, new)
    if reason or old is None or new is None:
        return replace(change, reason=reason)
    margin = METRICS[name[0]].margin or 0.0
    if absolute := METRICS[name[0]].margin_kind == "absolute":
        # The change is that of the optimized arm, so a margin in points is a share of that arm's old score.
        margin /= abs(old.optimized or old.baseline or 1.0)
    floor = math.hypot(old.noise_floor or 0.0, new.noise_floor or 0.0)
    judged = {old.verdict, new.verdict} != {"informative"}  # judged in neither record: no regression
    change = replace(change, primary=change.primary and judged, margin=math.log1p(margin), floor=floor)
    change = replace(change, once=_read_once(old) or _read_once(new))
    sign = 1.0 if new.higher_is_better else -1.0
    by_intervals = gains.by_intervals(old, new)
    if by_intervals and gains.over_processes(old, new):
        how = f"gain against gain, over {old.processes} and {new.processes} processes"
        return _estimated(change, sign, *by_intervals, how)
    before, after = gains.differences(old), gains.differences(new)
    if before is not None and after is not None:
        spread = gains.at_least(gains.by_blocks(before, after), old, new)
        return _estimated(change, sign, *spread, f"gain against gain, {len(after)} paired blocks, between processes")
    if by_intervals:
        return _estimated(change, sign, *by_intervals, "gain against gain, from both intervals")
    if absolute and (points := gains.by_points(old, new)):
        return _in_points(change, *points)
    known = significance.ratio_ends(old) or significance.ratio_ends(new) or gains.scatters(old) or gains.scatters(new)
    if known or not old.optimized or not new.optimized or old.optimized / new.optimized <= 0:
        return replace(change, reason="neither samples nor an interval on both sides")
    ratio = math.exp(sign * math.log(new.optimized / old.optimized))
    how = "read once, so without a verdict" if change.once else "counted, without spread"
    return replace(change, ratio=ratio, low=ratio, high=ratio, how=how, verdict="")


def _broken(old: Measurement | None, new: Measurement | None) -> str:
    """Return a phrase if the old set has a score that the new set lost because its output degenerated; else empty."""
    if old is None or new is None or old.optimized is None or METRICS[new.metric].margin is None:
        return ""
    if new.verdict != "invalid" or new.dimension != "accuracy":
        return ""
    return one_line(f"the output has degenerated in the new set: {new.reason}")


def _is_primary(name: tuple[str, str], carriers: Collection[tuple[str, str]]) -> bool:
    """Return whether a (metric, workload) is primary; of the scores of "classify" only F1 is."""
    metric, workload = name
    of_public_task = metric in OF_PUBLIC_TASKS and workload != "classify"
    return metric in PRIMARY or of_public_task or name in carriers


def _incomparable(old: Measurement | None, new: Measurement | None) -> str:
    if old is None or new is None:
        return f"not measured in the {'old' if old is None else 'new'} set"
    if METRICS.get(old.metric) is None or METRICS[old.metric].margin is None:
        return "informative only: it has no margin"
    if old.optimized is None or new.optimized is None:
        side, measurement = ("old", old) if old.optimized is None else ("new", new)
        return f"{measurement.verdict} in the {side} set: {measurement.reason}"
    if old.unit != new.unit:
        return f"different unit: {old.unit}, {new.unit}"
    for measurement, side in ((old, "old"), (new, "new")):
        if measurement.verdict == "not_exercised":
            return f"not exercised in the {side} set"
    if old.provenance == new.provenance == "estimated":
        return "it is only estimated"
    if old.provenance != new.provenance:
        return f"{old.provenance} in the old set, {new.provenance} in the new one"
    return ""


def _read_once(measurement: Measurement) -> bool:
    """Return whether a number is a single reading, whose spread is unknown; a counted number is not."""
    return measurement.n in significance.SINGLE and not significance.is_counted(measurement)


def _estimated(
    change: Change, sign: float, effect: float, low: float, high: float, error: float, freedom: int, how: str
) -> Change:
    ends = sorted((math.exp(sign * low), math.exp(sign * high)))
    p = gains.p_value(effect, error, freedom)
    return replace(change, ratio=math.exp(sign * effect), low=ends[0], high=ends[1], p=p, how=how, verdict="")


def _in_points(change: Change, effect: float, low: float, high: float, error: float, freedom: int) -> Change:
    """Return the change of a score whose ratio has no interval, with the margin in points too."""
    ends = " to ".join(signed(100 * number) for number in (low, high))
    how = f"{signed(100 * effect)} points ({ends}), gain against gain, from both intervals"
    margin, p = METRICS[change.metric].margin or 0.0, gains.p_value(effect, error, freedom)
    return replace(change, points=(effect, low, high), margin=margin, p=p, how=how, verdict="")


def _holm(changes: Sequence[Change]) -> list[Change]:
    """Return the changes, the p-values of primary ones corrected over all primary ones (Holm)."""
    tested = [(i, c.p) for i, c in enumerate(changes) if c.primary and c.p is not None]
    corrected = list(changes)
    for (i, _), p in zip(tested, significance.holm([p for _, p in tested])):
        corrected[i] = replace(changes[i], p=p)
    return corrected


def _judge(change: Change) -> Change:
    span = _span(change)
    if change.reason or span is None:
        return change
    effect, low, high = span
    significant = change.p is None or change.p < LEVEL
    if change.once:
        verdict = "inconclusive"  # the spread of a single reading is unknown
    elif significant and abs(effect) > max(change.margin, change.floor):
        verdict = "better" if effect > 0 else "worse"
    elif -change.margin <= low and high <= change.margin:
        verdict = "equivalent"
    else:
        verdict = "inconclusive"
    return replace(change, verdict=verdict)


def _span(change: Change) -> tuple[float, float, float] | None:
    """Return effect and interval in the margin's unit (above 0 is better); None where nothing was compared."""
    if change.points or change.ratio is None or change.low is None or change.high is None:
        return change.points
    return math.log(change.ratio), math.log(change.low), math.log(change.high)


def counts(changes: Sequence[Change]) -> Mapping[str, int]:
    """Return verdict → number of changes."""
    return {name: sum(change.verdict == name for change in changes) for name in ORDER}
