"""Tests that the planted experiments can fail: they receive results that they do not expect."""

import json
import math
import queue

import pytest

from lib.measure.metrics.decision import BUSY
from tests.measure import planted


def _row(metric: str, optimized: float | None, verdict: str) -> dict:
    """Return a peak measurement as JSON, for a baseline of 100 MB."""
    baseline = None if optimized is None else 100.0 * 2**20
    return {"metric": metric, "baseline": baseline, "optimized": optimized, "verdict": verdict, "reason": "planted"}


@pytest.mark.parametrize(
    ("added", "verdict", "holds"),
    [
        (0.0, "equivalent", True),
        (0.0, "informative", True),
        (0.0, "inconclusive", False),
        (0.0, "worse", False),
        (1.5, "equivalent", False),
        (None, "unavailable", False),
    ],
)
def test_zero_held_memory_is_equivalent_and_a_missing_peak_is_not_a_success(monkeypatch, added, verdict, holds):
    def repeat(arm, times, *, megabytes, **options):
        optimized = None if added is None else (100.0 + megabytes + added) * 2**20
        return [[_row("peak_memory_bytes", optimized, verdict), _row("load_seconds", 1.0, "informative")]]

    monkeypatch.setattr(planted, "repeat", repeat)
    findings = planted.held_memory(planted.SHORT, "a model")
    assert len(findings) == 4 and findings[0].planted == "0 MB, peak_memory_bytes"
    assert findings[0].holds == holds


def test_unmeasured_quality_is_not_identical(monkeypatch):
    row = {"metric": "accuracy", "dimension": "accuracy", "baseline": None, "optimized": None, "verdict": "unavailable"}
    monkeypatch.setattr(planted, "repeat", lambda *_, **__: [[row]])
    assert not planted.nothing_removed(planted.SHORT, "a model")[-1].holds
    monkeypatch.setattr(planted, "repeat", lambda *_, **__: [[row | {"baseline": 0.5, "optimized": 0.5}]])
    assert planted.nothing_removed(planted.SHORT, "a model")[-1].holds


@pytest.mark.parametrize(("bias", "holds"), [(0.0, True), (0.004, True), (0.02, False), (-0.02, False)])
def test_a_bias_common_to_all_repetitions_is_found_when_nothing_is_planted(monkeypatch, bias, holds):
    """Previously the mean of all repetitions served as the truth, so every interval held it and hid a common bias."""

    def repeat(arm, times, **options):
        if arm == "work_for":
            return [[]]
        return [[_rate(name, bias + 0.001 * (at % 3 - 1)) for name in ("prefill", "decode")] for at in range(times)]

    monkeypatch.setattr(planted, "repeat", repeat)
    found = [finding for finding in planted.more_work(planted.LONG, "a model") if "mean of all" in finding.planted]
    assert len(found) == 4 and {finding.holds for finding in found} == {holds}


def _rate(workload: str, effect: float) -> dict:
    """Return a rate measurement as JSON; `effect` is a logarithm."""
    ends = [math.exp(effect - 0.01), math.exp(effect + 0.01)]
    about = {"workload": workload, "unit": "tokens/s", "verdict": "inconclusive"}
    return about | {"ratio": math.exp(effect), "ci": ends}


def test_only_repetitions_on_a_busy_machine_are_repeated(monkeypatch):
    taken = []

    def repetition(request, attempt):
        number = json.loads(request)["number"]
        taken.append((number, attempt))
        is_busy = number == 1 or (number == 0 and attempt == 0)
        return [{"reason": f"{BUSY}: planted" if is_busy else None, "attempt": attempt}]

    monkeypatch.setattr(planted, "_repetition", repetition)
    monkeypatch.setattr(planted, "JOBS", queue.Queue())
    planted.JOBS.put({0})
    assert [rows[0]["attempt"] for rows in planted.repeat("slowed", 3)] == [1, planted.ATTEMPTS - 1, 0]
    assert taken == [(0, 0), (0, 1), *((1, attempt) for attempt in range(planted.ATTEMPTS)), (2, 0)]
    assert [rows[0]["attempt"] for rows in planted.repeat("slowed", 3, quiet=False)] == [0, 0, 0]
