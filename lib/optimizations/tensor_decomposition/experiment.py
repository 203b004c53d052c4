"""The protocol of the tensor-decomposition notebook: one spectrum, the ranks, and the factored model.

Its rivals are in `rivals`. Returns plain data. Knows nothing of tables, figures or records.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.measure.metrics.settings import Effort
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import factored
from lib.models.tasks import tasks as prompts
from lib.optimizations.common.compression import calibration_text, facts
from lib.optimizations.common.compression import options as checks
from lib.optimizations.tensor_decomposition import allocation
from lib.optimizations.tensor_decomposition import method as decomposition
from lib.optimizations.tensor_decomposition.analysis import Spectra, matrices
from lib.optimizations.tensor_decomposition.low_rank import FactorableMatrix, spectrum_of

# The measurement that decides the verdict of each dimension, declared before any is taken.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
BARE, FITTED = "plain", "whitened"
AUTO = "auto"  # refined on a proxy model; at real sizes refitted in closed form
SHOWN_RANKS, SHOWN_LEAST = 48, 1e-4  # points of a curve of singular values, and the least share of the largest
PREVIEW_BLOCKS = 2  # in which the worth of matrices is measured at effort preview

Ranks = dict[str, "int | None"]


@dataclass(frozen=True)
class FactoringSetup:
    """A model, its calibration text, and the spectra of its matrices by method; those of its own took `seconds`.

    Random weights have no leading directions: there `method` is "random" and `budget` "uniform".
    """

    loaded: Loaded
    effort: Effort
    method: str
    budget: str
    refine_steps: int
    calibration: list[dict[str, torch.Tensor]]
    finetune_batches: list[dict[str, torch.Tensor]]
    spectra: dict[str, Spectra]
    seconds: float
    seed: int

    @property
    def baseline(self) -> nn.Module:
        return self.loaded.model

    @property
    def random_weights(self) -> bool:
        return self.loaded.random_weights

    @property
    def taught(self) -> str:
        """The method that fits factors to the original block's output."""
        return "refitted" if self.method == "refitted" else "refined"

    @property
    def middle(self) -> int:
        """The index of the block that is shown."""
        return len(anatomy(self.baseline).blocks) // 2

    @property
    def shown(self) -> list[FactorableMatrix]:
        """The matrices of the block that is shown."""
        return matrices(self.baseline, self.middle)

    @property
    def widest(self) -> FactorableMatrix:
        """The largest linear layer of the block that is shown."""
        linear = (matrix for matrix in self.shown if matrix.side == "linear")
        return max(linear, key=lambda matrix: matrix.elements(None))

    def facts(self) -> dict[str, object]:
        """Return what is about to be factored, for a table."""
        return facts.about(
            self.loaded,
            method=self.method,
            matrices=len(matrices(self.baseline)),
            decoder_bytes=f"{allocation.decoder_bytes(self.baseline):,}",
        )


