"""The frozen text: training documents of the proxy models, and held-out text and items to evaluate every model.

Two corpora, `docs` (documentation and docstrings) and `code` (source code), each in three files of
`parameters/evaluation`: training documents, labelled items, running text. Items and text carry their split. Knows
nothing of torch, tokenizers or prompts; the README in the same folder describes how the text was extracted and split.
"""

import functools
import hashlib
import json
import lzma
import re
from dataclasses import dataclass

from lib.errors import UserError
from lib.models.parameters import PARAMETERS

CORPORA = ("docs", "code")
SPLITS = ("calibration", "search", "final")


@dataclass(frozen=True)
class Document:
    """A training document: its pieces in order, and their class (`label`) or None."""

    source: str
    label: str | None
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """A held-out passage; `label` is None for running text."""

    id: str
    split: str
    label: str | None
    source: str
    text: str


@functools.cache
def _rows(corpus: str, part: str) -> tuple[dict, ...]:
    path = PARAMETERS / "evaluation" / f"{corpus}-{part}.jsonl.xz"
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return tuple(json.loads(line) for line in file)
    except (OSError, EOFError, lzma.LZMAError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: frozen text missing or damaged ({error}); restore it from version control") from None


def data_hash() -> str:
    """Return a hash of all frozen evaluation text."""
    digest = hashlib.sha256()
    for path in sorted((PARAMETERS / "evaluation").glob("*.jsonl.xz")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def documents(corpus: str) -> list[Document]:
    """Return the training documents of `corpus`, in their frozen order."""
    return [Document(row["source"], row["label"], tuple(row["pieces"])) for row in _rows(corpus, "train")]


def labelled(corpus: str, split: str) -> list[Passage]:
    """Return the held-out labelled passages of one split, in their frozen order."""
    return [Passage(**row) for row in _rows(corpus, "items") if row["split"] == split]


def running_text(corpus: str, split: str) -> list[Passage]:
    """Return the held-out running text of one split: passages of a few thousand characters."""
    rows = [row for row in _rows(corpus, "text") if row["split"] == split]
    return [Passage(f"{split}-{n:02d}", split, None, row["source"], row["text"]) for n, row in enumerate(rows)]


@functools.cache
def classes(corpus: str) -> tuple[str, ...]:
    """Return the classes of `corpus`, sorted."""
    return tuple(sorted({row["label"] for row in _rows(corpus, "items")}))


def masked(text: str, corpus: str) -> str:
    """Return `text` with the names of all classes of `corpus` replaced by `_`, so that it does not reveal its label."""
    return re.sub("|".join(map(re.escape, classes(corpus))), "_", text, flags=re.IGNORECASE)
