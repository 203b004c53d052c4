"""Times one feed-forward part by itself, at several token counts: each arm against the fastest dense form of the part.

For optimizations that change only matrices: attention, cache and head are the same in both arms and would hide the gain
of the matrices. Independent of how the parts were made.

Shapes: T tokens, H hidden.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_samples, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.metrics.process_variance import PART_SIGMA
from lib.measure.metrics.settings import BRIEF
from lib.measure.roofline import ceilings, cost_model
from lib.measure.timing import disturbance, interleaved
from lib.measure.trackers import energy

TOKENS = (1, 16, 256)
SECONDS = 0.005  # minimum length of one arm's turn in a block
ENERGY_SECONDS = 0.01  # length of one window if joules are estimated from CPU time
ENERGY_BLOCKS = 6
METERED_TOKENS, METERED_QUICKLY = TOKENS[1], (80, 90)  # tokens and strengths metered if a point takes long


class TimingOptions(TypedDict):
    """Options of `interleaved.paired`."""

    blocks: int
    iterations: int
    warmup: int
    seed: int
    disturbance: interleaved.Watch


@dataclass
class PartPass:
    """A forward pass of a part on x [1, T, H] in the form that timing and energy need: a callable with `tokens`."""

    module: nn.Module
    x_1TH: torch.Tensor
    synchronize: Callable[[], object] | None = None

    @property
    def tokens(self) -> int:
        return self.x_1TH.shape[1]

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        return self.module(self.x_1TH)


@dataclass(frozen=True)
class DenseForm:
    """The fastest dense form of a part at one token count: its dtype, its pass, and its A/A control."""

    dtype: torch.dtype
    work: PartPass
    control: Pairs


def run(module: nn.Module, tokens: int, hidden: int, dtype: torch.dtype) -> PartPass:
    """Return a pass of `module` on `tokens` random tokens of width `hidden` in `dtype`."""
    device = next(module.parameters()).device
    x_1TH = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
    return PartPass(module, x_1TH, torch.cuda.synchronize if device.type == "cuda" else None)


def fastest(dense: Mapping[torch.dtype, nn.Module], tokens: int, hidden: int, blocks: int, seed: int = 0) -> DenseForm:
    """Return the fastest of the dense forms of a part (dtype → module) at `tokens` tokens, timed against each other."""
    best, *challengers = [(dtype, run(module, tokens, hidden, dtype)) for dtype, module in dense.items()]
    for challenger in challengers:
        pairs = interleaved.paired(best[1], challenger[1], **_options(best[1], 6, seed))
        best = challenger if np.median(pairs.differences) < 0 else best
    again = run(copy.deepcopy(best[1].module), tokens, hidden, best[0])
    return DenseForm(*best, interleaved.paired(best[1], again, **_options(best[1], blocks, seed + 1)))


def compare(
    dense: DenseForm,
    module: nn.Module,
    dtype: torch.dtype,
    blocks: int,
    *,
    zero_share: float = 0.0,
    fallback: bool = False,
) -> list[Measurement]:
    """Return the time per pass of `module` (run in `dtype`) against the fastest dense form, and the bytes of weights.

    zero_share, fallback: see `ceilings.explain`. The bound uses the ceilings of the dense form's dtype.
    """
    hidden, name = dense.work.x_1TH.shape[2], workload(dense.work.tokens)
    sparse = run(module, dense.work.tokens, hidden, dtype)
    pairs = interleaved.paired(dense.work, sparse, **_options(dense.work, blocks, dense.work.tokens))
    costs = (
        cost_model.of_feed_forward(dense.work.module, dense.work.tokens),
        cost_model.of_feed_forward(module, sparse.tokens, skip_zeros=bool(zero_share)),
    )
    sizes = cost_model.weights_bytes(dense.work.module), cost_model.weights_bytes(module)
    seconds = float(np.median(pairs.baseline_seconds)), float(np.median(pairs.optimized_seconds))
    peaks = ceilings.measure(dense.work.x_1TH.device.type, dense.dtype)
    options: dict[str, Any] = {"samples": False, "process_sigma": PART_SIGMA}
    timed = paired_samples.from_pairs("feed_forward_ms", name, pairs, 1, dense.control, **options)
    return [
        ceilings.explain(
            timed, costs, seconds, peaks, zero_share=zero_share, fallback=fallback, working_set_bytes=sizes[1]
        ),
        measurement.counted("weights_bytes", "feed-forward part", *sizes, "parameters and buffers as stored"),
    ]


def metered(tokens: int, strength: float, effort: str, device: str, scale: str = "proxy") -> bool:
    """Return whether energy is measured at a point of a sweep; never if efficiency is not requested.

    Estimates from short calls are taken at every point (at preview only at METERED_TOKENS). With a counter, whose
    windows last seconds, and at real dimensions, only at METERED_TOKENS, and at small efforts only at the strengths
    METERED_QUICKLY.
    """
    if not settings.wants("efficiency"):
        return False
    if energy.counter(device).window_seconds < 1 and scale == "proxy":
        return effort != "preview" or tokens == METERED_TOKENS
    return tokens == METERED_TOKENS and (effort not in BRIEF or strength in METERED_QUICKLY)


def joules(dense: DenseForm, module: nn.Module, dtype: torch.dtype, seed: int = 0) -> list[Measurement]:
    """Return the energy and CPU seconds per token of `module` against the fastest dense form."""
    hidden, device = dense.work.x_1TH.shape[2], dense.work.x_1TH.device.type
    source = energy.counter(device)
    seconds = ENERGY_SECONDS if source.provenance == "estimated" else None
    measurements = energy.per_token(
        dense.work,
        run(module, dense.work.tokens, hidden, dtype),
        workload=workload(dense.work.tokens),
        blocks=ENERGY_BLOCKS,
        device=device,
        seconds=seconds,
        seed=seed,
        source=source,
        disturbance=disturbance.watch,
        process_sigma=PART_SIGMA,
    )
    return [m for m in measurements if m.metric in ("energy_joules_per_token", "cpu_seconds_per_token")]


def workload(tokens: int) -> str:
    """Return the name in a record of a pass on `tokens` tokens."""
    return f"feed-forward part, {tokens} token{'s' * (tokens != 1)}"


def crossover(strengths: list[float], gains: list[float]) -> float | None:
    """Return the lowest strength from which every gain is at least 1, interpolated between points; None without one.

    `gains` are the speed-ups at `strengths`, in ascending order of strength.
    """
    behind = next((i for i in reversed(range(len(gains))) if gains[i] < 1), None)
    if behind is None:
        return strengths[0]
    if behind == len(gains) - 1:
        return None
    (x0, x1), (y0, y1) = strengths[behind : behind + 2], np.log(gains[behind : behind + 2])
    return float(x0 + (x1 - x0) * -y0 / (y1 - y0))


def _options(arm: PartPass, blocks: int, seed: int) -> TimingOptions:
    iterations = interleaved.iterations_for(arm, SECONDS)
    return {"blocks": blocks, "iterations": iterations, "warmup": 1, "seed": seed, "disturbance": disturbance.watch}
