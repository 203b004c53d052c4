"""The index's first table: a row per run with its quality, prefill, decode and weights, and the decision for every goal
and every margin of quality.

The decisions come from `lib.report.analysis.advice`, computed here for several margins, so that the page needs no rules
of its own and works from disk. Without JavaScript every goal at the default margin is shown.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.measure.metrics.measurement import Measurement
from lib.report.analysis import advice, summary
from lib.report.analysis.advice import Advice
from lib.report.pages.first_screen import DECISIONS, shown_flip
from lib.report.records.record import Record
from lib.report.text import brief, commands
from lib.report.text.quantities import about, quantity
from lib.report.text.wording import SIGNS, title, words

MARGINS = (0.01, 0.02, 0.05, 0.10)
QUALITY = ("f1_macro", "retrieval_exact_match", "accuracy", "perplexity")
COLUMNS = {
    "quality": QUALITY,
    "prefill": ("prefill_tokens_per_second",),
    "decode": ("decode_tokens_per_second",),
    "weights": ("weights_bytes",),
}
Flips = Mapping[str, Mapping[str, tuple[str, str]]]


def rows(records: Sequence[Record], flips: Flips, folder: Path) -> list[dict[str, Any]]:
    """Return a row per record, sorted by model and by the decision for the first goal at the default margin."""
    lines = []
    for model in sorted({record.model for record in records}):
        own = {record.optimization: record for record in records if record.model == model}
        by_name = _decisions([*own.values()], model, commands.out_of(folder))
        lines += [_row(own[name], by_name[name], flips.get(own[name].stem, {}), folder) for name in by_name]
    return lines


def _decisions(records: Sequence[Record], model: str, out: str | None) -> dict[str, list[dict[str, Any]]]:
    """Return optimization → its decisions, the best optimization first; decisions equal at several margins are merged.

    `out` is the DIR of `--out DIR` in the commands (`lib.report.text.commands`).
    """
    goals = [advice.Goal(name) for name in advice.GOALS]
    at_margin = {keep: advice.advise(records, model, goals, keep) for keep in MARGINS}
    order = [row.optimization for row in at_margin[advice.KEEP] if row.goal == goals[0].name]
    return {
        name: [line for goal in goals for line in _merged(name, goal.name, at_margin, out)]
        for name in dict.fromkeys(order)
    }


def _merged(name: str, goal: str, at_margin: Mapping[float, Sequence[Advice]], out: str | None) -> list[dict[str, Any]]:
    """Return the decisions on one optimization for one goal, each with the margins that it applies to."""
    lines: dict[tuple, dict[str, Any]] = {}
    for keep, advised in at_margin.items():
        row = next(row for row in advised if (row.optimization, row.goal) == (name, goal))
        line = lines.setdefault((row.decision, row.reason), _decision(row, out))
        line["keeps"].append(f"{keep:g}")
    return [line | {"keeps": " ".join(line["keeps"])} for line in lines.values()]


def _decision(row: Advice, out: str | None) -> dict[str, Any]:
    return {
        "goal": row.goal,
        "keeps": [],
        "decision": row.decision,
        "class": DECISIONS[row.decision],
        "reason": row.reason,
        "command": commands.leading_to(row.command, out),
        "took": about(row.seconds) if row.command else "",
        "evidence": row.evidence.text if row.evidence else "",
        "limited": _limited(row),
        "order": advice.ORDER.index(row.decision) - min(row.gain, 1000.0) / 1001,  # the largest gain first
    }


def _limited(row: Advice) -> dict[str, Any] | None:
    """Return the bytes that a reader's limit is compared with, and the decision if they exceed it; None where no limit
    would change the decision.
    """
    if row.goal not in advice.LIMITED or row.decision not in ("use", "use if") or row.evidence is None:
        return None
    reached = advice.taken(row.evidence.record, row.goal)
    decision: advice.Decision = "undecided" if reached is None else "do not use"
    shown = {"decision": decision, "class": DECISIONS[decision], "order": advice.ORDER.index(decision)}
    if reached is None:
        text = "how much it takes was not measured, so the limit cannot be checked"
        return shown | {"bytes": "", "text": text}
    return shown | {"bytes": f"{reached:.0f}", "text": f"takes {quantity(reached, 'bytes')}, more than the limit"}


def _row(
    record: Record, decided: list[dict[str, Any]], changed: Mapping[str, tuple[str, str]], folder: Path
) -> dict[str, Any]:
    page = f"{record.stem}.html"
    now = record.verdict.words()
    return {
        "optimization": title(record.optimization),
        "model": record.model,
        "href": page if (folder / page).is_file() else f"#{record.stem}",
        "effort": record.effort,
        "busy": summary.short_or_busy(record),
        "flips": [
            shown_flip(name, before, day, now[name])
            for name, (before, day) in changed.items()
            if before != now[name]  # not if the set's correction restores the earlier verdict
        ],
        "status": words(record.status) if record.status != "ok" else "",
        "cells": [_cell(name, _measured(record, metrics)) for name, metrics in COLUMNS.items()],
        "decisions": decided,
    }


def _measured(record: Record, metrics: Sequence[str]) -> Measurement | None:
    """Return the measurement that a column shows: for quality an invalid one if the verdict is invalid, else the
    deciding one if known, else the first available.
    """
    if metrics is QUALITY and record.verdict.accuracy == "invalid":
        return next((m for m in record.measurements if m.dimension == "accuracy" and m.verdict == "invalid"), None)
    carrier = record.verdict.carried_by.get("accuracy") if metrics is QUALITY else None
    pairs = {(m.metric, m.workload): m for m in record.measurements}
    if carrier and (carrier.metric, carrier.workload) in pairs:
        return pairs[carrier.metric, carrier.workload]
    known = [m for metric in metrics for m in record.measurements if m.metric == metric and m.optimized is not None]
    return known[0] if known else None


def _cell(name: str, measurement: Measurement | None) -> dict[str, Any]:
    """Return a cell: the change in words with its interval or bound, its verdict, and the value that it sorts by."""
    if measurement is None:
        return {"name": name, "text": "–", "spread": "", "state": "unavailable", "sign": "", "verdict": "", "value": ""}
    text = brief.phrase(measurement) if name == "quality" else brief.value(measurement)
    turn, ratio = 1 if measurement.higher_is_better else -1, measurement.ratio
    value = "" if ratio is None else (ratio - 1) * turn  # a ratio of 0 is the largest loss, not a missing one
    return {
        "name": name,
        "text": text,
        "spread": brief.spread(measurement),
        "state": measurement.verdict,
        "sign": SIGNS[measurement.verdict],
        "verdict": words(measurement.verdict),
        "value": f"{value:.6g}" if value != "" else "",
    }
