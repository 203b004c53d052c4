"""The protocol of composing: every ordered pair of parts, refusals forced through, interactions, a live exchange.

Parts are found in the folder of optimizations; none is named here.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.compare import speed
from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.models.checkpoints import io, placement
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks
from lib.optimizations.common import interactions
from lib.optimizations.common.claims import ClaimAnswer, ThirdArm
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import attempts, hot_swap, maintenance, method, traits
from lib.optimizations.modular_components.method import Composed
from lib.optimizations.modular_components.pair_study import Contrasts, Pair, PairStudy

CLAIMS = (
    "A pair crashes instead of being refused with a reason.",
    "A refused pair would have worked.",
    "Interactions exclude zero in more pairs than chance explains.",
    "The identity pipeline is slower than the noise floor.",
    "A reverted model differs in a single bit.",
)
# What carries the word of each dimension: one measurement, declared before any is taken.
PRIMARIES = {
    "performance": ("prefill_tokens_per_second", "prefill"),
    "accuracy": ("perplexity", "prefill"),
    "resources": ("peak_tensor_bytes", "generate"),
    "efficiency": ("energy_joules_per_token", "decode"),
}
OVERHEAD_MARGIN = 0.01
EXCHANGED_TOKENS = 12


@dataclass(frozen=True)
class PartsSetup:
    """A model, the stems of the parts that apply to it in pipeline order, why the others do not, and what they are
    tried with. `weights` is the hash of the baseline's weights.
    """

    loaded: Loaded
    effort: Effort
    quick: Effort
    seed: int
    fitting: list[str]
    unfit: dict[str, str]
    calibration: list[dict[str, torch.Tensor]]
    sample_BT: torch.Tensor
    weights: str

    @property
    def options(self) -> dict[str, Any]:
        """Options of every attempt."""
        return {"random_weights": self.loaded.random_weights, "seed": self.seed}

    def described(self) -> pd.DataFrame:
        """Return what each part states of itself, and whether it applies to this model."""
        rows = []
        for stem, module in method.parts().items():
            composes = module.COMPOSES
            row = {"part": stem, "touches": ", ".join(composes["touches"]), "needs": ", ".join(composes["needs"])}
            row |= {"takes away": ", ".join(composes["invalidates"])}
            row |= {"tried with": str(composes["trial"] or "defaults")}
            rows.append(row | {"on this model": self.unfit.get(stem, "applies")})
        return pd.DataFrame(rows)

    def rules(self) -> pd.DataFrame:
        """Return which part must come before which on this model, and because of which trait."""
        concerning = traits.concerning(self.loaded.model)
        rows = [
            {"first": second, "then": first, "because": f"{first} takes away {lost}, which {second} needs"}
            for first in self.fitting
            for second in self.fitting
            if first != second and (lost := method.conflict(first, second, concerning))
        ]
        return pd.DataFrame(rows, columns=["first", "then", "because"])


def prepare(loaded: Loaded, effort: Effort, seed: int) -> PartsSetup:
    """Return the setup. Raises UserError where memory has no room for every ordered pair."""
    quick = settings.read("quick")
    fitting, unfit = method.applicable(loaded.model)
    assert len(fitting) > 1, method.applies_to(loaded.model)
    placement.require_room(loaded.model, len(fitting) * (len(fitting) + 1), "measuring every ordered pair")
    weights = io.weights_hash(loaded.model)
    calibration = tasks.calibration(loaded, quick.calibration_sequences, quick.calibration_tokens, seed)
    sample_BT = tasks.text_windows(loaded, "search", 4, 128, seed)
    return PartsSetup(loaded, effort, quick, seed, fitting, unfit, calibration, sample_BT, weights)


def arranged(setup: PartsSetup, steps: str) -> tuple[list[RecipeStep], dict[str, str]]:
    """Return the steps of the whole pipeline, and by stem why a part was left out.

    `steps`: stems joined by +, in the order wanted, or "auto": all that fit together, put into order.
    """
    stems = setup.fitting if steps == "auto" else steps.split("+")
    wanted = [method.trial(stem) for stem in stems]
    return method.orderable(wanted, setup.loaded.model) if steps == "auto" else (wanted, {})


def shapes_of_middle_block(setup: PartsSetup, steps: list[RecipeStep]) -> pd.DataFrame:
    """Return the shapes of the middle block's matrices behind each step, one column per step."""
    model = setup.loaded.model
    middle = len(anatomy(model).blocks) // 2
    columns = {"baseline": traits.shapes(model, middle)}
    for step in steps:
        model = method.compose(model, setup.calibration, [step], arrange=False, seed=setup.seed).model
        columns[step.optimization] = traits.shapes(model, middle)
    return pd.DataFrame(columns).fillna("–").rename_axis("tensor").reset_index()


