"""Validate an optimization's options: unknown choices, numbers out of range, models it does not apply to.

Each check raises a one-line UserError: which option of which optimization, its value, what was expected.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.offload import expert_cache

Closed = Literal["both", "low", "high", "neither"]  # the ends included in a range


def one_of(where: str, name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError unless `value` is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f'{where}: {name} "{value}"; expected one of {", ".join(choices)}')


def choices(where: str, chosen: Mapping[str, tuple[str, Iterable[str]]]) -> None:
    """Raise UserError unless every value is among its choices. `chosen` maps each option to (value, choices)."""
    for name, (value, valid) in chosen.items():
        one_of(where, name, value, valid)


def in_range(where: str, name: str, value: float, low: float, high: float, closed: Closed = "both") -> None:
    """Raise UserError unless `value` lies between `low` and `high`; NaN is always out of range."""
    above = value >= low if closed in ("both", "low") else value > low
    below = value <= high if closed in ("both", "high") else value < high
    if above and below:
        return
    expected = f"{low} to {high}"
    if closed != "both":
        expected = f"{low} {'<=' if closed == 'low' else '<'} {name} {'<=' if closed == 'high' else '<'} {high}"
    raise UserError(f"{where}: {name} {value} is out of range; expected {expected}")


def at_least(where: str, name: str, value: float, low: float, meaning: str = "") -> None:
    """Raise UserError unless `value` is `low` or more; `meaning` says what `low` stands for."""
    if not value >= low:
        expected = f"{low} ({meaning})" if meaning else f"{low}"
        raise UserError(f"{where}: {name} {value} is out of range; expected {expected} or more")


def applies(where: str, model: nn.Module, applies_to: Callable[[nn.Module], str | None]) -> None:
    """Raise NotApplicable if `applies_to` returns a reason for `model`, or if its weights stream from a file."""
    changeable(model)
    if reason := applies_to(model):
        raise NotApplicable(f"{where}: {reason}")


def changeable(model: nn.Module) -> None:
    """Raise NotApplicable if the weights of `model` stream from a file: such a model can run but not be changed."""
    expert_cache.require_changeable(model)
