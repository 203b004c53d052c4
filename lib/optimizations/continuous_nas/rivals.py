"""The strongest rival of a searched architecture: all blocks treated alike, at the same measured latency.

Times do not quite add up, so rivals are chosen by measured time: the nearest choice that is not faster and the nearest
that is. The value at equal speed is interpolated between the two; there is none if both lie on one side when timed
again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_samples, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.paired_stats import NORMAL
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate
from lib.measure.quality.answers import Text
from lib.measure.timing import interleaved, workloads
from lib.measure.timing.control import fresh_copy
from lib.optimizations.common.evidence.claims import ThirdArm
from lib.optimizations.common.search import pareto
from lib.optimizations.continuous_nas.costs.request_costs import RequestProfile

Point = tuple[float, float]  # predicted share of the baseline's time, nats per token
Race = Callable[[nn.Module, int], Measurement]
RESAMPLES = 2000
PREVIEW_PAIRS = 2
ALIKE = 0.02  # relative: speeds that differ by less count as equal


def pairs(effort: Effort, wanted: int) -> int:
    """Return the number of pairs to time: `wanted`, or PREVIEW_PAIRS at effort preview, too few for an interval."""
    return PREVIEW_PAIRS if effort.preview else wanted


def near(effort: Effort) -> int:
    """Return the number of uniform choices to time against the winner."""
    return 3 if effort.preview else 5


def around(points: Sequence[Point], share: float, count: int = 5) -> list[int]:
    """Return the indices of at most `count` non-dominated points (time, divergence), those nearest in time first."""
    return sorted(pareto.front(points), key=lambda index: abs(points[index][0] - share))[:count]


def bracketing(gains: Mapping[int, float]) -> list[int]:
    """Return the nearest rival in speed that is not faster and the nearest that is; only one if a side is empty.

    `gains`: index → measured speed of the judged architecture ÷ that of the rival.
    """
    slower, faster = ([at for at in gains if (gains[at] >= 1) == side] for side in (True, False))
    return [min(side, key=lambda at: abs(math.log(gains[at]))) for side in (slower, faster) if side]


def at_equal_speed(gains: Sequence[float], divergences: Sequence[float]) -> float:
    """Return the divergence of rivals at the speed of the judged architecture, interpolated linearly in log speed and
    log divergence; outside of their range, or with a single rival, that of the nearest.
    """
    order = np.argsort(gains)
    logs = np.log(gains)[order], np.log(divergences)[order]
    return float(np.exp(np.interp(0.0, *logs)))


def race(judged: nn.Module, prompt_BP: torch.Tensor, profile: RequestProfile, seed: int) -> Race:
    """Return a function (rival, blocks) → speed of `judged` ÷ that of the rival on the profile's request.

    The measurement gets no verdict, since there is no A/A control.
    """

    def against(rival: nn.Module, blocks: int) -> Measurement:
        arms = (workloads.generate(fresh_copy(arm), prompt_BP, profile.new_tokens) for arm in (rival, judged))
        pairs = interleaved.paired(*arms, blocks=blocks, fewest=PREVIEW_PAIRS, seed=seed)
        tokens = profile.batch * profile.new_tokens
        return paired_samples.from_pairs("generate_tokens_per_second", "generate", pairs, tokens, None)

    return against


def _ratios(speeds: Sequence[Measurement]) -> list[float]:
    return [speed.ratio for speed in speeds if speed.ratio is not None]


@dataclass(frozen=True)
class RivalComparison:
    """Rivals against the judged architecture.

    `speeds`: judged ÷ rival. `kl_RN`: nats per token from the baseline, per arm (the judged one first) and held-out
    window; empty if no text was read. `controls`: name, purpose and measurements per rival. `source_N`: the document of
    each window, by default a separate one.
    """

    speeds: list[Measurement]
    kl_RN: list[np.ndarray]
    controls: list[ThirdArm]
    source_N: np.ndarray | None = None

    @property
    def has_rival_no_faster(self) -> bool:
        """Whether at least one rival is not faster, within ALIKE."""
        return any(ratio >= 1 - ALIKE for ratio in _ratios(self.speeds))

    @property
    def has_rival_no_slower(self) -> bool:
        """Whether at least one rival is not slower, within ALIKE."""
        return any(ratio <= 1 + ALIKE for ratio in _ratios(self.speeds))

    @property
    def closer(self) -> float | None:
        """Divergence of the rivals at equal speed, or of the nearest in speed, ÷ that of the judged architecture.

        None without text or times, or if an arm does not diverge at all (a choice that keeps the whole model): zero has
        no logarithm.
        """
        return self._closer([float(kl_N.mean()) for kl_N in self.kl_RN]) if self._diverging else None

    @property
    def _diverging(self) -> bool:
        return bool(self.kl_RN and _ratios(self.speeds)) and all(kl_N.mean() > 0 for kl_N in self.kl_RN)

    def _closer(self, kl_R: Sequence[float], speeds_R: Sequence[float] | None = None) -> float:
        return at_equal_speed(speeds_R or _ratios(self.speeds), kl_R[1:]) / kl_R[0]

    def interval(self, seed: int = 0) -> tuple[float, float] | tuple[None, None]:
        """Return the 95 % bootstrap interval of `closer` over the documents of the held-out windows and the speeds.

        The logarithm of each speed is drawn as normal with the width of its interval; a speed without an interval is
        held fixed. The result is widened for small numbers of documents (`paired_stats.small_sample`); (None, None) if
        all windows are from one document. An arm without any divergence in a resample counts as having its smallest
        positive divergence on one window.
        """
        closer, kl_RN = self.closer, np.stack(self.kl_RN) if self.kl_RN else np.empty((0, 0))
        windows = np.arange(kl_RN.shape[1]) if self.source_N is None else self.source_N
        documents, document_N = np.unique(windows, return_inverse=True)
        count = len(documents)
        if closer is None or count < 2:
            return None, None
        draw = np.random.default_rng(seed)
        weight_SN = draw.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)[:, document_N]
        timed = [speed for speed in self.speeds if speed.ratio is not None]
        sigma_R = [np.log(speed.ci[1] / speed.ci[0]) / (2 * NORMAL) if speed.ci else 0.0 for speed in timed]
        speeds_SR = np.exp(np.log(_ratios(timed)) + sigma_R * draw.standard_normal((RESAMPLES, len(timed))))
        least_R = np.where(kl_RN > 0, kl_RN, np.inf).min(1) / kl_RN.shape[1]
        kl_SR = np.maximum(weight_SN @ kl_RN.T / weight_SN.sum(1, keepdims=True), least_R)
        ratios = [self._closer(kl_R.tolist(), speeds_R.tolist()) for kl_R, speeds_R in zip(kl_SR, speeds_SR)]
        ends, middle = np.log(np.quantile(ratios, [0.025, 0.975])), np.log(closer)
        low, high = np.exp(middle + (ends - middle) * paired_stats.small_sample(count))
        return float(low), float(high)

    def refuted(self, seed: int = 0) -> tuple[bool | None, str]:
        """Return whether treating all blocks alike does as well at the same latency, and the ratio of divergences.

        None if the interval of the ratio contains 1, if rivals diverge more but all are faster, or if they diverge less
        but all are slower.
        """
        if not self.kl_RN:
            return None, "no held-out text was read"
        if not _ratios(self.speeds):
            return None, "no rival was timed"
        if self.closer is None:
            arm = "a rival" if self.kl_RN[0].mean() > 0 else "the search's choice"
            return None, f"{arm} does not diverge from the baseline: no ratio of divergences"
        low, high = self.interval(seed)
        evidence = f"{self._compared} ÷ the search's: {self.closer:.3g}"
        if low is None or high is None:
            return None, f"{evidence}; all windows are of one document, so there is no interval"
        evidence += f" ({low:.3g} to {high:.3g})"
        as_good = True if high < 1 else False if low > 1 else None
        if not self.has_rival_no_faster:
            return as_good or None, f"{evidence}; every rival is faster"
        if not self.has_rival_no_slower:
            return None if as_good else as_good, f"{evidence}; every rival is slower"
        return as_good, evidence

    @property
    def _compared(self) -> str:
        """The numerator of `closer`, in words."""
        ratios = _ratios(self.speeds)
        if bracketed(ratios):
            return "divergence at equal speed"
        nearest = min(ratios, key=lambda ratio: abs(math.log(ratio)))
        return f"divergence of the rival nearest in speed, {1 / nearest:.4g} times as fast,"


def bracketed(ratios: Sequence[float]) -> bool:
    """Return whether ratios of speed lie on both sides of 1, so that a value at equal speed can be interpolated."""
    return bool(ratios) and min(ratios) <= 1 <= max(ratios)


def compare(
    judged: nn.Module, rivals: Sequence[nn.Module], run: Race, baseline: Text | None, blocks: int
) -> RivalComparison:
    """Time the rivals again over `blocks` blocks and, if the baseline has read held-out text, read it with all arms."""
    texts: list[Text] = []
    kl_RN: list[np.ndarray] = []
    if baseline:
        read = [evaluate.read(arm, baseline.ids_NT) for arm in (judged, *rivals)]
        texts = [replace(text, source_N=baseline.source_N, name=baseline.name) for text in read]
        kl_RN = [evaluate.divergence(baseline, text)[0] for text in texts]
    means = [float(kl_N.mean()) for kl_N in kl_RN]
    speeds = [run(rival, blocks) for rival in rivals]
    controls: list[ThirdArm] = []
    for at, speed in enumerate(speeds, start=1):
        measurements = [speed]
        if texts:
            measurements += answer_comparison.compare_text(texts[at], texts[0])[:1]
            nats = ("kl_divergence_nats", "prefill", means[at], means[0], "held-out text")
            measurements.append(measurement.informative(*nats))
        controls.append(ThirdArm(f"uniform {at}", "baseline here: all blocks alike", measurements))
    sources = baseline.source_N if baseline else None
    comparison = RivalComparison(speeds, kl_RN, controls, sources)
    if texts and all(mean > 0 for mean in means[1:]) and len(speeds) > 1 and bracketed(_ratios(speeds)):
        source = f"held-out text; on the line between {len(speeds)} rivals in log speed and log KL"
        equal = at_equal_speed(_ratios(speeds), means[1:])
        nats = ("kl_divergence_nats", "prefill, at equal speed", equal, means[0], source)
        between = [measurement.informative(*nats)]
        controls.append(ThirdArm("uniform, at equal speed", "baseline here: between the two", between))
    return comparison
