"""Two result sets: planted changes are found, unchanged sets show none, and incomparable ones give the reason."""

import math

import pytest
from scipy import stats

from lib.measure.metrics import measurement, paired_samples
from lib.report.analysis import compare
from lib.report.analysis.noise import gains
from lib.report.records import record
from tests.report import samples

STEM = ("structured_pruning", samples.MODELS[1])


def _sets(old, new):
    return {(c.metric, c.workload): c for c in compare.compare([old], [new])}


def _changed(record, **fields):
    return record.model_copy(update=fields)


def _with(record, measurement):
    others = [m for m in record.measurements if m.metric != measurement.metric]
    return record.model_copy(update={"measurements": [*others, measurement]})


def _whole(seed=0, gain=1.2, spread=0.01):
    whole = samples.whole(*STEM, gain=gain, seed=seed)
    return _with(whole, samples.paired("prefill_tokens_per_second", gain, spread, seed=seed))


@pytest.mark.parametrize(("gain", "verdict"), [(1.2, "equivalent"), (1.1, "worse"), (1.35, "better")])
def test_planted_speed_changes_are_found(gain, verdict):
    change = _sets(_whole(spread=0.004), _whole(1, gain, spread=0.004))["prefill_tokens_per_second", "prefill"]
    assert change.verdict == verdict and change.primary
    assert change.low <= change.ratio <= change.high and change.ratio == pytest.approx(gain / 1.2, rel=0.01)
    assert change.regression == (verdict == "worse") and "12 paired blocks" in change.how


def test_a_slower_machine_is_not_a_regression():
    old = _whole()
    slow = _whole(1)
    for m in slow.measurements:
        if m.samples:
            m.samples = {arm: [value / 3 for value in values] for arm, values in m.samples.items()}
    assert not any(change.regression for change in _sets(old, slow).values())


def test_noise_alone_is_not_a_regression():
    """Forty runs against themselves: no finding in the family of all, and at most a few if each is its own family."""
    pairs = [(_whole(seed, spread=0.03), _whole(seed + 1, spread=0.03)) for seed in range(0, 80, 2)]
    named = [[_changed(record, model=f"{i}") for record in pair] for i, pair in enumerate(pairs)]
    together = compare.compare([old for old, _ in named], [new for _, new in named])
    assert sum(c.primary and not c.reason for c in together) >= 200 and not [c for c in together if c.regression]
    alone = [any(change.regression for change in _sets(*pair).values()) for pair in pairs]
    assert sum(alone) <= 5  # 5 % of 40 is 2; more than 5 would occur once in sixty


def test_wide_samples_are_inconclusive():
    change = _sets(_whole(spread=0.2), _whole(1, spread=0.2))["prefill_tokens_per_second", "prefill"]
    assert change.verdict == "inconclusive"


def test_a_shorter_time_is_better():
    old = _with(_whole(), samples.paired("time_to_first_token_ms", 1.0))
    new = _with(_whole(1), samples.paired("time_to_first_token_ms", 1.3, seed=1))
    change = _sets(old, new)["time_to_first_token_ms", "prefill"]
    assert change.verdict == "better" and change.ratio == pytest.approx(1.3, rel=0.02) and not change.primary


def test_counted_numbers_and_intervals():
    old, new = _whole(), _whole(1)
    heavier = measurement.counted("weights_bytes", "load", 7_240_000.0, 6_000_000.0, "sum of the tensors' bytes")
    worse = samples.scored("f1_macro", 0.91, 0.80, "not_maintained", 0.01)
    changes = _sets(old, _with(_with(new, heavier), worse))
    weights, score = changes["weights_bytes", "load"], changes["f1_macro", "classify"]
    assert weights.regression and weights.how == "counted, without spread" and weights.p is None
    assert score.regression and "both intervals" in score.how
    assert changes["parameters", "load"].verdict == "equivalent"


