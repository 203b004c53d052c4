"""Over a whole set, verdicts that chance explains are withheld and all others are kept."""

import random

import pytest

from lib.report.analysis import ranking, result_set
from lib.report.analysis.noise import discoveries
from lib.report.records import record, schema
from tests.report import samples


def _run(name: str, gain: float, seed: int = 0, spread: float = 0.02):
    members = [samples.paired("prefill_tokens_per_second", gain, spread, seed=seed)]
    return record.build(name, samples.MODELS[0], "proxy", "quick", {}, members, primaries=samples.PRIMARIES)


def test_q_values_are_benjamini_and_hochbergs():
    assert discoveries.q_values([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.0533, 0.0533, 0.5], abs=1e-3)
    assert discoveries.q_values([]) == []


def test_a_clear_effect_survives_and_a_weak_one_among_many_does_not():
    strong = [_run(f"strong_{n}", 1.3) for n in range(2)]
    weak = samples.timed("prefill_tokens_per_second", 1.05, 0.048, "better")
    weak = record.build("weak", samples.MODELS[0], "proxy", "quick", {}, [weak], primaries=samples.PRIMARIES)
    nothing = [_run(f"nothing_{n}", 1.0, n) for n in range(20)]
    alone = {cell.optimization: cell for cell in discoveries.cells([weak]) if cell.dimension == "performance"}
    assert alone["weak"].p < 0.05 and alone["weak"].word == "better"
    by_optimization = {
        c.optimization: c for c in discoveries.cells([*strong, weak, *nothing]) if c.dimension == "performance"
    }
    assert (
        by_optimization["weak"].q > 0.05
        and by_optimization["weak"].word == "inconclusive"
        and by_optimization["weak"].recorded == "better"
    )
    assert all(by_optimization[f"strong_{n}"].word == "better" for n in range(2))
    settled = {r.optimization: r for r in discoveries.settled([*strong, weak, *nothing])}
    assert settled["weak"].verdict.performance == settled["weak"].measurements[0].verdict == "inconclusive"
    assert "23 primaries" in settled["weak"].verdict.reasons["performance"]
    sentence = settled["weak"].verdict.sentence
    assert sentence.startswith("Prefill undecided.") and sentence.endswith("could be chance among this many tests.")
    assert settled["strong_0"] is strong[0] and weak.verdict.performance == "better"  # the record keeps its verdict
    assert discoveries.settled([*settled.values()]) == [*settled.values()]


def test_a_score_that_rose_by_chance_is_still_maintained():
    """Previously it was called inconclusive among many unchanged scores, and so no optimization was recommended for it,
    although its interval excludes every loss.
    """

    def scored(name: str, optimized: float, verdict: str):
        score = samples.scored("f1_macro", 0.8, optimized, verdict, 0.03)
        return record.build(name, samples.MODELS[0], "proxy", "quick", {}, [score], primaries=samples.PRIMARIES)

    rose = scored("rose", 0.825, "better")
    sets = [rose, *(scored(f"same_{n}", 0.8, "maintained") for n in range(20))]
    cell = next(c for c in discoveries.cells(sets) if c.dimension == "accuracy")
    assert cell.p < 0.05 < cell.q and (cell.recorded, cell.word) == ("better", "maintained")
    settled = discoveries.settled(sets)[0]
    assert settled.verdict.accuracy == settled.measurements[0].verdict == "maintained"
    assert "Within this set accuracy is maintained: q " in settled.verdict.sentence
    assert discoveries.settled([settled, *sets[1:]]) == [settled, *sets[1:]]


