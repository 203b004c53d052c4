"""What would refute a notebook's claim, and whether it happened: an answer to each line, computed from the run.

The lines are those of the notebook's list "What would refute it", word for word. Turns a verdict into an answer; knows
no optimization.
"""

from collections.abc import Collection, Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lib.measure.metrics.measurement import Measurement
from lib.report.text.quantities import figures
from lib.report.text.sentence import NO_REASON, ends, ratio, why
from lib.report.text.wording import label, signed, words

Outcome = Literal["refuted", "not refuted", "cannot tell"]
COLUMNS = ("what would refute it", "answer", "evidence")


class Refutation(BaseModel):
    """One line of "What would refute it", its answer, and the number that the answer rests on."""

    model_config = ConfigDict(extra="forbid")
    claim: str
    outcome: Outcome
    evidence: str


def decide(claim: str, refuted: bool | None, evidence: str) -> Refutation:
    """Return the answer to `claim`; `refuted` says whether what it describes happened, None if the run cannot tell.

    `evidence` is a phrase with the number. Raises ValueError where it is empty.
    """
    if not evidence:
        raise ValueError("an answer needs its evidence: the number it rests on, or why there is none")
    outcome: Outcome = "cannot tell" if refuted is None else "refuted" if refuted else "not refuted"
    return Refutation(claim=claim, outcome=outcome, evidence=evidence)


def by_verdict(
    claim: str,
    measurement: Measurement | None,
    refuted: Collection[str] = ("worse", "equivalent", "not_maintained"),
    upheld: Collection[str] = ("better", "maintained"),
) -> Refutation:
    """Return the answer to `claim` from a measurement's verdict: refuted if it is in `refuted`, not refuted if in
    `upheld`, otherwise "cannot tell".
    """
    reason = measurement.reason if measurement is not None else None
    if measurement is None or measurement.baseline is None or measurement.optimized is None:
        return decide(claim, None, reason or "not measured")
    if measurement.ratio is None and reason:
        return decide(claim, None, reason)
    verdict = measurement.verdict
    shown, span = ratio(measurement.ratio, *ends(measurement))
    if measurement.ratio is None:  # the baseline is zero
        shown = f"{figures(measurement.baseline)} → {figures(measurement.optimized)}"
    evidence = f"{label(measurement.metric)} [{measurement.workload}] {shown}"
    evidence += f" ({span}), {words(verdict)}" if span else f", {words(verdict)}"
    if verdict == "inconclusive" and (gate := why(measurement)) != NO_REASON:
        evidence += f": {gate}"
    return decide(claim, True if verdict in refuted else False if verdict in upheld else None, evidence)


def rows(refutations: Iterable[Refutation]) -> list[tuple[str, str, str]]:
    """Return a row for each answer, in the order of `COLUMNS`."""
    return [(answer.claim, signed(state(answer)), answer.evidence) for answer in refutations]


def state(answer: Refutation) -> str:
    """Return the outcome as one word, the key of its sign and style: `not_refuted`."""
    return answer.outcome.replace(" ", "_")
