"""Speed and efficiency of two models, whole: times the standard workloads in paired blocks with their A/A control, sets
them against the machine's bound, and adds processor and energy. Puts the other modules together; knows no optimization.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_stats, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.paired_stats import Pairs
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import ceilings, cost_model, full_depth
from lib.measure.roofline.ceilings import Ceilings
from lib.measure.roofline.cost_model import Cost
from lib.measure.timing import disturbance, workloads
from lib.measure.timing.interleaved import LONG_SECONDS, with_control
from lib.measure.timing.workloads import Workload
from lib.measure.trackers import cpu, energy
from lib.measure.trackers.cpu import Use

METRICS_OF = {
    "prefill": ("prefill_tokens_per_second", "time_to_first_token_ms"),
    "decode": ("decode_tokens_per_second", "time_per_output_token_ms"),
    "batch_decode": ("batch_decode_tokens_per_second",),
    "generate": ("generate_tokens_per_second",),
}
BATCH_PROMPT_TOKENS = 128
STANDARD = ("prefill", "decode", "batch_decode")
# What the formulas for prefill, for a decoded token and for the bytes of a step are told of the optimized model.
OPTIONS = (("density", "stride"), ("absorbed", "attended"), ("overhead", "attended"))


@dataclass(frozen=True)
class Timed:
    """One workload of both arms as it was timed: the arms, the pairs, the A/A control, and the cost of one call of
    each.
    """

    baseline: Workload
    optimized: Workload
    pairs: Pairs
    control: Pairs
    costs: tuple[Cost, Cost]

    @property
    def seconds(self) -> tuple[float, float]:
        """Median seconds of one call of (baseline, optimized)."""
        return float(np.median(self.pairs.baseline_seconds)), float(np.median(self.pairs.optimized_seconds))


@dataclass(frozen=True)
class Compared:
    """All that was measured: measurements and plain `details` for the record, the timings for figures."""

    measurements: list[Measurement]
    timed: dict[str, Timed] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)
    ceilings: Ceilings | None = None

    def bounds(self) -> list[dict[str, object]]:
        """Return a row per workload and arm for `figures.bound`: time of one call with its interval, and its bound, in
        ms.
        """
        rows = []
        for name, timed in self.timed.items():
            times = (timed.pairs.baseline_seconds, timed.pairs.optimized_seconds)
            for arm, seconds, price in zip(("baseline", "optimized"), times, timed.costs):
                limit = ceilings.bound(price, self.ceilings)
                low, high = paired_stats.median_interval(seconds)
                row = {"workload": name, "arm": arm, "time": 1000 * float(np.median(seconds))}
                row |= {"bound": 1000 * limit.seconds, "low": 1000 * low, "high": 1000 * high}
                rows.append(row | {"limit": "compute" if limit.limited_by == "arithmetic" else "bandwidth"})
        return rows

    def control(self) -> list[Measurement]:
        """Return the A/A control as measurements: the baseline against itself through the same path."""
        return [
            measurement.from_pairs(metric, name, timed.control, _quantity(metric, timed.baseline), timed.control)
            for name, timed in self.timed.items()
            for metric in METRICS_OF[name]
        ]


def compare(
    baseline: nn.Module,
    optimized: nn.Module,
    prompt_BT: torch.Tensor,
    effort: Effort | str,
    *,
    names: Sequence[str] = STANDARD,
    invalid: str | None = None,
    except_for: tuple[str, ...] = (),
    costs: dict[str, object] | None = None,
    baseline_costs: dict[str, object] | None = None,
    fallback: bool = False,
    with_energy: bool = True,
    seed: int = 0,
) -> Compared:
    """Time the workloads `names` of both models on one prompt and return everything about their speed and efficiency.

    `prompt_BT` is ids [1, T]; for `batch_decode` its beginning is repeated, rolled. `invalid` is what the sanity gate
    said: then nothing is timed and every metric is invalid, with that reason. `except_for`: conditions in which the
    arms may differ. `costs`: options of `cost_model.of` for the optimized model (absorbed, overhead, skip_zeros), and
    `baseline_costs` for the baseline. Decoding starts again and again behind a prompt that is read once
    (`workloads.steps`). `fallback`: see `ceilings.explain`.
    """
    effort = settings.read(effort) if isinstance(effort, str) else effort
    listed = [(metric, name) for name in names for metric in METRICS_OF[name]]
    if invalid:
        return Compared([measurement.invalid(metric, name, invalid) for metric, name in listed])
    if not settings.wants("performance", "efficiency"):
        return Compared([measurement.unavailable(metric, name, settings.why_left_out()) for metric, name in listed])
    weight = next(baseline.parameters())
    peaks = ceilings.measure(weight.device.type, weight.dtype)
    hints = {"zero_share": cost_model.zero_share(optimized), "fallback": fallback}
    hints["working_set_bytes"] = cost_model.weights_bytes(optimized)
    found: list[Measurement] = []
    timed: dict[str, Timed] = {}
    for name in names:
        arms = [_workload(name, model, prompt_BT, effort) for model in (baseline, optimized)]
        workloads.assert_same_conditions(*arms, except_for=except_for)
        prices, first = zip(
            _cost(baseline, arms[0], baseline_costs or {}), _cost(optimized, arms[1], costs or {}), strict=True
        )
        options = {"lasted": min(one.wall_seconds for one in first), "blocks": effort.blocks}
        pairs, control = with_control(*arms, seed=seed, disturbance=disturbance.watch, **options)
        timed[name] = Timed(*arms, pairs, control, prices)
        found += _explained(name, timed[name], hints, peaks)
        judged = pairs.baseline_seconds, pairs.optimized_seconds
        found += full_depth.speed(name, tuple(arms), (baseline, optimized), judged)
        found += _processor(name, timed[name], first)
    if (
        with_energy
        and settings.wants("efficiency")
        and (name := "decode" if "decode" in timed else next(iter(timed), None))
    ):
        arms = timed[name].baseline, timed[name].optimized
        found += energy.per_token(*arms, workload=name, blocks=effort.blocks, device=weight.device.type, seed=seed)
    return Compared(found, timed, _details(timed, peaks), peaks)


def _workload(name: str, model: nn.Module, prompt_BT: torch.Tensor, effort: Effort) -> Workload:
    if name == "prefill":
        return workloads.prefill(model, prompt_BT)
    if name == "decode":
        return workloads.steps(model, prompt_BT, effort.new_tokens)
    if name == "generate":
        return workloads.generate(model, prompt_BT, effort.new_tokens)
    # Rolled by one token each: as many different prompts, the same length; short, for what is timed is the decoding.
    short_BT = prompt_BT[:1, :BATCH_PROMPT_TOKENS]
    rolled_BT = torch.cat([short_BT.roll(shift, 1) for shift in range(effort.batch)])
    return workloads.steps(model, rolled_BT, effort.new_tokens)


def _cost(model: nn.Module, work: Workload, options: dict[str, object]) -> tuple[Cost, Use]:
    """FLOPs and bytes of one call, with the experts that its steps really use counted in one call that is not judged;
    and the processor's use in that call.
    """
    with cost_model.experts_hit(model) as hit:
        use = cpu.use(work, 0.0)
    work.step_seconds.clear()
    return cost_model.of(model, work, hit=hit.mean(work.batch), **options), use


def _quantity(metric: str, work: Workload) -> float:
    """What one call does: tokens for a rate; for a latency what its time is divided by, steps or the call itself."""
    if metric == "time_per_output_token_ms":
        return work.new_tokens
    return 1 if metric.endswith("_ms") else work.tokens


def _explained(name: str, timed: Timed, hints: dict, peaks: Ceilings) -> list[Measurement]:
    """The workload's rates and latencies against their bound, and the utilisations."""
    found = []
    for metric in METRICS_OF[name]:
        rate = measurement.from_pairs(metric, name, timed.pairs, _quantity(metric, timed.baseline), timed.control)
        found.append(ceilings.explain(rate, timed.costs, timed.seconds, peaks, **hints))
    return found + ceilings.utilisation(name, timed.costs, timed.seconds, peaks)


