"""The draft and the candidates for the fast profile: smaller models made by another optimization, and their step times
against the full model.

In order, fastest first: whole blocks removed, then distilled; channels removed from every block, the matrices that read
them refitted by least squares; int8 weights. Admission is decided in `profiles`. Independent of the optimization that
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
from lib.optimizations.feedback_mechanisms.guarding.net_saving import NetSaving
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST, Candidate

REQUESTS = {"preview": 50, "quick": 150, "standard": 300, "thorough": 1000}  # per third of a script, at capacity
ROWS_DRAWN = (1, 2, 4, 8, 12, 16, 24, 32)
PROXY_STEPS = 20  # default steps of distillation on a proxy model
TEXTS = {"preview": (4, 8, 256)}  # texts for choosing parts, texts for distillation, and tokens of these at once
MORE_TEXTS = (16, 64, 512)  # the same at every other effort
PROMPTS = {"preview": 4, "quick": 16, "standard": 64, "thorough": 128}  # prompts for a candidate's disagreement
READ = {"preview": {"windows": 4, "items": 8}}  # amounts of text and items, if smaller than the defaults of `judge`
MILD = 0.1  # share of the parameters removed by the mildest cut
WIDE = 1024  # hidden size above which reading fewer bytes saves time

Measure = Callable[[nn.Module], TwoProfileSetup]


@dataclass(frozen=True)
class Makers:
    """The functions that make a smaller model: `apply` and `recover` of `structured_pruning`, passed in by the caller,
    since optimizations are independent of each other.
    """

    apply: Callable[..., nn.Module]
    recover: Callable[..., tuple[nn.Module, Any]]

    def shallower(self, loaded: Loaded, ratio: float, steps: int, effort: str, seed: int) -> nn.Module:
        """Return a copy without `ratio` of the decoder's parameters, in whole blocks, distilled for `steps` steps.

        The effort sets the number of texts (`TEXTS`).
        """
        chosen_on, distilled_on, at_once = TEXTS.get(effort, MORE_TEXTS)
        text = tasks.calibration(loaded, chosen_on, 256, seed)
        fast = self.apply(loaded.model, text, ratio=ratio, granularity="depth", seed=seed)
        if not steps:
            return fast
        batches = tasks.calibration(loaded, distilled_on, 256, seed, tokens_at_once=at_once)
        return self.recover(fast, loaded.model, batches, steps=steps, learning_rate=1e-3, seed=seed)[0]

    def narrower(self, loaded: Loaded, ratio: float, effort: str, seed: int) -> nn.Module:
        """Return a copy without `ratio` of the decoder's parameters, in channels of every block; the matrices that read
        them are refitted by least squares. Raises UserError if the channels are fewer than that.
        """
        text = tasks.calibration(loaded, TEXTS.get(effort, MORE_TEXTS)[0], 256, seed)
        options: dict[str, Any] = {"granularity": "channels", "compensate": True, "seed": seed}
        return self.apply(loaded.model, text, ratio=ratio, **options)


def steps_of(loaded: Loaded, finetune_steps: int, effort: Effort) -> int:
    """Return the steps of distillation per profile; the default (-1) is PROXY_STEPS on a proxy, none at real size."""
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
    setpoint: float = experiment.SETPOINT,
) -> tuple[nn.Module, list[Candidate]]:
    """Return the draft and the candidates considered for the fast profile, the admitted one last.

    `measure` times a candidate against the full profile (None: speed is not requested); `setpoint` is that of the loop
    that has to gain by it. The draft is subject to no
    quality bound, since drafted tokens are checked. Candidates, fastest first: `ratio` of the decoder's parameters
    removed in whole blocks (the draft), then half as many; if no block has experts, half as many and `MILD` of them
    removed in channels; and, if matrices are wide enough for it to pay, int8 weights. Models with experts lose more
    quality by the same cut of channels, and even the mildest makes no step measurably shorter. If a cut of channels is
    within the margins but does not save enough time, a milder one is not tried: it saves less.
    """
    draft = makers.shallower(loaded, ratio, steps, effort, seed)
    view = anatomy(loaded.model)
    routed = any(block.feed_forward.experts for block in view.blocks)
    too_slow: list[nn.Module] = []  # candidates within the margins that do not save enough time

    def candidates() -> Iterator[tuple[str, nn.Module]]:
        yield f"{percent(ratio)} fewer parameters, whole blocks", draft
        half = makers.shallower(loaded, ratio / 2, steps, effort, seed)
        yield f"{percent(ratio / 2)} fewer parameters, whole blocks", half
        for share in () if routed else sorted({max(ratio / 2, MILD), MILD}, reverse=True):
            try:
                narrower = makers.narrower(loaded, share, effort, seed)
            except UserError:  # the model has fewer channels than that
                continue
            yield f"{percent(share)} fewer parameters, channels", narrower
            if any(model is narrower for model in too_slow):
                break
        if view.config.hidden_size >= WIDE:
            yield "int8 weights", weight_only.weight_only(loaded.model, 8)

    def saving(model: nn.Module) -> NetSaving | None:
        net = measure(model).net if measure else None
        if net and net.refused:
            too_slow.append(model)
        return net

    def worth(model: nn.Module) -> str | None:
        reason = experiment.not_worth_it(measure(model), effort, seed, setpoint) if measure else None
        if reason:
            too_slow.append(model)
        return reason

    timed: dict[str, Any] = {"saving": saving, "worth": worth} if measure else {}
    amounts: dict[str, Any] = READ.get(effort, {})
    return draft, profiles.first_admitted(loaded, candidates(), bound, PROMPTS[effort], seed, **timed, **amounts)


def candidate_rows(candidates: Sequence[Candidate]) -> list[dict[str, object]]:
    """Return a row per candidate: blocks, perplexity, disagreement, flips, net saving, and why it is refused."""
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


# --- step times of candidates ----------------------------------------------------------------------------------------


def timer(loaded: Loaded, effort: str, **options: Any) -> Measure:
    """Return a function that times the steps of a profile against the full one, once per profile, and returns the setup
    that all settings share.

    `options` are those of `disturbance_comparison.prepare`: the objectives' factors, the guard's share and bound, and
    the seed.
    """
    preview = efforts.read(effort).preview
    options |= {"requests": REQUESTS[effort], "rounds": 2 if preview else 3 if effort in BRIEF else 4}

    @cache
    def measure(model: nn.Module) -> TwoProfileSetup:
        return disturbance_comparison.prepare(loaded, model, preview=preview, **options)

    return measure


def prepare(
    loaded: Loaded,
    candidates: Sequence[Candidate],
    effort: str,
    measure: Measure,
    seed: int = 0,
    setpoint: float = experiment.SETPOINT,
) -> tuple[TwoProfileSetup, list[Candidate]]:
    """Return the setup that all settings share, and the candidates.

    The last candidate is refused if it is timed only now and not shown to be faster, or if the loop is not shown to
    miss fewer seconds with it (`experiment.not_worth_it`); then the full profile itself follows. If no timed candidate
    is faster, the setup is that of the one that saves most. The guard's losses in the scripts are those of answers of
    the admitted candidate and of a broken copy.
    """
    last = candidates[-1]
    timed = [(candidate.net.middle, candidate.model) for candidate in candidates if candidate.net]
    if last.model is loaded.model and timed:
        return _without(measure(max(timed, key=lambda pair: pair[0])[1])), list(candidates)
    setup = measure(last.model)
    reason = setup.net.refused if setup.net else None
    if not setup.alone and (reason := experiment.not_worth_it(setup, effort, seed, setpoint)):
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
    """Return the setup without its fast profile: both profiles have the full one's times."""
    return setup if setup.alone else replace(setup, times=(setup.times[0], setup.times[0]), kept={})


def step_curves(setup: TwoProfileSetup) -> pd.DataFrame:
    """Return the ms per decode step by number of rows for each profile, and the objective as a level line."""
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
    """Return one line on how much longer the full profile takes than the fast one, and on the net saving."""
    if setup.net:
        net = f"Net saving, guard charged: {setup.net}"
        return (
            f"{net}. One curve: {NO_FAST}."
            if setup.alone
            else (f"The full profile takes {setup.saving:.2f}× as long as the fast. {net}.")
        )
    if setup.alone:
        return f"One curve: {NO_FAST}."
    return f"The full profile takes {setup.saving:.2f}× as long as the fast."
