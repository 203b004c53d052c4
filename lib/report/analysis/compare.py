"""Two result sets against each other, metric by metric: what got better or worse, what stayed, what cannot be decided.

Matched by optimization and model; scale, effort, environment, parameters, the chosen stack and the jobs side by side
must agree, or the pair is refused with the reason. What is compared is the gain of each set (optimized against
baseline, from its own paired blocks), so that a machine that is slower today cancels out; numbers without spread are
compared as they are. Primary metrics are judged with Holm's correction over all of them, and only they make a
regression; the others are shown, and so is what was read once. Knows no files.

A verdict needs significance, the metric's practical margin and both noise floors; `equivalent` needs the whole interval
inside the margin; otherwise it is `inconclusive`. The uncertainty of each side is that of its blocks or of its stored
interval and noise floor, whichever is larger: the latter two hold what differs from process to process. Holm 1979, A
simple sequentially rejective multiple test procedure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lib.measure.metrics import significance
from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement, unavailable
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
ENVIRONMENT = (
    "cpu", "cores_given", "gpu", "threads", "instructions", "dtype", "device", "attention_backend",
    "experts_backend",
)  # fmt: skip
LEVEL = 0.05
NORMAL = 1.96
# Settings that name where files lie or what is read beside the run, not what is measured.
NOT_COMPARED = ("model", "scale", "effort", "checkpoints", "history", "studies", "stacks")
CHOICES = ("stack", "choice")  # entries of a record's details that a search has chosen
RESAMPLES = 4000
FEWEST_BLOCKS = 6
ORDER = ("worse", "better", "inconclusive", "equivalent", "not comparable")


@dataclass(frozen=True)
class Change:
    """One metric of two sets. `ratio` and its interval are turned so that above 1 is better; `how` says what they are
    made of, `p` is corrected where the metric is primary, `reason` says why nothing can be compared, `once` that a side
    is a single reading.
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

    @property
    def regression(self) -> bool:
        """Whether this alone makes the new set worse than the old one: a primary metric, of more than one reading."""
        return self.primary and self.verdict == "worse" and not self.once


def compare(old: Iterable[Record], new: Iterable[Record]) -> list[Change]:
    """Return every change, worst first."""
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
    return [_measurements(key, name, before.get(name), after.get(name), reason) for name in {**before, **after}]


def _by_name(record: Record | None) -> dict[tuple[str, str], Measurement]:
    """Return (metric, workload) → measurement; of a busy machine, what was timed is not there to be compared."""
    members = record.measurements if record else []
    busy = why_busy(members)
    timed = [m for m in members if m.noise_floor is not None and m.dimension in ("performance", "efficiency")]
    by_name = {(m.metric, m.workload): m for m in members}
    if busy:
        why = f"the machine was busy: {busy}"
        by_name |= {(m.metric, m.workload): unavailable(m.metric, m.workload, why) for m in timed}
    return by_name


def _unlike(old: Record | None, new: Record | None) -> str:
    """Return why two runs cannot be compared at all, or nothing."""
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
    """Return which parameter, choice or number of jobs differs between two runs, or nothing. What only one of them
    knows cannot differ.
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
    beside = [record.environment.get("jobs_beside") for record in (old, new)]
    if None not in beside and beside[0] != beside[1]:
        return f"different number of other jobs: {beside[0]}, {beside[1]}"
    return ""


def _value(entry: Any) -> Any:
    return entry.get("value", entry) if isinstance(entry, Mapping) else entry


def _brief(value: Any) -> str:
    return one_line(str(value), 60)


def _measurements(
    key: tuple[str, str], name: tuple[str, str], old: Measurement | None, new: Measurement | None, reason: str
) -> Change:
    change = Change(*key, name[0], name[1], "not comparable", name[0] in PRIMARY)
    reason = reason or _incomparable(old, new)
    if reason or old is None or new is None:
        return replace(change, reason=reason)
    margin = METRICS[name[0]].margin or 0.0
    if METRICS[name[0]].margin_kind == "absolute":
        # The change is one of the optimized arm, so points of a score are a share of what that arm had.
        margin /= abs(old.optimized or old.baseline or 1.0)
    floor = math.hypot(old.noise_floor or 0.0, new.noise_floor or 0.0)
    change = replace(change, margin=math.log1p(margin), floor=floor, once=_read_once(old) or _read_once(new))
    sign = 1.0 if new.higher_is_better else -1.0
    before, after = _differences(old), _differences(new)
    if before is not None and after is not None:
        blocks = _by_blocks(before, after)
        spread = _at_least(blocks, old, new)
        return _estimated(change, sign, *spread, f"gain against gain, {len(after)} paired blocks, between processes")
    if by_intervals := _by_intervals(old, new):
        return _estimated(change, sign, *by_intervals, "gain against gain, from both intervals")
    known = significance.ratio_ends(old) or significance.ratio_ends(new)
    if known or not old.optimized or not new.optimized or old.optimized / new.optimized <= 0:
        return replace(change, reason="neither samples nor an interval on both sides")
    ratio = math.exp(sign * math.log(new.optimized / old.optimized))
    how = "read once, so without a verdict" if change.once else "counted, without spread"
    return replace(change, ratio=ratio, low=ratio, high=ratio, how=how, verdict="")


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


def _differences(measurement: Measurement) -> np.ndarray | None:
    """Return ln(optimized / baseline) of each block, or None where the samples were not kept or are too few."""
    samples = measurement.samples or {}
    base, opt = (np.array(samples.get(arm, [])) for arm in ("baseline", "optimized"))
    if len(base) != len(opt) or len(base) < FEWEST_BLOCKS or (base <= 0).any() or (opt <= 0).any():
        return None
    return np.log(opt / base)


def _by_blocks(old: np.ndarray, new: np.ndarray) -> tuple[float, float, float, float, int]:
    """Return effect, interval's ends, standard error (of the logarithm), and degrees of freedom."""
    places = _middles(len(old), len(new))
    ranked = [np.sort(d)[place] for d, place in zip((old, new), places, strict=True)]
    medians = [0.5 * (low + high) for low, high in ranked]
    spread = medians[1] - medians[0]
    low, high = np.quantile(spread, [LEVEL / 2, 1 - LEVEL / 2])
    return float(np.median(new) - np.median(old)), float(low), float(high), float(spread.std()), len(old) + len(new) - 2


