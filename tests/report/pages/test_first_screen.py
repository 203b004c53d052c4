"""The first screen of a report: decision, setting, six numbers, two charts, the machine; no sentence is long."""

import itertools
import xml.etree.ElementTree as xml

import pytest

from lib.measure.metrics import measurement, process_variance
from lib.report.analysis import summary
from lib.report.figures.inline import forest_svg
from lib.report.figures.inline.forest_svg import ForestLine
from lib.report.pages import first_screen, html, run_page
from lib.report.records import record
from lib.report.text import brief
from tests.report import samples


@pytest.fixture
def folder(tmp_path):
    """A result folder of three optimizations on every model."""
    return samples.good(tmp_path, samples.OPTIMIZATIONS[:3])


def test_the_first_screen_holds_what_a_reader_needs(folder):
    run = samples.whole(samples.OPTIMIZATIONS[0], samples.MODELS[0], 1.2)
    view = first_screen.of(run, folder)
    assert view["decision"].startswith("Use for latency") and "undecided for throughput, energy" in view["decision"]
    assert len(view["numbers"]) == 6 and {n.name for n in view["numbers"]} >= {"prefill", "decode", "F1", "weights"}
    assert dict(view["setting"])["Scale, effort"] == "proxy, quick"
    assert "prefill" in dict(view["machine"])["Noise floor"] and "Copy of the baseline" in dict(view["machine"])
    assert view["busy"] == "" and view["flips"] == []
    assert view["trade_off"]["svg"].count('class="own"') == 1 and "This run: 3" in view["trade_off"]["svg"]
    assert view["trade_off"]["svg"].count('class="kept"') == 3  # with the other two on this model


def test_a_control_that_is_the_baseline_itself_is_not_called_a_copy():
    run = samples.whole(samples.OPTIMIZATIONS[0], samples.MODELS[0])
    (control,) = run.controls
    reason = f"no room for a copy of the baseline (60.0 GiB): {process_variance.SAME_OBJECT}"
    same = [measurement.unjudged(m, reason) for m in control.measurements]
    run = run.model_copy(update={"controls": [control.model_copy(update={"measurements": same})]})
    rows = dict(summary.machine(run))
    assert "Copy of the baseline" not in rows and "prefill" in rows["Baseline again, no copy"]


@pytest.mark.parametrize("seed", range(30))
def test_no_sentence_of_any_record_is_long(seed, tmp_path):
    view = run_page.view(samples.by_chance(seed), (), tmp_path)
    texts = [view["sentence"], view["decision"], view["busy"], view["stand_in"]]
    texts += [item["reason"] for item in view["decisions"]]
    assert all(brief.count(part) <= brief.MOST_WORDS for text in texts for part in brief.split(text))


def _served(*speeds):
    """Return a server's record: its goodput is declared but undecided; `speeds` are added to it."""
    run = samples.whole("feedback_mechanisms", samples.MODELS[1])
    others = [m for m in run.measurements if m.dimension != "performance"]
    goodput = samples.timed("goodput_requests_per_second", 1.02, verdict="inconclusive", workload="serve")
    return record.build(
        run.optimization, run.model, "proxy", "quick", {}, [goodput, *speeds, *others], environment=samples.ENVIRONMENT,
        primaries={"performance": ("goodput_requests_per_second", "serve")},
    )  # fmt: skip


def test_a_deciding_gain_is_named_and_shown_where_the_verdict_names_another(tmp_path):
    run = _served(samples.timed("time_per_output_token_ms", 0.7, workload="serve"))
    view = first_screen.of(run, tmp_path)
    assert view["sentence"].startswith("Goodput undecided")
    assert view["decision"].startswith("Use for latency (time per output token)")
    assert "time per output token" in [number.name for number in view["numbers"]]
    plain = first_screen.of(samples.whole("structured_pruning", samples.MODELS[0], 1.2), tmp_path)
    assert plain["decision"].startswith("Use for latency, ")  # by its decode rate, which the verdict names


def test_a_gain_on_one_workload_is_distinguished_from_the_verdict_on_another(tmp_path):
    run = _served(
        samples.timed("generate_tokens_per_second", 0.99, verdict="inconclusive", workload="generate, speculative"),
        samples.timed("generate_tokens_per_second", 1.8, workload="generate, n-gram"),
    )
    assert "Use for latency, throughput (generation, generate, n-gram)" in summary.decision(run)
    declared = {"performance": ("generate_tokens_per_second", "generate, speculative")}
    again = record.build(
        run.optimization, run.model, "proxy", "quick", {}, run.measurements, environment=samples.ENVIRONMENT,
        primaries=declared,
    )  # fmt: skip
    assert summary.sentence(again).startswith("Generation undecided (generate, speculative)")
    assert "Use for latency, throughput (generation, generate, n-gram)" in summary.decision(again)


