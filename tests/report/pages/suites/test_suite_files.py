"""The suites write exactly their eight files; JSON follows the published schema, Markdown links resolve."""

import json
import re
import zipfile

import pytest

from lib.report.analysis import result_set, strength_curves
from lib.report.pages import archive
from lib.report.pages.suites import file_names, suite_files, suite_pages
from lib.report.records import record, schema
from lib.report.text import brief
from lib.suite.store import site
from lib.suite.store.result_folder import Folder
from tests.report import samples

EIGHT = {
    "comprehensive_optimization_benchmark_results.json",
    "comprehensive_optimization_benchmark_report.md",
    "enhanced_optimization_impact_benchmark_results.json",
    "enhanced_optimization_impact_benchmark_report.md",
    "optimization_coverage_report.md",
    "master_benchmark_results_all_optimizations.json",
    "benchmark_execution_report_all_optimizations.txt",
    "complete_benchmark_suite_results.json",
}
FEW = ("structured_pruning", "continuous_nas")
LINK = re.compile(r"\]\(([^)#]+)\)")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with two optimizations on four models, one failed and one missing, and all suites' files."""
    folder = tmp_path_factory.mktemp("executed")
    samples.good(folder, FEW)
    failed = samples.without_result("failed", "cell 3: MemoryError | too much", FEW[1], samples.MODELS[0])
    record.write(failed, folder / f"{failed.stem}.json")
    (folder / f"{FEW[1]}--{samples.MODELS[1]}.json").unlink()
    for path in folder.glob("*--*.json"):
        (folder / f"{path.name.removesuffix('.json')}.md").write_text("report")
    (folder / "index.html").write_text("index")
    return folder, suite_files.write("complete", folder, FEW, samples.MODELS)


def test_the_complete_suite_writes_the_eight_files(written):
    folder, paths = written
    assert {path.name for path in paths} == EIGHT == set(file_names.files("complete"))
    assert {path.name for path in folder.iterdir() if "--" not in path.name} - {"index.html"} == EIGHT | {
        "comprehensive_optimization_benchmark_report_files",
        "enhanced_optimization_impact_benchmark_report_files",
    }


def test_the_legend_has_no_long_sentence():
    sentences = brief.split(suite_pages.LEGEND)
    assert len(sentences) == 5 and all(brief.count(part) <= brief.MOST_WORDS for part in sentences), sentences


def test_files_of_the_complete_suite_are_not_rebuilt(tmp_path):
    samples.good(tmp_path, FEW)
    folder = Folder(tmp_path)
    assert site.finish(folder, "complete") == []
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    assert set(first) >= {*EIGHT, "index.html", "report.zip"}
    for kind in ("complete", "enhanced", None):
        assert site.finish(folder, kind) == []
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()} == first


def test_files_of_a_later_suite_are_linked_and_packed(tmp_path):
    """`all` writes neither a page nor Markdown, and the index was rebuilt for those alone."""
    samples.good(tmp_path, FEW)
    folder = Folder(tmp_path)
    assert site.finish(folder, None) == [] and site.finish(folder, "all") == []
    text = (tmp_path / "index.html").read_text()
    packed = zipfile.ZipFile(tmp_path / "report.zip").namelist()
    for name in file_names.FILES["all"]:
        assert f'href="{name}"' in text and f"report/{name}" in packed


def test_a_changed_margin_rebuilds_the_files(tmp_path, monkeypatch):
    assert (site.MEASURE / "metrics" / "catalogue.py").is_file()
    (tmp_path / "measure" / "metrics").mkdir(parents=True)
    catalogue = tmp_path / "measure" / "metrics" / "catalogue.py"
    catalogue.write_text("MARGIN = 0.02\n")
    monkeypatch.setattr(site, "MEASURE", tmp_path / "measure")
    before = site.made_from(Folder(tmp_path / "proxy"))
    assert site.made_from(Folder(tmp_path / "proxy")) == before
    catalogue.write_text("MARGIN = 0.021\n")
    assert site.made_from(Folder(tmp_path / "proxy")) != before