def composed(setup: PartsSetup, steps: list[RecipeStep]) -> tuple[Composed, nn.Module, float]:
    """Return the whole pipeline, the identity pipeline's model, and the seconds of the whole.

    Asserts that composing changed no weight of the baseline.
    """
    model = setup.loaded.model
    start = time.perf_counter()
    whole = method.compose(model, setup.calibration, steps, arrange=False, seed=setup.seed)
    seconds = time.perf_counter() - start
    identity = method.compose(model, setup.calibration, []).model
    assert io.weights_hash(model) == setup.weights == io.weights_hash(identity), "composing changed the baseline"
    return whole, identity, seconds


def study_pairs(setup: PartsSetup) -> PairStudy:
    """Try each part alone, then every ordered pair, then force each refused pair through, unchecked."""
    model, calibration, sample_BT, options = setup.loaded.model, setup.calibration, setup.sample_BT, setup.options
    singles = {
        stem: attempts.attempt(model, calibration, [method.trial(stem)], sample_BT, **options) for stem in setup.fitting
    }
    pairs = attempts.ordered_pairs(model, calibration, singles, sample_BT, **options)
    forced = {
        key: attempts.attempt(
            model, calibration, pair.steps, sample_BT, begun=singles[key[0]], checked=False, **options
        )
        for key, pair in pairs.items()
        if pair.state == "refused" and singles[key[0]].model is not None
    }
    return PairStudy(singles, pairs, forced)


def contrast(setup: PartsSetup, study: PairStudy, identity: nn.Module, prompt_BT: torch.Tensor) -> Contrasts:
    """Time all arms that work in common rounds, and read the same held-out windows with each."""
    loaded, effort, seed = setup.loaded, setup.effort, setup.seed
    arms = {"baseline": loaded.model, "identity": identity, **study.models()}
    outdated = attempts.stale(loaded.model, setup.calibration, study.pairs, seed=seed)
    timed = interactions.time_arms(arms, prompt_BT, effort.blocks, seed)
    count, length = 2 * setup.quick.windows, setup.quick.window_tokens
    windows_NT = tasks.text_windows(loaded, "final", count, length, seed + 1)
    losses: dict[str, np.ndarray] = {}
    stale_losses: dict[Pair, np.ndarray] = {}
    if not loaded.random_weights:
        losses = interactions.losses(arms, windows_NT)
        stale_losses = interactions.losses(outdated, windows_NT)
    stems = [stem for stem in setup.fitting if stem in arms]
    return Contrasts(
        timed,
        losses,
        alone=pd.DataFrame(interactions.singles(timed, losses, stems)),
        pairs=pd.DataFrame(interactions.interactions(timed, losses, study.states)),
        orders=pd.DataFrame(interactions.order_effects(timed, losses, study.states)),
        stale=pd.DataFrame(
            interactions.staleness(losses, stale_losses), columns=["pair", "loss", "loss_low", "loss_high"]
        ),
        source=f"{effort.blocks} common rounds of {len(arms) + 1} arms, {len(windows_NT)} windows",
    )


