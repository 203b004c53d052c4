"""Ranks, charts and the command of a cell: what the index shows besides its matrix."""

import shlex
import xml.etree.ElementTree as xml

import pytest

from lib.report.analysis import headlines, ranking, result_set
from lib.report.figures.inline import trade_off_svg
from lib.report.figures.inline.trade_off_svg import TradeOff
from lib.report.pages import views
from lib.report.records import record
from lib.report.records.setting import reproduce
from lib.suite.cli import command
from lib.suite.cli import options as command_line
from lib.suite.plan import plan
from tests.report import samples


def _sets(gains):
    return [samples.whole(name, samples.MODELS[0], gain) for name, gain in gains.items()]


def test_ranks_overlap_only_where_intervals_do():
    places = ranking.places(_sets({"a": 2.0, "b": 1.3, "c": 1.301, "d": 0.9}), "prefill_tokens_per_second")
    assert [(p.optimization, p.low, p.high) for p in (places[0], places[3])] == [("a", 1, 1), ("d", 4, 4)]
    assert {(p.low, p.high) for p in places[1:3]} == {(2, 3)}
    assert places[0].gain == pytest.approx(2.0, rel=0.01) and places[0].provenance == "measured"


def test_ties_share_a_rank():
    places = ranking.places(_sets({"a": 2.0, "b": 1.3}), "weights_bytes")
    assert {(p.rank, p.low, p.high) for p in places} == {(1, 1, 1)}
    assert ranking.places(_sets({"a": 2.0}), "goodput_requests_per_second") == []


def _scored(name, score):
    run = samples.whole(name, samples.MODELS[0])
    return run.model_copy(update={"measurements": [score]})


def test_an_unexercised_score_has_no_rank():
    idle = samples.scored("f1_macro", 0.9, 0.9, "not_exercised").model_copy(update={"ci": None, "bound": None})
    lost = samples.scored("f1_macro", 0.9, 0.89, "maintained", 0.01)
    places = ranking.places([_scored("a", idle), _scored("b", lost)], "f1_macro")
    assert [place.optimization for place in places] == ["b"]


def test_ranks_are_uncertain_for_identical_answers_and_possible_zero_scores():
    same = samples.scored("f1_macro", 0.9, 0.9, "inconclusive").model_copy(update={"ci": None, "bound": -0.17})
    known = samples.scored("f1_macro", 0.9, 0.89, "maintained", 0.002)
    places = ranking.places([_scored("a", same), _scored("b", known)], "f1_macro")
    assert {(place.low, place.high) for place in places} == {(1, 2)}
    open_ended = samples.scored("f1_macro", 0.1, 0.12, "inconclusive").model_copy(update={"ci": (-0.4, 2.8)})
    places = ranking.places([_scored("a", open_ended), _scored("b", known)], "f1_macro")
    assert {(place.low, place.high) for place in places} == {(1, 2)}


def test_a_score_of_zero_is_the_largest_loss_not_a_missing_one():
    lost = samples.scored("f1_macro", 0.9, 0.0, "not_maintained").model_copy(update={"ratio": 0.0, "ci": (0.0, 0.02)})
    kept = samples.scored("f1_macro", 0.9, 0.9, "maintained", 0.002)
    other = _scored("a", kept).model_copy(update={"model": samples.MODELS[1]})
    weak = samples.scored("f1_macro", 0.9, 0.88, "maintained", 0.002)
    places = ranking.places([_scored("a", lost), other, _scored("b", weak)], "f1_macro")
    assert [(place.optimization, place.models) for place in places] == [("b", 1), ("a", 2)]
    assert places[1].gain == 0.0
    [alone] = ranking.places([_scored("a", lost)], "f1_macro")
    assert alone.called == 1


