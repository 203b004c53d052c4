"""The protocol of the tensor-decomposition notebook: one spectrum, the ranks, a sweep of strengths against rivals of
equal bytes, text of another domain, and the answers to what would refute it.

Returns plain data. Knows nothing of tables, figures or records.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import evaluate
from lib.measure.quality.evaluate import Text
from lib.measure.timing import interleaved, workloads
from lib.models.calibration.activations import observe
from lib.models.loading import Loaded
from lib.models.structure import factored
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks as prompts
from lib.optimizations.common import claims
from lib.optimizations.common.claims import ClaimAnswer, ThirdArm
from lib.optimizations.tensor_decomposition import allocation
from lib.optimizations.tensor_decomposition import method as decomposition
from lib.optimizations.tensor_decomposition.low_rank import FactorableMatrix, Spectrum, spectrum_of

CLAIMS = (
    "Factors fitted to calibration text harm no less than factors of the bare matrices.",
    "Factors fitted to calibration text harm no less than parts pruned at equal bytes.",
    "Two thin products take as long as one thick one.",
)
FITTED, BARE, PRUNED, EVEN = "whitened", "plain", "structured pruning", "whitened, uniform ranks"
STRENGTHS, STRENGTHS_OF_RANDOM_WEIGHTS = (0.2, 0.4, 0.6), (0.6,)
WINDOWS = 8  # of held-out text, on which rivals are judged
SPEED_TOKENS, SPEED_BLOCKS = 256, 6  # of the prefill that times a rival
SHOWN_RANKS = 48  # points of a curve of singular values

Ranks = dict[str, "int | None"]


@dataclass(frozen=True)
class FactoringSetup:
    """A model, its calibration text, and the spectra of its matrices by method, which took `seconds`.

    Random weights have no leading directions: there `method` is "random" and `budget` "uniform".
    """

    loaded: Loaded
    effort: Effort
    method: str
    budget: str
    refine_steps: int
    calibration: list[dict[str, torch.Tensor]]
    finetune_batches: list[dict[str, torch.Tensor]]
    spectra: dict[str, list[Spectrum]]
    seconds: float
    seed: int

    @property
    def baseline(self) -> nn.Module:
        return self.loaded.model

    @property
    def random_weights(self) -> bool:
        return self.loaded.random_weights

    @property
    def middle(self) -> int:
        """The index of the block that is shown."""
        return len(anatomy(self.baseline).blocks) // 2

    @property
    def shown(self) -> list[FactorableMatrix]:
        """The matrices of the block that is shown."""
        matrices = [spectrum.matrix for spectrum in self.spectra[self.method]]
        return [matrix for matrix in matrices if matrix.block == self.middle]

    @property
    def widest(self) -> FactorableMatrix:
        """The largest linear layer of the block that is shown."""
        linear = (matrix for matrix in self.shown if matrix.side == "linear")
        return max(linear, key=lambda matrix: matrix.elements(None))

    def facts(self) -> dict[str, object]:
        """Return what is about to be factored, for a table."""
        return {
            "model": f"{self.loaded.parameters.name}, {self.loaded.scale}",
            "blocks": len(anatomy(self.baseline).blocks),
            "method": self.method,
            "matrices": len(self.spectra[self.method]),
            "decoder bytes": f"{allocation.decoder_bytes(self.baseline):,}",
        }


def set_up(loaded: Loaded, effort: Effort, method: str, budget: str, refine_steps: int, seed: int) -> FactoringSetup:
    """Return the model with its calibration text and the spectra that the arms need."""
    count, length = effort.calibration_sequences, effort.calibration_tokens
    calibration = prompts.calibration(loaded, count, length, seed)
    finetune_batches = prompts.calibration(loaded, min(16, count // 2), 256, seed, tokens_at_once=512)
    start = time.perf_counter()
    if loaded.random_weights:
        method, budget, kinds = "random", "uniform", ["random"]
    else:
        kinds = [BARE, FITTED, *{method} & {"random"}]
    spectra = {kind: decomposition.analyse(loaded.model, calibration, kind, seed=seed) for kind in kinds}
    if FITTED in spectra:
        spectra["refined"] = spectra[FITTED]
    seconds = time.perf_counter() - start
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


# --- the mechanism ---------------------------------------------------------------------------------------------------


def singular_values(setup: FactoringSetup) -> tuple[pd.DataFrame, float]:
    """Return the singular values of the widest matrix over the largest, and the seconds that its plain spectrum took.

    One row per rank (`strength`), method (`arm`) and `value`; whitened ones are seen through calibration inputs.
    """
    matrix = setup.widest
    start = time.perf_counter()
    spectra = {BARE: spectrum_of(matrix)}
    seconds = time.perf_counter() - start
    fitted = {spectrum.matrix.name: spectrum for spectrum in setup.spectra.get(FITTED, ())}
    if matrix.name in fitted:
        spectra[FITTED] = fitted[matrix.name]
    curves = []
    for name, spectrum in spectra.items():
        values = (spectrum.energy_R[: min(matrix.weight.shape)] / spectrum.energy_R[0]).sqrt().clamp_min(1e-4)
        step = max(1, len(values) // SHOWN_RANKS)
        ranks = range(1, len(values) + 1, step)
        curves.append(pd.DataFrame({"strength": ranks, "value": values[::step].tolist(), "arm": name}))
    return pd.concat(curves), seconds


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
        name: allocation.allocate(setup.baseline, spectra, compression, setup.budget)
        for name, spectra in setup.spectra.items()
        if name != "refined"
    }


def rank_table(setup: FactoringSetup, ranks: dict[str, Ranks]) -> pd.DataFrame:
    """Return the ranks in the block that is shown, a row for each matrix with its shape and break-even rank."""
    rows = []
    for matrix in setup.shown:
        shape = " × ".join(map(str, matrix.weight.shape))
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
    """A model with factors in the place of matrices, the share of the decoder's bytes removed, and the seconds."""

    optimized: nn.Module
    removed: float
    seconds: float

    @property
    def ranks(self) -> dict[str, dict[str, int | None]]:
        """The ranks of the factored modules by name."""
        return factored.ranks(self.optimized)

    def rank_rows(self) -> pd.DataFrame:
        """Return a row for each factored module."""
        return pd.DataFrame([{"module": name} | ranks for name, ranks in self.ranks.items()])


