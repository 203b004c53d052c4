"""Compares the speed and efficiency of two models: times the standard workloads in paired blocks with an A/A control
(in several fresh processes where saved files hold each model completely), relates the times to the machine's bound, and
adds CPU use and energy. Knows nothing about particular optimizations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.measure.compare import replication
from lib.measure.metrics import measurement, paired_samples, paired_stats, process_variance, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import ceilings, cost_model, expert_usage, full_depth
from lib.measure.roofline.ceilings import Ceilings
from lib.measure.roofline.cost_model import Cost
from lib.measure.timing import disturbance, workloads
from lib.measure.timing.control import fresh_copies, separate_copy
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
STANDARD = ("prefill", "decode", "batch_decode")


@dataclass(frozen=True)
class Timed:
    """One timed workload: both arms, their pairs, the A/A control, and the cost of one call of each arm."""

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
    """The results of `compare`: measurements and plain `details` for the record, and the timings for figures."""

    measurements: list[Measurement]
    timed: dict[str, Timed] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)
    ceilings: Ceilings | None = None

    def bounds(self) -> list[dict[str, object]]:
        """Return figure rows, one per workload and arm: time of one call with its interval, and its bound, in ms."""
        if self.ceilings is None:
            return []
        rows: list[dict[str, object]] = []
        for name, timed in self.timed.items():
            times = (timed.pairs.baseline_seconds, timed.pairs.optimized_seconds)
            for arm, seconds, price in zip(("baseline", "optimized"), times, timed.costs):
                limit = ceilings.bound(price, self.ceilings)
                middle, low, high = paired_stats.level(seconds, timed.pairs.process)
                row = {
                    "workload": name,
                    "arm": arm,
                    "time": 1000 * middle,
                    "bound": 1000 * limit.seconds,
                    "low": 1000 * low,
                    "high": 1000 * high,
                    "limit": "compute" if limit.limited_by == "arithmetic" else "bandwidth",
                }
                rows.append(row)
        return rows

    def control(self) -> list[Measurement]:
        """Return the A/A control as measurements: the baseline against a copy of it, measured in the same way.

        The control is judged by the variance between processes of other runs, not by its own deviation, so it can fail.
        Where the copy is the baseline object itself it cannot fail, and is not judged.
        """
        measurements = []
        no_copy = self.details.get("control")
        for name, timed in self.timed.items():
            between = process_variance.between_processes(name)
            processes = len(set(timed.control.process or ()))
            replicated = processes >= paired_stats.MINIMUM_PROCESSES  # else `from_pairs` adds this itself
            floor = paired_stats.NORMAL * between.sigma / math.sqrt(processes) if replicated else 0.0
            for metric in METRICS_OF[name]:
                quantity = _quantity(metric, timed.baseline)
                control = paired_samples.from_pairs(metric, name, timed.control, quantity, floor)
                measurements.append(measurement.unjudged(control, str(no_copy)) if no_copy else control)
        return measurements


def compare(
    baseline: nn.Module,
    optimized: nn.Module,
    prompt_BT: torch.Tensor,
    effort: Effort | str,
    *,
    names: Sequence[str] = STANDARD,
    invalid: str | None = None,
    except_for: tuple[str, ...] = (),
    costs: Mapping[str, Any] | None = None,
    baseline_costs: Mapping[str, Any] | None = None,
    fallback: bool = False,
    with_energy: bool = True,
    seed: int = 0,
) -> Compared:
    """Time the workloads `names` of both models on one prompt and return their speed and efficiency.

    `prompt_BT` holds token ids [1, T]; the rows of `batch_decode` are rolled copies of its beginning. `invalid` is the
    finding of the sanity gate, if any: nothing is timed then, and every metric is invalid for that reason.
    `except_for` names conditions in which the arms may differ. `costs` holds options of `cost_model.of` for the
    optimized model (absorbed, overhead, skip_zeros), `baseline_costs` for the baseline. Decoding is timed at a fixed
    context (`workloads.steps`). `fallback`: see `ceilings.explain`.
    """
    effort = settings.read(effort) if isinstance(effort, str) else effort
    listed = [(metric, name) for name in names for metric in METRICS_OF[name]]
    if invalid:
        return Compared([measurement.invalid(metric, name, invalid) for metric, name in listed])
    if not settings.wants("performance", "efficiency"):
        return Compared([measurement.unavailable(metric, name, settings.why_left_out()) for metric, name in listed])
    weight = next(baseline.parameters())
    peaks = ceilings.measure(weight.device.type, weight.dtype)
    hints: dict[str, Any] = {
        "zero_share": cost_model.zero_share(optimized),
        "fallback": fallback,
        "working_set_bytes": cost_model.weights_bytes(optimized),
    }
    measurements: list[Measurement] = []
    timed: dict[str, Timed] = {}
    models = baseline, optimized
    arms, used = {}, {}
    for name in names:
        arms[name] = _workload(name, baseline, prompt_BT, effort), _workload(name, optimized, prompt_BT, effort)
        workloads.assert_same_conditions(*arms[name], except_for=except_for)
        used[name] = _cost(baseline, arms[name][0], baseline_costs), _cost(optimized, arms[name][1], costs)
    pairs, details = _pairs(models, arms, prompt_BT, effort, seed, except_for)
    for name, ((base_cost, base_use), (opt_cost, opt_use)) in used.items():
        timed[name] = Timed(*arms[name], *pairs[name], (base_cost, opt_cost))
        measurements += _explained(name, timed[name], hints, peaks)
        judged = pairs[name][0].baseline_seconds, pairs[name][0].optimized_seconds
        measurements += full_depth.speed(name, arms[name], models, judged, process=pairs[name][0].process)
        measurements += _cpu_use(name, timed[name], (base_use, opt_use))
    if with_energy and settings.wants("efficiency") and timed:
        name = "decode" if "decode" in timed else next(iter(timed))
        joules = _energy(name, timed[name], models, prompt_BT, effort, seed)
        measurements = [*energy.judge_once(joules, measurements), *joules]
    return Compared(measurements, timed, _details(timed, peaks) | details | replication.shortened(), peaks)


def _pairs(
    models: tuple[nn.Module, nn.Module],
    arms: Mapping[str, tuple[Workload, Workload]],
    prompt_BT: torch.Tensor,
    effort: Effort,
    seed: int,
    except_for: Sequence[str],
) -> tuple[dict[str, tuple[Pairs, Pairs]], dict[str, object]]:
    """Return the pairs and A/A control of every workload, and details for the record.

    They are timed in several fresh processes where files hold the models completely, else in this process; the details
    then state the reason.
    """
    pairs, reason = replication.in_processes(models, arms, prompt_BT, effort, seed=seed, except_for=except_for)
    if not reason:
        return pairs, {}
    details: dict[str, object] = {"timed in one process": reason}
    if replication.are_small(models):
        fresh = fresh_copies(dict(zip(("baseline", "optimized", "copy"), (*models, models[0]))), seed)
        again, shared = fresh["copy"]
        if aged := [name for name in ("baseline", "optimized") if fresh[name][1]]:
            details["age of the arms"] = f"no copy of the {' and the '.join(aged)} model: both originals are timed"
        else:
            copies = fresh["baseline"][0], fresh["optimized"][0]
            arms = {name: _on_copies(name, works, copies, prompt_BT, effort) for name, works in arms.items()}
    else:
        again, shared = separate_copy(models[0])
    if shared:
        details["control"] = shared
    for name, works in arms.items():
        third = _workload(name, again, prompt_BT, effort)
        third()
        least = replication.rounds_alone(third, effort)
        for work in (*works, third):
            if work.restart:
                work.restart()
        length: dict[str, Any] = {"blocks": least, "total": replication.block_seconds(effort) * effort.blocks}
        pairs[name] = with_control(*works, third, **length, seed=seed, disturbance=disturbance.watch)
    return pairs, details


def _on_copies(
    name: str,
    works: tuple[Workload, Workload],
    copies: tuple[nn.Module, nn.Module],
    prompt_BT: torch.Tensor,
    effort: Effort,
) -> tuple[Workload, Workload]:
    """Return the works of both arms on copies of their models, or both works unchanged where one copy produces other
    tokens: an older model next to a fresh copy seems slower for its age alone (`fresh_copies`).
    """
    first, second = (_on_copy(name, work, model, prompt_BT, effort) for work, model in zip(works, copies))
    return works if first is works[0] or second is works[1] else (first, second)


def _on_copy(name: str, work: Workload, model: nn.Module, prompt_BT: torch.Tensor, effort: Effort) -> Workload:
    """Return the work, warmed up, on a copy of its model; the work itself where the copy produces other tokens."""
    again = _workload(name, model, prompt_BT, effort)
    again()
    return again if workloads.output_hash(again) == workloads.output_hash(work) else work


def _workload(name: str, model: nn.Module, prompt_BT: torch.Tensor, effort: Effort) -> Workload:
    return workloads.standard(name, model, prompt_BT, effort.new_tokens, effort.batch)


def _cost(model: nn.Module, work: Workload, options: Mapping[str, Any] | None) -> tuple[Cost, Use]:
    """Return the cost of one call (FLOPs and bytes, with the experts that its steps really use) and its CPU use, both
    from one call outside the judged timing.
    """
    with expert_usage.counted(model) as usage:
        use = cpu.use(work, 0.0)
        for _ in range(work.turns - 1):
            work()
    work.step_seconds.clear()
    counts: dict[str, Any] = {"hit": usage.mean(work.batch), "read_hit": usage.mean(work.batch * work.prompt_tokens)}
    return cost_model.of(model, work, **counts, **(options or {})), use


def _quantity(metric: str, work: Workload) -> float:
    """Return the quantity that one call's time is related to: tokens for a rate, steps or one call for a latency."""
    if metric == "time_per_output_token_ms":
        return work.new_tokens
    return 1 if metric.endswith("_ms") else work.tokens


