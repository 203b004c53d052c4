"""Is sparse attention still right? The same questions to both arms, controls of equal budget, divergence over τ, and
values to be retrieved from three places of a prompt. Knows nothing of time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from torch import nn

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import evaluate, sanity
from lib.measure.quality.evaluate import Answers, Retrieved
from lib.models.loading import Loaded
from lib.models.tasks import tasks as task_list
from lib.models.tasks.retrieval import KEY, LEAD, VALUE
from lib.optimizations.adaptive_sparse_attention import method

NEAR = 64  # tokens between a value at the end of a prompt and the question
DIVERGENCE = "kl_divergence_nats"
PURPOSES = {
    "antidiagonal": "found from each input",
    "window": "first and latest blocks",
    "random": "blocks by chance",
    "oracle": "blocks of most exact mass",
}
AXES = {"x_label": "density: share of the causal blocks kept", "y_label": "KL, nats/token"}
WITHOUT_QUESTION = ("question sparse", "window", "random")  # arms in which no block of queries attends to all


@dataclass(frozen=True)
class Quality:
    """Answers of both arms and what they are worth; `degenerate` says why the sparse model's output is, or is None."""

    full: Answers
    sparse: Answers
    measurements: list[Measurement]
    degenerate: str | None
    values: int  # asked for at each place
    options: dict[str, int]  # of `evaluate.compare`


def quality(loaded: Loaded, optimized: nn.Module, effort: Effort, tokens: int, quick: bool, seed: int = 0) -> Quality:
    """Return the answers of both arms to the same questions, with text and prompts of `tokens` tokens.

    The value to retrieve stands in the middle of its prompt. Prompts of which nothing was left out are not exercised.
    """
    probe_BT = task_list.text_windows(loaded, "final", 2, tokens, seed).to(loaded.device)
    degenerate = sanity.check(optimized, probe_BT, random_weights=loaded.random_weights)
    lead = (tokens - 2 * KEY - VALUE) // 2
    sizes = replace(effort, windows=4 if quick else 6, window_tokens=tokens, items=min(effort.items, 96))
    distance = tokens - 2 * KEY - VALUE - lead
    sizes = replace(sizes, retrieval_prompts=8 if quick else 12, retrieval_distance=distance)
    full = evaluate.evaluate(loaded, sizes, seed=seed, lead=lead)
    sparse = evaluate.evaluate(
        loaded, sizes, model=optimized, seed=seed, lead=lead, acted=lambda: method.left_out(optimized)
    )
    options = {"resamples": effort.resamples, "seed": seed}
    measurements = evaluate.compare(full, sparse, **options)
    if degenerate:
        measurements = [measurement.invalid(m.metric, m.workload, degenerate) for m in measurements]
    return Quality(full, sparse, measurements, degenerate, sizes.retrieval_prompts, options)


def patterns(loaded: Loaded, knobs: Mapping[str, Any], judged: Quality) -> list[dict[str, Any]]:
    """Return name, purpose and divergence of each pattern with as many blocks in every row; none for random weights."""
    if loaded.random_weights:
        return []
    arms = {name: method.apply(loaded.model, **knobs, pattern=name) for name in PURPOSES}
    return [
        {"name": name, "purpose": PURPOSES[name], "measurements": _divergence(arm, judged)}
        for name, arm in arms.items()
    ]


def _divergence(arm: nn.Module, judged: Quality) -> list[Measurement]:
    """Return how `arm` reads the text that both arms have read, against full attention."""
    text = judged.full.text
    if text is None:
        raise ValueError("the baseline has read no text")
    return evaluate.compare_text(text, evaluate.read(arm, text.ids_NT), **judged.options)


def over_tau(loaded: Loaded, knobs: Mapping[str, Any], judged: Quality, quick: bool) -> pd.DataFrame:
    """Return the divergence over the density that a pattern really kept, for the pattern found and for a window of the
    same size: a row per τ and arm; empty for random weights.
    """
    rows = []
    for tau in () if loaded.random_weights else (0.5, 0.7, 0.9) if quick else (0.5, 0.7, 0.9, 0.97):
        for pattern in ("antidiagonal", "window"):
            arm = method.apply(loaded.model, **{**knobs, "tau": tau}, pattern=pattern)
            divergence = next(m for m in _divergence(arm, judged) if m.metric == DIVERGENCE)
            low, high = divergence.ci or (None, None)
            row = {"arm": pattern, "value": divergence.optimized, "low": low, "high": high}
            rows.append(row | {"tau": tau, "strength": method.density(arm)["blocks"]})
    return pd.DataFrame(rows)


