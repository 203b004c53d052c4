"""Published relations that this run should reproduce, each with its outcome (*held*, *not held* or *cannot tell*) and
the numbers behind it. Judged in `lib.optimizations.common.evidence.relations`; knows no optimization.
"""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lib.report.text.wording import signed

Outcome = Literal["held", "not held", "cannot tell"]
COLUMNS = ("what others found", "published", "here", "evidence", "source")


class Relation(BaseModel):
    """One published relation, its figures and their source, and whether this run's numbers show it too."""

    model_config = ConfigDict(extra="forbid")
    relation: str
    published: str
    source: str
    outcome: Outcome
    evidence: str


def decide(relation: str, published: str, source: str, held: bool | None, evidence: str) -> Relation:
    """Return a relation with its outcome; `held` says whether it held here, None if the run cannot tell.

    `evidence` is a phrase with the numbers. Raises ValueError where it is empty.
    """
    if not evidence:
        raise ValueError("an outcome needs its evidence: the numbers it rests on, or why there are none")
    outcome: Outcome = "cannot tell" if held is None else "held" if held else "not held"
    return Relation(relation=relation, published=published, source=source, outcome=outcome, evidence=evidence)


def rows(relations: Iterable[Relation]) -> list[tuple[str, ...]]:
    """Return a row for each relation, in the order of `COLUMNS`."""
    return [(r.relation, r.published, signed(state(r)), r.evidence, r.source) for r in relations]


def state(relation: Relation) -> str:
    """Return the outcome as one word, the key of its sign and style: `not_held`."""
    return relation.outcome.replace(" ", "_")
