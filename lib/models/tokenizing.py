"""Text in the form that a model was trained on: the prefix that its tokenizer adds, its chat template, its end tokens.

Probes the behaviour of transformers tokenizers, never their names. Knows nothing of tasks or models.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lib.errors import UserError

# A tag at the end of a prompt that opens a thought (<think>, [THINK], <thought>, <|START_THINKING|>), in three parts.
OPENED = re.compile(r"([<\[◁]\|?)((?!end|no)[\w:.-]*(?:think|thought|reason)[\w:.-]*)(\|?[>\]▷])\s*$", re.IGNORECASE)
# Some templates write today's date (Llama 3, SmolLM3), which would give each day other prompts.
TODAY = "strftime_now"
ONE_DAY = "{% macro strftime_now(format) %}01 January 2026{% endmacro %}"
BEGINS = re.compile("start|begin", re.IGNORECASE)
TURNS = [
    {"role": "user", "content": "How many days has a week?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "And how many hours has a day?"},
]


@functools.lru_cache(maxsize=8)
def prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before every text: none, a beginning of sequence, or several tokens
    (`[gMASK]<sop>`). Chat templates write them themselves.
    """
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = range(len(whole) - len(bare) + 1)
    return next((tuple(whole[:at]) for at in starts if whole[at : at + len(bare)] == bare), ())


def render(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> str:
    """Return the turns of a chat as a prompt after which the model answers directly, with no thought left open.

    Templates that expect the content of a turn as a list of parts get such a list. Raises UserError if the template
    refuses these turns or leaves out the last one.
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
    if opened := OPENED.search(text):
        text = f"{text.rstrip()}\n\n{_closing(*opened.groups())}\n\n"
    return text


def _closing(before: str, name: str, after: str) -> str:
    """Return the closing tag for the three parts of an opening tag: </think>, or <|END_THINKING|>."""
    if begins := BEGINS.match(name):
        return f"{before}{'END' if begins[0].isupper() else 'end'}{name[begins.end() :]}{after}"
    return f"{before}/{name}{after}"


def _applied(tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> str:
    # `enable_thinking` turns off the thinking mode of templates that have one; others ignore it.
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, Mapping) else template
    if isinstance(template, str) and TODAY in template:
        options["chat_template"] = ONE_DAY + template
    try:
        return tokenizer.apply_chat_template([*turns], **options)
    except Exception as error:  # a template is a program and may raise anything
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"its chat template refuses turns of a user and an assistant ({why})") from None


def with_end(tokenizer: Any, rows: int, *configurations: Any) -> Any:
    """Return the tokenizer with an end-of-text token: its own, else that of a configuration, else any special token.

    A padding token beyond the `rows` of the embeddings (`[PAD]`, added late) is replaced by the end-of-text token.
    """
    if getattr(tokenizer, "eos_token_id", 0) is None:
        ends = (getattr(configuration, "eos_token_id", None) for configuration in configurations)
        ids = [end[0] if isinstance(end, (list, tuple)) else end for end in ends if end not in (None, [])]
        others = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids, 0]
        tokens = (_token(tokenizer, end, rows) for end in [*ids, *others])
        tokenizer.eos_token = next((token for token in tokens if token), None)
    if (getattr(tokenizer, "pad_token_id", None) or 0) >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _token(tokenizer: Any, identity: int | None, rows: int) -> str | None:
    """Return the token with id `identity`, or None if it has no row in the embeddings.

    Some configurations write -1 for no token, or keep an id of another vocabulary.
    """
    return tokenizer.convert_ids_to_tokens(identity) if identity is not None and 0 <= identity < rows else None
