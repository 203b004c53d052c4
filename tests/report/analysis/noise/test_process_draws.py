"""The pool of between-process variance: runs of small efforts, with shorter workloads, inform only such runs."""

import os

import pytest

from lib.measure.metrics import measurement, process_variance
from lib.report.analysis.noise import process_draws
from lib.report.records import history, record
from tests.report import samples


@pytest.mark.parametrize(
    ("of", "tells_quick", "tells_standard"),
    [("preview", False, False), ("quick", True, False), ("standard", True, True)],
)
def test_a_control_of_a_small_effort_informs_only_runs_of_that_effort(tmp_path, of, tells_quick, tells_standard):
    folder = tmp_path / "proxy"
    folder.mkdir()
    run = samples.whole("structured_pruning", samples.MODELS[0]).model_copy(update={"effort": of})
    assert [*process_draws.draws(run)]
    record.write(run, folder / f"{run.stem}.json")
    store = tmp_path / history.NAME
    pools = [process_draws.refresh(folder, store, {}, effort) is not None for effort in ("quick", "standard")]
    assert pools == [tells_quick, tells_standard]


@pytest.mark.parametrize(("device", "kind"), [("cuda", "cuda"), ("cuda:1", "cuda"), ("cpu", "cpu"), (None, "cpu")])
def test_a_draw_informs_runs_on_the_same_kind_of_device(device, kind):
    run = samples.whole("structured_pruning", samples.MODELS[0])
    run.environment["gpu"], run.parameters["device"] = "Example GPU", device
    assert {draw.device for draw in process_draws.draws(run)} == {kind}


def test_a_control_with_few_pairs_is_ignored(recwarn):
    run = samples.whole("structured_pruning", samples.MODELS[0])
    (control,) = run.controls
    few = [m.model_copy(update={"samples": {"baseline": [1.0], "optimized": [1.1]}}) for m in control.measurements]
    run = run.model_copy(update={"controls": [control.model_copy(update={"measurements": few})]})
    assert [*process_draws.draws(run)] == [] and not recwarn.list


@pytest.mark.parametrize(("cores", "known"), [(2, True), (48, False)])
def test_a_larger_machine_of_the_same_name_is_another_machine(tmp_path, monkeypatch, cores, known):
    monkeypatch.setenv(process_variance.VARIABLE, "of an earlier build")
    monkeypatch.setattr(process_draws.energy_source, "cpu_name", lambda: samples.ENVIRONMENT["cpu"])
    monkeypatch.setattr(process_draws.os, "cpu_count", lambda: 2)
    folder = tmp_path / "proxy"
    folder.mkdir()
    run = samples.whole("structured_pruning", samples.MODELS[0])
    run.environment["cores_of_machine"] = cores
    record.write(run, folder / f"{run.stem}.json")
    process_draws.publish(folder, tmp_path / history.NAME, "quick")
    assert (process_variance.VARIABLE in os.environ) == known


@pytest.mark.parametrize("where", ["details", "measurement"])
def test_a_control_that_is_the_baseline_itself_gives_no_draw(where):
    """It lacks the differences of a copy: many such controls made later intervals too narrow."""
    run = samples.whole("structured_pruning", samples.MODELS[0])
    assert [*process_draws.draws(run)]
    reason = f"no room for a copy of the baseline (60.0 GiB): {process_variance.SAME_OBJECT}"
    if where == "details":  # where earlier records hold it
        run = run.model_copy(update={"details": run.details | {"control": reason}})
    else:
        (control,) = run.controls
        same = [measurement.unjudged(m, reason) for m in control.measurements]
        run = run.model_copy(update={"controls": [control.model_copy(update={"measurements": same})]})
    assert [*process_draws.draws(run)] == []
