"""Interactive figures: static without a user, the same figure plus widgets with one."""

import pytest

from lib.report import choosing, tables
from lib.report.figures import style
from lib.report.records import record
from lib.report.text import brief
from tests.report import samples


@pytest.fixture
def displayed(monkeypatch):
    """Return the displayed output as text, without an interactive user."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    texts: list[str] = []
    monkeypatch.setattr(style, "show", lambda figure, alt: texts.append(alt))
    monkeypatch.setattr(tables, "show_text", texts.append)
    return texts


@pytest.fixture
def offered(monkeypatch):
    """Return the widget boxes that are offered to an interactive user."""
    monkeypatch.setenv("JPY_SESSION_NAME", "overview.ipynb")
    boxes: list = []
    offer = choosing.offer
    monkeypatch.setattr(choosing, "offer", lambda draw, **controls: boxes.append(offer(draw, **controls)))
    return boxes


def _records():
    known = [samples.run(name, model) for name in samples.OPTIMIZATIONS[:3] for model in samples.MODELS[:2]]
    return [*known, samples.run(samples.OPTIMIZATIONS[3], samples.MODELS[0], accuracy="not_maintained")]


def test_without_a_user_each_figure_is_shown_once(displayed, monkeypatch):
    monkeypatch.setattr(choosing, "offer", lambda *_, **__: pytest.fail("nobody is there to choose"))
    choosing.forest(_records(), "prefill_tokens_per_second")
    choosing.trade_offs(_records(), "prefill_tokens_per_second", "f1_macro")
    choosing.forest([], "prefill_tokens_per_second")
    choosing.trade_offs([], "prefill_tokens_per_second", "f1_macro")
    assert displayed == [
        "prefill rate: 7 of 7 measurements; 7 of all are better.",
        "F1 (macro): change (points) against speed of 7 runs.",
        "No record has prefill rate.",
        "No record has both prefill_tokens_per_second and f1_macro.",
    ]


def test_runs_that_lose_another_score_are_counted():
    runs = _records()
    kept = [
        m.model_copy(update={"verdict": "maintained"}) if m.metric == "f1_macro" else m for m in runs[0].measurements
    ]
    lost = runs[-1].model_copy(update={"measurements": kept})
    assert lost.verdict.accuracy == "not_maintained"
    assert choosing.lost_elsewhere(runs[:-1], "f1_macro") == ""
    assert choosing.lost_elsewhere([*runs[:-1], lost], "f1_macro") == " 1 run loses another score beyond its margin."


def test_a_run_with_no_correct_answers_left_is_in_the_figure(displayed):
    """Previously its ratio of 0 was treated as missing, and the worst runs appeared nowhere."""
    speed, quality = "prefill_tokens_per_second", "retrieval_exact_match"
    lost = samples.scored(quality, 0.95, 0.0, "not_maintained", workload="retrieval")
    kept = [m for m in samples.measurements() if m.metric != quality]
    runs = [samples.run(samples.OPTIMIZATIONS[0]), samples.run(samples.OPTIMIZATIONS[1], measurements=[*kept, lost])]
    assert tables.speed_and_quality(runs, speed, quality)["y"].tolist() == pytest.approx([-1.0, -95.0])
    assert " of 2 runs keep it; lost: 1" in choosing.within_margin(runs, speed, quality, 2.0)
    choosing.draw_forest(runs, choosing.ALL, quality)
    choosing.draw_forest(runs[1:], choosing.ALL, quality)
    fell = "1 measurement fell to 0 and cannot be drawn on an axis of ratios."
    name = "key-value retrieval, exact match"
    assert displayed == [f"{name}: 1 of 1 measurement; 0 of all are better. {fell}", f"{name}: {fell}"]


def test_a_person_chooses_model_metric_and_margin(displayed, offered):
    choosing.forest(_records(), "prefill_tokens_per_second")
    choosing.trade_offs(_records(), "prefill_tokens_per_second", "f1_macro")
    assert len(displayed) == 2, "the figure that a report has stands there before anything is chosen"
    (model, metric), (_, speed, quality, margin) = (box.children[1].children for box in offered)
    assert list(model.options) == [choosing.ALL, *sorted(samples.MODELS[:2])]
    model.value = samples.MODELS[1]
    assert displayed[-1].startswith("prefill rate: 3 of 3 measurements")
    metric.value = "weights_bytes"
    assert displayed[-1].startswith("weights in memory: 3 of 3 measurements")
    assert margin.value == pytest.approx(2) and "f1_macro" not in dict(speed.options).values()
    speed.value = "weights_bytes"
    assert displayed[-2].startswith("F1 (macro): change (points) against speed of 7 runs")
    assert displayed[-1].startswith("F1 (macro) within 2 points: 6 of 7 runs keep it; lost: 1, cannot tell: 0.")
    margin.value = 50.0
    assert displayed[-1].startswith("F1 (macro) within 50 points: 7 of 7 runs keep it")
    quality.value = "retrieval_exact_match"
    assert displayed[-1].startswith("key-value retrieval, exact match within 50 points: ")


def test_a_tighter_margin_keeps_fewer():
    records = _records()
    kept = [
        int(
            choosing.within_margin(records, "prefill_tokens_per_second", "f1_macro", margin)
            .split(": ")[1]
            .split(" ")[0]
        )
        for margin in (0.0, 1.0, 2.0, 5.0, 50.0)
    ]
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == len(records)
    text = choosing.within_margin(records, "decode_tokens_per_second", "f1_macro", 50.0)
    assert text.endswith("No run that keeps it is better in decode rate.")
    slow = record.build("x", "m", "proxy", "quick", {}, samples.measurements())
    assert "Kept, and better in prefill rate: X on m." in choosing.within_margin(
        [slow], "prefill_tokens_per_second", "f1_macro", 5.0
    )


def test_a_score_that_rose_is_kept():
    """Previously it was counted among the undecided ones."""
    rose = samples.scored("f1_macro", 0.85, 0.91, "better")
    run = samples.run(measurements=[samples.timed("prefill_tokens_per_second", 1.3), rose])
    text = choosing.within_margin([run], "prefill_tokens_per_second", "f1_macro", 2.0)
    assert text.startswith("F1 (macro) within 2 points: 1 of 1 run keep it; lost: 0, cannot tell: 0.")
    assert "Kept, and better in prefill rate: Structured pruning on" in text


def test_a_score_without_points_keeps_and_names_its_own_margin(displayed, offered):
    """Perplexity is judged by its own relative margin, whatever margin in points is chosen."""
    choosing.trade_offs(_records(), "prefill_tokens_per_second", "perplexity")
    margin = offered[0].children[1].children[-1]
    assert margin.value == pytest.approx(2)  # as for any score, until one in points is chosen
    margin.value = 50.0
    assert displayed[-2] == displayed[0] and displayed[-2].startswith("perplexity: change (%)")
    assert displayed[-1].startswith("perplexity within its own margin: 7 of 7 runs keep it")


def test_many_runs_are_named_in_readable_sentences():
    pairs = [(name, model) for name in samples.OPTIMIZATIONS[:4] for model in samples.MODELS[:2]]
    runs = [record.build(name, model, "proxy", "quick", {}, samples.measurements()) for name, model in pairs]
    text = choosing.within_margin(runs, "prefill_tokens_per_second", "f1_macro", 5.0)
    assert "Kept, and better in prefill rate: Structured pruning on" in text and text.endswith("2 more.")
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(text)), text


def test_better_in_a_figure_holds_across_the_whole_set(displayed):
    """As in the matrix above it, one weak effect among many null effects is not a discovery."""

    def run(name, gain, half, verdict):
        timed = samples.timed("prefill_tokens_per_second", gain, half, verdict)
        return record.build(name, samples.MODELS[0], "proxy", "quick", {}, [timed], primaries=samples.PRIMARIES)

    weak = run("weak", 1.05, 0.048, "better")
    choosing.forest([weak], "prefill_tokens_per_second")
    choosing.forest([weak, *(run(f"r{n}", 1.0, 0.05, "inconclusive") for n in range(20))], "prefill_tokens_per_second")
    assert displayed == [
        "prefill rate: 1 of 1 measurement; 1 of all are better.",
        "prefill rate: 21 of 21 measurements; 0 of all are better.",
    ]


def test_the_reading_of_a_figure_holds_across_the_whole_set():
    rate = samples.timed("prefill_tokens_per_second", 1.05, 0.06)  # better in its record, chance within the set
    run = samples.run(measurements=[rate, *(m for m in samples.measurements() if m.workload != "prefill")])
    failed = samples.without_result("failed", "no memory", "automl_components")
    assert run.verdict.performance == "better"
    frame = choosing.tables.across(choosing.measured([run, failed]), rate.metric)
    assert frame["verdict"].tolist() == ["inconclusive"]
