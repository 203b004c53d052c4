"""Text as a model was trained to read it: what its tokenizer puts before every text, turns of its chat, its ends.

Knows tokenizers of transformers by what they do, never by their names; nothing of tasks or models.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lib.errors import UserError

THINKING = {"<think>": "</think>", "[THINK]": "[/THINK]", "<thinking>": "</thinking>"}  # how it opens and closes
TURNS = [
    {"role": "user", "content": "How many days has a week?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "And how many hours has a day?"},
]


@functools.lru_cache(maxsize=8)
def prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before a text: none, a beginning of sequence, or what else it was trained
    with (`[gMASK]<sop>`). A chat template writes them itself.
    """
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = range(len(whole) - len(bare) + 1)
    return next((tuple(whole[:at]) for at in starts if whole[at : at + len(bare)] == bare), ())


def render(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> str:
    """Return turns of a chat as text, up to where the model answers: at once, with no thought left open.

    Templates that expect the content of a turn as a list of parts get one. Raises UserError for a template that
    refuses these turns or leaves the last one out.
    """
    question = turns[-1]["content"].strip()
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    text: str = ""
    refused: UserError | None = None
    for form in (turns, parts):
        try:
            text = _applied(tokenizer, form)
        except UserError as error:
            refused = refused or error
            continue
        if question in text:
            break
    else:
        if refused is not None:
            raise refused
        raise UserError("its chat template leaves out what the user says")
    for opened, closed in THINKING.items():
        if text.rfind(opened) > text.rfind(closed) and text.rstrip().endswith(opened):
            text = f"{text.rstrip()}\n\n{closed}\n\n"
    return text


def _applied(tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> str:
    # For templates with a thinking mode: answer at once. The others ignore the argument.
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        return tokenizer.apply_chat_template([*turns], **options)
    except Exception as error:  # a template is a program: it raises what it likes
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"its chat template refuses turns of a user and an assistant ({why})") from None


def with_end(tokenizer: Any, *configurations: Any) -> Any:
    """Return the tokenizer with an end of text: its own, else that of a configuration, else any special token."""
    if getattr(tokenizer, "eos_token_id", 0) is not None:
        return tokenizer
    ends = (getattr(configuration, "eos_token_id", None) for configuration in configurations)
    ids = [end[0] if isinstance(end, (list, tuple)) else end for end in ends if end not in (None, [])]
    others = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids, 0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(next(end for end in [*ids, *others] if end is not None))
    return tokenizer
