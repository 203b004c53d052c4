"""The quality of a server whose answers come from two profiles: each item from one of them, drawn by a stated share."""

from dataclasses import replace

import numpy as np

from lib.measure import measurement, quality
from lib.measure.effort import Effort
from lib.measure.measurement import Measurement
from lib.measure.quality import Answers


def blended(full: Answers, fast: Answers, share: float, effort: Effort, seed: int = 0) -> list[Measurement]:
    """Return classification and recall of the full profile (baseline) against a blend with `share` of fast answers."""
    if full.reason:
        return [measurement.unavailable(name, "serve", full.reason) for name in ("f1_macro", "recall_exact_match")]
    random = np.random.default_rng([seed, 0xB1E])
    options = {"resamples": effort.resamples, "seed": seed}
    found = []
    for one, other in zip(full.classified, fast.classified, strict=True):
        draw_N = random.random(len(one.ids)) < share
        mixed = replace(
            one,
            chosen_N=np.where(draw_N, other.chosen_N, one.chosen_N),
            scores_NL=np.where(draw_N[:, None], other.scores_NL, one.scores_NL),
        )
        found += quality.compare_classified(one, mixed, **options)
    if full.recalled is not None:
        draw_N = random.random(len(full.recalled.right_N)) < share
        right_N = np.where(draw_N, fast.recalled.right_N, full.recalled.right_N)
        found.append(quality.compare_recalled(full.recalled, replace(full.recalled, right_N=right_N), **options))
    return found