def test_the_margin_of_a_score_uses_the_level_that_changes():
    """An arm that answers half as well as its baseline and then loses 1.4 points stays within two points."""
    old = samples.scored("f1_macro", 0.80, 0.400, "not_maintained", 0.001)
    less, lost = (samples.scored("f1_macro", 0.80, score, "not_maintained", 0.001) for score in (0.386, 0.370))
    key = "f1_macro", "classify"
    assert _sets(_with(_whole(), old), _with(_whole(1), less))[key].verdict == "equivalent"
    assert _sets(_with(_whole(), old), _with(_whole(1), lost))[key].regression


def test_an_interval_over_processes_keeps_its_degrees_of_freedom_without_samples():
    """Six processes of twelve pairs each give ten degrees of freedom, not those of 144 pairs."""

    def joules(ratio):
        base = [100.0 + 0.01 * pair for pair in range(72)]
        process = [pair // 12 for pair in range(72)]
        opt = [value * ratio * (1 + 0.012 * (number - 2.5)) for value, number in zip(base, process)]
        made = paired_samples.from_samples(
            "energy_joules_per_token", "decode", base, opt, source="6 fresh processes", floor=0.001, samples=False,
            process=process,
        )  # fmt: skip
        assert made.processes == 6 and made.n == 72
        return made

    before, after = joules(0.70), joules(0.80)
    half = math.hypot(*(math.log(m.ci[1] / m.ci[0]) / 2 for m in (before, after)))
    effect = math.log(after.ratio / before.ratio)
    change = compare._measurements(STEM, ("energy_joules_per_token", "decode"), before, after, "")
    assert change.high < 1, "the interval excludes no change"
    assert change.p == pytest.approx(2 * stats.t.sf(effect / half * stats.t.ppf(0.975, 10), 10), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"effort": "thorough"}, "different effort: quick, thorough"),
        ({"environment": samples.ENVIRONMENT | {"cpu": "Another"}}, "different environment: cpu"),
        ({"environment": samples.ENVIRONMENT | {"threads": 4}}, "different environment: threads None, 4"),
        ({"scale": "slice"}, "different scale"),
        ({"parameters": {"model": "m", "seed": 1}}, "different parameter: seed 0, 1"),
        ({"environment": samples.ENVIRONMENT | {"jobs_beside": 1}}, "different number of other jobs: 0, 1"),
        ({"process": samples.process(5).model_copy(update={"jobs_side_by_side": 2})}, "jobs side by side: 1, 2"),
        ({"details": {"stack": {"value": ["b"]}}}, "different choice: stack ['a'], ['b']"),
        ({"status": "failed", "reason": "x"}, "failed in the new set"),
    ],
)
def test_runs_that_cannot_be_compared_say_why(fields, reason):
    stack = {"stack": {"value": ["a"]}}
    old = _changed(_whole(), details=stack, environment=samples.ENVIRONMENT | {"jobs_beside": 0})
    changes = compare.compare([old], [_changed(_changed(_whole(1), details=stack), **fields)])
    assert changes and all(change.verdict == "not comparable" and reason in change.reason for change in changes)


def test_values_known_on_one_side_only_are_not_differences():
    old = _changed(_whole(), parameters={"seed": 0, "new_knob": 3}, details={"stack": {"value": ["a"]}})
    assert any(not change.reason for change in compare.compare([old], [_changed(_whole(1), details={})]))


@pytest.mark.parametrize("n", [None, 1])
def test_a_single_reading_is_never_a_regression(n):
    def peak(value: float):
        read = measurement.counted("peak_memory_bytes", "generate", 1e8, value, "VmHWM, read once", "measured")
        return read.model_copy(update={"n": n})

    change = _sets(_with(_whole(), peak(1e8)), _with(_whole(1), peak(2e8)))["peak_memory_bytes", "generate"]
    assert change.primary and change.verdict == "inconclusive" and not change.regression and "read once" in change.how
    better = _sets(_with(_whole(), peak(2e8)), _with(_whole(1), peak(1e8)))["peak_memory_bytes", "generate"]
    assert better.verdict == "inconclusive"


