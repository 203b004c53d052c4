"""Find the strongest stack within the margins by bisection, weakening all parts by the same share.

A part's strength runs from its `mildest` knobs (level 0: it is left out) to the knobs of its own step (LEVELS). Parts
without `mildest` change no answer and stay. If no strength of all parts is within the margins, the part of the weakest
stack that loses most alone is left out, and the search continues with the others. A part that touches stored weights
but makes the model no smaller at its strength is left out too: this is counted, not timed. Quality is evaluated on text
and items never used for the verdict and is the same in every run, so the resulting level does not depend on noise.
"""

import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.measure.quality import sanity
from lib.measure.roofline import cost_model
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search.search_quality import QualityLoss, SearchQuality
from lib.optimizations.modular_components import method

LEVELS = 8
NO_SMALLER = "at this strength it makes the model no smaller"


@dataclass(frozen=True)
class AppliedStep:
    """The model after a step that was applied earlier, and the seconds that this step took."""

    model: nn.Module = field(repr=False)
    seconds: float


@dataclass(frozen=True)
class Weakened:
    """A stack at one level: its steps, the model after them, by stem the reason why a part was left out, the quality
    lost, the seconds of applying it, and why its output is broken (None: it is not).
    """

    level: int
    steps: list[RecipeStep]
    model: nn.Module = field(repr=False)
    left_out: dict[str, str]
    lost: QualityLoss
    seconds: float
    broken: str | None = None

    @property
    def within(self) -> bool:
        """Whether the output is not broken and the loss is within the margins."""
        return self.broken is None and self.lost.within()

    @property
    def can_lose(self) -> list[str]:
        """The parts of the stack that can lose quality: a known part without `mildest` changes no answer."""
        known, stems = method.parts(), [step.optimization for step in self.steps]
        return [stem for stem in stems if stem not in known or known[stem].COMPOSES.get("mildest")]

    def row(self) -> dict[str, object]:
        """Return the level as a row of a table."""
        knobs = " → ".join(f"{step.optimization} {step.knobs or ''}".strip() for step in self.steps) or "nothing"
        row: dict[str, object] = {"strength": self.level / LEVELS, "stack": knobs}
        row |= {"most lost of a score": self.lost.lost, "perplexity grows": self.lost.perplexity}
        return row | {"within the margins": self.broken or self.lost.why_not() or "yes"}


def weakened(step: RecipeStep, level: int) -> RecipeStep | None:
    """Return a step at `level` of LEVELS of its strength; None if it is left out, at level 0."""
    module = method.module_of(step.optimization)
    mildest = module.COMPOSES.get("mildest")
    if not mildest or level == LEVELS:
        return step
    if level == 0:
        return None
    knobs = dict(step.knobs)
    for name, mild in mildest.items():
        full = knobs.get(name, module.SEARCH_SPACE[name]["default"])
        value = mild + (full - mild) * level / LEVELS
        knobs[name] = round(value) if module.SEARCH_SPACE[name]["type"] == "int" else round(value, 4)
    return step.model_copy(update={"knobs": knobs})


def stack_at(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    steps: Sequence[RecipeStep],
    level: int,
    seed: int = 0,
    applied_before: MutableMapping[tuple[str, ...], AppliedStep] | None = None,
    keep_first: bool = False,
) -> tuple[list[RecipeStep], nn.Module, dict[str, str]]:
    """Return the steps kept at `level`, the model after them, and by stem the reason why the others were left out.

    A part that refuses at this strength is left out, with its reason. `applied_before`: results of steps applied
    earlier to the same model with the same calibration and seed, by `named`; with `keep_first` the model of the first
    step is added to it.
    """
    options: dict[str, Any] = {"arrange": False, "seed": seed}
    kept: list[RecipeStep] = []
    left_out: dict[str, str] = {}
    current = model
    for step in steps:
        weak = weakened(step, level)
        if weak is None:
            left_out[step.optimization] = "no strength is left"
            continue
        stored = set(method.STORED) & set(method.module_of(step.optimization).COMPOSES["touches"])
        if stored and not method.saves_bytes(current, weak):
            left_out[step.optimization] = NO_SMALLER
            continue
        start, name = time.perf_counter(), named([*kept, weak])
        try:
            known = (applied_before or {}).get(name)
            changed = known.model if known else method.compose(current, calibration, [weak], **options).model
        except UserError as refusal:
            left_out[step.optimization] = str(refusal)
            continue
        if stored and cost_model.weights_bytes(changed) >= cost_model.weights_bytes(current):
            left_out[step.optimization] = NO_SMALLER
            continue
        kept.append(weak)
        current = changed
        if keep_first and applied_before is not None and len(kept) == 1:
            applied_before.setdefault(name, AppliedStep(current, time.perf_counter() - start))
    if current is model:
        current = method.compose(model, calibration, []).model
    return kept, current, left_out


