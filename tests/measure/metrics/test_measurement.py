"""Every number is labeled and listed; counted numbers are judged in the right direction."""

import json
import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from lib.errors import UserError
from lib.measure.metrics import busy, measurement, paired_samples, settings
from lib.measure.metrics.catalogue import DIMENSIONS, METRICS, metric


def test_an_unjudged_measurement_still_reports_a_busy_machine():
    seen = "other processes took 40% of our cores"
    options = {"source": "test", "floor": 0.0, "process_sigma": 0.0, "disturbed": [seen]}
    loaded = paired_samples.from_samples("goodput_requests_per_second", "serve", [1.0] * 6, [2.0] * 6, **options)
    shown = measurement.unjudged(loaded, "few requests")
    assert shown.verdict == "informative" and seen in shown.reason and shown.reason.endswith("few requests")
    assert seen in busy.why_busy([shown])


def test_counted_numbers_are_judged_by_direction_and_margin():
    assert measurement.counted("weights_bytes", "load", 100, 70, "count").verdict == "better"
    assert measurement.counted("weights_bytes", "load", 100, 130, "count").verdict == "worse"
    assert measurement.counted("weights_bytes", "load", 100, 100.5, "count").verdict == "equivalent"
    half = measurement.counted("weights_bytes", "load", 100, None, "count", reason="not saved")
    assert half.verdict == "informative" and half.ratio is None
    assert measurement.counted("weights_bytes", "load", None, None, "count").verdict == "unavailable"


def test_missing_numbers_are_null_with_a_reason():
    missing = measurement.unavailable("f1_macro", "classify", "random weights")
    assert missing.baseline is None and missing.provenance == "unavailable" and missing.reason
    hidden = measurement.invalid("prefill_tokens_per_second", "prefill", "its logits are not finite")
    assert hidden.verdict == "invalid" and hidden.optimized is None
    with pytest.raises(ValidationError, match="reason"):
        measurement.unavailable("f1_macro", "classify", "")
    with pytest.raises(ValidationError, match="finite"):
        measurement.counted("weights_bytes", "load", 1.0, math.nan, "count")


def test_names_come_from_one_list():
    with pytest.raises(UserError, match='Did you mean "perplexity"'):
        metric("perplexty")
    with pytest.raises(UserError, match="expected one of"):
        settings.read("fast")
    assert {listed.dimension for listed in METRICS.values()} == set(DIMENSIONS)
    assert all(listed.unit for listed in METRICS.values())


def test_lint_names_unlabeled_numbers():
    good = measurement.counted("parameters", "load", 2, 1, "count").model_dump()
    assert measurement.lint([json.loads(json.dumps(good))]) == []
    unlabelled = {key: value for key, value in good.items() if key != "provenance"}
    blank = good | {"source": ""}
    foreign = good | {"unit": "apples"}
    faults = measurement.lint([unlabelled, blank, foreign])
    assert len(faults) == 3 and all(fault.startswith("parameters: ") for fault in faults)


def test_modules_imported_by_reports_do_not_import_torch():
    modules = ("metrics.catalogue", "metrics.measurement", "metrics.paired_samples", "metrics.settings")
    modules += ("metrics.paired_stats", "timing.interleaved", "timing.disturbance", "quality.noninferiority")
    imports = ", ".join(f"lib.measure.{name}" for name in modules)
    code = f"import sys; import {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