def _processor(name: str, arms: Timed, first: Sequence[Use]) -> list[Measurement]:
    """Processor use (and the GPU's, where there is one) of a workload; of its `first` calls where these were long."""
    if min(one.wall_seconds for one in first) < LONG_SECONDS:
        first = cpu.use(arms.baseline, 0.2), cpu.use(arms.optimized, 0.2)
    base, opt = first
    tell, told = measurement.informative, (base.utilisation, opt.utilisation, opt.source)
    found = [tell("cpu_utilisation", name, *told, samples=None)]
    if base.gpu is not None and opt.gpu is not None:
        found.append(tell("gpu_utilisation", name, base.gpu, opt.gpu, "NVML, sampled 20 times a second"))
    return found


def _details(timed: dict[str, Timed], peaks: Ceilings) -> dict[str, object]:
    """The machine's ceilings, and p50, p95, p99 of single decoding steps (None where there are too few), labelled."""
    found = {"ceilings": {**asdict(peaks), "provenance": "measured", "source": peaks.source}}
    steps = {
        name: {
            arm: paired_stats.percentiles([1000 * second for second in work.step_seconds])
            for arm, work in (("baseline", one.baseline), ("optimized", one.optimized))
        }
        for name, one in timed.items()
        if one.baseline.step_seconds and one.optimized.step_seconds
    }
    if steps:
        source = "perf_counter around every decoding step, warm-up and controls included"
        found["step_milliseconds"] = {"value": steps, "provenance": "measured", "source": source}
    return found


