"""Handmade and random records for the report tests. No model was run for them."""

import random

from lib.measure.metrics import measurement, paired_samples
from lib.measure.metrics.catalogue import METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.records import record, refutation
from lib.report.records.record import Process, Record

MODELS = ("glm-4.7-flash", "qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b")
ENVIRONMENT = {
    "cpu": "Example Processor 9000",
    "cores_given": 2,
    "gpu": None,
    "packages": {"torch": "2.13.0"},
    "commit": "abc123",
    "parameters": 3_620_000,
}
PRIMARIES = {"performance": ("prefill_tokens_per_second", "prefill"), "accuracy": ("f1_macro", "classify")}


def timed(
    metric: str, ratio: float, half: float = 0.03, verdict: str = "better", workload: str = "prefill"
) -> Measurement:
    return measurement.judged(
        metric, workload, baseline=812.4, optimized=812.4 * ratio, ratio=ratio, ci=(ratio - half, ratio + half), n=12,
        noise_floor=0.012, mde=0.021, verdict=verdict, provenance="measured",
        source="12 balanced AB/BA blocks, perf_counter",
    )  # fmt: skip


def energy(ratio: float, low: float, high: float, verdict: str) -> Measurement:
    """Return energy per token with an interval and a verdict, whether or not they are consistent."""
    return measurement.judged(
        "energy_joules_per_token", "decode", baseline=1.0, optimized=ratio, ratio=ratio, ci=(low, high), n=12,
        noise_floor=0.01, margin=0.03, verdict=verdict, provenance="measured", source="NVML counter",
    )  # fmt: skip


def scored(
    metric: str, baseline: float, optimized: float, verdict: str, half: float = 0.02, workload: str = "classify"
):
    ratio = optimized / baseline
    worst = ratio - 1 + half * 0.84 if metric == "perplexity" else optimized - baseline - half * 0.84
    return measurement.judged(
        metric, workload, baseline=baseline, optimized=optimized, ratio=ratio, ci=(ratio - half, ratio + half), n=400,
        verdict=verdict, provenance="measured", source="400 items, paired bootstrap",
        margin=METRICS[metric].margin, bound=worst,
        reason="400 items are too few: about 1260 would show it maintained" if verdict == "inconclusive" else None,
    )  # fmt: skip


def measurements(accuracy: str = "maintained", speed: str = "better", ratio: float = 1.31) -> list[Measurement]:
    lost = 0.041 if accuracy == "not_maintained" else 0.004
    return [
        timed("prefill_tokens_per_second", ratio, verdict=speed),
        timed("time_to_first_token_ms", 1 / ratio, verdict=speed),
        timed("decode_tokens_per_second", 1.02, 0.04, "inconclusive", "decode"),
        scored("f1_macro", 0.91, 0.91 - lost, accuracy, 0.015),
        scored("retrieval_exact_match", 0.95, 0.94, "inconclusive", workload="retrieval"),
        scored("perplexity", 41.0, 41.5, "maintained", 0.01, "text"),
        measurement.informative("flips", "classify", 0.0, 17.0, "400 items, both directions"),
        measurement.counted("weights_bytes", "load", 7_240_000.0, 5_212_800.0, "sum of the tensors' bytes"),
        measurement.counted("parameters", "load", 3_620_000, 2_606_400, "counted"),
        timed("peak_memory_bytes", 0.93, 0.01, "better", "prefill"),
        measurement.informative(
            "energy_joules_per_token", "decode", 0.0021, 0.0017, "processor time × 6.5 W per core, table of TDPs",
            "estimated", ci=(0.79, 0.85), n=12,
        ),
        measurement.counted("prefill_flops_per_token", "prefill", 7.2e6, 5.2e6, "2·N_act + attention"),
        measurement.unavailable("model_flops_utilisation", "prefill", "the peak of this machine was not measured"),
    ]  # fmt: skip


