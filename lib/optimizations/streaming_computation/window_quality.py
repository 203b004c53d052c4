"""Quality on long text with a cache of constant size, against the whole cache.

Measures perplexity by position in the text, and retrieval of values from inside and outside the window. Independent of
how a cache forgets: caches are made by functions passed in.

Shapes: N texts, T tokens, C tokens of a part, B prompts, V tokens of a value.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from lib.measure.metrics import paired_stats, settings
from lib.measure.metrics.catalogue import metric
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import noninferiority
from lib.measure.quality.answer_comparison import compare_retrieved
from lib.measure.quality.answers import Retrieved
from lib.measure.quality.evaluate import PROMPTS_AT_ONCE
from lib.models.decoding import chunked, continuations
from lib.models.loading import Loaded
from lib.models.tasks import retrieval
from lib.models.tasks import tasks as task_list
from lib.optimizations.common.evidence.claims import Interval
from lib.optimizations.streaming_computation import sink_window

MakeCache = Callable[[], Cache]
LOGIT_ROWS = 512
PARTS = 8  # parts of a text, each with its own perplexity
TEXTS = {
    "preview": (4, 512),
    "quick": (6, 1024),
    "standard": (12, 2048),
    "thorough": (12, 4096),
}  # effort → number of texts, tokens of each
PROMPT, GENERATED, FEWER_GENERATED = 64, 400, 8  # prompt tokens, generated tokens on a proxy, and on other models
OUTSIDE = {"preview": 2, "quick": 3, "standard": 3, "thorough": 3}  # distance of outside values, in windows
ASKED = {"preview": 4, "quick": 48, "standard": 48, "thorough": 48}  # maximum of values inside, and of values outside
SLACK = 32  # tokens by which the window may overrun before it is cut
MOST_SINKS = 64
ONE_DOCUMENT = "all texts are of one document, so there is no interval"
WHOLE, WINDOWED, NO_SINKS = "whole cache", "sinks and window", "window alone"


def cache_makers(model: nn.Module, sinks: int, window: int) -> dict[str, MakeCache]:
    """Return arm → function that makes an empty cache: whole, sinks and window, and window without sinks."""
    windowed = functools.partial(sink_window.windowed_cache, model, window=window, slack=SLACK)
    return {
        WHOLE: sink_window.whole_cache,
        WINDOWED: functools.partial(windowed, sinks=sinks),
        NO_SINKS: functools.partial(windowed, sinks=0),
    }


@dataclass(frozen=True)
class LongTexts:
    """Perplexity on long texts with each cache; all fields are empty if no text was read.

    `reason`: why no text was read, or why there is no `climb`. `curves`: perplexity by position (columns arm, strength,
    value, low, high). `late_over_early`: per arm, perplexity of the last part ÷ that of the first part after the
    window. `climb`: the 95 % interval over documents of that ratio with sinks and window. `perplexity`: from twice the
    window, each arm against the whole cache.
    """

    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    late_over_early: dict[str, float] = field(default_factory=dict)
    climb: tuple[float, float] | None = None
    perplexity: dict[str, Measurement] = field(default_factory=dict)
    reason: str = "random weights"


@contextmanager
def reading_in_chunks(model: nn.Module) -> Iterator[nn.Module]:
    """Let `model` read prompts in chunks that a window can hold, inside the block only."""
    chunked.chunk_prefill(model, SLACK)
    try:
        yield model
    finally:
        chunked.whole_prefill(model)


def read_long_texts(
    loaded: Loaded, arms: Mapping[str, MakeCache], window: int, effort: str, seed: int = 0
) -> LongTexts:
    """Return the perplexity of the model on held-out texts of at least three windows, with every cache of `arms`.

    Empty if the model has too few positions for such texts, or for a window with sinks and one more chunk.
    """
    if loaded.random_weights:
        return LongTexts()
    count, length = TEXTS.get(effort, TEXTS["thorough"])
    positions, least = continuations.positions(loaded.model), max(3 * window, _room(window))
    if least > positions:
        return LongTexts(reason=f"the model has {positions} positions, and texts for this window need {least}")
    size = count, min(max(length, least), positions)
    ids_NT = task_list.text_windows(loaded, "final", *size, seed)
    with reading_in_chunks(loaded.model) as model:
        losses_by_arm = {name: losses(model, ids_NT, make, at_once=len(ids_NT)) for name, make in arms.items()}
    resampling: dict[str, Any] = {"seed": seed, "source_N": task_list.window_sources(loaded, "final", *size, seed)}
    rows = [row for name, losses_NT in losses_by_arm.items() for row in by_position(losses_NT, name, **resampling)]
    curves = pd.DataFrame(rows)
    climb = climb_interval(losses_by_arm[WINDOWED], window, **resampling) if WINDOWED in losses_by_arm else None
    perplexity = _against_first(losses_by_arm, 2 * window, **resampling)
    if climb is not None and not np.isfinite(climb).all():
        return LongTexts(curves, late_over_early(curves, window), None, perplexity, ONE_DOCUMENT)
    return LongTexts(curves, late_over_early(curves, window), climb, perplexity)


def _room(window: int) -> int:
    """Return the maximum number of positions that a window takes, with sinks, overrun, and the chunk being read."""
    return window + MOST_SINKS + 2 * SLACK


def _against_first(
    losses_by_arm: Mapping[str, np.ndarray], behind: int, *, seed: int, source_N: np.ndarray | None
) -> dict[str, Measurement]:
    """Return the perplexity after position `behind` of every arm but the first, judged against the first.

    Texts of one document (`source_N`) are resampled together.
    """
    late_by_arm = {name: losses_NT[:, behind:].mean(1) for name, losses_NT in losses_by_arm.items()}
    first, *others = late_by_arm
    count, length = losses_by_arm[first].shape
    source = f"{count} held-out texts of {length + 1} tokens, after position {behind}, against {first}"
    judged: dict[str, Any] = {"source": source, "seed": seed, "source_N": source_N}
    return {name: noninferiority.perplexity(late_by_arm[first], late_by_arm[name], **judged) for name in others}


def losses(model: nn.Module, ids_NT: torch.Tensor, make_cache: MakeCache, at_once: int = 8) -> np.ndarray:
    """Return the loss of every next token [N, T − 1], in nats. `model` reads in chunks (`chunked.chunk_prefill`)."""
    parts = [chunked.losses(model, ids_BT, rows=LOGIT_ROWS, cache=make_cache()) for ids_BT in ids_NT.split(at_once)]
    return torch.cat(parts).float().cpu().numpy()


def by_position(
    losses_NT: np.ndarray, arm: str, parts: int = PARTS, seed: int = 0, source_N: np.ndarray | None = None
) -> list[dict[str, object]]:
    """Return perplexity by position in the text: a row per part, with its bootstrap interval over texts.

    Texts of one document are resampled together; without interval if all are of one document.
    """
    rows: list[dict[str, object]] = []
    for first, last, mean_N in _parts(losses_NT, parts):
        ends = np.exp(paired_stats.bootstrap_interval(mean_N, seed=seed, source=source_N))
        row = {"arm": arm, "strength": (first + last) // 2, "value": float(np.exp(mean_N.mean()))}
        rows.append(row | (dict(zip(("low", "high"), ends.tolist())) if np.isfinite(ends).all() else {}))
    return rows


def _parts(losses_NT: np.ndarray, parts: int) -> list[tuple[int, int, np.ndarray]]:
    """Return the first position, last position and mean loss per text [N] of every part."""
    pieces, first = [], 0
    for part_NC in np.array_split(losses_NT, parts, axis=1):
        last = first + part_NC.shape[1]
        pieces.append((first, last, part_NC.mean(1)))
        first = last
    return pieces


def late_over_early(curves: pd.DataFrame, behind: int) -> dict[str, float]:
    """Return, per arm, the perplexity of the last part of the text ÷ that of the first part after position `behind`."""
    rows = curves[curves.strength > behind].sort_values("strength").groupby("arm", sort=False)["value"]
    return (rows.last() / rows.first()).to_dict()


def climb_interval(
    losses_NT: np.ndarray, behind: int, parts: int = PARTS, seed: int = 0, source_N: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the 95 % interval, over texts, of the ratio of `late_over_early` for one arm.

    Texts of one document are resampled together; from 0 to infinity if all are of one document.
    """
    late = [mean_N for first, last, mean_N in _parts(losses_NT, parts) if (first + last) // 2 > behind]
    low, high = paired_stats.bootstrap_interval(late[-1] - late[0], seed=seed, source=source_N)
    return float(np.exp(low)), float(np.exp(high))


def described(texts: LongTexts) -> str:
    """Return the alternative text of the figure of `texts.curves`."""
    ratios = ", ".join(f"{arm} {ratio:.2f}" for arm, ratio in texts.late_over_early.items())
    return f"Perplexity by position in the text; last part ÷ first part after the window: {ratios}."


def does_perplexity_climb(texts: LongTexts) -> tuple[bool | None, str]:
    """Return whether, with sinks and window, perplexity climbs with the length of the text, and the evidence.

    It climbs if the interval of late ÷ early lies above 1 + the margin of perplexity, and does not if it lies below;
    otherwise, and without text, the answer is None.
    """
    if texts.climb is None:
        return None, f"no texts were read: {texts.reason}" if texts.curves.empty else texts.reason
    low, high = texts.climb
    margin = metric("perplexity").margin
    assert margin is not None, "perplexity is judged by a margin"
    limit = 1 + margin
    climbs = True if low > limit else False if high <= limit else None
    ratio = texts.late_over_early[WINDOWED]
    interval = Interval(ratio, low, high).in_words(neutral=limit)
    return climbs, f"perplexity late ÷ early {interval}; above {limit:g} it counts as climbing"


def retrieval_by_distance(
    loaded: Loaded, arms: Mapping[str, MakeCache], window: int, effort: str, seed: int = 0
) -> dict[str, Measurement]:
    """Return the exact match with sinks and window against the whole cache, for values inside and outside the window.

    The effort sets the number of values, at most `ASKED`. Outside values lie beyond the window whenever it was last
    cut, and after the sinks. Empty for random weights, and if the model has too few positions for the window.
    """
    if loaded.random_weights:
        return {}
    measurements, count = {}, min(settings.read(effort, loaded.scale).retrieval_prompts, ASKED[effort])
    positions, least = continuations.positions(loaded.model), window + 2 * SLACK + 1
    if _room(window) > positions:
        return {}
    lead = max(retrieval.LEAD, _sinks(arms[WINDOWED]()))
    overhead = retrieval.overhead(loaded) + lead - retrieval.LEAD
    if least + overhead > positions:
        return {}
    inside, outside = window // 2, min(max(OUTSIDE[effort] * window, least), positions - overhead)
    for name, distance in {"inside the window": inside, "outside the window": outside}.items():
        with reading_in_chunks(loaded.model) as model:
            pair = [retrieve(loaded, model, distance, count, arms[arm], seed, lead) for arm in (WHOLE, WINDOWED)]
        measurements[name] = compare_retrieved(*pair, seed=seed)
    return measurements


def _sinks(cache: Cache) -> int:
    """Return the number of first tokens that a cache never forgets."""
    return max((getattr(layer, "sinks", 0) for layer in cache.layers), default=0)


@torch.inference_mode()
def retrieve(
    loaded: Loaded,
    model: nn.Module,
    distance: int,
    count: int,
    make_cache: MakeCache,
    seed: int = 0,
    lead: int = retrieval.LEAD,
) -> Retrieved:
    """Return which of `count` values, stored `distance` tokens back after `lead` tokens of text, `model` repeats
    exactly, token by token.
    """
    ids_BT, target_BV = task_list.retrieval_prompts(loaded, distance, count, seed, lead)
    exact = []
    for prompt_BT, value_BV in zip(ids_BT.split(PROMPTS_AT_ONCE), target_BV.split(PROMPTS_AT_ONCE)):
        output_BV = torch.stack(list(chunked.tokens(model, prompt_BT, value_BV.shape[1], cache=make_cache())), 1)
        exact.append((output_BV.cpu() == value_BV.cpu()).all(1).numpy())
    source_N = task_list.filler_sources(loaded, distance, count, seed, lead)
    return Retrieved(distance, np.concatenate(exact), source_N=source_N)


def retrieval_bars(measurements: Mapping[str, Measurement]) -> pd.DataFrame:
    """Return the rows of `retrieval_by_distance` for `style.bars`: first the whole cache, then the window."""
    rows = [{"arm": f"{WHOLE}, {name}", "value": m.baseline} for name, m in measurements.items()]
    rows += [{"arm": f"window, {name}", "value": m.optimized} for name, m in measurements.items()]
    return pd.DataFrame(rows)


def described_bars(bars: pd.DataFrame) -> str:
    """Return the alternative text of the figure of `retrieval_bars`."""
    shares = ", ".join(f"{bar.arm} {bar.value:.2f}" for bar in bars.itertuples())
    return f"Values repeated from inside and from outside the window: {shares}."


def cache_sizes(loaded: Loaded, arms: Mapping[str, MakeCache], window: int, effort: str, seed: int = 0) -> pd.DataFrame:
    """Return the number of tokens that the whole and the windowed cache hold after each generated token.

    Columns: arm, strength (tokens read and generated), value. If few tokens are generated, the prompt is long enough
    for the windowed cache to be cut among them: as long as the window for a proxy model at effort preview, nearly
    filling the windowed cache for other models. If the model has too few positions for the window, only the whole cache
    is shown, up to the model's positions.
    """
    proxy, length = loaded.scale == "proxy", PROMPT
    count = GENERATED if proxy else FEWER_GENERATED
    positions = continuations.positions(loaded.model)
    fits = _room(window) <= positions
    if proxy and settings.read(effort).preview:
        length, count = window, SLACK + SLACK // 2
    elif fits and not proxy:
        length = _sinks(arms[WINDOWED]()) + window + SLACK - FEWER_GENERATED // 2
    length = length if fits else min(length, PROMPT)
    count = min(count, positions - length)
    prompt_1T = task_list.text_windows(loaded, "final", 1, length, seed).to(loaded.device)
    rows = []
    with reading_in_chunks(loaded.model) as model:
        for name in (WHOLE, WINDOWED) if fits else (WHOLE,):
            cache = arms[name]()
            for step, _ in enumerate(chunked.tokens(model, prompt_1T, count, cache=cache)):
                layer = cache.layers[-1]
                assert isinstance(layer, CacheLayerMixin) and layer.keys is not None
                rows.append({"arm": name, "strength": prompt_1T.shape[1] + step, "value": layer.keys.shape[-2]})
    return pd.DataFrame(rows)


def described_sizes(held: pd.DataFrame, room: int) -> str:
    """Return a sentence on the most tokens that each cache of `cache_sizes` held, with the `room` of the window."""
    most = ", ".join(f"{arm} {count}" for arm, count in held.groupby("arm")["value"].max().items())
    return f"Most tokens held: {most}. The window has room for {room} and is cut when it exceeds that by {SLACK}."
