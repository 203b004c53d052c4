"""This run compared with the last one: differences are stated, missing values are dashes, each run is kept."""

from lib.report import earlier_runs
from lib.report.records import record
from tests.report import samples


def test_differences_from_the_other_run_are_stated():
    run, other = samples.run(), samples.run()
    assert earlier_runs.difference("last build", run, other) == "Last build (2026-01-31 14:05), same settings."
    changed = other.model_copy(update={"effort": "standard", "parameters": other.parameters | {"ratio": 0.5}})
    sentence = earlier_runs.difference("last build", run, changed)
    assert "effort standard (now quick), ratio 0.5 (now 0.3)" in sentence
    frame = earlier_runs.table(run, [("last build", changed.model_copy(update={"measurements": []}))])
    assert set(frame["last build"]) == {"–"} and len(frame) > 3


def test_a_run_is_kept_for_the_next_one(tmp_path):
    run, path = samples.run(), tmp_path / "runs" / "a.json"
    assert (
        earlier_runs.record_of({"result": run, "other": 1, "_": samples.run()}) is run
        and earlier_runs.record_of({}) is None
    )
    assert earlier_runs.keep(run, path, {3: 1.5, 4: 2.0}) is None
    kept = record.read(path)
    assert kept.seconds == 3.5 and kept.process is not None and kept.process.cell_seconds == {"3": 1.5, "4": 2.0}
    assert earlier_runs.keep(run, path, {3: 9.0}) == kept
    path.write_text("{")
    assert earlier_runs.stored(path) is None


def test_a_default_that_the_notebook_resolved_is_no_difference():
    built = samples.run().model_copy(update={"parameters": {"seed": 0, "finetune_steps": -1, "text": ""}})
    glued = built.model_copy(update={"parameters": {"seed": 0, "finetune_steps": 30}})
    namespace = {"seed": 0, "finetune_steps": -1, "text": "", "size": 3}
    run = earlier_runs.as_requested(glued, namespace, built.parameters)
    assert earlier_runs.difference("last build", run, built).endswith("same settings.")
    assert "finetune_steps -1 (now 30)" in earlier_runs.difference("last build", glued, built)
