"""The outcome of streaming: answers to its claims, the record's controls and details.

Everything is computed from the measurements of `experiment` and the other protocols in this folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.measure.compare.speed import Compared
from lib.measure.metrics import digits
from lib.measure.metrics.measurement import Measurement
from lib.models.offload import streamer
from lib.models.offload.residency import Plan
from lib.optimizations.common.evidence import claims
from lib.optimizations.streaming_computation import offload_baseline
from lib.optimizations.streaming_computation.experiment import planned_bytes
from lib.optimizations.streaming_computation.limited import llama_cpp
from lib.optimizations.streaming_computation.limited.decoding import LimitedDecoding
from lib.optimizations.streaming_computation.limited.llama_cpp import LlamaCppRival
from lib.optimizations.streaming_computation.window_quality import LongTexts, does_perplexity_climb

CLAIMS = (
    "The streamed model generates other tokens than the resident one.",
    "The peak memory of a fresh process, above its start, does not fall.",
    "Decoding is no faster than with accelerate's offloading to the disk.",
    "With sinks and a window, perplexity climbs with the length of the text.",
)
LIMITED = "A/A, within the allowance"


def refutations(
    compared: Compared,
    exact: bool,
    equal: Mapping[str, Mapping[str, float]],
    peaks_streamed: list[Measurement],
    offload: Mapping[str, Measurement],
    texts: LongTexts,
) -> list[tuple[str, bool | None, str]]:
    """Return each of `CLAIMS` with whether this run refutes it (None if undecided) and the evidence."""
    peak = next(m for m in peaks_streamed if m.metric == "peak_memory_above_start_bytes")
    answered = [
        _other_tokens(compared, exact, equal["all together"]["same_top"]),
        _no_smaller_peak(peak),
        _no_faster(offload["disk"]),
        does_perplexity_climb(texts),
    ]
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answered, strict=True)]


def _other_tokens(compared: Compared, exact: bool, same_top: float) -> tuple[bool | None, str]:
    """Return whether the timed decoding generated other tokens than the resident model, and the evidence.

    None if nothing was timed, if tokens differ in half precision (not `exact`), where rounding decides ties, or if the
    few generated tokens are equal but the most likely token differs at some position of the text.
    """
    percent = 100 * same_top  # only exactly 100 is shown as "all"
    share = "all" if percent == 100 else f"{percent:.{digits.places(percent, percent, 100.0)}f} % of the"
    evidence = f"{share} positions have the same most likely token"
    decoded = [timed for name, timed in compared.timed.items() if name != "prefill"]
    if not decoded:
        return None, f"nothing was generated; {evidence}"
    outputs = [(timed.baseline.output_BN, timed.optimized.output_BN) for timed in decoded]
    equal = [base.eq(opt) for base, opt in outputs if base is not None and opt is not None]
    same, total = sum(int(tokens.sum()) for tokens in equal), sum(tokens.numel() for tokens in equal)
    refuted = False if same == total and same_top == 1 else True if exact and same != total else None
    return refuted, f"{same} of {total} generated tokens are equal; {evidence}"


def _no_smaller_peak(peak: Measurement) -> tuple[bool | None, str]:
    """Return whether the memory peak does not fall, and the evidence; None if it could not be read or judged."""
    if peak.ratio is None or peak.baseline is None or peak.optimized is None:
        return None, peak.reason or "no peak was read"
    megabytes = f"{peak.baseline / 1e6:.4g} MB resident, {peak.optimized / 1e6:.4g} MB streamed"
    undecided = peak.verdict in ("inconclusive", "informative")
    evidence = f"streamed ÷ resident {claims.ratio_in_words(peak)}: {megabytes}, in fresh processes"
    return None if undecided else peak.verdict != "better", evidence


def _no_faster(offload: Measurement) -> tuple[bool | None, str]:
    """Return whether decoding is no faster than with offloading, and the evidence; None if undecided, with the reason.

    Follows the verdict, which takes more than the practical margin and the noise floor of the A/A control.
    """
    if offload.ci is None or offload.ratio is None:
        return None, offload.reason or "no interval"
    refuted = {"better": False, "worse": True, "equivalent": True}.get(offload.verdict)
    evidence = f"streamed ÷ accelerate {claims.ratio_in_words(offload)}, offloaded to {offload_baseline.place()}"
    return refuted, evidence if refuted is not None else f"{evidence}; {offload.reason or offload.verdict}"


def controls(
    in_chunks: list[Measurement],
    texts: LongTexts,
    retrieved: Mapping[str, Measurement],
    offload: Mapping[str, Measurement],
    rival: LlamaCppRival,
    compared: Compared,
    limited: LimitedDecoding,
) -> list[dict[str, Any]]:
    """Return the name, purpose and measurements of every control, in the form that `record.build` takes."""
    windowed = {**texts.perplexity, **retrieved}
    rows: list[tuple[str, str, list[Measurement]]] = [("prompt in chunks", "weights resident", in_chunks)]
    rows += [(name, "cache of constant size against the whole cache", [m]) for name, m in windowed.items()]
    if limited.offloading:
        rows += [("accelerate, disk, limited", "usual offloading, page cache limited too", limited.offloading)]
    rows += [(f"accelerate, {kind}", "usual offloading", [m]) for kind, m in offload.items()]
    rows += [(llama_cpp.NAME, "another program on the quantized file, not judged", rival.measurements)]
    rows += [("A/A", "a copy of the baseline", compared.control())]
    if limited.control:  # its variance between processes is that of disk reads and holds for no other timing
        rows += [(LIMITED, limited.control_is, limited.control)]
    return [dict(zip(("name", "purpose", "measurements"), row)) for row in rows]


def details(
    equal: Mapping[str, Mapping[str, float]],
    trade: list[dict[str, Any]],
    latent: Mapping[str, object] | None,
    plan: Plan,
    folder: Path,
    texts: LongTexts,
    limited: LimitedDecoding,
    rival: LlamaCppRival,
) -> dict[str, tuple[object, str, str]]:
    """Return the record's details: name → (value, provenance, source)."""
    least, total = streamer.smallest(folder)
    window = {"curves": texts.curves.to_dict("records"), "late_over_early": texts.late_over_early}
    window |= {"reason": texts.reason} if texts.curves.empty else {}
    return {
        "equality": (equal, "measured", "difference ÷ spread of the logits; share of equal top tokens"),
        "limited": (limited.details, "measured", "memory control groups, and the system's count of reads"),
        "llama_cpp": (rival.details, "measured", "fresh processes in turn; the system's counts of each process"),
        "trade": (trade, "measured", "decode, paired with the resident model; bound by reading alone"),
        "absorbed": (latent, "measured", "paired blocks on one filled cache; operations by formula"),
        "plan": (planned_bytes(plan) | {"total": total, "smallest": least}, "derived", "bytes by the plan"),
        "window": (window, "measured", "held-out text, bootstrap intervals over documents"),
    }
