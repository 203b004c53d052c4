"""A run for a reader in a hurry: its verdict in words, its decisions, six numbers, the machine's noise and load.

Everything is taken from the record alone; verdicts within a whole set belong to the index. Knows no HTML.
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
FIRST = 3  # of EXPECTED: what stands before a gain that a decision rests on and the verdict does not name
# What a reader expects to find, after what carries each dimension.
EXPECTED = (
    "prefill_tokens_per_second", "decode_tokens_per_second", "f1_macro", "weights_bytes", "peak_tensor_bytes",
    "peak_memory_bytes", "retrieval_exact_match", "cpu_seconds_per_token", "decode_bytes_per_token",
)  # fmt: skip
CONTROL = "A/A"
PRICED = {"use if": "use at a price"}  # as it is said before a list of goals


@dataclass(frozen=True)
class Number:
    """A number as the first screen shows it: its name, the change in words, interval or bound, both arms, the verdict
    with its sign, and where it comes from.
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
    """Return the verdict of a run in sentences of at most 25 words; where its stack is empty, that first."""
    first = stack.nothing_pays(record) if record.status == "ok" and not busy(record) else ""
    verdict = in_words.of_record(record)
    return f"{first[:1].upper()}{first[1:]}. {verdict}" if first else verdict


def decisions(record: Record, keep: float = advice.KEEP) -> list[Advice]:
    """Return what this run alone advises, goal by goal."""
    goals = [advice.Goal(name) for name in advice.GOALS]
    by_goal = {row.goal: row for row in advice.advise([record], record.model, goals, keep)}
    return [by_goal[name] for name in advice.GOALS]


def decision(record: Record) -> str:
    """Return the decisions as a sentence: `Use for latency, size; undecided for memory.` A gain in speed that the
    verdict in words does not name is named: `Use for latency (time per output token).`
    """
    rows = decisions(record)
    names = {goal: _name(m, record) for goal, m in _unnamed(record).items()}
    text = _in_a_sentence(rows, names)
    return text if brief.count(text) <= brief.MOST_WORDS else _in_a_sentence(rows, {})


def _in_a_sentence(rows: Sequence[Advice], names: Mapping[str, str]) -> str:
    """Return decisions as a sentence; `names`: what stands in parentheses after a goal, once for all that share it."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.decision, []).append(row.goal)
    if [*groups] == ["not applicable"]:
        return "Not applicable."
    ordered = [name for name in advice.ORDER if name in groups]
    text = "; ".join(f"{PRICED.get(name, name)} for {_listed(groups[name], names)}" for name in ordered)
    return f"{text[:1].upper()}{text[1:]}."


def _listed(goals: Sequence[str], names: Mapping[str, str]) -> str:
    """Return goals in a row, each with its name in parentheses unless the next one has the same."""
    following = [*(names.get(goal) for goal in goals[1:]), None]
    shown = [names.get(goal) if names.get(goal) != after else None for goal, after in zip(goals, following)]
    return ", ".join(f"{goal} ({name})" if name else goal for goal, name in zip(goals, shown))


def _name(measurement: Measurement, record: Record) -> str:
    """Return the name of a measurement, with its workload where its metric is judged for several."""
    name = subject(measurement)
    return f"{name}, {measurement.workload}" if in_words.notes(measurement, record.measurements) else name


def _unnamed(record: Record) -> dict[str, Measurement]:
    """Return goal → the gain in speed for which a run is recommended, where its verdict in words does not name that."""
    verdict = in_words.of_record(record).lower()
    rows = [row for row in decisions(record) if row.decision in ("use", "use if")]
    gains = {row.goal: row.evidence.measurement for row in rows if row.evidence}
    speeds = {goal: m for goal, m in gains.items() if m.dimension == "performance"}
    return {goal: m for goal, m in speeds.items() if in_words.phrase(m, record.measurements).lower() not in verdict}


def _unnamed_loss(record: Record) -> list[Measurement]:
    """Return the first score that was lost and that the verdict in words does not name; empty where there is none."""
    verdict = in_words.of_record(record).lower()
    lost = [m for m in record.measurements if m.dimension == "accuracy" and m.verdict == "not_maintained"]
    return [m for m in lost if in_words.phrase(m, record.measurements).lower() not in verdict][:1]


def chosen(record: Record) -> list[Measurement]:
    """Return the six measurements that a reader should see first, in the order of the dimensions."""
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
    """Return six numbers of a run, fewer where it has fewer."""
    measurements = chosen(record)
    names = [subject(m) for m in measurements]
    return [
        number(m, f"{name}, {m.workload}" if names.count(name) > 1 else name) for m, name in zip(measurements, names)
    ]


def number(measurement: Measurement, name: str) -> Number:
    """Return a measurement as the first screen shows it."""
    m, judged_as = measurement, state(measurement)
    arms = f"{quantity(m.baseline, m.unit)} → {quantity(m.optimized, m.unit)}" if m.optimized is not None else ""
    return Number(name, m.metric, brief.value(m), brief.spread(m), arms, judged_as, signed(judged_as), m.provenance)


def state(measurement: Measurement) -> str:
    """Return a measurement's verdict; an estimate is never judged."""
    estimated = measurement.provenance == "estimated" and measurement.verdict in headlines.JUDGED
    return "informative" if estimated else measurement.verdict


