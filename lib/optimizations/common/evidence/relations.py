"""Published relations between numbers that a sound run must reproduce, judged from this run's numbers.

A relation is not a claim of a notebook but a check on it: a workbench that ranks magnitude pruning ahead of SparseGPT
on a real language model is wrong somewhere. Each function takes measured values with their intervals and returns a
`Judged`: held, not held, or None if the run cannot tell (intervals overlap, or something was not measured). Thresholds
are constants here, fixed before anything is measured. Absolute figures are not compared: they belong to other models.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from lib.measure.metrics.measurement import Measurement
from lib.optimizations.common.evidence.claims import Interval

COLLAPSED = 10.0  # times the dense perplexity
USABLE = 2.0  # times the dense perplexity
NOTHING_LOST = 0.005  # of the perplexity
STRONGLY = 0.1  # of the perplexity
FEW_POINTS = 0.03  # of accuracy
PAYS = 1.02  # times as fast as the baseline: beyond the margin of speed


class Judged(NamedTuple):
    """A relation, its published figures and their source, whether it held in this run, and the evidence."""

    relation: str
    published: str
    source: str
    held: bool | None
    evidence: str


# Relation, published figures (perplexity on WikiText-2 unless it says otherwise), source.
STATEMENTS = {
    "methods": (
        "At one share of zeros in all matrices: SparseGPT no worse than Wanda, Wanda far better than magnitude.",
        "at 50 %, in sequence: LLaMA-7B 5.68 → 7.22, 7.26, 17.3; OPT-125M 27.7 → 36.9, 39.3, 193",
        "Frantar & Alistarh 2023; Sun et al. 2024; Mozaffari et al. 2025, tables 13 and 14",
    ),
    "patterns": (
        "2:4 is worse than unstructured for each method compared; where it was measured, 4:8 lies between.",
        "OPT-125M at 50 %, SparseGPT, Wanda, magnitude: 36.9, 39.3, 193; 2:4 60.7, 81.6, 341",
        "Frantar & Alistarh 2023; Mozaffari et al. 2025, tables 13 and 14",
    ),
    "rows": (
        "Wanda that compares weights within an output row is better than within a matrix.",
        "LLaMA-7B at 50 % 7.26 against 7.95",
        "Sun et al. 2024",
    ),
    "svd": (
        "Plain SVD at 20 % fewer parameters collapses, whitened SVD does not.",
        "LLaMA-7B 5.68 → more than 20,000 against 7.94",
        "Wang et al. 2025 (SVD-LLM)",
    ),
    "int8": ("Weights in int8 lose less than 0.5 % of perplexity.", "below 0.5 %", "Dettmers et al. 2022"),
    "int4": (
        "int4 in groups of 128 is ahead of each pruning compared at equal bytes.",
        "OPT-125M 27.7 → 29.5 (GPTQ); 36.9 and more at 50 % zeros",
        "Frantar et al. 2023 (GPTQ); Frantar & Alistarh 2023",
    ),
    "gptq": (
        "Rounding to nearest is worse than GPTQ.",
        "OPT-125M int4 30.5 against 29.5",
        "Frantar et al. 2023 (GPTQ)",
    ),
    "ends": ("The first and the last block have the highest influence.", "Llama-2-7B", "Men et al. 2024 (ShortGPT)"),
    "generation": (
        "Where blocks are dropped, generation falls long before multiple choice.",
        "Llama-2-7B without 27 % of its blocks: MMLU 45.4 → 44.0 while generation breaks down",
        "Men et al. 2024 (ShortGPT)",
    ),
    "accuracy": (
        "Perplexity worsens strongly while accuracy moves by few points.",
        "OPT-125M at 50 %: 27.7 → 36.9 and more, mean accuracy 35.9 → 34.7",
        "Mozaffari et al. 2025, tables 13 and 14",
    ),
    "density": (
        "The density at a fixed τ, a share of the estimated mass, falls with the length of the prompt.",
        "falls from 4k to 128k tokens",
        "Xu et al. 2025 (XAttention)",
    ),
    "short": ("Sparse attention does not pay on short inputs.", "gains begin at thousands of tokens", "Xu et al. 2025"),
    "layers": (
        "The first two blocks hold the least mass in few pages.",
        "blocks 0 and 1 are left dense",
        "Tang et al. 2024 (Quest)",
    ),
    "kernel": (
        "The gain end to end is far below the gain of the kernel.",
        "attention 7.03×, end to end 2.23×",
        "Tang et al. 2024 (Quest)",
    ),
}  # fmt: skip


def _judged(key: str, held: bool | None, evidence: str) -> Judged:
    return Judged(*STATEMENTS[key], held, evidence)


def with_weights(judged: Judged, random: bool) -> Judged:
    """Return `judged`, a relation that needs trained weights; undecided if the weights are `random`."""
    return judged._replace(held=None, evidence=f"random weights; {judged.evidence}") if random else judged


def on_a_busy_machine(judged: Judged, reason: str | None) -> Judged:
    """Return `judged`, a relation between times; undecided if timings are not judged, for `reason`."""
    return judged._replace(held=None, evidence=f"{judged.evidence}; {reason}") if reason else judged


def below(low: Interval, high: Interval, ties: bool = False) -> bool | None:
    """Return whether `low` lies below `high`. If the intervals overlap: True if `ties` are allowed, else None."""
    if low.high < high.low:
        return True
    if low.low > high.high:
        return False
    return True if ties else None


def _all(answers: Sequence[bool | None]) -> bool | None:
    """Return False if any answer is False, else None if any is None, else True."""
    return False if False in answers else None if None in answers else True


def methods(sparsegpt: Interval | None, wanda: Interval | None, magnitude: Interval | None) -> Judged:
    """Judge the order of three methods by losses or divergences at the same share of zeros; lower is better."""
    if sparsegpt is None or wanda is None or magnitude is None:
        return _judged("methods", None, "not measured")
    held = _all([below(sparsegpt, wanda, ties=True), below(wanda, magnitude)])
    named = (("SparseGPT", sparsegpt), ("Wanda", wanda), ("magnitude", magnitude))
    return _judged("methods", held, ", ".join(f"{name} {value}" for name, value in named))


def patterns(by_method: Mapping[str, Mapping[str, Interval | None]]) -> Judged:
    """Judge the patterns "unstructured", "4:8" and "2:4" of each method at one share of zeros; 4:8 may be missing."""
    answers: list[bool | None] = []
    evidence = []
    for method, arms in by_method.items():
        free, strict, between = (arms.get(name) for name in ("unstructured", "2:4", "4:8"))
        if free is None or strict is None:
            answers.append(None)
            evidence.append(f"{method}: not measured")
            continue
        answers.append(below(free, strict))
        known = [("unstructured", free), ("2:4", strict)]
        if between is not None:
            answers += [below(free, between, ties=True), below(between, strict, ties=True)]
            known.insert(1, ("4:8", between))
        evidence.append(f"{method}: {', '.join(f'{name} {value}' for name, value in known)}")
    return _judged("patterns", _all(answers) if answers else None, "; ".join(evidence) or "no method was measured")


def rows(per_row: Interval | None, per_matrix: Interval | None) -> Judged:
    """Judge Wanda that compares weights within each output row against Wanda within the whole matrix."""
    if per_row is None or per_matrix is None:
        return _judged("rows", None, "not measured")
    evidence = f"per row {per_row}, per matrix {per_matrix}"
    return _judged("rows", below(per_row, per_matrix), evidence)


def svd(dense: float | None, plain: Interval | None, whitened: Interval | None) -> Judged:
    """Judge perplexities: plain SVD at least COLLAPSED times the dense model's, whitened SVD at most USABLE times."""
    if dense is None or plain is None or whitened is None:
        return _judged("svd", None, "not measured")
    collapsed = True if plain.low >= COLLAPSED * dense else False if plain.high < COLLAPSED * dense else None
    usable = True if whitened.high <= USABLE * dense else False if whitened.low > USABLE * dense else None
    evidence = f"dense {dense:.3g}, plain {plain}, whitened {whitened}"
    return _judged("svd", _all([collapsed, usable]), evidence)