@pytest.mark.parametrize("metric", ["peak_tensor_bytes", "checkpoint_bytes"])
def test_a_number_identical_in_every_process_is_treated_as_counted(metric):
    def counted(value: float):
        return measurement.counted(metric, "generate", 1e8, value, "all live tensors at the worst moment", "measured")

    change = _sets(_with(_whole(), counted(1e8)), _with(_whole(1), counted(1.3e8)))[metric, "generate"]
    assert change.verdict == "worse" and change.regression == change.primary and change.how.startswith("counted")
    same = _sets(_with(_whole(), counted(1e8)), _with(_whole(1), counted(1e8)))[metric, "generate"]
    assert same.verdict == "equivalent"


def test_answers_that_are_no_longer_identical_are_compared():
    same = samples.scored("f1_macro", 0.91, 0.91, "maintained").model_copy(update={"ci": None, "bound": -0.008})
    lost = samples.scored("f1_macro", 0.91, 0.80, "not_maintained", 0.01)
    key = "f1_macro", "classify"
    assert _sets(_with(_whole(), same), _with(_whole(1), lost))[key].regression
    assert _sets(_with(_whole(), same), _with(_whole(1), same))[key].verdict == "equivalent"
    one_model = same.model_copy(update={"bound": None})
    assert _sets(_with(_whole(), one_model), _with(_whole(1), one_model))[key].verdict == "equivalent"


def test_estimated_and_unexercised_values_are_not_compared():
    energy = samples.paired("energy_joules_per_token", 1.2).model_copy(update={"provenance": "estimated"})
    idle = samples.scored("f1_macro", 0.91, 0.91, "not_exercised").model_copy(update={"reason": "never acted"})
    changes = _sets(_with(_with(_whole(), energy), idle), _with(_with(_whole(1), energy), idle))
    assert changes["energy_joules_per_token", "prefill"].reason == "it is only estimated"
    assert changes["f1_macro", "classify"].reason == "not exercised in the old set"


def test_variation_between_processes_is_part_of_the_uncertainty():
    """Blocks agree within a process, but by the stored floor, processes differ by more than the change."""
    key = "prefill_tokens_per_second", "prefill"
    old, new = _whole(spread=0.002), _whole(1, 1.14, spread=0.002)
    assert _sets(old, new)[key].verdict == "worse"
    for run in (old, new):
        for m in run.measurements:
            m.noise_floor = 0.06 if m.metric == key[0] else m.noise_floor
    change = _sets(old, new)[key]
    assert change.verdict == "inconclusive" and change.low < 0.9 and change.high > 1


@pytest.mark.parametrize("processes", [3, 6, 12])
def test_degrees_of_freedom_are_processes_whatever_their_number_of_blocks(processes):
    """p inverts the wider interval, with the heavy tail of few processes, because Holm looks far into the tail."""
    change = compare.Change(*STEM, "prefill_tokens_per_second", "prefill", "", True)
    timed = samples.timed("prefill_tokens_per_second", 1.2, 0.05)
    timed = timed.model_copy(update={"n": 12 * processes, "processes": processes})
    half = gains.NORMAL * math.hypot(gains.error(timed), gains.error(timed))

    def p(effect: float) -> float:
        blocks = (effect, effect - 0.001, effect + 0.001, 0.0005, 24 * processes - 2)
        return compare._estimated(change, 1.0, *gains.at_least(blocks, timed, timed), "").p

    assert p(1.01 * half) < 0.05 < p(0.99 * half)
    quantile = stats.t.ppf(0.975, 2 * processes - 2)
    assert p(2 * half) == pytest.approx(2 * stats.t.sf(2 * quantile, 2 * processes - 2))


def test_metrics_that_cannot_be_compared_say_why():
    old, new = _whole(), _whole(1)
    lost = measurement.unavailable("weights_bytes", "load", "nobody counted")
    estimated = measurement.counted("parameters", "load", 10, 5, "guess", "estimated")
    shared = [m for m in new.measurements if m.metric not in ("prefill_flops_per_token", "weights_bytes", "parameters")]
    changes = _sets(old, _changed(new, measurements=[*shared, lost, estimated]))
    assert "unavailable in the new set: nobody counted" in changes["weights_bytes", "load"].reason
    assert "derived in the old set, estimated" in changes["parameters", "load"].reason
    assert "not measured in the new set" in changes["prefill_flops_per_token", "prefill"].reason


