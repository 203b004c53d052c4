"""The answers of one arm, item by item: choices, generated values, running text. Holds data only.

Shapes: N items or windows, T tokens, H hidden, L labels or choices, V tokens of a value.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Classified:
    """Answers to a task whose items are right or wrong: item ids, indices of the true and of the chosen label, and all
    label scores in nats. `answered` is the day of the answers if they are older than this run. `source_N` numbers the
    document of each item (None: every item is its own document).

    For a public task, `metric` names the score by which choices are made (`accuracy`, `accuracy_norm`, `exact_match`),
    `others` states for each of the task's other scores which items are right, `chance` is the accuracy of guessing, and
    `about` describes the data. The labels are then the numbers of the choices, whose meaning differs between items.
    `given_N`: the answers, if `chosen_N` only says whether they are right.
    """

    task: str
    labels: list[str]
    ids: list[str]
    truth_N: np.ndarray
    chosen_N: np.ndarray
    scores_NL: np.ndarray
    answered: str | None = None
    source_N: np.ndarray | None = None
    metric: str = ""
    others: dict[str, np.ndarray] = field(default_factory=dict)
    chance: float | None = None
    about: str = ""
    given_N: np.ndarray | None = None

    @property
    def right_N(self) -> np.ndarray:
        """Whether the chosen label is the true one."""
        return self.truth_N == self.chosen_N

    def same_answers(self, other: "Classified") -> bool:
        """Return whether both arms gave the same answers to all items."""
        pairs = ((self.chosen_N, other.chosen_N), (self.given_N, other.given_N))
        return all(bool((mine == theirs).all()) for mine, theirs in pairs if mine is not None and theirs is not None)


@dataclass(frozen=True)
class Rolled:
    """The losses of a public task's documents, read in windows, in nats per `unit`; weighted so that their mean is the
    loss over all documents.
    """

    task: str
    ids: list[str]
    loss_N: np.ndarray
    unit: str
    about: str = ""


@dataclass(frozen=True)
class Text:
    """A model's reading of held-out windows: the loss of each window in nats per token, and the hidden states and head
    that its logits are computed from.

    `head` is the model without its decoder (`lib.models.structure.logits`). `source_N` numbers the document of each
    window (None: every window is its own document). `name` names the text.
    """

    ids_NT: torch.Tensor
    loss_N: np.ndarray
    hidden_NTH: torch.Tensor = field(repr=False)
    head: nn.Module = field(repr=False)
    source_N: np.ndarray | None = None
    name: str = "held-out"


@dataclass(frozen=True)
class Retrieved:
    """Which values were repeated exactly over a distance in tokens. `answered` and `source_N` (the document of the text
    in between) are as in `Classified`. `given_NV` holds the generated tokens, right or wrong, if they are kept.
    """

    distance: int
    right_N: np.ndarray
    answered: str | None = None
    source_N: np.ndarray | None = None
    given_NV: np.ndarray | None = None

    def same_as(self, other: "Retrieved") -> bool:
        """Whether both arms generated the same tokens; if these are not kept, whether the same values were right."""
        if self.given_NV is None or other.given_NV is None:
            return bool((self.right_N == other.right_N).all())
        return bool((self.given_NV == other.given_NV).all())


@dataclass(frozen=True)
class Answers:
    """All answers of one arm. `reason` states why there are none (random weights). `idle` names the workloads in which
    the optimization never acted.
    """

    classified: list[Classified]
    text: Text | None
    retrieved: Retrieved | None
    reason: str | None = None
    idle: frozenset[str] = frozenset()
    rolled: list[Rolled] = field(default_factory=list)