def _explained(name: str, timed: Timed, hints: Mapping[str, Any], peaks: Ceilings) -> list[Measurement]:
    """Return the workload's rates and latencies, each compared with its bound, and the utilisations."""
    rates = []
    for metric in METRICS_OF[name]:
        rate = paired_samples.from_pairs(metric, name, timed.pairs, _quantity(metric, timed.baseline), timed.control)
        rates.append(ceilings.explain(rate, timed.costs, timed.seconds, peaks, **hints))
    rates += _cpu_time(name, timed)
    return rates + ceilings.utilisation(name, timed.costs, timed.seconds, peaks)


def _cpu_time(name: str, timed: Timed) -> list[Measurement]:
    """Return CPU seconds per token, from the same turns as the wall time; not judged where the work runs on a GPU with
    an energy counter.
    """
    pairs, control = timed.pairs, timed.control
    if not pairs.cpu_seconds or not control.cpu_seconds:
        return []
    tokens = timed.baseline.tokens
    base, opt, copy = ([s / tokens for s in times] for times in (*pairs.cpu_seconds, control.cpu_seconds[1]))
    options: dict[str, Any] = {"workload": name, "source": pairs.describe()}
    seconds = energy.cpu_seconds(base, opt, copy, process=pairs.process, **options)
    device = str(timed.baseline.conditions["device"])
    if seconds.margin is None or energy.counter(device).kind != "nvml":
        return [seconds]
    return [measurement.unjudged(seconds, energy.BESIDE_A_GPU)]


