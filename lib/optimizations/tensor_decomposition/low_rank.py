"""Low-rank approximations of a matrix: nearest on all inputs, on calibration inputs, or in random directions.

Computes the spectrum of a matrix, which says how much energy every rank keeps, and from it the two factors of any rank.
Works in float64 on the eigenvectors of the smaller of the two Gram matrices, accumulated piece by piece: a stack of
experts needs only its hidden width squared of memory. Independent of models and of how ranks are allocated.

Shapes: a matrix is m × n (outputs × inputs), R rank; E experts, H hidden, I width of one expert, N inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from lib.errors import UserError
from lib.models.calibration.positive_root import positive_root, ridge_of

DAMPING = 1e-6  # share of the mean variance added to each variance: inputs that are never active have none
SHORT_DAMPING = 1e-2  # the same with fewer tokens than inputs, when the covariance has no inverse
AT_ONCE = 2**25  # elements of a matrix converted at a time


@dataclass(frozen=True)
class FactorableMatrix:
    """A matrix that can be factored: a linear layer, or a stack of experts unfolded along the hidden dimension.

    side: "linear"; "input" for gate and up, unfolded to [E·2I, H]; "output" for down, unfolded to [H, E·I]. `weight` is
    the model's own tensor, a matrix or a stack [E, …], never a copy.
    """

    module: str
    side: str
    block: int
    weight: torch.Tensor = field(repr=False)

    @property
    def name(self) -> str:
        return self.module if self.side == "linear" else f"{self.module}:{self.side}"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the unfolded matrix."""
        if self.weight.dim() == 2:
            return self.weight.shape[0], self.weight.shape[1]
        experts, rows, columns = self.weight.shape
        return (rows, experts * columns) if self.side == "output" else (experts * rows, columns)

    @property
    def break_even(self) -> float:
        """The rank at which factors hold as many elements as the matrix: m·n / (m + n)."""
        rows, columns = self.shape
        return rows * columns / (rows + columns)

    def elements(self, rank: int | None) -> int:
        """Return the number of elements of the factors, or of the dense matrix for rank None."""
        rows, columns = self.shape
        return rows * columns if rank is None else rank * (rows + columns)

    def pieces(self, dtype: torch.dtype, columns: bool) -> Iterator[torch.Tensor]:
        """Yield the unfolded matrix in `dtype` as groups of columns, or of rows if `columns` is false."""
        weight = self.weight.detach()
        if weight.dim() == 3 and self.side == "output":
            assert columns, "the rows of a stack unfolded along its outputs are not in one piece"
            yield from (expert.to(dtype) for expert in weight)
            return
        weight = weight.flatten(0, -2)
        count = max(1, AT_ONCE // weight.shape[0 if columns else 1])
        yield from (part.to(dtype) for part in weight.split(count, dim=int(columns)))


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one matrix: `energy_R`, the squared singular values of W·S, descending, and the singular vectors.

    Without `vectors` and `root` (see `curve`) it gives the energy that each rank keeps, but no factors.
    """

    matrix: FactorableMatrix
    energy_R: torch.Tensor
    vectors: torch.Tensor | None = field(repr=False)
    worth: float  # nats per token that losing all the energy would cost; 1 for plain
    by_rows: bool  # whether the vectors are on the output side
    root: torch.Tensor | None = field(repr=False)  # S, if its inverse is needed

    @property
    def kept_R(self) -> torch.Tensor:
        """Share of the energy kept by each rank, starting at rank 1."""
        return self.energy_R.cumsum(0) / self.energy_R.sum().clamp_min(1e-300)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(tensor.nbytes for tensor in (self.energy_R, self.vectors, self.root) if tensor is not None)

    def curve(self) -> "Spectrum":
        """Return the spectrum without the tensors from which factors are made."""
        return replace(self, vectors=None, root=None)


def spectrum_of(
    matrix: FactorableMatrix, gram: torch.Tensor | None = None, root: torch.Tensor | None = None
) -> Spectrum:
    """Return the spectrum of one matrix from the eigenvectors of the smaller of its two Gram matrices.

    gram: Σ x·xᵀ over the inputs x of the matrix, [N, N], or one per expert [E, N, N] for side "output"; without it the
    spectrum is the plain one. root: the result of `root_of(gram)`, if already computed.
    """
    by_rows, double = by_its_rows(matrix), torch.float64
    side = matrix.shape[0 if by_rows else 1]
    product = torch.zeros(side, side, dtype=double, device=matrix.weight.device)
    if gram is None:
        root = None
        for part in matrix.pieces(double, by_rows):
            product += part @ part.T if by_rows else part.T @ part
    elif by_rows and gram.dim() == 3:
        for part_HI, gram_II in zip(_by_expert(matrix, len(gram)), gram):
            product += part_HI @ gram_II.to(double) @ part_HI.T
        root = None
    elif by_rows:
        weight, root = matrix.weight.detach().flatten(0, -2).to(double), None
        product = weight @ gram.to(double) @ weight.T
    else:
        root = root_of(gram, what=matrix.name) if root is None else root
        for part in matrix.pieces(double, False):
            inside = part @ root
            product += inside.T @ inside
    energy_R, vectors = torch.linalg.eigh(product)
    return Spectrum(matrix, energy_R.flip(0).clamp_min(0), vectors.flip(1), 1.0, by_rows, root)


def _by_expert(matrix: FactorableMatrix, count: int) -> Iterator[torch.Tensor]:
    """Yield the matrix [H, I] of each expert from a stack or from its unfolded form."""
    if matrix.weight.dim() == 3:
        return matrix.pieces(torch.float64, True)
    return iter(matrix.weight.detach().double().unflatten(1, (count, -1)).unbind(1))


def flat_spectrum(matrix: FactorableMatrix) -> Spectrum:
    """Return the expected spectrum of a random subspace: equal energy in each direction, without vectors."""
    by_rows = by_its_rows(matrix)
    side = matrix.shape[0 if by_rows else 1]
    return Spectrum(matrix, torch.full((side,), 1 / side, dtype=torch.float64), None, 1.0, by_rows, None)


def random_spectrum(matrix: FactorableMatrix, generator: torch.Generator) -> Spectrum:
    """Return a random orthonormal basis on the smaller side of `matrix`, with equal energy in each direction.

    In the dtype of the matrix: nothing has to be inverted, and at real dimensions the products are slow.
    """
    flat = flat_spectrum(matrix)
    side = len(flat.energy_R)
    basis, _ = torch.linalg.qr(torch.randn(side, side, generator=generator))
    return replace(flat, vectors=basis.to(matrix.weight.device, matrix.weight.dtype))


def by_its_rows(matrix: FactorableMatrix) -> bool:
    """Return whether to truncate on the output side: if outputs are fewer than inputs, no inverse is needed."""
    rows, columns = matrix.shape
    return rows < columns or matrix.side == "output"


def root_of(gram_NN: torch.Tensor, damping: float = DAMPING, what: str = "a matrix") -> torch.Tensor:
    """Return S, lower triangular, float64, with S·Sᵀ = X·Xᵀ up to damping; the identity if no input was ever active.

    Damping grows if rounding left negative variances. Raises UserError naming `what`, as `positive_root` does.
    """
    return positive_root(gram_NN, ridge_of(gram_NN, damping), what)[0]


def factorise(spectrum: Spectrum, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (outer [m, R], inner [R, n]), the factors of the best matrix of this rank.

    Each column of outer has the norm of its row of inner. Raises UserError for a rank of 0 or above full rank,
    ValueError for a spectrum without vectors.
    """
    matrix, full = spectrum.matrix, min(spectrum.matrix.shape)
    if not 0 < rank <= full:
        raise UserError(f"{matrix.name}: rank {rank}; expected 1 <= rank <= {full}")
    if spectrum.vectors is None:
        raise ValueError(f"{matrix.name}: a curve alone gives no factors")
    vectors = spectrum.vectors[:, :rank]
    if spectrum.by_rows:
        outer = vectors
        inner = torch.cat([vectors.T @ part for part in matrix.pieces(vectors.dtype, True)], dim=1)
    else:
        right = vectors if spectrum.root is None else spectrum.root.to(vectors.dtype) @ vectors
        outer = torch.cat([part @ right for part in matrix.pieces(vectors.dtype, False)])
        inner = vectors.T
        if spectrum.root is not None:
            inner = torch.linalg.solve_triangular(spectrum.root.to(vectors.dtype), inner, upper=False, left=False)
    scale_R = (inner.norm(dim=1) / outer.norm(dim=0).clamp_min(1e-30)).clamp(1e-12, 1e12).sqrt()
    return outer * scale_R, inner / scale_R[:, None]
