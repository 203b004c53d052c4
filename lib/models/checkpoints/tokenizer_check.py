"""Checks that the tokenizer of a checkpoint folder can be read, belongs to its model, and that its chat can be asked.

Knows no weights. Run by `lib.models.checkpoints.validate`, in its process.
"""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from lib.errors import UserError
from lib.models import tokenizing

FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
TRIED = 'In 2026, 1234567 people said: "don\'t!"\n\n\tdef f(x):\n        return x_1 + 3.14159  # Ünïcödé 日本 🙂'
LEAST_SHARE = 0.5  # of the embeddings' rows that a tokenizer of the same model knows; rows are padded by a few percent


def fault(folder: Path, rows: int) -> str | None:
    """Return None, or in one line what is wrong. `rows`: of the embeddings."""
    if not any((folder / name).is_file() for name in FILES):
        return f"{folder}: holds no tokenizer; expected one of {', '.join(FILES)}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files raise what the parser of their format raises
        why = " ".join(str(error).split())[:160] or type(error).__name__
        return f"{folder}: its tokenizer cannot be read ({why})"
    known, where = len(tokenizer), f"its embeddings have {rows:,} rows"
    if known < LEAST_SHARE * rows:
        return f"{folder}: its tokenizer is of another model: it knows {known:,} tokens, {where}"
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
    """Return an ordinary token with an id beyond the embeddings. An added one may be there that no text ever holds."""
    return next(((token, at) for token, at in vocabulary if at >= rows and token not in added), None)