def test_the_front_holds_the_undominated_points():
    points = [TradeOff(str(i), "n", x, y, None, None, None, None, "maintained") for i, (x, y) in
            enumerate([(1.0, 1.0), (2.0, 0.0), (1.5, -1.0), (0.9, 0.5), (3.0, -5.0)])]  # fmt: skip
    assert [p.mark for p in trade_off_svg.front(points)] == ["0", "1", "4"]
    assert "best trade-offs: 0 n (1.00×, +1.0), 1 n (2.00×, +0.0), 4 n (3.00×, -5.0)" in trade_off_svg.words(
        points, "T"
    )


def test_doing_nothing_is_a_trade_off_too():
    points = [TradeOff(str(i), "n", x, y, None, None, None, None, "maintained") for i, (x, y) in
            enumerate([(0.93, 0.1), (0.8, 2.5), (1.2, 0.0)])]  # fmt: skip
    assert [p.mark for p in trade_off_svg.front(points, 2.0)] == ["1", "2"]
    slower = points[:1]
    assert trade_off_svg.front(slower, 2.0) == [] and "trade-offs: none" in trade_off_svg.words(slower, "T", 2.0)


def test_no_best_trade_off_uses_an_unjudged_speed():
    points = [TradeOff(str(i), "n", x, y, None, None, None, None, state, judged=judged) for i, (x, y, state, judged) in
            enumerate([(3.0, 1.0, "maintained", False), (1.2, 0.0, "maintained", True),
                       (1.5, -5.0, "not_maintained", True)])]  # fmt: skip
    assert [p.mark for p in trade_off_svg.front(points, 2.0)] == ["1", "2"]
    assert "2 n, quality not maintained (1.50×" in trade_off_svg.words(points, "T", 2.0)
    run = samples.whole("x", samples.MODELS[0], 1.4)
    speed = next(m for m in run.measurements if m.metric == views.SPEED)
    for update, judged in (({}, True), ({"verdict": "inconclusive"}, False), ({"provenance": "estimated"}, False)):
        measurements = [m.model_copy(update=update) if m is speed else m for m in run.measurements]
        open_run = run.model_copy(update={"measurements": measurements})
        point = views.point(open_run, {"x": "1"})
        assert point.judged is judged and bool(trade_off_svg.front([point], 2.0)) is judged
        (chart, _) = views.pareto(result_set.Results("proxy", [open_run], {}, ("x",), (run.model,)))["charts"]
        assert bool(chart["front"]) is judged


def test_a_mean_says_that_quality_is_lost_on_some_models():
    """Three models keep quality and one does not: the chart of means said that the optimization loses it."""
    runs = [samples.whole("x", model, 1.4) for model in samples.MODELS[:3]]
    runs.append(samples.whole("x", samples.MODELS[3], 1.4, lost=0.05))
    points = views.means(result_set.Results("proxy", runs, {}, ("x",), samples.MODELS))
    text = trade_off_svg.words(points, "T", 2.0)
    assert "; 1 lose quality beyond the margin on some model; " in text
    assert "1 X, quality not maintained on some model (1." in text
    alone = views.means(result_set.Results("proxy", runs[3:], {}, ("x",), samples.MODELS[3:]))
    text = trade_off_svg.words(alone, "T", 2.0)
    assert "; 1 lose quality beyond the margin; " in text and "1 X, quality not maintained (1." in text


def test_a_run_without_correct_answers_has_a_point():
    lost = samples.scored(views.QUALITY, 0.91, 0.0, "not_maintained")
    run = samples.run(measurements=[samples.timed(views.SPEED, 1.3), lost])
    point = views.point(run, {run.optimization: "1"})
    assert point is not None and point.y == pytest.approx(-91) and point.state == "not_maintained"


@pytest.mark.parametrize("count", [1, 2, 11])
def test_a_chart_is_valid_and_says_what_it_shows(count):
    states = ("maintained", "not_maintained", "inconclusive")
    points = [
        TradeOff(str(i), f"<{i}>", 0.3 * (i + 1), -0.7 * i, 0.2 * (i + 1), None, -0.8 * i, -0.6 * i, states[i % 3])
        for i in range(count)
    ]
    root = xml.fromstring(trade_off_svg.trade_off(points, "A & B", 2.0))
    assert root.get("role") == "img" and root.get("aria-label").startswith("A & B: ")
    texts = [element.text for element in root.iter() if element.tag == "text"]
    assert all(p.mark in texts for p in points) and "1×" in texts and "0" in texts
    for element in root.iter():
        for name in ("x", "y", "x1", "y1", "cx", "cy"):
            if element.get(name):
                assert -1 <= float(element.get(name)) <= trade_off_svg.WIDTH + 1


