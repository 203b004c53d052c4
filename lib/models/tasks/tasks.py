"""The tasks as tensors: classifying a text, a function or a picture of a digit, and retrieving a value by its key.

Turns items (`lib.models.tasks.items`) into batches for any model with a tokenizer, with the prompts of
`lib.models.tasks.prompting`, and scores labels by their log-likelihood as continuations. Also builds calibration
batches. Knows nothing of metrics over items.

Shapes: N items, B items of one batch, T tokens, V tokens of a value, H hidden, L labels.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lib.models import tokenizing
from lib.models.decoding import continuations
from lib.models.structure.loaded_model import LoadedModel
from lib.models.structure.logits import logits_of
from lib.models.tasks import encoding, prompting
from lib.models.tasks.items import PICTURE, Item, class_labels, digit, digit_indices, items, prompt_of
from lib.models.tasks.prompting import PICTURE_TOKENS
from lib.models.tasks.registry import CLASSIFY, GENERATE
from lib.models.tasks.retrieval import (
    CORPUS,
    KEY,
    VALUE,
    available_windows,
    corpus_of,
    filler_sources,
    random_ids,
    retrieval_prompts,
    text_windows,
    window_sources,
    with_prefix,
)

__all__ = [
    "CLASSIFY",
    "CORPUS",
    "GENERATE",
    "PICTURE",
    "Item",
    "batches",
    "calibration",
    "class_labels",
    "corpus_of",
    "digit",
    "digit_indices",
    "filler_sources",
    "items",
    "label_ids",
    "label_scores",
    "prompt_of",
    "retrieval_prompts",
    "text_windows",
    "window_sources",
]

TOKENS_AT_ONCE = 4096  # of one calibration batch


def batches(
    loaded: LoadedModel, items: list[Item], batch_size: int = 32
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yield (inputs, last_B): the model's keyword arguments, right-padded, and the index of each row's last real token.

    Items keep their order. No mask is needed, since attention is causal and padding on the right changes nothing
    before it. Pictures are included as the model's own image processor returns them.
    """
    for start in range(0, len(items), batch_size):
        rows = [prompting.shown(loaded, item) for item in items[start : start + batch_size]]
        pictures = _pictures(loaded, [item.pixels for row in rows for item in row])
        ids = [prompting.prompt_ids(loaded, row) for row in rows]
        if pictures:
            counts = iter(_picture_tokens(loaded, pictures))
            ids = [_widened(tokens, _image_token(loaded), counts) for tokens in ids]
        ids_BT, last_B = pad(ids, loaded.tokenizer.pad_token_id or 0)
        inputs = {"input_ids": ids_BT.to(loaded.device)}
        if pictures:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == _image_token(loaded)).int()
            inputs |= {name: tensor.to(loaded.device) for name, tensor in pictures.items()}
        yield inputs, last_B.to(loaded.device)


def pad(ids: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids_BT, last_B): the rows padded on the right, and the index of each row's last real token."""
    ids_BT = torch.full((len(ids), max(map(len, ids))), padding)
    for row, tokens in enumerate(ids):
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
    return ids_BT, torch.tensor([len(tokens) - 1 for tokens in ids])


def _image_token(loaded: LoadedModel) -> int:
    return loaded.tokenizer.convert_tokens_to_ids(PICTURE_TOKENS[1])


def _pictures(loaded: LoadedModel, pixels: list[np.ndarray | None]) -> dict[str, torch.Tensor]:
    """Return `pixel_values` and `image_grid_thw` of the pictures; an empty dict if any item has no picture."""
    pictures = [picture for picture in pixels if picture is not None]
    if len(pictures) < len(pixels):
        return {}
    image_processor = getattr(loaded.image_processor, "image_processor", loaded.image_processor)
    processed = image_processor(
        images=[np.repeat(picture[..., None], 3, -1) for picture in pictures], return_tensors="pt"
    )
    return {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}


