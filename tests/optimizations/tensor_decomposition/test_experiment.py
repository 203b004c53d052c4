"""The notebook's protocol on a tiny model: the spectrum, ranks, the sweep of rivals, answers to the claims."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.measure.quality import evaluate
from lib.models.structure.anatomy import anatomy
from lib.optimizations.structured_pruning import method as pruning
from lib.optimizations.tensor_decomposition import experiment, outcome, rivals
from lib.optimizations.tensor_decomposition import method as decomposition

EFFORT = replace(settings.read("quick"), new_tokens=2)


@pytest.fixture
def setup(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    ids = torch.randint(8, 96, (2, 6, 48), generator=torch.Generator().manual_seed(5))
    text = [{"input_ids": part} for part in ids]
    spectra = {kind: decomposition.analyse(model, text, kind) for kind in ("plain", "whitened")}
    spectra["refined"] = spectra["whitened"]
    loaded = SimpleNamespace(model=model, random_weights=False, scale="proxy")
    options = {"method": "whitened", "budget": "global", "refine_steps": 1, "seconds": 1.0, "seed": 0}
    return experiment.FactoringSetup(
        loaded, EFFORT, calibration=text, finetune_batches=text, spectra=spectra, **options
    )


def test_singular_values_fall_and_are_described_in_two_sentences(setup):
    curves, seconds = experiment.singular_values(setup)
    assert set(curves.arm) == {"plain", "whitened"} and seconds > 0
    for _, curve in curves.groupby("arm"):
        assert curve.value.iloc[0] == 1 and curve.value.is_monotonic_decreasing
    first, second = experiment.read_singular_values(curves, setup.widest.break_even)
    assert "whitened" in first and second.endswith("of the largest.")


def test_singular_values_are_read_by_rank_and_thinned_only_for_the_figure(setup, monkeypatch):
    energy_R = torch.full((576,), 1e-12)
    energy_R[:7], energy_R[7:300] = 1.0, 0.01
    widest = SimpleNamespace(name="w", shape=(576, 800))
    monkeypatch.setattr(experiment.FactoringSetup, "widest", widest)
    monkeypatch.setattr(experiment, "spectrum_of", lambda _: SimpleNamespace(energy_R=energy_R))
    curves, _ = experiment.singular_values(replace(setup, spectra={}))
    first, second = experiment.read_singular_values(curves, 301.5)
    assert first.endswith("up to rank 7 (plain).") and "they are 1e-06 (plain)" in second
    shown = experiment.thinned(curves)
    assert len(shown) == 48 and shown.value.min() == experiment.SHOWN_LEAST and shown.strength.iloc[1] == 13


@pytest.mark.parametrize(("method", "expected"), [("auto", 5.0), ("whitened", 5.0), ("plain", 2.0)])
def test_analyzing_a_control_is_not_part_of_the_cost(tiny, monkeypatch, method, expected):
    took, clock = {"plain": 2.0, "whitened": 5.0}, [0.0]

    def analyse(_, __, kind, **___):
        return SimpleNamespace(curves=lambda: clock.append(clock[-1] + took[kind]))

    monkeypatch.setattr(experiment, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    monkeypatch.setattr(decomposition, "analyse", analyse)
    monkeypatch.setattr(experiment.calibration_text, "sequences", lambda *_: 2)
    monkeypatch.setattr(experiment.prompts, "calibration", lambda *_, **__: [])
    monkeypatch.setattr(experiment, "matrices", lambda _: [])
    loaded = SimpleNamespace(model=None, random_weights=False, scale="proxy")
    assert experiment.set_up(loaded, EFFORT, 0.2, method, "global", 1, 0).seconds == expected


def test_impossible_requests_are_refused_before_the_model_is_read(setup, monkeypatch):
    def calibration(*_, **__):
        raise AssertionError("text was asked for")

    monkeypatch.setattr(experiment.prompts, "calibration", calibration)
    options = {"compression": 0.2, "method": "auto", "budget": "global", "refine_steps": 1, "seed": 0}
    for changed, message in (
        ({"compression": 0.99}, "out of reach"),
        ({"compression": 1.5}, "out of range; expected 0 < compression < 1"),
        ({"method": "tucker"}, 'method "tucker"; expected one of auto, plain'),
        ({"budget": "even"}, 'budget "even"; expected one of global'),
    ):
        with pytest.raises(UserError, match=message):
            experiment.optimize(setup.loaded, EFFORT, **options | changed)
        with pytest.raises(UserError, match=message):
            experiment.set_up(setup.loaded, EFFORT, **options | changed)


def test_the_table_of_ranks_covers_the_block_shown(setup):
    ranks = experiment.allocations(setup, 0.2)
    table = experiment.rank_table(setup, ranks)
    assert list(table.matrix) == [matrix.name for matrix in setup.shown]
    assert {"plain", "whitened"} <= set(table.columns)
    assert experiment.expected_divergence(setup, ranks) > 0


def test_the_factored_model_saves_the_requested_bytes(setup):
    chosen = experiment.factor(setup, 0.2)
    assert 0.2 <= chosen.removed < 0.3 and chosen.seconds > setup.seconds
    assert len(chosen.rank_rows()) == len(chosen.ranks)


def test_the_sweep_judges_rivals_of_equal_bytes(setup):
    chosen = experiment.factor(setup, 0.2)
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, anatomy(setup.baseline).vocabulary, (4, 16), generator=generator)
    text = evaluate.read(setup.baseline, ids_NT)
    sweep = rivals.sweep(setup, chosen, text, ids_NT[:1], 0.2, pruning.apply)
    names = [arm.name for arm in sweep.arms]
    factored = ["plain", "whitened", "refined", "whitened, uniform ranks", "plain, uniform ranks"]
    assert names[:6] == [*factored, "structured pruning"]
    assert names[6:8] == ["int8", "int4, groups of 128"] and [arm.name for arm in sweep.yardsticks[:2]] == names[6:8]
    for arm in sweep.yardsticks[:2]:
        metrics = {m.metric for m in arm.measurements}
        assert {"weights_bytes", "perplexity", "prefill_tokens_per_second", "decode_tokens_per_second"} <= metrics
    assert all("out of reach" in reason for reason in sweep.left_out.values())
    assert {"value", "low", "high"} <= set(sweep.divergence().columns) & set(sweep.speed().columns)
    assert {"KL, nats/token", "prefill, ×", "bytes removed, %"} <= set(sweep.table().columns)
    assert rivals.optimized_arm(setup, sweep.arms).name == setup.method
    answers = outcome.refutations(sweep.arms, chosen.optimized, [])
    assert [claim for claim, _, _ in answers] == list(outcome.CLAIMS)
    assert [refuted for _, refuted, _ in outcome.refutations([], chosen.optimized, [])] == [None] * 3


def test_a_real_model_at_quick_is_swept_at_two_strengths_and_lists_omissions(setup):
    setup.loaded.scale = "full"
    hurried = replace(setup, effort=settings.read("quick", "full"))
    chosen = experiment.factor(hurried, 0.2)
    sweep = rivals.sweep(hurried, chosen, None, torch.randint(8, 96, (1, 16)), 0.2, pruning.apply)
    assert {row["strength"] for row in sweep.rows} == {20.0, 40.0}
    even = {row["strength"] for row in sweep.rows if "uniform ranks" in str(row["arm"])}
    assert even == {20.0} and {name for name in sweep.left_out if "uniform" in name} == {
        "whitened, uniform ranks at 0.4",
        "plain, uniform ranks at 0.4",
    }
    domains, why = rivals.domains(hurried, 0.2)
    assert domains.empty and "effort quick" in why


def test_the_curves_use_the_runs_budget(setup, monkeypatch):
    """With uniform ranks, only the point at the run's own strength had them; the others were of one budget."""
    uniform, budgets, make = replace(setup, method="refined", budget="uniform"), [], rivals.factors

    def factors(setup, strength, method, budget):
        budgets.append((strength, method, budget))
        return make(setup, strength, method, budget)

    monkeypatch.setattr(rivals, "factors", factors)
    rivals.sweep(uniform, experiment.factor(uniform, 0.2), None, torch.randint(8, 96, (1, 16)), 0.2, pruning.apply)
    assert {budget for _, _, budget in budgets} == {"uniform"} and (0.4, "refined", "uniform") in budgets