def machine(record: Record) -> list[tuple[str, str]]:
    """Return the machine's noise and load: how far a copy of the baseline lay from it (or, where there was no room for
    one, the baseline from itself), the noise floors, the load, and jobs side by side.
    """
    declared = record.primaries.get("performance", ("", ""))[0]
    floors = _three(_largest_floors(record.measurements), declared)
    named = (f"{subject(m)} {share(m.noise_floor)}{in_words.notes(m, record.measurements)}" for m in floors)
    rows = [("Noise floor", ", ".join(named))]
    copies = [m for c in record.controls if c.name == CONTROL for m in c.measurements if m.ratio]
    rates = _three([m for m in copies if m.metric.endswith("tokens_per_second")], declared)
    said = " ".join(filter(None, [str(record.details.get("control")), *(m.reason for m in rates)]))
    what = "Baseline once more, no copy" if process_variance.SAME_OBJECT in said else "Copy of the baseline"
    rows += [(what, ", ".join(f"{subject(m)} {brief.number(m)}" for m in rates))]
    load = record.environment.get("load_at_start")
    rows += [("Load at start", figures(float(load), 2) if isinstance(load, (int, float)) else "")]
    disturbed = _disturbed(record.measurements)
    rows += [("Disturbed pairs", str(disturbed) if disturbed else "")]
    if record.process and record.process.jobs_side_by_side:
        rows += [("Jobs side by side", str(record.process.jobs_side_by_side))]
    return [(name, value) for name, value in rows if value]


def _largest_floors(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return of each measured rate the workload with the largest noise floor: what may withhold every verdict."""
    largest: dict[str, Measurement] = {}
    for m in measurements:
        if m.noise_floor is not None and m.metric.endswith("_per_second") and m.provenance == "measured":
            before = largest.setdefault(m.metric, m)
            largest[m.metric] = m if m.noise_floor > (before.noise_floor or 0.0) else before
    return [*largest.values()]


def _disturbed(measurements: Sequence[Measurement]) -> int:
    """Return how many pairs were disturbed and kept; what was timed together (a rate and its latency) counts once."""
    by_workload: dict[str, int] = {}
    for m in measurements:
        by_workload[m.workload] = max(by_workload.get(m.workload, 0), m.disturbed or 0)
    return sum(by_workload.values())


def _three(measurements: Sequence[Measurement], declared: str) -> list[Measurement]:
    """Return the first measurement of each metric, that of the metric `declared` first, three at most."""
    first = [*{m.metric: m for m in reversed(measurements)}.values()][::-1]
    return sorted(first, key=lambda m: m.metric != declared)[:3]


def busy(record: Record) -> str:
    """Return why nothing timed is judged, as a sentence; empty where the machine was quiet. A preview's few rounds
    scatter beyond the limit on any machine.
    """
    reason = why_busy(record.measurements)
    label = f"{short_or_busy(record)}, nothing timed is judged".capitalize()
    return in_words.without_result(label, reason.removeprefix(f"{BUSY}: ")) if reason else ""


def short_or_busy(record: Record) -> str:
    """Return in two words why nothing timed is judged; empty where something is."""
    if not why_busy(record.measurements):
        return ""
    return "too short" if record.effort == in_words.PREVIEW else "busy machine"