def test_a_lost_score_that_the_verdict_does_not_name_is_shown(tmp_path):
    """A score lost by its own interval, though not beyond chance among the guards, still decides."""
    run = samples.whole("adaptive_sparse_attention", samples.MODELS[1], gain=1.4)
    lost = samples.scored("perplexity", 22.9, 25.5, "not_maintained", 0.01, "answers behind a long prompt")
    again = run.model_copy(update={"measurements": [*run.measurements, lost]})
    view = first_screen.of(again, tmp_path)
    assert "perplexity" not in view["sentence"].lower() and view["decision"].startswith("Do not use for latency")
    assert [number.verdict for number in view["numbers"] if number.name == "perplexity"] == ["✗ not maintained"]


def test_two_numbers_of_one_kind_are_distinguished_in_the_forest_plot(tmp_path):
    run = samples.whole("adaptive_sparse_attention", samples.MODELS[1], gain=1.4)
    scores = [
        samples.scored("perplexity", 57.8, 57.2, "maintained", 0.01, "prefill"),
        samples.scored("perplexity", 22.9, 25.5, "not_maintained", 0.01, "answers behind a long prompt"),
    ]
    again = record.build(
        run.optimization, run.model, "proxy", "quick", {}, [*run.measurements, scores[0]],
        environment=samples.ENVIRONMENT, primaries={"accuracy": ("perplexity", "prefill")},
    )  # fmt: skip
    again = again.model_copy(update={"measurements": [*again.measurements, scores[1]]})
    root = xml.fromstring(first_screen.forest(again))
    names = [text.text for text in root.iter("text") if text.get("text-anchor") == "end"]
    assert "perplexity, prefill" in names and "perplexity, answers behind…" in names and "decode" in names


def test_a_busy_machine_is_reported_before_any_number(tmp_path):
    run = samples.whole("structured_pruning", samples.MODELS[0])
    busy = [m.model_copy(update={"noise_floor": 0.2, "reason": "the copies differ by 20 %"}) if m.metric.endswith(
        "tokens_per_second") else m for m in run.measurements]  # fmt: skip
    again = record.build(run.optimization, run.model, "proxy", "quick", {}, busy, environment=samples.ENVIRONMENT)
    page, text = (path.read_text() for path in html.render(None, again, (), tmp_path))
    assert page.index("Busy machine, nothing timed is judged") < page.index('class="six"')
    assert "The machine was busy" in text


def test_purely_descriptive_numbers_are_folded(tmp_path):
    from bs4 import BeautifulSoup

    page, _ = html.render(None, samples.run(), (), tmp_path)
    soup = BeautifulSoup(page.read_text(), "html.parser")
    judged, described = soup.select("section[aria-labelledby=measurements] table.measurements")
    assert described.find_parent("details") and not judged.find_parent("details")
    assert "answers flipped" in described.get_text() and "answers flipped" not in judged.get_text()


def test_limits_appear_once_in_their_own_section(tmp_path):
    import nbformat

    v = nbformat.v4
    cells = [v.new_markdown_cell("# Title"), v.new_markdown_cell("## Limits\n\n- Only one machine.")]
    nbformat.write(v.new_notebook(cells=cells), tmp_path / "run.ipynb")
    page, _ = html.render(tmp_path / "run.ipynb", samples.run(), (), tmp_path)
    text = page.read_text()
    assert text.count("Only one machine.") == 1 and text.index("Only one machine.") < text.index('id="notebook"')
    assert 'href="#limits-section"' in text


def test_a_forest_plot_is_valid_and_oriented_so_that_right_is_better():
    changes = [
        ForestLine("prefill", "19 % faster", 19.0, 11.0, 27.0, 2.0, "better"),
        ForestLine("weights <b>", "26 % smaller", 26.0, None, None, None, "better"),
        ForestLine("F1", "undecided", -1.0, -3.0, 1.0, None, "inconclusive"),
        ForestLine("perplexity", "900 % higher", -900.0, -950.0, -850.0, None, "not_maintained"),
    ]
    root = xml.fromstring(forest_svg.forest(changes, "Changes"))
    assert root.get("role") == "img" and "prefill 19 % faster" in root.get("aria-label")
    zero = next(float(line.get("x1")) for line in root.iter("line") if line.get("class") == "zero")
    kept = [float(mark.get("cx")) for mark in root.iter("circle") if mark.get("class") == "kept"]
    assert len(kept) == 2 and all(x > zero for x in kept)
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            if element.get(name):
                assert 0 <= float(element.get(name)) <= forest_svg.WIDTH
    assert forest_svg.forest([], "Changes") == ""


