"""Arms of records on one axis: what counts as a point, and which points are not dominated."""

import pytest

from lib.measure.metrics import measurement
from lib.optimizations.common.compression import weight_only
from lib.report.analysis import quality_over_bytes
from lib.report.records.record import Control
from lib.report.text import brief, reading
from tests.report import samples

INT8, INT4, BY_GPTQ = quality_over_bytes.YARDSTICKS


def _arm(size: float, divergence: float | None):
    measured = [measurement.counted("weights_bytes", "load", 100, size, "test")]
    if divergence is not None:
        ci = (0.9 * divergence, 1.1 * divergence)
        fields = {"ratio": None, "ci": ci, "n": 8}
        measured.append(
            measurement.informative("kl_divergence_nats", "prefill", 0.0, divergence, "test windows", **fields)
        )
    return measured


def _record(optimization: str, own, controls):
    record = samples.run(optimization)
    arms = [Control(name=name, measurements=measured) for name, measured in controls.items()]
    return record.model_copy(update={"measurements": own, "controls": arms})


@pytest.fixture
def records():
    yardsticks = {INT8: _arm(50, 0.01), INT4: _arm(30, 0.1)}
    pruning = _record("structured_pruning", _arm(80, 0.5), yardsticks | {"random 1": _arm(80, 2.0)})
    part = {INT8: _arm(60, 0.005), "A/A": [], "no text": _arm(40, None)}
    return [pruning, _record("sparse_neural_networks", _arm(120, 0.2), part)]


def test_every_smaller_arm_with_both_numbers_is_a_point_and_a_yardstick_counts_once(records):
    points = quality_over_bytes.points(records)
    assert dict(zip(points["name"], points["x"])) == {
        "Structured pruning": 0.8, "random 1": 0.8, INT8: 0.5, INT4: 0.3,
    }  # fmt: skip
    assert set(points["arm"]) == {"Structured pruning", "Structured pruning: other arms", INT8, INT4}
    int8 = points[points["name"] == INT8].iloc[0]
    assert (int8.y, int8.y_low, int8.y_high) == pytest.approx((0.01, 0.009, 0.011))


def test_dominated_points_are_left_out_of_the_text(records):
    first, second = quality_over_bytes.read(quality_over_bytes.points(records))
    assert first.startswith("2 of 4 points lie on the Pareto front of bytes and divergence")
    assert second == "2 of them are weight-only quantization."
    assert quality_over_bytes.read(quality_over_bytes.points([]))[0].startswith("No record")


def test_arms_of_many_kinds_are_counted_where_a_sentence_cannot_name_them_all():
    runs = [
        _record(name, _arm(90 - at, 0.1 * (1 + at)), {INT4: _arm(20 + at, 5.0)})
        for at, name in enumerate(samples.OPTIMIZATIONS[:6])
    ]
    first, second = quality_over_bytes.read(quality_over_bytes.points(runs))
    assert first.startswith("7 of 7 points") and first.endswith(" other kinds.")
    assert brief.count(first) <= brief.MOST_WORDS and reading.two(first, second)


def test_int4_by_gptq_is_credited_to_no_optimization(records):
    assert (*weight_only.NAMES.values(), weight_only.BY_GPTQ) == quality_over_bytes.YARDSTICKS
    controls = {INT4: _arm(31, 0.2), BY_GPTQ: _arm(29, 0.05)}
    points = quality_over_bytes.points([*records, _record("sparse_neural_networks", _arm(90, 0.2), controls)])
    assert points[points["name"] == BY_GPTQ]["arm"].tolist() == [BY_GPTQ]
    first, second = quality_over_bytes.read(points)
    assert f"1 {BY_GPTQ}" in first and "Sparse" not in first and second == "2 of them are weight-only quantization."


def test_weights_streamed_from_a_full_size_file_are_not_a_compression(records):
    """They lose nothing and hold a third in memory, so every compression seemed to be dominated."""
    on_disk = measurement.informative("checkpoint_bytes", "load", 100, 100, "test")
    streaming = _record("streaming_computation", [*_arm(35, 1e-8), on_disk], {})
    points = quality_over_bytes.points([*records, streaming])
    assert len(points) == 4 and "Streaming computation" not in set(points["arm"])
    pruned = measurement.counted("checkpoint_bytes", "load", 100, 80, "test")
    both = quality_over_bytes.points([_record("automl_components", [*_arm(28, 0.2), pruned], {})])
    assert both["x"].tolist() == [0.8], "what is pruned and streams is as small as its file"
    unknown = measurement.unavailable("checkpoint_bytes", "load", "no room on the disk")
    kept = quality_over_bytes.points([_record("structured_pruning", [*_arm(80, 0.5), unknown], {})])
    assert kept["x"].tolist() == [0.8]
