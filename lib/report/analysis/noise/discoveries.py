"""Correction over a whole set: limits the share of false discoveries among the primary measurements.

Among many cells, some are called better or worse by chance. In each dimension the p-values of all primaries
(`lib.measure.metrics.significance`) are corrected by Benjamini and Hochberg's procedure (1995, Controlling the false
discovery rate), so that at most one in twenty of the cells called in that dimension is expected to be false. A cell
with a larger q is shown as inconclusive, with that reason (a score that rose is shown as maintained); the run's own
record keeps its verdict.

Primaries without spread (counted, or equal answers) are free of chance and belong to no family. `maintained` and
`equivalent` claim no difference: each cell's bound limits their error. Cells that are not called (withheld on a busy
machine, within margin or floor) are tests, but not discoveries: they enter with p = 1; otherwise withheld effects would
make the called ones more significant.
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
    """A dimension of a run: its primary measurement, the verdict in its record (`recorded`), p and q (None: free of
    chance), the verdict within the set (`word`), and the reason if the two differ.
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
            # A score's gain may be chance, but its interval still excludes every loss.
            word = "maintained" if (dimension, recorded) == ("accuracy", "better") else "inconclusive"
            chance = "could be chance among this many tests"
            reason = f"q {q:.2g} over the {len(tested)} primaries of {dimension}: {chance}"
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
    """Return the records with their verdicts within the set; a record whose verdicts do not change is returned itself.

    Where a verdict is withheld, its measurement becomes inconclusive too, and so does the metric that restates it (a
    latency and its rate); the sentence says so.
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
    sentences = [f"Within this set {cell.dimension} is {cell.word}: {cell.reason}." for cell in changed]
    text = " ".join([in_words.of_record(settled), *sentences])
    return settled.model_copy(update={"verdict": settled.verdict.model_copy(update={"sentence": text})})


def _quantity(metric: str | None) -> str | None:
    """Return the metric in which the quantity of `metric` is judged (`primary.TWINS`)."""
    return primary.TWINS.get(metric, metric) if metric else None
