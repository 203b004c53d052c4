"""The protocol of the tensor-decomposition notebook: one spectrum, the ranks, and the factored model.

The rivals are in `rivals`. Returns plain data; independent of tables, figures and records.
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
AUTO = "auto"  # "refined" on a proxy model, "refitted" (closed form) at real size
SHOWN_RANKS, SHOWN_LEAST = 48, 1e-4  # points per curve of singular values, and its floor as a share of the largest
PREVIEW_BLOCKS = 2  # blocks in which the worth of matrices is measured at effort preview

Ranks = dict[str, "int | None"]


@dataclass(frozen=True)
class FactoringSetup:
    """A model, its calibration text, and the spectra of its matrices by method.

    `seconds` is the time of the spectra that `method` uses. Random weights have no leading directions: for them
    `method` is "random" and `budget` "uniform".
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
        """The index of the middle block, the one shown."""
        return len(anatomy(self.baseline).blocks) // 2

    @property
    def shown(self) -> list[FactorableMatrix]:
        """The matrices of the middle block."""
        return matrices(self.baseline, self.middle)

    @property
    def widest(self) -> FactorableMatrix:
        """The largest linear layer of the middle block."""
        linear = (matrix for matrix in self.shown if matrix.side == "linear")
        return max(linear, key=lambda matrix: matrix.elements(None))

    def facts(self) -> dict[str, object]:
        """Return the facts about the model to be factored, for a table."""
        return facts.about(
            self.loaded,
            method=self.method,
            matrices=len(matrices(self.baseline)),
            decoder_bytes=f"{allocation.decoder_bytes(self.baseline):,}",
        )


