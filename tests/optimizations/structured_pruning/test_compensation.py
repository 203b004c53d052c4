"""Kept weights compensate for removed ones: by least squares where there is text, unchanged where there is none."""

import pytest
import torch
from sklearn.linear_model import Ridge

from lib.errors import UserError
from lib.models.calibration.distillation import divergence
from lib.models.calibration.second_moments import Moments
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements.factored import FactoredLinear
from lib.optimizations.structured_pruning import compensation
from lib.optimizations.structured_pruning import method as pruning
from lib.optimizations.tensor_decomposition import method as decomposition


def test_compensation_is_the_least_squares_solution():
    random = torch.Generator().manual_seed(0)
    x_TI = torch.randn(400, 24, generator=random) @ torch.randn(24, 24, generator=random)
    weight, kept = torch.randn(8, 24, generator=random), torch.arange(0, 24, 2)
    fitted = compensation.compensated(weight, x_TI.T @ x_TI, kept)
    best = torch.linalg.lstsq(x_TI[:, kept].double(), (x_TI @ weight.T).double()).solution.T
    lost = [
        float((x_TI @ weight.T - x_TI[:, kept] @ matrix.float().T).norm()) for matrix in (fitted, best, weight[:, kept])
    ]
    assert lost[0] < 1.05 * lost[1] and lost[0] < 0.9 * lost[2]
    assert torch.equal(compensation.compensated(weight, torch.zeros(24, 24), kept), weight[:, kept])


@pytest.mark.parametrize("damping", [0.01, 0.3, 4.0])
def test_compensation_is_ridge_regression_towards_the_kept_columns(damping):
    random = torch.Generator().manual_seed(0)
    x_TI = torch.randn(40, 64, generator=random) @ torch.randn(64, 64, generator=random)  # fewer rows than inputs
    weight, kept, gone = torch.randn(8, 64, generator=random), torch.arange(0, 64, 2), torch.arange(1, 64, 2)
    alpha = damping * float(x_TI.square().sum(0).mean())
    ridge = Ridge(alpha=alpha, fit_intercept=False).fit(
        x_TI[:, kept].double(), (x_TI[:, gone] @ weight[:, gone].T).double()
    )
    expected = weight[:, kept].double() + torch.tensor(ridge.coef_)
    fitted = compensation.compensated(weight, x_TI.T @ x_TI, kept, damping)
    torch.testing.assert_close(fitted, expected.float(), atol=1e-3, rtol=1e-3)


