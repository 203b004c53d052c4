"""Tests factors against numpy's SVD, the dense matrices that they replace, and the request."""

import copy
import re

import numpy as np
import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.models.calibration import blockwise
from lib.models.calibration.distillation import divergence
from lib.models.checkpoints import io
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import factored
from lib.optimizations.tensor_decomposition import allocation, analysis, low_rank
from lib.optimizations.tensor_decomposition import method as td


@pytest.fixture
def text():
    """Return two batches of calibration text: enough tokens for every covariance of the tiny models."""
    ids = torch.randint(8, 96, (2, 6, 48), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": part} for part in ids]


@pytest.fixture
def more_text():
    """Return eight batches of more sequences: enough that what is learned on some generalizes to the others."""
    ids = torch.randint(8, 96, (8, 24, 48), generator=torch.Generator().manual_seed(6))
    return [{"input_ids": part} for part in ids]


@pytest.fixture
def correlated():
    """Return a function that makes a matrix [rows, columns] and inputs [T, columns] with directions of very different
    size.
    """

    def make(rows: int, columns: int):
        random = torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, columns, generator=random)
        mix = torch.randn(columns, columns, generator=random) * torch.logspace(0, -2, columns)
        return weight, torch.randn(400, columns, generator=random) @ mix.T

    return make


def gram_of(x_TN: torch.Tensor) -> torch.Tensor:
    return x_TN.double().T @ x_TN.double()


