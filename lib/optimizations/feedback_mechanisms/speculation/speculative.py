"""Speculative greedy decoding: a drafter proposes tokens, and the model itself checks them in one pass.

The output is the model's own greedy answer, whatever the drafter proposes (Leviathan, Kalman and Matias 2023, ICML; the
greedy case of their acceptance rule), up to the rounding of a pass over several tokens. The caller decides before each
round how many tokens to draft. A drafter is a smaller model, which reads the prompt only when it first drafts, or the
text itself: `Ngram` proposes the tokens that followed the last occurrence of the latest n-gram (prompt lookup decoding,
Saxena 2023; `prompt_lookup_num_tokens` in transformers). One sequence at a time. Independent of control laws.

Shapes: T prompt tokens, N new tokens, K drafted tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn
from transformers import DynamicCache

from lib.errors import UserError
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy, reset_rope_deltas

LONGEST_NGRAM = 3


@dataclass(frozen=True)
class Round:
    """One round: the number of tokens drafted, the number accepted by the model, and the seconds of both halves.

    `catch_up_seconds`: the drafter's time to read tokens it had missed, at first the prompt; not in `draft_seconds`.
    `law_seconds`: the time to decide how many tokens to draft.
    """

    drafted: int
    accepted: int
    draft_seconds: float
    check_seconds: float
    catch_up_seconds: float = 0.0
    law_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """The seconds of the whole round."""
        return self.law_seconds + self.catch_up_seconds + self.draft_seconds + self.check_seconds


class Drafter(Protocol):
    """Proposes tokens.

    `begin` forgets the previous answer. `propose` returns at most `count` tokens after `ids_T`, and the seconds of
    catching up. `keep` forgets everything after the first `length` tokens.
    """

    def begin(self, model: nn.Module) -> None: ...

    def propose(self, ids_T: torch.Tensor, count: int) -> tuple[torch.Tensor, float]: ...

    def keep(self, length: int) -> None: ...


class ModelDrafter:
    """A smaller model with the same vocabulary. It reads nothing until the first token is requested."""

    def __init__(self, draft: nn.Module):
        self.draft, self.cache = draft, DynamicCache()

    def begin(self, model: nn.Module) -> None:
        """Forget everything. Raises UserError if the vocabularies differ."""
        check_draft(model, self.draft)
        reset_rope_deltas(self.draft)
        self.cache = DynamicCache()

    def propose(self, ids_T: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
        """Return the draft's own greedy tokens, and the seconds to read all unread tokens but the newest."""
        start, known = time.perf_counter(), self.cache.get_seq_length()
        if len(ids_T) - known > 1:
            _read(self.draft, ids_T[known:-1], self.cache)
            _synchronize(ids_T)
        caught_up = time.perf_counter() - start if len(ids_T) - known > 1 else 0.0
        longer_T = ids_T
        for _ in range(count):
            longer_T = torch.cat([longer_T, _read(self.draft, longer_T[-1:], self.cache)[-1:]])
        return longer_T[len(ids_T) :], caught_up

    def keep(self, length: int) -> None:
        """Forget the tokens read after the first `length`."""
        if (surplus := self.cache.get_seq_length() - length) > 0:
            self.cache.crop(-surplus)


