"""Rank allocation: one budget of bytes over all matrices, spent where a rank keeps most.

Each matrix is described by its spectrum and its worth, the cost of losing it. It stays dense if factors would be no
smaller, or if the budget is better spent on keeping it whole. Independent of how spectra are computed.
"""

import math
from collections.abc import Sequence

from torch import nn

from lib.errors import NotApplicable
from lib.models.structure.anatomy import anatomy
from lib.optimizations.tensor_decomposition.low_rank import FactorableMatrix, Spectrum

MULTIPLE = 8  # ranks are multiples of this: matrix kernels are built for aligned rows

Choice = tuple["int | None", int, float]  # rank (None: dense), elements, worth kept


def decoder_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters in the decoder's blocks; `compression` is a share of them."""
    return sum(parameter.nbytes for block in anatomy(model).blocks for parameter in block.module.parameters())


def options(spectrum: Spectrum) -> list[Choice]:
    """Return the choices for a matrix, (rank, elements, worth kept), by ascending size; dense (rank None) is last."""
    matrix, kept_R = spectrum.matrix, spectrum.kept_R * spectrum.worth
    ranks = [rank for rank in range(MULTIPLE, len(kept_R) + 1, MULTIPLE) if rank < matrix.break_even]
    factored = [(rank, matrix.elements(rank), float(kept_R[rank - 1])) for rank in ranks]
    return [*factored, (None, matrix.elements(None), spectrum.worth)]


def room_for(model: nn.Module, matrices: Sequence[FactorableMatrix], compression: float) -> float:
    """Return the number of elements left for `matrices` once `compression` of the decoder's bytes are removed.

    Needs no spectrum. Raises NotApplicable, naming the largest reachable compression, before any expensive work.
    """
    size, total = matrices[0].weight.element_size(), decoder_bytes(model)
    dense = sum(matrix.elements(None) for matrix in matrices)
    least = sum(matrix.elements(MULTIPLE if matrix.break_even > MULTIPLE else None) for matrix in matrices)
    room = dense - compression * total / size
    if least > room:
        reach = math.floor(100 * (dense - least) * size / total) / 100  # rounded up, it would be refused
        raise NotApplicable(
            f"tensor_decomposition: compression {compression} is out of reach: with every rank at {MULTIPLE} "
            f"(or dense, if that is smaller) at most {reach:.2f} can be removed"
        )
    return room


def allocate(
    model: nn.Module, spectra: Sequence[Spectrum], compression: float, budget: str = "global"
) -> dict[str, int | None]:
    """Return the rank of every matrix (None: dense) such that about `compression` of the decoder's bytes are removed.

    "global": greedily over all matrices, by worth kept per element; "uniform": the same share of each matrix, except
    those that cannot be made that small. Raises NotApplicable naming the largest reachable compression.
    """
    room = room_for(model, [spectrum.matrix for spectrum in spectra], compression)
    menus = {spectrum.matrix.name: options(spectrum) for spectrum in spectra}
    at = _uniform(menus, room) if budget == "uniform" else _greedy(menus, room)
    _fill(menus, at, room)
    return {name: menus[name][index][0] for name, index in at.items()}


def _uniform(menus: dict[str, list[Choice]], room: float) -> dict[str, int]:
    """Return the index chosen from each menu: the largest choice within one common share of each matrix.

    A matrix whose smallest choice exceeds that share gets its smallest choice, and the others share the rest.
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
    """Return the index chosen from each menu: steps along the upper hull of energy by elements, steepest first."""
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
    """Spend the room left over, updating `at` in place: repeatedly take the steepest step that still fits."""
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
