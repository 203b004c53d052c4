"""What one arm answered, item by item: choices, generated values, running text. Data only; knows no model.

Shapes: N items or windows, T tokens, H hidden, L labels or choices, V tokens of a value.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Classified:
    """Answers to a task whose items are right or wrong: ids of the items, the indices of the true and of the chosen
    label, all label scores in nats. `answered` is the day of the answers where they are older than this run, `source_N`
    the document of each item (None: each is its own).

    Of a public task `metric` names the score by which its choices are made (`accuracy`, `accuracy_norm`,
    `exact_match`), `others` holds what the task's other scores call right, item by item, `chance` the accuracy of
    guessing and `about` its data. Labels are then the numbers of the choices, which differ in meaning from item to
    item.
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

    @property
    def right_N(self) -> np.ndarray:
        """Whether the chosen label is the true one."""
        return self.truth_N == self.chosen_N


@dataclass(frozen=True)
class Rolled:
    """The losses of documents of a public task, read in windows: nats per `unit`, weighted so that their mean is the
    loss of all documents together.
    """

    task: str
    ids: list[str]
    loss_N: np.ndarray
    unit: str
    about: str = ""


@dataclass(frozen=True)
class Text:
    """How a model read held-out windows: nats per token of each window, and what its logits are computed from.

    `head` is the model without its decoder (`lib.models.structure.logits`); `source_N` is the document of each window
    (None: each is its own), `name` says which text it is.
    """

    ids_NT: torch.Tensor
    loss_N: np.ndarray
    hidden_NTH: torch.Tensor = field(repr=False)
    head: nn.Module = field(repr=False)
    source_N: np.ndarray | None = None
    name: str = "held-out"


@dataclass(frozen=True)
class Retrieved:
    """Which values were repeated exactly over a distance in tokens; `answered` and `source_N`, the document of the text
    between, as in `Classified`. `given_NV`: the tokens that were generated, right or wrong, where they are kept.
    """

    distance: int
    right_N: np.ndarray
    answered: str | None = None
    source_N: np.ndarray | None = None
    given_NV: np.ndarray | None = None

    def same_as(self, other: "Retrieved") -> bool:
        """Whether both gave the same answers; where wrong ones are not kept, whether the same ones were right."""
        if self.given_NV is None or other.given_NV is None:
            return bool((self.right_N == other.right_N).all())
        return bool((self.given_NV == other.given_NV).all())


@dataclass(frozen=True)
class Answers:
    """All answers of one arm. `reason` says why there are none (for random weights), `idle` names the workloads in
    which the optimization never acted.
    """

    classified: list[Classified]
    text: Text | None
    retrieved: Retrieved | None
    reason: str | None = None
    idle: frozenset[str] = frozenset()
    rolled: list[Rolled] = field(default_factory=list)
