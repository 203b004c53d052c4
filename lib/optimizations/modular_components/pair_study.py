"""Results on the parts as frames and sentences: attempts of every ordered pair, and contrasts of arms timed in the same
rounds.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import binom

from lib.measure.metrics.catalogue import SPEED_MARGIN
from lib.measure.metrics.digits import signed
from lib.optimizations.common.evidence import interactions
from lib.optimizations.modular_components import attempts, method
from lib.optimizations.modular_components.attempts import Attempt

Pair = tuple[str, str]


@dataclass(frozen=True)
class PairStudy:
    """Attempts of each part alone and of every ordered pair; `forced` are the refused pairs, applied unchecked."""

    singles: dict[str, Attempt]
    pairs: dict[Pair, Attempt]
    forced: dict[Pair, Attempt] = field(default_factory=dict)

    @property
    def states(self) -> dict[Pair, tuple[str, str | None]]:
        """State and reason of each ordered pair."""
        return {key: (attempt.state, attempt.reason) for key, attempt in self.pairs.items()}

    @property
    def score(self) -> float | None:
        """The modularity score: working ordered pairs ÷ all that were tried."""
        return attempts.modularity(self.pairs)

    @property
    def count(self) -> int:
        """The number of ordered pairs that were tried."""
        return sum(attempt.state != "not tried" for attempt in self.pairs.values())

    def named(self, state: str) -> list[str]:
        """Return the names of the pairs in a state."""
        return [interactions.named(*key) for key, attempt in self.pairs.items() if attempt.state == state]

    @property
    def too_strict(self) -> list[str]:
        """The names of the pairs that were refused but worked when forced."""
        return [interactions.named(*key) for key, attempt in self.forced.items() if attempt.state == "works"]

    def table(self) -> pd.DataFrame:
        """Return a row per ordered pair."""
        rows = [
            {"first": first, "second": second, "state": attempt.state, "why": attempt.reason or ""}
            for (first, second), attempt in self.pairs.items()
        ]
        return pd.DataFrame(rows)

    def audit(self) -> list[dict[str, str]]:
        """Return a row per refused pair: the state and the reason when it was forced through."""
        return [
            {"refused pair": interactions.named(*key), "forced through": attempt.state, "why": attempt.reason or ""}
            for key, attempt in self.forced.items()
        ]


@dataclass(frozen=True)
class Contrasts:
    """Losses per window [N] of every arm, and contrasts: parts alone, pairs, either order, outdated statistics."""

    losses: dict[str, np.ndarray]
    alone: pd.DataFrame
    pairs: pd.DataFrame
    orders: pd.DataFrame
    stale: pd.DataFrame
    source: str

    @property
    def headings(self) -> dict[str, str]:
        """The measured quantities with their axis labels."""
        return {name: label for name, label in interactions.AXIS_LABELS.items() if name in self.pairs}

    def clear(self) -> dict[str, tuple[int, int]]:
        """Return for each quantity the number of intervals that exclude zero, and the number of all intervals.

        Intervals without width, from pairs that change no answer, do not count.
        """
        counts = {}
        for name in self.headings:
            ends = self.pairs[[f"{name}_low", f"{name}_high"]].dropna()
            low, high = ends.to_numpy(dtype=float).T
            wide = high > low
            counts[name] = (int((((low > 0) | (high < 0)) & wide).sum()), int(wide.sum()))
        return counts

    def reading(self) -> str:
        """Return two sentences on the heat maps: how many cells exclude zero, and the largest cell, with its interval
        if there are enough rounds for one.
        """
        cells = ((name, clear, f"of {total}" if total else "of none") for name, (clear, total) in self.clear().items())
        counts = ", ".join(f"{name} {clear} {total}" for name, clear, total in cells)
        if not counts:
            return "No pair of this model works. So there is no interaction to show."
        name = next(iter(self.headings))
        largest = self.pairs.iloc[int(np.nanargmax(self.pairs[name].abs()))]
        pair = interactions.named(largest["first"], largest["second"])

        def shown(value: float) -> str:
            return signed(value, ".4f") if name == "loss" else f"{signed(100 * value)} %"

        unit = "nats per token" if name == "loss" else "of the baseline's time"
        low, high = largest[f"{name}_low"], largest[f"{name}_high"]
        span = "without an interval" if pd.isna(low) else f"95 % interval {shown(low)} to {shown(high)}"
        return (
            f"Intervals exclude zero in these numbers of cells: {counts}. The largest {name} interaction is that of "
            f"{pair}, {shown(largest[name])} {unit} ({span})."
        )

    @property
    def losses_alone(self) -> dict[str, float]:
        """The loss of each part alone, nats per token; empty if no text was read."""
        return dict(zip(self.alone["part"], self.alone["loss"])) if "loss" in self.alone else {}

    def only_slower(self) -> dict[str, str]:
        """Return by stem the reason for each part that only slows the model down: alone it surely prefills slower by
        more than the practical margin, does not surely decode faster by as much, and saves no storage.
        """
        slower = {}
        for row in self.alone.to_dict("records"):
            low, high = row.get("prefill_low"), row.get("prefill_high")
            touched = set(method.module_of(row["part"]).COMPOSES["touches"])
            if low is None or high is None or not np.isfinite([low, high]).all() or touched & set(method.STORED):
                continue
            decoded = row.get("decode_low")
            if high < -SPEED_MARGIN and not (decoded is not None and decoded > SPEED_MARGIN):
                span = f"{np.exp(row['prefill']):.2f}× ({np.exp(low):.2f} to {np.exp(high):.2f})"
                slower[row["part"]] = f"alone it prefills at {span} of the speed, and stores nothing less"
        return slower

    def refuted(self) -> tuple[bool | None, str]:
        """Return whether more intervals exclude zero than one in twenty would by chance (binomial, 97.5 %).

        None if some do, but no more than chance explains, if chance would explain all, or if no pair works.
        """
        counts = self.clear().values()
        clear, total = sum(some for some, _ in counts), sum(every for _, every in counts)
        if not total:
            return None, "too few rounds for an interval" if self.headings else "no pair works"
        limit = int(binom.ppf(0.975, total, 0.05))
        evidence = f"{clear} of {total} intervals exclude zero; chance explains up to {limit}"
        if limit >= total:
            return None, f"{evidence}: too few intervals to tell more than chance"
        return (True if clear > limit else None if clear else False), evidence