def set_up(
    loaded: Loaded, effort: Effort, compression: float, method: str, budget: str, refine_steps: int, seed: int
) -> FactoringSetup:
    """Return the model with its calibration text and the spectra that the arms need, each computed once.

    method: one of `method.METHODS`, or AUTO. `seconds` excludes the spectra of controls. Raises UserError, before any
    text is read, for an unknown method or budget and for a compression out of range or out of reach, and NotApplicable
    if the model's weights stream from a file.
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
    analysis_options: dict[str, Any] = {"seed": seed, "weighed_blocks": weighed_blocks(effort)}
    spectra, seconds_of = {}, {}
    for kind in kinds:
        start = time.perf_counter()
        spectra[kind] = decomposition.analyse(loaded.model, calibration, kind, **analysis_options)
        spectra[kind].curves()
        seconds_of[kind] = time.perf_counter() - start
    if FITTED in spectra:
        spectra |= {"refined": spectra[FITTED], "refitted": spectra[FITTED]}
    seconds = next(seconds_of[kind] for kind in kinds if spectra[kind] is spectra[method])
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
    """Return the maximum number of blocks in which the worth of matrices is measured; None: the default."""
    return PREVIEW_BLOCKS if effort.preview else None


# --- the mechanism ---------------------------------------------------------------------------------------------------


def singular_values(setup: FactoringSetup) -> tuple[pd.DataFrame, float]:
    """Return the singular values of the widest matrix, relative to the largest, and the seconds of its plain spectrum.

    One row per rank (`strength`) and method (`arm`), in column `value`; whitened values are those of W·S. `thinned`
    selects the points for a figure.
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
    """Return about SHOWN_RANKS points of each curve of `singular_values`, clipped from below at SHOWN_LEAST."""
    steps = {arm: max(1, len(curve) // SHOWN_RANKS) for arm, curve in curves.groupby("arm")}
    shown = curves[(curves["strength"] - 1) % curves["arm"].map(steps) == 0]
    return shown.assign(value=shown["value"].clip(lower=SHOWN_LEAST))


def read_singular_values(curves: pd.DataFrame, break_even: float) -> tuple[str, str]:
    """Return two sentences: how many ranks stand out, and how large singular values are at the break-even rank."""
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
    """Return, for each kind of factors, the rank that the budget gives every matrix."""
    return {
        name: allocation.allocate(setup.baseline, spectra.curves(), compression, setup.budget)
        for name, spectra in setup.spectra.items()
        if name not in ("refined", "refitted")
    }


def rank_table(setup: FactoringSetup, ranks: dict[str, Ranks]) -> pd.DataFrame:
    """Return the ranks in the middle block, a row for each matrix with its shape and break-even rank."""
    rows = []
    for matrix in setup.shown:
        shape = " × ".join(map(str, matrix.shape))
        row = {"matrix": matrix.name, "shape": shape, "break-even": matrix.break_even}
        rows.append(row | {name: chosen.get(matrix.name) or "dense" for name, chosen in ranks.items()})
    return pd.DataFrame(rows)


def expected_divergence(setup: FactoringSetup, ranks: dict[str, Ranks]) -> float | None:
    """Return the divergence, in nats per token, expected at the whitened ranks if errors were additive.

    None without text.
    """
    if setup.random_weights:
        return None
    return decomposition.predicted_divergence(setup.spectra[FITTED], ranks[FITTED])


# --- the factored model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactoredModel:
    """A model with factors in place of matrices, the share of the decoder's bytes removed, and the seconds it took.

    `errors`: (before, after) of each block whose factors were `taught` ("refitted" or "refined"), on text that was
    used for whitening but not for teaching; empty if none were.
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
        """A sentence on how many stacks of experts became shared factors and cores; empty without experts."""
        count = 2 * sum(block.feed_forward.experts is not None for block in anatomy(self.optimized).blocks)
        ranks = [by_side for by_side in self.ranks.values() if "rank" not in by_side]
        cut = sum(rank is not None for by_side in ranks for rank in by_side.values())
        if not count or cut == count:
            return f" All {count} stacks of experts are factored." if count else ""
        rest = "the others" if cut else "them"
        return f" {cut or 'None'} of {count} stacks of experts are factored; the budget keeps {rest} whole."

    @property
    def summary(self) -> str:
        """The share removed, the count of factored modules, and in how many blocks teaching improved the factors."""
        share = f"{100 * self.removed:.1f} % of the decoder's bytes are removed"
        removed = f"{share}; {len(self.ranks)} modules are factored.{self.stacks}"
        if not self.errors:
            return removed
        blocks = anatomy(self.optimized).blocks
        errors = [pair for pair, block in zip(self.errors, blocks) if factored.ranks(block.module)]
        kept = sum(after < before for before, after in errors)
        others = "The others keep whitened factors" if kept else "All keep whitened factors"
        rest = "" if kept == len(errors) else f" {others}."
        kind = "blocks" if len(errors) == len(self.errors) else "factored blocks"
        where = f"{kept or 'none'} of {len(errors)} {kind}"
        text = "text held out from the fit but not from whitening"
        return f"{removed} In {where} {self.taught} factors are nearer to the original output, on {text}.{rest}"


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
    """Return the model factored by `method` from the setup's spectra; `errors` as in `method.apply`.

    Factors are refitted on all calibration text, which grows with the model's width as the ranks do, and refined on
    less.
    """
    options: dict[str, Any] = {"method": method, "budget": budget, "refine_steps": setup.refine_steps}
    text = setup.calibration if method == "refitted" else setup.finetune_batches
    options |= {"spectra": setup.spectra[method], "errors": errors}
    return decomposition.apply(setup.baseline, text, compression=compression, **options)


def optimize(
    loaded: Loaded, effort: Effort, *, compression: float, method: str, budget: str, refine_steps: int, seed: int
) -> nn.Module:
    """Return the model that a run with these parameters measures.

    Raises UserError, before any text is read, for options that `method.apply` refuses.
    """
    setup = set_up(loaded, effort, compression, method, budget, refine_steps, seed)
    return factor(setup, compression).optimized


def removed_share(setup: FactoringSetup, model: nn.Module) -> float:
    """Return the share of the decoder's bytes that `model` lacks."""
    return 1 - allocation.decoder_bytes(model) / allocation.decoder_bytes(setup.baseline)
