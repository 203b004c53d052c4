"""Checks that the tokenizer of a checkpoint folder is readable, belongs to its model and has a usable chat template.

Reads no weights. Called by `lib.models.checkpoints.validate`, in its process.
"""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from lib.errors import UserError
from lib.models import tokenizing

FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
TRIED = 'In 2026, 1234567 people said: "don\'t!"\n\n\tdef f(x):\n        return x_1 + 3.14159  # Ünïcödé 日本 🙂'
LEAST_SHARE = 0.5  # of the embeddings' rows that the tokenizer must use; models pad the rows by a few percent


def fault(folder: Path, rows: int) -> str | None:
    """Return None, or one line on what is wrong with the tokenizer. `rows`: number of rows of the embeddings."""
    if not any((folder / name).is_file() for name in FILES):
        return f"{folder}: holds no tokenizer; expected one of {', '.join(FILES)}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the exception of a damaged file depends on the parser of its format
        why = " ".join(str(error).split())[:160] or type(error).__name__
        return f"{folder}: its tokenizer cannot be read ({why})"
    known, where = len(tokenizer), f"its embeddings have {rows:,} rows"
    if known < LEAST_SHARE * rows:
        return f"{folder}: its tokenizer is that of another model: it knows {known:,} tokens, {where}"
    if beyond := _beyond(tokenizer.get_vocab().items(), {*map(str, tokenizer.get_added_vocab())}, rows):
        return f"{folder}: its tokenizer has the token {beyond[0]!r} with the id {beyond[1]}, {where}"
    try:
        texts = [TRIED] + ([tokenizing.render(tokenizer, tokenizing.TURNS)] if tokenizer.chat_template else [])
    except UserError as error:
        return f"{folder}: {error}"
    used = {token for text in texts for token in tokenizer(text).input_ids}
    used |= {end for end in (tokenizer.bos_token_id, tokenizer.eos_token_id) if end is not None}
    if max(used) >= rows:
        return f"{folder}: its tokenizer turns a text into the id {max(used)}, {where}"
    return None


def _beyond(vocabulary: Iterable[tuple[str, int]], added: set[str], rows: int) -> tuple[str, int] | None:
    """Return (token, id) of an ordinary token without a row in the embeddings, or None. `added`: not checked, since no
    text may contain them.
    """
    return next(((token, at) for token, at in vocabulary if at >= rows and token not in added), None)
