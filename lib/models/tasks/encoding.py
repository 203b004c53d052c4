"""Encodes a context and its continuation as in lm-evaluation-harness, and fingerprints a tokenizer.

The context begins with the tokenizer's prefix (`lib.models.tokenizing`). Tokens that the tokenizer adds after a text
are left out, since the text continues after a prompt. Knows no task.
"""

import hashlib
import json
from typing import Any

from lib.models import tokenizing


def ids_without(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without special tokens, as for a continuation."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text at the beginning of a sequence, with the tokenizer's prefix unless the text has it."""
    before, bare = [*tokenizing.prefix(tokenizer)], ids_without(tokenizer, text)
    return bare if before and bare[: len(before)] == before else before + bare


def pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation, encoded together and then split (Gao et al. 2021,
    `TemplateLM._encode_pair`).

    Spaces at the end of the context are moved to the continuation. An empty context becomes the beginning-of-sequence
    token, or the end-of-text token if the tokenizer has no such token.
    """
    if not context:
        first, rest = [beginning(tokenizer)], ids_without(tokenizer, continuation)
        return (rest[:1], rest[1:]) if rest[:1] == first and len(rest) > 1 else (first, rest)
    bare = context.rstrip()
    if bare:
        context, continuation = bare, context[len(bare) :] + continuation
    before, whole = ids(tokenizer, context), ids(tokenizer, context + continuation)
    return before, whole[len(before) :] or ids_without(tokenizer, continuation)


def beginning(tokenizer: Any) -> int:
    """Return the id that stands for an empty context."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def fingerprint(tokenizer: Any) -> str:
    """Return a hash of everything in a tokenizer that affects prompts: vocabulary, processors, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for transient in ("padding", "truncation"):  # left behind by the last call
        stored.pop(transient, None)
    parts = [
        type(tokenizer).__name__,
        stored,
        getattr(tokenizer, "chat_template", None),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
