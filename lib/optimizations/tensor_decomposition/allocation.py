"""How many ranks each matrix gets: one budget of bytes, spent where a rank keeps most.

A matrix is given by its spectrum, and is worth what losing it would cost. It stays dense where factors would not be
smaller, or where the budget is better spent on it whole. Knows nothing of how a spectrum was found.
"""

from collections.abc import Sequence

from torch import nn

from lib.errors import NotApplicable
from lib.models.structure.anatomy import anatomy
from lib.optimizations.tensor_decomposition.low_rank import FactorableMatrix, Spectrum

MULTIPLE = 8  # ranks are multiples of this: matrix kernels are built for aligned rows

Choice = tuple["int | None", int, float]  # rank (None: dense), elements, what is kept of the matrix's worth


def decoder_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters of the decoder's blocks: what `compression` is a share of."""
    return sum(parameter.nbytes for block in anatomy(model).blocks for parameter in block.module.parameters())


def options(spectrum: Spectrum) -> list[Choice]:
    """Return what a matrix can be: (rank, elements, what is kept of its worth) by ascending size, dense (None) last."""
    matrix, kept_R = spectrum.matrix, spectrum.kept_R * spectrum.worth
    ranks = [rank for rank in range(MULTIPLE, len(kept_R) + 1, MULTIPLE) if rank < matrix.break_even]
    factored = [(rank, matrix.elements(rank), float(kept_R[rank - 1])) for rank in ranks]
    return [*factored, (None, matrix.elements(None), spectrum.worth)]


def room_for(model: nn.Module, matrices: Sequence[FactorableMatrix], compression: float) -> float:
    """Return how many elements are left for these matrices once `compression` of the decoder's bytes are gone.

    Needs no spectrum: raises NotApplicable, before any work, with the largest compression in reach.
    """
    size, total = matrices[0].weight.element_size(), decoder_bytes(model)
    dense = sum(matrix.elements(None) for matrix in matrices)
    least = sum(matrix.elements(MULTIPLE if matrix.break_even > MULTIPLE else None) for matrix in matrices)
    room = dense - compression * total / size
    if least > room:
        reach = (dense - least) * size / total
        raise NotApplicable(
            f"tensor_decomposition: compression {compression} is out of reach: with every rank at {MULTIPLE} "
            f"(or dense, where that is smaller) at most {reach:.2f}"
        )
    return room


def allocate(
    model: nn.Module, spectra: Sequence[Spectrum], compression: float, budget: str = "global"
) -> dict[str, int | None]:
    """Return the rank of every matrix (None: dense) so that about `compression` of the decoder's bytes go.

    "global": greedily by what is kept per element, over all matrices; "uniform": the same share of each matrix, but for
    those that cannot be so small. Raises NotApplicable with the largest compression in reach.
    """
    room = room_for(model, [spectrum.matrix for spectrum in spectra], compression)
    menus = {spectrum.matrix.name: options(spectrum) for spectrum in spectra}
    at = _uniform(menus, room) if budget == "uniform" else _greedy(menus, room)
    _fill(menus, at, room)
    return {name: menus[name][index][0] for name, index in at.items()}


def _uniform(menus: dict[str, list[Choice]], room: float) -> dict[str, int]:
    """Return the index chosen from each menu: what comes nearest from below to one share of each matrix.

    A matrix whose smallest factors (or which itself, too small for factors) are more than that is taken so, and the
    others share what is left.
    """
    sharing = dict(menus)
    while True:
        left = room - sum(menu[0][1] for name, menu in menus.items() if name not in sharing)
        share = left / max(1, sum(menu[-1][1] for menu in sharing.values()))
        too_large = [name for name, menu in sharing.items() if menu[0][1] > share * menu[-1][1]]
        if not too_large:
            break
        for name in too_large:
            del sharing[name]
    fits = {name: sum(choice[1] <= share * menu[-1][1] for choice in menu) - 1 for name, menu in sharing.items()}
    return {name: fits.get(name, 0) for name in menus}


def _greedy(menus: dict[str, list[Choice]], room: float) -> dict[str, int]:
    """Return the index chosen from each menu: steps along the upper hull of energy over elements, steepest first."""
    at = dict.fromkeys(menus, 0)
    room -= sum(menu[0][1] for menu in menus.values())
    steps = []
    for name, menu in menus.items():
        here = 0
        while here < len(menu) - 1:
            slope, there = max((_slope(menu, here, index), index) for index in range(here + 1, len(menu)))
            steps.append((slope, name, here, there))
            here = there
    for _, name, here, there in sorted(steps, key=lambda step: -step[0]):
        cost = menus[name][there][1] - menus[name][here][1]
        if at[name] == here and cost <= room:
            at[name], room = there, room - cost
    return at


def _fill(menus: dict[str, list[Choice]], at: dict[str, int], room: float) -> None:
    """Spend in place what whole steps left over: again and again the best step of any size that still fits."""
    room -= sum(menus[name][index][1] for name, index in at.items())
    while True:
        fitting = [
            (_slope(menu, at[name], index), name, index)
            for name, menu in menus.items()
            for index in range(at[name] + 1, len(menu))
            if menu[index][1] - menu[at[name]][1] <= room
        ]
        if not fitting:
            return
        _, name, index = max(fitting)
        room -= menus[name][index][1] - menus[name][at[name]][1]
        at[name] = index


def _slope(menu: list[Choice], here: int, there: int) -> float:
    return (menu[there][2] - menu[here][2]) / max(1, menu[there][1] - menu[here][1])
