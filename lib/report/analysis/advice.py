"""From records to a decision: which optimizations serve a goal on a model, which do not, and which are undecided.

Reads records only and measures nothing. Never recommends on the basis of a number that is inconclusive, not exercised,
estimated or informative; gives scale, machine and time of all evidence, and transfers nothing between scales or models.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.measure.metrics.busy import why_busy, withhold_if_busy
from lib.measure.metrics.catalogue import DIMENSIONS, METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis.deciding.goals import GOALS, LIMITED, Goal, goal
from lib.report.analysis.deciding.scores import asked, beyond_every_effort, judged_with, only, quality, why_open
from lib.report.records.record import Record
from lib.report.records.setting import facts, reproduce, stack
from lib.report.records.verdicts import in_words, primary
from lib.report.text import brief
from lib.report.text.quantities import quantity
from lib.report.text.sentence import gain, ratio, subject, why
from lib.report.text.wording import label

__all__ = [
    "GOALS",
    "KEEP",
    "LIMITED",
    "ORDER",
    "Advice",
    "Decision",
    "Evidence",
    "Goal",
    "advise",
    "goal",
    "judged_with",
    "taken",
]

Decision = Literal["use", "use if", "undecided", "do not use", "not applicable"]
ORDER: tuple[Decision, ...] = ("use", "use if", "undecided", "do not use", "not applicable")
KEEP = 0.02  # points of a score, as a share


@dataclass(frozen=True)
class Evidence:
    """A measurement that a decision rests on, and its record."""

    measurement: Measurement
    record: Record

    @property
    def where(self) -> str:
        """Scale, effort, machine and day, in a few words."""
        parts = [self.record.scale, self.record.effort, facts.machine(self.record.environment)]
        return ", ".join(part for part in [*parts, facts.day(self.record.started)] if part)

    @property
    def text(self) -> str:
        """The gain with its interval and verdict, and `where` it was measured."""
        m = self.measurement
        shown, ends = ratio(*gain(m))
        return f"{label(m.metric)} [{m.workload}] {shown}{f' ({ends})' if ends else ''}, {m.verdict}; {self.where}"


@dataclass(frozen=True)
class Advice:
    """The decision on one optimization for one goal: its reason and evidence, and, if undecided, the command that could
    decide it, with the estimated seconds.

    `goal` is the goal as text, with its limit; `keep` is the most that a score may lose. "use if" is a gain with kept
    quality at the price of another loss: `reason` names the loss, then the gain.
    """

    optimization: str
    goal: str
    decision: Decision
    reason: str
    evidence: Evidence | None = None
    quality: list[Measurement] = field(default_factory=list)
    command: str | None = None
    seconds: float | None = None
    keep: float = KEEP

    @property
    def gain(self) -> float:
        """The gain as a factor; 1 where nothing was measured."""
        value = gain(self.evidence.measurement)[0] if self.evidence else None
        return value or 1.0


def advise(records: Iterable[Record], model: str, goals: Sequence[Goal], keep: float = KEEP) -> list[Advice]:
    """Return advice on every optimization with a record of `model`, for every goal: sorted by goal, decision (ORDER)
    and gain, the largest first.

    `keep` is the most that a score may lose (a share); perplexity keeps its own margin. Raises UserError where there is
    no record of the model.
    """
    own = [record for record in records if record.model == model]
    if not own:
        raise UserError(f'no record of "{model}"; run first: python build.py run --model {model}')
    advice = [_advise(record, wanted, keep) for wanted in dict.fromkeys(goals) for record in own]
    names = [str(wanted) for wanted in goals]
    return sorted(advice, key=lambda row: (names.index(row.goal), ORDER.index(row.decision), -row.gain))


def _advise(record: Record, goal: Goal, keep: float) -> Advice:
    """Return the advice that one record gives on one goal."""

    def result(decision: Decision, reason: str, **fields) -> Advice:
        return Advice(record.optimization, str(goal), decision, brief.clipped(reason), keep=keep, **fields)

    def undecided(reason: str, **fields) -> Advice:
        command, seconds = _again(record)
        largest = "" if command else f"; {record.effort} is the largest effort"
        return result("undecided", f"{reason}{largest}", command=command, seconds=seconds, **fields)

    def not_asked(reason: str, **fields) -> Advice:
        whole = record.model_copy(update={"dimensions": None})
        return result("undecided", reason, command=reproduce.command(whole), **fields)

    if record.status == "not_applicable":
        return result("not applicable", record.reason or "no reason was recorded")
    if record.status == "failed":
        again = reproduce.command(record)
        return result("undecided", f"the run failed: {record.reason}", command=again, seconds=record.seconds)
    if why_busy(record.measurements):  # a record of an earlier schema may still judge its timings
        record = record.model_copy(update={"measurements": withhold_if_busy(record.measurements)})
    elif nothing_pays := stack.nothing_pays(record):  # measurements of an unchanged copy decide nothing
        return result("do not use", nothing_pays)
    served = _serving(record, goal)
    lost, open_question, judged = quality(record, keep)
    if served is None:
        if lost:
            return result("do not use", lost, quality=judged)
        if not asked(record, METRICS[GOALS[goal.name][0]].dimension):
            return not_asked(f"{only(record)}, and nothing in it serves {goal.name}")
        if any(m.metric in GOALS[goal.name] for m in record.measurements):  # unavailable in this run
            return undecided(f"nothing was measured that serves {goal.name}")
        return result("undecided", f"this notebook measures nothing that serves {goal.name}")
    evidence = Evidence(served, record)
    unanswered = next((m for m in judged if beyond_every_effort(record, m, keep)), None)
    about: dict[str, Any] = {"evidence": evidence, "quality": judged}
    if lost:
        return result("do not use", lost, **about)
    if served.verdict in ("worse", "equivalent"):
        outcome = in_words.phrase(served, record.measurements)
        return result("do not use", f"no gain: {outcome}{_qualified(record, goal, served)}", **about)
    if served.verdict != "better" or served.provenance == "estimated":
        gate = why(served) or "a simulated or estimated number decides nothing"
        where = in_words.notes(served, record.measurements)
        open_number = f"{subject(served)} {brief.number(served)}{where}: {gate}"
        if _never_judged(record, served):
            return result("undecided", open_number, **about)
        return undecided(open_number, **about)
    if unanswered:
        where = in_words.notes(unanswered, record.measurements)
        still_open = f"{subject(unanswered)}{where}: {why_open(unanswered, keep)}"
        return result("undecided", f"no effort has enough items: {still_open}", **about)
    if open_question:
        return (undecided if asked(record, "accuracy") else not_asked)(open_question, **about)
    if goal.limit_bytes is not None and taken(record, goal.name) is None:
        missing = " or ".join(map(label, LIMITED[goal.name]))
        # Its dimension was requested, because one of its metrics serves the goal: more effort would not help.
        return result("undecided", f"{missing} was not measured, so the limit cannot be checked", **about)
    if goal.limit_bytes is not None and (beyond := _beyond(record, goal)):
        return result("do not use", beyond, **about)
    remarks = _qualified(record, goal, served) + _not_measured(record)
    gained = in_words.phrase(served, record.measurements)
    if paid := _paid(record, served):
        reasons = [f"{_price(paid, record, most)}: {gained}{remarks}" for most in (2, 1)]
        return result("use if", next((r for r in reasons if brief.count(r) <= brief.MOST_WORDS), reasons[-1]), **about)
    return result("use", f"{gained}, and quality is kept{remarks}", **about)


def _price(paid: Sequence[Measurement], record: Record, most: int) -> str:
    """Return the condition for a gain: the losses that must be acceptable; `most` are named, the others counted."""
    named = [in_words.phrase(m, record.measurements) for m in paid[:most]]
    more = f" (and {len(paid) - most} more)" if len(paid) > most else ""
    return f"{' and '.join(named)}{more} {'is' if len(paid) == 1 else 'are'} acceptable"


def _not_measured(record: Record) -> str:
    """Return the end of a sentence that says that the declared primary speed was not measured; empty where it was."""
    declared = record.primaries.get("performance")
    speeds = [m for m in record.measurements if declared and (m.metric, m.workload) == tuple(declared)]
    missing = speeds and all(m.verdict == "unavailable" for m in speeds)
    return f"; {speeds[0].workload}: not measured" if missing else ""


def _serving(record: Record, goal: Goal) -> Measurement | None:
    """Return the measurement that decides: of the first of the goal's metrics that is better, worse or equivalent on
    some workload; else the first inconclusive one, else the first known one.

    Among several workloads of that metric, the one that decides the run's verdict; if there is none, a better one,
    because a worse one then counts as its price.
    """
    known = _known(record, goal)
    measured = [m for m in known if m.provenance != "estimated"]
    decided = [m for m in measured if m.verdict in ("better", "worse", "equivalent")]
    if not decided:
        return next(iter([m for m in measured if m.verdict == "inconclusive"] or known), None)
    same = [m for m in decided if m.metric == decided[0].metric]
    carried = [m for m in same if (m.metric, m.workload) in _carriers(record)]
    return next(iter(carried or [m for m in same if m.verdict == "better"] or same))


def _known(record: Record, goal: Goal) -> list[Measurement]:
    """Return the measurements that serve a goal and have a ratio, the most important metric first."""
    members = [m for m in record.measurements if m.ratio and m.verdict != "invalid"]
    return [m for metric in GOALS[goal.name] for m in members if m.metric == metric]


def _carriers(record: Record) -> set[tuple[str, str]]:
    """Return the (metric, workload) of the measurements that decide the run's verdict, and of the declared ones."""
    return {(c.metric, c.workload) for c in record.verdict.carried_by.values()} | {*record.primaries.values()}