def matrix_of(weight: torch.Tensor, side: str = "linear") -> low_rank.FactorableMatrix:
    return low_rank.FactorableMatrix("layer", side, 0, weight)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_plain_factors_are_the_best_low_rank_approximation(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spectrum = low_rank.spectrum_of(matrix_of(weight))
    outer, inner = low_rank.factorise(spectrum, rank)
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    assert np.allclose((outer @ inner).numpy(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-8)
    assert np.allclose(spectrum.energy_R[: len(s)].sqrt().numpy(), s, atol=1e-6)
    assert outer.shape == (shape[0], rank) and inner.shape == (rank, shape[1])
    assert torch.allclose(outer.norm(dim=0), inner.norm(dim=1))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_whitened_factors_are_the_best_on_calibration_inputs(correlated, shape):
    """Compares with the textbook: SVD of W·S, truncated, times S⁻¹. Never worse on these inputs than plain factors."""
    weight, x_TN = correlated(*shape)
    root = np.linalg.cholesky(x_TN.double().numpy().T @ x_TN.double().numpy())
    u, s, vt = np.linalg.svd(weight.double().numpy() @ root, full_matrices=False)
    for rank in (1, 4, 8, 16):
        outer, inner = low_rank.factorise(low_rank.spectrum_of(matrix_of(weight), gram_of(x_TN)), rank)
        reference = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
        errors = {
            "whitened": outer @ inner,
            "reference": torch.from_numpy(reference),
            "plain": torch.matmul(*low_rank.factorise(low_rank.spectrum_of(matrix_of(weight)), rank)),
        }
        errors = {name: float((x_TN.double() @ (weight.double() - low).T).norm()) for name, low in errors.items()}
        assert errors["whitened"] == pytest.approx(errors["reference"], rel=1e-3)
        assert errors["whitened"] < errors["plain"]


def test_an_inactive_input_needs_no_special_case(correlated):
    weight, x_TN = correlated(40, 24)
    x_TN[:, 3] = 0
    outer, inner = low_rank.factorise(low_rank.spectrum_of(matrix_of(weight), gram_of(x_TN)), 23)
    assert torch.isfinite(outer).all() and torch.isfinite(inner).all()
    assert float((x_TN.double() @ (weight.double() - outer @ inner).T).norm() / (x_TN @ weight.T).norm()) < 1e-2


def test_a_negative_variance_from_rounding_is_damped():
    """128 tokens, of which 60 are different, leave directions whose only variance is float32 rounding, which may be
    negative. Previously the analysis failed with `linalg.cholesky: … not positive-definite`.
    """
    x_TN = torch.randn(60, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(3, 1)[:128]
    gram = x_TN.T @ x_TN
    mean = gram.diagonal().mean()
    empty = torch.linalg.eigh(gram).eigenvectors[:, 0]
    gram -= 3e-5 * mean * torch.outer(empty, empty)
    root = low_rank.root_of(gram)
    assert float((root @ root.T - gram).abs().max()) < 1e-3 * float(mean)
    weight = torch.randn(160, 128, generator=torch.Generator().manual_seed(1))
    outer, inner = low_rank.factorise(low_rank.spectrum_of(matrix_of(weight), gram), 60)
    assert float((x_TN @ (weight.double() - outer @ inner).T).norm() / (x_TN @ weight.double().T).norm()) < 1e-2


@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_full_rank_changes_nothing(tiny, name, batch, text, method):
    """Linear layers, latent projections, shared experts, and the Tucker form of stacked experts."""
    model = tiny(name)
    spectra = td.analyse(model, text, method)
    full = {spectrum.matrix.name: min(spectrum.matrix.shape) for spectrum in spectra}
    whole = td.apply(model, text, method=method, spectra=spectra, ranks=full)
    assert len(factored.ranks(whole)) == len({spectrum.matrix.module for spectrum in spectra})
    assert all(isinstance(m, factored.FactoredLinear) for b in anatomy(whole).blocks for m in _attention(b))
    assert torch.allclose(whole(**batch).logits, model(**batch).logits, atol=2e-3, rtol=1e-3)


def _attention(block):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    return [part for part in (getattr(block.attention.module, name, None) for name in names) if part is not None]


@pytest.mark.parametrize("name", ["glm-4.7-flash", "qwen3-coder-30b"])
def test_tucker_keeps_the_leading_subspaces_of_the_unfolded_stacks(tiny, name):
    """HOSVD: the shared factors span the leading singular vectors along hidden, the cores are the projections."""
    model = tiny(name)
    experts = anatomy(model).blocks[-1].feed_forward.experts
    spectra = [spectrum for spectrum in td.analyse(model, [], "plain") if spectrum.matrix.side != "linear"]
    low = td.apply(model, [], method="plain", spectra=spectra, ranks={spectrum.matrix.name: 8 for spectrum in spectra})
    module = anatomy(low).blocks[-1].feed_forward.experts.module
    gate_up = torch.einsum("eip,ph->eih", module.gate_up_proj, module.input_factor.weight)
    down = torch.einsum("hq,eqi->ehi", module.output_factor.weight, module.down_proj)
    _, _, v = torch.linalg.svd(experts.gate_up.flatten(0, 1), full_matrices=False)
    u, _, _ = torch.linalg.svd(experts.down.transpose(0, 1).flatten(1), full_matrices=False)
    assert torch.allclose(gate_up, experts.gate_up @ v[:8].T @ v[:8], atol=1e-4)
    assert torch.allclose(down, torch.einsum("hq,gq,egi->ehi", u[:, :8], u[:, :8], experts.down), atol=1e-4)
    assert module.gate_up_proj.shape[2] == module.down_proj.shape[1] == 8


@pytest.mark.parametrize("method", td.METHODS)
@pytest.mark.parametrize("compression", [0.15, 0.3])
def test_bytes_shrink_by_the_requested_share(tiny, name, batch, text, tmp_path, method, compression):
    model = tiny(name)
    before = io.weights_hash(model)
    low = td.apply(model, text, compression=compression, method=method, refine_steps=2)
    assert io.weights_hash(model) == before, "the caller's model is left alone"
    removed = 1 - allocation.decoder_bytes(low) / allocation.decoder_bytes(model)
    assert compression - 1e-9 <= removed < compression + 0.06, "not less, and at most a step of rank more"
    back = io.load_folder(io.save(low, tmp_path), torch.float32)
    assert io.weights_hash(back) == io.weights_hash(low)
    # Equal but for rounding: file tensors have other addresses, so kernels sum in another order.
    torch.testing.assert_close(back(**batch).logits, low(**batch).logits, rtol=1e-4, atol=1e-5)


def test_whitened_diverges_less_than_plain_at_equal_bytes(tiny, name, text):
    """On text of the calibration kind, with ranks from the same budget."""
    model = tiny(name)
    spectra = {method: td.analyse(model, text, method) for method in ("plain", "whitened")}
    ranks = allocation.allocate(model, spectra["whitened"].curves(), 0.2)
    lost = {
        method: sum(
            float(divergence(td.apply(model, text, method=method, spectra=spectra[method], ranks=ranks), model, part))
            for part in text
        )
        for method in spectra
    }
    assert lost["whitened"] < lost["plain"]


def test_refinement_lowers_the_error_of_blocks_and_the_divergence(tiny, name, more_text):
    model = tiny(name)
    low = td.apply(model, more_text, compression=0.25, method="whitened")
    refined = copy.deepcopy(low)
    errors = blockwise.refine(refined, model, more_text, steps=30, learning_rate=3e-3)
    assert len(errors) == 4 and all(after <= before for before, after in errors)
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    kl = [sum(float(divergence(arm, model, part)) for part in more_text) for arm in (low, refined)]
    assert kl[1] < kl[0]
    dense = {id(p) for p in refined.parameters() if p.requires_grad}
    assert not dense and factored.ranks(refined) == factored.ranks(low)


def test_refinement_targets_the_original_stream(tiny, name, batch):
    """Unchanged blocks see their own inputs and give their own outputs: the error is zero, padding excluded."""
    model = tiny(name)
    assert all(before < 1e-9 for before, _ in blockwise.refine(copy.deepcopy(model), model, [batch], steps=3))


def test_bfloat16_is_refined_in_float32(tiny, name, text):
    model = tiny(name).to(torch.bfloat16)
    low = td.apply(model, text, compression=0.2, method="refined", refine_steps=2)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert torch.isfinite(low(**text[0]).logits).all()


def test_matrices_exclude_routers_and_vision(tiny, name):
    model = tiny(name)
    factorable = analysis.matrices(model)
    blocks = anatomy(model).blocks
    linears = [module for block in blocks for module in block.module.modules() if isinstance(module, torch.nn.Linear)]
    expected = len(linears) + 2 * sum(block.feed_forward.kind == "experts" for block in blocks)
    assert len(factorable) == expected and not any(
        "gate.weight" in matrix.name or "visual" in matrix.name for matrix in factorable
    )
    sides = {matrix.side for matrix in factorable}
    assert sides == ({"linear", "input", "output"} if "glm" in name or "coder" in name else {"linear"})


def test_the_budget_follows_the_energy(tiny, text):
    """A matrix of low rank is cut to that rank without loss; one with a flat spectrum stays dense."""
    model = tiny("qwen3-4b-instruct-2507")
    first, second = (anatomy(model).blocks[index].feed_forward.up for index in (1, 2))
    thin = torch.randn(64, 8) @ torch.randn(8, 32)
    first.weight.copy_(thin)
    torch.nn.init.orthogonal_(second.weight)
    ranks = allocation.allocate(model, td.analyse(model, [], "plain").curves(), 0.1)
    assert ranks["model.layers.1.mlp.up_proj"] == 8
    assert ranks["model.layers.2.mlp.up_proj"] is None
    for spectrum in td.analyse(model, [], "plain"):
        chosen = ranks[spectrum.matrix.name]
        assert chosen is None or (chosen % allocation.MULTIPLE == 0 and chosen < spectrum.matrix.break_even)


def test_matrix_sensitivity_predicts_the_divergence(tiny, name, text):
    """Matrices are cut one at a time, further than when weighed: the estimate ranks them as the divergence does."""
    model = tiny(name)
    spectra = list(td.analyse(model, text))
    predicted, measured = [], []
    for spectrum in spectra[:: max(1, len(spectra) // 12)]:
        if (rank := allocation.options(spectrum)[0][0]) is None:
            continue
        ranks = {spectrum.matrix.name: rank}
        low = td.apply(model, text, method="whitened", spectra=spectra, ranks=ranks)
        predicted.append(td.predicted_divergence(spectra, ranks))
        measured.append(sum(float(divergence(low, model, part)) for part in text) / len(text))
    assert len(measured) >= 8
    order = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    assert np.corrcoef(*order)[0, 1] > 0.6
    assert 0.1 < np.median(np.array(predicted) / np.array(measured)) < 10


@pytest.mark.parametrize("side", ["linear", "input", "output"])
def test_a_large_matrix_is_processed_in_parts(monkeypatch, side):
    """Small parts give the same factors, for a plain and for a random subspace."""
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(1))
    matrix = matrix_of(weight, side)
    whole = low_rank.spectrum_of(matrix)
    expected = torch.matmul(*low_rank.factorise(whole, 8))
    monkeypatch.setattr(low_rank, "AT_ONCE", 100)
    parted = low_rank.spectrum_of(matrix)
    assert torch.allclose(parted.energy_R, whole.energy_R)
    assert torch.allclose(torch.matmul(*low_rank.factorise(parted, 8)), expected)
    low = torch.matmul(*low_rank.factorise(low_rank.random_spectrum(matrix, torch.Generator().manual_seed(2)), 8))
    assert torch.linalg.matrix_rank(low) == 8
    assert (weight - low).norm() > (weight - expected).norm(), "plain is the best, so random is worse"


def test_random_subspaces_have_the_usual_shapes_and_follow_the_seed(tiny, name):
    model = tiny(name)
    first, same, other = (td.apply(model, [], method="random", budget="uniform", seed=seed) for seed in (1, 1, 2))
    assert io.weights_hash(first) == io.weights_hash(same) != io.weights_hash(other)
    assert 0.2 <= 1 - allocation.decoder_bytes(first) / allocation.decoder_bytes(model) < 0.26


def test_unchanged_weights_are_not_stored_twice(tiny, name):
    model = tiny(name)
    low = td.apply(model, [], method="plain", compression=0.2)
    ours, theirs = anatomy(low), anatomy(model)
    assert ours.embeddings.weight is theirs.embeddings.weight and ours.head.weight is theirs.head.weight
    norms = [view.blocks[0].module.input_layernorm.weight for view in (ours, theirs)]
    assert norms[0] is norms[1]


def test_uniform_ranks_take_the_same_share_of_each_matrix(tiny, text):
    model = tiny("qwen3-vl-2b")
    spectra = td.analyse(model, text)
    ranks = allocation.allocate(model, spectra.curves(), 0.3, "uniform")
    least = 0.7 * allocation.decoder_bytes(model)
    assert allocation.decoder_bytes(td.apply(model, text, method="whitened", spectra=spectra, ranks=ranks)) <= least
    assert allocation.decoder_bytes(td.apply(model, text, compression=0.3, budget="uniform")) <= least


def test_a_factored_model_is_not_factored_again(tiny, text):
    model = tiny("glm-4.7-flash")
    spectra = list(td.analyse(model, [], "plain"))
    whole = td.apply(
        model, [], method="plain", spectra=spectra, ranks={spectrum.matrix.name: 8 for spectrum in spectra}
    )
    assert "factored already" in td.applies_to(whole) and td.applies_to(model) is None
    with pytest.raises(UserError, match="no matrix to compress"):
        td.apply(whole, text)
    half = td.apply(
        model, [], method="plain", spectra=spectra, ranks={spectrum.matrix.name: 8 for spectrum in spectra[::2]}
    )
    assert td.applies_to(half) is None
    assert allocation.decoder_bytes(
        td.apply(half, text, compression=0.05, method="whitened")
    ) < allocation.decoder_bytes(half)


def test_uniform_ranks_remove_the_requested_share_despite_a_thin_matrix(monkeypatch):
    """Planted: the thin matrix has no factors of a third of its size; the square one fills its share exactly."""
    shapes = {"square": (256, 256), "thin": (16, 256)}
    matrices = [low_rank.FactorableMatrix(name, "linear", 0, torch.empty(shape)) for name, shape in shapes.items()]
    dense = sum(matrix.elements(None) for matrix in matrices)
    monkeypatch.setattr(allocation, "decoder_bytes", lambda _: 4 * dense)
    spectra = [low_rank.flat_spectrum(matrix) for matrix in matrices]
    ranks = allocation.allocate(None, spectra, 0.625, "uniform")
    assert sum(matrix.elements(ranks[matrix.name]) for matrix in matrices) <= 0.375 * dense
    assert ranks == {"square": 40, "thin": None}, "what is left over is spent on the thin one"


def test_bad_requests_are_named(tiny, name, text):
    model = tiny(name)
    for compression in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="out of range; expected 0 < compression < 1"):
            td.apply(model, text, compression=compression)
    with pytest.raises(NotApplicable, match=r"compression 0.99 is out of reach: .* at most 0\.\d\d"):
        td.apply(model, text, compression=0.99)
    with pytest.raises(UserError, match='method "tucker"; expected one of plain'):
        td.apply(model, text, method="tucker")
    with pytest.raises(UserError, match="no token"):
        td.apply(model, [], method="whitened")
    assert td.apply(model, [], method="plain") is not None
    spectra = list(td.analyse(model, [], "plain"))
    layer = spectra[0].matrix
    for rank in (0, -8, min(layer.shape) + 1):
        with pytest.raises(UserError, match=rf"{layer.name}: rank {rank}; expected 1 <= rank <= \d+"):
            td.apply(model, [], method="plain", spectra=spectra, ranks={layer.name: rank})
    with pytest.raises(UserError, match="no matrix nowhere"):
        td.apply(model, [], method="plain", spectra=spectra, ranks={"nowhere": 8})


def test_unreachable_targets_are_refused_before_reading_text(tiny, name, text):
    """Computing all spectra of a large model takes hours."""
    model, ran = tiny(name), []
    anatomy(model).blocks[0].module.register_forward_hook(lambda *_: ran.append(1))
    for budget in ("global", "uniform"):
        with pytest.raises(NotApplicable, match=r"compression 0\.99 is out of reach"):
            td.apply(model, text, compression=0.99, method="refitted", budget=budget)
    assert not ran
    curves = td.analyse(model, text, budget="uniform").curves()
    least = sum(allocation.options(curve)[0][1] for curve in curves)
    dense = sum(curve.matrix.elements(None) for curve in curves)
    reach = 4 * (dense - least) / allocation.decoder_bytes(model)
    assert allocation.room_for(model, analysis.matrices(model), reach - 1e-6) >= least
    with pytest.raises(NotApplicable, match="out of reach"):
        allocation.room_for(model, analysis.matrices(model), reach + 1e-6)


def test_few_tokens_are_damped_and_reported(tiny, name, text):
    """20 tokens for 32 inputs: directions seen in the text are kept, unseen ones do no harm."""
    model = tiny(name)
    few = [{"input_ids": text[0]["input_ids"][:2, :10]}]
    with pytest.warns(UserWarning, match=r"fewer calibration tokens than inputs"):
        low = td.apply(model, few, compression=0.15, method="whitened")
    plain = td.apply(model, few, compression=0.15, method="plain")
    assert all(torch.isfinite(parameter).all() for parameter in low.parameters())
    assert divergence(low, model, few[0]) < divergence(plain, model, few[0])


def test_a_wide_matrix_with_few_tokens_gives_finite_factors_without_warning(correlated, recwarn):
    weight, x_TN = correlated(24, 40)
    outer, inner = low_rank.factorise(low_rank.spectrum_of(matrix_of(weight), gram_of(x_TN[:10])), 8)
    assert torch.isfinite(outer).all() and torch.isfinite(inner).all() and not recwarn.list


def test_ordinary_directions_survive_a_massive_activation():
    """2,048 × 8,192 with one direction a thousand times the others: each singular value is right to a millionth of
    itself.
    """
    rows, columns = 2048, 8192
    random = torch.Generator().manual_seed(0)
    planted_R = torch.linspace(1.0, 0.1, rows, dtype=torch.float64)
    planted_R[0] = 1000.0
    left, right = (torch.randn(size, generator=random, dtype=torch.float64) for size in (rows, columns))
    left, right = left / left.norm(), right / right.norm()
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    weight[torch.arange(rows), torch.arange(rows)] = planted_R
    weight -= 2 * left[:, None] * (left @ weight)  # Householder reflections: orthogonal, and quick to apply
    weight -= 2 * (weight @ right)[:, None] * right
    energy_R = low_rank.spectrum_of(matrix_of(weight)).energy_R
    assert torch.allclose(energy_R.sqrt(), planted_R, rtol=1e-6)


def test_a_stack_of_experts_is_not_copied(tiny):
    model = tiny("qwen3-coder-30b")
    experts = anatomy(model).blocks[0].feed_forward.experts
    stacks = {matrix.side: matrix for matrix in analysis.matrices(model, 0) if matrix.side != "linear"}
    assert stacks["output"].weight is experts.down and stacks["input"].weight is experts.gate_up
    assert stacks["output"].shape == (32, 8 * 32) and stacks["input"].shape == (8 * 64, 32)


def test_refitting_lowers_the_error_of_blocks_in_closed_form(tiny, more_text):
    model = tiny("qwen3-4b-instruct-2507")
    low = td.apply(model, more_text, compression=0.25, method="whitened")
    fitted = copy.deepcopy(low)
    errors = blockwise.refit(fitted, model, more_text)
    assert len(errors) == 4 and all(after <= before for before, after in errors)
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    kl = [sum(float(divergence(arm, model, part)) for part in more_text) for arm in (low, fitted)]
    assert kl[1] < kl[0]


def test_an_outer_factor_is_the_least_squares_solution(correlated):
    weight, x_TN = correlated(40, 24)
    z_TR = x_TN.double() @ torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outer = blockwise._nearest(weight, x_TN.double().T @ z_TR, z_TR.T @ z_TR, torch.zeros(len(weight), 8))
    expected = torch.linalg.lstsq(z_TR, x_TN.double() @ weight.double().T).solution.T
    lost = [float((x_TN.double() @ weight.double().T - z_TR @ factor.T).norm()) for factor in (outer, expected)]
    assert lost[0] < 1.001 * lost[1]


def test_an_outer_factor_with_too_few_tokens_stays_near_the_old_one(correlated):
    """Planted: fewer tokens than ranks. The fit is exact on them; elsewhere the factor stays near the old one."""
    weight, x_TN = correlated(40, 24)
    random = torch.Generator().manual_seed(1)
    inner_RN = torch.randn(16, 24, dtype=torch.float64, generator=random)
    old = torch.randn(len(weight), 16, dtype=torch.float64, generator=random)
    x_TN = x_TN[:5].double()
    z_TR = x_TN @ inner_RN.T
    outer = blockwise._nearest(weight, x_TN.T @ z_TR, z_TR.T @ z_TR, old)
    _, _, directions = torch.linalg.svd(z_TR)
    unseen_RU = directions[5:].T
    assert torch.allclose(outer @ unseen_RU, old @ unseen_RU, atol=1e-6)
    wanted = x_TN @ weight.double().T
    assert float((z_TR @ outer.T - wanted).norm()) < 0.1 * float((z_TR @ old.T - wanted).norm())


def test_sensitivity_is_interpolated_between_weighed_blocks(tiny, text, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    everywhere = {curve.matrix.name: curve.worth for curve in td.analyse(model, text).curves()}
    monkeypatch.setattr(analysis, "WEIGHED_BLOCKS", 2)
    ends = {curve.matrix.name: curve.worth for curve in td.analyse(model, text).curves()}
    for matrix in analysis.matrices(model):
        if matrix.block in (0, 3):
            assert ends[matrix.name] == everywhere[matrix.name]
        else:
            low, high = sorted(everywhere[matrix.name.replace(f".{matrix.block}.", f".{end}.")] for end in (0, 3))
            assert low * (1 - 1e-9) <= ends[matrix.name] <= high * (1 + 1e-9)


def test_passes_do_not_grow_quadratically_with_depth(tiny, text, monkeypatch):
    """Every block runs on the text once per reading, and behind a limited number of weighed blocks."""
    model = tiny("qwen3-4b-instruct-2507")
    monkeypatch.setattr(analysis, "WEIGHED_BLOCKS", 1)
    runs = []
    for block in anatomy(model).blocks:
        block.attention.output.register_forward_hook(lambda module, args, output, index=block.index: runs.append(index))
    spectra = td.analyse(model, text, budget="uniform")
    spectra.curves()
    assert runs == sorted([0, 1, 2, 3] * len(text))
    runs.clear()
    list(spectra)
    assert runs == []  # small enough to be kept


def test_reread_and_kept_spectra_give_the_same_factors(tiny, name, text):
    model = tiny(name)
    kept, again = analysis.Spectra(model, text), analysis.Spectra(model, text, room=0)
    low, same = (td.apply(model, text, method="whitened", spectra=read) for read in (kept, again))
    assert io.weights_hash(low) == io.weights_hash(same)


def test_the_reach_named_by_a_refusal_is_within_reach(tiny, name):
    model = tiny(name)
    with pytest.raises(NotApplicable) as refused:
        allocation.room_for(model, analysis.matrices(model), 0.99)
    reach = float(re.search(r"at most ([\d.]+)", str(refused.value))[1])
    assert allocation.room_for(model, analysis.matrices(model), reach) > 0