def process(seconds: int = 60) -> Process:
    chance = random.Random(3)
    times = [index / 2 for index in range(2 * seconds)]
    return Process(
        seconds=times,
        cpu_percent=[min(200.0, max(4.0, chance.gauss(170, 25))) for _ in times],
        memory_bytes=[5e8 + 4e6 * time + chance.gauss(0, 5e6) for time in times],
        interval_seconds=0.5,
        cores=2,
        pinned_to=[0, 1],
        jobs_side_by_side=1,
        cell_seconds={"0": 0.2},
    )


def run(optimization: str = "structured_pruning", model: str = MODELS[1], **options) -> Record:
    built = record.build(
        optimization, model, "proxy", "quick", {"model": model, "ratio": 0.3, "seed": 0},
        options.pop("measurements", None) or measurements(**options),
        controls=[record.Control(name="random saliency", purpose="the same ratio, units chosen by chance",
                                 measurements=[scored("f1_macro", 0.91, 0.71, "not_maintained")])],
        details={"impact": {"provenance": "measured", "source": "400 items per strength", "rows": [{"strength": 0.1}]}},
        environment=ENVIRONMENT,
        primaries=PRIMARIES,
        refutations=[
            refutation.decide("Prefill is not faster than the baseline.", False, "prefill rate 1.31×"),
            refutation.decide("Answers are lost <beyond> the margin.", None, "F1 −0.4 points, margin 2"),
        ],
    )  # fmt: skip
    return built.model_copy(
        update={"key": "0" * 64, "started": "2026-01-31T14:05:00+00:00", "seconds": 61.5, "process": process()}
    )


def without_result(
    status: str, reason: str, optimization: str = "structured_pruning", model: str = MODELS[0]
) -> Record:
    built = record.build(optimization, model, "proxy", "quick", {"seed": 0}, status=status, reason=reason)
    return built.model_copy(update={"started": "2026-01-31T14:05:00+00:00", "seconds": 3.0})


def by_chance(seed: int) -> Record:
    """Return a valid record of random metrics, values and verdicts."""
    chance = random.Random(seed)
    drawn = []
    for name in chance.sample(sorted(METRICS), chance.randint(0, len(METRICS))):
        kind = chance.randrange(5)
        if kind == 0:
            drawn.append(measurement.unavailable(name, "any", "chance said no"))
        elif kind == 1 and METRICS[name].dimension == "accuracy" and chance.random() < 0.2:
            drawn.append(measurement.invalid(name, "any", "one repeated token"))
        elif kind == 2:
            drawn.append(
                measurement.counted(name, "any", chance.choice([0.0, 1e-9, 3.0, 7e11]), chance.random(), "counted")
            )
        else:
            verdicts = ["maintained", "not_maintained", "inconclusive"]
            verdicts = (
                verdicts if METRICS[name].dimension == "accuracy" else ["better", "worse", "equivalent", "inconclusive"]
            )
            drawn.append(timed(name, chance.uniform(0.2, 5), 0.1, chance.choice([*verdicts, "informative"]), "any"))
    return record.build("streaming_computation", chance.choice(MODELS), "proxy", "quick", {"seed": seed}, drawn)


OPTIMIZATIONS = (
    "structured_pruning", "adaptive_sparse_attention", "adaptive_batch_sizes", "continuous_nas",
    "streaming_computation", "tensor_decomposition", "sparse_neural_networks", "modular_components",
    "automl_components", "feedback_mechanisms", "pre_vs_post_optimization",
)  # fmt: skip


def paired(metric: str, gain: float, spread: float = 0.01, workload: str = "prefill", seed: int = 0) -> Measurement:
    """Return a measurement of twelve blocks with a planted gain, judged like a real one."""
    chance = random.Random(f"{metric} {gain} {seed}")
    turned = gain if METRICS[metric].higher_is_better else 1 / gain
    baseline = [800 * chance.lognormvariate(0, 0.05) for _ in range(12)]
    optimized = [value * turned * chance.lognormvariate(0, spread) for value in baseline]
    return paired_samples.from_samples(
        metric, workload, baseline, optimized, source="12 balanced AB/BA blocks, perf_counter", floor=0.008,
        process_sigma=0.0,
    )  # fmt: skip


