"""The spectra of a model's matrices, one at a time: the energy that each rank keeps, and the cost of losing the matrix.

`Spectra` can be iterated repeatedly: once for the curves from which ranks are chosen, once to make the factors. Each
iteration is one pass of calibration text from block to block, which holds the sums of one block and the spectrum of one
matrix at a time. The spectra are kept for the next iteration only if those of the whole model are small.

Energies of different matrices are compared by the cost of losing them: the divergence in nats, measured with this
matrix alone cut to half its break-even rank and the rest of the model run from there. At most WEIGHED_BLOCKS blocks,
spread evenly over the depth, are measured this way; matrices of the same kind between two of them are interpolated, so
the passes do not grow with the square of the depth. (The Fisher information of the output would need only one backward
pass, but it is the curvature at zero error. Cuts are not small, so divergence is measured at an error of their size.)
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lib import memory_limits
from lib.errors import NotApplicable
from lib.models.calibration import second_moments
from lib.models.calibration.second_moments import Moments
from lib.models.calibration.walk import BlockStore, TextBatch, Walk, finish
from lib.models.structure.anatomy import Block, anatomy
from lib.models.structure.sharing import sharing
from lib.optimizations.tensor_decomposition.allocation import options
from lib.optimizations.tensor_decomposition.installing import FIRST_SEQUENCES, SIDES, install
from lib.optimizations.tensor_decomposition.low_rank import (
    DAMPING,
    SHORT_DAMPING,
    FactorableMatrix,
    Spectrum,
    by_its_rows,
    flat_spectrum,
    random_spectrum,
    root_of,
    spectrum_of,
)

WEIGHED_BLOCKS = 8


def matrices(model: nn.Module, block: int | None = None) -> list[FactorableMatrix]:
    """Return every dense matrix of the decoder's blocks; routers, norms, embeddings, head and vision stay dense."""
    return [
        FactorableMatrix(matrix.module_name, SIDES[matrix.attribute], matrix.block, matrix.weight)
        for matrix in second_moments.matrices(model, "all", block, inside_factors=False)
    ]


@dataclass
class Spectra:
    """The spectra of all matrices in the decoder of `model`; iterate to get them one by one, block by block.

    method: "plain" (of W), "random" (of a random subspace); any other is whitened (of W·S from `calibration`).
    weighed: whether to measure the worth of matrices (see the module docstring), in at most `weighed_blocks` blocks
    (default WEIGHED_BLOCKS); if false it is 1. room: bytes of spectra that may be kept. store: see `Walk`.
    """

    model: nn.Module
    calibration: Sequence[dict[str, torch.Tensor]]
    method: str = "whitened"
    weighed: bool = True
    seed: int = 0
    room: int = field(default_factory=memory_limits.room_to_keep)
    store: BlockStore | None = None
    weighed_blocks: int | None = None
    _kept: list[Spectrum] | None = field(default=None, repr=False)
    _curves: list[Spectrum] | None = field(default=None, repr=False)

    @property
    def whitened(self) -> bool:
        return self.method not in ("plain", "random")

    def __iter__(self) -> Iterator[Spectrum]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Spectrum] | None = []
        curves, used = [], 0
        worth = {curve.matrix.name: curve.worth for curve in self._curves or ()}
        for spectrum, measured in self._read():
            spectrum = replace(spectrum, worth=worth.get(spectrum.matrix.name, 1.0 if measured is None else measured))
            used += spectrum.nbytes
            if kept is not None:
                kept = [*kept, spectrum] if used <= self.room else None
            curves.append(self._curve(spectrum, math.nan if measured is None else measured))
            yield spectrum
        if self._curves is None:
            self._curves = _interpolated(curves)
        if kept is not None:
            worth = {curve.matrix.name: curve.worth for curve in self._curves}
            self._kept = [replace(spectrum, worth=worth[spectrum.matrix.name]) for spectrum in kept]

    def _curve(self, spectrum: Spectrum, worth: float) -> Spectrum:
        """Return the curve of `spectrum`; with a store it does not hold the weights of its matrix."""
        curve = replace(spectrum.curve(), worth=worth)
        if self.store is None:
            return curve
        return replace(curve, matrix=replace(curve.matrix, weight=nn.Parameter(curve.matrix.weight.to("meta"))))

    def curves(self) -> list[Spectrum]:
        """Return the spectra without vectors: the energy that every rank keeps, and the worth of each matrix."""
        if self.method == "random":
            return [flat_spectrum(matrix) for matrix in self.require_matrices()]
        if self._curves is None:
            for _ in self:
                pass
        assert self._curves is not None
        return self._curves

    def of(self, matrix: FactorableMatrix) -> Spectrum | None:
        """Return the spectrum of one matrix, or None if it is not in the decoder."""
        return next((spectrum for spectrum in self if spectrum.matrix.name == matrix.name), None)

    def require_matrices(self) -> list[FactorableMatrix]:
        """Return the matrices that can be factored. Raises NotApplicable if there are none."""
        if not (factorable := matrices(self.model)):
            raise NotApplicable(
                "no matrix to compress: every matrix of the decoder is stored sparse or factored already"
            )
        return factorable

    def _read(self) -> Iterator[tuple[Spectrum, float | None]]:
        """Yield each spectrum with its worth, None if that is not measured."""
        factorable = self.require_matrices()
        if not self.whitened:
            for index, matrix in enumerate(factorable):
                generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
                random = self.method == "random"
                yield random_spectrum(matrix, generator) if random else spectrum_of(matrix), None
            return
        walk = Walk(self.model, self.calibration, store=self.store)
        scale = Scale(self.model, self.weighed_blocks) if self.weighed and self._curves is None else None
        short: list[str] = []
        for block in walk:
            for spectrum in block_spectra(walk, block, short):
                yield spectrum, None if scale is None else scale.weigh(spectrum, walk.carried[0])
        if short:
            warnings.warn(
                f"tensor_decomposition: {short[0]} (and {len(short) - 1} more): fewer calibration tokens than inputs; "
                "the inverse relies on damping, more calibration text would be better",
                stacklevel=3,
            )


