"""The single list of metrics: every metric name a record may contain, with its unit, dimension, direction and practical
margin. Knows nothing about how a metric is measured. A margin is the smallest change worth calling better or worse,
fixed here before anything is measured. Metrics without a margin are informative: they describe and are never judged.
"""

from dataclasses import dataclass
from typing import Literal

from lib.errors import UserError, suggest

DIMENSIONS = ("performance", "accuracy", "resources", "efficiency")
SPEED_MARGIN = 0.02
SIZE_MARGIN = 0.01
SCORE_MARGIN = 0.02
PERPLEXITY_MARGIN = 0.03
ENERGY_MARGIN = 0.03


@dataclass(frozen=True)
class Metric:
    """One metric. `margin` is a share of the baseline, or in the metric's unit if `margin_kind` is "absolute"."""

    unit: str
    dimension: Literal["performance", "accuracy", "resources", "efficiency"]
    higher_is_better: bool
    margin: float | None = None
    margin_kind: Literal["relative", "absolute"] = "relative"


def _performance(unit: str, higher_is_better: bool, margin: float | None = SPEED_MARGIN) -> Metric:
    return Metric(unit, "performance", higher_is_better, margin)


def _score(margin: float | None = SCORE_MARGIN, unit: str = "share", higher_is_better: bool = True) -> Metric:
    return Metric(unit, "accuracy", higher_is_better, margin, "absolute")


def _resource(unit: str, higher_is_better: bool = False, margin: float | None = SIZE_MARGIN) -> Metric:
    return Metric(unit, "resources", higher_is_better, margin)


def _efficiency(unit: str, higher_is_better: bool, margin: float | None = SPEED_MARGIN) -> Metric:
    return Metric(unit, "efficiency", higher_is_better, margin)


METRICS: dict[str, Metric] = {
    # Performance. Rates and latencies of a workload are computed from the same times.
    "prefill_tokens_per_second": _performance("tokens/s", True),
    "time_to_first_token_ms": _performance("ms", False),
    "decode_tokens_per_second": _performance("tokens/s", True),
    "time_per_output_token_ms": _performance("ms", False),
    "time_between_tokens_p99_ms": _performance("ms", False, None),
    "batch_decode_tokens_per_second": _performance("tokens/s", True),
    "generate_tokens_per_second": _performance("tokens/s", True),
    # A slice's rates, scaled to the number of blocks of the whole model: derived, never judged.
    "full_depth_prefill_tokens_per_second": _performance("tokens/s", True, None),
    "full_depth_decode_tokens_per_second": _performance("tokens/s", True, None),
    "full_depth_batch_decode_tokens_per_second": _performance("tokens/s", True, None),
    "attention_ms": _performance("ms", False),
    "feed_forward_ms": _performance("ms", False),
    "requests_per_second": _performance("requests/s", True),
    "goodput_requests_per_second": _performance("requests/s", True),
    "goodput_share": _performance("share", True),
    "settling_seconds": _performance("s", False, None),
    "simulation_error": _performance("share", False, None),
    "objective_missed_seconds": _performance("s", False, None),
    "overshoot_share": _performance("share", False, None),
    "limit_reversals": _performance("reversals", False, None),
    "latency_p50_ms": _performance("ms", False),
    "latency_p95_ms": _performance("ms", False),
    "latency_p99_ms": _performance("ms", False),
    "load_seconds": _performance("s", False, None),
    "first_call_ms": _performance("ms", False, None),
    "swap_ms": _performance("ms", False, None),
    # Accuracy.
    "f1_macro": _score(),
    "precision_macro": _score(),
    "recall_macro": _score(),
    "accuracy": _score(),
    "accuracy_norm": _score(),  # of public tasks: picks the choice with the highest likelihood per character
    "exact_match": _score(),
    "retrieval_exact_match": _score(),
    "perplexity": Metric("perplexity", "accuracy", False, PERPLEXITY_MARGIN),
    "kl_divergence_nats": _score(None, "nats/token", False),
    "top1_agreement": _score(None),
    "same_answers": _score(None),
    "flips": _score(None, "items", False),
    "flips_to_wrong": _score(None, "items", False),
    "flips_to_right": _score(None, "items", True),
    "attention_mass_recall": _score(None),
    "profile_disagreement": _score(None, "share", False),
    "quality_estimate_error": _score(None, "share", False),
    "false_rollback_share": _score(None, "share", False),
    "fault_detection_seconds": _score(None, "s", False),
    "draft_acceptance": _score(None),
    # Resources.
    "parameters": _resource("parameters"),
    "active_parameters": _resource("parameters"),
    "weights_bytes": _resource("bytes"),
    "checkpoint_bytes": _resource("bytes"),
    "peak_memory_bytes": _resource("bytes", margin=SPEED_MARGIN),
    "peak_memory_after_load_bytes": _resource("bytes", margin=SPEED_MARGIN),
    "peak_memory_above_start_bytes": _resource("bytes", margin=SPEED_MARGIN),
    "peak_tensor_bytes": _resource("bytes"),
    "kv_cache_bytes_per_token": _resource("bytes/token"),
    "kv_cache_peak_bytes": _resource("bytes"),
    "full_depth_parameters": _resource("parameters", margin=None),
    "full_depth_weights_bytes": _resource("bytes", margin=None),
    "full_depth_kv_cache_bytes_per_token": _resource("bytes/token", margin=None),
    "cpu_utilisation": _resource("share of given cores", margin=None),
    "gpu_utilisation": _resource("share", margin=None),
    # Efficiency.
    "energy_joules_per_token": _efficiency("J/token", False, ENERGY_MARGIN),
    "energy_above_idle_joules_per_token": _efficiency("J/token", False, ENERGY_MARGIN),
    # Decides efficiency where no energy counter is readable: measured user plus system time.
    "cpu_seconds_per_token": _efficiency("s/token", False),
    "tokens_per_joule": _efficiency("tokens/J", True, ENERGY_MARGIN),
    "model_flops_utilisation": _efficiency("share of measured peak", True, None),
    "memory_bandwidth_utilisation": _efficiency("share of measured peak", True, None),
    "prefill_flops_per_token": _efficiency("FLOP/token", False, SIZE_MARGIN),
    "decode_flops_per_token": _efficiency("FLOP/token", False, SIZE_MARGIN),
    "decode_bytes_per_token": _efficiency("bytes/token", False, SIZE_MARGIN),
    "weight_bytes_read_per_token": _efficiency("bytes/token", False, SIZE_MARGIN),
    "attention_density": _efficiency("share", False, None),
    "cache_read_share": _efficiency("share", False, None),
    "batch_rows": _efficiency("rows", True, None),
    "apply_seconds": _efficiency("s", False, None),
    "apply_joules": _efficiency("J", False, None),
    "break_even_tokens": _efficiency("tokens", False, None),
    "modularity_score": _efficiency("share", True, None),
    "files_touched": _efficiency("files", False, None),
    "lines_written": _efficiency("lines", False, None),
    # A search: the hypervolume of its Pareto front (cost share times nats per token), its evaluations and seconds.
    "front_hypervolume": _efficiency("cost share x nats/token", True, None),
    "search_evaluations": _efficiency("evaluations", False, None),
    "search_seconds": _efficiency("s", False, None),
}


def metric(name: str) -> Metric:
    """Return the metric called `name`. Raises UserError for an unknown name, suggesting the nearest valid one."""
    if name not in METRICS:
        raise UserError(
            f'unknown metric "{name}": lib/measure/metrics/catalogue.py lists the valid ones.{suggest(name, METRICS)}'
        )
    return METRICS[name]
