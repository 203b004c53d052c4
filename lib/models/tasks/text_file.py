"""A file of the user's as the text on which perplexity is measured: `-p text=PATH`.

It is read as UTF-8 and must fill a few windows, which `check` verifies without torch before anything runs. Uses the
tokenizer; knows no model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import UserError
from lib.files import json_object
from lib.models import tokenizing

if TYPE_CHECKING:
    import torch

WINDOW_TOKENS = 2048
ENOUGH_CHARACTERS = 2**20  # of a long text, almost always enough for the windows; tokenizing all may take minutes
LEAST_WINDOWS = 6  # fewer cannot be judged (`lib.measure.quality.noninferiority`)
EXPECTED = "expected a text file in UTF-8"


def read(path: str | Path) -> str:
    """Return the text of a file. Raises UserError if the file is missing, a pipe or device, or not UTF-8."""
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):  # reading from a pipe would wait
            raise UserError(f"{path}: not a regular file; {EXPECTED}, which is read several times")
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start:,}); {EXPECTED}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); {EXPECTED}") from None


def check(path: str | Path, folder: Path | None = None) -> None:
    """Raise UserError for a file that cannot be read, or does not fill LEAST_WINDOWS windows of `window_tokens`.

    `folder` is the checkpoint whose tokenizer is used; without it, every byte counts as a token.
    """
    text, vocabulary = read(path), None if folder is None else folder / "tokenizer.json"
    length = window_tokens(folder)
    if vocabulary is None or not vocabulary.is_file():
        tokens = len(text.encode())
    else:
        from tokenizers import Tokenizer  # imported only if a file is given

        try:
            tokenizer = Tokenizer.from_file(str(vocabulary))
            tokenizer.no_truncation()  # the file may store both settings, but transformers ignores them
            tokenizer.no_padding()
            tokens = len(tokenizer.encode(text[:ENOUGH_CHARACTERS], add_special_tokens=False).ids)
            if tokens < LEAST_WINDOWS * length and len(text) > ENOUGH_CHARACTERS:
                tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library raises a bare Exception for a file that it cannot read
            why = " ".join(str(error).split())[:120]
            raise UserError(f"{vocabulary}: cannot be read as a tokenizer ({why})") from None
    if tokens < LEAST_WINDOWS * length:
        raise UserError(too_short(path, tokens, length))


def window_tokens(folder: Path | None) -> int:
    """Return the length of a window in tokens: WINDOW_TOKENS, or fewer if the model in `folder` has fewer positions."""
    config = {} if folder is None else json_object(folder / "config.json")
    nested = config.get("text_config")
    positions = (nested if isinstance(nested, dict) else config).get("max_position_embeddings")
    return min(WINDOW_TOKENS, positions) if isinstance(positions, int) and positions > 0 else WINDOW_TOKENS


def too_short(path: str | Path, tokens: int, length: int = WINDOW_TOKENS) -> str:
    """Return the message for a file of at most `tokens` tokens that cannot fill enough windows of `length` tokens."""
    return (
        f"{path}: holds at most {tokens:,} tokens; expected at least {LEAST_WINDOWS * length:,}: "
        f"{LEAST_WINDOWS} windows of {length:,}, the fewest that can be judged"
    )


def windows(tokenizer: Any, path: str | Path, most: int, length: int = WINDOW_TOKENS) -> "torch.Tensor":
    """Return at most `most` disjoint windows [N, length] of the file's tokens, spread evenly over it, each beginning
    with the tokenizer's prefix.

    Raises UserError if the file cannot be read or fills too few windows.
    """
    import torch  # `check` runs where torch is not loaded

    before = torch.tensor(tokenizing.prefix(tokenizer), dtype=torch.long)
    stream_T = torch.tensor(tokenizer(read(path), add_special_tokens=False).input_ids, dtype=torch.long)
    own = length - len(before)
    rows_NT = stream_T[: len(stream_T) // own * own].view(-1, own)
    if len(rows_NT) < LEAST_WINDOWS:
        raise UserError(too_short(path, len(stream_T), length))
    spread = torch.linspace(0, len(rows_NT) - 1, min(most, len(rows_NT))).round().long().unique()
    return torch.cat([before.expand(len(spread), -1), rows_NT[spread]], 1)
