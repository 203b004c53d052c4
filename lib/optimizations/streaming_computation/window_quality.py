"""Long text through a cache of constant size: is it read as well as with the whole cache, and what is forgotten?

Perplexity by position in the text, and values to be retrieved from inside and from outside the window. A cache is made
by a function that is passed in; how it forgets is not known here.

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
PARTS = 8  # of a text, each with a perplexity of its own
TEXTS = {
    "preview": (4, 512),
    "quick": (6, 1024),
    "standard": (12, 2048),
    "thorough": (12, 4096),
}  # texts and their tokens, by effort
PROMPT, GENERATED, FEWER_GENERATED = 64, 400, 8  # tokens before generation without end, and generated: fewer elsewhere
OUTSIDE = {"preview": 2, "quick": 3, "standard": 3, "thorough": 3}  # windows from a value outside to its question
ASKED = {"preview": 4, "quick": 48, "standard": 48, "thorough": 48}  # values inside, and outside, at most
SLACK = 32  # tokens by which the window may overrun before it is cut
MOST_SINKS = 64
ONE_DOCUMENT = "all texts are of one document, so there is no interval"
WHOLE, WINDOWED, NO_SINKS = "whole cache", "sinks and window", "window alone"


def cache_makers(model: nn.Module, sinks: int, window: int) -> dict[str, MakeCache]:
    """Return what makes an empty cache of each arm: the whole one, sinks and window, and a window without sinks."""
    windowed = functools.partial(sink_window.windowed_cache, model, window=window, slack=SLACK)
    return {
        WHOLE: sink_window.whole_cache,
        WINDOWED: functools.partial(windowed, sinks=sinks),
        NO_SINKS: functools.partial(windowed, sinks=0),
    }


@dataclass(frozen=True)
class LongTexts:
    """How each cache reads long texts; everything is empty where none was read. `reason` says why, or why there is no
    `climb`.

    `curves`: perplexity by position (columns arm, strength, value, low, high). `late_over_early`: per arm, perplexity
    of the last part ÷ that of the first part after the window. `climb`: the 95 % interval of that ratio with sinks and
    window, over documents. `perplexity`: after twice the window, each arm against the whole cache.
    """

    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    late_over_early: dict[str, float] = field(default_factory=dict)
    climb: tuple[float, float] | None = None
    perplexity: dict[str, Measurement] = field(default_factory=dict)
    reason: str = "random weights"


@contextmanager
def reading_in_chunks(model: nn.Module) -> Iterator[nn.Module]:
    """Within, `model` reads prompts in chunks that a window can hold."""
    chunked.chunk_prefill(model, SLACK)
    try:
        yield model
    finally:
        chunked.whole_prefill(model)


def read_long_texts(
    loaded: Loaded, arms: Mapping[str, MakeCache], window: int, effort: str, seed: int = 0
) -> LongTexts:
    """Return how the loaded model reads held-out texts of at least three windows through every cache of `arms`; nothing
    where its positions do not hold so many tokens, or one chunk more than a window with sinks.
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
    drawn: dict[str, Any] = {"seed": seed, "source_N": task_list.window_sources(loaded, "final", *size, seed)}
    rows = [row for name, losses_NT in losses_by_arm.items() for row in by_position(losses_NT, name, **drawn)]
    curves = pd.DataFrame(rows)
    climb = climb_interval(losses_by_arm[WINDOWED], window, **drawn) if WINDOWED in losses_by_arm else None
    perplexity = _against_first(losses_by_arm, 2 * window, **drawn)
    if climb is not None and not np.isfinite(climb).all():
        return LongTexts(curves, late_over_early(curves, window), None, perplexity, ONE_DOCUMENT)
    return LongTexts(curves, late_over_early(curves, window), climb, perplexity)


def _room(window: int) -> int:
    """Return how many positions a window takes at most: with its sinks, overrun, and the chunk that is read."""
    return window + MOST_SINKS + 2 * SLACK


def _against_first(
    losses_by_arm: Mapping[str, np.ndarray], behind: int, *, seed: int, source_N: np.ndarray | None
) -> dict[str, Measurement]:
    """Return the perplexity from position `behind` on of all arms but the first, judged against the first; texts of one
    document (`source_N`) are resampled together.
    """
    late_by_arm = {name: losses_NT[:, behind:].mean(1) for name, losses_NT in losses_by_arm.items()}
    first, *others = late_by_arm
    count, length = losses_by_arm[first].shape
    source = f"{count} held-out texts of {length + 1} tokens, from position {behind} on, against {first}"
    judged: dict[str, Any] = {"source": source, "seed": seed, "source_N": source_N}
    return {name: noninferiority.perplexity(late_by_arm[first], late_by_arm[name], **judged) for name in others}


def losses(model: nn.Module, ids_NT: torch.Tensor, make_cache: MakeCache, at_once: int = 8) -> np.ndarray:
    """Return the loss of every next token [N, T − 1], in nats. `model` reads in chunks (`chunked.chunk_prefill`)."""
    parts = [chunked.losses(model, ids_BT, rows=LOGIT_ROWS, cache=make_cache()) for ids_BT in ids_NT.split(at_once)]
    return torch.cat(parts).float().cpu().numpy()