def overhead(setup: PartsSetup, identity: nn.Module, prompt_BT: torch.Tensor) -> list[Measurement]:
    """Return prefill and decode of the identity pipeline against the model that was never composed, held to 1 %."""
    arms = (setup.loaded.model, identity, prompt_BT, setup.effort)
    unchanged = speed.compare(*arms, names=("prefill", "decode"), with_energy=False, seed=setup.seed)
    return [
        measurement.from_pairs(
            speed.METRICS_OF[name][0], name, timed.pairs, timed.baseline.tokens, timed.control, margin=OVERHEAD_MARGIN
        )
        for name, timed in unchanged.timed.items()
    ]


@dataclass(frozen=True)
class LiveExchange:
    """What exchanging every part into a live model did: seconds waited, a row per part, and whether the model was bit
    by bit the same afterwards.
    """

    waits: list[float]
    rows: list[dict[str, object]]
    identical: bool

    @property
    def longest_ms(self) -> float:
        """The longest wait in milliseconds; NaN where nothing was exchanged."""
        return 1000 * max(self.waits, default=float("nan"))


def exchange_live(setup: PartsSetup, study: PairStudy, prompt_BT: torch.Tensor) -> LiveExchange:
    """Exchange the model behind each part into the live baseline in mid-request, and give it back.

    Asserts that weights and answers are afterwards what they were.
    """
    model = setup.loaded.model
    live, question_BT = hot_swap.Live(model), prompt_BT[:, :64].to(next(model.parameters()).device)
    expected, logits = live.generate(question_BT, EXCHANGED_TOKENS), model(input_ids=question_BT).logits
    waits: list[float] = []
    rows: list[dict[str, object]] = []
    for stem, attempt in study.singles.items():
        if attempt.model is not None:
            report = hot_swap.trial(live, attempt.model, question_BT, EXCHANGED_TOKENS)
            waits += report.waits
            row: dict[str, object] = {"swapped in": stem, "in mid-request": report.reason or "yes"}
            rows.append(row | {"tokens changed": report.changed})
    same_weights = io.weights_hash(model) == setup.weights
    identical = same_weights and torch.equal(model(input_ids=question_BT).logits, logits)
    again = live.generate(question_BT, EXCHANGED_TOKENS)
    assert identical and torch.equal(again, expected), "reverting left a trace"
    return LiveExchange(waits, rows, identical)


def spending(study: PairStudy, exchanged: LiveExchange, grown: maintenance.Addition | None) -> list[Measurement]:
    """Return the modularity score, the longest wait of an exchange, and what a further part costs its author."""
    informative = measurement.informative
    count: dict[str, Any] = {"n": len(study.pairs), "reason": "the baseline is one part"}
    source = "working ordered pairs ÷ all"
    rows = [informative("modularity_score", "compose", None, study.score, source, "derived", **count)]
    if exchanged.waits:
        source = "perf_counter around each exchange, while a request was under way or just over"
        why: dict[str, Any] = {"n": len(exchanged.waits), "reason": "the baseline is never swapped"}
        rows.append(informative("swap_ms", "hot swap", None, exchanged.longest_ms, source, **why))
    if grown:
        source = "a twelfth optimization, added to a temporary copy; lines that are not blank"
        for metric, value in (("files_touched", grown.touched), ("lines_written", grown.lines)):
            rows.append(informative(metric, "maintenance", None, value, source, reason="nothing to add"))
    return rows


