"""What the stand-ins are shown in training: text with keys and values in it, questions with answers, pictures.

Every batch is a function of seed and step alone, so a training that was stopped goes on as if it had not been. Only
training text is read here. Knows the tokenizer; knows nothing of models, losses or optimizers.

Recall needs dense supervision: a pair answered once per sequence teaches nothing in a thousand steps. So spans of
random letters and digits repeat all over each row, and every token of a repeat counts. At first there is nothing but
short rows, one span over and over, because beside text copying is found much later; then text and questions come, and
rows lengthen until they hold the longest distance asked for.

Shapes: B rows, T tokens.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from lib.models.proxies import prompts
from lib.models.proxies.config import Recipe
from lib.models.tasks import corpus, tasks
from lib.models.tasks.retrieval import signs

TEXT, ANSWER, REPEAT, SILENT = 1, 2, 3, 0  # what predicting a token teaches; SILENT tokens carry no loss
COPY_LENGTH = 128  # of rows while nothing but copying is learned
COPY_SHARE = 0.25  # of the tokens, afterwards, while rows have their first length


@dataclass
class Lesson:
    """One batch: inputs of the model, kind_BT of each token as a target, and which tokens are no padding.

    spans_B: the length of the span that each row repeats, only where rows repeat one span and nothing else.
    answers_BL: the probability of each class as the answer of each row, labels_L their tokens, only where answers are
    more than one label; else the tokens of kind ANSWER are right.
    """

    inputs: dict[str, torch.Tensor]
    kind_BT: torch.Tensor
    real_BT: torch.Tensor
    spans_B: torch.Tensor | None = None
    answers_BL: torch.Tensor | None = None
    labels_L: torch.Tensor | None = None
    weight: float = 1.0  # of its losses


@dataclass
class Lessons:
    """All training material of one model, tokenized once. `loaded` needs tokenizer, processor, parameters, device."""

    loaded: object
    recipe: Recipe
    stream_T: np.ndarray = field(init=False)
    pieces: dict[str, list[str]] = field(init=False)
    others: list[str] = field(init=False)
    signs: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.signs = signs(self.loaded.tokenizer)
        self.stream_T, self.pieces, self.others = _material(self.loaded.tokenizer, tasks.corpus_of(self.loaded))

    def at(self, step: int) -> list[Lesson]:
        """Return the batches of one step; their gradients add up."""
        recipe, progress = self.recipe, step / self.recipe.steps
        random = np.random.default_rng([recipe.seed, step])
        length = next((length for until, length in recipe.row_lengths if progress < until), recipe.row_lengths[-1][1])
        if progress >= recipe.row_lengths[-2][0] and step % 3 == 0:
            length = min(length, 512)  # so that short distances are not forgotten
        if progress < recipe.copy_until:
            return [self._copies(random, recipe.tokens, COPY_LENGTH)]
        copied = int(recipe.tokens * COPY_SHARE) if progress < recipe.row_lengths[0][0] else 0
        lessons = [] if step % recipe.text_every else [self._rows(random, length, recipe.tokens - copied)]
        if copied:
            lessons.append(self._copies(random, copied, length))
        if "digits" in self.loaded.parameters.tasks:
            lessons.append(self._pictures(random))
        else:
            lessons += self._questions(random)
        return lessons

    def _rows(self, random: np.random.Generator, length: int, tokens: int) -> Lesson:
        """Return rows of training text with spans of random signs that come again."""
        rows = max(1, tokens // length)
        starts = random.integers(len(self.stream_T) - length, size=rows)
        ids_BT = np.stack([self.stream_T[start : start + length] for start in starts])
        kind_BT = np.full(ids_BT.shape, TEXT)
        for row in range(rows):
            for first, second, span in _places(random, length):
                self._repeat(random, ids_BT[row], kind_BT[row], first, second, span)
        real_BT = torch.ones(ids_BT.shape, dtype=torch.bool)
        return Lesson({"input_ids": torch.from_numpy(ids_BT)}, torch.from_numpy(kind_BT), real_BT)

    def _repeat(self, random: np.random.Generator, ids_T, kind_T, first: int, second: int, span: int) -> None:
        ids_T[first : first + span] = ids_T[second : second + span] = random.choice(self.signs, span)
        kind_T[first : first + span] = SILENT
        kind_T[second : second + 2] = SILENT  # nothing says yet which span comes again
        kind_T[second + 2 : second + span] = REPEAT
        for end in (first + span, second + span):
            kind_T[end : end + 1] = np.where(kind_T[end : end + 1] == TEXT, SILENT, kind_T[end : end + 1])

    def _copies(self, random: np.random.Generator, tokens: int, length: int) -> Lesson:
        """Return rows that are one short span over and over: few different tokens make copying easy to find."""
        rows = max(1, tokens // length)
        ids_BT, kind_BT = np.zeros((rows, length), dtype=np.int64), np.full((rows, length), REPEAT)
        longest = min(length / 2, len(self.signs))
        spans_B = np.exp(random.uniform(np.log(4), np.log(longest), rows)).astype(np.int64)
        for row, span in enumerate(spans_B):
            ids_BT[row] = np.resize(random.choice(self.signs, span, replace=False), length)
            kind_BT[row, : span + 1] = SILENT
        real_BT = torch.ones(ids_BT.shape, dtype=torch.bool)
        return Lesson(
            {"input_ids": torch.from_numpy(ids_BT)}, torch.from_numpy(kind_BT), real_BT, torch.from_numpy(spans_B)
        )

    def _questions(self, random: np.random.Generator) -> list[Lesson]:
        """Return questions with answers; varied ones come as two batches, the shorter and the longer half."""
        recipe = self.recipe
        if not (recipe.advised or recipe.joined):
            return [self._asked(prompts.plain(random, self.loaded, self.pieces, recipe))]
        asked = prompts.varied(random, self.loaded, self.pieces, self.others, self.stream_T, recipe)
        halves = [self._asked(half) for half in asked.halves()]
        for half in halves:
            half.weight = len(half.kind_BT) / recipe.questions
        return halves

    def _asked(self, asked: prompts.Questions) -> Lesson:
        ids_BT, last_B = tasks.pad(asked.rows, self.loaded.tokenizer.pad_token_id)
        kind_BT, _ = tasks.pad([_kinds(asked, row) for row in range(len(asked.rows))], SILENT)
        lesson = Lesson({"input_ids": ids_BT}, kind_BT, torch.arange(ids_BT.shape[1]) <= last_B[:, None])
        if asked.answers_BL is not None:
            task = prompts.task_of(self.loaded)
            lesson.answers_BL = torch.from_numpy(asked.answers_BL).float()
            lesson.labels_L = torch.tensor([ids[0] for ids in tasks.label_ids(self.loaded, task)])
        return lesson

    def _pictures(self, random: np.random.Generator) -> Lesson:
        """Return digits, turned, moved and scaled a little, with their names."""
        chosen = random.choice(tasks.digit_indices("train"), self.recipe.questions)
        items = []
        for index in chosen:
            pixels, label = tasks.digit(int(index))
            answered = f"{tasks.prompt_of('digits')} {label}"
            items.append(tasks.Item("", "digits", answered, label, _distorted(random, pixels)))
        inputs, last_B = next(tasks.batches(self.loaded, items, len(items)))
        kind_BT = torch.full(inputs["input_ids"].shape, SILENT)
        kind_BT[torch.arange(len(items)), last_B] = ANSWER
        return Lesson(inputs, kind_BT, torch.ones(kind_BT.shape, dtype=torch.bool))


@functools.lru_cache(maxsize=2)
def _material(tokenizer, part: str) -> tuple[np.ndarray, dict[str, list[str]], list[str]]:
    """Return all training text of a corpus as one stream of tokens, the pieces of each class, and those of none."""
    documents = corpus.documents(part)
    texts = ["\n\n".join(document.pieces) for document in documents]
    ids = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    pieces = defaultdict(list)
    for document in documents:
        pieces[document.label] += [piece for piece in document.pieces if len(piece) > 130]
    stream_T = np.concatenate([np.array(row, dtype=np.int64) for row in ids])
    return stream_T, {label: pieces[label] for label in corpus.classes(part)}, pieces[None]


def _places(random: np.random.Generator, length: int) -> list[tuple[int, int, int]]:
    """Return (first, second, span) of spans that do not touch, at distances of all orders up to the row's length."""
    taken = np.zeros(length, dtype=bool)
    places = []
    for _ in range(max(3, length // 100)):
        span = int(random.integers(10, 33))
        room = length - 2 * span
        distance = int(room ** random.uniform(0.3, 1)) if random.random() < 0.5 else int(random.integers(room))
        first = int(random.integers(length - 2 * span - distance + 1))
        second = first + span + distance
        if not (taken[first : first + span].any() or taken[second : second + span].any()):
            taken[first : first + span] = taken[second : second + span] = True
            places.append((first, second, span))
    return places


def _kinds(asked: prompts.Questions, row: int) -> list[int]:
    """Return what predicting each token of a question teaches; what was replaced teaches nothing."""
    count = len(asked.rows[row]) - asked.answer
    kind_T = np.array([SILENT] * asked.opening + [TEXT] * (count - asked.opening) + [ANSWER] * asked.answer)
    if asked.spoilt is not None:
        kind_T[asked.spoilt[row]] = SILENT
    return kind_T.tolist()


def _distorted(random: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Return a picture turned by up to 12 degrees, moved by up to an eighth of its width, scaled by up to a tenth."""
    turn, scale = np.deg2rad(random.uniform(-12, 12)), random.uniform(0.9, 1.1)
    a, b = np.cos(turn) * scale, np.sin(turn) * scale
    centre = len(pixels) / 2
    dx, dy = random.uniform(-1, 1, 2) * len(pixels) / 8
    offset = (centre - a * centre - b * centre + dx, centre + b * centre - a * centre + dy)
    matrix = (a, b, offset[0], -b, a, offset[1])
    picture = Image.fromarray(pixels).transform(
        pixels.shape[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(picture)