def named(steps: Sequence[RecipeStep]) -> tuple[str, ...]:
    """Return the steps with their knobs, as a key."""
    return tuple(step.model_dump_json() for step in steps)


def _spent(kept: Sequence[RecipeStep], applied_before: Mapping[tuple[str, ...], AppliedStep]) -> float:
    """Return the seconds of those steps in `kept` that were applied earlier."""
    keys = (named(kept[:count]) for count in range(1, len(kept) + 1))
    return sum(applied_before[key].seconds for key in keys if key in applied_before)


def strongest(within: Callable[[int], bool], levels: int = LEVELS, apart: int = 1) -> int:
    """Return the highest level within the margins, by bisection until levels are `apart`; 0 if none above it is.

    A returned level above 0 has been evaluated. That it is the highest assumes that losses grow with strength: above a
    level that exceeds a margin only the last one is evaluated.
    """
    if within(levels):
        return levels
    low, high = 0, levels
    while high - low > apart:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def find(
    quality: SearchQuality,
    calibration: Sequence[dict[str, torch.Tensor]],
    steps: Sequence[RecipeStep],
    sample_BT: torch.Tensor,
    seed: int = 0,
    *,
    apart: int = 1,
    applied_before: MutableMapping[tuple[str, ...], AppliedStep] | None = None,
    keep_first: bool = False,
    losses: Mapping[str, float] | None = None,
) -> tuple[Weakened, list[Weakened]]:
    """Return the strongest stack within the margins, and every level tried, by strength for each set of parts.

    `losses`: the loss of each part alone. With it, parts of the weakest stack tried are left out one by one, those of
    unknown loss first and then the one that loses most, until some strength of the others is within the margins; from
    then on, if `apart` is above 1, only half strength is tried. Without `losses` no part is left out. `apart`: see
    `strongest`; `applied_before` and `keep_first`: see `stack_at`. Only the models of the best level so far and of the
    level under test are held, and with `keep_first` those of first steps.
    """
    remaining = list(steps)
    dropped: dict[str, str] = {}
    tried: list[Weakened] = []
    earlier = {} if applied_before is None else applied_before
    while True:
        search = _Levels(quality, calibration, remaining, sample_BT, seed, earlier, keep_first)
        weaker = [step for step in remaining if weakened(step, 0) is None]
        highest = LEVELS // 2 if dropped and weaker and apart > 1 else LEVELS  # if time is short, only half
        level = strongest(search.within, highest, apart)
        done = level > 0 or losses is None or not weaker
        best = search.at(level) if done else None
        tried += [search.seen[at] for at in sorted(search.seen)]
        if best is not None:
            return replace(best, left_out=best.left_out | dropped), tried
        weakest = {step.optimization for step in search.seen[min(search.seen)].steps}
        inside = [step for step in weaker if step.optimization in weakest] or weaker
        worst = max(inside, key=lambda step: (losses or {}).get(step.optimization, math.inf))
        remaining.remove(worst)
        named_others = ", ".join(step.optimization for step in remaining) or "nothing"
        most = "loses most" if worst.optimization in (losses or {}) else "may lose most"
        dropped[worst.optimization] = f"it {most}, and together with {named_others} no strength is within the margins"


class _Levels:
    """The evaluated levels of a set of steps; holds the model of the best of them."""

    def __init__(
        self,
        quality: SearchQuality,
        calibration: Sequence[dict[str, torch.Tensor]],
        steps: Sequence[RecipeStep],
        sample_BT: torch.Tensor,
        seed: int,
        applied_before: MutableMapping[tuple[str, ...], AppliedStep],
        keep_first: bool,
    ) -> None:
        self.quality, self.calibration, self.steps = quality, calibration, list(steps)
        self.sample_BT, self.seed = sample_BT, seed
        self.applied_before, self.keep_first = applied_before, keep_first
        self.seen: dict[int, Weakened] = {}
        self.best: Weakened | None = None

    def within(self, level: int) -> bool:
        """Return whether the stack at this level is within the margins."""
        stack = self._look(level)
        if stack.within:
            self.best = stack
        return stack.within

    def at(self, level: int) -> Weakened:
        """Return the stack at a level, with its model."""
        return self.best if self.best is not None and self.best.level == level else self._look(level)

    def _look(self, level: int) -> Weakened:
        loaded, start = self.quality.loaded, time.perf_counter()
        known, options = dict(self.applied_before), (self.applied_before, self.keep_first)
        kept, model, left_out = stack_at(loaded.model, self.calibration, self.steps, level, self.seed, *options)
        seconds = time.perf_counter() - start + _spent(kept, known)
        broken = sanity.check(model, self.sample_BT, new_tokens=4, random_weights=loaded.random_weights)
        stack = Weakened(level, kept, model, left_out, self.quality.of(model), seconds, broken)
        self.seen[level] = replace(stack, model=nn.Identity())
        return stack