def impact(contrasts: Contrasts, whole: Measurement | None, steps: int) -> list[dict[str, object]]:
    """Return the gain of prefill over the number of parts together: mean, least and most of one, of two, of all.

    `whole` is the prefill rate of the whole pipeline, of `steps` parts.
    """
    alone = contrasts.alone.set_index("part")["prefill"]
    works = contrasts.pairs[contrasts.pairs.state == "works"]
    both = [works[name].map(alone) for name in ("first", "second")]
    together: dict[int, list[float]] = {1: list(alone)}
    together[2] = list(works["prefill"] + sum(both)) if len(works) else []
    if whole is not None and whole.ratio:
        together[steps] = [float(np.log(whole.ratio))]
    return [
        {"arm": "mean, least and most", "strength": parts, "value": float(np.exp(np.mean(logs)))}
        | {"low": float(np.exp(min(logs))), "high": float(np.exp(max(logs)))}
        for parts, logs in together.items()
        if logs
    ]


def refutations(
    study: PairStudy, contrasts: Contrasts, measured_overhead: list[Measurement], exchanged: LiveExchange
) -> list[ClaimAnswer]:
    """Return (claim, whether it is refuted, evidence) for each of CLAIMS."""
    crashed, strict, count = study.named("crashed"), study.too_strict, len(study.pairs)
    verdicts = {m.verdict for m in measured_overhead}
    slower = True if "worse" in verdicts else False if verdicts <= {"equivalent", "better"} else None
    rates = ", ".join(f"{m.workload} at {m.ratio:.3f} of the rate, {m.verdict}" for m in measured_overhead)
    changed = f"weights and logits {'identical' if exchanged.identical else 'different'} after {len(exchanged.rows)}"
    answers = (
        (bool(crashed), f"{len(crashed)} of {count} ordered pairs crash"),
        (
            bool(strict) if study.forced else None,
            f"{len(strict)} of {len(study.forced)} refused pairs work when forced",
        ),
        contrasts.refuted(),
        (slower if measured_overhead else None, rates or "nothing was timed"),
        (not exchanged.identical if exchanged.rows else None, f"{changed} exchanges"),
    )
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answers)]


def arms(compared: Compared, measured_overhead: list[Measurement]) -> list[ThirdArm]:
    """Return the controls of a record: A/A and the identity pipeline."""
    same = ThirdArm("A/A", "a copy of the baseline", compared.control())
    return [same, ThirdArm("identity pipeline", "composed of no step", measured_overhead)]


def details(
    whole: Composed, study: PairStudy, contrasts: Contrasts, exchanged: LiveExchange
) -> dict[str, tuple[object, str, str]]:
    """Return what a record keeps beside measurements: name → (value, provenance, source)."""
    how = contrasts.source
    tables: Mapping[str, pd.DataFrame] = {
        "alone": contrasts.alone,
        "interactions": contrasts.pairs,
        "order_effects": contrasts.orders,
        "stale_statistics": contrasts.stale,
    }
    return {
        "order": ([step.model_dump() for step in whole.steps], "derived", "descriptors of the parts"),
        **{name: (frame.to_dict("records"), "measured", how) for name, frame in tables.items()},
        "refusals_forced": (study.audit(), "measured", "each refused pair applied unchecked"),
        "noise_floors": (contrasts.floors, "measured", "the baseline twice in each round"),
        "reverted_bit_identical": (exchanged.identical, "measured", "hash of all weights, and logits compared"),
        "hot_swaps": (exchanged.rows, "measured", "12 tokens each, exchanged in the middle"),
    }


def sentence(study: PairStudy, measured_overhead: list[Measurement], exchanged: LiveExchange) -> str:
    """Return what became of the pairs, the identity pipeline and the exchanges, in one sentence."""
    refused, crashed = len(study.named("refused")), len(study.named("crashed"))
    text = f"{study.score:.2f} of {len(study.pairs)} ordered pairs work, {refused} are refused with a reason, "
    text += f"{crashed} crash; "
    if measured_overhead:
        worst = max(measured_overhead, key=lambda m: abs((m.ratio or 1) - 1))
        text += f"the identity pipeline runs at {worst.ratio:.3f} of the {worst.workload} rate, {worst.verdict}; "
    return text + f"a revert is bit by bit {'identical' if exchanged.identical else 'different'}."