def block_spectra(walk: Walk, block: Block, short: list[str] | None = None) -> Iterator[Spectrum]:
    """Yield the whitened spectrum of each matrix in `block`, in front of which `walk` stands; the block is unchanged.

    Appends to `short` the names of matrices that need an inverse but saw fewer tokens than they have inputs.
    """
    observed = second_moments.matrices(walk.model, "all", block.index, inside_factors=False)
    options: dict[str, Any] = {"gram": True, "dtype": torch.float64, "weighting": "router"}
    moments = second_moments.block_moments(walk, observed, **options)
    roots: dict[int, torch.Tensor] = {}
    for matrix, source in zip(matrices(walk.model, block.index), observed):
        spectrum, tokens = _whitened(matrix, moments[source.name], roots)
        if short is not None and tokens < matrix.shape[1] and not spectrum.by_rows:
            short.append(matrix.name)
        yield spectrum


def _whitened(matrix: FactorableMatrix, moments: Moments, roots: dict[int, torch.Tensor]) -> tuple[Spectrum, int]:
    """Return the spectrum and the number of tokens behind it; `roots` caches the root of a shared input."""
    assert moments.gram is not None
    tokens, gram = int(moments.tokens.min()), moments.gram
    if by_its_rows(matrix):
        return spectrum_of(matrix, gram), tokens
    if id(gram) not in roots:
        damping = DAMPING if tokens >= matrix.shape[1] else SHORT_DAMPING
        roots[id(gram)] = root_of(gram, damping, f"block {matrix.block}, {matrix.name}")
    return spectrum_of(matrix, gram, roots[id(gram)]), tokens


class Scale:
    """Measures the worth of a matrix: divergence in nats per token if it alone is cut, over the share of energy lost.

    Uses the first FIRST_SEQUENCES sequences of the first calibration batch.
    """

    def __init__(self, model: nn.Module, most_blocks: int | None = None):
        count = len(anatomy(model).blocks)
        points = min(count, most_blocks or WEIGHED_BLOCKS)
        self.blocks = {round(at * (count - 1) / max(1, points - 1)) for at in range(points)}
        self.trial = sharing(model)
        self.expected: torch.Tensor | None = None

    @torch.no_grad()
    def weigh(self, spectrum: Spectrum, batch: TextBatch) -> float | None:
        """Return the worth of a matrix in the block in front of which `batch` stands, None if it is not measured."""
        ranks = [rank for rank, _, _ in options(spectrum) if rank is not None]
        if spectrum.matrix.block not in self.blocks:
            return None
        if not ranks:
            return 1.0
        first = batch.first(FIRST_SEQUENCES)
        if self.expected is None:
            self.expected = self._log_probabilities(first, spectrum.matrix.block)
        rank = min(ranks, key=lambda rank: abs(rank - spectrum.matrix.break_even / 2))
        owner, _, leaf = spectrum.matrix.module.rpartition(".")
        dense = self.trial.get_submodule(spectrum.matrix.module)
        install(self.trial, [spectrum], {spectrum.matrix.name: rank})
        predicted = self._log_probabilities(first, spectrum.matrix.block)
        setattr(self.trial.get_submodule(owner), leaf, dense)
        lost = nn.functional.kl_div(predicted, self.expected, reduction="sum", log_target=True) / len(self.expected)
        return max(float(lost), 0.0) / max(1 - float(spectrum.kept_R[rank - 1]), 1e-9)

    def _log_probabilities(self, batch: TextBatch, block: int) -> torch.Tensor:
        return finish(self.trial, batch, block)[batch.mask_BT].float().log_softmax(-1)


def _interpolated(curves: Iterable[Spectrum]) -> list[Spectrum]:
    """Return the curves, each with a worth: geometric interpolation over matrices of the same kind between blocks."""
    curves = list(curves)
    weighed: dict[str, dict[int, float]] = {}
    for curve in curves:
        if not math.isnan(curve.worth):
            weighed.setdefault(_kind(curve.matrix), {})[curve.matrix.block] = max(curve.worth, 1e-12)
    every = [worth for by_block in weighed.values() for worth in by_block.values()]
    typical = math.exp(sum(map(math.log, every)) / len(every)) if every else 1.0

    def worth(curve: Spectrum) -> float:
        if not math.isnan(curve.worth):
            return curve.worth
        known, at = weighed.get(_kind(curve.matrix), {}), curve.matrix.block
        below, above = (
            max((b for b in known if b <= at), default=None),
            min((b for b in known if b >= at), default=None),
        )
        if below is None or above is None:
            nearest = above if below is None else below
            return typical if nearest is None else known[nearest]
        share = (at - below) / max(1, above - below)
        return math.exp((1 - share) * math.log(known[below]) + share * math.log(known[above]))

    return [replace(curve, worth=worth(curve)) for curve in curves]


def _kind(matrix: FactorableMatrix) -> str:
    """Return the kind shared by matrices of different blocks: the module's name within its block, and the side."""
    return f"{'.'.join(matrix.module.split('.')[-2:])}:{matrix.side}"
