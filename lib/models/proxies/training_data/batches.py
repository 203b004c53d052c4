"""The training batches of the proxy models: text with repeated spans, classification prompts, pictures of digits.

Every batch depends only on seed and step, so an interrupted training resumes without a difference. Reads training text
only. Uses the tokenizer; knows nothing of losses or optimizers.

Key-value retrieval needs dense supervision: a pair answered once per sequence teaches nothing in a thousand steps. So
spans of random letters and digits repeat throughout each row, and every token of a repeat counts. At first there are
only short rows that repeat one span, because mixed with text copying is learned much later. Then text and prompts
follow, and rows lengthen until they cover the longest distance that is evaluated.

Shapes: B rows, T tokens, L labels.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.models.proxies.config import TrainingConfig
from lib.models.proxies.training_data import prompts
from lib.models.structure.loaded_model import LoadedModel
from lib.models.tasks import corpus, tasks
from lib.models.tasks.retrieval import single_token_chars

IGNORED, TEXT, ANSWER, REPEAT = 0, 1, 2, 3  # the kind of a token as a target; IGNORED tokens have no loss
COPY_LENGTH = 128  # of rows in the steps that train only copying
COPY_SHARE = 0.25  # of the text tokens after these steps, while rows have their first length


@dataclass
class TrainingBatch:
    """One batch: inputs of the model, kind_BT of each token as a target, mask real_BT of the tokens without padding.

    spans_B: the length of the span that each row repeats, if rows consist of one repeated span. answers_BL and
    labels_L: the probability of each label as the answer of each row, and the labels' tokens, if answers are not single
    labels; otherwise the tokens of kind ANSWER are the targets. weight: of the batch's losses.
    """

    inputs: dict[str, torch.Tensor]
    kind_BT: torch.Tensor
    real_BT: torch.Tensor
    spans_B: torch.Tensor | None = None
    answers_BL: torch.Tensor | None = None
    labels_L: torch.Tensor | None = None
    weight: float = 1.0


@dataclass
class TrainingBatches:
    """The training batches of one model, whose text is tokenized once."""

    loaded: LoadedModel
    config: TrainingConfig
    stream_T: np.ndarray = field(init=False)
    pieces: dict[str, list[str]] = field(init=False)
    unlabelled: list[str] = field(init=False)
    characters: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.characters = single_token_chars(self.loaded.tokenizer)
        self.stream_T, self.pieces, self.unlabelled = _tokenized(self.loaded.tokenizer, tasks.corpus_of(self.loaded))

    def at(self, step: int) -> list[TrainingBatch]:
        """Return the batches of one step; their gradients are summed."""
        config, progress = self.config, step / self.config.steps
        random = np.random.default_rng([config.seed, step])
        length = next((length for until, length in config.row_lengths if progress < until), config.row_lengths[-1][1])
        if progress >= config.row_lengths[-2][0] and step % 3 == 0:
            length = min(length, 512)  # so that short distances are not forgotten
        if progress < config.copy_until:
            return [self._copy_rows(random, config.text_tokens, COPY_LENGTH)]
        copied = int(config.text_tokens * COPY_SHARE) if progress < config.row_lengths[0][0] else 0
        batches = []
        if step % config.text_every == 0:
            batches.append(self._text_rows(random, length, config.text_tokens - copied))
        if copied:
            batches.append(self._copy_rows(random, copied, length))
        if "digits" in self.loaded.parameters.tasks:
            batches.append(self._digits(random))
        else:
            batches += self._prompts(random)
        return batches

    def _text_rows(self, random: np.random.Generator, length: int, tokens: int) -> TrainingBatch:
        """Return rows of training text in which spans of random letters and digits repeat."""
        rows = max(1, tokens // length)
        starts = random.integers(len(self.stream_T) - length, size=rows)
        ids_BT = np.stack([self.stream_T[start : start + length] for start in starts])
        kind_BT = np.full(ids_BT.shape, TEXT)
        for row in range(rows):
            for first, second, span in _span_places(random, length):
                self._repeat(random, ids_BT[row], kind_BT[row], first, second, span)
        real_BT = torch.ones(ids_BT.shape, dtype=torch.bool)
        return TrainingBatch({"input_ids": torch.from_numpy(ids_BT)}, torch.from_numpy(kind_BT), real_BT)

    def _repeat(
        self, random: np.random.Generator, ids_T: np.ndarray, kind_T: np.ndarray, first: int, second: int, span: int
    ) -> None:
        """Write one random span at two places of a row, in place."""
        ids_T[first : first + span] = ids_T[second : second + span] = random.choice(self.characters, span)
        kind_T[first : first + span] = IGNORED
        kind_T[second : second + 2] = IGNORED  # it is not yet predictable which span repeats
        kind_T[second + 2 : second + span] = REPEAT
        for end in (first + span, second + span):
            kind_T[end : end + 1] = np.where(kind_T[end : end + 1] == TEXT, IGNORED, kind_T[end : end + 1])

    def _copy_rows(self, random: np.random.Generator, tokens: int, length: int) -> TrainingBatch:
        """Return rows that repeat one short span; with few different tokens, copying is easy to learn."""
        rows = max(1, tokens // length)
        ids_BT, kind_BT = np.zeros((rows, length), dtype=np.int64), np.full((rows, length), REPEAT)
        longest = min(length / 2, len(self.characters))
        spans_B = np.exp(random.uniform(np.log(4), np.log(longest), rows)).astype(np.int64)
        for row, span in enumerate(spans_B):
            ids_BT[row] = np.resize(random.choice(self.characters, span, replace=False), length)
            kind_BT[row, : span + 1] = IGNORED
        return TrainingBatch(
            {"input_ids": torch.from_numpy(ids_BT)},
            torch.from_numpy(kind_BT),
            torch.ones(ids_BT.shape, dtype=torch.bool),
            torch.from_numpy(spans_B),
        )

    def _prompts(self, random: np.random.Generator) -> list[TrainingBatch]:
        """Return prompts with answers; varied prompts as two batches, the shorter and the longer half."""
        config = self.config
        if not (config.teacher_share or config.joined_share):
            return [self._prompt_batch(prompts.plain(random, self.loaded, self.pieces, config))]
        varied = prompts.varied(random, self.loaded, self.pieces, self.unlabelled, self.stream_T, config)
        halves = [self._prompt_batch(half) for half in varied.halves()]
        for half in halves:
            half.weight = len(half.kind_BT) / config.prompts
        return halves

    def _prompt_batch(self, batch: prompts.TrainingPrompts) -> TrainingBatch:
        ids_BT, last_B = tasks.pad(batch.rows, self.loaded.tokenizer.pad_token_id)
        kind_BT, _ = tasks.pad([_kinds(batch, row) for row in range(len(batch.rows))], IGNORED)
        padded = TrainingBatch({"input_ids": ids_BT}, kind_BT, torch.arange(ids_BT.shape[1]) <= last_B[:, None])
        if batch.answers_BL is not None:
            task = prompts.task_of(self.loaded)
            padded.answers_BL = torch.from_numpy(batch.answers_BL).float()
            padded.labels_L = torch.tensor([ids[0] for ids in tasks.label_ids(self.loaded, task)])
        return padded

    def _digits(self, random: np.random.Generator) -> TrainingBatch:
        """Return pictures of digits, slightly rotated, shifted and scaled, with their labels."""
        indices = random.choice(tasks.digit_indices("train"), self.config.prompts)
        items = []
        for index in indices:
            pixels, label = tasks.digit(int(index))
            prompt = f"{tasks.prompt_of('digits')} {label}"
            items.append(tasks.Item("", "digits", prompt, label, _distorted(random, pixels)))
        inputs, last_B = next(tasks.batches(self.loaded, items, len(items)))
        kind_BT = torch.full(inputs["input_ids"].shape, IGNORED)
        kind_BT[torch.arange(len(items)), last_B] = ANSWER
        return TrainingBatch(inputs, kind_BT, torch.ones(kind_BT.shape, dtype=torch.bool))


@functools.lru_cache(maxsize=2)
def _tokenized(tokenizer: Any, part: str) -> tuple[np.ndarray, dict[str, list[str]], list[str]]:
    """Return the training text of a corpus as a stream of tokens, the pieces of each class, and unlabelled pieces."""
    documents = corpus.documents(part)
    texts = ["\n\n".join(document.pieces) for document in documents]
    ids = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    pieces: dict[str | None, list[str]] = defaultdict(list)
    for document in documents:
        pieces[document.label] += [piece for piece in document.pieces if len(piece) > 130]
    stream_T = np.concatenate([np.array(row, dtype=np.int64) for row in ids])
    return stream_T, {label: pieces[label] for label in corpus.classes(part)}, pieces[None]


def _span_places(random: np.random.Generator, length: int) -> list[tuple[int, int, int]]:
    """Return (first place, second place, length) of disjoint repeated spans, at distances of all magnitudes."""
    occupied = np.zeros(length, dtype=bool)
    places = []
    for _ in range(max(3, length // 100)):
        span = int(random.integers(10, 33))
        room = length - 2 * span
        distance = int(room ** random.uniform(0.3, 1)) if random.random() < 0.5 else int(random.integers(room))
        first = int(random.integers(length - 2 * span - distance + 1))
        second = first + span + distance
        if not (occupied[first : first + span].any() or occupied[second : second + span].any()):
            occupied[first : first + span] = occupied[second : second + span] = True
            places.append((first, second, span))
    return places


def _kinds(batch: prompts.TrainingPrompts, row: int) -> list[int]:
    """Return the kind of each token of a prompt; replaced tokens are ignored as targets."""
    count = len(batch.rows[row]) - batch.answer_length
    kind_T = np.array(
        [IGNORED] * batch.prefix_length + [TEXT] * (count - batch.prefix_length) + [ANSWER] * batch.answer_length
    )
    if batch.corrupted is not None:
        kind_T[batch.corrupted[row]] = IGNORED
    return kind_T.tolist()


def _distorted(random: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Return a picture rotated by up to 12 degrees, shifted by up to an eighth of its width, scaled by up to 10 %."""
    angle, scale = np.deg2rad(random.uniform(-12, 12)), random.uniform(0.9, 1.1)
    a, b = np.cos(angle) * scale, np.sin(angle) * scale
    centre = len(pixels) / 2
    dx, dy = random.uniform(-1, 1, 2) * len(pixels) / 8
    offset = (centre - a * centre - b * centre + dx, centre + b * centre - a * centre + dy)
    matrix = (a, b, offset[0], -b, a, offset[1])
    picture = Image.fromarray(pixels).transform(
        pixels.shape[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(picture)