def _qualified(record: Record, goal: Goal, served: Measurement) -> str:
    """Return the end of a sentence that qualifies the deciding number: a more important metric of the goal that is
    undecided, and a gain of the same metric on another workload.
    """
    known = [m for m in _known(record, goal) if m.provenance != "estimated"]
    before = {id(m) for m in itertools.takewhile(lambda m: m is not served, known)}
    more = [m for m in known if id(m) in before or (m.metric, m.workload) in _carriers(record)]
    named = [m for m in more if m.verdict == "inconclusive"][:1]
    if served.verdict != "better":
        named += [m for m in known if m.metric == served.metric and m.verdict == "better"][:1]
    return "".join(f"; {in_words.phrase(m, record.measurements)}" for m in named)


def _never_judged(record: Record, served: Measurement) -> bool:
    """Return whether more effort would not help to judge a number: it is informative or estimated although the effort
    of the run is not a brief one.
    """
    unjudged = served.verdict == "informative" or served.provenance == "estimated"
    return unjudged and not settings.EFFORTS[record.effort].brief


def taken(record: Record, goal: str) -> float | None:
    """Return the largest measured number of bytes that a limit of this goal applies to; None where none was measured,
    or for a goal without limits.
    """
    metrics = LIMITED.get(goal, ())
    return max((m.optimized for m in record.measurements if m.metric in metrics and m.optimized), default=None)


