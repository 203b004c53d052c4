"""Checks of an optimization's options: an unknown choice, a number out of its range, a model that it does not apply to.

Each raises UserError in one line: whose option, what it was, what was expected. Knows no optimization.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import nn

from lib.errors import NotApplicable, UserError
from lib.models.offload import expert_cache

Closed = Literal["both", "low", "high", "neither"]  # which ends of a range belong to it


def one_of(where: str, name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError unless `value` is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f'{where}: {name} "{value}"; expected one of {", ".join(choices)}')


def choices(where: str, chosen: Mapping[str, tuple[str, Iterable[str]]]) -> None:
    """Raise UserError unless each value is one of its choices: option → (value, choices)."""
    for name, (value, valid) in chosen.items():
        one_of(where, name, value, valid)


def in_range(where: str, name: str, value: float, low: float, high: float, closed: Closed = "both") -> None:
    """Raise UserError unless `value` lies between `low` and `high`; not a number lies nowhere."""
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
    """Raise NotApplicable with the reason where `applies_to` names one for this model, or its weights stream from a
    file.
    """
    changeable(model)
    if reason := applies_to(model):
        raise NotApplicable(f"{where}: {reason}")


def changeable(model: nn.Module) -> None:
    """Raise NotApplicable where the weights of a model stream from a file: they can be run, not changed."""
    expert_cache.require_changeable(model)