def set_up(
    loaded: Loaded, effort: Effort, compression: float, method: str, budget: str, refine_steps: int, seed: int
) -> FactoringSetup:
    """Return the model with its calibration text and the spectra that the arms need, each read once; `seconds` are
    those of the method's own, not of its control's.

    method: one of those of the optimization, or AUTO. Raises UserError, before any text is read, for another one, for
    an unknown budget, and for a compression out of range or out of reach; NotApplicable too where the weights of the
    model stream from a file.
    """
    checks.changeable(loaded.model)
    checks.in_range(decomposition.NAME, "compression", compression, 0, 1, closed="neither")
    valid = {"method": (method, (AUTO, *decomposition.METHODS)), "budget": (budget, decomposition.BUDGETS)}
    checks.choices(decomposition.NAME, valid)
    if factorable := matrices(loaded.model):
        allocation.room_for(loaded.model, factorable, compression)
    count = calibration_text.sequences(loaded.model, effort)
    calibration = prompts.calibration(loaded, count, effort.calibration_tokens, seed)
    finetune_batches = prompts.calibration(
        loaded, min(16, effort.calibration_sequences // 2), 256, seed, tokens_at_once=256 if effort.preview else 512
    )
    if loaded.random_weights:
        method, budget, kinds = "random", "uniform", ["random"]
    else:
        method = ("refined" if loaded.scale == "proxy" else "refitted") if method == AUTO else method
        kinds = [BARE, FITTED, *{method} & {"random"}]
    few: dict[str, Any] = {"seed": seed, "weighed_blocks": weighed_blocks(effort)}
    spectra, took = {}, {}
    for kind in kinds:
        start = time.perf_counter()
        spectra[kind] = decomposition.analyse(loaded.model, calibration, kind, **few)
        spectra[kind].curves()
        took[kind] = time.perf_counter() - start
    if FITTED in spectra:
        spectra |= {"refined": spectra[FITTED], "refitted": spectra[FITTED]}
    seconds = next(took[kind] for kind in kinds if spectra[kind] is spectra[method])
    options: dict[str, Any] = {
        "method": method,
        "budget": budget,
        "refine_steps": refine_steps,
        "seconds": seconds,
        "seed": seed,
    }
    return FactoringSetup(
        loaded, effort, calibration=calibration, finetune_batches=finetune_batches, spectra=spectra, **options
    )


def weighed_blocks(effort: Effort) -> int | None:
    """Return in how many blocks at most the worth of matrices is measured; None: as everywhere else."""
    return PREVIEW_BLOCKS if effort.preview else None


# --- the mechanism ---------------------------------------------------------------------------------------------------


def singular_values(setup: FactoringSetup) -> tuple[pd.DataFrame, float]:
    """Return the singular values of the widest matrix over the largest, and the seconds that its plain spectrum took.

    One row per rank (`strength`), method (`arm`) and `value`; whitened ones are seen through calibration inputs. For a
    figure see `thinned`.
    """
    matrix = setup.widest
    start = time.perf_counter()
    spectra = {BARE: spectrum_of(matrix)}
    seconds = time.perf_counter() - start
    for curve in setup.spectra[FITTED].curves() if FITTED in setup.spectra else ():
        if curve.matrix.name == matrix.name:
            spectra[FITTED] = curve
    curves = []
    for name, spectrum in spectra.items():
        values = (spectrum.energy_R[: min(matrix.shape)] / spectrum.energy_R[0]).sqrt()
        ranks = range(1, len(values) + 1)
        curves.append(pd.DataFrame({"strength": ranks, "value": values.tolist(), "arm": name}))
    return pd.concat(curves), seconds


def thinned(curves: pd.DataFrame) -> pd.DataFrame:
    """Return about SHOWN_RANKS points of each curve of `singular_values`, none of them below SHOWN_LEAST."""
    steps = {arm: max(1, len(curve) // SHOWN_RANKS) for arm, curve in curves.groupby("arm")}
    shown = curves[(curves["strength"] - 1) % curves["arm"].map(steps) == 0]
    return shown.assign(value=shown["value"].clip(lower=SHOWN_LEAST))


def read_singular_values(curves: pd.DataFrame, break_even: float) -> tuple[str, str]:
    """Return two sentences: how many ranks stand out, and how much is left at the break-even rank."""
    by_arm = [(str(arm), curve) for arm, curve in curves.groupby("arm", sort=False)]
    above = {arm: curve.strength[curve.value > 0.5].max() for arm, curve in by_arm}
    tails = {arm: curve.value[curve.strength <= break_even].iloc[-1] for arm, curve in by_arm}
    first = ", ".join(f"{rank:.0f} ({arm})" for arm, rank in above.items())
    second = ", ".join(f"{value:.2g} ({arm})" for arm, value in tails.items())
    return (
        f"Singular values are above half the largest up to rank {first}.",
        f"At the break-even rank {break_even:.0f}, above which factors save nothing, they are {second} of the largest.",
    )


def allocations(setup: FactoringSetup, compression: float) -> dict[str, Ranks]:
    """Return the rank of every matrix that each kind of factors gets from the budget."""
    return {
        name: allocation.allocate(setup.baseline, spectra.curves(), compression, setup.budget)
        for name, spectra in setup.spectra.items()
        if name not in ("refined", "refitted")
    }


def rank_table(setup: FactoringSetup, ranks: dict[str, Ranks]) -> pd.DataFrame:
    """Return the ranks in the block that is shown, a row for each matrix with its shape and break-even rank."""
    rows = []
    for matrix in setup.shown:
        shape = " × ".join(map(str, matrix.shape))
        row = {"matrix": matrix.name, "shape": shape, "break-even": matrix.break_even}
        rows.append(row | {name: chosen.get(matrix.name) or "dense" for name, chosen in ranks.items()})
    return pd.DataFrame(rows)


def expected_divergence(setup: FactoringSetup, ranks: dict[str, Ranks]) -> float | None:
    """Return the nats per token that the whitened ranks should cost, were errors additive; None without text."""
    if setup.random_weights:
        return None
    return decomposition.predicted_divergence(setup.spectra[FITTED], ranks[FITTED])


# --- the factored model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactoredModel:
    """A model with factors in the place of matrices, the share of the decoder's bytes removed, and the seconds.

    `errors`: those of each block on text set aside from that, though not from whitening, before and after its factors
    were `taught` (refitted or refined); none where they were not.
    """

    optimized: nn.Module
    removed: float
    seconds: float
    taught: str = ""
    errors: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, dict[str, int | None]]:
        """The ranks of the factored modules by name."""
        return factored.ranks(self.optimized)

    def rank_rows(self) -> pd.DataFrame:
        """Return a row for each factored module."""
        return pd.DataFrame([{"module": name} | ranks for name, ranks in self.ranks.items()])

    @property
    def stacks(self) -> str:
        """How many stacks of experts became shared factors and cores; empty without experts."""
        count = 2 * sum(block.feed_forward.experts is not None for block in anatomy(self.optimized).blocks)
        ranks = [by_side for by_side in self.ranks.values() if "rank" not in by_side]
        cut = sum(rank is not None for by_side in ranks for rank in by_side.values())
        if not count or cut == count:
            return f" All {count} stacks of experts are." if count else ""
        rest = "the others" if cut else "them"
        return f" Of {count} stacks of experts {cut or 'none'} are; the budget keeps {rest} whole."

    @property
    def summary(self) -> str:
        """What was removed, in how many modules, and in how many factored blocks the factors that were taught stay."""
        share = f"{100 * self.removed:.1f} % of the decoder's bytes are removed"
        removed = f"{share}; {len(self.ranks)} modules are factored.{self.stacks}"
        if not self.errors:
            return removed
        blocks = anatomy(self.optimized).blocks
        errors = [pair for pair, block in zip(self.errors, blocks) if factored.ranks(block.module)]
        kept = sum(after < before for before, after in errors)
        others = "in the others whitened ones stay" if kept else "whitened ones stay"
        rest = "" if kept == len(errors) else f"; {others}"
        kind = "blocks" if len(errors) == len(self.errors) else "factored blocks"
        where = f"{kept or 'none'} of {len(errors)} {kind}"
        text = "text set aside from their fit, which whitening has seen"
        return f"{removed} In {where} {self.taught} factors are nearer to the original output on {text}{rest}."


def factor(setup: FactoringSetup, compression: float) -> FactoredModel:
    """Return the model with about `compression` of the decoder's bytes removed; seconds include its analysis."""
    start = time.perf_counter()
    errors: list[tuple[float, float]] = []
    optimized = factors(setup, compression, setup.method, setup.budget, errors)
    seconds = setup.seconds + time.perf_counter() - start
    return FactoredModel(optimized, removed_share(setup, optimized), seconds, setup.taught, errors)


def factors(
    setup: FactoringSetup,
    compression: float,
    method: str,
    budget: str,
    errors: list[tuple[float, float]] | None = None,
) -> nn.Module:
    """Return the model with factors found by `method`, from the spectra of the setup; `errors`: see `method.apply`.

    They are refitted on all of the calibration text, which grows with the width as their ranks do, and refined on less.
    """
    options: dict[str, Any] = {"method": method, "budget": budget, "refine_steps": setup.refine_steps}
    text = setup.calibration if method == "refitted" else setup.finetune_batches
    options |= {"spectra": setup.spectra[method], "errors": errors}
    return decomposition.apply(setup.baseline, text, compression=compression, **options)


def optimize(
    loaded: Loaded, effort: Effort, *, compression: float, method: str, budget: str, refine_steps: int, seed: int
) -> nn.Module:
    """Return the model that a run with these parameters measures. Raises UserError, before any text is read, for what
    `method.apply` refuses.
    """
    setup = set_up(loaded, effort, compression, method, budget, refine_steps, seed)
    return factor(setup, compression).optimized


def removed_share(setup: FactoringSetup, model: nn.Module) -> float:
    """Return the share of the decoder's bytes that `model` lacks."""
    return 1 - allocation.decoder_bytes(model) / allocation.decoder_bytes(setup.baseline)
