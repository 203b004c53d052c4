"""Speculative greedy decoding: a small model drafts some tokens, the model itself checks them in one pass.

What comes out is the model's own greedy answer, whatever the draft says (Leviathan, Kalman and Matias 2023, ICML; the
greedy case of their acceptance rule), up to the rounding of a pass over several tokens. How many tokens are drafted is
decided before each round by the caller. One sequence at a time. Knows no law of control.

Shapes: T prompt tokens, N new tokens, K drafted tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from lib.errors import UserError
from lib.models.structure.anatomy import anatomy, reset_rope_deltas


@dataclass(frozen=True)
class Round:
    """One round: how many tokens were drafted and how many of them the model accepted, and the seconds of each half."""

    drafted: int
    accepted: int
    draft_seconds: float
    check_seconds: float

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.check_seconds


def check_draft(model: nn.Module, draft: nn.Module) -> None:
    """Raise UserError where `draft` cannot draft for `model`: its tokens are not the same ones."""
    own, drafted = (anatomy(either).config.vocab_size for either in (model, draft))
    if own != drafted:
        raise UserError(
            f"speculation: the draft has a vocabulary of {drafted} tokens, the model one of {own}; "
            "give a draft made from the same model, or one with the same tokenizer"
        )


@torch.inference_mode()
def generate(
    model: nn.Module,
    draft: nn.Module,
    prompt_T: torch.Tensor,
    new_tokens: int,
    length: Callable[[Sequence[Round]], int],
) -> tuple[torch.Tensor, list[Round]]:
    """Return `new_tokens` greedy tokens of `model` after the prompt, ids [N], and the rounds it took.

    `length(rounds so far)` says how many tokens to draft next; 0 is a plain step. The first token comes from reading
    the prompt and belongs to no round. Raises UserError where the vocabularies differ.
    """
    check_draft(model, draft)
    reset_rope_deltas(model)
    reset_rope_deltas(draft)
    device = next(model.parameters()).device
    prompt_T = prompt_T.to(device)
    caches = DynamicCache(), DynamicCache()
    first = _read(model, prompt_T, caches[0])[-1:]
    _read(draft, prompt_T, caches[1])
    ids_T = torch.cat([prompt_T, first])
    rounds: list[Round] = []
    while len(ids_T) - len(prompt_T) < new_tokens:
        remaining = new_tokens - (len(ids_T) - len(prompt_T))
        count = max(0, min(int(length(rounds)), remaining - 1))
        ids_T, done = _round(model, draft, ids_T, count, caches)
        rounds.append(done)
    return ids_T[len(prompt_T) :][:new_tokens], rounds


def _round(
    model: nn.Module, draft: nn.Module, ids_T: torch.Tensor, count: int, caches: tuple[DynamicCache, DynamicCache]
) -> tuple[torch.Tensor, Round]:
    """Draft `count` tokens behind `ids_T` and check them; return the longer sequence and what happened.

    The model's cache holds all of `ids_T` but its last token; the draft's may lag behind after plain steps.
    """
    start = time.perf_counter()
    proposed_T = ids_T
    for _ in range(count):
        token = _read(draft, proposed_T[caches[1].get_seq_length() :], caches[1])[-1:]
        proposed_T = torch.cat([proposed_T, token])
    middle = time.perf_counter()
    greedy_K = _read(model, proposed_T[len(ids_T) - 1 :], caches[0], keep=count + 1)
    agree_K = greedy_K[:-1] == proposed_T[len(ids_T) :]
    accepted = int(agree_K.long().cumprod(0).sum())
    longer_T = torch.cat([proposed_T[: len(ids_T) + accepted], greedy_K[accepted : accepted + 1]])
    for cache in caches:
        if (surplus := cache.get_seq_length() - (len(longer_T) - 1)) > 0:
            cache.crop(-surplus)
    return longer_T, Round(count, accepted, middle - start, time.perf_counter() - middle)


def _read(model: nn.Module, ids_T: torch.Tensor, cache: DynamicCache, keep: int = 1) -> torch.Tensor:
    """Read tokens into the cache; return the greedy next token behind each of the last `keep`, ids [keep]."""
    logits_1KV = model(input_ids=ids_T[None], past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    return logits_1KV[0, -keep:].argmax(-1)
