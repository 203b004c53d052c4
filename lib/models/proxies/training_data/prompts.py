"""The classification prompts of training, which ask for the class of a text and are answered by label or teacher.

Labelled pieces are few, and a model that sees each of them dozens of times memorises them. Varied prompts are about
excerpts that start anywhere, two joined excerpts, or unlabelled text, with some tokens replaced; the teacher answers
prompts without a label. Uses the tokenizer and the training text; knows nothing of rows of running text.

Shapes: B prompts, L classes.
"""

from dataclasses import dataclass

import numpy as np

from lib.models.proxies.config import TrainingConfig
from lib.models.proxies.training_data import teacher
from lib.models.structure.loaded_model import LoadedModel
from lib.models.tasks import tasks

CHARACTERS = 560
CANDIDATES = 3  # unlabelled texts, of which the one with the teacher's most confident answer is used


@dataclass
class TrainingPrompts:
    """Rows of token ids, each a prompt that ends with its answer.

    prefix_length: number of tokens that all rows share at the beginning. answer_length: tokens of each answer.
    corrupted: mask of the replaced tokens of each row. answers_BL: the probability of each class, if answers are not
    single labels.
    """

    rows: list[list[int]]
    prefix_length: int
    answer_length: int
    corrupted: list[np.ndarray] | None = None
    answers_BL: np.ndarray | None = None

    def halves(self) -> list["TrainingPrompts"]:
        """Return the shorter and the longer half of the rows, which as batches contain less padding."""
        order = np.argsort([len(row) for row in self.rows], kind="stable")
        parts = [part for part in np.array_split(order, 2) if len(part)]
        return [
            TrainingPrompts(
                [self.rows[row] for row in part],
                self.prefix_length,
                self.answer_length,
                None if self.corrupted is None else [self.corrupted[row] for row in part],
                None if self.answers_BL is None else self.answers_BL[part],
            )
            for part in parts
        ]


def plain(
    random: np.random.Generator, loaded: LoadedModel, pieces: dict[str, list[str]], config: TrainingConfig
) -> TrainingPrompts:
    """Return prompts about single excerpts, with all classes equally likely."""
    task = task_of(loaded)
    labels = random.choice(list(pieces), config.prompts)
    texts = [excerpt(random, _pick(random, pieces[label])) for label in labels]
    rows = [_ids(loaded, tasks.prompt_of(task, text)) + _ids(loaded, f" {label}") for text, label in zip(texts, labels)]
    return TrainingPrompts(rows, _prefix_length(loaded, task), 1)


def varied(
    random: np.random.Generator,
    loaded: LoadedModel,
    pieces: dict[str, list[str]],
    unlabelled: list[str],
    stream_T: np.ndarray,
    config: TrainingConfig,
) -> TrainingPrompts:
    """Return prompts about varied texts, answered by the teacher's probabilities, averaged with the label if any."""
    task, labels = task_of(loaded), list(pieces)
    part = tasks.CORPUS[task]
    texts, text_labels = [], []
    for label in random.choice(labels, config.prompts):
        text, text_label = _varied_text(random, part, label, pieces, unlabelled, config)
        texts.append(text)
        text_labels.append(text_label)
    answers_BL = teacher.probabilities(part, texts)
    for row, text_label in enumerate(text_labels):
        if text_label is not None:
            answers_BL[row] = 0.5 * answers_BL[row] + 0.5 * (np.array(labels) == text_label)
    prefix, suffix = _prefix_length(loaded, task), len(_ids(loaded, "\n\nModule:"))
    rows, corrupted = [], []
    for text, answer_L in zip(texts, answers_BL):
        ids = np.array(_ids(loaded, tasks.prompt_of(task, text)) + _ids(loaded, f" {labels[answer_L.argmax()]}"))
        rate = random.uniform(0, config.replaced_share) if random.random() < 0.5 else 0.0
        replaced = random.random(len(ids)) < rate
        replaced[:prefix] = replaced[len(ids) - suffix - 1 :] = False
        ids[replaced] = random.choice(stream_T, int(replaced.sum()))
        rows.append(ids.tolist())
        corrupted.append(replaced)
    return TrainingPrompts(rows, prefix, 1, corrupted, answers_BL)


def _varied_text(
    random: np.random.Generator,
    part: str,
    label: str,
    pieces: dict[str, list[str]],
    unlabelled: list[str],
    config: TrainingConfig,
) -> tuple[str, str | None]:
    """Return a text and its label; None, so that only the teacher answers, for unlabelled text or two classes."""
    kind = random.random()
    if kind < config.teacher_share:
        candidates = [excerpt(random, _pick(random, unlabelled), 200) for _ in range(CANDIDATES)]
        surest = teacher.probabilities(part, candidates).max(1).argmax()
        return candidates[surest], None
    if kind < config.teacher_share + config.joined_share:
        second_label = label if random.random() < 0.7 else random.choice(list(pieces))
        halves = [excerpt(random, _pick(random, pieces[name]), 110, 270) for name in (label, second_label)]
        return "\n\n".join(halves), label if second_label == label else None
    return excerpt(random, _pick(random, pieces[label]), 200), label


def excerpt(random: np.random.Generator, piece: str, least: int = 300, most: int = CHARACTERS) -> str:
    """Return `least` to `most` characters of `piece` (fewer if it is short), starting at a random line or the first."""
    lines = [at + 1 for at, character in enumerate(piece[:-200]) if character == "\n"]
    start = int(random.choice(lines)) if lines and random.random() < 0.5 else 0
    return piece[start : start + int(random.integers(least, most + 1))].strip("\n")


def task_of(loaded: LoadedModel) -> str:
    """Return the classification task of a model on its own corpus."""
    part = tasks.corpus_of(loaded)
    return next(task for task in loaded.parameters.tasks if tasks.CORPUS.get(task) == part)


def _pick(random: np.random.Generator, pieces: list[str]) -> str:
    return pieces[random.integers(len(pieces))]


def _ids(loaded: LoadedModel, text: str) -> list[int]:
    return loaded.tokenizer(text, add_special_tokens=False).input_ids


def _prefix_length(loaded: LoadedModel, task: str) -> int:
    return len(_ids(loaded, tasks.prompt_of(task).split("\n")[0]))