def int8(ratio: Interval | None) -> Judged:
    """Judge the perplexity of int8 as a ratio to the dense model's."""
    if ratio is None:
        return _judged("int8", None, "not measured")
    limit = 1 + NOTHING_LOST
    held = True if ratio.high < limit else False if ratio.low >= limit else None
    return _judged("int8", held, f"ratio of perplexities {ratio}, limit {limit:g}")


def int4(int4_arm: Interval | None, pruned: Mapping[str, Interval | None]) -> Judged:
    """Judge int4 against every pruned arm of the same size in bytes."""
    known = {name: arm for name, arm in pruned.items() if arm is not None}
    if int4_arm is None or not known:
        return _judged("int4", None, "not measured")
    evidence = ", ".join(f"{name} {arm}" for name, arm in (("int4", int4_arm), *known.items()))
    return _judged("int4", _all([below(int4_arm, arm) for arm in known.values()]), evidence)


def gptq(by_gptq: Interval | None, to_nearest: Interval | None) -> Judged:
    """Judge GPTQ against rounding to nearest at the same bits."""
    if by_gptq is None or to_nearest is None:
        return _judged("gptq", None, "not measured")
    evidence = f"GPTQ {by_gptq}, to nearest {to_nearest}"
    return _judged("gptq", below(by_gptq, to_nearest), evidence)


def perplexity_of(measurement: Measurement | None) -> Interval | None:
    """Return the perplexity of an optimized model with its interval; None if either is missing."""
    if measurement is None or measurement.optimized is None or not measurement.baseline or not measurement.ci:
        return None
    return Interval(measurement.optimized, *(measurement.baseline * end for end in measurement.ci))