def test_the_longest_name_fits():
    changes = [ForestLine("processor time per token", "35 % lower", 35.0, 31.0, 38.0, 2.0, "better")]
    root = xml.fromstring(forest_svg.forest(changes, "Changes"))
    [name] = [text for text in root.iter("text") if text.get("text-anchor") == "end"]
    assert float(name.get("x")) >= forest_svg.LETTER * len(name.text)


def test_a_smaller_amount_is_plotted_to_the_right():
    counted = [measurement.counted("weights_bytes", "load", 100.0, 74.0, "bytes")]
    run = record.build("x", samples.MODELS[0], "proxy", "quick", {}, counted)
    assert first_screen._line(run.measurements[0]).value == pytest.approx(26.0)


@pytest.mark.parametrize("value", [-39.0, -9.1, 4.0, 280.0])
def test_labels_of_the_forest_plot_do_not_overlap(value):
    change = ForestLine("processor time per token", "changed", value, None, None, None, "worse")
    root = xml.fromstring(forest_svg.forest([change], "Changes"))
    ticks = [text for text in root.iter("text") if (text.text or "").endswith("%") or text.text == "0"]
    places = sorted(float(text.get("x", "nan")) for text in ticks)
    widest = forest_svg.LETTER * max(len(text.text or "") for text in ticks) + 4  # plus a gap
    assert len(places) > 1 and all(after - before >= widest for before, after in itertools.pairwise(places))


def test_the_trade_off_has_one_effort_and_maps_numbers_to_runs(folder):
    other = samples.whole(samples.OPTIMIZATIONS[1], samples.MODELS[0]).model_copy(update={"effort": "preview"})
    record.write(other, folder / f"{other.stem}.json")
    run = samples.whole(samples.OPTIMIZATIONS[0], samples.MODELS[0], 1.2)
    view = first_screen.of(run, folder)["trade_off"]
    assert view["svg"].count('class="kept"') == 2
    assert view["legend"] == "1 Adaptive batch sizes, 2 Structured pruning" and view["own"] == "2"
    page, _ = html.render(None, run, (), folder)
    text = page.read_text()
    assert "this run is 2." in text and f"when this page was rendered: {view['legend']}." in text


def test_random_weights_of_a_real_model_are_named_in_its_setting():
    run = samples.run().model_copy(update={"parameters": {"random_weights": True}})
    assert dict(first_screen.setting(run.model_copy(update={"scale": "full"})))["Weights"].startswith("random")
    assert "Weights" not in dict(first_screen.setting(run.model_copy(update={"scale": "slice"})))
    assert "Weights" not in dict(first_screen.setting(samples.run().model_copy(update={"scale": "full"})))


def test_disturbed_pairs_are_counted_once_and_reported_once():
    reason = "the machine was busy: our threads waited for a core 22% of the time, in 1 of 6 pairs; measure again"
    reason += " on a quiet machine"
    run = samples.run()
    pairs = {"prefill_tokens_per_second": 1, "time_to_first_token_ms": 1, "decode_tokens_per_second": 2}
    disturbed = [
        m.model_copy(update={"disturbed": pairs[m.metric], "reason": reason}) if m.metric in pairs else m
        for m in run.measurements
    ]
    again = run.model_copy(update={"measurements": disturbed})
    assert dict(summary.machine(again))["Disturbed pairs"] == "3"  # a rate and its latency share their pairs
    shown = "Busy machine, nothing timed is judged: our threads waited for a core 22% of the time, in 1 of 6 pairs …"
    assert summary.busy(again) == shown


def test_the_noise_floor_shown_is_the_one_that_may_withhold():
    rates = [samples.timed("generate_tokens_per_second", 1.4, workload=name) for name in ("own", "other")]
    rates[1] = rates[1].model_copy(update={"noise_floor": 0.16, "reason": "the noise floor of 16 % is above 10 %"})
    run = _served(*rates)
    assert summary.busy(run).endswith(": the noise floor of 16 % is above 10 %.")
    assert dict(summary.machine(run))["Noise floor"] == "goodput 1.2 %, generation 16 % (other)", "of which workload"