@pytest.mark.parametrize("name", sorted(name for name in EIGHT if name.endswith(".json")))
def test_results_follow_the_schema(written, name):
    content = json.loads((written[0] / name).read_text())
    assert schema.faults(content) == [] and content["schema"] == schema.VERSION
    summary = content["summary"]
    assert (summary["ok"], summary["failed"], summary["expected"]) == (6, 1, 8)
    assert summary["missing"] == [f"{FEW[1]}--{samples.MODELS[1]}"] and "MemoryError" in json.dumps(summary["reasons"])


@pytest.mark.parametrize("name", sorted(name for name in EIGHT if name.endswith(".json")))
def test_the_schema_rejects_damaged_results(written, name):
    content = json.loads((written[0] / name).read_text())
    assert schema.faults(content | {"schema": 1}) and schema.faults(content | {"more": 1})
    assert schema.faults({key: value for key, value in content.items() if key != "summary"})
    assert schema.faults(content | {"kind": "other"})


def test_the_published_schema_is_up_to_date():
    assert schema.PATH.read_text(encoding="utf-8") == schema.text()


@pytest.mark.parametrize("seed", range(8))
def test_any_record_follows_the_schema(seed):
    content = json.loads(json.dumps(record.to_json(samples.by_chance(seed))))
    assert schema.faults(content) == []
    assert schema.faults(content | {"status": "well"})


@pytest.mark.parametrize("name", sorted(name for name in EIGHT if name.endswith(".md")))
def test_markdown_links_resolve_and_tables_are_complete(written, name):
    folder, _ = written
    text = (folder / name).read_text()
    links = LINK.findall(text)
    assert links and all((folder / link).is_file() for link in links), links
    assert text.startswith("# ") and text.count("\n# ") == 0
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert all(alt for alt in re.findall(r"!\[(.*?)\]", text))


def test_the_execution_summary_lists_runs_places_durations_and_failures(written):
    text = (written[0] / "benchmark_execution_report_all_optimizations.txt").read_text()
    counted = ("measured             6", "failed               1", "never run            1")
    failed = "continuous_nas--glm-4.7-flash: cell 3: MemoryError"
    for fact in (*counted, failed, "61.5 s", "2 cores", "Example Processor 9000", "torch 2.13.0"):
        assert fact in text, fact


def test_coverage_shows_every_expected_run(written):
    text = (written[0] / "optimization_coverage_report.md").read_text()
    assert "| Continuous NAS | [✗ failed](continuous_nas--glm-4.7-flash.md) | · missing |" in text


def test_a_curve_has_three_strengths_or_is_flagged():
    whole = samples.whole("structured_pruning", samples.MODELS[0])
    [curve] = strength_curves.curves([whole])
    assert strength_curves.strengths(curve) == [10, 30, 50] and curve["arms"]["random"][0]["more"] == {
        "prefill speed-up": 1.1
    }
    rows = [row | {"flips": 0.0} for row in whole.details["impact"]["value"]]
    still = whole.model_copy(update={"details": {"impact": whole.details["impact"] | {"value": rows}}})
    points = strength_curves.curves([still])[0]["arms"]["random"]
    assert all(point["more"]["flips"] == 0 for point in points), "a zero is a number"
    assert strength_curves.short([whole]) == {}
    rows = whole.details["impact"]["value"]
    two = whole.model_copy(update={"details": {"impact": whole.details["impact"] | {"value": rows[:2]}}})
    assert "2 strengths" in strength_curves.short([two])[two.stem]
    none = whole.model_copy(update={"details": {"impact": {"value": rows}}})  # unlabeled: not a curve to trust
    assert "no impact curve" in strength_curves.short([none])[none.stem]
    speed_alone = none.model_copy(update={"dimensions": ["performance"]})
    assert strength_curves.short([speed_alone, samples.without_result("failed", "x")]) == {}


def test_the_aggregate_is_the_geometric_mean():
    runs = [samples.run(model=model, ratio=ratio) for model, ratio in zip(samples.MODELS, (1.0, 2.0, 4.0, 0.5))]
    [line] = [row for row in result_set.aggregate(runs) if row["metric"] == "prefill_tokens_per_second"]
    assert line["geometric_mean_gain"] == pytest.approx(4 ** (1 / 4)) and (line["least"], line["most"]) == (0.5, 4.0)