def placed_values(
    loaded: Loaded, optimized: nn.Module, knobs: Mapping[str, Any], judged: Quality, tokens: int, quick: bool
) -> dict[str, dict[str, Retrieved]]:
    """Return which values full attention, sparse attention and the controls repeat from each place of a prompt.

    The controls have no block of queries that attends to all, and are asked in the middle alone. Empty for random
    weights.
    """
    if loaded.random_weights:
        return {}
    arms = {"full": loaded.model, "sparse": optimized}
    bare = {"question sparse": "antidiagonal"} | ({} if quick else {"window": "window", "random": "random"})
    for name, pattern in bare.items():
        arms[name] = method.apply(loaded.model, **{**knobs, "full_last": 0}, pattern=pattern)
    known = {"full": {"middle": judged.full.retrieved}, "sparse": {"middle": judged.sparse.retrieved}}
    seed = judged.options["seed"]
    return at_places(loaded, arms, tokens, judged.values, seed, known, everywhere=[*known])


def at_places(
    loaded: Loaded,
    arms: Mapping[str, nn.Module],
    length: int,
    count: int,
    seed: int = 0,
    known: Mapping[str, Mapping[str, Retrieved | None]] | None = None,
    everywhere: Sequence[str] | None = None,
) -> dict[str, dict[str, Retrieved]]:
    """Return for each arm which of `count` values it repeats from the "start", "middle" and "end" of a prompt of
    `length` tokens: the same prompts for every arm, greedy, exact match.

    `known` are earlier answers (arm → place) to the same prompts, which are not asked for again. Arms that are not
    named in `everywhere` (by default all are) are asked in the middle alone. Raises ValueError where known answers are
    of another distance.
    """
    room = length - 2 * KEY - VALUE  # text around the stored value
    leads = {"start": LEAD, "middle": room // 2, "end": max(LEAD, room - NEAR)}
    retrieved: dict[str, dict[str, Retrieved]] = {}
    for arm, model in arms.items():
        retrieved[arm] = {}
        for place in leads if everywhere is None or arm in everywhere else ("middle",):
            lead = leads[place]
            before = (known or {}).get(arm, {}).get(place)
            if before is not None and (before.distance, len(before.right_N)) != (room - lead, count):
                raise ValueError(f"{arm}, {place}: known answers are not to prompts of {length} tokens")
            retrieved[arm][place] = before or evaluate.retrieval(_with(loaded, model), room - lead, count, seed, lead)
    return retrieved


def _with(loaded: Loaded, model: nn.Module) -> Loaded:
    return replace(loaded, model=model)


def place_bars(retrieved: Mapping[str, Mapping[str, Retrieved]]) -> pd.DataFrame:
    """Return `at_places` for `style.bars`: a bar for each place and arm, with Wilson's 95 % interval."""
    rows = []
    for place in next(iter(retrieved.values()), {}):
        for arm, places in ((arm, places) for arm, places in retrieved.items() if place in places):
            right_N: np.ndarray = places[place].right_N
            spread = binomtest(int(right_N.sum()), len(right_N)).proportion_ci(method="wilson")
            row = {"arm": f"{place}, {arm}", "value": float(right_N.mean()), "low": spread.low, "high": spread.high}
            rows.append(row)
    return pd.DataFrame(rows)


def dashed(retrieved: Mapping[str, Mapping[str, Retrieved]]) -> list[str]:
    """Return the bars of `place_bars` that are controls: arms whose question does not attend to all."""
    return [arm for arm in place_bars(retrieved)["arm"] if arm.endswith(WITHOUT_QUESTION)]


def described(bars: pd.DataFrame) -> str:
    """Return the alternative text of the figure of `place_bars`."""
    shares = ", ".join(f"{bar.arm} {bar.value:.2f}" for bar in bars.itertuples())
    return f"Values repeated by place: {shares}."


def place_controls(
    retrieved: Mapping[str, Mapping[str, Retrieved]], options: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return name, purpose and exact match against full attention of every other arm and place."""
    return [
        {
            "name": f"{arm}, {place}",
            "purpose": "against full attention",
            "measurements": [evaluate.compare_retrieved(retrieved["full"][place], values, **options)],
        }
        for arm in [*retrieved][1:]
        for place, values in retrieved[arm].items()
    ]
