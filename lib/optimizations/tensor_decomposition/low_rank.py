"""The low-rank matrices nearest to a matrix: on all inputs, on those that calibration showed, or in random directions.

Of one matrix its spectrum, which says what every rank keeps, and from the spectrum the two factors of any rank. Found
through the eigenvectors of the smaller of the two Gram matrices, so that a stack of experts needs no more memory than
its hidden width squared. Knows nothing of models, or of which rank is worth its bytes.

Shapes: a matrix is m × n (outputs × inputs), R rank; E experts, H hidden, I width of one expert, N inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lib.errors import UserError

DAMPING = 1e-6  # of the mean variance, added to every one: inputs that are never active have none
SMALL = 2**22  # elements of a matrix up to which factors are found in float64, above in float32
AT_ONCE = 2**25  # elements of a matrix that are converted at a time


@dataclass(frozen=True)
class FactorableMatrix:
    """A matrix that can be factored: a linear layer, or a stack of experts unfolded along the hidden dimension.

    side: "linear"; "input" ([E·2I, H], of gate and up); "output" ([H, E·I], of down).
    """

    module: str
    side: str
    block: int
    weight: torch.Tensor = field(repr=False)

    @property
    def name(self) -> str:
        return self.module if self.side == "linear" else f"{self.module}:{self.side}"

    @property
    def break_even(self) -> float:
        """The rank at which factors hold as many elements as the matrix: m·n / (m + n)."""
        rows, columns = self.weight.shape
        return rows * columns / (rows + columns)

    def elements(self, rank: int | None) -> int:
        """Return the elements of its factors, or of the dense matrix for rank None."""
        rows, columns = self.weight.shape
        return rows * columns if rank is None else rank * (rows + columns)


@dataclass(frozen=True)
class Spectrum:
    """Of one matrix: `energy_R`, squared singular values of W·S descending, and what its factors are made of."""

    matrix: FactorableMatrix
    energy_R: torch.Tensor
    vectors: torch.Tensor = field(repr=False)
    worth: float  # of all the energy: nats per token that losing it would cost; 1 for plain
    by_rows: bool  # whether the vectors are on the side of the outputs
    root: torch.Tensor | None = field(repr=False)  # S, where the inverse of S is needed

    @property
    def kept_R(self) -> torch.Tensor:
        """Share of the energy that each rank from 1 on keeps."""
        return self.energy_R.cumsum(0) / self.energy_R.sum().clamp_min(1e-300)


def spectrum_of(matrix: FactorableMatrix, gram: torch.Tensor | None = None) -> Spectrum:
    """Return the spectrum of one matrix, through the eigenvectors of the smaller of its two Gram matrices.

    gram: Σ x·xᵀ over the inputs x of the matrix, [N, N], or one per expert [E, N, N] for side "output". Without it the
    spectrum is the plain one.
    """
    weight, by_rows, root = matrix.weight.detach(), _by_rows(matrix), None
    dtype = _precision(matrix)
    if gram is None:
        product = sum(part @ part.T if by_rows else part.T @ part for part in _parts(weight, dtype, by_rows))
    elif matrix.side == "output":
        weight_HEI = weight.to(dtype).unflatten(1, (gram.shape[0], -1))
        product = torch.einsum("hei,eij,gej->hg", weight_HEI, gram.to(dtype), weight_HEI)
    elif by_rows:
        product = weight.to(dtype) @ gram.to(dtype) @ weight.T.to(dtype)
    else:
        root = _root(gram)
        inside = weight.to(dtype) @ root.to(dtype)
        product = inside.T @ inside
    energy_R, vectors = torch.linalg.eigh(product)
    return Spectrum(matrix, energy_R.double().flip(0).clamp_min(0), vectors.flip(1), 1.0, by_rows, root)


def random_spectrum(matrix: FactorableMatrix, generator: torch.Generator) -> Spectrum:
    """Return a random orthonormal basis on the smaller side of `matrix`; each direction keeps the same on average.

    Of half precision where the matrix is: nothing has to be inverted, and at real dimensions the products take long.
    """
    rows, columns = matrix.weight.shape
    by_rows = _by_rows(matrix)
    side = rows if by_rows else columns
    basis, _ = torch.linalg.qr(torch.randn(side, side, generator=generator))
    energy_R = torch.full((side,), 1 / side, dtype=torch.float64)
    half = matrix.weight.dtype in (torch.bfloat16, torch.float16)
    basis = basis.to(matrix.weight.device, matrix.weight.dtype if half else _precision(matrix))
    return Spectrum(matrix, energy_R, basis, 1.0, by_rows, None)


def _by_rows(matrix: FactorableMatrix) -> bool:
    rows, columns = matrix.weight.shape
    return rows < columns or matrix.side == "output"


def _precision(matrix: FactorableMatrix) -> torch.dtype:
    return torch.float64 if matrix.weight.numel() <= SMALL else torch.float32


def _parts(weight: torch.Tensor, dtype: torch.dtype, columns: bool) -> Iterator[torch.Tensor]:
    """Yield `weight` in `dtype`, some columns (or else some rows) at a time: a stack of experts is large."""
    count = max(1, AT_ONCE // weight.shape[0 if columns else 1])
    yield from (part.to(dtype) for part in weight.split(count, dim=int(columns)))


def _root(gram_NN: torch.Tensor) -> torch.Tensor:
    """Return S, lower triangular, with S·Sᵀ = X·Xᵀ but for a little damping."""
    damped = gram_NN.clone()
    damped.diagonal().add_(DAMPING * gram_NN.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.cholesky(damped)


def factorise(spectrum: Spectrum, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (outer [m, R], inner [R, n]), the best matrix of this rank, both of equal norm column by row.

    Raises UserError for a rank of 0 or above full.
    """
    matrix, full = spectrum.matrix, min(spectrum.matrix.weight.shape)
    if not 0 < rank <= full:
        raise UserError(f"{matrix.name}: rank {rank}; expected 1 <= rank <= {full}")
    weight, vectors = matrix.weight.detach(), spectrum.vectors[:, :rank]
    if spectrum.by_rows:
        outer = vectors
        inner = torch.cat([vectors.T @ part for part in _parts(weight, vectors.dtype, True)], dim=1)
    else:
        right = vectors if spectrum.root is None else spectrum.root.to(vectors.dtype) @ vectors
        outer = torch.cat([part @ right for part in _parts(weight, vectors.dtype, False)])
        inner = vectors.T
        if spectrum.root is not None:
            inner = torch.linalg.solve_triangular(spectrum.root.to(vectors.dtype), inner, upper=False, left=False)
    scale_R = (inner.norm(dim=1) / outer.norm(dim=0).clamp_min(1e-30)).clamp(1e-12, 1e12).sqrt()
    return outer * scale_R, inner / scale_R[:, None]