def test_runs_on_one_side_only_and_the_same_run():
    first, second = samples.whole("structured_pruning", samples.MODELS[0]), samples.whole("x", samples.MODELS[0])
    reasons = {(c.optimization, c.reason) for c in compare.compare([first], [second])}
    assert reasons == {("structured_pruning", "no run in the new set"), ("x", "no run in the old set")}
    [same] = compare.compare([first], [first])
    assert "the same run" in same.reason


def test_holm_is_stricter_than_no_correction_but_not_than_bonferroni():
    changes = [
        compare.Change("o", "m", "f1_macro", str(i), "", True, ratio=1.0, low=1.0, high=1.0, p=p)
        for i, p in enumerate((0.01, 0.04, 0.03, 0.2))
    ]
    assert [c.p for c in compare._holm(changes)] == pytest.approx([0.04, 0.09, 0.09, 0.2])


def _score(metric, baseline, optimized, ends, workload="generate", n=160):
    """Return a score with its interval in points of the difference."""
    ratio = optimized / baseline if baseline else None
    ci = tuple((baseline + end) / (baseline or 1) for end in ends)
    return measurement.judged(
        metric, workload, baseline=baseline, optimized=optimized, ratio=ratio, ci=ci, n=n, verdict="not_maintained",
        provenance="measured", source="160 items", margin=0.02, bound=ends[0],
    )  # fmt: skip


def test_a_drop_to_no_correct_answers_is_a_regression():
    """A ratio of zero has no logarithm, so the loss is judged in points."""
    key = "retrieval_exact_match", "generate"
    sound, broken = (_score(key[0], 0.9, score, ends) for score, ends in ((0.89, (-0.03, 0.01)), (0.0, (-0.95, -0.85))))
    lost = _sets(_with(_whole(), sound), _with(_whole(1), broken))[key]
    assert lost.regression and lost.ratio is None and lost.p < 1e-6 and lost.how.startswith("−89.0 points (−9")
    won = _sets(_with(_whole(), broken), _with(_whole(1), sound))[key]
    assert won.verdict == "better" and won.points[0] == pytest.approx(0.89)
    assert _sets(_with(_whole(), broken), _with(_whole(1), broken))[key].verdict == "inconclusive"


def test_a_low_score_whose_interval_contains_zero_is_compared_in_points():
    key = "retrieval_exact_match", "generate"
    nothing = _score(key[0], 0.0, 0.0, (-0.001, 0.001))
    low, lower = (_score(key[0], 0.02, score, (-0.025, 0.005)) for score in (0.02, 0.01))
    change = _sets(_with(_whole(), low), _with(_whole(1), lower))[key]
    assert change.verdict == "inconclusive" and change.points[0] == pytest.approx(-0.01)
    assert _sets(_with(_whole(), nothing), _with(_whole(1), nothing))[key].verdict == "equivalent"


def test_a_perplexity_without_an_interval_is_not_compared():
    """Windows of fewer than six documents have no interval: such numbers are subject to chance, unlike counts."""
    few = samples.scored("perplexity", 41.0, 41.5, "inconclusive", workload="prefill")
    few = few.model_copy(update={"ci": None, "bound": None, "n": 8})
    worse = few.model_copy(update={"optimized": 60.0, "ratio": 60 / 41})
    change = _sets(_with(_whole(), few), _with(_whole(1), worse))["perplexity", "prefill"]
    assert change.verdict == "not comparable" and "neither samples nor an interval" in change.reason


def test_constant_readings_are_treated_as_counted_and_others_are_not():
    def peak(*values: float):
        read = measurement.informative("peak_memory_bytes", "generate", values[0], values[0], "the allocator's peak")
        kept = {"baseline": [*values], "optimized": [*values]}
        return read.model_copy(update={"n": len(values), "samples": kept, "verdict": "equivalent"})

    key = "peak_memory_bytes", "generate"
    assert _sets(_with(_whole(), peak(1e8, 1e8)), _with(_whole(1), peak(2e8, 2e8)))[key].regression
    scattering = _sets(_with(_whole(), peak(1e8, 1.1e8)), _with(_whole(1), peak(2e8, 2e8)))[key]
    assert scattering.verdict == "not comparable"


