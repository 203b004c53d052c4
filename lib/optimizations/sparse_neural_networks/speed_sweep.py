"""Speed sweep of one feed-forward part over sparsity: time and energy stored sparse, against its fastest dense form.

Two layouts at several shares of zeros and token counts, with the crossover of each. Returns plain data; independent of
the effect of the zeros on quality.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.process_variance import PART_SIGMA
from lib.measure.metrics.settings import BRIEF, Effort
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks import part_speed
from lib.optimizations.sparse_neural_networks.part_speed import DenseForm

LAYOUTS = {"unstructured": "CSR", "16x1": "16x1"}  # pattern → name of its storage in figures


@dataclass(frozen=True)
class PartPoint:
    """One layout at one share of zeros in percent: measurements of time and bytes, and of energy."""

    strength: int
    layout: str
    times_and_bytes: list[Measurement] = field(default_factory=list)
    energies: list[Measurement] = field(default_factory=list)

    @property
    def times(self) -> list[Measurement]:
        """The measurements of time, one per token count."""
        return [m for m in self.times_and_bytes if m.metric == "feed_forward_ms"]

    def arm(self) -> ThirdArm:
        """Return the point as a third arm of a record."""
        name = f"feed-forward part, {self.strength} % zeros, {self.layout}"
        return ThirdArm(name, "speed over strength", [*self.times_and_bytes, *self.energies])


def strengths(scale: str, effort: str) -> list[int]:
    """Return the shares of zeros of a sweep, in percent.

    Fewer at real dimensions, where a point takes long, and at small efforts; lower for language models of real size,
    which collapse above 60 to 70 %.
    """
    if effort in BRIEF:
        return {"proxy": [50, 70, 90]}.get(scale, [50, 80])
    return {"proxy": [50, 60, 70, 80, 90, 95], "full": [50, 60, 80]}.get(scale, [50, 80, 90])


def dense_forms(loaded: Loaded, effort: Effort, seed: int) -> list[DenseForm]:
    """Return the fastest dense form of the middle block's feed-forward part for each token count."""
    view = anatomy(loaded.model)
    part = view.blocks[len(view.blocks) // 2].feed_forward.module
    forms = {loaded.dtype: part}
    forms |= {kind: copy.deepcopy(part).to(kind) for kind in {torch.float32, torch.bfloat16} - {loaded.dtype}}
    return [part_speed.fastest(forms, tokens, view.hidden, effort.blocks, seed) for tokens in part_speed.TOKENS]


def dense_table(denses: Sequence[DenseForm]) -> pd.DataFrame:
    """Return the fastest dense form for each token count, with its noise floor in percent."""
    rows = [
        {"tokens": dense.work.tokens, "fastest dense form": str(dense.dtype)}
        | {"noise floor, %": round(100 * dense.control.floor(PART_SIGMA), 1)}
        for dense in denses
    ]
    return pd.DataFrame(rows)


def fastest_dense(denses: Sequence[DenseForm]) -> dict[str, str]:
    """Return the dtype of the fastest dense form by token count."""
    return {f"{dense.work.tokens} tokens": str(dense.dtype) for dense in denses}


def run(loaded: Loaded, denses: Sequence[DenseForm], effort: Effort, effort_name: str, seed: int) -> list[PartPoint]:
    """Return the points of the sweep: the part in each layout at each share of zeros, against its fastest dense forms.

    At preview only the smallest and the largest share. Skips layouts whose blocks do not divide the part's matrices.
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
                if part_speed.metered(dense.work.tokens, strength, effort_name, loaded.device, loaded.scale):
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
    """Return arm → share of zeros, in percent, from which it stays faster than dense; None if it never does."""
    return {
        str(arm): part_speed.crossover(list(curve.strength), list(curve.value))
        for arm, curve in curves.groupby("arm", sort=False)
    }


def read_crossovers(curves: pd.DataFrame) -> tuple[str, str]:
    """Return two sentences: how many arms have a crossover, as measured and by verdict, and which arm's is lowest."""
    shares = crossovers(curves)
    winners = {arm: share for arm, share in shares.items() if share is not None}
    count = f"{len(winners)} of {len(shares)} sparse arms"
    above = f"{count} measure faster than the fastest dense form above some sparsity"
    if not winners:
        return f"{above}.", "At the sparsities measured, zeros saved no time."
    judged = set(curves["arm"][curves["verdict"] == "better"]) & {*winners}
    first = f"{above}, {len(judged) or 'none'} of them by a verdict."
    arm, share = min(winners.items(), key=lambda pair: pair[1])
    return first, f"The earliest is {arm}, from {share:.0f} % zeros."


def energies(points: Sequence[PartPoint]) -> pd.DataFrame:
    """Return energy per token: `strength`, `arm`, `value` (ratio to the fastest dense form), `joules`, `provenance`."""
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
        dense, stored = (None if nbytes is None else nbytes / 1e6 for nbytes in (size.baseline, size.optimized))
        row = {"layout": LAYOUTS[point.layout], "zeros, %": point.strength, "dense, MB": dense}
        rows.append(row | {"stored sparse, MB": stored, "ratio": size.ratio})
    return pd.DataFrame(rows)


def details(curves: pd.DataFrame) -> dict[str, dict[str, object]]:
    """Return the record's details of the sweep: name → value, provenance and source."""
    source = f"{part_speed.TOKENS} tokens, gain over the fastest dense form, interpolated between strengths"
    return {"crossover_percent": {"value": crossovers(curves), "provenance": "derived", "source": source}}