def factor(setup: FactoringSetup, compression: float) -> FactoredModel:
    """Return the model with about `compression` of the decoder's bytes removed; seconds include the analysis."""
    start = time.perf_counter()
    optimized = _factors(setup, compression, setup.method, setup.budget)
    seconds = setup.seconds + time.perf_counter() - start
    return FactoredModel(optimized, removed_share(setup, optimized), seconds)


def _factors(setup: FactoringSetup, compression: float, method: str, budget: str) -> nn.Module:
    options: dict[str, Any] = {"method": method, "budget": budget, "refine_steps": setup.refine_steps}
    spectra = setup.spectra[method]
    return decomposition.apply(
        setup.baseline, setup.finetune_batches, compression=compression, spectra=spectra, **options
    )


def removed_share(setup: FactoringSetup, model: nn.Module) -> float:
    """Return the share of the decoder's bytes that `model` lacks."""
    return 1 - allocation.decoder_bytes(model) / allocation.decoder_bytes(setup.baseline)


# --- rivals of equal bytes -------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """Rivals over strengths: plain rows for a table, the arms at the strength of the run, and what was left out."""

    rows: list[dict[str, object]] = field(default_factory=list)
    arms: list[ThirdArm] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def divergence(self) -> pd.DataFrame:
        """Return divergence over bytes removed, `value` in nats per token; empty without text."""
        rows = pd.DataFrame(self.rows)
        return rows if "value" in rows else rows.head(0)

    def speed(self) -> pd.DataFrame:
        """Return the speed-up of prefill over bytes removed, as `value`, `low`, `high`."""
        rows = pd.DataFrame(self.rows).drop(columns=["value", "low", "high"], errors="ignore")
        return rows.rename(columns={"prefill speed-up": "value", "speed_low": "low", "speed_high": "high"})


def sweep(
    setup: FactoringSetup,
    chosen: FactoredModel,
    text: Text | None,
    prompt_BT: torch.Tensor,
    compression: float,
    prune: Callable[..., nn.Module],
) -> Sweep:
    """Return every rival at several strengths, judged on the first windows of `text` and timed on `prompt_BT`.

    `prune` removes parts (`structured_pruning`'s `apply`). A strength out of a rival's reach is left out with the
    reason. Factors of equal ranks are timed once.
    """
    quiet = setup.random_weights
    reference = None if text is None else evaluate.read(setup.baseline, text.ids_NT[:WINDOWS])
    observation = None if quiet else observe(setup.baseline, setup.calibration[:1])

    def model_of(arm: str, strength: float) -> nn.Module:
        if (arm, strength) == (setup.method, compression):
            return chosen.optimized
        if arm == PRUNED:
            options: dict[str, Any] = {
                "saliency": "random" if quiet else "activation",
                "observation": observation,
                "seed": setup.seed,
            }
            return prune(setup.baseline, setup.calibration, ratio=strength, **options)
        return _factors(setup, strength, arm.split(",")[0], "uniform" if quiet or arm == EVEN else "global")

    result = Sweep()
    rates: dict[str, Measurement] = {}
    strengths = STRENGTHS_OF_RANDOM_WEIGHTS if quiet else STRENGTHS
    for strength in sorted({*strengths, compression}):
        for arm in _names(setup):
            try:
                model = model_of(arm, strength)
            except UserError as reason:
                result.left_out[f"{arm} at {strength:g}"] = str(reason)
                continue
            quality = []
            if reference is not None:
                quality = evaluate.compare_text(reference, evaluate.read(model, reference.ids_NT))
            rival = ThirdArm(arm, "equal bytes by other means", quality)
            if strength == compression and quality:
                result.arms.append(rival)
            shape = str(factored.ranks(model) or allocation.decoder_bytes(model))
            if shape not in rates:
                rates[shape] = _prefill_rate(setup, model, prompt_BT)
            result.rows.append(_row(rival, strength, removed_share(setup, model), rates[shape]))
            del model
    return result