class Ngram:
    """Drafts from the text itself: the tokens that followed an earlier occurrence of the last n-gram, n ≤ `longest`."""

    def __init__(self, longest: int = LONGEST_NGRAM):
        if longest < 1:
            raise UserError(f"speculation: an n-gram of {longest} tokens; expected at least 1")
        self.longest = longest

    def begin(self, model: nn.Module) -> None:
        """Do nothing: no state is kept between answers."""

    def propose(self, ids_T: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
        """Return the tokens after the latest earlier occurrence of the longest n-gram that has one; else none."""
        ids = ids_T.tolist()
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            last = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == last:
                    return ids_T[start + size : start + size + count], 0.0
        return ids_T[:0], 0.0

    def keep(self, length: int) -> None:
        """Do nothing: no state is kept."""


def check_draft(model: nn.Module, draft: nn.Module) -> None:
    """Raise UserError if `draft` cannot draft for `model` because its vocabulary differs."""
    own, drafts = (anatomy(either).config.vocab_size for either in (model, draft))
    if own != drafts:
        raise UserError(
            f"speculation: the draft has a vocabulary of {drafts} tokens, the model one of {own}; "
            "give a draft made from the same model, or one with the same tokenizer"
        )


@torch.inference_mode()
def generate(
    model: nn.Module,
    draft: nn.Module | Drafter,
    prompt_T: torch.Tensor,
    new_tokens: int,
    length: Callable[[Sequence[Round]], int],
) -> tuple[torch.Tensor, list[Round]]:
    """Return `new_tokens` greedy tokens of `model` after the prompt, ids [N], and the rounds it took.

    `length(rounds so far)` returns the number of tokens to draft next; 0 is a plain step, in which the drafter does
    nothing. The first token comes from reading the prompt and belongs to no round. Raises UserError if the vocabularies
    differ.
    """
    drafter: Drafter = ModelDrafter(draft) if isinstance(draft, nn.Module) else draft
    drafter.begin(model)
    reset_rope_deltas(model)
    prompt_T = prompt_T.to(next(model.parameters()).device)
    cache = DynamicCache()
    ids_T = torch.cat([prompt_T, _read(model, prompt_T, cache)[-1:]])
    _synchronize(ids_T)  # keeps the reading of the prompt out of the first round's time
    rounds: list[Round] = []
    while len(ids_T) - len(prompt_T) < new_tokens:
        remaining = new_tokens - (len(ids_T) - len(prompt_T))
        start = time.perf_counter()
        count = max(0, min(int(length(rounds)), remaining - 1))
        law_seconds = time.perf_counter() - start
        ids_T, done = _round(model, drafter, ids_T, count, cache)
        rounds.append(replace(done, law_seconds=law_seconds))
    return ids_T[len(prompt_T) :][:new_tokens], rounds


def _round(
    model: nn.Module, drafter: Drafter, ids_T: torch.Tensor, count: int, cache: DynamicCache
) -> tuple[torch.Tensor, Round]:
    """Draft at most `count` tokens after `ids_T` and check them; return the extended sequence and the round.

    The model's cache holds all of `ids_T` but its last token; the drafter may lag behind after plain steps.
    """
    start = time.perf_counter()
    proposed_K, caught_up = drafter.propose(ids_T, count) if count else (ids_T[:0], 0.0)
    proposed_T = torch.cat([ids_T, proposed_K])
    _synchronize(proposed_T)
    middle = time.perf_counter()
    greedy_K = _read(model, proposed_T[len(ids_T) - 1 :], cache, keep=len(proposed_K) + 1)
    agree_K = greedy_K[:-1] == proposed_K
    accepted = int(agree_K.long().cumprod(0).sum())
    longer_T = torch.cat([proposed_T[: len(ids_T) + accepted], greedy_K[accepted : accepted + 1]])
    if (surplus := cache.get_seq_length() - (len(longer_T) - 1)) > 0:
        cache.crop(-surplus)
    drafter.keep(len(longer_T) - 1)
    end = time.perf_counter()
    return longer_T, Round(len(proposed_K), accepted, middle - start - caught_up, end - middle, caught_up)


def _read(model: nn.Module, ids_T: torch.Tensor, cache: DynamicCache, keep: int = 1) -> torch.Tensor:
    """Read tokens into the cache; return the greedy next token after each of the last `keep`, ids [keep]."""
    logits_1KV = model(
        input_ids=ids_T[None], **cache_names.as_kwargs(cache), use_cache=True, logits_to_keep=keep
    ).logits
    return logits_1KV[0, -keep:].argmax(-1)


def _synchronize(ids_T: torch.Tensor) -> None:
    """Wait for pending work on the device of `ids_T`, so that its time is counted where it belongs."""
    if ids_T.is_cuda:
        torch.cuda.synchronize(ids_T.device)
