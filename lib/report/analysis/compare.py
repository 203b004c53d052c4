"""Two result sets against each other, metric by metric: what got better or worse, what stayed, what cannot be decided.

Matched by optimization, model, scale, effort and environment. What is compared is the gain of each set (optimized
against baseline, from its own paired blocks), so that a machine that is slower today cancels out; numbers without
spread are compared as they are. Primary metrics are judged with Holm's correction over all of them, and only they make
a regression; the others are shown. Knows no files.

A verdict needs significance, the metric's practical margin and both noise floors; `equivalent` needs the whole interval
inside the margin; otherwise it is `inconclusive`. Holm 1979, A simple sequentially rejective multiple test procedure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.records.record import Record

PRIMARY = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "goodput_requests_per_second",
    "f1_macro",
    "retrieval_exact_match",
    "perplexity",
    "weights_bytes",
    "peak_memory_bytes",
    "energy_joules_per_token",
)
ENVIRONMENT = (
    "cpu", "cores_given", "gpu", "threads", "instructions", "dtype", "device", "attention_backend",
    "experts_backend",
)  # fmt: skip
LEVEL = 0.05
RESAMPLES = 4000
FEWEST_BLOCKS = 6
ORDER = ("worse", "better", "inconclusive", "equivalent", "not comparable")


@dataclass(frozen=True)
class Change:
    """One metric of two sets. `ratio` and its interval are turned so that above 1 is better; `how` says what they are
    made of, `p` is corrected where the metric is primary, `reason` says why nothing can be compared.
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

    @property
    def regression(self) -> bool:
        """Whether this alone makes the new set worse than the old one."""
        return self.primary and self.verdict == "worse"


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
    before, after = ({(m.metric, m.workload): m for m in (r.measurements if r else [])} for r in (old, new))
    if reason and not (before or after):
        return [Change(*key, "all", "", "not comparable", False, reason=reason)]
    return [_measurements(key, name, before.get(name), after.get(name), reason) for name in {**before, **after}]


def _unlike(old: Record | None, new: Record | None) -> str:
    """Return why two runs cannot be compared at all, or nothing."""
    if old is None or new is None:
        return f"no run in the {'old' if old is None else 'new'} set"
    for record, side in ((old, "old"), (new, "new")):
        if record.status != "ok":
            return f"{record.status.replace('_', ' ')} in the {side} set"
    for name in ("scale", "effort"):
        if getattr(old, name) != getattr(new, name):
            return f"another {name}: {getattr(old, name)}, {getattr(new, name)}"
    for name in ENVIRONMENT:
        before, after = old.environment.get(name), new.environment.get(name)
        if before != after:
            return f"another environment: {name.replace('_', ' ')} {before}, {after}"
    return ""


def _measurements(
    key: tuple[str, str], name: tuple[str, str], old: Measurement | None, new: Measurement | None, reason: str
) -> Change:
    change = Change(*key, name[0], name[1], "not comparable", name[0] in PRIMARY)
    reason = reason or _incomparable(old, new)
    if reason or old is None or new is None:
        return replace(change, reason=reason)
    margin = METRICS[name[0]].margin or 0.0
    if METRICS[name[0]].margin_kind == "absolute":
        margin /= abs(old.baseline) if old.baseline else 1.0
    change = replace(change, margin=math.log1p(margin), floor=max(old.noise_floor or 0.0, new.noise_floor or 0.0))
    sign = 1.0 if new.higher_is_better else -1.0
    before, after = _differences(old), _differences(new)
    if before is not None and after is not None:
        return _estimated(change, sign, *_by_blocks(before, after), f"gain against gain, {len(after)} paired blocks")
    if by_intervals := _by_intervals(old, new):
        return _estimated(change, sign, *by_intervals, "gain against gain, from both intervals")
    if old.ci or new.ci or not old.optimized or not new.optimized or old.optimized / new.optimized <= 0:
        return replace(change, reason="there is neither a sample nor an interval on both sides")
    ratio = math.exp(sign * math.log(new.optimized / old.optimized))
    return replace(change, ratio=ratio, low=ratio, high=ratio, how="counted, without spread", verdict="")


def _incomparable(old: Measurement | None, new: Measurement | None) -> str:
    if old is None or new is None:
        return f"not measured in the {'old' if old is None else 'new'} set"
    if METRICS.get(old.metric) is None or METRICS[old.metric].margin is None:
        return "describes only: it has no margin"
    if old.optimized is None or new.optimized is None:
        side, measurement = ("old", old) if old.optimized is None else ("new", new)
        return f"{measurement.verdict} in the {side} set: {measurement.reason}"
    if old.unit != new.unit:
        return f"another unit: {old.unit}, {new.unit}"
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


def _by_intervals(old: Measurement, new: Measurement) -> tuple[float, float, float, float, int] | None:
    """As `_by_blocks`, from both intervals, treated as independent: too wide where the items are the same.

    None where a ratio or its interval is unknown or not positive.
    """
    ratios, errors = [], []
    for m in (old, new):
        if not m.ci or min(m.ci) <= 0 or not m.ratio or m.ratio <= 0:
            return None
        ratios.append(m.ratio)
        errors.append((math.log(m.ci[1]) - math.log(m.ci[0])) / (2 * 1.96))
    effect, error = math.log(ratios[1] / ratios[0]), math.hypot(*errors)
    return effect, effect - 1.96 * error, effect + 1.96 * error, error, max((old.n or 2) + (new.n or 2) - 2, 1)


def _estimated(
    change: Change, sign: float, effect: float, low: float, high: float, error: float, freedom: int, how: str
) -> Change:
    from scipy import special

    ends = sorted((math.exp(sign * low), math.exp(sign * high)))
    p = float(2 * special.stdtr(freedom, -abs(effect) / error)) if error > 0 else float(effect == 0)
    return replace(change, ratio=math.exp(sign * effect), low=ends[0], high=ends[1], p=p, how=how, verdict="")


def _holm(changes: Sequence[Change]) -> list[Change]:
    """Return the changes with the p of the primary ones corrected over all of them."""
    ranked = sorted(
        ((c.p, i) for i, c in enumerate(changes) if c.primary and c.p is not None), key=lambda pair: pair[0]
    )
    corrected, largest = list(changes), 0.0
    for rank, (p, i) in enumerate(ranked):
        largest = max(largest, min(1.0, p * (len(ranked) - rank)))
        corrected[i] = replace(changes[i], p=largest)
    return corrected


def _judge(change: Change) -> Change:
    if change.reason or change.ratio is None or change.low is None or change.high is None:
        return change
    effect, beyond = math.log(change.ratio), max(change.margin, change.floor)
    significant = change.p is None or change.p < LEVEL
    if significant and abs(effect) > beyond:
        verdict = "better" if effect > 0 else "worse"
    elif -change.margin <= math.log(change.low) and math.log(change.high) <= change.margin:
        verdict = "equivalent"
    else:
        verdict = "inconclusive"
    return replace(change, verdict=verdict)


def counts(changes: Sequence[Change]) -> Mapping[str, int]:
    """Return verdict → number of changes."""
    return {name: sum(change.verdict == name for change in changes) for name in ORDER}
