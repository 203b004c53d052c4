"""The numbers that stand for a run: its headline measurements, each in a few words with sign, interval and source.

One place for what the matrix, the suites' reports and the ranking show of a run. Judges nothing; knows no HTML.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib.measure.metrics.measurement import Measurement
from lib.report.records import verdict
from lib.report.records.record import Record
from lib.report.text.quantities import interval, quantity, signed, times
from lib.report.text.wording import SIGNS, words

CARRIED_BY = {
    "better": ("better",),
    "worse": ("worse",),
    "mixed": ("better", "worse"),
    "not_maintained": ("not_maintained",),
    "inconclusive": ("inconclusive",),
}


@dataclass(frozen=True)
class Shown:
    """A number as a reader sees it: `what` it is of, `value` (`1.31×`), `spread` (`1.28–1.34`), and where it comes
    from.
    """

    what: str
    metric: str
    value: str
    spread: str
    state: str
    provenance: str
    source: str

    @property
    def sign(self) -> str:
        """The verdict's sign."""
        return SIGNS[self.state]

    @property
    def text(self) -> str:
        """Sign, value and interval: `▲ 1.31× (1.28–1.34)`."""
        return f"{SIGNS[self.state]} {self.value}" + (f" ({self.spread})" if self.spread else "")

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return words(self.state)


def shown(measurement: Measurement) -> Shown:
    """Return a measurement in words; one without a number says why there is none."""
    about = (verdict.subject(measurement), measurement.metric)
    if measurement.optimized is None or (measurement.ratio is None and measurement.dimension != "accuracy"):
        value, spread = (
            (words(measurement.verdict), "") if measurement.optimized is None else (_absolute(measurement), "")
        )
    else:
        value, spread = {"performance": _speed, "accuracy": _score}.get(measurement.dimension, _amount)(measurement)
    source = measurement.source + (f"; {measurement.reason}" if measurement.reason else "")
    return Shown(*about, value, spread, measurement.verdict, measurement.provenance, source)


def _absolute(measurement: Measurement) -> str:
    return quantity(measurement.optimized, measurement.unit)


def _speed(measurement: Measurement) -> tuple[str, str]:
    gain, low, high = verdict.gain(measurement)
    if gain is None:
        return _absolute(measurement), ""
    return times(gain), interval(low, high) if low and high else ""


def _score(measurement: Measurement) -> tuple[str, str]:
    """Return the change of quality, with the bound and the margin it was held to, or else its interval."""
    base = measurement.baseline if measurement.unit == "share" else None
    if base is not None and measurement.optimized is not None:
        value = f"{signed((measurement.optimized - base) * 100)} points"
    elif measurement.ratio:
        value = f"{signed((measurement.ratio - 1) * 100)} %"
    else:
        return _absolute(measurement), ""
    bound = ", ".join(part for part in verdict.judged_by(measurement) if part)
    if not bound and measurement.ci and measurement.ratio:
        scale = 100 * (1 if base is None else base)
        low, high = ((end - 1) * scale for end in measurement.ci)
        bound = interval(low, high, ".1f")
    return value, bound


def _amount(measurement: Measurement) -> tuple[str, str]:
    if not measurement.ratio:
        return _absolute(measurement), ""
    low, high = ((end - 1) * 100 for end in measurement.ci) if measurement.ci else (None, None)
    ends = f"{interval(low, high, '.0f')} %" if measurement.ci else ""
    return f"{signed((measurement.ratio - 1) * 100)} %", ends


def of(record: Record, dimension: str) -> list[Shown]:
    """Return what stands for a dimension of a record, losses included; empty where nothing does.

    Two of the same kind are distinguished by their workloads. Where none of them has the dimension's verdict, the first
    measurement that does is added: a cell that says `better` shows what is better.
    """
    members = chosen(record.measurements, dimension)
    wanted = CARRIED_BY.get(getattr(record.verdict, dimension), ())
    for state in wanted:
        if all(m.verdict != state for m in members):
            members += [m for m in record.measurements if m.dimension == dimension and m.verdict == state][:1]
    listed = [shown(item) for item in members]
    often = Counter(item.what for item in listed)
    return [
        replace(item, what=f"{item.what}, {m.workload}") if often[item.what] > 1 else item
        for item, m in zip(listed, members)
    ]


def chosen(measurements: Sequence[Measurement], dimension: str) -> list[Measurement]:
    """Return the headline measurements of a dimension, or, where all of them are missing, the first missing one."""
    members = [m for m in measurements if m.dimension == dimension]
    return verdict.headline(members, dimension) or members[:1]
