"""Attempts to apply parts, alone and in pairs: whatever happens is an outcome, not an error.

Shapes: B batch, T tokens.
"""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.measure.quality import sanity
from lib.models.calibration.activations import Observation, observe
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import traits
from lib.optimizations.modular_components.method import compose, described, module_of, refusal


@dataclass(frozen=True)
class Attempt:
    """The outcome of an attempt to apply `steps`: its state ("works", "refused", "invalid", "crashed" or "not tried"),
    the reason, and the model if it works or is invalid.
    """

    steps: list[RecipeStep]
    state: str
    reason: str | None
    model: nn.Module | None = field(default=None, repr=False)
    seconds: float = 0.0


def attempt(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    steps: Sequence[RecipeStep],
    sample_BT: torch.Tensor,
    *,
    begun: Attempt | None = None,
    made: nn.Module | None = None,
    observation: Observation | None = None,
    random_weights: bool = False,
    checked: bool = True,
    seed: int = 0,
) -> Attempt:
    """Apply the steps in the order given and run the result on `sample_BT`; return the outcome, never an error.

    `begun` holds the model after the first steps and `made` the model after all steps, so that they need not be built
    again; `observation`: the statistics of `model`, if known. A refusal gets its reason from a descriptor, the real
    model or the part; any other failure is a crash.
    """
    start, steps = time.perf_counter(), list(steps)
    if checked and (reason := refusal(steps, model)):
        return Attempt(steps, "refused", reason)
    source, remaining = model, steps
    if begun is not None and begun.model is not None:
        source, remaining, observation = begun.model, steps[len(begun.steps) :], None
    options: dict[str, Any] = {"arrange": False, "checked": checked, "observation": observation, "seed": seed}
    try:
        composed = made if made is not None else compose(source, calibration, remaining, **options).model
        broken = sanity.check(composed, sample_BT, new_tokens=4, random_weights=random_weights)
    except UserError as reason:
        return Attempt(steps, "refused", str(reason))
    except Exception as error:  # any error other than a refusal is a crash
        text = " ".join(str(error).split())[:160]
        return Attempt(steps, "crashed", f"{type(error).__name__}: {text}")
    state = "invalid" if broken else "works"
    return Attempt(steps, state, broken, composed, time.perf_counter() - start)


def both(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    first: Attempt,
    second: Attempt,
    sample_BT: torch.Tensor,
    **options: Any,
) -> Attempt:
    """Return the outcome of the steps of `first` followed by those of `second`, starting from the model of `first`."""
    steps = [*first.steps, *second.steps]
    start = first if first.model is not None else None
    return attempt(model, calibration, steps, sample_BT, begun=start, **options)


def stale(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    pairs: dict[tuple[str, str], Attempt],
    *,
    before: Observation | None = None,
    begun: Mapping[str, nn.Module] | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], nn.Module]:
    """Return, for every working pair whose second step takes statistics, the model built with those from before the
    first step.

    Pairs whose shapes no longer fit the old statistics are left out. `before`: the statistics of `model`; `begun`: the
    models after first steps, by name; both if known.
    """
    models = {}
    for (first, second), outcome in pairs.items():
        takes = "observation" in inspect.signature(module_of(second).apply).parameters
        outdated = traits.STATISTICS in described(outcome.steps[0])["invalidates"]
        if outcome.state != "works" or not (takes and outdated):
            continue
        known = (begun or {}).get(first)
        start = known if known is not None else compose(model, calibration, outcome.steps[:1], seed=seed).model
        before, last = before or observe(model, calibration), outcome.steps[1]
        try:
            models[first, second] = module_of(second).apply(start, calibration, **last.knobs, observation=before)
        except (RuntimeError, IndexError):
            continue
    return models


def modularity(pairs: dict[tuple[str, str], Attempt]) -> float | None:
    """Return working ordered pairs ÷ all ordered pairs that were tried, or None if none was."""
    tried = [outcome.state for outcome in pairs.values() if outcome.state != "not tried"]
    return tried.count("works") / len(tried) if tried else None
