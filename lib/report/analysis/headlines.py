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


def shown(found: Measurement) -> Shown:
    """Return a measurement in words; one without a number says why there is none."""
    about = (verdict.subject(found), found.metric)
    if found.optimized is None or (found.ratio is None and found.dimension != "accuracy"):
        value, spread = (words(found.verdict), "") if found.optimized is None else (_absolute(found), "")
    else:
        value, spread = {"performance": _speed, "accuracy": _score}.get(found.dimension, _amount)(found)
    source = found.source + (f"; {found.reason}" if found.reason else "")
    return Shown(*about, value, spread, found.verdict, found.provenance, source)


def _absolute(found: Measurement) -> str:
    return quantity(found.optimized, found.unit)


def _speed(found: Measurement) -> tuple[str, str]:
    gain, low, high = verdict.gain(found)
    if gain is None:
        return _absolute(found), ""
    return times(gain), interval(low, high) if low and high else ""


def _score(found: Measurement) -> tuple[str, str]:
    """Return the change of quality, with the bound and the margin it was held to, or else its interval."""
    in_points = found.unit == "share" and found.baseline is not None
    if in_points:
        value = f"{signed((found.optimized - found.baseline) * 100)} points"
    elif found.ratio:
        value = f"{signed((found.ratio - 1) * 100)} %"
    else:
        return _absolute(found), ""
    bound = ", ".join(part for part in verdict.judged_by(found) if part)
    if not bound and found.ci and found.ratio:
        scale = 100 * (found.baseline if in_points else 1)
        bound = interval(*((end - 1) * scale for end in found.ci), form=".1f")
    return value, bound


def _amount(found: Measurement) -> tuple[str, str]:
    if not found.ratio:
        return _absolute(found), ""
    ends = interval(*((end - 1) * 100 for end in found.ci), form=".0f") + " %" if found.ci else ""
    return f"{signed((found.ratio - 1) * 100)} %", ends


def of(record: Record, dimension: str) -> list[Shown]:
    """Return what stands for a dimension of a record, losses included; empty where nothing does.

    Two of the same kind are told apart by their workloads. Where none of it carries the dimension's verdict, the first
    measurement that does stands beside it: a cell that says `better` shows what is.
    """
    found = chosen(record.measurements, dimension)
    wanted = CARRIED_BY.get(getattr(record.verdict, dimension), ())
    for state in wanted:
        if all(m.verdict != state for m in found):
            found += [m for m in record.measurements if m.dimension == dimension and m.verdict == state][:1]
    listed = [shown(one) for one in found]
    often = Counter(one.what for one in listed)
    return [
        replace(one, what=f"{one.what}, {m.workload}") if often[one.what] > 1 else one for one, m in zip(listed, found)
    ]


def chosen(measurements: Sequence[Measurement], dimension: str) -> list[Measurement]:
    """Return the headline measurements of a dimension, or, where all of them are missing, the first missing one."""
    members = [m for m in measurements if m.dimension == dimension]
    return verdict.headline(members, dimension) or members[:1]