def _energy(
    name: str,
    timed: Timed,
    models: tuple[nn.Module, nn.Module],
    prompt_BT: torch.Tensor,
    effort: Effort,
    seed: int,
) -> list[Measurement]:
    """Return the joules of a workload: from an energy counter, read over separate windows, or else estimated from the
    timed turns.
    """
    device = next(models[0].parameters()).device.type
    source = energy.counter(device)
    if source.of_times and timed.pairs.cpu_seconds and timed.control.cpu_seconds:
        return energy.of_turns(timed.pairs, timed.control, timed.baseline.tokens, workload=name, source=source)
    options: dict[str, Any] = {"workload": name, "blocks": effort.blocks, "device": device, "seed": seed}
    options |= {"source": source, "with_cpu_seconds": False, "disturbance": disturbance.watch}
    base, opt, copy = _of_one_age(name, (timed.baseline, timed.optimized), models, prompt_BT, effort, seed)
    return energy.per_token(base, opt, control=copy, **options)


def _of_one_age(
    name: str,
    works: tuple[Workload, Workload],
    models: tuple[nn.Module, nn.Module],
    prompt_BT: torch.Tensor,
    effort: Effort,
    seed: int,
) -> tuple[Workload, Workload, Workload | None]:
    """Return the works of baseline, optimized and control, all on fresh copies of their models: an older model takes
    longer for its age alone (`fresh_copies`). For large models, and where a model cannot be copied or its copy produces
    other tokens, return both works unchanged, and None as control.
    """
    if not replication.are_small(models):
        return *works, None
    fresh = fresh_copies(dict(zip(("baseline", "optimized", "copy"), (*models, models[0]))), seed)
    if fresh["baseline"][1] or fresh["optimized"][1]:
        return *works, None
    renewed = _on_copies(name, works, (fresh["baseline"][0], fresh["optimized"][0]), prompt_BT, effort)
    if renewed[0] is works[0]:
        return *works, None
    return *renewed, _workload(name, fresh["copy"][0], prompt_BT, effort)


