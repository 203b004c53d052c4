"""Check during a search whether a candidate stays within the verdict's quality margins.

Candidates are evaluated on text and items of the split "search", and on key-value retrieval prompts drawn with a
different seed than the final ones: the search and the verdict share no item.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lib.measure.metrics.catalogue import PERPLEXITY_MARGIN, SCORE_MARGIN
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate
from lib.measure.quality.answers import Answers, Text
from lib.models.loading import Loaded
from lib.models.tasks.registry import classifies

KEPT_SCORES = ("f1_macro", "retrieval_exact_match")
OF_PUBLIC_TASKS = ("accuracy", "accuracy_norm", "exact_match")  # used only for tasks without F1
SEED_STEP = 1000  # between the seed of the verdict and the seed of the search
RESAMPLES = 200
ITEMS, VALUES, WINDOWS = 96, 64, 16  # enough that losing one costs less than a margin; fewer at preview
VALUES_AT_REAL_SIZE = 16  # a value takes seconds there: losing a single one excludes a candidate


@dataclass(frozen=True)
class QualityLoss:
    """The quality that a candidate loses against the baseline.

    `lost` is the largest drop of any score, where 1 is a full score (None: not evaluated, since perplexity alone
    excludes the candidate). `perplexity` is the relative growth of perplexity, `bound` its upper 95 % bound.
    """

    lost: float | None
    perplexity: float
    bound: float

    def within(self, margin: float = SCORE_MARGIN, perplexity_margin: float = PERPLEXITY_MARGIN) -> bool:
        """Whether every score loses at most `margin` and the bound of perplexity growth is at most its margin."""
        return self.lost is not None and self.lost <= margin and self.bound <= perplexity_margin

    def why_not(self, margin: float = SCORE_MARGIN, perplexity_margin: float = PERPLEXITY_MARGIN) -> str:
        """Return in words what is lost beyond the margins; empty if nothing is."""
        reasons = []
        if self.lost is not None and not self.lost <= margin:
            reasons.append(f"a score loses {100 * self.lost:.1f} points")
        if not math.isfinite(self.perplexity):
            reasons.append("perplexity is not a number")
        elif not self.bound <= perplexity_margin:
            reasons.append(f"perplexity grows {percent(self.perplexity, 1)} (up to {percent(self.bound, 1)})")
        return ", ".join(reasons)


NOTHING_LOST = QualityLoss(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class SearchQuality:
    """The baseline's answers on the split "search", and the sample sizes used for every candidate."""

    loaded: Loaded
    size: Effort
    seed: int
    baseline: Answers

    def of(self, model: nn.Module, perplexity_margin: float = PERPLEXITY_MARGIN) -> QualityLoss:
        """Return the quality that `model` loses; NOTHING_LOST with random weights, whose answers mean nothing.

        Perplexity comes first. If the bound of its growth exceeds `perplexity_margin`, the tasks are skipped, which
        saves minutes on a real model.
        """
        if self.loaded.random_weights:
            return NOTHING_LOST
        arm = replace(self.loaded, model=model)
        text = evaluate.read_text(arm, "search", self.size, self.seed)
        options: dict[str, Any] = {"resamples": RESAMPLES, "seed": self.seed}
        growth, bound = _growth(answer_comparison.compare_text(_text(self.baseline), text, **options))
        if not bound <= perplexity_margin:
            return QualityLoss(None, growth, bound)
        answers = _answers(self.loaded, self.size, self.seed, model, text)
        judged = answer_comparison.compare(self.baseline, answers, **options)
        drops = [m.baseline - m.optimized for m in _kept(judged) if m.baseline is not None and m.optimized is not None]
        return QualityLoss(_finite(max(drops, default=0.0)), *_growth(judged))


def _kept(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the scores that must be kept: F1, exact retrieval, and the judged score of each public task.

    A public task on which the baseline only guesses has no judged score.
    """
    own = {m.workload for m in measurements if m.metric in KEPT_SCORES}
    public = [m for m in measurements if m.metric in OF_PUBLIC_TASKS and m.workload not in own]
    kept = [m for m in measurements if m.metric in KEPT_SCORES]
    return kept + [m for m in public if m.verdict != "informative"]


def _text(answers: Answers) -> Text:
    assert answers.text is not None, "the split of a search has text"
    return answers.text


def _growth(measurements: Sequence[Measurement]) -> tuple[float, float]:
    """Return the largest relative growth of perplexity and its upper bound; both infinite if it is not a number."""
    if any(m.metric == "perplexity" and m.verdict == "invalid" for m in measurements):
        return math.inf, math.inf
    grown = [(m.ratio - 1, m.bound) for m in measurements if m.metric == "perplexity" and m.ratio is not None]
    growth, bound = max(grown, key=lambda pair: pair[0], default=(0.0, 0.0))
    return _finite(growth), _finite(growth if bound is None else bound)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def prepare(loaded: Loaded, effort: Effort, seed: int, items: int = ITEMS, values: int = VALUES) -> SearchQuality:
    """Return the evaluation of candidates, with the baseline's answers already computed.

    Models of real size get few retrieval values. Effort preview uses half of its own items and values, and at most its
    own number of text windows.
    """
    values, windows = min(values, VALUES_AT_REAL_SIZE) if loaded.scale == "full" else values, WINDOWS
    if effort.preview:
        items, values = min(items, effort.items // 2), min(values, effort.retrieval_prompts // 2)
        windows = min(windows, effort.windows)
    size = replace(effort, items=items, windows=windows, window_tokens=256, retrieval_prompts=values)
    seed += SEED_STEP
    return SearchQuality(loaded, size, seed, _answers(loaded, size, seed, loaded.model))


def _answers(loaded: Loaded, size: Effort, seed: int, model: nn.Module, text: Text | None = None) -> Answers:
    """Return the answers of one arm; `text` is reused if it has been read already.

    A proxy model answers all tasks. A real one answers only the first, since each takes minutes; the verdict uses all.
    """
    names = [task for task in loaded.tasks if classifies(task)]
    chosen = names[:1] if loaded.scale == "full" else names
    options: dict[str, Any] = {"tasks": chosen, "split": "search", "seed": seed, "known_text": text}
    return evaluate.evaluate(loaded, size, model=model, **options)
