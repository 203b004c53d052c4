"""Log-likelihoods of continuations after their contexts, with everything that prompts share computed once.

Computes `loglikelihood` of lm-evaluation-harness (Gao et al. 2021): the summed log-probability of a continuation after
a context, and whether greedy decoding would produce it. The harness processes context and continuation anew for every
choice. Here the common prefix of all contexts (the examples of a few-shot prompt) is processed once, then each distinct
context once, and every continuation on a copy of its context's cache. The result is the same up to rounding. Contexts
of similar length share a pass, padded on the left, and so do continuations, padded on the right: a pass holds no more
padding than another pass would cost.

Works on token ids and knows nothing of tokenizers or tasks.

Shapes: B contexts, N continuations, T tokens, K tokens of a continuation without its last, C tokens of a chunk, H
hidden, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy, reset_rope_deltas
from lib.models.structure.logits import logits_of

TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}  # processed in one pass
ROWS_AT_ONCE = 64
LOGITS_AT_ONCE = 2**25  # elements
CACHE_AT_ONCE = 2**29  # bytes of the copies of a cache
SHARED_TOKENS = 16  # shortest common prefix of contexts that is processed separately
PADDING = {"cpu": 64, "cuda": 1024}  # padding tokens in one pass, about as many as cost the overhead of a pass
DEFAULT_POSITIONS = 2048  # for a model that does not state its number of positions, as in the harness

Pair = tuple[Sequence[int], Sequence[int]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class ReadContexts:
    """B processed contexts: log-probabilities of the next token, the cache, its padding mask (None without padding) and
    the position of the next token.
    """

    next_BV: torch.Tensor
    cache: Any
    mask_BT: torch.Tensor | None
    position_B: torch.Tensor


def positions(model: nn.Module) -> int:
    """Return the number of positions of the model, in tokens."""
    config = anatomy(model).config
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    return next((value for name in names if (value := getattr(config, name, None))), DEFAULT_POSITIONS)


@torch.inference_mode()
def loglikelihoods(
    model: nn.Module, pairs: Sequence[Pair], *, tokens_at_once: int | None = None
) -> list[tuple[float, bool]]:
    """Return for each pair (context, continuation) of token ids the log-likelihood of the continuation, in nats,
    float32, and whether each of its tokens is the most likely one.

    A context that is too long for the model is truncated on the left, as in the harness. Raises ValueError if a context
    or continuation is empty, or a continuation alone is too long.
    """
    if not all(len(context) and len(continuation) for context, continuation in pairs):
        raise ValueError("every context and every continuation needs at least one token")
    if (most := max((len(continuation) for _, continuation in pairs), default=0)) > positions(model):
        raise ValueError(f"a continuation of {most} tokens is longer than the model's {positions(model)} positions")
    device = next(model.parameters()).device
    budget = tokens_at_once or TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cpu"])
    padding = PADDING.get(device.type, PADDING["cpu"])
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_context.setdefault(_clipped(*pair, positions(model)), []).append(index)
    shared = _shared(list(by_context))
    reset_rope_deltas(model)
    start = _read_shared(model, next(iter(by_context))[:shared], device) if shared else None
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    # After a shared prefix, only contexts of equal length share a pass: models expect no padding within a prompt.
    for contexts in _alike(
        by_context, len, lambda longest: min(ROWS_AT_ONCE, budget // longest), padding * (not shared)
    ):
        after = [by_context[context] for context in contexts]
        several = any(len(pairs[index][1]) > 1 for members in after for index in members)
        read = _read(model, [context[shared:] for context in contexts], start, device, several)
        for index, answer in _scored(model, read, after, pairs, padding):
            answers[index] = answer
    return answers


def _clipped(context: Sequence[int], continuation: Sequence[int], longest: int) -> tuple[int, ...]:
    """Return the context truncated on the left, so that it fits into `longest` positions with its continuation."""
    return tuple(context[max(0, len(context) + len(continuation) - longest - 1) :])


def _shared(contexts: Sequence[tuple[int, ...]]) -> int:
    """Return the length of the common prefix of all contexts, shorter than any of them; 0 below SHARED_TOKENS."""
    if len(contexts) < 2:
        return 0
    first, last = min(contexts), max(contexts)  # in lexical order: all contexts share the prefix of these two
    same = next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    same = min(same, min(map(len, contexts)) - 1)
    return same if same >= SHARED_TOKENS else 0


def _alike(
    items: Iterable[Item], length: Callable[[Item], int], rows: Callable[[int], int], padding: int
) -> Iterator[list[Item]]:
    """Yield the items in groups of similar length, the longest first: at most `rows(longest)` items (at least one) and
    at most `padding` tokens of padding per group.
    """
    part: list[Item] = []
    tokens = 0
    for item in sorted(items, key=length, reverse=True):
        longest = length(part[0]) if part else length(item)
        padded = longest * (len(part) + 1) - tokens - length(item)
        if part and (len(part) >= rows(longest) or padded > padding):
            yield part
            part, tokens = [], 0
        part.append(item)
        tokens += length(item)
    if part:
        yield part


def _read_shared(model: nn.Module, context: Sequence[int], device: torch.device) -> Any:
    """Return the cache [1, T] of `context`, the common prefix of all contexts."""
    output = model(input_ids=torch.tensor([context], device=device), use_cache=True, logits_to_keep=1)
    return cache_names.of(output)


def _read(
    model: nn.Module, contexts: list[tuple[int, ...]], start: Any, device: torch.device, keep_cache: bool
) -> ReadContexts:
    """Process contexts after the shared cache `start`, if given, padded on the left where their lengths differ."""
    longest = max(map(len, contexts))
    ids_BT = torch.zeros(len(contexts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, context in enumerate(contexts):
        ids_BT[row, longest - len(context) :] = torch.tensor(context)
        mask_BT[row, longest - len(context) :] = 1
    inputs = {"input_ids": ids_BT.to(device), "logits_to_keep": 1, "use_cache": keep_cache or start is not None}
    before = 0
    if start is not None:
        before = start.get_seq_length()
        inputs |= cache_names.as_kwargs(_select(start, torch.zeros(len(contexts), dtype=torch.long, device=device)))
    padded = None if bool(mask_BT.all()) else mask_BT.to(device)
    if padded is not None:
        inputs |= {"attention_mask": padded, "position_ids": (padded.cumsum(1) - 1).clamp_min(0)}
    output = model(**inputs)
    next_BV = output.logits[:, -1].float().log_softmax(-1)
    cache = cache_names.of(output) if keep_cache else None
    return ReadContexts(next_BV, cache, padded, before + mask_BT.sum(1).to(device))


def _scored(
    model: nn.Module, read: ReadContexts, after: list[list[int]], pairs: Sequence[Pair], padding: int
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yield (index of the pair, (log-likelihood, greedy)) for the continuations of processed contexts."""
    longer: list[tuple[int, int]] = []  # row, index of the pair
    first: dict[int, tuple[float, bool]] = {}
    likeliest = read.next_BV.argmax(-1).tolist()
    for row, members in enumerate(after):
        for index in members:
            token = pairs[index][1][0]
            first[index] = (read.next_BV[row, token].item(), likeliest[row] == token)
            if len(pairs[index][1]) > 1:
                longer.append((row, index))
    rest: dict[int, tuple[float, bool]] = {}
    for part in _pieces(longer, read, pairs, padding):
        rest |= _rest(model, read, part, pairs)
    for index, (score, greedy) in first.items():
        rest_score, rest_greedy = rest.get(index, (0.0, True))
        yield index, (score + rest_score, greedy and rest_greedy)