def resources(
    baseline: nn.Module,
    optimized: nn.Module,
    *,
    tokens: int,
    costs: dict[str, object] | None = None,
    baseline_costs: dict[str, object] | None = None,
) -> list[Measurement]:
    """Return what is counted or derived: parameters, weights, cache, FLOPs and bytes per token at `tokens` of context.

    `costs`: the options of the optimized model, as for `compare`: absorbed, overhead, skip_zeros, density, stride,
    attended; `baseline_costs` those of the baseline.
    """

    def priced(options: dict[str, object]) -> list[dict[str, object]]:
        skip = {"skip_zeros": True} if options.get("skip_zeros") else {}
        return [skip, *({n: options[n] for n in names if n in options} for names in OPTIONS)]

    models = ((baseline, *priced(baseline_costs or {})), (optimized, *priced(costs or {})))
    rows = {
        "parameters": ("load", [cost_model.parameters(m) for m, *_ in models], "counted, tied ones once"),
        "active_parameters": (
            "decode",
            [cost_model.active_parameters(m, **skip) for m, skip, *_ in models],
            "matrix elements that one token of text uses, uniform routing",
        ),
        "weights_bytes": (
            "load",
            [cost_model.weights_bytes(m) for m, *_ in models],
            "parameters and buffers as stored",
        ),
        "kv_cache_bytes_per_token": (
            "decode",
            [cost_model.kv_cache_bytes_per_token(m) for m, *_ in models],
            "by formula from the cache's shapes",
        ),
        "prefill_flops_per_token": (
            "prefill",
            [cost_model.prefill_flops(m, tokens, **skip, **more) / tokens for m, skip, more, *_ in models],
            f"formula, prompt of {tokens} tokens",
        ),
        "decode_flops_per_token": (
            "decode",
            [cost_model.decode_flops(m, tokens, **skip, **more) for m, skip, _, more, _ in models],
            f"formula, context of {tokens} tokens",
        ),
        "decode_bytes_per_token": (
            "decode",
            [cost_model.step_bytes(m, 1, tokens, **skip, **more) for m, skip, *_, more in models],
            f"formula, one sequence, context of {tokens} tokens, uniform routing",
        ),
    }
    found = [measurement.counted(metric, work, *values, source) for metric, (work, values, source) in rows.items()]
    return found + full_depth.sizes((baseline, optimized))


def break_even(apply_seconds: float, found: Measurement, workload: str = "apply") -> list[Measurement]:
    """Return the time it took to apply an optimization, and the tokens after which the time saved has paid for it.

    `found` is a rate in tokens per second of both arms; where it shows no gain there is no such number.
    """
    applied = measurement.informative("apply_seconds", workload, 0.0, apply_seconds, "perf_counter, once", ratio=None)
    if found.verdict != "better":
        reason = f"no gain in {found.metric} was shown ({found.verdict})"
        return [applied, measurement.unavailable("break_even_tokens", workload, reason)]
    saved = 1 / found.baseline - 1 / found.optimized
    source = f"time to apply over seconds saved per token of {found.metric}"
    tokens = measurement.informative(
        "break_even_tokens", workload, None, apply_seconds / saved, source, "derived", reason="the baseline needs none"
    )
    return [applied, tokens]
