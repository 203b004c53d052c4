"""The pool of the variance between processes: quick runs, whose workloads are shorter, tell quick runs alone."""

import pytest

from lib.report.analysis.noise import process_draws
from lib.report.records import history, record
from tests.report import samples


@pytest.mark.parametrize(("of", "tells_quick", "tells_standard"), [("quick", True, False), ("standard", True, True)])
def test_a_quick_control_tells_quick_runs_alone(tmp_path, of, tells_quick, tells_standard):
    folder = tmp_path / "proxy"
    folder.mkdir()
    run = samples.whole("structured_pruning", samples.MODELS[0]).model_copy(update={"effort": of})
    assert [*process_draws.draws(run)]
    record.write(run, folder / f"{run.stem}.json")
    store = tmp_path / history.NAME
    pools = [process_draws.refresh(folder, store, {}, effort) is not None for effort in ("quick", "standard")]
    assert pools == [tells_quick, tells_standard]
