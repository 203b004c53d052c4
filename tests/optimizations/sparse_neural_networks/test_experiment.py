"""The notebook's protocol on a tiny model: one matrix, the sparse model, rivals, and an answer to every claim."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, settings
from lib.measure.quality import evaluate
from lib.measure.roofline import cost_model
from lib.models.calibration import second_moments
from lib.models.structure import surgery
from lib.models.structure.anatomy import anatomy
from lib.optimizations.sparse_neural_networks import experiment, matrix_pruning, outcome, rivals, speed_sweep
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks.masks import METHODS
from lib.optimizations.sparse_neural_networks.speed_sweep import PartPoint

EFFORT = replace(settings.read("quick"), new_tokens=2)


@pytest.fixture
def setup(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    ids = torch.randint(8, 96, (2, 6, 48), generator=torch.Generator().manual_seed(5))
    text = [{"input_ids": part} for part in ids]
    loaded = SimpleNamespace(scale="proxy", model=model, random_weights=False)
    options = {"sparsity": 0.75, "pattern": "unstructured", "within": "row", "parts": "feed_forward"}
    matrices = second_moments.matrices(model, "feed_forward")
    observed = sparse.observe(model, text, parts="feed_forward")
    seen = experiment.seen_tokens(observed, matrices)
    return experiment.SparsitySetup(loaded, EFFORT, "sparsegpt", options, text, text, observed, matrices, 0, *seen)


@pytest.mark.parametrize("random_weights", [False, True], ids=["trained", "random weights"])
@pytest.mark.parametrize(
    ("method", "changed"),
    [("wanda", {"sparsity": 1.5}), ("wanda", {"parts": "experts"}), ("wanda", {"within": "block"}), ("taylor", {})],
    ids=str,
)
def test_unprunable_requests_are_refused_before_the_model_is_read(setup, monkeypatch, random_weights, method, changed):
    """An unknown method was treated as magnitude where weights are random."""

    def calibration(*_, **__):
        raise AssertionError("text was asked for")

    monkeypatch.setattr(experiment.prompts, "calibration", calibration)
    setup.loaded.random_weights = random_weights
    with pytest.raises(UserError):
        experiment.set_up(setup.loaded, EFFORT, method, setup.options | changed, 0)


def test_one_matrix_keeps_the_same_share_by_every_method(setup):
    matrix = experiment.one_matrix(setup)
    table = matrix.table()
    assert list(table.method) == list(METHODS)
    assert table.kept.tolist() == pytest.approx([0.25] * len(METHODS), abs=0.02)
    assert table.overlap[0] == 1
    errors = dict(zip(table.method, table["error of the output"]))
    assert errors["sparsegpt"] < errors["wanda"] < errors["random"]
    assert "sparsegpt" in experiment.read_masks(table)[1]
    assert all(corner.shape <= (experiment.CORNER, experiment.CORNER) for corner in matrix.corners().values())


def test_a_variance_rounded_below_zero_counts_as_zero_output_error():
    """Its root was a complex number, which has no minimum."""
    weight, pruned = torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0]]])
    gram = torch.tensor([[[1.0, 0.0], [0.0, -1e-9]]])
    masks = {name: pruned[0].bool() for name in ("sparsegpt", "wanda")}
    matrix = experiment.MatrixMasks("w", weight, masks, dict.fromkeys(masks, pruned), gram)
    assert matrix.table()["error of the output"].tolist() == [0.0, 0.0]
    assert experiment.read_masks(matrix.table())[1] == "The output is nearest with sparsegpt, at a relative error of 0."


def test_an_expert_that_saw_tokens_is_shown(setup, tiny):
    """The first expert, which no token reached, has no known error: it was reported as "without calibration text"."""
    model = tiny("qwen3-coder-30b")
    matrices = second_moments.matrices(model, "experts")
    observed = sparse.observe(model, setup.calibration, parts="experts")
    example = experiment._example(matrices)
    shown = next(sums[example.name] for _, sums in observed if example.name in sums)
    shown.tokens[0], shown.squares[0], shown.gram[0] = 0, 0, 0
    loaded = SimpleNamespace(scale="proxy", model=model, random_weights=False)
    changed = {"loaded": loaded, "matrices": matrices, "observed": observed, "shown": shown}
    matrix = experiment.one_matrix(replace(setup, options=setup.options | {"parts": "experts"}, **changed))
    first = int((shown.tokens > 0).long().argmax())
    assert first > 0 and torch.equal(matrix.weight_1OI[0], example.weight[first])
    assert matrix.table()["error of the output"].notna().all()


def test_the_sparse_model_is_smaller_than_stored_zeros(setup):
    model = experiment.sparsify(setup, finetune_steps=2)
    experiment.assert_sparse(setup, model)
    sizes = experiment.sizes(setup, model).set_index("model")["bytes, indices included"]
    assert sizes["stored sparse"] < sizes["zeros stored dense"] == sizes["baseline"]
    assert model.summary.startswith("0.75")
    assert len(model.lessons.losses) == model.steps == 2
    assert model.summary.count(". ") == 1 and "2 steps of training" in model.summary


def test_defaults_are_those_of_real_models_at_real_sizes():
    assert [experiment.default_sparsity(scale) for scale in ("proxy", "slice", "full")] == [0.9, 0.5, 0.5]


def test_unpruned_matrices_are_not_observed(setup):
    observed = {name for _, moments in setup.observed for name in moments}
    assert observed == {matrix.name for matrix in setup.matrices}
    assert all("self_attn" not in name for name in observed)


def test_missing_zeros_are_detected(setup):
    model = experiment.sparsify(setup, finetune_steps=0)
    setup.options["sparsity"] = 0.5
    with pytest.raises(AssertionError, match="of its weights are zero"):
        experiment.assert_sparse(setup, model)


def test_sparsity_is_rounded_for_rows_of_few_blocks(setup, monkeypatch):
    """Planted: rows of four blocks, where three quarters can be removed and 0.65 cannot."""
    model, name = experiment.sparsify(setup, finetune_steps=0), setup.matrices[0].name
    shares = {name: 0.75}
    monkeypatch.setattr(experiment.SparseModel, "zeros", property(lambda _: shares))
    setup.options.update(sparsity=0.65, pattern=f"1x{setup.matrices[0].weight.shape[-1] // 4}")
    experiment.assert_sparse(setup, model)
    shares[name] = 0.5
    with pytest.raises(AssertionError, match="of its weights are zero"):
        experiment.assert_sparse(setup, model)


def test_every_claim_is_answered(setup, monkeypatch):
    ids_NT = torch.randint(0, anatomy(setup.baseline).vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    contest = rivals.contest(setup, evaluate.read(setup.baseline, ids_NT))
    arms = rivals.controls(setup, contest, experiment.sparsify(setup, 0), ids_NT[:1], EFFORT)
    names = [arm.name for arm in arms]
    assert names[-5:] == [
        "int8", "int4, groups of 128", "int4, GPTQ", "sparsegpt at int8's bytes", "sparsegpt at int4's bytes"
    ]  # fmt: skip
    ratios = {arm.name: m.ratio for arm in arms for m in arm.measurements if m.metric == "weights_bytes"}
    assert ratios["sparsegpt, in order"] == pytest.approx(ratios["sparsegpt"], rel=0.02) != 1  # as if stored sparse
    assert rivals.optimized_arm(setup, arms).purpose == "stored sparse, not fine-tuned"
    sizes = {arm.name: m.optimized for arm in arms for m in arm.measurements if m.metric == "weights_bytes"}
    for bits in ("int8", "int4"):
        yardstick = next(name for name in names if name.startswith(bits))
        assert sizes[f"sparsegpt at {bits}'s bytes"] == pytest.approx(sizes[yardstick], rel=0.05)
    in_order = rivals.order(contest)
    assert set(rivals.order_holds(in_order)) == {"per row", "per matrix"}
    assert all(text.endswith(".") for text in rivals.read_order(in_order))
    answers = outcome.refutations(setup, [*arms, *in_order], [])
    assert tuple(claim for claim, _, _ in answers) == outcome.CLAIMS
    assert answers[-1][1:] == (None, "no part was timed")
    curves = rivals.impact(contest, [50, 90])
    share = round(100 * setup.options["sparsity"])
    pruned, cut = [], rivals.SparseRivals.cut
    monkeypatch.setattr(rivals.SparseRivals, "cut", lambda *args, **kw: pruned.append(kw) or cut(*args, **kw))
    again = rivals.impact(contest, [share], arms)
    assert not pruned and again.equals(rivals.impact(contest, [share])) and len(pruned) == len(rivals.COMPARED)
    assert list(curves.strength.unique()) == [50, 90]
    assert rivals.order(None) == []


def test_a_pattern_that_does_not_divide_the_sizes_is_skipped(setup, monkeypatch):
    """As in a checkpoint with pruned channels: the run continues with the patterns that fit."""
    assert all(sparse.misfit(setup.matrices, pattern) is None for pattern in (*rivals.OTHER_PATTERNS, "16x1"))
    for block in anatomy(setup.baseline).blocks:
        surgery.keep_channels(block, torch.arange(22))
    assert not sparse.fits(anatomy(setup.baseline).blocks[0].feed_forward.module, "16x1")
    assert {point.layout for point in speed_sweep.run(setup.loaded, [], EFFORT, "quick", 0)} == {"unstructured"}
    for name in ("cut", "judge", "judge_stored"):
        monkeypatch.setattr(rivals.SparseRivals, name, lambda _, arm, why, *__, **___: rivals.ThirdArm(arm, why, []))
    for name in ("yardsticks", "by_gptq"):
        monkeypatch.setattr(rivals.rival_arms, name, lambda *_, **__: [])
    narrow = replace(setup, matrices=second_moments.matrices(setup.baseline, "feed_forward"))
    model = SimpleNamespace(pruned=True, optimized=None, lessons=SimpleNamespace(kept=0), steps=0)
    arms = rivals.controls(narrow, rivals.SparseRivals(narrow, None), model, None, EFFORT)
    assert [arm.name for arm in arms if arm.purpose == "a pattern"] == []


def test_with_two_of_four_the_curves_use_unstructured_zeros(setup, monkeypatch):
    """2:4 always removes one half: with it, every share would give the same model."""
    assert experiment.share_of_zeros(-1, "2:4", "proxy") == experiment.share_of_zeros(0.9, "2:4", "full") == 0.5
    assert experiment.share_of_zeros(-1, "1x8", "proxy") == 0.9 and experiment.share_of_zeros(0.3, "1x8", "full") == 0.3
    asked = []
    monkeypatch.setattr(rivals.SparseRivals, "cut", lambda _, name, why, **kw: asked.append((why, kw)) or _kl(name))
    for name in ("judge", "judge_stored"):
        monkeypatch.setattr(rivals.SparseRivals, name, lambda _, arm, why, *__: _kl(arm))
    for name in ("yardsticks", "by_gptq"):
        monkeypatch.setattr(rivals.rival_arms, name, lambda *_, **__: [])
    model = SimpleNamespace(pruned=True, optimized=None, lessons=SimpleNamespace(kept=0), steps=0)
    for pattern, zeros in (("unstructured", "zeros"), ("2:4", "unstructured zeros")):
        setup.options.update(pattern=pattern, sparsity=0.5)
        contest = rivals.SparseRivals(setup, SimpleNamespace())
        arms = rivals.controls(setup, contest, model, None, EFFORT)
        assert any("OWL" in arm.name for arm in arms) is (pattern == "unstructured")
        known = {arm.name for arm in arms}
        assert {f"{name}, {few}" for name in rivals.COMPARED for few in ("2:4", "4:8")} <= known
        asked.clear()
        curves = rivals.impact(contest, [50, 80], [_kl(name, rivals.AT_ONCE) for name in rivals.COMPARED])
        cuts = [kw for why, kw in asked if why == "impact"]
        assert {kw.get("pattern", pattern) for kw in cuts} == {"unstructured"}
        assert len(cuts) == len(rivals.COMPARED) * (1 if pattern == "unstructured" else 2)
        assert rivals.over_share(setup) == f"Divergence over the share of {zeros}, a curve for each method."
        assert len(curves) == 2 * len(rivals.COMPARED)
    setup.loaded.scale = "full"
    arms = rivals.controls(setup, contest, model, None, EFFORT)
    of_patterns = [name for arm in arms if (name := arm.name).startswith(("wanda, ", "magnitude, ", "sparsegpt, 4"))]
    assert of_patterns == ["sparsegpt, 4:8"], "in a hurry the patterns of the run's method alone"


def _kl(name: str, purpose: str = "test") -> rivals.ThirdArm:
    value = measurement.informative("kl_divergence_nats", "prefill", 0.0, 0.1, "test", ci=(0.09, 0.11), ratio=None)
    return rivals.ThirdArm(name, purpose, [value])


def test_methods_are_ranked_only_if_each_has_an_interval():
    """Windows of one document give none: then no order is stated."""

    def known(nats: dict[str, float], without: str = "") -> dict[str, bool] | None:
        arms = [_kl(rivals.order_name(method, within)) for method in nats for within in ("row", "matrix")]
        for method, number in nats.items():
            for arm in arms:
                if arm.name.startswith(method):
                    ends = {"ci": None} if method == without else {}
                    arm.measurements[0] = arm.measurements[0].model_copy(update={"optimized": number} | ends)
        return rivals.order_holds(arms)

    assert known({"sparsegpt": 0.1, "wanda": 0.2, "magnitude": 0.2}) == {"per row": True, "per matrix": True}
    assert known({"sparsegpt": 0.3, "wanda": 0.2, "magnitude": 0.4}) == {"per row": False, "per matrix": False}
    assert known({"sparsegpt": 0.1, "wanda": 0.2, "magnitude": 0.2}, without="wanda") is None


def test_the_size_of_a_stored_weight_depends_on_its_device():
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert rivals.csr_bytes(half) == 8, "float32 on a CPU"
    assert rivals.csr_bytes(SimpleNamespace(is_cuda=True, element_size=half.element_size)) == 6


@pytest.mark.parametrize("model_name", ["qwen3-4b-instruct-2507", "qwen3-coder-30b"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x8", "8x8", "16x1"])
def test_mask_bytes_are_those_of_the_executing_layout(setup, tiny, model_name, pattern):
    """Blocks of many rows were counted as CSR: nearly twice the bytes of the optimized model."""
    model = tiny(model_name)
    loaded = SimpleNamespace(scale="proxy", model=model, random_weights=False)
    pruned = sparse.prune(model, [], sparsity=0.5, method="magnitude", pattern=pattern, parts="feed_forward")
    size = rivals._size_if_stored(replace(setup, loaded=loaded), pruned)
    assert size.optimized == cost_model.weights_bytes(sparse.executed(pruned))


def test_two_of_four_on_tensor_cores_adds_two_bits_per_kept_weight():
    """There a 16-bit linear layer takes 9/16 of its bytes, not 3/2 of them as in CSR."""
    weight = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    linear, experts = (SimpleNamespace(weight=weight, part=part) for part in ("attention", "experts"))
    mask = torch.zeros(64, 128, dtype=torch.bool)
    mask[:, ::2] = True
    assert matrix_pruning.stored_bytes(linear, mask, "2:4") == 64 * 128 * 2 * 9 // 16
    assert matrix_pruning.stored_bytes(experts, mask, "2:4") == 64 * 64 * (2 + 4) + 65 * 4, "experts are CSR"


def test_row_offsets_count_when_matching_the_bytes_of_the_third_arm(setup):
    dense = sum(matrix.weight.nbytes for matrix in setup.matrices)
    size = measurement.counted("weights_bytes", "load", 1000 + dense, 1000 + dense / 4, "by hand")
    share = rivals._share_at(setup, rivals.ThirdArm("int8", "weight-only", [size]))
    starts = sum(matrix.weight.shape[0] + 1 for matrix in setup.matrices)
    assert 8 * (1 - share) * setup.weights + 4 * starts == pytest.approx(dense / 4)


def _point(strength: int, layout: str, ratio: float, verdict: str) -> PartPoint:
    fields = {"verdict": verdict, "provenance": "measured", "source": "test", "n": 6, "noise_floor": 0.01, "mde": 0.1}
    fields |= {"baseline": 1.0, "optimized": ratio, "ratio": ratio, "ci": (ratio - 0.1, ratio + 0.1)}
    time = measurement.judged("feed_forward_ms", "feed-forward part, 16 tokens", **fields)
    size = measurement.counted("weights_bytes", "feed-forward part", 100, 50, "test")
    return PartPoint(strength, layout, [time, size])


def test_a_sweep_is_summarized_by_its_crossovers(setup):
    points = [_point(50, "unstructured", 2.0, "worse"), _point(90, "unstructured", 0.5, "better")]
    points += [_point(50, "16x1", 3.0, "worse"), _point(90, "16x1", 1.5, "worse")]
    gains = speed_sweep.times(points)
    assert speed_sweep.crossovers(gains) == {"CSR, 16 tokens": pytest.approx(70), "16x1, 16 tokens": None}
    assert speed_sweep.csr(gains) == ["CSR, 16 tokens"]
    one = points[0].times[0].model_copy(update={"workload": speed_sweep.part_speed.workload(1)})
    assert speed_sweep._name(points[0], one) == "CSR, 1 token"
    first, second = speed_sweep.read_crossovers(gains)
    assert first.startswith("1 of 2 sparse arms measure faster") and first.endswith(", 1 of them by a verdict.")
    assert second == "The earliest is CSR, 16 tokens, from 70 % zeros."
    unsure = speed_sweep.times([points[0], _point(90, "unstructured", 0.5, "inconclusive")])
    assert speed_sweep.read_crossovers(unsure)[0].endswith(", none of them by a verdict.")
    assert speed_sweep.weights_bytes(points).ratio.tolist() == [0.5] * 4
    assert {"zeros, %", "dense, MB", "stored sparse, MB"} <= set(speed_sweep.weights_bytes(points).columns)
    assert outcome.refutations(setup, [], points)[-1][1] is False
    assert outcome.refutations(setup, [], points[2:])[-1][1] is True


def test_a_ratio_without_a_verdict_does_not_decide_what_is_fast_enough(setup):
    """The best ratio has no verdict because the machine is too noisy: no gain is claimed, and the reason is stated."""
    reason = "the noise floor of 10.9 % is above 10 %; more rounds or a quieter machine would tell"
    unsure, worse = _point(95, "unstructured", 1.25, "inconclusive"), _point(90, "16x1", 2.0, "worse")
    unsure = replace(unsure, times_and_bytes=[unsure.times[0].model_copy(update={"reason": reason})])
    (_, refuted, evidence) = outcome.refutations(setup, [], [unsure, worse])[-1]
    assert refuted is None and "gain" not in evidence
    assert evidence == (
        f"best ratio 0.800× (0.740–0.870): CSR, 95 % zeros, 16 tokens; no verdict, as {reason}; "
        "best with a verdict 0.500× (0.476–0.527): 16x1, 90 % zeros, 16 tokens"
    )
    better = _point(80, "unstructured", 0.9, "better")
    (_, refuted, evidence) = outcome.refutations(setup, [], [_point(95, "16x1", 0.5, "inconclusive"), better])[-1]
    assert refuted is False and evidence.startswith("best ratio 1.11×")


def test_random_weights_are_stored_at_once_and_not_judged_for_quality(setup):
    loaded = SimpleNamespace(scale="proxy", model=setup.baseline, random_weights=True)
    options = setup.options
    untrained = experiment.SparsitySetup(loaded, EFFORT, "magnitude", options, [], [], None, setup.matrices, seed=0)
    table = experiment.one_matrix(untrained).table()
    assert list(table.method) == ["magnitude", "random"] and table["error of the output"].isna().all()
    assert "no error" in experiment.read_masks(table)[1]
    model = experiment.sparsify(untrained, finetune_steps=9)
    experiment.assert_sparse(untrained, model)
    assert (model.tuned, model.lessons.losses, model.steps) == (None, [], 0)
    assert list(experiment.sizes(untrained, model).model) == ["baseline", "stored sparse"]
    contest = rivals.contest(untrained, None)
    timed = rivals.controls(untrained, contest, model, torch.zeros(1, 16, dtype=torch.long), EFFORT)
    assert [arm.name for arm in timed] == list(rivals.AT_BYTES) and rivals.order(contest) == []
    assert rivals.impact(contest, [50]).empty
    assert rivals.order_holds([]) is None and rivals.read_order([])[0].startswith("The methods were not")
    assert [refuted for _, refuted, _ in outcome.refutations(untrained, [], [])] == [None] * 5


def test_published_claims_are_judged_by_this_runs_arms():
    def arm(name: str, kl: float) -> rivals.ThirdArm:
        ends = {"ci": (kl * 0.99, kl * 1.01), "ratio": None}
        value = measurement.informative("kl_divergence_nats", "prefill", 0.0, kl, "test", **ends)
        return rivals.ThirdArm(name, "test", [value])

    options = {"sparsity": 0.5, "pattern": "unstructured", "parts": "all"}
    setup = SimpleNamespace(method="sparsegpt", options=options)
    order = {"sparsegpt": 0.2, "wanda, per row": 0.3, "magnitude, per row": 3.0, "wanda, per matrix": 0.2}
    in_order = [arm(f"{name}, all matrices", kl) for name, kl in order.items()]
    arms = [arm("sparsegpt", 0.3), arm("sparsegpt, 2:4", 0.9), arm(rivals.INT4, 0.1)]
    nothing = pd.DataFrame(columns=["arm", "strength", "value", "low", "high"])
    methods, rows, patterns, int8, gptq, int4 = outcome.replications(setup, arms, in_order, nothing)
    assert (methods.held, rows.held, patterns.held) == (True, False, True)
    assert (int8.held, gptq.held, int4.held) == (None, None, None)
    assert methods.evidence.startswith("60 % zeros, chosen at once, KL: ")
    setup.options["sparsity"] = 0.9
    assert outcome.replications(setup, arms, in_order, nothing)[2].held is None
    nothing.loc[0] = ["sparsegpt", 50, 0.02, 0.017, 0.022]
    nothing.loc[1] = ["wanda", 50, 5.0, 4.9, 5.1]
    patterns = outcome.replications(setup, arms, in_order, nothing)[2]
    assert patterns.held
    assert patterns.evidence == "sparsegpt: unstructured 0.0200 (0.0170–0.0220), 2:4 0.9000 (0.8910–0.9090)"
    arms += [arm("wanda, 2:4", 6.0), arm("sparsegpt, 4:8", 0.5)]
    patterns = outcome.replications(setup, arms, in_order, nothing)[2]
    assert patterns.held and "4:8 0.5" in patterns.evidence and "wanda: unstructured 5.000 " in patterns.evidence
    assert "magnitude" not in patterns.evidence
    arms[-2:] = [arm("wanda, 2:4", 1.0), arm("sparsegpt, 4:8", 0.5)]
    assert outcome.replications(setup, arms, in_order, nothing)[2].held is False, "for each method compared"
    arms[-2:] = [arm("sparsegpt, 4:8", 5.0)]
    assert outcome.replications(setup, arms, in_order, nothing)[2].held is False, "4:8 lies between"
    arms.pop()
    options["parts"] = "feed_forward"
    methods, rows, *of_run = outcome.replications(setup, arms, in_order, nothing)
    assert all(judgement.evidence.startswith("feed-forward matrices only: ") for judgement in of_run)
    assert methods.evidence.startswith("60 % zeros") and rows.evidence.startswith("60 % zeros"), "of all matrices"


def test_effort_quick_prunes_at_fewer_shares():
    assert speed_sweep.strengths("full", "quick") == [50, 80]
    for scale in ("proxy", "slice", "full"):
        few, all_of_them = (speed_sweep.strengths(scale, effort) for effort in ("quick", "standard"))
        assert 1 < len(few) < len(all_of_them) and set(few) <= {*all_of_them, 80}
