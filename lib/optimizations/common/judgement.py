"""Judge the quality of a changed model: a sanity gate, then the same held-out questions to both arms.

Also withholds verdicts on timings that were disturbed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement
from lib.measure.metrics.busy import withhold_if_busy
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate, sanity
from lib.measure.quality.answers import Answers
from lib.models.loading import Loaded
from lib.models.tasks import tasks


@dataclass(frozen=True)
class Judgement:
    """The baseline's answers, the measurements of both arms, and why the optimized output is degenerate (None: it is
    not).
    """

    answers: Answers
    measurements: list[Measurement]
    degenerate: str | None


def judge(
    loaded: Loaded,
    optimized: nn.Module,
    effort: Effort,
    seed: int,
    *,
    sample_BT: torch.Tensor | None = None,
    acted: Callable[[], float] | None = None,
) -> Judgement:
    """Return the judgement of `optimized` against `loaded.model` on items and text of the split "final".

    `sample_BT` is the text for the sanity gate, by default windows of the split "final". If the output is degenerate,
    every measurement is invalid for that reason. `acted` counts how often the optimization has acted: a workload in
    which it never acts counts as not exercised (`lib.measure.quality.evaluate.evaluate`).
    """
    if sample_BT is None:
        sample_BT = tasks.text_windows(loaded, "final", 4, 128, seed)
    degenerate = sanity.check(optimized, sample_BT, random_weights=loaded.random_weights)
    answers = evaluate.evaluate(loaded, effort, seed=seed)
    changed = evaluate.evaluate(loaded, effort, model=optimized, seed=seed, acted=acted)
    compared = answers if degenerate else changed  # NaN cannot be compared
    measurements = answer_comparison.compare(answers, compared, resamples=effort.resamples, seed=seed)
    if degenerate:
        measurements = invalid(measurements, degenerate)
    return Judgement(answers, measurements, degenerate)


def invalid(measurements: list[Measurement], reason: str) -> list[Measurement]:
    """Return the measurements stripped of their numbers and marked invalid for `reason`."""
    return [measurement.invalid(m.metric, m.workload, reason) for m in measurements]


def timed(compared: Compared, beside: Sequence[Measurement] = ()) -> Compared:
    """Return a comparison whose timing verdicts are withheld wherever the record will withhold them: the machine was
    busy, or the rounds too few, in `compared` or in the measurements `beside` it.

    So tables, break-even and answers agree with the record.
    """
    withheld = withhold_if_busy([*compared.measurements, *beside])
    return replace(compared, measurements=withheld[: len(compared.measurements)])
