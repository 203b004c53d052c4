"""Correction over a whole set: limits the share of false discoveries among the primary measurements.

Among many cells, some are called better or worse by chance. In each dimension the p-values of all primaries
(`lib.measure.metrics.significance`) are corrected by Benjamini and Hochberg's procedure (1995, Controlling the false
discovery rate), so that among the cells called in that dimension at most one in twenty is expected to be false. A cell
whose q lies above that is shown as inconclusive, with that reason (a score that rose as maintained, which it is); the
run's own record keeps its verdict.

Primaries without spread (counted, or equal answers) leave nothing to chance and are not part of a family. `maintained`
and `equivalent` claim no difference: their error is held in each cell by the bound that they rest on. Cells that are
not called (withheld on a busy machine, within margin or floor) are tests all the same, but no discoveries: they count
with a p of 1, or a set of withheld effects would lend its significance to those that are called.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lib.measure.metrics import significance
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.report.records.record import Record
from lib.report.records.verdicts import in_words, primary

LEVEL = 0.05
CALLS = ("better", "worse", "not_maintained")


@dataclass(frozen=True)
class Cell:
    """A dimension of a run: its primary measurement, the verdict of its record, p and q (None: nothing left to chance),
    the verdict within the set, and why that differs.
    """

    optimization: str
    model: str
    dimension: str
    metric: str | None
    workload: str | None
    recorded: str
    p: float | None
    q: float | None
    word: str
    reason: str | None


def cells(records: Sequence[Record]) -> list[Cell]:
    """Return the cells of all measured records, by dimension, then in the order of the records."""
    return [cell for dimension in DIMENSIONS for cell in _family(records, dimension)]


def _family(records: Sequence[Record], dimension: str) -> list[Cell]:
    members = [record for record in records if record.status == "ok"]
    p_values = [_p(record, dimension) for record in members]
    called = [getattr(record.verdict, dimension) in CALLS for record in members]
    tested = [p if claims else 1.0 for p, claims in zip(p_values, called) if p is not None]
    corrected = iter(q_values(tested))
    family = []
    for record, p in zip(members, p_values):
        q = None if p is None else next(corrected)
        carrier = record.verdict.carried_by.get(dimension)
        word = recorded = getattr(record.verdict, dimension)
        reason = None
        if q is not None and q > LEVEL and recorded in CALLS:
            # What a score gained may be chance; its interval excludes every loss all the same.
            word = "maintained" if (dimension, recorded) == ("accuracy", "better") else "inconclusive"
            reason = f"q {q:.2g} over the {len(tested)} primaries of {dimension}: not beyond chance among so many"
        metric, workload = (carrier.metric, carrier.workload) if carrier else (None, None)
        about = record.optimization, record.model, dimension, metric, workload
        family.append(Cell(*about, recorded, p, q, word, reason))
    return family


def _p(record: Record, dimension: str) -> float | None:
    carrier = record.verdict.carried_by.get(dimension)
    if carrier is None:
        return None
    pair = (carrier.metric, carrier.workload)
    member = next((m for m in record.measurements if (m.metric, m.workload) == pair), None)
    return None if member is None else significance.p_value(member)


def q_values(p_values: Sequence[float]) -> list[float]:
    """Return Benjamini and Hochberg's adjusted p-values, in the order given."""
    if not p_values:
        return []
    from scipy.stats import false_discovery_control

    return [float(q) for q in false_discovery_control(p_values, method="bh")]


def settled(records: Sequence[Record]) -> list[Record]:
    """Return the records with the verdicts that hold within the set; those whose verdicts do not change are returned as
    they are.

    Where a verdict is withheld, its measurement is inconclusive too, and so is the same quantity written another way (a
    latency beside its rate); the sentence says so.
    """
    withheld: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells(records):
        if cell.word != cell.recorded:
            withheld.setdefault((cell.optimization, cell.model), []).append(cell)
    return [
        _settled(record, changed) if (changed := withheld.get((record.optimization, record.model))) else record
        for record in records
    ]


def _settled(record: Record, changed: Sequence[Cell]) -> Record:
    verdict = record.verdict
    words = {cell.dimension: cell.word for cell in changed}
    reasons = {cell.dimension: cell.reason for cell in changed}
    withheld = {(_quantity(cell.metric), cell.workload): cell for cell in changed}
    measurements = [
        m.model_copy(update={"verdict": cell.word, "reason": cell.reason})
        if m.verdict in CALLS and (cell := withheld.get((_quantity(m.metric), m.workload)))
        else m
        for m in record.measurements
    ]
    update = words | {"reasons": verdict.reasons | reasons}
    settled = record.model_copy(update={"verdict": verdict.model_copy(update=update), "measurements": measurements})
    sentences = [f"Over this set {each.dimension} is {each.word}: {each.reason}." for each in changed]
    text = " ".join([in_words.of_record(settled), *sentences])
    return settled.model_copy(update={"verdict": settled.verdict.model_copy(update={"sentence": text})})


def _quantity(metric: str | None) -> str | None:
    """Return the metric in which a quantity is judged, whichever way it is written."""
    return primary.TWINS.get(metric, metric) if metric else None