def ends(influence: Sequence[float]) -> Judged:
    """Judge the influence of the blocks, given in model order: the first and last block must be the two highest."""
    if len(influence) < 4:
        return _judged("ends", None, f"{len(influence)} blocks are too few for an order")
    order = sorted(range(len(influence)), key=lambda index: -influence[index])
    evidence = ", ".join(f"block {index} {influence[index]:.3g}" for index in order[:3])
    return _judged("ends", set(order[:2]) == {0, len(influence) - 1}, f"highest: {evidence}")


def layers(mass: Sequence[float]) -> Judged:
    """Judge the share of attention mass in the best pages of each block, given in model order: the first two blocks
    must have the lowest shares, even if they read all pages.
    """
    if len(mass) < 4:
        return _judged("layers", None, f"{len(mass)} blocks are too few for an order")
    if min(mass) >= 1:
        return _judged("layers", None, "all pages are read in every block")
    order = sorted(range(len(mass)), key=lambda index: mass[index])
    evidence = ", ".join(f"block {index} {mass[index]:.3g}" for index in order[:3])
    return _judged("layers", set(order[:2]) == {0, 1}, f"least: {evidence}")


def lost(measurement: Measurement | None) -> Interval | None:
    """Return the share of a score that is lost, with its interval; None if there is no ratio or interval."""
    if measurement is None or measurement.ratio is None or measurement.ci is None:
        return None
    low, high = measurement.ci
    return Interval(1 - measurement.ratio, 1 - high, 1 - low)


def generation(generated: Measurement | None, chosen: Measurement | None) -> Judged:
    """Judge the loss of generated answers (exact match) against that of multiple choice, with the same blocks gone."""
    falls, stays = lost(generated), lost(chosen)
    if falls is None or stays is None:
        return _judged("generation", None, "not measured, or nothing was right to begin with")
    evidence = f"share lost: generated {falls}, multiple choice {stays}"
    return _judged("generation", below(stays, falls), evidence)


def accuracy(perplexity: Measurement | None, scores: Sequence[Measurement]) -> Judged:
    """Judge whether mean accuracy stays within FEW_POINTS while perplexity worsens by more than STRONGLY."""
    changes = [
        Interval(m.optimized - m.baseline, m.baseline * (m.ci[0] - 1), m.baseline * (m.ci[1] - 1))
        for m in scores
        if m.optimized is not None and m.baseline and m.ci
    ]
    if perplexity is None or not perplexity.ratio or not perplexity.ci or not changes:
        return _judged("accuracy", None, "not measured")
    mean = Interval(*(sum(values) / len(changes) for values in zip(*changes)))
    over = f"change of accuracy over {len(changes)} task{'s' if len(changes) > 1 else ''} {mean}"
    evidence = f"perplexity {perplexity.ratio:.3g}×, {over}"
    if perplexity.ci[0] <= 1 + STRONGLY:
        return _judged("accuracy", None, f"{evidence}: perplexity did not worsen strongly")
    held = True if mean.low >= -FEW_POINTS else False if mean.high < -FEW_POINTS else None
    return _judged("accuracy", held, evidence)


def density(by_tokens: Mapping[int, float]) -> Judged:
    """Judge the density at a fixed τ by prompt length in tokens.

    τ is a share of the estimated mass: the exact mass that is kept may fall with the length as well.
    """
    points = sorted(by_tokens.items())
    if len(points) < 2:
        return _judged("density", None, "fewer than two lengths were measured")
    if points[0][1] >= 1 and points[-1][1] >= 1:
        return _judged("density", None, f"all blocks were kept at {points[0][0]:,} and at {points[-1][0]:,} tokens")
    rises = any(after > before for (_, before), (_, after) in pairwise(points))
    held = False if points[-1][1] >= points[0][1] else None if rises else True
    return _judged("density", held, ", ".join(f"{tokens:,} tokens {share:.2f}" for tokens, share in points))


def short(gains: Mapping[int, Interval]) -> Judged:
    """Judge the speedup at the shortest of at least two prompt lengths in tokens."""
    if len(gains) < 2:
        return _judged("short", None, "fewer than two lengths were timed")
    tokens = min(gains)
    gain = gains[tokens]
    held = True if gain.high <= PAYS else False if gain.low > PAYS else None
    return _judged("short", held, f"{tokens:,} tokens: {gain}")


def kernel(of_kernel: Interval | None, end_to_end: Interval | None, bound: float | None = None) -> Judged:
    """Judge the kernel's speedup against the end-to-end speedup; `bound` is the speedup that the physical bound allows.

    Undecided if the kernel alone is no faster.
    """
    if of_kernel is None or end_to_end is None:
        return _judged("kernel", None, "not measured")
    evidence = f"kernel {of_kernel}, end to end {end_to_end}"
    evidence += "" if bound is None else f"; the bound allows {bound:.3g}"
    if of_kernel.low <= 1:
        return _judged("kernel", None, f"{evidence}: the kernel alone shows no gain")
    return _judged("kernel", below(end_to_end, of_kernel), evidence)
