"""What no checkpoint holds of a model: the steps to repeat on a freshly loaded one (prompts in chunks, another
attention), and how to open a model whose weights stream from a file. Code that changes a model this way notes it on the
model, so that another process can repeat it. Knows nothing of what the steps do.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

STEPS, OPENING = "steps_beyond_files", "opened_from"  # entries of a model's __dict__, copied with the model

Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Opening:
    """How a model was opened: `function` ("module:function"), called with `folder` and `arguments` (plain JSON)."""

    folder: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def note(model: nn.Module, function: str, **arguments: Any) -> nn.Module:
    """Note on `model` that `function` ("module:function") changed it, called with the model and `arguments` (plain
    JSON). Replaces an earlier note of the same function; returns the model.
    """
    model.__dict__[STEPS] = [*_without(model, function), (function, arguments)]
    return model


def forget(model: nn.Module, function: str) -> nn.Module:
    """Remove the note of `function` from `model`; return the model."""
    model.__dict__[STEPS] = _without(model, function)
    return model


def note_opening(model: nn.Module, opening: Opening) -> nn.Module:
    """Note on `model` how it was opened, replacing all steps noted so far; return the model."""
    model.__dict__[OPENING] = opening
    model.__dict__.pop(STEPS, None)
    return model


def steps(model: nn.Module) -> list[Step]:
    """Return the noted steps, in order."""
    return list(model.__dict__.get(STEPS, ()))


def opening(model: nn.Module) -> Opening | None:
    """Return how the model was opened; None for a model that was loaded into memory."""
    return model.__dict__.get(OPENING)


def restore(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """Return the freshly loaded `model` with `steps` applied to it in order."""
    for function, arguments in steps:
        model = named(function)(model, **arguments)
    return model


def reopen(folder: str, *, function: str, arguments: Mapping[str, Any], steps: Sequence[Step]) -> nn.Module:
    """Return the model opened with the fields of an `Opening`, with `steps` applied to it in order."""
    return restore(named(function)(folder, **arguments), steps)


def named(function: str) -> Callable[..., Any]:
    """Return the function named "module:function"."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _without(model: nn.Module, function: str) -> list[Step]:
    return [step for step in steps(model) if step[0] != function]