def test_withheld_effects_lend_no_significance_to_others():
    """Ten weak verdicts beside ten strong effects of a busy machine, which give no verdict."""

    def primary(name: str, gain: float, half: float, verdict: str):
        timed = samples.timed("prefill_tokens_per_second", gain, half, verdict)
        timed = timed.model_copy(update={"reason": "busy"} if verdict == "inconclusive" else {})
        return record.build(name, samples.MODELS[0], "proxy", "quick", {}, [timed], primaries=samples.PRIMARIES)

    weak = [primary(f"weak_{n}", 1.05, 0.048, "better") for n in range(10)]
    busy = [primary(f"busy_{n}", 1.5, 0.1, "inconclusive") for n in range(10)]
    words = {c.optimization: c.word for c in discoveries.cells([*weak, *busy]) if c.dimension == "performance"}
    assert set(words.values()) == {"inconclusive"}
    alone = [c for c in discoveries.cells(weak) if c.dimension == "performance"]
    assert {c.word for c in alone} == {"better"} and all(c.q < 0.05 for c in alone)


def test_a_set_without_effects_rarely_has_a_verdict():
    """Sets of 44 cells without an effect: a verdict may survive in about one set of twenty."""
    chance, called = random.Random(5), 0
    for _ in range(40):
        runs = [_run(f"r{n}", 1.0, chance.randrange(10**9), 0.05) for n in range(44)]
        called += any(cell.word in discoveries.CALLS for cell in discoveries.cells(runs))
    assert called <= 5


def test_counted_primaries_have_no_p_value():
    [cell] = [c for c in discoveries.cells([samples.whole("a", samples.MODELS[0])]) if c.dimension == "efficiency"]
    assert (cell.metric, cell.p, cell.q, cell.word) == ("prefill_flops_per_token", None, None, "better")


def test_the_result_files_contain_the_cells(tmp_path):
    results = result_set.read(samples.good(tmp_path, samples.OPTIMIZATIONS[:2]))
    for content in (result_set.master(results), result_set.complete(results)):
        assert len(content["cells"]) == 2 * len(samples.MODELS) * 4
        assert schema.faults(content) == []
    assert results.settled.records == results.records


def test_counts_in_the_result_files_use_the_settled_verdicts():
    """Previously the report counted a withheld gain as inconclusive, but its JSON as better."""
    weak = samples.timed("prefill_tokens_per_second", 1.05, 0.048, "better")
    weak = record.build("weak", samples.MODELS[0], "proxy", "quick", {}, [weak], primaries=samples.PRIMARIES)
    runs = [weak, *(_run(f"nothing_{n}", 1.0, n) for n in range(20))]
    results = result_set.Results("proxy", runs, {}, tuple(run.optimization for run in runs), samples.MODELS[:1])
    for content in (result_set.master(results), result_set.complete(results)):
        [line] = [line for line in content["aggregate"] if line["optimization"] == "weak"]
        assert line["verdicts"] == {"inconclusive": 1}


def test_the_ranking_counts_the_models_with_a_decided_verdict():
    runs = [samples.whole("a", model, 1.3) for model in samples.MODELS[:3]] + [samples.whole("a", samples.MODELS[3], 1)]
    [place] = ranking.places(discoveries.settled(runs), "prefill_tokens_per_second")
    assert (place.models, place.called) == (4, 3)


def test_a_withheld_rate_gives_no_latency_verdict():
    """One quantity is judged once: the time to the first token is the prefill rate in another form."""
    rate = samples.timed("prefill_tokens_per_second", 1.05, 0.048, "better")
    latency = samples.timed("time_to_first_token_ms", 1 / 1.05, 0.044, "better")
    decode = samples.timed("time_per_output_token_ms", 0.8, 0.02, "better", "decode")
    weak = record.build("weak", samples.MODELS[0], "proxy", "quick", {}, [rate, latency, decode],
                        primaries=samples.PRIMARIES)  # fmt: skip
    settled = discoveries.settled([weak, *(_run(f"nothing_{n}", 1.0, n) for n in range(20))])[0]
    assert [m.verdict for m in settled.measurements] == ["inconclusive", "inconclusive", "better"]
    assert settled.measurements[1].reason == settled.measurements[0].reason