def test_random_subspaces_of_a_trained_model_are_among_the_rivals(setup):
    drawn = replace(setup, method="random", spectra=setup.spectra | {"random": None})
    assert rivals._names(drawn).count("random") == 1 and "random" not in rivals._names(setup)


def test_random_weights_are_factored_at_random_and_only_timed(setup):
    model = setup.baseline
    spectra = {"random": decomposition.analyse(model, [], "random")}
    loaded = SimpleNamespace(model=model, random_weights=True, scale="slice", quality_unavailable="random weights")
    options = {"method": "random", "budget": "uniform", "refine_steps": 0, "seconds": 0.0, "seed": 0}
    untrained = experiment.FactoringSetup(
        loaded, EFFORT, calibration=[], finetune_batches=[], spectra=spectra, **options
    )
    chosen = experiment.factor(untrained, 0.2)
    ranks = experiment.allocations(untrained, 0.2)
    assert set(experiment.rank_table(untrained, ranks).columns) == {"matrix", "shape", "break-even", "random"}
    assert experiment.expected_divergence(untrained, ranks) is None
    domains, why = rivals.domains(untrained, 0.2)
    assert domains.empty and "random weights" in why
    sweep = rivals.sweep(untrained, chosen, None, torch.zeros(1, 16, dtype=torch.long), 0.2, pruning.apply)
    assert sweep.arms == sweep.yardsticks and len(sweep.arms) == 2 and sweep.divergence().empty
    assert set(sweep.speed().arm) == {"random", "structured pruning"}
    curves, _ = experiment.singular_values(untrained)
    assert set(curves.arm) == {"plain"}


