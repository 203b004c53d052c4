"""The verdict of a run in sentences of at most 25 words: the primary measurement of each dimension, other losses, and
what was not measured.

"Prefill 19 % faster, decode 13 % faster, answers unchanged, weights 26 % smaller." Intervals and bounds are left to
tables and figures. Takes the deciding measurements and the losses as given (`lib.report.records.verdicts.primary`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lib.measure.metrics.busy import why_busy, withhold_if_busy
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.metrics.measurement import Measurement
from lib.report.records.verdicts import primary
from lib.report.text import brief, sentence
from lib.report.text.sentence import clipped

PREVIEW = "preview"
MOST_LOSSES = 3  # named in the sentence; the verdict lists all of them
DECODE = "decode_tokens_per_second"
NAMED = ("better", "worse", "equivalent", "inconclusive")


def sentences(
    measurements: Sequence[Measurement],
    carriers: Mapping[str, Measurement | None],
    losses: Sequence[Measurement],
    reasons: Mapping[str, str],
    requested: Sequence[str] | None = None,
    effort: str | None = None,
) -> str:
    """Return the verdict of a run in words.

    `carriers` maps a dimension to the measurement that decides it, `reasons` to why there is none. `requested` are the
    dimensions that were to be measured (None: all). A noise floor that is too high is blamed on the machine, at effort
    preview on the small number of rounds.
    """
    wanted = [name for name in DIMENSIONS if name in (requested or DIMENSIONS)]
    broken = next((m for m in measurements if m.dimension == "accuracy" and m.verdict == "invalid"), None)
    parts = []
    if broken:
        parts += [without_result("Invalid, the output has degenerated and no gain is shown", broken.reason)]
        wanted = [name for name in wanted if name == "resources"]
    mentioned = [m for name in wanted for m in _of_dimension(name, measurements, carriers[name], losses)]
    parts += [brief.joined(phrase(m, measurements) for m in mentioned)] if mentioned else []
    lost = [phrase(m, measurements) for m in losses if m.dimension in wanted]
    more = [f"{len(lost) - MOST_LOSSES} more lost"] if len(lost) > MOST_LOSSES else []
    parts += [brief.joined([*lost[:MOST_LOSSES], *more], "But")] if lost else []
    silent = [name for name in wanted if carriers[name] is None]
    parts += [_silent(name, measurements, reasons.get(name, "nothing was measured")) for name in silent]
    short = "The run was too short" if effort == PREVIEW else "The machine was busy"
    parts += [f"{short}: nothing timed is judged."] if why_busy(measurements) else []
    left_out = [name for name in DIMENSIONS if name not in (requested or DIMENSIONS)]
    parts += [f"Not requested: {', '.join(left_out)}."] if left_out else []
    return " ".join(parts)


def phrase(measurement: Measurement, beside: Sequence[Measurement]) -> str:
    """Return a measurement as a phrase with its `notes`. Where the answers to the tasks are unchanged, add how many
    other answers differ, if any (metric `same_answers` among `beside`).
    """
    text = brief.phrase(measurement) + notes(measurement, beside)
    if sentence.same_answers(measurement):
        elsewhere = [(m.n or 0, m.optimized, m.workload) for m in beside if m.metric == "same_answers"]
        differing = [(round(n * (1 - same)), n, workload) for n, same, workload in elsewhere if same is not None]
        text += "".join(f", {count} of {n} others differ ({workload})" for count, n, workload in differing if count)
    return text


def notes(measurement: Measurement, beside: Sequence[Measurement]) -> str:
    """Return notes in parentheses: the workload, if the metric is judged for several, and `estimated`; may be empty."""
    judged = sum(m.metric == measurement.metric and m.verdict not in primary.SILENT for m in beside)
    words = [measurement.workload] if judged > 1 else []
    words += ["estimated"] if measurement.provenance == "estimated" else []
    return f" ({', '.join(words)})" if words else ""


def without_result(what: str, reason: str | None) -> str:
    """Return the sentence `what: reason`, the reason cut so that it has at most MOST_WORDS words."""
    text = f"{what}: {brief.clipped(clipped(reason), brief.MOST_WORDS - brief.count(what))}"
    return text if text.endswith("…") else f"{text}."


def _of_dimension(
    name: str, measurements: Sequence[Measurement], carrier: Measurement | None, losses: Sequence[Measurement]
) -> list[Measurement]:
    """Return the carrier of a dimension; for a prefill carrier also the decode rate, which readers expect."""
    if carrier is None:
        return []
    lost = {id(loss) for loss in losses}
    beside = [m for m in measurements if m.metric == DECODE and m.verdict in NAMED and id(m) not in lost]
    return [carrier, *beside[:1]] if name == "performance" and carrier.metric.startswith("prefill") else [carrier]


def _silent(name: str, measurements: Sequence[Measurement], reason: str) -> str:
    """Return the sentence on a dimension without a carrier: not judged, not exercised or unavailable, and why."""
    verdicts = {m.verdict for m in measurements if m.dimension == name}
    word = "not judged" if verdicts - {"unavailable", "invalid"} else "unavailable"
    word = "not exercised" if "not_exercised" in verdicts else word
    return without_result(f"{name.capitalize()} {word}", reason)


def of_record(record: Any) -> str:
    """Return the verdict of a stored record in words, computed from its measurements, not from its stored sentence.

    `record` is a `lib.report.records.record.Record`. Records older than the primaries name no carrier: the first
    measurement that can carry a dimension is used.
    """
    if record.status != "ok":
        what = "Failed, so nothing is claimed" if record.status == "failed" else "Not applicable"
        return without_result(what, record.reason)
    members = withhold_if_busy(list(record.measurements))  # not yet done in records of an earlier schema
    named = {(m.metric, m.workload): m for m in members}
    carried = record.verdict.carried_by
    carriers: dict[str, Measurement | None] = {
        name: named.get((carried[name].metric, carried[name].workload))
        if name in carried
        else (None if carried else primary.carrier(members, name)[0])
        for name in DIMENSIONS
    }
    losses = [named[pair] for loss in record.verdict.losses if (pair := (loss.metric, loss.workload)) in named]
    if not carried:
        losses = [m for m, _ in primary.losses(members, carriers)]
    return sentences(members, carriers, losses, record.verdict.reasons, record.dimensions, record.effort)
