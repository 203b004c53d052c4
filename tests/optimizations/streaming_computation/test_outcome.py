"""Controls and details in the record's format, from planted findings."""

from types import SimpleNamespace

from lib.measure.metrics import process_variance
from lib.optimizations.streaming_computation import outcome
from lib.optimizations.streaming_computation.limited import decoding
from lib.optimizations.streaming_computation.window_quality import LongTexts
from lib.report.analysis.noise import process_draws
from lib.report.records import record
from tests.report import samples


def _controls(copy, limited):
    nothing = SimpleNamespace(measurements=[])
    compared = SimpleNamespace(control=lambda: copy)
    under_a_limit = SimpleNamespace(control=limited, control_is=decoding.SECOND_PROCESS, offloading=[])
    return outcome.controls([], LongTexts(), {}, {}, nothing, compared, under_a_limit)


def test_differences_under_a_limit_say_nothing_about_other_workloads():
    """Disk reads vary far more between processes than computation does."""
    run = samples.whole("structured_pruning", samples.MODELS[0])
    ((copy,),) = (control.measurements for control in run.controls)
    far = {"baseline": copy.samples["baseline"], "optimized": [2 * seconds for seconds in copy.samples["baseline"]]}
    limited = copy.model_copy(update={"metric": decoding.METRIC, "workload": decoding.WORKLOAD, "samples": far})
    pooled = {}
    for name, of_limited in (("without", []), ("with", [limited])):
        controls = [record.Control(**row) for row in _controls([copy], of_limited)]
        assert [c.name for c in controls if c.measurements] == ["A/A", outcome.LIMITED][: 1 + len(of_limited)]
        told = run.model_copy(update={"controls": controls})
        pooled[name] = process_variance.table(process_draws.draws(told))["cpu"]["*"]
    assert pooled["with"] == pooled["without"] and pooled["with"].draws
