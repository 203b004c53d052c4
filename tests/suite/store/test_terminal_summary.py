"""After a run the terminal shows its verdict, three numbers and the location of its report."""

from lib.report.records import record
from lib.suite.store import terminal_summary
from lib.suite.store.result_folder import Folder
from tests.report import samples


def _lines(folder, run):
    record.write(run, folder / f"{run.stem}.json")
    return terminal_summary.lines(Folder(folder), run.stem, lambda path: path.name)


def test_a_measured_run_is_summarized_in_three_lines(tmp_path):
    run = samples.run()
    first, numbers, path = _lines(tmp_path, run)
    assert first == f"{run.stem}: {run.verdict.sentence}"
    assert numbers.count(" · ") == 2 and numbers.startswith("  prefill 31 % faster (+28.0 to +34.0 %) · F1 −0.4 points")
    assert path == f"  {run.stem}.html"


def test_a_run_without_a_result_is_summarized_in_fewer_lines(tmp_path):
    skipped = samples.without_result("not_applicable", "no experts")
    assert _lines(tmp_path, skipped) == [f"{skipped.stem}: Not applicable: no experts.", f"  {skipped.stem}.html"]
    assert _lines(tmp_path, samples.without_result("failed", "no memory")) == []
    assert terminal_summary.lines(Folder(tmp_path), "nothing--here", str) == []


def test_answers_unchanged_on_a_few_items_have_one_name(tmp_path):
    """A score with too few items for any conclusion was called "F1 16 answers unchanged"."""
    same = {"source": "same answers, 16 items; topic", "n": 16, "ci": None, "bound": None, "verdict": "inconclusive"}
    same |= {"optimized": 0.91, "ratio": 1.0}
    scores = [m.model_copy(update=same) if m.metric == "f1_macro" else m for m in samples.measurements()]
    _, numbers, _ = _lines(tmp_path, samples.run(measurements=scores))
    assert "· 16 answers unchanged ·" in numbers and "F1" not in numbers
