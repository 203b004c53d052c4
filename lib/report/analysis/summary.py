"""Summary of a run: its verdict in words, its decisions, six numbers, the machine's noise and load.

Uses the record alone; verdicts within a whole set are shown by the index. Knows no HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib.measure.metrics import process_variance
from lib.measure.metrics.busy import why_busy
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.decision import BUSY
from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import advice, headlines
from lib.report.analysis.advice import Advice
from lib.report.records.record import Record
from lib.report.records.setting import stack
from lib.report.records.verdicts import in_words, primary
from lib.report.text import brief
from lib.report.text.quantities import figures, quantity, share
from lib.report.text.sentence import subject
from lib.report.text.wording import signed

NUMBERS = 6
FIRST = 3  # of EXPECTED: these precede a gain that a decision rests on and the verdict does not name
# Metrics that readers expect, after the deciding measurement of each dimension.
EXPECTED = (
    "prefill_tokens_per_second", "decode_tokens_per_second", "f1_macro", "weights_bytes", "peak_tensor_bytes",
    "peak_memory_bytes", "retrieval_exact_match", "cpu_seconds_per_token", "decode_bytes_per_token",
)  # fmt: skip
CONTROL = "A/A"
PRICED = {"use if": "use at a price"}  # wording before a list of goals


@dataclass(frozen=True)
class Number:
    """A number on the first screen: its name, the change in words, interval or bound (`spread`), the values of both
    arms, the verdict with its sign, and the provenance.
    """

    name: str
    metric: str
    change: str
    spread: str
    arms: str
    state: str
    verdict: str
    provenance: str


def sentence(record: Record) -> str:
    """Return the verdict of a run in sentences of at most 25 words; an empty stack is mentioned first."""
    first = stack.nothing_pays(record) if record.status == "ok" and not busy(record) else ""
    verdict = in_words.of_record(record)
    return f"{first[:1].upper()}{first[1:]}. {verdict}" if first else verdict


def decisions(record: Record, keep: float = advice.KEEP) -> list[Advice]:
    """Return the advice that follows from this run alone, one entry per goal."""
    goals = [advice.Goal(name) for name in advice.GOALS]
    by_goal = {row.goal: row for row in advice.advise([record], record.model, goals, keep)}
    return [by_goal[name] for name in advice.GOALS]


def decision(record: Record) -> str:
    """Return the decisions as a sentence: `Use for latency, size; undecided for memory.` A gain in speed that the
    verdict in words does not mention is named: `Use for latency (time per output token).`
    """
    rows = decisions(record)
    names = {goal: _name(m, record) for goal, m in _unnamed(record).items()}
    text = _in_a_sentence(rows, names)
    return text if brief.count(text) <= brief.MOST_WORDS else _in_a_sentence(rows, {})


def _in_a_sentence(rows: Sequence[Advice], names: Mapping[str, str]) -> str:
    """Return decisions as a sentence; `names` maps a goal to a remark in parentheses after it."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.decision, []).append(row.goal)
    if [*groups] == ["not applicable"]:
        return "Not applicable."
    ordered = [name for name in advice.ORDER if name in groups]
    text = "; ".join(f"{PRICED.get(name, name)} for {_listed(groups[name], names)}" for name in ordered)
    return f"{text[:1].upper()}{text[1:]}."


def _listed(goals: Sequence[str], names: Mapping[str, str]) -> str:
    """Return goals separated by commas, each with its remark in parentheses unless the next goal has the same one."""
    following = [*(names.get(goal) for goal in goals[1:]), None]
    shown = [names.get(goal) if names.get(goal) != after else None for goal, after in zip(goals, following)]
    return ", ".join(f"{goal} ({name})" if name else goal for goal, name in zip(goals, shown))


def _name(measurement: Measurement, record: Record) -> str:
    """Return the name of a measurement, with its workload where its metric is judged for several."""
    name = subject(measurement)
    return f"{name}, {measurement.workload}" if in_words.notes(measurement, record.measurements) else name


def _unnamed(record: Record) -> dict[str, Measurement]:
    """Return goal → the gain in speed that its recommendation rests on, if the verdict in words does not name it."""
    verdict = in_words.of_record(record).lower()
    rows = [row for row in decisions(record) if row.decision in ("use", "use if")]
    gains = {row.goal: row.evidence.measurement for row in rows if row.evidence}
    speeds = {goal: m for goal, m in gains.items() if m.dimension == "performance"}
    return {goal: m for goal, m in speeds.items() if in_words.phrase(m, record.measurements).lower() not in verdict}


def _unnamed_loss(record: Record) -> list[Measurement]:
    """Return the first lost score that the verdict in words does not name, as a list; empty where there is none."""
    verdict = in_words.of_record(record).lower()
    lost = [m for m in record.measurements if m.dimension == "accuracy" and m.verdict == "not_maintained"]
    return [m for m in lost if in_words.phrase(m, record.measurements).lower() not in verdict][:1]


