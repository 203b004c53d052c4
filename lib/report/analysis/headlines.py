"""The headline measurements of a run, each in a few words with sign, interval and source.

Shared by the matrix, the suites' reports and the ranking. Judges nothing; knows no HTML.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib.measure.metrics.digits import signed, with_ends
from lib.measure.metrics.measurement import Measurement
from lib.report.records.record import Record
from lib.report.records.verdicts import verdict
from lib.report.records.verdicts.primary import LOSSES
from lib.report.text import sentence
from lib.report.text.quantities import quantity
from lib.report.text.wording import SIGNS, words
from lib.report.text.wording import signed as signed_word

JUDGED = ("better", "worse", "equivalent", "inconclusive")


@dataclass(frozen=True)
class Shown:
    """A number formatted for readers: `what` was measured, `value` (`1.31×`), `spread` (`1.28–1.34`), `state` (the
    verdict), provenance and source.
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
    """Return a measurement formatted for readers; if it has no number, its verdict replaces the value."""
    about = (sentence.subject(measurement), measurement.metric)
    if measurement.optimized is None or measurement.verdict == "not_exercised":
        value, spread = words(measurement.verdict), ""
    elif measurement.ratio is None and measurement.dimension != "accuracy":
        value, spread = _absolute(measurement), ""
    else:
        value, spread = {"performance": _speed, "accuracy": _score}.get(measurement.dimension, _amount)(measurement)
    why = sentence.why(measurement)
    reason = why if why and why != "no reason was recorded" else measurement.reason
    source = measurement.source + (f"; {reason}" if reason else "")
    estimated = measurement.provenance == "estimated" and measurement.verdict in JUDGED
    state = "informative" if estimated else measurement.verdict  # shown, not judged
    return Shown(*about, value, spread, state, measurement.provenance, source)


def _absolute(measurement: Measurement) -> str:
    return quantity(measurement.optimized, measurement.unit)


def _speed(measurement: Measurement) -> tuple[str, str]:
    gain, low, high = sentence.gain(measurement)
    return (_absolute(measurement), "") if gain is None else sentence.ratio(gain, low, high)


def _score(measurement: Measurement) -> tuple[str, str]:
    """Return the change of a score as text, and its bound or interval with the margin."""
    if sentence.same_answers(measurement):
        return sentence.SAME, f"{measurement.n} items" if measurement.n else ""
    if sentence.change(measurement) is None:
        return _absolute(measurement), ""
    value, spread = sentence.score(measurement)
    return value, ", ".join(spread)


def _amount(measurement: Measurement) -> tuple[str, str]:
    known = sentence.change(measurement)
    if known is None:
        return _absolute(measurement), ""
    value, low, high, unit = known
    text, ends = with_ends(value, low, high, 0, signs=True)
    return f"{text or signed(value)} {unit}", f"{ends} {unit}" if ends else ""


def members(record: Record, dimension: str) -> list[Measurement]:
    """Return the headline measurements of a dimension: its primary one, the losses, then the others that tables show;
    empty where there are none.
    """
    named = {(m.metric, m.workload): m for m in record.measurements}
    carrier = record.verdict.carried_by.get(dimension)
    first = [(carrier.metric, carrier.workload)] if carrier else []
    first += [(loss.metric, loss.workload) for loss in record.verdict.losses_of(dimension)]
    listed = [named[pair] for pair in first if pair in named]
    rest = [m for m in chosen(record.measurements, dimension) if all(m is not member for member in listed)]
    return listed + rest[: max(0, verdict.SHOWN[dimension] + 1 - len(listed))]


def of(record: Record, dimension: str) -> list[Shown]:
    """Return the headline measurements of a dimension (`members`), formatted for readers.

    Workloads distinguish measurements of the same name.
    """
    measurements = members(record, dimension)
    listed = [shown(item) for item in measurements]
    often = Counter(item.what for item in listed)
    return [
        replace(item, what=f"{item.what}, {m.workload}") if often[item.what] > 1 else item
        for item, m in zip(listed, measurements)
    ]


def state(record: Record, dimension: str) -> str:
    """Return a dimension's verdict with its sign, marked if something else was lost: `▲ better, but …`."""
    word = getattr(record.verdict, dimension)
    lost = record.verdict.losses_of(dimension) and word not in LOSSES
    return f"{signed_word(word)}, but …" if lost else signed_word(word)


def chosen(measurements: Sequence[Measurement], dimension: str) -> list[Measurement]:
    """Return the measurements that tables show for a dimension; where all are missing, the first missing one."""
    members = [m for m in measurements if m.dimension == dimension]
    return verdict.headline(members, dimension) or members[:1]
