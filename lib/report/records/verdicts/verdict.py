"""The verdict of a record: a word per dimension and a sentence, both computed from its measurements.

Each measurement already has its own verdict (`lib.measure.metrics.measurement`). A dimension's word is the verdict of
its primary measurement (`lib.report.records.verdicts.primary`); losses among the others are listed with it, so that a
gain never hides them: "better, but …". Independent of files and pages.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement, invalid
from lib.report.records.verdicts import in_words, primary
from lib.report.records.verdicts.primary import Pair
from lib.report.text import sentence
from lib.report.text.sentence import clipped

Dimension = Literal["better", "worse", "equivalent", "mixed", "inconclusive", "invalid", "unavailable"]
Accuracy = Literal["better", "maintained", "not_maintained", "inconclusive", "not_exercised", "invalid", "unavailable"]
# The metrics shown in tables, in this order; being shown does not make a metric decide a verdict.
HEADLINES = {
    "performance": primary.PREFERRED["performance"],
    "accuracy": ("f1_macro", "retrieval_exact_match", "perplexity", "accuracy", "accuracy_norm", "exact_match"),
    "resources": ("weights_bytes", "peak_tensor_bytes", "peak_memory_bytes", "kv_cache_bytes_per_token", "parameters"),
    "efficiency": primary.PREFERRED["efficiency"],
}
SHOWN = {"performance": 2, "accuracy": 2, "resources": 1, "efficiency": 1}


class Carrier(BaseModel):
    """The measurement whose verdict is a dimension's word. `reason` says why it is not the one that was declared; None
    where it is, or where none was declared.
    """

    model_config = ConfigDict(extra="forbid")
    metric: str
    workload: str
    reason: str | None = None


class Loss(BaseModel):
    """A loss among the guards that counts: beyond margin and floor, and significant. `p` is corrected by Holm over all
    guards of the record; None where the number was counted and has no spread.
    """

    model_config = ConfigDict(extra="forbid")
    dimension: str
    metric: str
    workload: str
    verdict: Literal["worse", "not_maintained"]
    p: float | None = None


class Verdict(BaseModel):
    """One word per dimension, what carries each, and the sentence.

    The word is the verdict of the dimension's primary measurement, named in `carried_by`. `losses` are those of other
    measurements that stand beside it ("better, but …"): they do not change the word, and no gain of theirs does. The
    word "mixed" occurs only in records of schema 1 and 2, which had no primary: there a gain and a loss of one
    dimension were one word, and `carried_by` is empty. `reasons` says why a dimension is inconclusive, not exercised or
    unavailable.
    """

    model_config = ConfigDict(extra="forbid")
    performance: Dimension = "unavailable"
    accuracy: Accuracy = "unavailable"
    resources: Dimension = "unavailable"
    efficiency: Dimension = "unavailable"
    sentence: str = ""
    carried_by: dict[str, Carrier] = {}
    losses: list[Loss] = []
    reasons: dict[str, str] = {}

    def words(self) -> dict[str, str]:
        """Return dimension → word."""
        return {name: getattr(self, name) for name in DIMENSIONS}

    def losses_of(self, dimension: str) -> list[Loss]:
        """Return the losses listed with the word of `dimension`."""
        return [loss for loss in self.losses if loss.dimension == dimension]


def judge(
    measurements: Sequence[Measurement],
    status: str = "ok",
    reason: str | None = None,
    requested: Sequence[str] | None = None,
    primaries: Mapping[str, Pair] | None = None,
    effort: str | None = None,
) -> Verdict:
    """Return the verdict of a run; that of a failed or not applicable run claims nothing and says why.

    `requested` are the dimensions that were to be measured (None: all); the others are unavailable, and the sentence
    says so. `primaries` maps a dimension to its declared (metric, workload).
    """
    if status == "failed":
        return Verdict(sentence=in_words.without_result("Failed, so nothing is claimed", reason))
    if status == "not_applicable":
        return Verdict(sentence=in_words.without_result("Not applicable", reason))
    carried = {name: primary.carrier(measurements, name, (primaries or {}).get(name)) for name in DIMENSIONS}
    carriers = {name: member for name, (member, _) in carried.items()}
    losses = primary.losses(measurements, carriers)
    by_dimension = {name: [m for m in measurements if m.dimension == name] for name in DIMENSIONS}
    words: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, members in by_dimension.items():
        words[name], why = _word(name, members, *carried[name])
        reasons |= {name: why} if why else {}
    return Verdict.model_validate(
        words
        | {
            "sentence": in_words.sentences(measurements, carriers, [m for m, _ in losses], reasons, requested, effort),
            "carried_by": {
                name: Carrier(metric=member.metric, workload=member.workload, reason=why)
                for name, (member, why) in carried.items()
                if member is not None
            },
            "losses": [
                {"dimension": m.dimension, "metric": m.metric, "workload": m.workload, "verdict": m.verdict, "p": p}
                for m, p in losses
            ],
            "reasons": reasons,
        }
    )


def withhold_if_invalid(measurements: list[Measurement]) -> list[Measurement]:
    """Return the measurements; if accuracy is invalid, performance and efficiency are withheld, so that no gain of a
    broken model is shown.
    """
    broken = next((m for m in measurements if m.dimension == "accuracy" and m.verdict == "invalid"), None)
    if broken is None:
        return measurements
    reason = f"withheld, the output has degenerated: {broken.reason or 'sanity gate'}"
    return [
        invalid(m.metric, m.workload, reason) if m.dimension in ("performance", "efficiency") else m
        for m in measurements
    ]


def _word(
    dimension: str, members: Sequence[Measurement], carrier: Measurement | None, not_declared: str | None
) -> tuple[str, str]:
    """Return a dimension's word, and the reason if it is inconclusive, invalid, not exercised or unavailable (else
    empty). `not_declared` is why the declared measurement is not the carrier.
    """
    broken = next((m for m in members if m.verdict == "invalid"), None)
    if broken is not None:
        return "invalid", clipped(broken.reason)
    if carrier is not None:
        word: str = carrier.verdict
        if dimension == "accuracy":
            word = {"equivalent": "maintained", "worse": "not_maintained"}.get(word, word)
        else:
            word = {"maintained": "equivalent", "not_maintained": "worse"}.get(word, word)
        return word, sentence.why(carrier) if word == "inconclusive" else ""
    silent = next((m for m in members if m.verdict == "not_exercised"), None)
    if silent is not None and dimension == "accuracy":
        return "not_exercised", clipped(silent.reason)
    described = next((m for m in members if m.verdict not in ("unavailable", "not_exercised")), None)
    if described is not None:
        if not_declared and not_declared not in (primary.ESTIMATE, primary.NOT_MEASURED):
            return "inconclusive", clipped(not_declared)
        estimated = next((m for m in members if m.provenance == "estimated"), None)
        name = sentence.subject(estimated or described)
        return (
            "inconclusive",
            f"{name} is estimated, and no estimate is judged" if estimated else f"{name} is informative only",
        )
    missing = next((m.reason for m in members if m.reason), None)
    return "unavailable", clipped(missing or "nothing was measured")


def headline(measurements: Sequence[Measurement], dimension: str) -> list[Measurement]:
    """Return the measurements that tables show for `dimension`: the first known metrics of `HEADLINES`, or any other if
    none is known. The carrier and the losses are in the record's verdict, not here.
    """
    order = {name: rank for rank, name in enumerate(HEADLINES[dimension])}
    known = [m for m in measurements if m.verdict not in ("unavailable", "invalid")]
    known = [m for m in known if m.ratio or (dimension == "accuracy" and m.optimized is not None)]
    known.sort(key=lambda m: (order.get(m.metric, len(order)), m.verdict == "informative"))
    return [m for m in known if m.metric in order][: SHOWN[dimension]] or known[:1]