def whole(optimization: str, model: str, gain: float = 1.2, lost: float = 0.002, seed: int = 0) -> Record:
    """Return a complete record: timed in blocks, several metrics in each dimension, a curve."""
    counted_and_timed = [
        paired("prefill_tokens_per_second", gain, seed=seed),
        paired("decode_tokens_per_second", gain * 0.95, workload="decode", seed=seed),
        scored("f1_macro", 0.91, 0.91 - lost, "maintained" if lost < 0.02 else "not_maintained", 0.01),
        scored("retrieval_exact_match", 0.95, 0.95 - lost / 5, "maintained", 0.01, workload="generate"),
        measurement.counted("weights_bytes", "load", 7_240_000.0, 5_212_800.0, "sum of the tensors' bytes"),
        measurement.counted("parameters", "load", 3_620_000, 2_606_400, "counted"),
        measurement.informative(
            "energy_joules_per_token", "decode", 0.0021, 0.0021 / gain, "processor time × 6.5 W per core", "estimated",
            ci=(0.97 / gain, 1.03 / gain), n=12,
        ),
        measurement.counted("prefill_flops_per_token", "prefill", 7.2e6, 5.2e6, "2·N_act + attention"),
    ]  # fmt: skip
    rows = [
        {"arm": arm, "strength": strength, "value": 0.1 * scale * strength, "low": 0.09 * scale * strength,
         "high": 0.11 * scale * strength, "prefill speed-up": 1 + strength / 100}
        for arm, scale in (("activation", 1.0), ("random", 2.5))
        for strength in (10.0, 30.0, 50.0)
    ]  # fmt: skip
    curve = record.labelled(
        rows, "measured", "KL on held-out text, bootstrap intervals", x="removed, %", y="KL, nats/token"
    )
    built = record.build(
        optimization, model, "proxy", "quick", {"model": model, "seed": 0}, counted_and_timed,
        controls=[record.Control(name="A/A", purpose="baseline against itself", measurements=[paired(
            "prefill_tokens_per_second", 1.0)])],
        details={"impact": curve}, environment=ENVIRONMENT, primaries=PRIMARIES,
    )  # fmt: skip
    about = {"key": f"sha256:{optimization}-{model}-{seed}", "started": "2026-01-31T14:05:00+00:00", "seconds": 61.5}
    return built.model_copy(update=about | {"process": process(5)})


def good(folder, optimizations=OPTIMIZATIONS, seed: int = 0, **options):
    """Write a complete result set of all eleven optimizations on all four models; return it."""
    for optimization in optimizations:
        for model in MODELS:
            run = whole(optimization, model, seed=seed, **options)
            record.write(run, folder / f"{run.stem}.json")
    return folder


def mixed(folder):
    """Write a result set with every possible outcome: gains, losses, failures, gaps, damage; return it."""
    chance = random.Random(11)
    for optimization in OPTIMIZATIONS:
        for model in MODELS:
            gain, lost = chance.lognormvariate(0.15, 0.3), chance.choice([-0.003, 0.0, 0.004, 0.009, 0.05, 0.031])
            run = whole(optimization, model, gain, lost)
            record.write(run, folder / f"{run.stem}.json")
    special = {
        ("continuous_nas", MODELS[3]): without_result("not_applicable", "no experts", "continuous_nas", MODELS[3]),
        ("automl_components", MODELS[0]): without_result(
            "failed", "cell 9 under “Search” (`study.optimize(…)`): MemoryError", "automl_components", MODELS[0]
        ),
    }
    for run in special.values():
        record.write(run, folder / f"{run.stem}.json")
    (folder / f"feedback_mechanisms--{MODELS[1]}.json").unlink()
    (folder / f"feedback_mechanisms--{MODELS[2]}.json").write_text('{"schema": 1, "optim')
    return folder
