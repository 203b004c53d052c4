"""The questions of training: which class a text is of, with answers by label or by advice.

Labelled pieces are few, and a model that sees each of them dozens of times learns them by heart. Varied questions are
about excerpts that start anywhere, two excerpts joined, text of no class, with some tokens replaced; what no label
answers, a linear classifier does. Knows the tokenizer and the training text; knows nothing of rows of running text.

Shapes: B questions, L classes.
"""

from dataclasses import dataclass

import numpy as np

from lib.models.proxies.config import Recipe
from lib.models.proxies.teacher import advice
from lib.models.tasks import tasks

CHARACTERS = 560
CANDIDATES = 3  # texts of no class of which the one with the clearest answer is asked about


@dataclass
class Questions:
    """Rows of token ids, each one question with its answer as last tokens; opening: tokens that all rows begin with.

    spoilt: per row, which tokens were replaced. answers_BL: the probability of each class, where not only one counts.
    """

    rows: list[list[int]]
    opening: int
    answer: int
    spoilt: list[np.ndarray] | None = None
    answers_BL: np.ndarray | None = None

    def halves(self) -> list["Questions"]:
        """Return the shorter and the longer half of the rows, so that less of a batch is padding."""
        order = np.argsort([len(row) for row in self.rows], kind="stable")
        parts = [part for part in np.array_split(order, 2) if len(part)]
        return [
            Questions(
                [self.rows[row] for row in part],
                self.opening,
                self.answer,
                None if self.spoilt is None else [self.spoilt[row] for row in part],
                None if self.answers_BL is None else self.answers_BL[part],
            )
            for part in parts
        ]


def plain(random: np.random.Generator, loaded, pieces: dict[str, list[str]], recipe: Recipe) -> Questions:
    """Return questions about single excerpts, every class equally often."""
    task = task_of(loaded)
    chosen = random.choice(list(pieces), recipe.questions)
    texts = [excerpt(random, _any(random, pieces[label])) for label in chosen]
    rows = [_ids(loaded, tasks.prompt_of(task, text)) + _ids(loaded, f" {label}") for text, label in zip(texts, chosen)]
    return Questions(rows, _opening(loaded, task), 1)


def varied(
    random: np.random.Generator, loaded, pieces: dict[str, list[str]], others: list[str], stream_T, recipe: Recipe
) -> Questions:
    """Return questions about varied texts, a share of them of no class; the answers are the labels' or advice."""
    task, labels = task_of(loaded), list(pieces)
    part = tasks.CORPUS[task]
    texts, known = [], []
    for label in random.choice(labels, recipe.questions):
        kind = random.random()
        if kind < recipe.advised:
            found = [excerpt(random, _any(random, others), 200) for _ in range(CANDIDATES)]
            clear = advice(part, found).max(1).argmax()
            texts.append(found[clear])
            known.append(None)
        elif kind < recipe.advised + recipe.joined:
            other = label if random.random() < 0.7 else random.choice(labels)
            halves = [excerpt(random, _any(random, pieces[name]), 110, 270) for name in (label, other)]
            texts.append("\n\n".join(halves))
            known.append(label if other == label else None)
        else:
            texts.append(excerpt(random, _any(random, pieces[label]), 200))
            known.append(label)
    answers_BL = advice(part, texts)
    for row, label in enumerate(known):
        if label is not None:
            answers_BL[row] = 0.5 * answers_BL[row] + 0.5 * (np.array(labels) == label)
    opening, ending = _opening(loaded, task), len(_ids(loaded, "\n\nModule:"))
    rows, spoilt = [], []
    for text, answer_L in zip(texts, answers_BL):
        ids = np.array(_ids(loaded, tasks.prompt_of(task, text)) + _ids(loaded, f" {labels[answer_L.argmax()]}"))
        rate = random.uniform(0, recipe.replaced) if random.random() < 0.5 else 0.0
        wrong = random.random(len(ids)) < rate
        wrong[:opening] = wrong[len(ids) - ending - 1 :] = False
        ids[wrong] = random.choice(stream_T, int(wrong.sum()))
        rows.append(ids.tolist())
        spoilt.append(wrong)
    return Questions(rows, opening, 1, spoilt, answers_BL)


def excerpt(random: np.random.Generator, piece: str, least: int = 300, most: int = CHARACTERS) -> str:
    """Return at least `least`, at most `most` characters of `piece` if it has them, from the start of some line."""
    lines = [at + 1 for at, character in enumerate(piece[:-200]) if character == "\n"]
    start = int(random.choice(lines)) if lines and random.random() < 0.5 else 0
    return piece[start : start + int(random.integers(least, most + 1))].strip("\n")


def task_of(loaded) -> str:
    """Return the classification task of a model that asks about its own text."""
    part = tasks.corpus_of(loaded)
    return next(task for task in loaded.parameters.tasks if tasks.CORPUS.get(task) == part)


def _any(random: np.random.Generator, pieces: list[str]) -> str:
    return pieces[random.integers(len(pieces))]


def _ids(loaded, text: str) -> list[int]:
    return loaded.tokenizer(text, add_special_tokens=False).input_ids


def _opening(loaded, task: str) -> int:
    return len(_ids(loaded, tasks.prompt_of(task).split("\n")[0]))