@pytest.mark.parametrize(("scale", "expected"), [("proxy", "refined"), ("full", "refitted")])
def test_real_models_are_refitted_in_closed_form_and_not_trained(setup, scale, expected, monkeypatch):
    setup.loaded.scale = scale
    monkeypatch.setattr(experiment.prompts, "calibration", lambda *_, **__: setup.calibration)
    prepared = experiment.set_up(setup.loaded, EFFORT, 0.2, experiment.AUTO, "uniform", 1, 0)
    assert prepared.method == expected and expected in prepared.spectra


def test_factors_are_refitted_on_all_calibration_text_and_say_where_it_helped(setup, monkeypatch):
    setup.spectra["refitted"] = setup.spectra["whitened"]
    refitted = replace(setup, method="refitted", budget="uniform", finetune_batches=[])  # factors in every block
    seen, errors = [], [(1.0, 0.5)] * 3 + [(1.0, 1.0)]
    monkeypatch.setattr(decomposition.blockwise, "refit", lambda _, __, text: seen.append(text) or errors)
    chosen = experiment.factor(refitted, 0.2)
    assert seen == [setup.calibration] and chosen.errors == errors
    nearer = " factors are nearer to the original output, on text held out from the fit but not from whitening."
    assert chosen.summary.endswith(f" In 3 of 4 blocks refitted{nearer} The others keep whitened factors.")
    assert replace(chosen, errors=errors[:3]).summary.endswith(f" In 3 of 3 blocks refitted{nearer}")
    names = [spectrum.matrix.name for spectrum in decomposition.curves(setup.spectra["whitened"])]
    first = {name: 8 for name in names if ".layers.0." in name}
    options = {"method": "whitened", "spectra": setup.spectra["whitened"], "ranks": first}
    partly = replace(chosen, optimized=decomposition.apply(setup.baseline, [], **options))
    only_block = f" In 1 of 1 factored blocks refitted{nearer}"
    assert partly.summary.endswith(only_block), "no whitened factors stay where there are none"
    undone = replace(chosen, errors=[(1.0, 1.0)] * 4)
    assert undone.summary.endswith(f" In none of 4 blocks refitted{nearer} All keep whitened factors.")
    assert experiment.factor(setup, 0.2).summary.endswith(" modules are factored.")


