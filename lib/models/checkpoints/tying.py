"""Decides whether head and embeddings are one tensor: by the stored tensors, as in transformers, not the configuration.

A configuration may call them tied although the files hold a separate head. All code that builds a model asks here
first: for whole, streamed and reloaded models.
"""

from pathlib import Path
from typing import Any

from lib.models.checkpoints.folder import tensor_places

COMPARED_BYTES = 2**24  # at a time
HEAD, EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"


def settle(configuration: Any, folder: Path | str) -> Any:
    """Return the configuration, changed in place to untied embeddings if `folder` holds a separate head."""
    text = configuration.get_text_config()
    if any(getattr(part, "tie_word_embeddings", False) for part in (configuration, text)) and stored_apart(folder):
        configuration.tie_word_embeddings = text.tie_word_embeddings = False
    return configuration


def stored_apart(folder: Path | str) -> bool:
    """Return whether the files of `folder` hold a head and embeddings with different values."""
    places = tensor_places(folder)
    heads = [place for name, place in places.items() if name == HEAD or name.endswith(f".{HEAD}")]
    tables = [place for name, place in places.items() if name.endswith(EMBEDDINGS) and "visual" not in name]
    if not heads or not tables:
        return False
    (head_file, head_at, head_bytes, *_), (table_file, table_at, table_bytes, *_) = heads[0], tables[0]
    if head_bytes != table_bytes:
        return True
    with head_file.open("rb") as head, table_file.open("rb") as table:
        head.seek(head_at)
        table.seek(table_at)
        for start in range(0, head_bytes, COMPARED_BYTES):
            size = min(COMPARED_BYTES, head_bytes - start)
            if head.read(size) != table.read(size):
                return True
    return False
