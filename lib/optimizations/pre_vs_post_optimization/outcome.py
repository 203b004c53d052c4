"""The outcome of comparing before with after: the answer to each claim, the verdict's sentence, controls and details of
the record.

Everything is computed from what `experiment` has measured.
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
APPLIED = ("works", "invalid")  # states of a candidate that could be applied, if only with a degenerate output
UNCLEAR = ("inconclusive", "not_exercised", "invalid", "unavailable")


def biased(control: Sequence[Measurement]) -> list[str]:
    """Return in which metrics the identity transform differs from the model that it copies."""
    return [m.metric for m in control if m.verdict in DIFFERS]


def refutations(
    control: Sequence[Measurement], quality: Sequence[Measurement], decided: int, regressions: Sequence[str]
) -> list[ClaimAnswer]:
    """Return (claim, whether it is refuted, evidence) for each of CLAIMS.

    `decided` counts the primary metrics that could be told from an earlier build's or shown to be as then,
    `regressions` names those that got worse since; others may have, too. The identity transform has to come out
    equivalent: what is undecided does not show that there is no bias.
    """
    judged = [m for m in control if m.verdict not in ("informative", "unavailable", "invalid")]
    differing, names = biased(judged), ", ".join(regressions)
    undecided = [m for m in judged if m.verdict in UNCLEAR]
    alike = f"{len(differing)} of {len(judged)} metrics differ, {len(undecided)} undecided"
    held = [m for m in quality if m.margin is not None]
    below = [m for m in held if m.verdict in ("not_maintained", "worse")]
    unclear = [m for m in held if m.verdict in UNCLEAR]
    fallen = True if below else None if unclear or not held else False
    counts = f"{len(below)} of {len(held)} metrics below their margin, {len(unclear)} undecided"
    earlier = f"{decided} primary metrics decided against an earlier build, {len(regressions)} of them worse"
    answers = (
        (True if differing else None if undecided or not judged else False, alike),
        (fallen, counts),
        (bool(regressions) if decided else None, earlier + (f" ({names})" if names else "")),
    )
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answers)]


def controls(compared: Compared, identity: list[Measurement]) -> list[ThirdArm]:
    """Return the controls of a record: A/A and the identity transform."""
    arms = [ThirdArm("A/A", "a copy of the baseline", compared.control())]
    return [*arms, ThirdArm("identity transform", "everything but a change", identity)]


def sentence(setup: StackSetup, verdict: str) -> str:
    """Return the sentence of the verdict; where nothing pays, that first, how many candidates were tried and rejected,
    and how many could not be applied.
    """
    if setup.pays:
        return verdict
    tried = sum(row.get("state", "works") in APPLIED for row in setup.stack.considered)
    unfit = len(setup.stack.considered) - tried
    if not tried:
        return f"Nothing pays here{': no candidate could be applied' if unfit else ''}. {verdict}"
    candidates = f"{tried} candidate{'' if tried == 1 else 's'}"
    nothing = f"of {candidates} none is, as far as can be told, within the margins and faster or smaller."
    apart = f" {unfit} more could not be applied." if unfit else ""
    return f"Nothing pays here: {nothing}{apart} {verdict}"


def details(setup: StackSetup, shared: Attribution, swept: GainSweep) -> dict[str, tuple[object, str, str]]:
    """Return what a record keeps beside measurements: name → (value, provenance, source)."""
    stack, points = setup.stack, swept.curves.to_dict("records")
    return {
        "stack": ([step.model_dump() for step in stack.steps], "derived", stack.origin),
        "inputs": (stack.inputs, "derived", "SHA-256 of files that earlier runs wrote and this one read"),
        "considered": (stack.considered, "measured", "search text and items; rounds until the interval is narrow"),
        "attribution": (shared.shares.to_dict("records"), "measured", shared.source),
        "sweep": (points, "measured", "paired blocks at every length and batch size"),
    }