def _beyond(record: Record, goal: Goal) -> str | None:
    """Return how a record exceeds the goal's limit in bytes; None where it does not."""
    assert goal.limit_bytes is not None
    if (reached := taken(record, goal.name)) and reached > goal.limit_bytes:
        limit = goal.written.partition("<=")[2] or quantity(goal.limit_bytes, "bytes")
        return f"takes {quantity(reached, 'bytes')}, more than {limit}"
    return None


def _paid(record: Record, served: Measurement) -> list[Measurement]:
    """Return the losses other than quality that come with a gain: the same metric on other workloads, losses that
    count, and primaries that got worse. Sorted explicitly, because a stored record lists its primaries alphabetically:
    the same metric first, then by dimension, in each the largest loss first.
    """
    if record.verdict.carried_by:
        named = {(m.metric, m.workload): m for m in record.measurements}
        pairs = [(c.metric, c.workload) for c in record.verdict.carried_by.values()]
        pairs += [(loss.metric, loss.workload) for loss in record.verdict.losses]
        known = [named[pair] for pair in pairs if pair in named]
    else:  # a record older than the primaries
        carriers = {name: primary.carrier(record.measurements, name)[0] for name in DIMENSIONS}
        known = [m for m in carriers.values() if m] + [m for m, _ in primary.losses(record.measurements, carriers)]
    same = [m for m in record.measurements if m.metric == served.metric and m.provenance != "estimated"]
    lost = [m for m in [*same, *known] if m.verdict == "worse" and m.dimension != "accuracy"]
    once = [m for at, m in enumerate(lost) if m is not served and all(m is not other for other in lost[:at])]
    return sorted(once, key=lambda m: (m.metric != served.metric, DIMENSIONS.index(m.dimension), gain(m)[0] or 1.0))


def _again(record: Record) -> tuple[str | None, float | None]:
    """Return the command that could decide more, the same run with more effort, and its estimated seconds: this run's,
    times the geometric mean of the increase in blocks and items.

    A run on a busy machine is repeated at the same effort, except a preview, whose few rounds are noisy on any machine.
    A run limited to some dimensions becomes a full one, of unknown duration, because without quality nothing is
    decided. Returns (None, None) for a full run on a quiet machine at the largest effort: repeating it adds nothing.
    """
    whole = not record.dimensions
    if record.dimensions:
        record = record.model_copy(update={"dimensions": None, "seconds": None})
    if why_busy(record.measurements) and record.effort != "preview":
        return reproduce.command(record), record.seconds
    if whole and record.effort == "thorough":
        return None, None
    more = {"standard": "thorough", "thorough": "thorough"}.get(record.effort, "standard")
    small, large = settings.EFFORTS[record.effort], settings.EFFORTS[more]
    factor = math.sqrt(large.blocks / small.blocks * large.items / small.items)
    seconds = None if record.seconds is None else record.seconds * factor
    return reproduce.command(record.model_copy(update={"effort": more})), seconds
