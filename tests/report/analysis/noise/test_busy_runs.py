"""Runs on a busy machine are named with the reason; previews are not, because their few rounds scatter on any
machine.
"""

from lib.measure.metrics import paired_samples
from lib.report.analysis.noise import busy_runs
from lib.report.records import record
from tests.report import samples

SEEN = "other processes took 50% of our cores"


def _timed(**unsettling):
    return paired_samples.from_samples(
        "prefill_tokens_per_second", "prefill", [1.0] * 12, [1.2, 1.21, 1.22] * 4, source="test", process_sigma=0.0,
        **({"floor": 0.01} | unsettling),
    )  # fmt: skip


def test_busy_runs_are_named_except_previews_and_unreadable_ones(tmp_path):
    runs = {
        "quiet": samples.run(measurements=[_timed()]),
        "disturbed": samples.run(measurements=[_timed(disturbed=(SEEN,))]),
        "unsteady": samples.run(measurements=[_timed(floor=0.48)]),
        "preview": samples.run(measurements=[_timed(floor=0.48)]).model_copy(update={"effort": "preview"}),
    }
    for stem, run in runs.items():
        record.write(run, tmp_path / f"{stem}.json")
    (tmp_path / "damaged.json").write_text("{")
    reasons = busy_runs.reasons(tmp_path, [*runs, "damaged", "missing"])
    assert set(reasons) == {"disturbed", "unsteady"}
    assert SEEN in reasons["disturbed"] and "48 %" in reasons["unsteady"]
