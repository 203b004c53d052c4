"""One feed-forward part over sparsity: its time and energy stored sparse, against the fastest dense form of it.

Two layouts at several shares of zeros and several numbers of tokens, and where each starts to win. Returns plain data.
Knows nothing of what the zeros do to answers.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import BRIEF, Effort
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks import part_speed
from lib.optimizations.sparse_neural_networks.part_speed import DenseForm

LAYOUTS = {"unstructured": "CSR", "16x1": "16x1"}  # pattern → what its storage is called in figures


@dataclass(frozen=True)
class PartPoint:
    """One layout at one share of zeros in percent: measurements of time and bytes, and of energy."""

    strength: int
    layout: str
    times_and_bytes: list[Measurement] = field(default_factory=list)
    energies: list[Measurement] = field(default_factory=list)

    @property
    def times(self) -> list[Measurement]:
        """The times alone, one for each number of tokens."""
        return [m for m in self.times_and_bytes if m.metric == "feed_forward_ms"]

    def arm(self) -> ThirdArm:
        """Return the point as a third arm of a record."""
        name = f"feed-forward part, {self.strength} % zeros, {self.layout}"
        return ThirdArm(name, "speed over strength", [*self.times_and_bytes, *self.energies])


def strengths(scale: str, effort: str) -> list[int]:
    """Return the shares of zeros of a sweep in percent: fewer at real dimensions, where a point takes long, fewer still
    at small efforts, and lower where a language model of real size answers, which collapses above 60 to 70 %.
    """
    if effort in BRIEF:
        return {"proxy": [50, 70, 90]}.get(scale, [50, 80])
    return {"proxy": [50, 60, 70, 80, 90, 95], "full": [50, 60, 80]}.get(scale, [50, 80, 90])


def dense_forms(loaded: Loaded, effort: Effort, seed: int) -> list[DenseForm]:
    """Return the fastest dense form of the middle block's feed-forward part for each number of tokens."""
    view = anatomy(loaded.model)
    part = view.blocks[len(view.blocks) // 2].feed_forward.module
    forms = {loaded.dtype: part}
    forms |= {kind: copy.deepcopy(part).to(kind) for kind in {torch.float32, torch.bfloat16} - {loaded.dtype}}
    return [part_speed.fastest(forms, tokens, view.hidden, effort.blocks, seed) for tokens in part_speed.TOKENS]


def dense_table(denses: Sequence[DenseForm]) -> pd.DataFrame:
    """Return the fastest dense form for each number of tokens with its noise floor in percent."""
    rows = [
        {"tokens": dense.work.tokens, "fastest dense form": str(dense.dtype)}
        | {"noise floor, %": round(100 * dense.control.floor(), 1)}
        for dense in denses
    ]
    return pd.DataFrame(rows)


def fastest_dense(denses: Sequence[DenseForm]) -> dict[str, str]:
    """Return the dtype of the fastest dense form by number of tokens."""
    return {f"{dense.work.tokens} tokens": str(dense.dtype) for dense in denses}


def run(loaded: Loaded, denses: Sequence[DenseForm], effort: Effort, effort_name: str, seed: int) -> list[PartPoint]:
    """Return the part stored in each layout at each share of zeros (at preview the least and the largest), against its
    fastest dense forms. A layout whose blocks do not divide the part's matrices is left out.
    """
    view, points = anatomy(loaded.model), []
    shares = strengths(loaded.scale, effort_name)
    part = view.blocks[len(view.blocks) // 2].feed_forward.module
    for layout in (layout for layout in LAYOUTS if sparse.fits(part, layout)):
        for strength in (shares[0], shares[-1]) if effort.preview else shares:
            arm = sparse.feed_forward(part, strength / 100, layout)
            point = PartPoint(strength, layout)
            for dense in denses:
                point.times_and_bytes.extend(part_speed.compare(dense, arm, loaded.dtype, effort.blocks))
                where = (dense.work.tokens, strength, effort_name, loaded.device, loaded.scale)
                if part_speed.metered(*where):
                    point.energies.extend(part_speed.joules(dense, arm, loaded.dtype, seed))
            del arm
            points.append(point)
    return points


def times(points: Sequence[PartPoint]) -> pd.DataFrame:
    """Return the speed-up over the fastest dense form: columns `strength`, `arm`, `value`, `low`, `high`, `verdict`."""
    return pd.DataFrame([_row(point, m) for point in points for m in point.times if m.ratio])


def _row(point: PartPoint, m: Measurement) -> dict[str, object]:
    low, high = m.ci or (None, None)
    row = {"strength": point.strength, "arm": _name(point, m), "value": 1 / m.ratio if m.ratio else None}
    return row | {"low": 1 / high if high else None, "high": 1 / low if low else None, "verdict": m.verdict}


def _name(point: PartPoint, m: Measurement) -> str:
    tokens = m.workload.removeprefix("feed-forward part, ")
    return f"{LAYOUTS[point.layout]}, {tokens}"  # as in the record's `crossover_percent`


def csr(curves: pd.DataFrame) -> list[str]:
    """Return the arms stored as CSR."""
    return [str(arm) for arm in curves["arm"].unique() if LAYOUTS["unstructured"] in arm]


def crossovers(curves: pd.DataFrame) -> dict[str, float | None]:
    """Return by arm the share of zeros in percent from which on it stays faster than dense; None where it never is."""
    return {
        str(arm): part_speed.crossover(list(curve.strength), list(curve.value))
        for arm, curve in curves.groupby("arm", sort=False)
    }


def read_crossovers(curves: pd.DataFrame) -> tuple[str, str]:
    """Return two sentences: how many arms ever win for good, as measured and by verdict, and which wins from the least
    sparsity on.
    """
    shares = crossovers(curves)
    winners = {arm: share for arm, share in shares.items() if share is not None}
    above = (
        f"{len(winners)} of {len(shares)} sparse arms measure faster than the fastest dense form from some sparsity on"
    )
    if not winners:
        return f"{above}.", "At the sparsities measured, no zero was seen to pay in time."
    judged = set(curves["arm"][curves["verdict"] == "better"]) & {*winners}
    first = f"{above}, {len(judged) or 'none'} of them by a verdict."
    arm, share = min(winners.items(), key=lambda pair: pair[1])
    return first, f"The earliest is {arm}, from {share:.0f} % zeros on."


def energies(points: Sequence[PartPoint]) -> pd.DataFrame:
    """Return joules per token over the fastest dense form's: `strength`, `arm`, `value` (ratio), and `joules`."""
    rows = [
        {"strength": point.strength, "arm": _name(point, m)}
        | {"value": m.ratio, "joules": m.optimized, "provenance": m.provenance}
        for point in points
        for m in point.energies
        if m.metric == "energy_joules_per_token"
    ]
    return pd.DataFrame(rows)


def weights_bytes(points: Sequence[PartPoint]) -> pd.DataFrame:
    """Return the megabytes of the part stored sparse against dense, a row per layout and share of zeros."""
    rows = []
    for point in points:
        size = next(m for m in point.times_and_bytes if m.metric == "weights_bytes")
        dense, stored = (None if held is None else held / 1e6 for held in (size.baseline, size.optimized))
        row = {"layout": LAYOUTS[point.layout], "zeros, %": point.strength, "dense, MB": dense}
        rows.append(row | {"stored sparse, MB": stored, "ratio": size.ratio})
    return pd.DataFrame(rows)


def details(curves: pd.DataFrame) -> dict[str, dict[str, object]]:
    """Return what a record holds of the sweep beside measurements: name → value, provenance, source."""
    source = f"{part_speed.TOKENS} tokens, gain over the fastest dense form, between two strengths by interpolation"
    return {"crossover_percent": {"value": crossovers(curves), "provenance": "derived", "source": source}}
