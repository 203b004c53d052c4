"""Edge cases of non-inferiority: no flips, few flips, rare classes, items that share a source."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from lib.measure.metrics import paired_stats
from lib.measure.quality import answer_comparison, noninferiority, score_bounds
from lib.measure.quality.answers import Answers, Retrieved
from tests.measure.quality.test_evaluate import by_name, classified


def _exact(count: int, n: int, level: float) -> float:
    return float(beta.ppf(1 - level, count + 1, n - count))


@pytest.mark.parametrize("n", [16, 48, 149, 400])
def test_an_unseen_loss_of_one_class_matches_clopper_pearson(n):
    assert score_bounds.unseen_loss([n], 0.05) == pytest.approx(_exact(0, n, 0.05), abs=1e-9)
    equal = score_bounds.unseen_loss([n] * 8, 0.05)  # classes of equal size act as one share
    assert equal == pytest.approx(_exact(0, 8 * n, 0.05), abs=1e-9)


def test_an_unseen_loss_is_the_worst_case_without_observed_flips():
    """Checked by a search: no flip shares with a 5 % chance of no flip cost more than the bound, some as much."""
    counts, level = np.array([3, 40, 60]), 0.05
    bound = score_bounds.unseen_loss(counts.tolist(), level)
    drawn_RC = np.random.default_rng(0).dirichlet(np.ones(3), 20000) * -math.log(level)
    losses = (1 - np.exp(-drawn_RC / counts)).mean(1)
    assert losses.max() <= bound + 1e-9 and losses.max() == pytest.approx(bound, rel=0.02)
    assert bound > 3 * score_bounds.unseen_loss([103], level)  # the rare class weighs more than in a plain share


def test_a_rare_class_leaves_a_macro_mean_inconclusive_but_not_a_share():
    common = classified(400, 1.0)
    rare = replace(common, truth_N=np.where(np.arange(400) < 4, 7, np.arange(400) % 7))
    rare = replace(rare, chosen_N=rare.truth_N.copy())
    other = replace(rare, scores_NL=rare.scores_NL + 0.1)
    scores = by_name(answer_comparison.compare_classified(rare, other))
    assert scores["accuracy"].verdict == "maintained" and scores["recall_macro"].verdict == "inconclusive"
    assert scores["recall_macro"].bound < scores["accuracy"].bound
    even = by_name(answer_comparison.compare_classified(common, replace(common, scores_NL=common.scores_NL + 0.1)))
    assert even["f1_macro"].verdict == even["accuracy"].verdict == "maintained"


@pytest.mark.parametrize(("count", "words"), [(149, "149"), (999, "999"), (1260, "1,300"), (302_292, "310,000")])
def test_the_required_number_of_items_is_stated_in_two_digits(count, words):
    assert noninferiority._about(count) == words


def test_same_answers_have_no_interval_and_state_their_number():
    base = classified(48, 0.9)
    for other, verdict in ((replace(base, scores_NL=base.scores_NL + 0.1), "inconclusive"), (base, "maintained")):
        score = by_name(answer_comparison.compare_classified(base, other))["accuracy"]
        assert score.verdict == verdict and score.ci is None and score.source.startswith("same answers, 48 items")
        assert score.mde is None or score.mde > 0.02
    assert "about 149 would show it maintained" in by_name(answer_comparison.compare_classified(base, replace(
        base, scores_NL=base.scores_NL + 0.1)))["accuracy"].reason  # fmt: skip


@pytest.mark.parametrize("source_N", [None, np.zeros(40, dtype=int)])
def test_a_single_item_or_source_gives_no_verdict(source_N):
    n = 1 if source_N is None else 40
    good = replace(classified(n, 1.0), source_N=source_N)
    bad = replace(good, chosen_N=(good.truth_N + 1) % 8, scores_NL=good.scores_NL + 1)
    for score in answer_comparison.compare_classified(good, bad)[:4]:
        assert score.verdict == "inconclusive" and "too few" in score.reason and score.mde > score.margin


@pytest.mark.parametrize("wrong", [0, 1, 3, 20])
def test_the_smallest_detectable_loss_is_never_zero(wrong):
    base = classified(200, 1.0)
    other = replace(base, chosen_N=base.chosen_N.copy(), scores_NL=base.scores_NL + 1)
    other.chosen_N[:wrong] = (base.truth_N[:wrong] + 1) % 8
    other.chosen_N[wrong:wrong] = 0
    for score in answer_comparison.compare_classified(base, other)[:4]:
        assert score.mde > score.margin


def test_a_few_gains_are_as_uncertain_as_a_few_losses():
    """Three answers that became right do not prove a gain, as three that became wrong do not prove a loss."""
    good = classified(60, 1.0)
    bad = replace(good, chosen_N=good.chosen_N.copy(), scores_NL=good.scores_NL + 1)
    bad.chosen_N[:3] = (good.truth_N[:3] + 1) % 8
    lost, won = (
        by_name(answer_comparison.compare_classified(*pair))["accuracy"] for pair in ((good, bad), (bad, good))
    )
    ends = [np.array(m.ci) * m.baseline - m.baseline for m in (lost, won)]
    assert ends[0] == pytest.approx(-ends[1][::-1], abs=0.004)  # mirrored, up to the bootstrap's own scatter
    assert ends[1][0] < 0.03 and won.verdict != "better"


def test_a_bound_that_assumes_independent_items_of_a_document_says_so():
    """It cannot know how flips that did not occur would cluster; a reader can consider that."""
    base = classified(60, 1.0)
    shared, few = replace(base, source_N=np.arange(60) // 4), base.chosen_N.copy()
    few[:1] = (base.truth_N[:1] + 1) % 8
    for chosen_N in (base.chosen_N, few):
        changed = replace(base, chosen_N=chosen_N, scores_NL=base.scores_NL + 1)
        alone, together = (
            by_name(answer_comparison.compare_classified(before, changed))["accuracy"] for before in (base, shared)
        )
        assert "items taken as independent, " in alone.source and alone.documents is None
        assert "items taken as independent although they come from 15 documents, " in together.source
        assert together.documents == 15


def test_the_two_sided_interval_has_the_two_sided_bound():
    none, n = np.zeros(400), 60
    options = {"n": n, "to_wrong": 0, "to_right": 0, "source": "simulation"}
    score = noninferiority.score("accuracy", "classify", 0.9, 0.9, none, **options)
    assert score.bound == pytest.approx(-_exact(0, n, 0.05))
    assert score.ci[0] * 0.9 - 0.9 == pytest.approx(-_exact(0, n, 0.025))
    assert score.ci[1] * 0.9 - 0.9 == pytest.approx(_exact(0, n, 0.025))


def _shared(chance, sources: int, each: int, loss: float):
    """Return (truth, baseline, optimized, source): all items of a source flip together, a share `loss` of sources."""
    source_N = np.repeat(np.arange(sources), each)
    truth_N = np.arange(len(source_N)) % 2
    flips_N = (chance.random(sources) < loss)[source_N]
    return truth_N, truth_N, np.where(flips_N, 1 - truth_N, truth_N), source_N


def test_items_of_one_source_are_resampled_together():
    """The true loss is the margin, all items of a source flip together: only resampling sources keeps the level."""
    chance, wrong = np.random.default_rng(1), {"items": 0, "sources": 0}
    for trial in range(200):
        truth_N, base_N, opt_N, source_N = _shared(chance, 40, 20, 0.2)
        for kind, of in (("items", None), ("sources", source_N)):
            drawn = score_bounds.resampled_scores(truth_N, base_N, opt_N, 2, 400, trial, of)["accuracy"]
            to_wrong = int((opt_N != truth_N).sum())
            score = noninferiority.score(
                "accuracy", "classify", 1.0, 1 - to_wrong / len(truth_N), drawn, n=len(truth_N), to_wrong=to_wrong,
                to_right=20, margin=0.2, source="simulation",
            )  # fmt: skip
            wrong[kind] += score.verdict in ("maintained", "better")
    assert wrong["sources"] <= 20 < wrong["items"]


def test_windows_of_one_document_are_resampled_together():
    chance = np.random.default_rng(2)
    document_N = np.repeat(np.arange(8), 8)
    losses = chance.normal(4, 0.1, 64)
    changed = losses + chance.normal(0, 0.05, 8)[document_N]
    alone = noninferiority.perplexity(losses, changed, source="64 windows")
    together = noninferiority.perplexity(losses, changed, source="64 windows", source_N=document_N)
    assert together.ci[1] - together.ci[0] > 2 * (alone.ci[1] - alone.ci[0]) and "8 documents" in together.source
    assert (alone.documents, together.documents) == (None, 8)
    few = noninferiority.perplexity(losses[:40], changed[:40], source="40 windows", source_N=document_N[:40])
    assert few.verdict == "inconclusive" and "5 documents are too few" in few.reason and few.ci is None


def test_repeated_windows_of_a_document_do_not_change_the_interval():
    """A few windows lose much, as in practice: the interval is as skewed over documents as over windows."""
    loss_N = -np.random.default_rng(1).lognormal(-3, 1, 24)
    alone = noninferiority.mean_interval(loss_N, 0.9, 1000, 0)
    twice = noninferiority.mean_interval(np.repeat(loss_N, 2), 0.9, 1000, 0, np.repeat(np.arange(24), 2))
    assert twice == pytest.approx(alone)
    mean = loss_N.mean()
    assert mean - alone[0] > 1.2 * (alone[1] - mean)


def test_a_workload_in_which_the_optimization_never_acts_is_not_exercised():
    base = classified(400, 0.9)
    all_right, none_right = Retrieved(256, np.ones(64, bool)), Retrieved(256, np.zeros(64, bool))
    answers = Answers([base], None, all_right)
    changed = Answers([base], None, none_right, idle=frozenset({"classify"}))
    metrics = by_name(answer_comparison.compare(answers, changed))
    assert metrics["f1_macro"].verdict == metrics["accuracy"].verdict == "not_exercised"
    assert "never acted on these prompts" in metrics["f1_macro"].reason and metrics["f1_macro"].ci is None
    assert metrics["flips"].verdict == "informative" and metrics["retrieval_exact_match"].verdict == "not_maintained"


def test_a_loss_too_large_for_a_perplexity_is_invalid():
    """e to the power of 800 overflows: for example, a search candidate that diverged."""
    base_N = np.linspace(3.0, 4.0, 8)
    for lost in (800.0, math.inf, math.nan):
        judged = noninferiority.perplexity(base_N, base_N + lost, source="8 windows")
        assert judged.verdict == "invalid" and judged.optimized is None and "degenerated" in judged.reason
    assert noninferiority.perplexity(base_N, base_N + 30.0, source="8 windows").verdict == "not_maintained"


def test_the_required_number_of_items_follows_the_margin():
    replicates_R = np.random.default_rng(0).normal(-0.01, 0.02, 4000)
    about = {"n": 400, "to_wrong": 30, "to_right": 26, "source": "400 items"}
    stored = noninferiority.score("accuracy", "arc_easy", 0.6, 0.59, replicates_R, **about)
    assert stored.verdict == "inconclusive" and noninferiority.too_few_at(stored, stored.margin) == stored.reason
    wider = noninferiority.too_few_at(stored, 0.05)
    needed = [int(text.split("about ")[1].split(" ")[0].replace(",", "")) for text in (wider, stored.reason)]
    assert "would show it maintained" in wider and 400 < needed[0] < needed[1] / 10
    assert "would show it not maintained" in noninferiority.too_few_at(stored, 0.005)
    same = stored.model_copy(update={"ci": None})
    assert noninferiority.too_few_at(same, 0.05) == "400 items are too few to tell"


def test_the_required_number_of_items_detects_a_loss_four_times_out_of_five():
    """A true loss of 4 points at a discordance of 10 %, margin 2 points."""
    loss, discordance = 0.04, 0.10
    sigma = math.sqrt(discordance - loss**2)
    words = noninferiority._too_few(400, sigma, -loss, 0.02, "items")
    assert "not maintained" in words
    n, called, runs = int(words.split("about ")[1].split(" ")[0].replace(",", "")), 0, 300
    for seed in range(runs):
        draw_N = np.random.default_rng(seed).random(n)
        wrong_N = draw_N < (discordance + loss) / 2
        right_N = ~wrong_N & (draw_N < discordance)
        drawn = score_bounds.resampled_scores(
            np.ones(n, dtype=int), 1 - right_N.astype(int), 1 - wrong_N.astype(int), 2, 400, seed
        )["accuracy"]
        counts = {"to_wrong": int(wrong_N.sum()), "to_right": int(right_N.sum())}
        shares = 1 - float(right_N.mean()), 1 - float(wrong_N.mean())
        score = noninferiority.score("accuracy", "classify", *shares, drawn, n=n, source="items", **counts)
        called += score.verdict == "not_maintained"
    assert called / runs > 0.74  # 0.8 minus 2.5 standard errors


@pytest.mark.parametrize("windows", [8, 16, 32])
def test_skewed_losses_of_few_windows_are_rarely_maintained_at_the_margin(windows):
    """The true loss is the margin; most windows lose little and a few much, which a small sample may miss."""
    chance, trials, limit = np.random.default_rng(windows), 400, math.log1p(0.03)
    called, by_bootstrap = 0, 0
    for trial in range(trials):
        base_N = chance.normal(4.0, 0.1, windows)
        lost_N = limit * chance.lognormal(-0.125, 0.5, windows)  # with mean `limit`
        judged = noninferiority.perplexity(base_N, base_N + lost_N, source="text", resamples=300, seed=trial)
        called += judged.verdict in ("maintained", "better")
        by_bootstrap += noninferiority.mean_interval(-lost_N, 0.9, 300, trial)[0] > -limit
    assert called < by_bootstrap and called <= 0.085 * trials


def test_halls_interval_equals_students_without_skewness_and_mirrors():
    even_N = np.array([-3.0, -2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0])
    assert paired_stats.skewed_interval(even_N, 0.9) == pytest.approx(paired_stats.student_interval(even_N, 0.9))
    loss_N = np.random.default_rng(3).lognormal(0, 1, 12)
    low, high = paired_stats.skewed_interval(loss_N, 0.9)
    assert paired_stats.skewed_interval(-loss_N, 0.9) == pytest.approx((-high, -low))
    assert high - loss_N.mean() > 1.5 * (loss_N.mean() - low)
    twice = paired_stats.skewed_interval(np.repeat(loss_N, 3), 0.9, np.repeat(np.arange(12), 3))
    assert twice == pytest.approx((low, high))
    assert paired_stats.skewed_interval([0.5] * 8) == (0.5, 0.5)
    assert paired_stats.skewed_interval([0.1, 0.2]) == (-math.inf, math.inf)


@pytest.mark.parametrize(("right", "verdict"), [(0, "informative"), (6, "informative"), (7, "maintained")])
def test_a_baseline_score_within_the_margin_cannot_be_maintained(right, verdict):
    """Of 300 values 6 are the margin: a baseline that repeats no more than that cannot lose more either."""
    base = Retrieved(256, np.arange(300) < right)
    [score] = answer_comparison.compare(Answers([], None, base), Answers([], None, base))
    assert score.verdict == verdict and score.source.startswith("same answers, 300 items")
    assert verdict == "maintained" or ("nothing to lose" in score.reason and score.margin is None)
    gained = answer_comparison.compare_retrieved(base, Retrieved(256, np.arange(300) < 200))
    assert gained.verdict == "better", "a gain is one, wherever it begins"


def test_answers_of_a_guessing_baseline_are_not_called_maintained():
    guess = classified(400, 1 / 8 - 0.02)
    other = replace(guess, scores_NL=guess.scores_NL + 0.1)
    for score in answer_comparison.compare_classified(guess, other)[:4]:
        assert score.verdict == "informative" and "no better than guessing (12 %)" in score.reason
    one_model = answer_comparison.compare_classified(guess, guess)[:4]
    assert {score.verdict for score in one_model} == {"maintained"}
    knows = classified(400, 0.5)
    kept = by_name(answer_comparison.compare_classified(knows, replace(knows, scores_NL=knows.scores_NL + 0.1)))
    assert kept["accuracy"].verdict == "maintained"


def test_always_giving_the_most_frequent_label_counts_as_guessing():
    """Of eight labels one is right on a fifth of the items, which exceeds an eighth but shows no knowledge."""
    truth_N = np.where(np.arange(400) < 80, 0, 1 + np.arange(400) % 7)
    always = replace(classified(400, 1.0), truth_N=truth_N, chosen_N=np.zeros(400, dtype=int))
    for score in answer_comparison.compare_classified(always, replace(always, scores_NL=always.scores_NL + 0.1))[:4]:
        assert score.verdict == "informative" and "no better than guessing (20 %)" in score.reason


def test_one_diverged_window_still_gives_a_finite_interval():
    """Seven windows are unchanged, one loses 790 nats: the interval's end in nats is beyond the range of exp."""
    base_N = np.linspace(3.0, 4.0, 8)
    blown = noninferiority.perplexity(base_N, base_N + np.array([0.0] * 7 + [760.0]), source="8 windows")
    assert blown.verdict == "inconclusive" and blown.ci is not None and math.isfinite(blown.ci[1])


@pytest.mark.parametrize("right", [360, 372])
def test_a_gain_of_exactly_the_margin_counts(right):
    """Previously 372 → 380 of 400 was maintained and 360 → 368 better, by the last bit, and the lint disagreed."""
    base, other = (Retrieved(256, np.arange(400) < count) for count in (right, right + 8))
    score = answer_comparison.compare_retrieved(base, other)
    assert score.verdict == noninferiority.judge_again(score) == "better"
