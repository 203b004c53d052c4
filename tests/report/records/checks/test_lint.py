"""No number without a label and a source."""

import pytest

from lib.report.records import record
from lib.report.records.checks.lint import lint
from tests.report import samples


def test_a_valid_record_has_no_fault():
    assert lint(samples.run()) == []
    assert lint(samples.without_result("failed", "killed")) == []


@pytest.mark.parametrize("seed", range(30))
def test_random_records_have_no_fault(seed):
    assert [fault for fault in lint(samples.by_chance(seed)) if "without a reason" not in fault] == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("provenance", None, "provenance is None"),
        ("provenance", "guessed", "provenance is 'guessed'"),
        ("provenance", "unavailable", "yet it has a number"),
        ("source", "", "has no source"),
        ("unit", "tokens", "the list says 'tokens/s'"),
        ("higher_is_better", False, "the list says True"),
        ("dimension", "accuracy", "the list says 'performance'"),
        ("metric", "prefil_speed", "not in the list of metrics"),
        ("baseline", None, "missing without a reason"),
        ("optimized", {"$float": "nan"}, "not a finite number"),
    ],
)
def test_each_fault_is_found_and_located(field, value, says):
    content = record.to_json(samples.run())
    content["measurements"][0][field] = value
    faults = lint(content)
    assert len(faults) == 1
    assert says in faults[0]
    assert faults[0].startswith("structured_pruning--qwen3-4b-instruct-2507: ")


def test_unlabeled_details_are_found():
    content = record.to_json(samples.run())
    content["details"] = {"curve": [1, 2], "notes": ["text"], "kept": {"provenance": "derived", "rows": [3]}}
    assert [fault.split(": ", 1)[1] for fault in lint(content)] == [
        "details.curve: holds numbers without provenance and source",
        "details.kept: has no source",
    ]


def test_a_labeled_detail_has_no_fault():
    content = record.to_json(samples.run())
    content["details"] = {"curve": record.labelled([1.5, 2.5], "measured", "perf_counter")}
    assert lint(content) == []
    with pytest.raises(ValueError, match="has a source"):
        record.labelled(1, "measured", "")
