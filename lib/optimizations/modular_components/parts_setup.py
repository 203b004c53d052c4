"""The setup for trying parts: a model, the parts that apply to it, calibration text, and room in memory."""

from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch

from lib.errors import NotApplicable
from lib.measure.metrics import settings
from lib.measure.metrics.settings import Effort
from lib.models.checkpoints import io, placement
from lib.models.loading import Loaded
from lib.models.tasks import tasks
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.modular_components import method, traits
from lib.optimizations.modular_components.strength import AppliedStep

PAIR_TOKENS, HURRIED_TOKENS = 256, 64  # of the prompt on which pairs are timed; the second if time is short
PAIR_COPIES = 5  # two parts, both orders, and one forced or built with outdated statistics


@dataclass(frozen=True)
class PartsSetup:
    """A model, the stems of the parts that apply to it in pipeline order (`fitting`), the reasons why the others do not
    (`unfit`), and the texts for trying them.

    `weights` is the hash of the baseline's weights. `keeps_singles`: whether memory holds the models of all parts at
    once; if so, `applied_before` keeps models of several steps that are needed twice.
    """

    loaded: Loaded
    effort: Effort
    quick: Effort
    seed: int
    fitting: list[str]
    unfit: dict[str, str]
    calibration: list[dict[str, torch.Tensor]]
    sample_BT: torch.Tensor
    weights: str
    keeps_singles: bool
    applied_before: dict[tuple[str, ...], AppliedStep] = field(default_factory=dict, repr=False)

    @property
    def hurried(self) -> bool:
        """Whether time is short: at effort preview, and at effort quick on a real model, where applying a part takes up
        to a minute.
        """
        return self.effort.preview or (self.loaded.scale == "full" and self.effort.brief)

    @property
    def pair_tokens(self) -> int:
        """The default length of the prompt on which pairs are timed, in tokens."""
        return HURRIED_TOKENS if self.hurried else PAIR_TOKENS

    @property
    def options(self) -> dict[str, Any]:
        """Options of every attempt."""
        return {"random_weights": self.loaded.random_weights, "seed": self.seed}

    def described(self) -> pd.DataFrame:
        """Return a row per part: its descriptor, and whether it applies to this model."""
        rows = []
        for stem, module in method.parts().items():
            composes = module.COMPOSES
            row = {"part": stem, "touches": ", ".join(composes["touches"]), "needs": ", ".join(composes["needs"])}
            row |= {"takes away": ", ".join(composes["invalidates"])}
            row |= {"tried with": str(composes["trial"] or "defaults")}
            rows.append(row | {"on this model": self.unfit.get(stem, "applies")})
        return pd.DataFrame(rows)

    def rules(self) -> pd.DataFrame:
        """Return a row per ordering rule on this model: which part comes first, which then, and the trait behind it."""
        concerning = traits.concerning(self.loaded.model)
        rows = [
            {"first": second, "then": first, "because": f"{first} takes away {lost}, which {second} needs"}
            for first in self.fitting
            for second in self.fitting
            if first != second and (lost := method.conflict(method.trial(first), method.trial(second), concerning))
        ]
        return pd.DataFrame(rows, columns=["first", "then", "because"])


def prepare(loaded: Loaded, effort: Effort, seed: int) -> PartsSetup:
    """Return the setup; at effort preview texts are shorter. Raises NotApplicable if fewer than two parts apply, or if
    memory has no room for one pair in both orders.
    """
    quick = effort if effort.brief else settings.read("quick", loaded.scale)
    applicable, unfit = method.applicable(loaded.model)
    if reason := method.applies_to(loaded.model):
        raise NotApplicable(f"{method.NAME}: {reason}")
    arranged, _ = method.orderable([method.trial(stem) for stem in applicable], loaded.model)
    fitting = [step.optimization for step in arranged]
    fitting += [stem for stem in applicable if stem not in fitting]
    placement.require_room(loaded.model, PAIR_COPIES, "measuring one pair of parts in both orders")
    weights = io.weights_hash(loaded.model)
    share = 2 if effort.preview else 1
    shorter = replace(quick, calibration_tokens=quick.calibration_tokens // share)
    calibration = calibration_text.of_stack(loaded, shorter, seed)
    sample_BT = tasks.text_windows(loaded, "search", 4 // share, 128 // share, seed)
    try:
        placement.require_room(loaded.model, PAIR_COPIES + len(fitting), "keeping every part")
        keeps_singles = True
    except NotApplicable:
        keeps_singles = False
    return PartsSetup(loaded, effort, quick, seed, fitting, unfit, calibration, sample_BT, weights, keeps_singles)
