"""Quality from a run's scores: kept within the margin that a reader allows, lost, or undecided, and whether more items
could decide it.
"""

import math

from lib.measure.metrics import settings
from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import noninferiority
from lib.report.records.record import Record
from lib.report.records.verdicts import in_words
from lib.report.text import brief
from lib.report.text.sentence import subject

QUALITY = ("f1_macro", "retrieval_exact_match", "accuracy", "accuracy_norm", "exact_match", "perplexity")
ASKED = {"perplexity": "windows", "retrieval_exact_match": "retrieval_prompts"}  # fields of an effort; else `items`


def asked(record: Record, dimension: str) -> bool:
    """Return whether a dimension was requested: all are, unless the run was limited to some."""
    return not record.dimensions or dimension in record.dimensions


def only(record: Record) -> str:
    """Return a phrase that names the dimensions a run was limited to."""
    return f"the run measured {' and '.join(record.dimensions or DIMENSIONS)} only"


def quality(record: Record, keep: float) -> tuple[str | None, str | None, list[Measurement]]:
    """Return why quality is lost, why it is undecided (None each if it is not), and the scores examined."""
    scores = [m for name in QUALITY for m in record.measurements if m.metric == name and m.verdict != "informative"]
    if any(m.verdict == "invalid" for m in scores):
        return "the output has degenerated", None, scores
    if record.verdict.accuracy == "unavailable" or not scores:
        reason = next((m.reason for m in record.measurements if m.dimension == "accuracy" and m.reason), None)
        reason = reason if asked(record, "accuracy") else only(record)
        return None, f"quality was not measured ({reason or 'no score'})", scores
    unexercised = [m for m in scores if m.verdict == "not_exercised"]
    guards = [(loss.metric, loss.workload) for loss in record.verdict.losses_of("accuracy")]
    known = [*scores, *(m for m in record.measurements if (m.metric, m.workload) in guards)]
    words = {id(m): judged_with(m, keep) for m in known}
    lost = next((m for m in known if words[id(m)] == "not_maintained"), None)
    if lost:
        where = in_words.notes(lost, record.measurements)
        return f"{subject(lost)} {brief.change(lost)}{where}, more than allowed", None, scores
    undecided = next((m for m in scores if words[id(m)] == "inconclusive"), None)
    if undecided:
        where = in_words.notes(undecided, record.measurements)
        return None, f"{subject(undecided)}{where}: {why_open(undecided, keep)}", scores
    if len(unexercised) == len(scores):
        return None, "the optimization never acted on any question of the run", scores
    return None, None, scores


def judged_with(measurement: Measurement, keep: float) -> str:
    """Return the verdict on a score with the margin `keep` instead of its own; perplexity keeps its own margin."""
    if _at_own_margin(measurement, keep) or measurement.bound is None:
        return measurement.verdict
    if measurement.bound > -keep:
        return "maintained"
    if measurement.ci and measurement.baseline and (measurement.ci[1] - 1) * measurement.baseline < -keep:
        return "not_maintained"
    return "inconclusive"


def _at_own_margin(measurement: Measurement, keep: float) -> bool:
    """Return whether the stored verdict and its reason also hold with the margin `keep`: it was judged with that
    margin, with one that is not in points (perplexity), or not by a margin at all.
    """
    judged = measurement.verdict in ("maintained", "not_maintained", "inconclusive")
    return not judged or measurement.metric == "perplexity" or keep == measurement.margin


def why_open(score: Measurement, keep: float) -> str:
    """Return why a score is undecided with the margin `keep`, on which the number of items needed depends."""
    if _at_own_margin(score, keep) or score.bound is None:
        return score.reason or "too few items to tell"
    return noninferiority.too_few_at(score, keep)


def beyond_every_effort(record: Record, score: Measurement, keep: float) -> bool:
    """Return whether a score is undecided and would probably remain so at the largest effort: its interval, shrunk by
    that effort's number of items, would still include the margin.
    """
    if judged_with(score, keep) != "inconclusive" or why_busy(record.measurements):
        return False
    if score.bound is None or score.ci is None or not score.baseline or score.optimized is None:
        return False
    if score.metric == "perplexity":  # higher is worse; judged by its own margin, a share of the baseline
        change, ends, limit = score.optimized / score.baseline - 1, (score.ci[0] - 1, score.bound), score.margin or 0.0
    else:
        change, ends = score.optimized - score.baseline, (score.bound, (score.ci[1] - 1) * score.baseline)
        limit = -keep
    nearer = _nearer(record.effort, score.metric)
    low, high = (change + (end - change) * nearer for end in ends)
    return low <= limit <= high


def _nearer(effort: str, metric: str) -> float:
    """Return the factor by which a score's interval shrinks at the largest effort, from the number of items alone."""
    count = ASKED.get(metric, "items")
    most = max(getattr(other, count) for other in settings.EFFORTS.values())
    return math.sqrt(getattr(settings.EFFORTS[effort], count) / most)
