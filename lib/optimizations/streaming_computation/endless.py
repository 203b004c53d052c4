"""Text without end through a window: does a model read on as well as before, and what has it forgotten?

Losses by position, and values to be repeated that lie inside or outside the window. Knows nothing of how a cache
forgets: it is given a function that makes one.

Shapes: N windows of text, T tokens, B prompts, V tokens of a value.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import noninferiority
from lib.measure.quality.evaluate import PROMPTS_AT_ONCE, Retrieved, compare_recalled
from lib.models.decoding import chunked
from lib.models.tasks import tasks as task_list

MakeCache = Callable[[], object]
LOGIT_ROWS = 512


def losses(model: nn.Module, ids_NT: torch.Tensor, make_cache: MakeCache, at_once: int = 8) -> np.ndarray:
    """Return the loss of every next token [N, T − 1], in nats. `model` reads in chunks (`chunked.chunk_prefill`)."""
    found = [chunked.losses(model, part, rows=LOGIT_ROWS, cache=make_cache()) for part in ids_NT.split(at_once)]
    return torch.cat(found).float().cpu().numpy()


def read_on(
    model: nn.Module, ids_NT: torch.Tensor, arms: Mapping[str, MakeCache], behind: int, *, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, Measurement]]:
    """Return perplexity over position for every cache of `arms`, and for all but the first the perplexity of tokens
    from position `behind` on, judged against the first.
    """
    found = {name: losses(model, ids_NT, make, at_once=len(ids_NT)) for name, make in arms.items()}
    late = {name: one_NT[:, behind:].mean(1) for name, one_NT in found.items()}
    first, *others = late
    source = f"{len(ids_NT)} held-out texts of {ids_NT.shape[1]} tokens, from position {behind} on, against {first}"
    curves = pd.DataFrame([row for name, one_NT in found.items() for row in by_position(one_NT, name, seed=seed)])
    return curves, {
        name: noninferiority.perplexity(late[first], late[name], source=source, seed=seed) for name in others
    }


def late_over_early(curves: pd.DataFrame, behind: int) -> dict[str, float]:
    """Return, per arm, perplexity of the last part of the text ÷ that of the first part behind position `behind`."""
    rows = curves[curves.strength > behind].sort_values("strength").groupby("arm", sort=False)["value"]
    return (rows.last() / rows.first()).to_dict()


def by_position(losses_NT: np.ndarray, arm: str, parts: int = 8, seed: int = 0) -> list[dict[str, object]]:
    """Return perplexity over the position in the text: a row per part, with its bootstrap interval over texts."""
    rows, first = [], 0
    for part_NC in np.array_split(losses_NT, parts, axis=1):
        last = first + part_NC.shape[1]
        mean_N = part_NC.mean(1)
        low, high = paired_stats.bootstrap_interval(mean_N, seed=seed)
        value = {"value": float(np.exp(mean_N.mean())), "low": float(np.exp(low)), "high": float(np.exp(high))}
        rows.append({"arm": arm, "strength": (first + last) // 2, **value})
        first = last
    return rows


def forgotten(
    loaded,
    model: nn.Module,
    distances: Mapping[str, int],
    count: int,
    whole: MakeCache,
    window: MakeCache,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Return exact match with the window against the whole cache, for values at each of the named distances."""
    found = {}
    for name, distance in distances.items():
        arms = [recall(loaded, model, distance, count, make, seed) for make in (whole, window)]
        found[name] = compare_recalled(*arms, seed=seed)
    return found


@torch.inference_mode()
def recall(loaded, model: nn.Module, distance: int, count: int, make_cache: MakeCache, seed: int = 0) -> Retrieved:
    """Return which of `count` values, stored `distance` tokens ago, `model` repeats exactly, tokens as they come."""
    ids_BT, target_BV = task_list.retrieval_prompts(loaded, distance, count, seed)
    right = []
    for prompt_BT, value_BV in zip(ids_BT.split(PROMPTS_AT_ONCE), target_BV.split(PROMPTS_AT_ONCE)):
        said_BV = torch.stack(list(chunked.tokens(model, prompt_BT, value_BV.shape[1], cache=make_cache())), 1)
        right.append((said_BV.cpu() == value_BV.cpu()).all(1).numpy())
    return Retrieved(distance, np.concatenate(right))


def sizes(model: nn.Module, prompt_1T: torch.Tensor, count: int, caches: Sequence[tuple[str, object]]) -> pd.DataFrame:
    """Return the tokens that each cache holds after every generated token: columns arm, strength (tokens), value."""
    rows = []
    for name, cache in caches:
        for at, _ in enumerate(chunked.tokens(model, prompt_1T, count, cache=cache)):
            held = cache.layers[-1].keys.shape[-2]
            rows.append({"arm": name, "strength": prompt_1T.shape[1] + at, "value": held})
    return pd.DataFrame(rows)
