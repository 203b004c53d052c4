"""Test whether divergences of single parts add up to that of a whole choice, as the integer programme assumes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lib.optimizations.continuous_nas.method import ChoiceEvaluation, Search
from lib.optimizations.continuous_nas.mip import CostTable

RANK_LIMIT = 0.5


@dataclass(frozen=True)
class Additivity:
    """Predicted (x) against measured (y) divergence of the `evaluations` of whole models, and their rank correlation.

    `left_out`: "slot: option" of each option without a finite divergence → the reason.
    """

    evaluations: list[ChoiceEvaluation]
    pairs: pd.DataFrame
    rank: float
    left_out: dict[str, str] = field(default_factory=dict)

    def refuted(self) -> tuple[bool | None, str]:
        """Return whether the rank correlation lies below RANK_LIMIT with its 95 % interval (Bonett & Wright 2000)."""
        count = len(self.evaluations)
        if count < 5 or not np.isfinite(self.rank):
            return None, f"{count} choices were judged whole: too few for an interval"
        spread = 1.96 * np.sqrt((1 + self.rank**2 / 2) / (count - 3))
        centre = np.arctanh(np.clip(self.rank, -0.999999, 0.999999))
        low, high = np.tanh(centre - spread), np.tanh(centre + spread)
        evidence = f"rank correlation {self.rank:.2f} ({low:.2f} to {high:.2f}), {count} choices"
        return (True if high < RANK_LIMIT else False if low >= RANK_LIMIT else None), evidence


def compare(search: Search, scores: Mapping[str, Mapping[str, float]]) -> Additivity:
    """Compare summed with measured divergences of every choice evaluated as a whole model with a finite result."""
    table = CostTable("KL", scores)
    whole = (e for e in search.evaluations if e.phase != "library" and search.open_to(e.choice))
    judged = [evaluation for evaluation in whole if np.isfinite(evaluation.divergence)]
    pairs = pd.DataFrame({"x": [table.of(e.choice) for e in judged], "y": [e.divergence for e in judged]})
    rank = float(spearmanr(pairs.x, pairs.y).statistic) if len(pairs) > 1 else float("nan")
    pairs["arm"] = [evaluation.phase.rpartition(": ")[2] for evaluation in judged]
    left_out = {f"{slot}: {option}": reason for (slot, option), reason in search.left_out.items()}
    return Additivity(judged, pairs, rank, left_out)