def _pieces(
    longer: list[tuple[int, int]], read: ReadContexts, pairs: Sequence[Pair], padding: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the continuations in groups of similar length whose logits and copies of the cache fit into memory."""
    if not longer:
        return
    contexts, vocabulary = read.next_BV.shape
    cached = sum(part.numel() * part.element_size() for part in _tensors(read.cache)) // contexts

    def rows(most: int) -> int:
        return min(LOGITS_AT_ONCE // (most * vocabulary), CACHE_AT_ONCE // max(1, cached))

    yield from _alike(longer, lambda place: len(pairs[place[1]][1]) - 1, rows, padding)


def _rest(
    model: nn.Module, read: ReadContexts, part: list[tuple[int, int]], pairs: Sequence[Pair]
) -> dict[int, tuple[float, bool]]:
    """Return (log-likelihood, greedy) of each continuation without its first token, by the index of the pair."""
    device = read.next_BV.device
    row_N = torch.tensor([row for row, _ in part], device=device)
    most = max(len(pairs[index][1]) for _, index in part) - 1
    given_NK = torch.zeros(len(part), most, dtype=torch.long)
    target_NK = torch.full((len(part), most), -1)
    for place, (_, index) in enumerate(part):
        tokens = torch.tensor(pairs[index][1])
        given_NK[place, : len(tokens) - 1], target_NK[place, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    inputs: dict[str, Any] = {"input_ids": given_NK.to(device), "use_cache": True}
    inputs |= cache_names.as_kwargs(_select(read.cache, row_N))
    if read.mask_BT is not None:
        mask_NT = torch.cat([read.mask_BT[row_N], read.mask_BT.new_ones(given_NK.shape)], 1)
        position_NK = read.position_B[row_N, None] + torch.arange(most, device=device)
        inputs |= {"attention_mask": mask_NT, "position_ids": position_NK}
    target_NK = target_NK.to(device)
    chosen, likeliest, first = [], [], 0
    for scores_NCV in _scores(model, inputs, read.next_BV.shape[1]):
        target_NC = target_NK[:, first : first + scores_NCV.shape[1]]
        chosen.append(scores_NCV.gather(-1, target_NC.clamp_min(0)[..., None])[..., 0])
        likeliest.append(scores_NCV.argmax(-1) == target_NC)
        first += scores_NCV.shape[1]
    real_NK = target_NK >= 0
    sums = torch.where(real_NK, torch.cat(chosen, 1), 0.0).sum(1).tolist()
    greedy = (torch.cat(likeliest, 1) | ~real_NK).all(1).tolist()
    return {index: (sums[place], greedy[place]) for place, (_, index) in enumerate(part)}


def _scores(model: nn.Module, inputs: dict[str, Any], vocabulary: int) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities after each of the given tokens, [N, C, V], for as many tokens as fit into memory at a
    time, since a single continuation may be as long as a document.
    """
    count, most = inputs["input_ids"].shape
    if count * most * vocabulary <= LOGITS_AT_ONCE:
        yield model(**inputs).logits.float().log_softmax(-1)
        return
    hidden_NKH = model.get_submodule("model")(**inputs).last_hidden_state
    for hidden_NCH in hidden_NKH.split(max(1, LOGITS_AT_ONCE // (count * vocabulary)), 1):
        yield logits_of(model, hidden_NCH).float().log_softmax(-1)


def _select(cache: Any, row_N: torch.Tensor) -> Any:
    """Return a new cache with copies of the rows `row_N` of `cache`."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(row_N)
    return selected


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        yield from (value for value in (layer.keys, layer.values) if torch.is_tensor(value))
