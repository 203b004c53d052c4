"""Every result first names the measured model, with the record's own number of parameters."""

from lib.report.analysis import result_set
from lib.report.pages import index, result_tables, run_page
from lib.report.pages.suites import suite_pages
from lib.report.records import record
from lib.report.records.setting import stand_in
from lib.report.text import brief
from lib.report.text.wording import model_title
from tests.report import samples


def test_names_are_spelled_as_by_their_makers():
    names = ("Qwen3-Coder-30B", "GLM-4.7-Flash", "Qwen3-VL-2B", "Qwen3-4B-Instruct-2507")
    assert [model_title(name.lower()) for name in names] == list(names)


def test_one_and_several_say_what_they_are_and_what_transfers():
    text = stand_in.of_model("proxy", "qwen3-coder-30b", 4_346_688)
    assert text.startswith("A stand-in of 4.35 M parameters with Qwen3-Coder-30B's architecture")
    assert "not Qwen3-Coder-30B." in text and "What transfers:" in text and "absolute speed" in text
    both = stand_in.of_models("proxy", {"glm-4.7-flash": None, "qwen3-coder-30b": 4_346_688})
    assert "GLM-4.7-Flash and Qwen3-Coder-30B (4.35 M parameters)" in both and "not the models" in both
    four = stand_in.of_models("proxy", dict.fromkeys(samples.MODELS, 4_346_688))
    assert four.count("parameters") == 1
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(f"{text} {four}"))
    assert (
        stand_in.of_model("full", "qwen3-coder-30b", 3e10) == stand_in.of_models("full", {"a": None, "b": None}) == ""
    )
    assert "random weights" in stand_in.of_model("slice", "qwen3-coder-30b", None)


def test_the_parameter_count_is_the_records_own(tmp_path):
    run = samples.run()
    assert stand_in.size(run) == stand_in.size(record.to_json(run)) == 3_620_000
    bare = run.model_copy(update={"environment": {}})
    assert stand_in.size(bare) == 3_620_000  # from the metric
    assert stand_in.size(bare.model_copy(update={"measurements": []})) is None
    record.write(run, tmp_path / f"{run.stem}.json")
    (tmp_path / "broken--qwen3-vl-2b.json").write_text("{")
    assert stand_in.of_folder(tmp_path) == stand_in.of_model("proxy", run.model, 3_620_000)
    assert stand_in.of_folder(tmp_path / "nowhere") == ""


def test_notes_on_proxy_models_do_not_cover_a_real_model_beside_them(tmp_path):
    small = samples.run()
    real = small.model_copy(update={"scale": "full", "model": "smollm2-135m-instruct"})
    alone = stand_in.of_model("proxy", small.model, 3_620_000)
    assert stand_in.of_records([real, small]) == stand_in.of_records([record.to_json(small)]) == alone
    assert stand_in.of_records([real]) == ""
    part = small.model_copy(update={"scale": "slice", "model": "qwen3-vl-2b"})
    both = stand_in.of_records([part, small, real])
    assert both.startswith(alone) and "first blocks of Qwen3-VL-2B" in both and "135M" not in both
    for run in (real, small):
        record.write(run, tmp_path / f"{run.stem}.json")
    assert stand_in.of_folder(tmp_path) == alone
    assert result_tables.about([real, small]) == f"*{alone}*"
    assert alone.replace("'", "&#39;") in index.text(tmp_path, result_set.read(tmp_path))


def test_every_page_names_the_measured_model_before_any_number(tmp_path):
    results = result_set.read(samples.good(tmp_path, samples.OPTIMIZATIONS[:1]))
    pages = [
        index.text(tmp_path, results),
        result_tables.section(results.records),
        result_tables.about(results.records),
    ]
    pages += [getattr(suite_pages, kind)(results, "x")[0] for kind in ("comprehensive", "enhanced", "coverage")]
    for text in pages:
        first = min(at for at in (text.find("×"), text.find("%", text.find("<body")), len(text)) if at > 0)
        assert 0 < text.lower().find("stand-ins") < first
    view = run_page.view(results.records[0])
    assert "a stand-in for GLM-4.7-Flash (3.62 M parameters)" in view["title"]
    assert view["stand_in"].startswith("A stand-in of 3.62 M parameters")
    real = results.records[0].model_copy(update={"scale": "full"})
    assert run_page.view(real)["stand_in"] == "" and run_page.view(real)["title"].endswith("on glm-4.7-flash")


def test_a_real_model_with_only_some_blocks_measured_keeps_its_name():
    assert "first blocks of SmolLM2-135M-Instruct" in stand_in.of_model("slice", "smollm2-135m-instruct", None)
