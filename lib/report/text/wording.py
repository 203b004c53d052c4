"""Names and signs shown to readers: titles of stems, labels of metrics, words and signs of verdicts.

Derived from the identifiers wherever the result reads well, so that a new optimization or metric needs no entry. Knows
no HTML and no numbers.
"""

import re

SIGNS = {
    "better": "▲",
    "maintained": "✓",
    "equivalent": "=",
    "mixed": "◆",
    "inconclusive": "?",
    "worse": "▼",
    "not_maintained": "✗",
    "invalid": "!",
    "not_exercised": "○",
    "unavailable": "–",
    "informative": "·",
    "ok": "✓",
    "failed": "✗",
    "not_applicable": "–",
    "damaged": "!",
    "missing": "·",
    "refuted": "✗",
    "not_refuted": "✓",
    "cannot_tell": "?",
    "held": "✓",
    "not_held": "✗",
}
_SPELLED = {"nas": "NAS", "automl": "AutoML", "glm": "GLM", "vl": "VL", "qwen3": "Qwen3", "smollm2": "SmolLM2"}
_LABELS = {
    "f1_macro": "F1 (macro)",
    "precision_macro": "precision (macro)",
    "recall_macro": "recall (macro)",
    "accuracy_norm": "accuracy, per character",
    "retrieval_exact_match": "key-value retrieval, exact match",
    "kl_divergence_nats": "KL divergence from the baseline",
    "top1_agreement": "top-1 agreement with the baseline",
    "flips": "answers flipped",
    "flips_to_wrong": "answers flipped to wrong",
    "flips_to_right": "answers flipped to right",
    "time_to_first_token_ms": "time to first token",
    "time_per_output_token_ms": "time per output token",
    "time_between_tokens_p99_ms": "time between tokens p99",
    "prefill_tokens_per_second": "prefill rate",
    "decode_tokens_per_second": "decode rate",
    "batch_decode_tokens_per_second": "decode rate, batched",
    "generate_tokens_per_second": "generation rate, end to end",
    "requests_per_second": "request rate",
    "goodput_requests_per_second": "goodput",
    "weights_bytes": "weights in memory",
    "checkpoint_bytes": "checkpoint on disk",
    "peak_memory_bytes": "peak memory",
    "peak_tensor_bytes": "peak of live tensors",
    "peak_memory_after_load_bytes": "peak memory after load",
    "peak_memory_above_start_bytes": "peak memory above start",
    "kv_cache_bytes_per_token": "KV cache",
    "energy_joules_per_token": "energy",
    "energy_above_idle_joules_per_token": "energy above idle",
    "tokens_per_joule": "tokens per joule",
    "cpu_seconds_per_token": "processor time per token",
    "model_flops_utilisation": "model FLOPs utilisation",
    "memory_bandwidth_utilisation": "memory bandwidth utilisation",
    "prefill_flops_per_token": "prefill compute",
    "decode_flops_per_token": "decode compute",
    "decode_bytes_per_token": "decode memory traffic",
    "weight_bytes_read_per_token": "weights read from file",
    "apply_seconds": "time to apply",
    "first_call_ms": "first call",
    "load_seconds": "load time",
    "break_even_tokens": "break-even",
    "apply_joules": "energy to apply",
    "swap_ms": "hot swap",
    "full_depth_prefill_tokens_per_second": "prefill rate at full depth",
    "full_depth_decode_tokens_per_second": "decode rate at full depth",
    "full_depth_batch_decode_tokens_per_second": "decode rate at full depth, batched",
    "full_depth_parameters": "parameters at full depth",
    "full_depth_weights_bytes": "weights at full depth",
    "full_depth_kv_cache_bytes_per_token": "KV cache at full depth",
}


def title(stem: str) -> str:
    """Return an optimization's stem as a title: `structured_pruning` → `Structured pruning`."""
    words = [_SPELLED.get(word, word) for word in stem.split("_")]
    words[0] = words[0][:1].upper() + words[0][1:]
    return " ".join(words)


def model_title(stem: str) -> str:
    """Return a model's stem in its usual spelling: `qwen3-coder-30b` → `Qwen3-Coder-30B`."""
    words = [
        _SPELLED.get(word) or (word.upper() if word[:1].isdigit() else word.capitalize()) for word in stem.split("-")
    ]
    return "-".join(words)


def label(metric: str) -> str:
    """Return a metric's label for tables, without its unit."""
    if metric in _LABELS:
        return _LABELS[metric]
    text = metric
    for unit in ("_tokens_per_second", "_seconds", "_bytes", "_ms"):
        text = text.removesuffix(unit)
    return text.replace("_p50", " p50").replace("_p95", " p95").replace("_p99", " p99").replace("_", " ")


def words(verdict: str) -> str:
    """Return a verdict or status in words: `not_maintained` → `not maintained`."""
    return verdict.replace("_", " ")


def signed(verdict: str) -> str:
    """Return sign and words, so that no meaning rests on colour: `▲ better`."""
    return f"{SIGNS.get(verdict, '·')} {words(verdict)}"


def untagged(text: str) -> str:
    """Return `text` for Markdown with every start of an HTML tag escaped: a model may have any name."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text)


def one_line(text: str, limit: int = 240) -> str:
    """Return `text` on one line, cut at `limit` characters."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= limit else flat[: limit - 1].rstrip() + "…"
