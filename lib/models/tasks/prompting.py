"""How a model is asked: a stand-in the bare question it was trained on; a real checkpoint with examples before it, as
turns of its own chat template where it has one.

Examples come from the calibration split, one per class as far as they reach, the same for every item of a task, never
the item itself. A picture is a mark in the text that `lib.models.tasks.tasks` widens to as many tokens as it takes.
Knows the tokenizer; knows nothing of batches, of scores, or of which answer is right.
"""

import functools
from collections.abc import Sequence

from lib.models.tasks.items import Item, items

SHOTS = 4  # examples before a real checkpoint's question
PICTURE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def shown(loaded, item: Item) -> list[Item]:
    """Return what is shown for one question: the examples, then the item itself."""
    if loaded.scale == "proxy":
        return [item]
    return [*[one for one in _examples(item.task, SHOTS + 1) if one.id != item.id][:SHOTS], item]


@functools.cache
def _examples(task: str, count: int) -> tuple[Item, ...]:
    """Return `count` calibration items of different classes, or of as many as there are."""
    found: dict[str, list[Item]] = {}
    for item in items(task, "calibration"):
        found.setdefault(item.label, []).append(item)
    turns = max(map(len, found.values()))
    return tuple(group[turn] for turn in range(turns) for group in found.values() if turn < len(group))[:count]


def text(loaded, row: Sequence[Item]) -> str:
    """Return the prompt of `shown` items: all but the last answered, the last one asked."""
    *examples, asked = row
    if not chats(loaded):
        answered = [f"{_question(one)} {one.label}\n\n" for one in examples]
        return "".join(answered) + _question(asked)
    turns = []
    for one in examples:
        turns += [{"role": "user", "content": _question(one)}, {"role": "assistant", "content": one.label}]
    turns.append({"role": "user", "content": _question(asked)})
    # Templates that know of thinking are told to answer at once; the others do not read the word.
    return loaded.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def answer(loaded, label: str) -> str:
    """Return a label as it stands behind a prompt: at the start of a turn of a chat, or a space after the question."""
    return label if chats(loaded) else f" {label}"


def chats(loaded) -> bool:
    """Return whether the tokenizer brings a chat template."""
    return bool(getattr(loaded.tokenizer, "chat_template", None))


def _question(item: Item) -> str:
    return item.prompt if item.pixels is None else "".join(PICTURE_TOKENS) + item.prompt