def _picture_tokens(loaded: LoadedModel, pictures: dict[str, torch.Tensor]) -> list[int]:
    """Return how many tokens each picture takes."""
    image_processor = getattr(loaded.image_processor, "image_processor", loaded.image_processor)
    return (pictures["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist()


def _widened(tokens: list[int], image: int, counts: Iterator[int]) -> list[int]:
    """Return the tokens with the placeholder of each picture repeated by the picture's number of tokens."""
    return [copy for token in tokens for copy in ([image] * next(counts) if token == image else [token])]


def label_ids(loaded: LoadedModel, task: str) -> list[list[int]]:
    """Return each label's token ids as the continuation of a prompt: one in a proxy model, otherwise one or more.

    They are encoded together with a prompt, since some tokenizers mark the beginning of a text as that of a word.
    """
    prompt = prompting.text(loaded, [Item("", task, prompt_of(task, "text"), "")])
    before = encoding.ids_without(loaded.tokenizer, prompt)
    ids = []
    for name in class_labels(task):
        answer = prompting.answer(loaded, name)
        both = encoding.ids_without(loaded.tokenizer, prompt + answer)
        follows = both[: len(before)] == before and len(both) > len(before)  # else it changes the prompt's last token
        ids.append(both[len(before) :] if follows else encoding.ids_without(loaded.tokenizer, answer))
    return ids


@torch.no_grad()
def label_scores(loaded: LoadedModel, task: str, items: list[Item], batch_size: int = 32) -> torch.Tensor:
    """Return the log-likelihood of every label after every item's prompt, scores_NL in float32 on the CPU.

    Items of similar length share a batch, so that it contains little padding. If a label has several tokens, or if a
    prompt is longer than the model allows (and loses its beginning, as in lm-evaluation-harness), the common prefix of
    the prompts is processed once (`lib.models.decoding.continuations`), but not with pictures.
    """
    labels = label_ids(loaded, task)
    several = any(len(label) > 1 for label in labels)
    contexts: list[list[int]] = []
    if (several or loaded.scale != "proxy") and all(item.pixels is None for item in items):
        contexts = [prompting.prompt_ids(loaded, prompting.shown(loaded, item)) for item in items]
    if contexts and (several or max(map(len, contexts)) > continuations.positions(loaded.model)):
        pairs = [(context, label) for context in contexts for label in labels]
        scores_P = torch.tensor([score for score, _ in continuations.loglikelihoods(loaded.model, pairs)])
        return scores_P.view(len(items), len(labels))
    order_N = torch.tensor(sorted(range(len(items)), key=lambda n: len(items[n].prompt)))
    scores = []
    for inputs, last_B in batches(loaded, [items[n] for n in order_N], batch_size):
        rows = torch.arange(len(last_B), device=last_B.device)
        if all(len(label) == 1 for label in labels):
            logits_BV = _logits(loaded.model, inputs, rows, last_B).float().log_softmax(-1)
            scores.append(logits_BV[:, [label[0] for label in labels]].cpu())
        else:
            scores.append(torch.stack([_continuation(loaded, inputs, last_B, label) for label in labels], 1).cpu())
    return torch.cat(scores)[order_N.argsort()]


def _continuation(
    loaded: LoadedModel, inputs: dict[str, torch.Tensor], last_B: torch.Tensor, label: list[int]
) -> torch.Tensor:
    """Return the summed log-likelihood of the tokens of one label after each prompt, scores_B."""
    room = inputs["input_ids"].new_zeros(len(last_B), len(label))
    ids_BT = torch.cat([inputs["input_ids"], room], 1)
    at_BV = last_B[:, None] + 1 + torch.arange(len(label), device=last_B.device)
    tokens_BV = torch.tensor(label, device=last_B.device).expand_as(at_BV)
    extended = inputs | {"input_ids": ids_BT.scatter(1, at_BV, tokens_BV)}
    if "mm_token_type_ids" in inputs:
        extended["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], room.int()], 1)
    rows = torch.arange(len(last_B), device=last_B.device)[:, None]
    logits_BVC = _logits(loaded.model, extended, rows, at_BV - 1).float().log_softmax(-1)
    return logits_BVC.gather(-1, tokens_BV[..., None]).sum((1, 2))


def _logits(model: Any, inputs: dict[str, torch.Tensor], rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return the logits at some positions; all positions would take gigabytes with a real vocabulary."""
    hidden_BTH = model.model(**inputs, use_cache=False).last_hidden_state
    return logits_of(model, hidden_BTH[rows, at])


def calibration(
    loaded: LoadedModel,
    sequences: int,
    length: int,
    seed: int = 0,
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    split: str = "calibration",
) -> list[dict[str, torch.Tensor]]:
    """Return batches of calibration inputs for model(**inputs): `sequences` windows of `length` tokens in total.

    Half are running text, half prompts with their answers; a key and a value repeat in each window, so that retrieval
    is calibrated for too. A vision-language model gets additional batches of pictures, one picture per sequence.
    `split`: a split other than "calibration" gives a search text that differs from the calibration text.
    """
    random = torch.Generator().manual_seed(seed)
    rows_NT = available_windows(loaded, split, sequences - sequences // 2, length, seed).cpu()
    short = sequences - len(rows_NT)
    rows_NT = torch.cat([rows_NT, _questions(loaded, short, length, seed, random, split)]) if short else rows_NT
    span = KEY + VALUE
    if length >= 4 * span:
        span_NS = random_ids(loaded, (len(rows_NT), span), random)
        rows_NT = torch.cat([rows_NT[:, : length // 4], span_NS, rows_NT[:, length // 4 :]], 1)[:, : length - span]
        rows_NT = torch.cat([rows_NT, span_NS], 1)
    size = max(1, tokens_at_once // length)
    batched = [{"input_ids": part.to(loaded.device)} for part in rows_NT.split(size)]
    if loaded.image_processor is not None and "digits" in loaded.parameters.tasks:
        pictures = items("digits", split, sequences, seed)
        batched += [inputs for inputs, _ in batches(loaded, pictures)]
    return batched


def _questions(
    loaded: LoadedModel, rows: int, length: int, seed: int, random: torch.Generator, split: str = "calibration"
) -> torch.Tensor:
    """Return windows packed with prompts and answers of a split, which repeat if there are too few."""
    if loaded.tokenizer is None:
        return random_ids(loaded, (rows, length), random)
    task = next((t for t in loaded.parameters.tasks if t in CLASSIFY and t != "digits"), "topic")
    ids: list[int] = []
    own = length - len(tokenizing.prefix(loaded.tokenizer))
    for item in itertools.cycle(items(task, split, None, seed)):
        text = f"{item.prompt} {item.label}"
        ids += [*loaded.tokenizer(text, add_special_tokens=False).input_ids, loaded.tokenizer.eos_token_id]
        if len(ids) >= rows * own:
            return with_prefix(loaded, torch.tensor(ids[: rows * own]).view(rows, own))
    raise ValueError(f"no items of {task} in the split {split}")