@lru_cache(maxsize=16)
def _middles(*lengths: int) -> list[np.ndarray]:
    """Return for each length the places (2 × RESAMPLES) in the sorted values whose mean is a resample's median.

    The same resamples serve every pair of measurements of these lengths, so they are drawn once.
    """
    chance, places = np.random.default_rng(0), []
    for length in lengths:
        drawn = np.sort(chance.integers(0, length, (RESAMPLES, length)), axis=1)
        places.append(np.stack([drawn[:, (length - 1) // 2], drawn[:, length // 2]]))
    return places


def _read_once(measurement: Measurement) -> bool:
    """Whether a number is a single reading, of which nothing tells the scatter. What was counted is none."""
    return measurement.n in significance.SINGLE and not significance.is_counted(measurement)


def _at_least(
    blocks: tuple[float, float, float, float, int], old: Measurement, new: Measurement
) -> tuple[float, float, float, float, int]:
    """Return a comparison by blocks with the variance between processes: no side's error is smaller than that of its
    stored interval or of its noise floor, which both hold it (and a stored standard deviation between processes).

    Blocks of one process are not independent: the degrees of freedom are those of the stored intervals. Where these
    widen, p is below 0.05 exactly where they exclude no change, and falls beyond as slowly as few processes ask.
    """
    effect, low, high, error, _ = blocks
    half, freedom = NORMAL * math.hypot(_error(old), _error(new)), sum(map(significance.freedom_of, (old, new)))
    if half <= NORMAL * error:
        return effect, low, high, error, freedom
    return effect, min(low, effect - half), max(high, effect + half), half / _quantile(freedom), freedom


def _quantile(freedom: int) -> float:
    """Return Student's 97.5 % quantile."""
    from scipy import special

    return float(special.stdtrit(freedom, 1 - LEVEL / 2))


def _error(measurement: Measurement) -> float:
    """Return the standard error of a measurement's logarithm: by its interval, its noise floor, or the standard
    deviation between processes, whichever is largest."""
    low, high = significance.ratio_ends(measurement) or (1.0, 1.0)
    by_ends = math.log(high / low) / 2 if low > 0 else 0.0
    sigma = (measurement.process_sigma or 0.0) / math.sqrt(measurement.processes or 1)
    return max(by_ends / NORMAL, (measurement.noise_floor or 0.0) / NORMAL, sigma)


def _by_intervals(old: Measurement, new: Measurement) -> tuple[float, float, float, float, int] | None:
    """As `_by_blocks`, from both intervals, treated as independent: too wide where the items are the same. p is below
    0.05 exactly where the interval excludes no change, with the degrees of freedom of both (items, or processes).

    None where a ratio or its interval is unknown or not positive.
    """
    ratios, errors = [], []
    for m in (old, new):
        ends = significance.ratio_ends(m)
        if not ends or min(ends) <= 0 or not m.ratio or m.ratio <= 0:
            return None
        ratios.append(m.ratio)
        errors.append(_error(m))
    effect, half = math.log(ratios[1] / ratios[0]), NORMAL * math.hypot(*errors)
    freedom = sum(map(significance.freedom_of, (old, new)))
    return effect, effect - half, effect + half, half / _quantile(freedom), freedom


def _estimated(
    change: Change, sign: float, effect: float, low: float, high: float, error: float, freedom: int, how: str
) -> Change:
    from scipy import special

    ends = sorted((math.exp(sign * low), math.exp(sign * high)))
    p = float(2 * special.stdtr(freedom, -abs(effect) / error)) if error > 0 else float(effect == 0)
    return replace(change, ratio=math.exp(sign * effect), low=ends[0], high=ends[1], p=p, how=how, verdict="")


def _holm(changes: Sequence[Change]) -> list[Change]:
    """Return the changes with the p of the primary ones corrected over all of them."""
    tested = [(i, c.p) for i, c in enumerate(changes) if c.primary and c.p is not None]
    corrected = list(changes)
    for (i, _), p in zip(tested, significance.holm([p for _, p in tested])):
        corrected[i] = replace(changes[i], p=p)
    return corrected


def _judge(change: Change) -> Change:
    if change.reason or change.ratio is None or change.low is None or change.high is None:
        return change
    effect, beyond = math.log(change.ratio), max(change.margin, change.floor)
    significant = change.p is None or change.p < LEVEL
    if change.once and abs(effect) > change.margin:
        verdict = "inconclusive"  # one reading tells nothing of its own scatter
    elif significant and abs(effect) > beyond:
        verdict = "better" if effect > 0 else "worse"
    elif -change.margin <= math.log(change.low) and math.log(change.high) <= change.margin:
        verdict = "equivalent"
    else:
        verdict = "inconclusive"
    return replace(change, verdict=verdict)


def counts(changes: Sequence[Change]) -> Mapping[str, int]:
    """Return verdict → number of changes."""
    return {name: sum(change.verdict == name for change in changes) for name in ORDER}