def by_position(
    losses_NT: np.ndarray, arm: str, parts: int = PARTS, seed: int = 0, source_N: np.ndarray | None = None
) -> list[dict[str, object]]:
    """Return perplexity over the position in the text: a row per part, with its bootstrap interval over texts, those of
    one document together; without where all are of one.
    """
    rows: list[dict[str, object]] = []
    for first, last, mean_N in _parts(losses_NT, parts):
        ends = np.exp(paired_stats.bootstrap_interval(mean_N, seed=seed, source=source_N))
        row = {"arm": arm, "strength": (first + last) // 2, "value": float(np.exp(mean_N.mean()))}
        rows.append(row | (dict(zip(("low", "high"), ends.tolist())) if np.isfinite(ends).all() else {}))
    return rows


def _parts(losses_NT: np.ndarray, parts: int) -> list[tuple[int, int, np.ndarray]]:
    """Return first and last position and mean loss per text [N] of every part."""
    pieces, first = [], 0
    for part_NC in np.array_split(losses_NT, parts, axis=1):
        last = first + part_NC.shape[1]
        pieces.append((first, last, part_NC.mean(1)))
        first = last
    return pieces


def late_over_early(curves: pd.DataFrame, behind: int) -> dict[str, float]:
    """Return, per arm, perplexity of the last part of the text ÷ that of the first part behind position `behind`."""
    rows = curves[curves.strength > behind].sort_values("strength").groupby("arm", sort=False)["value"]
    return (rows.last() / rows.first()).to_dict()


def climb_interval(
    losses_NT: np.ndarray, behind: int, parts: int = PARTS, seed: int = 0, source_N: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the 95 % interval of the ratio that `late_over_early` gives for one arm, over texts, those of one document
    together; from 0 to infinity where all are of one.
    """
    late = [mean_N for first, last, mean_N in _parts(losses_NT, parts) if (first + last) // 2 > behind]
    low, high = paired_stats.bootstrap_interval(late[-1] - late[0], seed=seed, source=source_N)
    return float(np.exp(low)), float(np.exp(high))


def described(texts: LongTexts) -> str:
    """Return the alternative text of the figure of `texts.curves`."""
    ratios = ", ".join(f"{arm} {ratio:.2f}" for arm, ratio in texts.late_over_early.items())
    return f"Perplexity over position in the text; last part ÷ the first after the window: {ratios}."


def does_perplexity_climb(texts: LongTexts) -> tuple[bool | None, str]:
    """Return whether perplexity climbs with the length of the text, with sinks and window, and the evidence.

    It climbs where the interval of late ÷ early lies above 1 + the margin of perplexity, and does not where it lies
    below; in between, and where no text was read, the answer is None.
    """
    if texts.climb is None:
        return None, f"no texts were read: {texts.reason}" if texts.curves.empty else texts.reason
    low, high = texts.climb
    margin = metric("perplexity").margin
    assert margin is not None, "perplexity is judged by a margin"
    limit = 1 + margin
    climbs = True if low > limit else False if high <= limit else None
    ratio = texts.late_over_early[WINDOWED]
    found = Interval(ratio, low, high).in_words(neutral=limit)
    return climbs, f"perplexity late ÷ early {found}; it climbs above {limit:g}"


def retrieval_by_distance(
    loaded: Loaded, arms: Mapping[str, MakeCache], window: int, effort: str, seed: int = 0
) -> dict[str, Measurement]:
    """Return exact match with sinks and window against the whole cache, for as many values inside and outside the
    window as the effort asks for, at most `ASKED`; empty for random weights, and where the model has too few
    positions for the window. What is outside is surely so, whenever the window was cut last, and behind the sinks.
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
    """Return how many first tokens of a text a cache never forgets."""
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
    """Return which of `count` values, stored `distance` tokens ago behind `lead` tokens of text, `model` repeats
    exactly, token by token.
    """
    ids_BT, target_BV = task_list.retrieval_prompts(loaded, distance, count, seed, lead)
    right = []
    for prompt_BT, value_BV in zip(ids_BT.split(PROMPTS_AT_ONCE), target_BV.split(PROMPTS_AT_ONCE)):
        output_BV = torch.stack(list(chunked.tokens(model, prompt_BT, value_BV.shape[1], cache=make_cache())), 1)
        right.append((output_BV.cpu() == value_BV.cpu()).all(1).numpy())
    source_N = task_list.filler_sources(loaded, distance, count, seed, lead)
    return Retrieved(distance, np.concatenate(right), source_N=source_N)


def retrieval_bars(measurements: Mapping[str, Measurement]) -> pd.DataFrame:
    """Return `retrieval_by_distance` for `style.bars`: the whole cache's shares, then the window's."""
    rows = [{"arm": f"{WHOLE}, {name}", "value": m.baseline} for name, m in measurements.items()]
    rows += [{"arm": f"window, {name}", "value": m.optimized} for name, m in measurements.items()]
    return pd.DataFrame(rows)


def described_bars(bars: pd.DataFrame) -> str:
    """Return the alternative text of the figure of `retrieval_bars`."""
    shares = ", ".join(f"{bar.arm} {bar.value:.2f}" for bar in bars.itertuples())
    return f"Values repeated from inside and from outside the window: {shares}."


def cache_sizes(loaded: Loaded, arms: Mapping[str, MakeCache], window: int, effort: str, seed: int = 0) -> pd.DataFrame:
    """Return the tokens that the whole and the windowed cache hold after each of some generated tokens: columns arm,
    strength (tokens read and generated), value. Where few tokens are generated the prompt comes first in its length: a
    proxy model at effort preview reads one as long as the window, any other model one that all but fills the windowed
    cache, so that it is cut within those few. The whole cache alone where the model has too few positions for the
    window, and no more tokens than it has positions.
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
    """Return the most tokens that each cache of `cache_sizes` held, beside the `room` of the window, as a sentence."""
    most = ", ".join(f"{arm} {count}" for arm, count in held.groupby("arm")["value"].max().items())
    return f"Most tokens held: {most}. The window has room for {room}, and is cut once {SLACK} more are held."