def test_the_pareto_chart_covers_all_models_and_each_one(tmp_path):
    samples.mixed(tmp_path)
    results = result_set.read(tmp_path, samples.OPTIMIZATIONS, samples.MODELS)
    drawn = views.pareto(results)
    assert [chart["title"] for chart in drawn["charts"]] == ["All models, means", *samples.MODELS]
    assert len(drawn["legend"]) == 11 and all(chart["front"] for chart in drawn["charts"])
    assert (
        views.pareto(result_set.Results("proxy", [])) is None and views.rankings(result_set.Results("proxy", [])) == []
    )


def test_the_command_of_a_record_requests_the_same_run():
    record = samples.run().model_copy(
        update={
            "scale": "slice", "dimensions": ["resources"],
            "parameters": {"model": "x", "device": "cuda", "ratio": 0.3, "words": ["a", "b c"], "limit": None,
                           "checkpoints": "", "random_weights": True},
        }
    )  # fmt: skip
    line = reproduce.command(record)
    assert line.startswith("python build.py run structured_pruning --model qwen3-4b-instruct-2507 --effort quick")
    _, commands = command.parser()
    options = command_line.parsed(commands["run"], shlex.split(line)[3:])
    assert (options.scale, options.device, options.random_weights, options.force) == ("slice", "cuda", True, True)
    assert options.dimension == ["resources"]
    assert plan.assignments(options.parameters) == {"ratio": "0.3", "words": "['a', 'b c']", "limit": "none"}


def test_a_cell_shows_the_metric_behind_its_verdict():
    measurements = [
        samples.timed("prefill_tokens_per_second", 1.0, 0.01, "equivalent"),
        samples.timed("decode_tokens_per_second", 1.0, 0.01, "equivalent", "decode"),
        samples.timed("attention_ms", 1.3, 0.01, "worse", "one block"),
        samples.timed("generate_tokens_per_second", 1.2, 0.01, "better", "generate"),
    ]
    declared = {"performance": ("generate_tokens_per_second", "generate")}
    run = record.build("x", samples.MODELS[1], "proxy", "quick", {}, measurements, primaries=declared)
    assert run.verdict.performance == "better" and headlines.state(run, "performance") == "▲ better, but …"
    listed = [shown.metric for shown in headlines.of(run, "performance")]
    assert listed == ["generate_tokens_per_second", "attention_ms", "prefill_tokens_per_second"]


def test_two_numbers_of_a_kind_are_distinguished_by_their_workload():
    measurements = [
        samples.timed("goodput_requests_per_second", 1.3, workload="serve"),
        samples.timed("goodput_requests_per_second", 1.1, workload="serve, within capacity"),
    ]
    run = record.build("adaptive_batch_sizes", samples.MODELS[1], "proxy", "quick", {}, measurements)
    names = [shown.what for shown in headlines.of(run, "performance")]
    assert names == ["goodput, serve", "goodput, serve, within capacity"]


def test_a_mean_over_fewer_models_says_so_and_is_no_best_trade_off():
    """It failed on three of four models: its one point was drawn as the mean of all, and was the best of them."""
    runs = [samples.whole("x", model, 1.2) for model in samples.MODELS]
    runs.append(samples.whole("y", samples.MODELS[0], 1.6))
    results = result_set.Results("proxy", runs, {}, ("x", "y"), samples.MODELS)
    points = views.means(results)
    assert [p.name for p in points] == ["X", "Y, 1 of 4 models"]
    assert [p.mark for p in trade_off_svg.front(points, 2.0)] == ["1"]
    assert [name for _, name, _ in views.legend(results)] == ["X", "Y, 1 of 4 models"]
