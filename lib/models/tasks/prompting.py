"""Prompts: a proxy model gets the bare prompt it was trained on; a real checkpoint gets few-shot examples before it, as
turns of its chat template if it has one.

Examples come from the calibration split, from different classes if there are enough, and are the same for every item of
a task, without the item itself. A picture is one placeholder token in the text, which `lib.models.tasks.tasks` expands.
Uses the tokenizer; knows nothing of batches or scores.
"""

import functools
from collections.abc import Sequence

from lib.models import tokenizing
from lib.models.structure.loaded_model import LoadedModel
from lib.models.tasks.items import Item, items

SHOTS = 4  # examples before a real checkpoint's prompt
PICTURE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def shown(loaded: LoadedModel, item: Item) -> list[Item]:
    """Return the items of one prompt: the examples, then the item itself."""
    if loaded.scale == "proxy":
        return [item]
    return [*[example for example in _examples(item.task, SHOTS + 1) if example.id != item.id][:SHOTS], item]


@functools.cache
def _examples(task: str, count: int) -> tuple[Item, ...]:
    """Return `count` calibration items, from different classes as far as possible."""
    by_label: dict[str, list[Item]] = {}
    for item in items(task, "calibration"):
        by_label.setdefault(item.label, []).append(item)
    rounds = max(map(len, by_label.values()))
    return tuple(group[index] for index in range(rounds) for group in by_label.values() if index < len(group))[:count]


def text(loaded: LoadedModel, row: Sequence[Item]) -> str:
    """Return the prompt for the items `row` that `shown` returned: all but the last with their labels."""
    *examples, last = row
    if not chats(loaded):
        answered = [f"{_question(example)} {example.label}\n\n" for example in examples]
        return "".join(answered) + _question(last)
    turns = []
    for example in examples:
        turns += [{"role": "user", "content": _question(example)}, {"role": "assistant", "content": example.label}]
    turns.append({"role": "user", "content": _question(last)})
    return tokenizing.render(loaded.tokenizer, turns)


def prompt_ids(loaded: LoadedModel, row: Sequence[Item]) -> list[int]:
    """Return the token ids of the prompt for the items `row`, with the tokenizer's prefix, which a chat template writes
    itself.
    """
    ids = loaded.tokenizer(text(loaded, row), add_special_tokens=False).input_ids
    return ids if chats(loaded) else [*tokenizing.prefix(loaded.tokenizer), *ids]


def answer(loaded: LoadedModel, label: str) -> str:
    """Return a label as it follows a prompt: at the start of a chat turn, else after a space."""
    return label if chats(loaded) else f" {label}"


def chats(loaded: LoadedModel) -> bool:
    """Return whether the tokenizer has a chat template."""
    return bool(getattr(loaded.tokenizer, "chat_template", None))


def _question(item: Item) -> str:
    return item.prompt if item.pixels is None else "".join(PICTURE_TOKENS) + item.prompt