def test_the_number_of_factored_expert_stacks_is_reported(tiny):
    """If the budget keeps all of them whole, nothing is factored as tensors, and a reader should know."""
    model = tiny("qwen3-coder-30b")
    spectra = decomposition.analyse(model, [], "plain")
    stacks = [curve.matrix for curve in spectra.curves() if curve.matrix.side != "linear"]
    sentences = []
    for sides in ((), ("input",), ("input", "output")):
        ranks = {matrix.name: 8 for matrix in stacks if matrix.side in sides}
        optimized = decomposition.apply(model, [], method="plain", spectra=spectra, ranks=ranks)
        sentences.append(experiment.FactoredModel(optimized, 0.2, 1.0).summary.partition("factored.")[2])
    count = len(stacks)
    assert sentences == [
        f" None of {count} stacks of experts are factored; the budget keeps them whole.",
        f" {count // 2} of {count} stacks of experts are factored; the budget keeps the others whole.",
        f" All {count} stacks of experts are factored.",
    ]


def test_the_pruned_rival_sees_the_same_text_as_the_factors(setup):
    seen = []

    def prune(model, calibration, *, observation, **options):
        seen.append((calibration, observation.tokens))
        return pruning.apply(model, calibration, observation=observation, **options)

    rivals.sweep(setup, experiment.factor(setup, 0.2), None, torch.randint(8, 96, (1, 16)), 0.2, prune)
    tokens = sum(batch["input_ids"].numel() for batch in setup.calibration)
    assert seen and all(text is setup.calibration and count == tokens for text, count in seen)


def test_the_pruned_rival_is_fitted_in_closed_form_like_the_factors(setup):
    """It is as strong as pruning by itself here: without the fit, factors would beat less than what is available."""
    cuts = []

    def prune(model, calibration, **options):
        cuts.append(pruning.apply(model, calibration, **options))
        return cuts[-1]

    rivals.sweep(setup, experiment.factor(setup, 0.2), None, torch.randint(8, 96, (1, 16)), 0.2, prune)
    fitted, bare = (
        pruning.apply(setup.baseline, setup.calibration, ratio=0.2, compensate=how, seed=setup.seed)
        for how in (True, False)
    )
    ids = torch.randint(8, 96, (1, 16))
    same, other = ((cuts[0](ids).logits - arm(ids).logits).abs().max() for arm in (fitted, bare))
    assert same < 1e-4 < other


def test_factors_for_another_domain_see_the_same_amount_of_text(setup, monkeypatch):
    class Asked(Exception):
        pass

    def abroad(_, parameters):
        return SimpleNamespace(parameters=parameters)

    def calibration(loaded, sequences, length, seed):
        raise Asked(loaded.parameters, sequences, length)

    setup.loaded.parameters = SimpleNamespace(tasks=["topic"], model_copy=lambda update: update["tasks"])
    monkeypatch.setattr(rivals, "dataclasses", SimpleNamespace(replace=abroad))
    monkeypatch.setattr(rivals.prompts, "calibration", calibration)
    monkeypatch.setattr(rivals.calibration_text, "sequences", lambda model, effort: 77)
    with pytest.raises(Asked) as asked:
        rivals.domains(setup, 0.2)
    assert asked.value.args == (["code_origin"], 77, EFFORT.calibration_tokens)


def test_factors_for_another_domain_use_the_runs_budget(setup, monkeypatch):
    """In a run of uniform ranks they had those of one budget, unlike its other factors."""
    ids_NT = torch.randint(8, 96, (3, 16), generator=torch.Generator().manual_seed(2))
    texts = {"calibration": setup.calibration, "text_windows": ids_NT, "window_sources": None}
    for name, text in texts.items():
        monkeypatch.setattr(rivals.prompts, name, lambda *_, text=text: text)
    setup.loaded.parameters = SimpleNamespace(tasks=["topic"], model_copy=lambda update: update["tasks"])
    abroad = SimpleNamespace(replace=lambda _, parameters: SimpleNamespace(parameters=parameters))
    monkeypatch.setattr(rivals, "dataclasses", abroad)
    budgets, make = [], decomposition.apply

    def apply(*args, **options):
        budgets.append(options["budget"])
        return make(*args, **options)

    monkeypatch.setattr(rivals.decomposition, "apply", apply)
    table, _ = rivals.domains(replace(setup, budget="uniform"), 0.2)
    assert budgets == ["uniform"] * 4 and len(table) == 4