def _cpu_use(name: str, arms: Timed, first: tuple[Use, Use]) -> list[Measurement]:
    """Return the CPU use of the timed turns. With a GPU, return CPU and GPU use: of the `first` calls where these were
    long, else of further calls.
    """
    base, opt = first
    # Whether there is a GPU is read from its handle: a call shorter than the sampling interval has no GPU sample.
    if disturbance.gpu_handle() is None and (busy := arms.pairs.cpu_seconds):
        wall = arms.pairs.baseline_seconds, arms.pairs.optimized_seconds
        base, opt = (Use(sum(seconds), sum(spent), base.cores) for seconds, spent in zip(wall, busy))
    elif min(base.wall_seconds, opt.wall_seconds) < LONG_SECONDS:
        base, opt = cpu.use(arms.baseline, 0.2), cpu.use(arms.optimized, 0.2)
    uses = [measurement.informative("cpu_utilisation", name, base.utilisation, opt.utilisation, opt.source)]
    if base.gpu is not None and opt.gpu is not None:
        source = "NVML, sampled 20 times a second"
        uses.append(measurement.informative("gpu_utilisation", name, base.gpu, opt.gpu, source))
    return uses


def _details(timed: dict[str, Timed], peaks: Ceilings) -> dict[str, object]:
    """Return the machine's ceilings, and p50, p95 and p99 of single decoding steps (None where there are too few)."""
    details: dict[str, object] = {"ceilings": {**asdict(peaks), "provenance": "measured", "source": peaks.source}}
    steps = {
        name: {
            arm: paired_stats.percentiles([1000 * second for second in work.step_seconds])
            for arm, work in (("baseline", arms.baseline), ("optimized", arms.optimized))
        }
        for name, arms in timed.items()
        if arms.baseline.step_seconds and arms.optimized.step_seconds
    }
    if steps:
        clock = "events in the device's stream" if peaks.device.startswith("cuda") else "perf_counter"
        source = f"{clock} around every decoding step, warm-up and controls included"
        details["step_milliseconds"] = {"value": steps, "provenance": "measured", "source": source}
    return details