def test_a_model_without_correct_answers_is_part_of_the_mean():
    """It has no logarithm and was left out, so the mean covered only the models that still answer."""
    scores = [samples.scored("retrieval_exact_match", 0.9, score, "not_maintained") for score in (0.0, 0.81)]
    pairs = zip(samples.MODELS, scores)
    runs = [samples.run("structured_pruning", model, measurements=[score]) for model, score in pairs]
    [line] = [row for row in result_set.aggregate(runs) if row["metric"] == "retrieval_exact_match"]
    assert (line["geometric_mean_gain"], line["least"]) == (0.0, 0.0) and line["most"] == pytest.approx(0.9)
    assert line["verdicts"] == {"not_maintained": 2} and len(line["models"]) == 2


def test_an_unexercised_score_is_not_averaged():
    """Three models on which sparse attention never acted and one that lost a fifth gave a mean loss of 5 %."""
    idle = samples.scored("f1_macro", 0.9, 0.9, "not_exercised").model_copy(update={"reason": "it never acted"})
    lost = samples.scored("f1_macro", 0.9, 0.72, "not_maintained")
    scores = zip(samples.MODELS, (idle, idle, idle, lost))
    runs = [samples.run("adaptive_sparse_attention", model, measurements=[score]) for model, score in scores]
    [line] = [row for row in result_set.aggregate(runs) if row["metric"] == "f1_macro"]
    assert line["models"] == [samples.MODELS[3]] and line["geometric_mean_gain"] == pytest.approx(0.8)
    assert line["verdicts"] == {"not_maintained": 1}


def test_estimates_are_not_averaged_with_measurements():
    """Goodput of the real model and of a simulation share one metric."""
    served = samples.timed("goodput_requests_per_second", 1.2, workload="serve, real model")
    simulated = samples.timed("goodput_requests_per_second", 2.0, workload="serve, simulated")
    simulated = simulated.model_copy(update={"provenance": "estimated"})
    runs = [samples.run("adaptive_batch_sizes", model, measurements=[served, simulated]) for model in samples.MODELS]
    lines = [line for line in result_set.aggregate(runs) if line["metric"] == "goodput_requests_per_second"]
    assert [(line["provenance"], line["most"]) for line in lines] == [("derived", 1.2), ("estimated", 2.0)]
    results = result_set.Results("proxy", runs, {}, ("adaptive_batch_sizes",), samples.MODELS)
    assert "| goodput, estimated | 4 | 2.00× |" in suite_pages.comprehensive(results, "files")[0]


def test_a_picture_of_many_runs_draws_some_and_says_so():
    """Previously a line for each of some thousand runs made a picture too tall to be written."""
    names = tuple(f"optimization_{number}" for number in range(70))
    runs = [samples.run().model_copy(update={"optimization": name}) for name in names]
    results = result_set.Results("proxy", runs, {}, names, (samples.MODELS[1],))
    text, pictures = suite_pages.comprehensive(results, "files")
    assert "Prefill rate of 70 runs with intervals: 70 better. Only the 60 with the smallest" in text
    few, _ = suite_pages.comprehensive(result_set.Results("proxy", runs[:2], {}, names[:2], results.models), "files")
    assert "Prefill rate of 2 runs with intervals: 2 better.]" in few and "prefill.png" in pictures


def test_the_archive_holds_pages_and_files_but_no_log(written, tmp_path):
    import shutil
    import zipfile

    folder = shutil.copytree(written[0], tmp_path / "proxy")
    (folder / "logs").mkdir()
    (folder / "logs" / "a--b.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    names = set(zipfile.ZipFile(archive.write(folder)).namelist())
    assert {f"report/{name}" for name in EIGHT} | {"report/index.html"} <= names
    assert f"report/{FEW[0]}--{samples.MODELS[0]}.json" in names
    assert not [name for name in names if "logs" in name or "/." in name or name.endswith("flash.md")]
    assert any(name.endswith("_files/structured_pruning.png") for name in names)


def test_files_are_written_without_any_results(tmp_path):
    for path in suite_files.write("complete", tmp_path, FEW, samples.MODELS):
        assert path.stat().st_size
        if path.suffix == ".json":
            assert schema.faults(json.loads(path.read_text())) == []
