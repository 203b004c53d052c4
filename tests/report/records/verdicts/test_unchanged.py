"""A run that chose to change nothing measures a copy, so its timings claim nothing."""

import pytest

from lib.report.records import record
from lib.report.records.verdicts.unchanged import NOTHING_CHANGED
from tests.report import samples

STEP = {"optimization": "structured_pruning", "knobs": {"ratio": 0.2}}


def _built(details, gain: float = 0.9, **changed) -> record.Record:
    run = samples.whole("automl_components", "qwen3-vl-2b", gain=gain)
    measured = [m.model_copy(update=changed) if m.noise_floor else m for m in run.measurements]
    return record.build(
        *("automl_components", "qwen3-vl-2b", "proxy", "quick", {}),
        measured,
        details=details,
        primaries=samples.PRIMARIES,
    )


@pytest.mark.parametrize("name", ["stack", "order"])
def test_timings_of_an_empty_stack_are_shown_but_not_judged(name):
    """Planted: a copy that was timed 10 % slower; one in twenty is slower by chance, by less."""
    run = _built({name: record.labelled([], "derived", "chosen by a search")})
    timed = [m for m in run.measurements if m.noise_floor is not None]
    assert timed and {m.verdict for m in timed} == {"informative"} and {m.reason for m in timed} == {NOTHING_CHANGED}
    assert all(m.ci for m in timed), "the interval is still shown"
    assert run.verdict.performance == "inconclusive" and NOTHING_CHANGED[:30] in run.verdict.reasons["performance"]
    counted = next(m for m in run.measurements if m.metric == "weights_bytes")
    assert counted.verdict != "informative" and run.verdict.accuracy == "maintained"


@pytest.mark.parametrize("details", [{}, {"stack": record.labelled([STEP], "derived", "chosen by a search")}])
def test_a_stack_that_changes_something_is_judged(details):
    assert _built(details).verdict.performance == "worse"


def test_a_busy_machine_is_reported_first():
    busy = {"noise_floor": 0.2, "reason": "two copies differ by 20 %"}
    run = _built({"stack": record.labelled([], "derived", "chosen by a search")}, **busy)
    assert {m.verdict for m in run.measurements if m.noise_floor} == {"inconclusive"}
