"""Scores of unmodified models next to published ones, with the difference in standard errors.

A few points between two protocols are normal (prompt, normalisation, quantized weights); a difference of many standard
errors under the same protocol means that something is measured wrongly. The published scores are in
`published_scores.json`, each with its source. Independent of how a score is measured.
"""

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lib.measure.metrics.measurement import Measurement
from lib.report.records.record import Record
from lib.report.text.wording import label

PATH = Path(__file__).with_name("published_scores.json")
COLUMNS = (
    "model", "task", "score", "here", "items", "standard error", "published", "difference in standard errors", "source",
)  # fmt: skip


class PublishedScore(NamedTuple):
    """A published score of a model, in [0, 1], and its source."""

    model: str
    task: str
    metric: str
    score: float
    source: str


@cache
def scores() -> tuple[PublishedScore, ...]:
    """Return the published scores, in the order of the file."""
    return tuple(PublishedScore(**entry) for entry in json.loads(PATH.read_text(encoding="utf-8")))


def standard_error(share: float, n: int) -> float:
    """Return the standard error of a share of n items, √(p(1 − p) ÷ n)."""
    return math.sqrt(share * (1 - share) / n)


def table(records: Iterable[Record]) -> pd.DataFrame:
    """Return a row (COLUMNS) per published score of a model that was measured.

    All records of a model score the same baseline; the record with the most items is used.
    """
    measured: dict[tuple[str, str, str], Measurement] = {}
    for record in records:
        for member in record.measurements:
            key = (record.model, member.workload, member.metric)
            if member.baseline is not None and (member.n or 0) > (measured[key].n or 0 if key in measured else 0):
                measured[key] = member
    lines = []
    for known in scores():
        measurement = measured.get((known.model, known.task, known.metric))
        if measurement is None or measurement.baseline is None or not measurement.n:
            continue
        error = standard_error(measurement.baseline, measurement.n)
        apart = (measurement.baseline - known.score) / error if error else None
        line = (
            known.model,
            known.task,
            label(known.metric),
            measurement.baseline,
            measurement.n,
            error,
            known.score,
            apart,
        )
        lines.append((*line, known.source))
    return pd.DataFrame(lines, columns=list(COLUMNS))
