"""The outcome of comparing before with after: answers to the claims, the verdict's sentence, the record's controls and
details.

Everything is computed from the measurements of `experiment`.
"""

from collections.abc import Sequence

from lib.measure.compare.speed import Compared
from lib.measure.metrics.measurement import Measurement
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.pre_vs_post_optimization.experiment import Attribution, GainSweep, StackSetup

CLAIMS = (
    "The identity transform shows a gain or a loss as well: the comparison is biased, not the model better.",
    "Quality falls below its margin.",
    "An earlier build did better.",
)
DIFFERS = ("better", "worse", "not_maintained")
APPLIED = ("works", "invalid")  # states of a candidate that could be applied, even if its output degenerated
UNCLEAR = ("inconclusive", "not_exercised", "invalid", "unavailable")


def biased(control: Sequence[Measurement]) -> list[str]:
    """Return the metrics in which the identity transform differs from the model that it copies."""
    return [m.metric for m in control if m.verdict in DIFFERS]


def refutations(
    control: Sequence[Measurement], quality: Sequence[Measurement], decided: int, regressions: Sequence[str]
) -> list[ClaimAnswer]:
    """Return (claim, whether it is refuted, evidence) for each of CLAIMS.

    `decided` counts the primary metrics shown to differ from an earlier build's or to equal them; `regressions` names
    those that got worse, not necessarily all of them. The identity transform has to come out equivalent: an undecided
    metric does not show that there is no bias.
    """
    judged = [m for m in control if m.verdict not in ("informative", "unavailable", "invalid")]
    differing, names = biased(judged), ", ".join(regressions)
    undecided = [m for m in judged if m.verdict in UNCLEAR]
    identical = f"{len(differing)} of {len(judged)} metrics differ, {len(undecided)} undecided"
    with_margin = [m for m in quality if m.margin is not None]
    below = [m for m in with_margin if m.verdict in ("not_maintained", "worse")]
    unclear = [m for m in with_margin if m.verdict in UNCLEAR]
    fallen = True if below else None if unclear or not with_margin else False
    counts = f"{len(below)} of {len(with_margin)} metrics below their margin, {len(unclear)} undecided"
    earlier = f"{decided} primary metrics decided against an earlier build, {len(regressions)} of them worse"
    answers = (
        (True if differing else None if undecided or not judged else False, identical),
        (fallen, counts),
        (bool(regressions) if decided else None, earlier + (f" ({names})" if names else "")),
    )
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answers)]


def controls(compared: Compared, identity: list[Measurement]) -> list[ThirdArm]:
    """Return the controls of a record: A/A and the identity transform."""
    arms = [ThirdArm("A/A", "a copy of the baseline", compared.control())]
    return [*arms, ThirdArm("identity transform", "everything but a change", identity)]


def sentence(setup: StackSetup, verdict: str) -> str:
    """Return the sentence of the verdict.

    If nothing pays, it is preceded by that fact and by the number of candidates rejected and of those not applicable.
    """
    if setup.pays:
        return verdict
    tried = sum(row.get("state", "works") in APPLIED for row in setup.stack.considered)
    unfit = len(setup.stack.considered) - tried
    if not tried:
        return f"Nothing pays here{': no candidate could be applied' if unfit else ''}. {verdict}"
    candidates = f"{tried} candidate{'' if tried == 1 else 's'}"
    rejected = f"of {candidates} none is surely within the margins and faster or smaller."
    not_applied = f" {unfit} more could not be applied." if unfit else ""
    return f"Nothing pays here: {rejected}{not_applied} {verdict}"


def details(setup: StackSetup, shared: Attribution, swept: GainSweep) -> dict[str, tuple[object, str, str]]:
    """Return the record's details: name → (value, provenance, source)."""
    stack, points = setup.stack, swept.curves.to_dict("records")
    return {
        "stack": ([step.model_dump() for step in stack.steps], "derived", stack.origin),
        "inputs": (stack.inputs, "derived", "SHA-256 of files written by earlier runs and read by this one"),
        "considered": (stack.considered, "measured", "search text and items; rounds until the interval is narrow"),
        "attribution": (shared.shares.to_dict("records"), "measured", shared.source),
        "sweep": (points, "measured", "paired blocks at every length and batch size"),
    }
