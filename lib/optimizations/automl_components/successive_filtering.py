"""Judge stacks of optimizations cheaply, in rungs of increasing cost.

First bytes, then divergence on little text, then request time. A stack that fails a rung costs nothing more, and its
outcome states the reason.

Shapes: B batch, T prompt tokens.
"""

import inspect
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import paired_stats, process_variance
from lib.measure.metrics.catalogue import SPEED_MARGIN
from lib.measure.quality import evaluate
from lib.measure.roofline import cost_model
from lib.measure.timing import interleaved, workloads
from lib.measure.timing.control import fresh_copy
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.common.search import pareto

REFERENCE = (1.0, 0.1)  # of hypervolumes: the baseline's time, and 0.1 nats per token, about 10 % of perplexity
MAX_DIVERGENCE = 0.5  # nats per token on little text; stacks beyond it are not timed
INFEASIBLE_POINT = (2.0, 10.0)  # objectives of a stack that was cut


@dataclass(frozen=True)
class JudgedStack:
    """A stack and its outcome. Shares are relative to the baseline; `reason` says why it was cut (None: it was not).

    `time_high` is the upper end of the 95 % interval of `time_share`, None if there were too few pairs for one.
    """

    stack: list[RecipeStep]
    time_share: float | None
    divergence: float | None
    memory_share: float | None
    reason: str | None
    seconds: float
    time_high: float | None = None

    @property
    def point(self) -> tuple[float, float]:
        """The two objectives, time and divergence; INFEASIBLE_POINT if the stack was cut."""
        if self.reason or self.time_share is None or self.divergence is None:
            return INFEASIBLE_POINT
        return self.time_share, self.divergence


def unchanged(memory_budget: float) -> JudgedStack:
    """Return the outcome of the empty stack: the baseline itself, cut if its memory is over budget.

    It is known and not timed: the noise between the baseline and its copy would make it dominate an area.
    """
    reason = "the baseline's own memory is over the budget" if memory_budget < 1 else None
    return JudgedStack([], 1.0, 0.0, 1.0, reason, 0.0)


@dataclass
class Bench:
    """The setup for judging stacks: a baseline, calibration text, text to judge on, the prompts [B, T] of the timed
    request, and the modules of the steps by stem, each with `applies_to` and `apply`.

    `texts` are the rungs of text: few windows, then more. `applied` caches the models of recent prefixes of stacks,
    since many stacks share them.
    """

    model: nn.Module
    calibration: Sequence[dict[str, torch.Tensor]]
    texts: Sequence[evaluate.Text]
    prompt_BT: torch.Tensor
    modules: Mapping[str, ModuleType]
    memory_budget: float = 1.0
    new_tokens: int = 8
    pairs: int = 6
    applied: dict[str, nn.Module] = field(default_factory=dict)
    largest_store: int = 6
    seed: int = 0

    def apply(self, stack: Sequence[RecipeStep]) -> nn.Module:
        """Return the model with a stack applied. Raises UserError if a step does not apply or is refused."""
        model = self.model
        for at, step in enumerate(stack):
            key = json.dumps([step.model_dump() for step in stack[: at + 1]])
            if key not in self.applied:
                module = self.modules[step.optimization]
                if reason := module.applies_to(model):
                    raise UserError(f"{step.optimization} does not apply: {reason}")
                seeded = {"seed": self.seed} if "seed" in inspect.signature(module.apply).parameters else {}
                changed = module.apply(model, self.calibration, **(seeded | step.knobs))
                while len(self.applied) >= self.largest_store:
                    self.applied.pop(next(iter(self.applied)))
                self.applied[key] = changed
            model = self.applied[key]
        return model

    def judge(self, stack: Sequence[RecipeStep]) -> JudgedStack:
        """Return the outcome of a stack on the lowest rungs: bytes, divergence on little text, request time.

        The empty stack is `unchanged`.
        """
        if not stack:
            return unchanged(self.memory_budget)
        start = time.perf_counter()
        shares: dict[str, float | None] = {"time_share": None, "time_high": None}
        shares |= {"divergence": None, "memory_share": None}
        try:
            reason = self._rungs(list(stack), shares)
        except UserError as error:
            reason = str(error)
        except Exception as error:  # a component that crashes must not stop the search
            reason = f"crashed: {type(error).__name__}: {error}".splitlines()[0]
        return JudgedStack(list(stack), **shares, reason=reason, seconds=time.perf_counter() - start)

    def _rungs(self, stack: list[RecipeStep], shares: dict[str, float | None]) -> str | None:
        model = self.apply(stack)
        baseline, optimized = (cost_model.weights_bytes(arm) + self._cache(arm) for arm in (self.model, model))
        shares["memory_share"] = memory = optimized / baseline
        if memory > self.memory_budget:
            return f"memory of {memory:.3f} is over the budget of {self.memory_budget:.3f}"
        shares["divergence"] = divergence = self.divergence(model, 0)
        if not divergence < MAX_DIVERGENCE:
            return f"divergence of {divergence:.3f} nats per token"
        models = fresh_copy(self.model), model
        arms = [workloads.generate(arm, self.prompt_BT, self.new_tokens) for arm in models]
        pairs = interleaved.paired(*arms, blocks=self.pairs, warmup=1, fewest=1)
        shares["time_share"] = math.exp(float(np.median(pairs.differences)))
        sigma = process_variance.between_processes("generate").sigma
        high = paired_stats.effect(pairs.differences, process_sigma=sigma).high
        shares["time_high"] = math.exp(high) if math.isfinite(high) else None
        return None

    def _cache(self, model: nn.Module) -> float:
        batch, prompt_tokens = self.prompt_BT.shape
        return batch * (prompt_tokens + self.new_tokens) * cost_model.kv_cache_bytes_per_token(model)

    def divergence(self, model: nn.Module, rung: int) -> float:
        """Return the divergence of `model` from the baseline on the text of a rung, nats per token."""
        text = self.texts[rung]
        return float(evaluate.divergence(text, evaluate.read(model, text.ids_NT))[0].mean())


def utility(judged: JudgedStack) -> float:
    """Return the area within REFERENCE that one stack dominates by itself; 0 if it was cut."""
    return 0.0 if judged.reason else pareto.hypervolume([judged.point], REFERENCE)


def surely_faster(outcomes: Iterable[JudgedStack]) -> bool | None:
    """Return whether any outcome with a dominated area is faster than the baseline by more than the practical margin,
    by its interval; otherwise the area may be timing noise. None if no interval is known.
    """
    ends = [judged.time_high for judged in outcomes if utility(judged) > 0]
    if ends and all(end is None for end in ends):
        return None
    return any(end is not None and end < 1 - SPEED_MARGIN for end in ends)
