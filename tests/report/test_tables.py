"""Tables match the record; figures draw intervals, accept any frame, and never come without text."""

import pandas as pd
import pytest

from lib.measure.metrics import digits, measurement
from lib.report import tables
from lib.report.figures import style, theme
from lib.report.records import record, rows
from lib.report.text import quantities
from lib.report.text.wording import label, title
from tests.report import samples

SAMPLED = {"seconds", "cpu_percent", "memory_bytes"}
PNG = b"\x89PNG\r\n"


def test_quantities_read_well():
    assert quantities.quantity(7_240_000, "bytes") == "7.24 MB"
    assert quantities.quantity(144, "bytes/token") == "144 B/token"
    assert quantities.quantity(5.2e6, "FLOP/token") == "5.20 MFLOP/token"
    assert quantities.quantity(3_620_000, "parameters") == "3.62 M"
    assert quantities.quantity(812.44, "tokens/s") == "812 tokens/s"
    assert quantities.quantity(0.0021, "J/token") == "0.00210 J/token"
    assert quantities.quantity(17.0, "items") == "17 items"
    assert quantities.quantity(None, "ms") == "–"
    assert quantities.quantity(0.91, "share") == "0.910"
    assert digits.interval(-5.6, -2.61, ".1f") == "−5.6 to −2.6"
    assert digits.interval(1.27, 1.35) == "1.27–1.35"
    assert [digits.signed(value) for value in (2.5, -2.5, 0.0, -0.01)] == ["+2.5", "−2.5", "0.0", "0.0"]
    assert quantities.times(1.0049) == "1.005×"
    assert quantities.duration(185) == "3 min 05 s"


def test_titles_and_labels_need_no_entry():
    assert title("structured_pruning") == "Structured pruning"
    assert title("continuous_nas") == "Continuous NAS"
    assert title("automl_components") == "AutoML components"
    assert title("a_twelfth_optimization") == "A twelfth optimization"
    assert label("latency_p99_ms") == "latency p99"


def test_tidy_has_one_numeric_row_per_measurement():
    run = samples.run()
    frame = tables.tidy(run)
    assert list(frame.columns) == list(tables.TIDY)
    assert len(frame) == len(run.measurements)
    time = frame.set_index("metric").loc["time_to_first_token_ms"]
    assert time["gain"] == pytest.approx(1 / time["ratio"])
    assert time["gain_low"] < time["gain"] < time["gain_high"]


def test_workloads_of_one_metric_are_distinguished():
    timed = [samples.timed("decode_tokens_per_second", 1.1, workload=name) for name in ("short", "long")]
    assert list(tables.tidy(timed)["label"]) == ["decode rate [short]", "decode rate [long]"]


def test_the_table_shows_interval_floor_mde_verdict_and_provenance():
    frame = tables.measurements(samples.run(), "performance")
    line = frame.iloc[0].to_dict()
    assert line["95 % interval"] == "1.280–1.340"
    assert (line["noise floor"], line["MDE"], line["n"]) == ("1.2 %", "2.1 %", "12")
    assert (line["verdict"], line["provenance"]) == ("▲ better", "measured")
    assert "dimension" in tables.measurements(samples.run())


def test_tables_are_escaped_and_survive_markdown():
    frame = pd.DataFrame({"a": ["<script>alert(1)</script>", "x|y"], "b": [1.23456, None]})
    assert "<script>" not in tables.to_html(frame)
    assert "x\\|y" in tables.markdown(frame)
    assert tables.markdown(frame).splitlines()[-1].endswith("| – |")


@pytest.mark.parametrize("count", [0, 1, 8])
def test_tables_across_records_accept_any_number(count):
    records = [samples.run(model=samples.MODELS[i % 4], optimization=f"o_{i // 4}") for i in range(count)]
    assert len(tables.matrix(records)) == count
    assert len(tables.speed_and_quality(records)) == count
    assert len(tables.across(records, "prefill_tokens_per_second")) == count
    assert len(tables.provenance(records)) == count
    assert len(tables.sentences(records)) == count
    assert list(tables.coverage(records).columns[:2]) == ["dimension", "metric"]
    assert len(tables.missing(records)) == min(count, 1)


def test_a_record_counts_once_despite_many_workloads_of_its_metric():
    run = samples.run()
    often = [samples.timed("decode_tokens_per_second", 1.1, workload=name) for name in ("decode", "long", "longer")]
    records = [run.model_copy(update={"measurements": often, "optimization": name}) for name in ("a", "b")]
    (line,) = tables.coverage(records).to_dict("records")
    assert line[run.model] == 2


