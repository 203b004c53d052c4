"""The draft, and the candidates for the fast profile: models with fewer parameters that another optimization makes, and
how long their steps take beside those of the full one.

From the fastest on: whole blocks removed, and distilled; channels removed from every block, the matrices that read them
refitted by least squares; int8 weights. Which one is admitted is decided in `profiles`. Knows no optimization that
makes smaller models: its functions are passed in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pandas as pd
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import settings as efforts
from lib.measure.metrics.digits import percent
from lib.measure.metrics.settings import BRIEF, Effort
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks
from lib.optimizations.common import finetuning
from lib.optimizations.common.compression import weight_only
from lib.optimizations.feedback_mechanisms import disturbance_comparison, experiment, profiles, shadow
from lib.optimizations.feedback_mechanisms.disturbance_comparison import LENGTHS, TwoProfileSetup
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST, Candidate

REQUESTS = {"preview": 50, "quick": 150, "standard": 300, "thorough": 1000}  # in a third of a script, at capacity
ROWS_DRAWN = (1, 2, 4, 8, 12, 16, 24, 32)
PROXY_STEPS = 20  # of distillation by default
TEXTS = {"preview": (4, 8, 256)}  # by which parts are chosen, on which is distilled, and tokens of those at once
MORE_TEXTS = (16, 64, 512)  # at every other effort
PROMPTS = {"preview": 4, "quick": 16, "standard": 64, "thorough": 128}  # on which a candidate's disagreement is read
READ = {"preview": {"windows": 4, "items": 8}}  # by a candidate, where that is less than elsewhere
MILD = 0.1  # share of the parameters that the mildest cut removes
WIDE = 1024  # hidden size from which on reading fewer bytes shows

Measure = Callable[[nn.Module], TwoProfileSetup]


@dataclass(frozen=True)
class Makers:
    """What makes a smaller model: `apply` and `recover`, as `structured_pruning` has them. They come from the caller:
    an optimization knows no other.
    """

    apply: Callable[..., nn.Module]
    recover: Callable[..., tuple[nn.Module, Any]]

    def shallower(self, loaded: Loaded, ratio: float, steps: int, effort: str, seed: int) -> nn.Module:
        """Return a copy that lacks `ratio` of the decoder's parameters, whole blocks of it, distilled for some steps;
        the effort says on how many texts (`TEXTS`).
        """
        chosen_on, distilled_on, at_once = TEXTS.get(effort, MORE_TEXTS)
        text = tasks.calibration(loaded, chosen_on, 256, seed)
        fast = self.apply(loaded.model, text, ratio=ratio, granularity="depth", seed=seed)
        if not steps:
            return fast
        batches = tasks.calibration(loaded, distilled_on, 256, seed, tokens_at_once=at_once)
        return self.recover(fast, loaded.model, batches, steps=steps, learning_rate=1e-3, seed=seed)[0]

    def narrower(self, loaded: Loaded, ratio: float, effort: str, seed: int) -> nn.Module:
        """Return a copy that lacks `ratio` of the decoder's parameters, channels of every block; what read them is
        refitted by least squares. Raises UserError where the channels are fewer than that.
        """
        text = tasks.calibration(loaded, TEXTS.get(effort, MORE_TEXTS)[0], 256, seed)
        options: dict[str, Any] = {"granularity": "channels", "compensate": True, "seed": seed}
        return self.apply(loaded.model, text, ratio=ratio, **options)


def steps_of(loaded: Loaded, finetune_steps: int, effort: Effort) -> int:
    """Return the steps of distillation of each profile; by default (-1) PROXY_STEPS on a proxy model, none at real
    size.
    """
    return finetuning.steps_of(loaded, finetune_steps, PROXY_STEPS, effort)


def fast_profiles(
    loaded: Loaded,
    makers: Makers,
    ratio: float,
    steps: int,
    bound: float,
    effort: str,
    seed: int,
    measure: Measure | None = None,
) -> tuple[nn.Module, list[Candidate]]:
    """Return the draft, whose answers need no quality, and the fast profiles that were considered, the admitted one
    last; `measure` times one beside the full profile (None: speed is not asked for).

    Candidates from the fastest on: without `ratio` of the decoder's parameters (the draft) and without half as many,
    whole blocks; where no block has experts, without half as many and without `MILD` of them, channels; and, where
    matrices are wide enough for that to pay, with int8 weights. Experts lose more by the same cut, and even the mildest
    makes no step measurably shorter.
    """
    draft = makers.shallower(loaded, ratio, steps, effort, seed)
    view = anatomy(loaded.model)
    routed = any(block.feed_forward.experts for block in view.blocks)

    def candidates() -> Iterator[tuple[str, nn.Module]]:
        yield f"{percent(ratio)} fewer parameters, whole blocks", draft
        half = makers.shallower(loaded, ratio / 2, steps, effort, seed)
        yield f"{percent(ratio / 2)} fewer parameters, whole blocks", half
        for share in () if routed else sorted({max(ratio / 2, MILD), MILD}, reverse=True):
            try:
                narrower = makers.narrower(loaded, share, effort, seed)
            except UserError:  # its channels are fewer than that
                continue
            yield f"{percent(share)} fewer parameters, channels", narrower
        if view.config.hidden_size >= WIDE:
            yield "int8 weights", weight_only.weight_only(loaded.model, 8)

    timed: dict[str, Any] = {}
    if measure:
        timed["saving"] = lambda model: measure(model).net
        timed["worth"] = lambda model: experiment.not_worth_it(measure(model), effort, seed)
    amounts: dict[str, Any] = READ.get(effort, {})
    return draft, profiles.first_admitted(loaded, candidates(), bound, PROMPTS[effort], seed, **timed, **amounts)


def candidate_rows(candidates: Sequence[Candidate]) -> list[dict[str, object]]:
    """Return a row per candidate: blocks, perplexity, disagreement, flips, what it saves, why it is not admitted."""
    return [
        {
            "fast profile": candidate.name,
            "blocks": len(anatomy(candidate.model).blocks),
            "perplexity ÷ full": candidate.perplexity,
            "disagreement": candidate.disagreement,
            "items that flip": candidate.flips,
            "net saving": None if candidate.net is None else str(candidate.net),
            "admitted": "yes" if candidate.refused is None else f"no: {candidate.refused}",
        }
        for candidate in candidates
    ]


# --- how long their steps take ----------------------------------------------------------------------------------------


def timer(loaded: Loaded, effort: str, **charged: Any) -> Measure:
    """Return the function that times the steps of a profile beside those of the full one, once, and gives the setup
    that all settings share; `charged` are the objectives' factors, the guard's share and bound, and the seed
    (`disturbance_comparison.prepare`).
    """
    preview = efforts.read(effort).preview
    charged |= {"requests": REQUESTS[effort], "rounds": 2 if preview else 3 if effort in BRIEF else 4}

    @cache
    def measure(model: nn.Module) -> TwoProfileSetup:
        return disturbance_comparison.prepare(loaded, model, preview=preview, **charged)

    return measure


def prepare(
    loaded: Loaded, candidates: Sequence[Candidate], effort: str, measure: Measure, seed: int = 0
) -> tuple[TwoProfileSetup, list[Candidate]]:
    """Return the setup that all settings share, and the candidates. The last one is refused where it was not timed yet
    and is not shown to be faster, or where the loop is not shown to miss fewer seconds with it
    (`experiment.not_worth_it`); then the full profile itself follows. Where none of those that were timed is faster,
    the setup is that of the one that saves most. The losses of the answers of the admitted one, and of a broken copy's,
    are those that the guard meets in the scripts.
    """
    last = candidates[-1]
    timed = [(candidate.net.middle, candidate.model) for candidate in candidates if candidate.net]
    if last.model is loaded.model and timed:
        return _without(measure(max(timed, key=lambda pair: pair[0])[1])), list(candidates)
    setup = measure(last.model)
    reason = setup.net.refused if setup.net else None
    if not setup.alone and (reason := experiment.not_worth_it(setup, effort, seed)):
        setup = _without(setup)
    if not setup.alone:
        broken = shadow.broken(last.model, shadow.STRENGTHS[-1], seed)
        losses = profiles.losses_of(loaded, broken, PROMPTS[effort], seed)
        setup = replace(setup, losses=(last.losses, losses))
    if reason is None:
        return setup, list(candidates)
    refused = replace(last, refused=reason, net=setup.net)
    return setup, [*candidates[:-1], refused, profiles.itself(loaded)]


def _without(setup: TwoProfileSetup) -> TwoProfileSetup:
    """Return the setup without its fast profile: the same times stand for both."""
    return setup if setup.alone else replace(setup, times=(setup.times[0], setup.times[0]), kept={})


def step_curves(setup: TwoProfileSetup) -> pd.DataFrame:
    """Return ms per decode step over rows for each profile, and the objective as a level."""
    context = LENGTHS.prompt_tokens + LENGTHS.new_tokens // 2
    arms = ("full",) if setup.alone else ("full", "fast")
    points = [
        {"strength": rows, "value": 1000 * times.decode(rows, context), "arm": arm}
        for arm, times in zip(arms, setup.times)
        for rows in ROWS_DRAWN
    ]
    level = 1000 * setup.objective.token_seconds
    return pd.DataFrame(points + [{"strength": rows, "value": level, "arm": "objective"} for rows in (1, 32)])


def read_curves(setup: TwoProfileSetup) -> str:
    """Return how much longer the full profile takes than the fast one, and with the guard charged, as one line."""
    if setup.net:
        paid = f"Net saving, guard charged: {setup.net}"
        return (
            f"{paid}. One curve: {NO_FAST}."
            if setup.alone
            else (f"The full profile takes {setup.saving:.2f}× as long as the fast. {paid}.")
        )
    if setup.alone:
        return f"One curve: {NO_FAST}."
    return f"The full profile takes {setup.saving:.2f}× as long as the fast."
