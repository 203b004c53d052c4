"""The items of the classification tasks: a text or a picture, and its label.

Turns frozen text and scikit-learn's handwritten digits into items of three disjoint splits. Knows nothing of
tokenizers, models or few-shot examples.
"""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lib.errors import UserError, suggest
from lib.models.tasks import corpus
from lib.models.tasks.corpus import SPLITS
from lib.models.tasks.registry import CLASSIFY
from lib.models.tasks.retrieval import CORPUS

PICTURE = 32  # pixels of a side; the original 8 × 8 pictures are enlarged four times


@dataclass(frozen=True)
class Item:
    """A prompt of a task and its label. `pixels`: the picture [H, W] uint8 that the prompt is about, if any; `source`:
    the document that its text comes from.
    """

    id: str
    task: str
    prompt: str
    label: str
    pixels: np.ndarray | None = None
    source: str | None = None


def class_labels(task: str) -> list[str]:
    """Return the labels of a classification task."""
    if task not in CLASSIFY:
        raise UserError(f'unknown classification task "{task}"; expected one of {", ".join(CLASSIFY)}')
    return [str(digit) for digit in range(10)] if task == "digits" else list(corpus.classes(CORPUS[task]))


def prompt_of(task: str, text: str = "") -> str:
    """Return the prompt of `task` about `text`; the expected answer is a space and a label."""
    if task == "digits":
        return "Which digit is this?\nDigit:"
    names = ", ".join(class_labels(task))
    return f"Modules: {names}.\n\n{corpus.masked(text, CORPUS[task])}\n\nModule:"


def items(task: str, split: str, limit: int | None = None, seed: int = 0) -> list[Item]:
    """Return at most `limit` items of one split, shuffled by `seed`. The splits of a task are disjoint."""
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}"; expected one of {", ".join(SPLITS)}.{suggest(split, SPLITS)}')
    labels = class_labels(task)
    if task == "digits":
        selected = [_digit_item(index) for index in digit_indices(split)]
    else:
        selected = [
            Item(passage.id, task, prompt_of(task, passage.text), passage.label, source=passage.source)
            for passage in corpus.labelled(CORPUS[task], split)
            if passage.label in labels
        ]
    order = np.random.default_rng(seed).permutation(len(selected))
    return [selected[index] for index in order[:limit]]


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # the import takes half a second, so only when digits are used

    data = load_digits()
    return np.clip(data.images * 16, 0, 255).astype(np.uint8), data.target


def digit_indices(split: str) -> list[int]:
    """Return the indices of scikit-learn's digits in a split or in "train". Two of five digits are in "final"."""
    return [index for index in range(len(_digits()[1])) if _digit_split(index) == split]


def _digit_split(index: int) -> str:
    if index % 10 in (1, 3, 5, 7):
        return "final"
    if index % 10 == 9:
        return "search"
    return "calibration" if index % 20 == 10 else "train"


def digit(index: int) -> tuple[np.ndarray, str]:
    """Return picture `index` as [PICTURE, PICTURE] uint8 (bicubic interpolation), and its label."""
    images, targets = _digits()
    picture = Image.fromarray(images[index]).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    return np.asarray(picture), str(targets[index])


def _digit_item(index: int) -> Item:
    pixels, label = digit(index)
    return Item(f"digit-{index:04d}", "digits", prompt_of("digits"), label, pixels)