def test_controls_are_drawn_with_their_own_interval():
    kl = measurement.informative("kl_divergence_nats", "prefill", 0.0, 0.4, "windows", ratio=None, ci=(0.3, 0.5))
    arms = [
        record.Control(name="by chance", measurements=[kl, samples.scored("f1_macro", 0.9, 0.45, "not_maintained")])
    ]
    assert tables.controls(arms, "kl_divergence_nats").to_dict("records") == [
        {"arm": "by chance", "value": 0.4, "low": 0.3, "high": 0.5}
    ]
    line = tables.controls(arms, "f1_macro").iloc[0]
    assert (line["value"], line["low"], line["high"]) == pytest.approx((0.45, 0.432, 0.468))
    assert tables.controls(arms, "accuracy").empty


def test_quality_is_in_points_and_higher_is_better():
    line = tables.speed_and_quality([samples.run(accuracy="not_maintained")]).iloc[0]
    assert line["y"] == pytest.approx(-4.1)
    assert line["y_low"] < line["y"] < line["y_high"]
    worse = tables.speed_and_quality([samples.run()], quality="perplexity").iloc[0]
    assert worse["y"] < 0  # perplexity rose


def _impact() -> pd.DataFrame:
    slopes = {"saliency": 0.1, "random": 0.4}
    lines = [(s, 1 - s * k, 0.9 - s * k, 1.1 - s * k, arm) for arm, k in slopes.items() for s in (0.1, 0.3)]
    return pd.DataFrame(lines, columns=["strength", "value", "low", "high", "arm"])


def test_impact_draws_intervals_margin_and_baseline():
    figure = style.impact(
        _impact(),
        x_label="share removed",
        y_label="F1 (share)",
        controls=["random"],
        reference=1.0,
        margin=(0.98, 1.02),
    )
    axes = figure.axes[0]
    assert len(axes.containers) == 2  # an interval per arm
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["within the margin", "baseline", "saliency", "random"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share removed", "F1 (share)")


def _bound() -> pd.DataFrame:
    lines = [
        ("prefill", "baseline", 34.0, 12.0, 33.0, 36.0, "compute"),
        ("prefill", "optimized", 26.0, None, None, None, None),
    ]
    return pd.DataFrame(lines, columns=["workload", "arm", "time", "bound", "low", "high", "limit"])


@pytest.mark.parametrize(
    "figure",
    [
        lambda: style.impact(_impact(), x_label="x", y_label="y", log_y=True),
        lambda: style.impact(_impact().drop(columns=["low", "high"]), x_label="x", y_label="y"),
        lambda: style.impact(_impact().head(0), x_label="x", y_label="y", reference=1.0),
        lambda: style.forest(tables.tidy(samples.run())),
        lambda: style.forest(tables.tidy([])),
        lambda: style.forest(tables.tidy(samples.by_chance(3)), title="by chance"),
        lambda: style.bound(_bound()),
        lambda: style.bound(_bound().head(0)),
        lambda: style.bars(_impact().assign(arm=list("abcd")), y_label="F1", controls=["b"], margin=(0, 1)),
        lambda: style.trade_off(tables.speed_and_quality([samples.run()]), x_label="x", y_label="y", label="label"),
        lambda: style.trade_off(tables.speed_and_quality([]), x_label="x", y_label="y"),
        lambda: style.process(pd.DataFrame(samples.process().model_dump(include=SAMPLED)), cores=2),
    ],
)  # fmt: skip
def test_every_figure_can_be_drawn(figure):
    assert style.png(figure()).startswith(PNG)


def test_a_figure_without_text_is_refused():
    with pytest.raises(ValueError, match="alternative text"):
        style.show(style.forest(tables.tidy([])), " ")


def test_colors_and_markers_distinguish_arms():
    looks = {theme.look(index) for index in range(36)}
    assert len(looks) == 36


def test_rows_keep_the_reason_for_missing_values():
    row = rows.rows(samples.measurements())[-1]
    assert row["optimized"] == "–"
    assert row["reason"] == "the peak of this machine was not measured"


def test_a_figure_of_many_models_draws_the_first_and_says_so():
    frame = pd.DataFrame({"model": [f"m{n:02}" for n in range(40) for _ in range(2)], "value": 1.0})
    shown, note = tables.few(frame, "model")
    assert shown["model"].nunique() == tables.MOST_PANELS and "12 of 40" in note
    assert tables.few(frame[:8], "model")[1] == "" and len(tables.few(frame[:8], "model")[0]) == 8


@pytest.mark.parametrize(
    ("ci", "shown"),
    [((0.0318, 0.036), "0.0318–0.0360"), ((1.01e-5, 1.2e-5), "0.000010–0.000012"), ((0.0, 0.0), "0–0"), (None, "–")],
)
def test_an_interval_has_as_many_digits_as_it_warrants(ci, shown):
    """In `1.01e-05–1.2e-05` the dash looked like another minus sign."""
    divergence = measurement.informative("kl_divergence_nats", "prefill", 0.0, 0.03, "32 windows", ci=ci, n=32)
    assert rows.row(divergence)["95 % interval"] == shown