def _names(setup: FactoringSetup) -> list[str]:
    names = ["random"] if setup.random_weights else [BARE, FITTED, "refined", EVEN]
    blocks = anatomy(setup.baseline).blocks
    if not setup.random_weights or all(block.feed_forward.kind == "dense" for block in blocks):
        names.append(PRUNED)  # a copy of all experts at real dimensions would not fit beside both models
    return names


def _prefill_rate(setup: FactoringSetup, model: nn.Module, prompt_BT: torch.Tensor) -> Measurement:
    arms = [workloads.prefill(arm, prompt_BT[:, :SPEED_TOKENS]) for arm in (setup.baseline, model)]
    iterations = interleaved.iterations_for(arms[0])
    pairs = interleaved.paired(*arms, blocks=SPEED_BLOCKS, iterations=iterations, warmup=1, seed=setup.seed)
    return measurement.from_pairs("prefill_tokens_per_second", "prefill", pairs, arms[0].tokens, None)


def _row(arm: ThirdArm, strength: float, removed: float, rate: Measurement) -> dict[str, object]:
    low, high = rate.ci or (None, None)
    row = {"arm": arm.name, "strength": 100 * strength, "bytes removed, %": 100 * removed}
    row |= {"prefill speed-up": rate.ratio, "speed_low": low, "speed_high": high}
    divergence = claims.interval([arm], [arm.name])
    return row | (divergence._asdict() if divergence else {})


# --- another domain, and the answers ---------------------------------------------------------------------------------


def domains(setup: FactoringSetup, compression: float) -> pd.DataFrame:
    """Return the divergence of whitened factors calibrated on and judged on two kinds of text, in nats per token.

    Empty for random weights.
    """
    if setup.random_weights:
        return pd.DataFrame()
    loaded, effort, seed = setup.loaded, setup.effort, setup.seed
    own = prompts.corpus_of(loaded)
    foreign = "code" if own == "docs" else "docs"
    task = {"code": "code_origin", "docs": "topic"}[foreign]
    abroad = dataclasses.replace(loaded, parameters=loaded.parameters.model_copy(update={"tasks": [task]}))
    calibration = prompts.calibration(abroad, effort.calibration_sequences, effort.calibration_tokens, seed)
    spectra = {own: setup.spectra[FITTED], foreign: decomposition.analyse(setup.baseline, calibration)}
    rows = []
    for judged, source in ((own, loaded), (foreign, abroad)):
        ids_NT = prompts.text_windows(source, "final", WINDOWS, effort.window_tokens, seed)
        reference = evaluate.read(setup.baseline, ids_NT)
        for calibrated, source_spectra in spectra.items():
            model = decomposition.apply(
                setup.baseline, [], compression=compression, method=FITTED, spectra=source_spectra
            )
            kl = evaluate.divergence(reference, evaluate.read(model, ids_NT))[0].mean()
            rows.append({"judged on": judged, "calibrated on": calibrated, "KL, nats/token": float(kl)})
    return pd.DataFrame(rows)


def refutations(arms: list[ThirdArm]) -> list[ClaimAnswer]:
    """Return the answers to the first two of CLAIMS, from the divergences at the strength of the run.

    Both are about whitened factors without refinement: pruning has no recovery either.
    """
    fitted, bare, pruned = (claims.interval(arms, [name]) for name in (FITTED, BARE, PRUNED))
    return [
        claims.harms_less(CLAIMS[0], fitted, bare, (FITTED, BARE)),
        claims.harms_less(CLAIMS[1], fitted, pruned, (FITTED, PRUNED)),
    ]


def details(
    setup: FactoringSetup,
    chosen: FactoredModel,
    ranks: dict[str, Ranks],
    curves: Sweep,
    judged: pd.DataFrame,
    one_matrix_seconds: float,
) -> dict[str, dict[str, object]]:
    """Return what a record holds beside measurements: name → value, provenance, source and further words on it."""
    values = {
        "removed_share": (chosen.removed, "derived", "bytes of the decoder's blocks"),
        "ranks": (chosen.ranks, "derived", "ranks of the factored modules"),
        "break_even_ranks": (
            {matrix.name: matrix.break_even for matrix in setup.shown},
            "derived",
            f"m·n/(m+n), matrices of block {setup.middle}",
        ),
        "one_matrix_seconds": (one_matrix_seconds, "measured", f"plain spectrum of {setup.widest.name}, once"),
        "expected_divergence": (
            expected_divergence(setup, ranks),
            "estimated",
            "sum over whitened matrices, each as if cut alone, nats/token",
        ),
        "impact": (curves.rows, "measured", "KL on held-out text; paired prefill"),
        "domains": (judged.to_dict("records"), "measured", "KL on held-out text of two domains"),
    }
    entries = {name: dict(zip(("value", "provenance", "source"), entry)) for name, entry in values.items()}
    entries["impact"] |= {"x": "decoder bytes removed, %", "y": "KL, nats/token"}
    return entries
