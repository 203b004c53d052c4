"""What no checkpoint holds of a model: the steps that make a freshly loaded one the same again (prompts in chunks,
another attention), and how one is opened whose weights stream from a file. Whoever changes a model so notes it on the
model, and another process can do it again. Knows nothing of what the steps do.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

STEPS, OPENING = "steps_beyond_files", "opened_from"  # entries of a model's __dict__, which its copies inherit

Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Opening:
    """How a model was opened: `function` is "module:function", called with the folder and the arguments, plain JSON."""

    folder: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def note(model: nn.Module, function: str, **arguments: Any) -> nn.Module:
    """Note that `function` ("module:function", called with the model and the arguments, plain JSON) changed `model`,
    in place of an earlier note of the same function; return the model.
    """
    model.__dict__[STEPS] = [*_without(model, function), (function, arguments)]
    return model


def forget(model: nn.Module, function: str) -> nn.Module:
    """Take back what `note` noted of `function`; return the model."""
    model.__dict__[STEPS] = _without(model, function)
    return model


def note_opening(model: nn.Module, opening: Opening) -> nn.Module:
    """Note how the whole model is opened, which takes the place of all steps so far; return the model."""
    model.__dict__[OPENING] = opening
    model.__dict__.pop(STEPS, None)
    return model


def steps(model: nn.Module) -> list[Step]:
    """Return the noted steps, in order."""
    return list(model.__dict__.get(STEPS, ()))


def opening(model: nn.Module) -> Opening | None:
    """Return how the model was opened; None for one that was loaded."""
    return model.__dict__.get(OPENING)


def restore(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """Return the freshly loaded `model` after the steps of another."""
    for function, arguments in steps:
        model = named(function)(model, **arguments)
    return model


def reopen(folder: str, *, function: str, arguments: Mapping[str, Any], steps: Sequence[Step]) -> nn.Module:
    """Return the model that `Opening` describes, after the steps that followed."""
    return restore(named(function)(folder, **arguments), steps)


def named(function: str) -> Callable[..., Any]:
    """Return the function named "module:function"."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _without(model: nn.Module, function: str) -> list[Step]:
    return [step for step in steps(model) if step[0] != function]