def moments_of(x_ETI: torch.Tensor) -> Moments:
    tokens = torch.tensor([len(x) for x in x_ETI])
    return Moments(tokens, x_ETI.square().sum(1), torch.stack([x.T @ x for x in x_ETI]))


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("tokens", [12, 48, 400])
def test_fitting_on_little_text_does_no_harm(tokens, correlated):
    """Compared with ridge regression that knows the rows it is judged on."""
    random = torch.Generator().manual_seed(tokens)
    mixing = torch.randn(3, 96, 96, generator=random).tril() if correlated else torch.eye(96).expand(3, 96, 96)
    draw = lambda rows: torch.randn(3, rows, 96, generator=random) @ mixing  # noqa: E731
    taught, held_out, fresh = draw(tokens), draw(max(2, tokens // 3)), draw(4000)
    weight = torch.randn(3, 16, 96, generator=random)
    kept = torch.stack([torch.randperm(96, generator=random)[:64].sort().values for _ in range(3)])

    def lost(matrices: torch.Tensor) -> float:
        each = zip(weight, matrices, kept, fresh)
        return sum(float((x @ whole.T - x[:, index] @ cut.T).square().sum()) for whole, cut, index, x in each)

    def with_damping(damping: float) -> torch.Tensor:
        grams = moments_of(torch.cat([taught, held_out], 1)).gram
        return torch.stack([compensation.compensated(w, g, k, damping) for w, g, k in zip(weight, grams, kept)])

    fitted = lost(compensation.fitted(weight, moments_of(taught), moments_of(held_out), kept))
    as_they_are = lost(torch.stack([whole[:, index] for whole, index in zip(weight, kept)]))
    best = min(lost(with_damping(damping)) for damping in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0))
    assert fitted <= 1.02 * as_they_are
    assert fitted <= 1.25 * min(best, as_they_are)
    if tokens < 96 and not correlated:
        assert lost(with_damping(compensation.DAMPING)) > 1.2 * as_they_are, "what is shrunk by too little does harm"
    if correlated and tokens == 400:
        assert fitted < 0.7 * as_they_are, "and where there is text the fit is worth it"


def test_an_expert_without_text_is_left_as_it_is():
    random = torch.Generator().manual_seed(3)
    x_ETI = torch.randn(2, 200, 16, generator=random) @ torch.randn(16, 16, generator=random)
    taught, held_out = moments_of(x_ETI[:, :150]), moments_of(x_ETI[:, 150:])
    for part in (taught, held_out):
        part.gram[1], part.tokens[1] = 0, 0
    weight, kept = torch.randn(2, 4, 16, generator=random), torch.arange(0, 16, 2).expand(2, -1)
    fitted = compensation.fitted(weight, taught, held_out, kept)
    assert torch.equal(fitted[1], weight[1, :, ::2]) and not torch.equal(fitted[0], weight[0, :, ::2])


@pytest.mark.parametrize("granularity", ["channels", "heads"])
def test_a_fit_on_short_text_does_no_harm_on_other_text(tiny, name, granularity):
    model = tiny(name)
    random = torch.Generator().manual_seed(5)
    short, other = ([{"input_ids": torch.randint(8, 96, size, generator=random)}] for size in ((2, 8), (16, 48)))
    ratio = pruning._removable(anatomy(model), granularity) / pruning.decoder_parameters(model) / 2
    plain, fitted = (
        pruning.apply(model, short, ratio=ratio, granularity=granularity, compensate=compensate)
        for compensate in (False, True)
    )
    assert divergence(fitted, model, other[0]) < 1.1 * divergence(plain, model, other[0])
    with pytest.raises(UserError, match="one sequence only"):
        single = [{"input_ids": short[0]["input_ids"][:1]}]
        pruning.apply(model, single, ratio=ratio, granularity=granularity, compensate=True)


@pytest.mark.parametrize("granularity", ["channels", "heads"])
def test_compensated_cuts_are_as_small_and_closer_on_other_text(tiny, name, granularity):
    model, random = tiny(name), torch.Generator().manual_seed(5)
    text, other = ([{"input_ids": torch.randint(8, 96, (rows, 48), generator=random)}] for rows in (48, 16))
    ratio = pruning._removable(anatomy(model), granularity) / pruning.decoder_parameters(model) / 2
    plain, fitted = (
        pruning.apply(model, text, ratio=ratio, granularity=granularity, compensate=compensate)
        for compensate in (False, True)
    )
    assert pruning.decoder_parameters(plain) == pruning.decoder_parameters(fitted)
    assert divergence(fitted, model, other[0]) < divergence(plain, model, other[0])


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("granularity", ["channels", "heads"])
def test_factored_modules_are_refused_by_name(tiny, granularity, compensate):
    text = [{"input_ids": torch.randint(8, 96, (4, 32), generator=torch.Generator().manual_seed(5))}]
    model = decomposition.apply(tiny("qwen3-4b-instruct-2507"), text, compression=0.5, method="plain", budget="uniform")
    options = {"ratio": 0.02, "granularity": granularity, "compensate": compensate}
    outputs = [block.attention.output for block in anatomy(model).blocks]
    assert any(isinstance(output, FactoredLinear) for output in outputs)
    with pytest.raises(UserError, match="stored as factors and cannot lose rows or columns"):
        pruning.apply(model, text, **options)
