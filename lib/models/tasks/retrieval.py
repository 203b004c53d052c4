"""Token windows of held-out text, and the prompts of key-value retrieval.

`retrieval_prompts` puts a random key and value before `distance` tokens of held-out text and repeats the key, after
which the model should generate the value. All draws are seeded. Knows nothing of scoring.

Shapes: N windows, B prompts, T tokens, V tokens of a value, P tokens of the tokenizer's prefix.
"""

import functools
import string
from collections import Counter
from typing import Any

import numpy as np
import torch

from lib.errors import UserError
from lib.models import tokenizing
from lib.models.structure.loaded_model import LoadedModel
from lib.models.tasks import corpus

CORPUS = {"topic": "docs", "code_origin": "code", "digits": "docs"}
KEY, VALUE = 4, 8  # tokens
LEAD = 8  # tokens of text before the key
FEWEST_CHARACTERS = 10  # from which keys and values are drawn; with fewer, any tokens are used


def corpus_of(loaded: LoadedModel) -> str:
    """Return the corpus of this model's tasks: "docs" or "code"."""
    return next((CORPUS[task] for task in loaded.parameters.tasks if task in CORPUS), "docs")


def text_windows(loaded: LoadedModel, split: str, windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return `available_windows`. Raises UserError if the held-out text is shorter than one window."""
    if loaded.tokenizer is not None:
        stream_T, _ = _stream(loaded.tokenizer, corpus_of(loaded), split)
        _require_text(stream_T, length - len(tokenizing.prefix(loaded.tokenizer)), split)
    return available_windows(loaded, split, windows, length, seed)


def available_windows(loaded: LoadedModel, split: str, windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return ids_NT of held-out text of this model's corpus: at most `windows` disjoint windows of `length` tokens,
    from different documents as far as possible.

    Each begins with the tokenizer's prefix. If the split is short, fewer windows are returned, or none. Without a
    tokenizer (random weights) the ids are random.
    """
    random = torch.Generator().manual_seed(seed)
    if loaded.tokenizer is None:
        return random_ids(loaded, (windows, length), random).to(loaded.device)
    stream_T, source_T = _stream(loaded.tokenizer, corpus_of(loaded), split)
    own = length - len(tokenizing.prefix(loaded.tokenizer))
    start_N = _places(source_T, own, random)[:windows]
    return with_prefix(loaded, stream_T[start_N[:, None] + torch.arange(own)]).to(loaded.device)


def _require_text(stream_T: torch.Tensor, length: int, split: str) -> None:
    """Raise UserError if the text of a split is shorter than one prompt, so that no empty prompt is timed."""
    if len(stream_T) < length:
        raise UserError(
            f"the held-out text of the split {split} holds {len(stream_T):,} tokens of this model; a prompt of "
            f"{length:,} does not fit into it"
        )


def with_prefix(loaded: LoadedModel, ids_NT: torch.Tensor) -> torch.Tensor:
    """Return rows of text with the tokenizer's prefix (such as a beginning of sequence), if it has one."""
    prefix = tokenizing.prefix(loaded.tokenizer) if loaded.tokenizer is not None else ()
    return (
        torch.cat([torch.tensor(prefix, dtype=ids_NT.dtype).expand(len(ids_NT), -1), ids_NT], 1) if prefix else ids_NT
    )


def window_sources(loaded: LoadedModel, split: str, windows: int, length: int, seed: int = 0) -> np.ndarray | None:
    """Return the number of the document in which each window of `text_windows` begins; None for random ids."""
    if loaded.tokenizer is None:
        return None
    random = torch.Generator().manual_seed(seed)
    _, source_T = _stream(loaded.tokenizer, corpus_of(loaded), split)
    own = length - len(tokenizing.prefix(loaded.tokenizer))
    return source_T[_places(source_T, own, random)[:windows]].numpy()


def _places(source_T: torch.Tensor, length: int, random: torch.Generator) -> torch.Tensor:
    """Return the starts of disjoint stretches of `length` tokens in a stream, [N], in random order, but one stretch of
    every document before a second one of any, so that few stretches come from as many documents as possible.
    """
    start_N = torch.arange(len(source_T) // length) * length
    start_N = start_N[torch.randperm(len(start_N), generator=random)]
    counts: Counter[int] = Counter()
    earlier = []  # number of earlier stretches of the same document
    for source in source_T[start_N].tolist():
        earlier.append(counts[source])
        counts[source] += 1
    return start_N[torch.tensor(earlier, dtype=torch.long).argsort(stable=True)]


@functools.lru_cache(maxsize=8)
def _stream(tokenizer, part: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of a split's text, one document after the other, and the number of each token's document."""
    ids, sources = [], []
    for number, passage in enumerate(corpus.running_text(part, split)):
        tokens = [*tokenizer(passage.text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids += tokens
        sources += [number] * len(tokens)
    return torch.tensor(ids), torch.tensor(sources)


@functools.lru_cache(maxsize=8)
def single_token_chars(tokenizer) -> tuple[int, ...]:
    """Return the ids of the letters and digits that are single tokens, for keys and values."""
    ids = (
        tokenizer(character, add_special_tokens=False).input_ids for character in string.ascii_letters + string.digits
    )
    return tuple(token[0] for token in ids if len(token) == 1)


def random_ids(loaded: LoadedModel, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Return the ids of random letters and digits. Without a tokenizer, or if fewer than FEWEST_CHARACTERS of them are
    single tokens, random ids above the first sixth of the vocabulary, without special tokens.
    """
    characters = () if loaded.tokenizer is None else single_token_chars(loaded.tokenizer)
    if len(characters) >= FEWEST_CHARACTERS:
        return torch.tensor(characters)[torch.randint(len(characters), shape, generator=random)]
    config: Any = loaded.model.config
    size, special = (getattr(config, "text_config", None) or config).vocab_size, set()
    if loaded.tokenizer is not None:
        size, special = min(size, len(loaded.tokenizer)), set(loaded.tokenizer.all_special_ids)
    ids_S = torch.tensor([token for token in range(size // 6, size) if token not in special])
    return ids_S[torch.randint(len(ids_S), shape, generator=random)]


def retrieval_prompts(
    loaded: LoadedModel, distance: int, count: int, seed: int = 0, lead: int = LEAD, split: str = "final"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids_BT, target_BV): prompts of key, value, `distance` tokens of a split's text and the key again, and the
    values.

    `lead` tokens of text come first, so that the key is not at position 0, after the tokenizer's prefix. No padding.
    Greedy generation of VALUE tokens must reproduce target_BV exactly.
    """
    random = torch.Generator().manual_seed(seed)
    filler_BT = _fillers(loaded, count, lead + distance, random, split)
    key_BK = random_ids(loaded, (count, KEY), random)
    value_BV = random_ids(loaded, (count, VALUE), random)
    ids_BT = torch.cat([filler_BT[:, :lead], key_BK, value_BV, filler_BT[:, lead:], key_BK], 1)
    return with_prefix(loaded, ids_BT).to(loaded.device), value_BV.to(loaded.device)


def overhead(loaded: LoadedModel) -> int:
    """Return how many tokens a prompt of `retrieval_prompts` and its answer take in addition to `distance`."""
    prefix = 0 if loaded.tokenizer is None else len(tokenizing.prefix(loaded.tokenizer))
    return prefix + LEAD + 2 * KEY + 2 * VALUE


def _fillers(loaded: LoadedModel, count: int, length: int, random: torch.Generator, split: str) -> torch.Tensor:
    """Return `count` stretches of a split's text, disjoint as long as the text suffices, then repeated."""
    if loaded.tokenizer is None:
        return random_ids(loaded, (count, length), random)
    stream_T, source_T = _stream(loaded.tokenizer, corpus_of(loaded), split)
    _require_text(stream_T, length, split)
    start_B = _starts(source_T, length, count, random)
    return stream_T[start_B[:, None] + torch.arange(length)]


def _starts(source_T: torch.Tensor, length: int, count: int, random: torch.Generator) -> torch.Tensor:
    """Return the starts of `count` fillers, [B]; two fillers are either disjoint or identical."""
    place_N = _places(source_T, length, random)
    return place_N[torch.arange(count) % len(place_N)]


def filler_sources(
    loaded: LoadedModel, distance: int, count: int, seed: int = 0, lead: int = LEAD, split: str = "final"
) -> np.ndarray | None:
    """Return the number of the document in which the text of each prompt of `retrieval_prompts` begins.

    None for random ids. Texts that overlap are identical, so they have the same document.
    """
    if loaded.tokenizer is None:
        return None
    random = torch.Generator().manual_seed(seed)
    _, source_T = _stream(loaded.tokenizer, corpus_of(loaded), split)
    return source_T[_starts(source_T, lead + distance, count, random)].numpy()