def test_a_single_reading_is_not_called_equivalent():
    read = measurement.counted("peak_memory_bytes", "generate", 1e8, 1e8, "VmHWM, read once", "measured")
    change = _sets(_with(_whole(), read), _with(_whole(1), read))["peak_memory_bytes", "generate"]
    assert change.verdict == "inconclusive" and "without a verdict" in change.how


def test_public_task_scores_and_verdict_carriers_make_a_regression():
    kept, lost = (_score("accuracy", 0.6, score, (score - 0.65, score - 0.55), "arc_easy") for score in (0.6, 0.4))
    assert _sets(_with(_whole(), kept), _with(_whole(1), lost))["accuracy", "arc_easy"].regression
    old, new = (
        record.build("feedback_mechanisms", STEM[1], "proxy", "quick", {}, [member], environment=samples.ENVIRONMENT)
        for member in (samples.paired("generate_tokens_per_second", gain, 0.004, "generate") for gain in (1.2, 1.0))
    )
    assert _sets(old, new)["generate_tokens_per_second", "generate"].regression


def test_the_ratio_shown_is_the_records_own_where_they_span_processes():
    """One process of six is slow: the records' means show it, the medians of all blocks would not."""

    def timed(slow: float):
        process = [number for number in range(6) for _ in range(4)]
        base = [100.0 + 0.1 * (at % 4) for at in range(24)]
        opt = [value * (slow if number == 5 else 1.0) for value, number in zip(base, process)]
        return paired_samples.from_samples(
            "prefill_tokens_per_second", "prefill", base, opt, source="6 fresh processes", floor=0.01, process=process
        )

    old, new = timed(1.0), timed(0.7)
    change = _sets(_with(_whole(), old), _with(_whole(1), new))["prefill_tokens_per_second", "prefill"]
    assert new.ratio == pytest.approx(0.7 ** (1 / 6)) and change.ratio == pytest.approx(new.ratio / old.ratio)
    assert "over 6 and 6 processes" in change.how and change.low < 0.7 ** (1 / 6) < change.high


def test_newly_degenerated_output_is_a_regression():
    sound = samples.scored("perplexity", 41.0, 41.5, "maintained", 0.01, "prefill")
    broken = measurement.invalid("perplexity", "prefill", "its logits are not finite")
    key = "perplexity", "prefill"
    change = _sets(_with(_whole(), sound), _with(_whole(1), broken))[key]
    assert change.regression and "degenerated in the new set: its logits are not finite" in change.how
    for old, new in ((broken, sound), (broken, broken)):
        assert _sets(_with(_whole(), old), _with(_whole(1), new))[key].verdict == "not comparable"
    busy = measurement.invalid("prefill_tokens_per_second", "prefill", "withheld, the output has degenerated")
    assert not _sets(_whole(), _with(_whole(1), busy))["prefill_tokens_per_second", "prefill"].regression


def test_a_metric_judged_by_neither_record_is_shown_without_a_regression():
    """Processor seconds beside an energy counter, and process peaks that scatter by more than the model's size."""
    spent = [samples.paired("cpu_seconds_per_token", gain, 0.004, "decode") for gain in (1.2, 0.9)]
    shown = [measurement.unjudged(m, "energy is judged, by its counter") for m in spent]
    key = "cpu_seconds_per_token", "decode"
    for old, new, regression in ((*spent, True), (shown[0], spent[1], True), (*shown, False)):
        change = _sets(_with(_whole(), old), _with(_whole(1), new))[key]
        assert change.verdict == "worse" and change.regression == regression


def test_a_busy_machine_is_named_once():
    run = samples.whole("structured_pruning", samples.MODELS[0])
    about = {"disturbed": 1, "reason": "the machine was busy: our threads waited for a core"}
    busy = [m.model_copy(update=about) if m.metric == "prefill_tokens_per_second" else m for m in run.measurements]
    later = run.model_copy(update={"measurements": busy, "started": "2026-02-01T14:05:00+00:00"})
    [change] = [c for c in compare.compare([run], [later]) if c.metric == "prefill_tokens_per_second"]
    assert change.verdict == "not comparable" and change.reason.count("the machine was busy") == 1