def chosen(record: Record) -> list[Measurement]:
    """Return the NUMBERS measurements that a reader should see first, in the order of the dimensions."""
    carriers = [headlines.members(record, name)[:1] for name in DIMENSIONS]
    listed = [m for members in carriers for m in members]
    expected = [m for metric in EXPECTED for m in record.measurements if m.metric == metric]
    first = [m for m in expected if m.metric in EXPECTED[:FIRST]]
    rest = [*_unnamed_loss(record), *first, *_unnamed(record).values(), *expected]
    rest += [m for m in record.measurements if m.verdict not in primary.SILENT and m.metric not in primary.TWINS]
    for member in rest:
        known = {(m.metric, m.workload) for m in listed}
        if len(listed) < NUMBERS and (member.metric, member.workload) not in known and member.optimized is not None:
            listed.append(member)
    return sorted(listed, key=lambda m: DIMENSIONS.index(m.dimension))


def numbers(record: Record) -> list[Number]:
    """Return the numbers of a run for the first screen, at most NUMBERS."""
    measurements = chosen(record)
    names = [subject(m) for m in measurements]
    return [
        number(m, f"{name}, {m.workload}" if names.count(name) > 1 else name) for m, name in zip(measurements, names)
    ]


def number(measurement: Measurement, name: str) -> Number:
    """Return a measurement formatted for the first screen."""
    m, judged_as = measurement, state(measurement)
    arms = f"{quantity(m.baseline, m.unit)} → {quantity(m.optimized, m.unit)}" if m.optimized is not None else ""
    return Number(name, m.metric, brief.value(m), brief.spread(m), arms, judged_as, signed(judged_as), m.provenance)


def state(measurement: Measurement) -> str:
    """Return a measurement's verdict; that of an estimate is always `informative`."""
    estimated = measurement.provenance == "estimated" and measurement.verdict in headlines.JUDGED
    return "informative" if estimated else measurement.verdict


def machine(record: Record) -> list[tuple[str, str]]:
    """Return the machine's noise and load as (label, text): the noise floors, the A/A control (a copy of the baseline
    against it, or, without room for a copy, the baseline against itself), the load, and jobs side by side.
    """
    declared = record.primaries.get("performance", ("", ""))[0]
    floors = _three(_largest_floors(record.measurements), declared)
    named = (f"{subject(m)} {share(m.noise_floor)}{in_words.notes(m, record.measurements)}" for m in floors)
    rows = [("Noise floor", ", ".join(named))]
    copies = [m for c in record.controls if c.name == CONTROL for m in c.measurements if m.ratio]
    rates = _three([m for m in copies if m.metric.endswith("tokens_per_second")], declared)
    remarks = " ".join(filter(None, [str(record.details.get("control")), *(m.reason for m in rates)]))
    control = "Baseline again, no copy" if process_variance.SAME_OBJECT in remarks else "Copy of the baseline"
    rows += [(control, ", ".join(f"{subject(m)} {brief.number(m)}" for m in rates))]
    load = record.environment.get("load_at_start")
    rows += [("Load at start", figures(float(load), 2) if isinstance(load, (int, float)) else "")]
    disturbed = _disturbed(record.measurements)
    rows += [("Disturbed pairs", str(disturbed) if disturbed else "")]
    if record.process and record.process.jobs_side_by_side:
        rows += [("Jobs side by side", str(record.process.jobs_side_by_side))]
    return [(name, value) for name, value in rows if value]


def _largest_floors(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return, for each measured rate, the workload with the largest noise floor: it may withhold every verdict."""
    largest: dict[str, Measurement] = {}
    for m in measurements:
        if m.noise_floor is not None and m.metric.endswith("_per_second") and m.provenance == "measured":
            before = largest.setdefault(m.metric, m)
            largest[m.metric] = m if m.noise_floor > (before.noise_floor or 0.0) else before
    return [*largest.values()]


def _disturbed(measurements: Sequence[Measurement]) -> int:
    """Return how many pairs were disturbed and kept; metrics timed together (a rate and its latency) count once."""
    by_workload: dict[str, int] = {}
    for m in measurements:
        by_workload[m.workload] = max(by_workload.get(m.workload, 0), m.disturbed or 0)
    return sum(by_workload.values())


def _three(measurements: Sequence[Measurement], declared: str) -> list[Measurement]:
    """Return the first measurement of each metric, at most three, the metric `declared` first."""
    first = [*{m.metric: m for m in reversed(measurements)}.values()][::-1]
    return sorted(first, key=lambda m: m.metric != declared)[:3]


def busy(record: Record) -> str:
    """Return a sentence on why timings are not judged; empty where the machine was quiet. The few rounds of a preview
    exceed the noise limit on any machine.
    """
    reason = why_busy(record.measurements)
    label = f"{short_or_busy(record)}, nothing timed is judged".capitalize()
    return in_words.without_result(label, reason.removeprefix(f"{BUSY}: ")) if reason else ""


def short_or_busy(record: Record) -> str:
    """Return `too short` or `busy machine`, the reason why timings are not judged; empty where they are."""
    if not why_busy(record.measurements):
        return ""
    return "too short" if record.effort == in_words.PREVIEW else "busy machine"
