"""Sums that rounding left without a factor are damped until there is one; non-finite sums are named."""

import pytest
import torch

from lib.errors import UserError
from lib.models.calibration import blockwise
from lib.models.calibration.inverse_factor import inverse_factor
from lib.models.calibration.positive_root import positive_root, ridge_of
from lib.optimizations.common.compression import gptq
from lib.optimizations.sparse_neural_networks import masks
from lib.optimizations.structured_pruning.compensation import compensated


def gram_of(size: int, seed: int, negative: float = 0.0) -> torch.Tensor:
    """Return Σ x·xᵀ [I, I] of half as many tokens as inputs, float64; one empty direction is `negative` times the mean
    variance below zero, as rounding can leave it.
    """
    x_TI = torch.randn(size // 2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x_TI.T @ x_TI
    empty = torch.linalg.eigh(gram).eigenvectors[:, 0]
    return gram - negative * gram.diagonal().mean() * torch.outer(empty, empty)


def test_positive_definite_sums_are_damped_no_more_than_requested():
    gram = torch.stack([gram_of(24, 0), gram_of(24, 1)])
    ridge = ridge_of(gram, 0.01)
    root, added = positive_root(gram, ridge, "w")
    assert torch.equal(added, ridge) and torch.allclose(ridge, 0.01 * gram.diagonal(dim1=-2, dim2=-1).mean(-1))
    torch.testing.assert_close(root @ root.mT, gram + torch.diag_embed(ridge[:, None].expand(-1, 24)))


def test_one_expert_without_an_inverse_does_not_disturb_the_others():
    whole, damaged = gram_of(24, 0), gram_of(24, 1, negative=0.05)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(damaged + 0.01 * damaged.diagonal().mean() * torch.eye(24))
    together = inverse_factor(torch.stack([whole, damaged, torch.zeros(24, 24, dtype=torch.float64)]))
    assert together.isfinite().all()
    torch.testing.assert_close(together[0], inverse_factor(whole[None])[0])
    assert torch.equal(together[2], torch.eye(24))


def test_every_use_of_such_sums_gives_finite_numbers():
    gram, weight = gram_of(24, 1, negative=0.05), torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    pruned, kept = masks.sparsegpt(weight[None], gram[None], 0.5, "unstructured")
    assert pruned.isfinite().all() and kept.float().mean() == 0.5
    assert all(part.isfinite().all() for part in gptq.quantize(weight[None], gram[None]))
    assert compensated(weight, gram, torch.arange(20)).isfinite().all()
    outer = torch.randn(8, 24, generator=torch.Generator().manual_seed(3))
    fitted = blockwise._nearest(weight, gram, gram, outer)  # the inner factor is the identity
    assert fitted.isfinite().all()
    lost = [float(((new.double() - weight.double()) @ gram).norm()) for new in (fitted, outer)]
    assert lost[0] < 0.1 * lost[1], "on what the text showed the original is met all the same"


def test_the_outer_factor_is_unchanged_by_zero_moments():
    outer = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    cross, own = (torch.zeros(size, 4, dtype=torch.float64) for size in (6, 4))
    fitted = blockwise._nearest(torch.ones(8, 6), cross, own, outer)
    torch.testing.assert_close(fitted.float(), outer)


def test_without_damping_the_minimum_is_added():
    root, added = positive_root(gram_of(24, 1, negative=0.05), torch.zeros(()), "w")
    assert root.isfinite().all() and added > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_sums_are_named_in_one_line(value):
    gram = torch.stack([torch.eye(4), torch.full((4, 4), value)])
    named = "block 3, up_proj, one of its experts: sums of its inputs .* not finite"
    with pytest.raises(UserError, match=named) as why:
        inverse_factor(gram, what="block 3, up_proj")
    assert "\n" not in str(why.value)
    with pytest.raises(UserError, match="block 1, q_proj: sums of its inputs"):
        blockwise._nearest(torch.eye(4), gram[1], gram[1], torch.eye(4), "block 1, q_proj")


def test_sums_that_no_damping_can_factor_are_named():
    with pytest.raises(UserError, match=r"w: sums of its inputs .* have no factor, however strongly"):
        positive_root(torch.tensor([[0.0, 1e6], [1e6, 0.0]]), torch.ones(()), "w")
