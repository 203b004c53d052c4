"""What the scores of a run say of quality: whether it is kept within the margin that a reader allows, lost, or open,
and whether more items would tell.
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
ASKED = {"perplexity": "windows", "retrieval_exact_match": "retrieval_prompts"}  # of an effort; elsewhere items


def asked(record: Record, dimension: str) -> bool:
    """Return whether a dimension was to be measured: all of them are, unless the run was of some only."""
    return not record.dimensions or dimension in record.dimensions


def only(record: Record) -> str:
    """Return of what alone a run was, in words."""
    return f"the run was of {' and '.join(record.dimensions or DIMENSIONS)} only"


def quality(record: Record, keep: float) -> tuple[str | None, str | None, list[Measurement]]:
    """Return why quality is lost, why it cannot be told, and the scores that were looked at."""
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
        return f"{subject(lost)} {brief.change(lost)}{where}, more than may be lost", None, scores
    undecided = next((m for m in scores if words[id(m)] == "inconclusive"), None)
    if undecided:
        where = in_words.notes(undecided, record.measurements)
        return None, f"{subject(undecided)}{where}: {why_open(undecided, keep)}", scores
    if len(unexercised) == len(scores):
        return None, "the optimization never acted on the questions that were asked", scores
    return None, None, scores


def judged_with(measurement: Measurement, keep: float) -> str:
    """Return the verdict on a score with the margin `keep` in place of its own; perplexity keeps its own."""
    if _at_own_margin(measurement, keep) or measurement.bound is None:
        return measurement.verdict
    if measurement.bound > -keep:
        return "maintained"
    if measurement.ci and measurement.baseline and (measurement.ci[1] - 1) * measurement.baseline < -keep:
        return "not_maintained"
    return "inconclusive"


def _at_own_margin(measurement: Measurement, keep: float) -> bool:
    """Return whether the verdict of a measurement, and the reason for it, are those that hold with the margin `keep`
    too: it rests on that margin, on one that is no share of points, or on none.
    """
    judged = measurement.verdict in ("maintained", "not_maintained", "inconclusive")
    return not judged or measurement.metric == "perplexity" or keep == measurement.margin


def why_open(score: Measurement, keep: float) -> str:
    """Return why a score cannot be told with the margin `keep`: how many items would suffice depends on it."""
    if _at_own_margin(score, keep) or score.bound is None:
        return score.reason or "too few items to tell"
    return noninferiority.too_few_at(score, keep)


def beyond_every_effort(record: Record, score: Measurement, keep: float) -> bool:
    """Return whether a score is open and would probably be so at the largest effort too: its ends, brought nearer to
    the difference by as many items as that asks, still lie on both sides of the margin.
    """
    if judged_with(score, keep) != "inconclusive" or why_busy(record.measurements):
        return False
    if score.bound is None or score.ci is None or not score.baseline or score.optimized is None:
        return False
    if score.metric == "perplexity":  # of which more is worse; its margin is a share, and its own
        change, ends, limit = score.optimized / score.baseline - 1, (score.ci[0] - 1, score.bound), score.margin or 0.0
    else:
        change, ends = score.optimized - score.baseline, (score.bound, (score.ci[1] - 1) * score.baseline)
        limit = -keep
    nearer = _nearer(record.effort, score.metric)
    low, high = (change + (end - change) * nearer for end in ends)
    return low <= limit <= high


def _nearer(effort: str, metric: str) -> float:
    """Return the factor by which the ends of a score come nearer to it at the largest effort, by its items alone."""
    what = ASKED.get(metric, "items")
    most = max(getattr(other, what) for other in settings.EFFORTS.values())
    return math.sqrt(getattr(settings.EFFORTS[effort], what) / most)
