"""What an optimization does to a model's answers: the same items for both arms, greedy, paired per item.

`evaluate` asks one arm everything and keeps every answer; `compare` makes measurements of two such sets, so a baseline
is asked once and compared with many arms. Verdicts are of non-inferiority (`lib.measure.quality.noninferiority`). Text
is compared with little memory: kept are the last hidden states, and logits are made again in chunks. Knows no
optimization.

Shapes: N items or windows, T tokens, H hidden, V vocabulary, L labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_stats, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_cache, lm_eval, noninferiority
from lib.measure.timing import workloads
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks as task_list
from lib.models.tasks.registry import HARNESS, classifies
from lib.models.tasks.retrieval import LEAD

SCORES = ("f1_macro", "precision_macro", "recall_macro")
# What `compare` tells of a model whose answers mean something, and of which workload.
ASKED = {name: "classify" for name in (*SCORES, "accuracy", "flips", "flips_to_wrong", "flips_to_right")}
ASKED |= {"retrieval_exact_match": "generate", "perplexity": "prefill"}
ASKED |= {"kl_divergence_nats": "prefill", "top1_agreement": "prefill"}
# Logits held at a time, in elements.
CHUNK_ELEMENTS = 2**24
WINDOWS_AT_ONCE = 4
PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Classified:
    """Answers to a classification task: ids of the items, the true and the chosen label's index, all label scores in
    nats. `answered` is the day on which they were given, where that was before this run.
    """

    task: str
    labels: list[str]
    ids: list[str]
    truth_N: np.ndarray
    chosen_N: np.ndarray
    scores_NL: np.ndarray
    answered: str | None = None

    @property
    def right_N(self) -> np.ndarray:
        return self.truth_N == self.chosen_N


@dataclass(frozen=True)
class Text:
    """How a model read held-out windows: nats per token of each window, and what its logits can be made of again."""

    ids_NT: torch.Tensor
    loss_N: np.ndarray
    hidden_NTH: torch.Tensor = field(repr=False)
    head: nn.Module = field(repr=False)


@dataclass(frozen=True)
class Retrieved:
    """Which values were repeated exactly, over a stated distance in tokens; `answered` as above."""

    distance: int
    right_N: np.ndarray
    answered: str | None = None


@dataclass(frozen=True)
class Answers:
    """All answers of one arm. `reason` says why there are none (random weights)."""

    classified: list[Classified]
    text: Text | None
    recalled: Retrieved | None
    reason: str | None = None


def evaluate(
    loaded: Loaded,
    effort: Effort | str,
    *,
    model: nn.Module | None = None,
    tasks: Sequence[str] | None = None,
    split: str = "final",
    seed: int = 0,
    lead: int = LEAD,
) -> Answers:
    """Ask one arm all its questions and return the answers.

    `loaded` gives tokenizer and tasks; `model` is the arm, by default `loaded.model`. `tasks` are the classification
    tasks, by default those that `loaded` is asked. Random weights are asked nothing; where accuracy is not
    among the dimensions asked for, the final text alone is read. `lead` tokens of text stand before a value to recall.
    A model that is as it was loaded is not asked again what it answered before (`lib.measure.quality.answer_cache`).
    """
    if loaded.random_weights:
        return Answers([], None, None, "random weights: answers carry no information")
    effort = settings.read(effort) if isinstance(effort, str) else effort
    arm = loaded if model is None else replace(loaded, model=model)
    if split == "final" and not settings.wants("accuracy"):  # the text alone, which controls read too
        ids_NT = task_list.text_windows(loaded, split, effort.windows, effort.window_tokens, seed)
        return Answers([], read(arm.model, ids_NT), None, settings.why_left_out())
    names = tasks if tasks is not None else [task for task in loaded.tasks if classifies(task)]
    ids_NT = task_list.text_windows(loaded, split, effort.windows, effort.window_tokens, seed)
    return Answers(
        [classify(arm, name, split, effort.items, seed) for name in names],
        read(arm.model, ids_NT),
        retrieval(arm, effort.retrieval_distance, effort.retrieval_prompts, seed, lead),
    )


def classify(loaded: Loaded, task: str, split: str, limit: int, seed: int = 0) -> Classified:
    """Return the label of highest log-likelihood for each of at most `limit` items of a split (how a task of the
    harness is split, `lib.measure.quality.lm_eval` says).
    """
    if task.startswith(HARNESS):
        labels, ids, truth_N, scores_NL = lm_eval.scores(loaded, task, split, limit, seed)
        return Classified(task, labels, ids, truth_N, scores_NL.argmax(1), scores_NL)
    items = task_list.items(task, split, limit, seed)
    labels = task_list.class_labels(task)
    vocabulary = anatomy(loaded.model).vocabulary
    batch = max(1, min(32, CHUNK_ELEMENTS * 2 // (vocabulary * 256)))
    question = {"task": task, "split": split, "ids": [item.id for item in items]}
    scores, answered = answer_cache.known_or(
        loaded, question, lambda: {"scores_NL": task_list.label_scores(loaded, task, items, batch).numpy()}
    )
    scores_NL, truth_N = scores["scores_NL"], np.array([labels.index(item.label) for item in items])
    return Classified(task, labels, question["ids"], truth_N, scores_NL.argmax(1), scores_NL, answered)


@torch.inference_mode()
def read(model: nn.Module, ids_NT: torch.Tensor) -> Text:
    """Return how `model` reads windows ids_NT: the loss of each, and its last hidden states (kept on the processor)."""
    head = anatomy(model).head
    ids_NT = ids_NT.to(next(model.parameters()).device)
    losses, hidden = [], []
    for ids_BT in ids_NT.split(WINDOWS_AT_ONCE):
        hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        for ids_T, hidden_TH in zip(ids_BT, hidden_BTH):
            loss = sum(
                nn.functional.cross_entropy(logits_CV, target_C, reduction="sum").item()
                for logits_CV, target_C in zip(_logits(head, hidden_TH[:-1]), ids_T[1:].split(_rows(head)))
            )
            losses.append(loss / (len(ids_T) - 1))
        hidden.append(hidden_BTH.cpu())
    return Text(ids_NT.cpu(), np.array(losses), torch.cat(hidden), head)


@torch.inference_mode()
def retrieval(loaded: Loaded, distance: int, count: int, seed: int = 0, lead: int = LEAD) -> Retrieved:
    """Return which of `count` values, stored `distance` tokens ago, the model repeats exactly when it generates
    greedily. `lead` tokens of text stand before them.
    """
    ids_BT, target_BV = task_list.retrieval_prompts(loaded, distance, count, seed, lead)

    def ask() -> dict[str, np.ndarray]:
        right = []
        for prompt_BT, value_BV in zip(ids_BT.split(PROMPTS_AT_ONCE), target_BV.split(PROMPTS_AT_ONCE)):
            work = workloads.generate(loaded.model, prompt_BT, value_BV.shape[1])
            work()
            right.append((work.output_BN.cpu() == value_BV.cpu()).all(1).numpy())
        return {"right_N": np.concatenate(right)}

    question = {"task": "retrieval", "distance": distance, "count": count, "seed": seed, "lead": lead}
    found, answered = answer_cache.known_or(loaded, question, ask)
    return Retrieved(distance, found["right_N"], answered)


@torch.inference_mode()
def divergence(baseline: Text, optimized: Text) -> tuple[np.ndarray, np.ndarray]:
    """Return per window the mean KL(baseline ‖ optimized), in nats, and the share of equal most likely tokens."""
    if not torch.equal(baseline.ids_NT, optimized.ids_NT):
        raise ValueError("the arms read different windows")
    kl_N, agree_N = [], []
    for base_TH, opt_TH in zip(baseline.hidden_NTH, optimized.hidden_NTH):
        kl = agree = 0.0
        for base_CV, opt_CV in zip(_logits(baseline.head, base_TH), _logits(optimized.head, opt_TH)):
            base_CV, opt_CV = base_CV.log_softmax(-1), opt_CV.log_softmax(-1)
            kl += nn.functional.kl_div(opt_CV, base_CV, reduction="sum", log_target=True).item()
            agree += (base_CV.argmax(-1) == opt_CV.argmax(-1)).sum().item()
        kl_N.append(max(kl, 0.0) / len(base_TH))
        agree_N.append(agree / len(base_TH))
    return np.array(kl_N), np.array(agree_N)


def _rows(head: nn.Module) -> int:
    return max(1, CHUNK_ELEMENTS // head.weight.shape[0])


def _logits(head: nn.Module, hidden_TH: torch.Tensor):
    """Yield the logits of hidden_TH in chunks of rows, in float32."""
    for hidden_CH in hidden_TH.split(_rows(head)):
        yield head(hidden_CH.to(head.weight.device)).float()


def compare(
    baseline: Answers,
    optimized: Answers,
    *,
    margin: float | None = None,
    perplexity_margin: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Measurement]:
    """Return every accuracy metric of two arms: scores, flips, exact match, perplexity, divergence, agreement.

    `margin` replaces that of the scores (a difference), `perplexity_margin` that of the perplexity (a share).
    """
    if reason := baseline.reason or optimized.reason:
        return [measurement.unavailable(name, workload, reason) for name, workload in ASKED.items()]
    found = []
    for base, opt in zip(baseline.classified, optimized.classified, strict=True):
        found += compare_classified(base, opt, margin=margin, resamples=resamples, seed=seed)
    if baseline.recalled and optimized.recalled:
        found.append(
            compare_recalled(baseline.recalled, optimized.recalled, margin=margin, resamples=resamples, seed=seed)
        )
    if baseline.text and optimized.text:
        found += compare_text(baseline.text, optimized.text, margin=perplexity_margin, resamples=resamples, seed=seed)
    return found


def compare_classified(
    baseline: Classified, optimized: Classified, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return macro F1, precision, recall, accuracy and the flips of one task."""
    if baseline.ids != optimized.ids or baseline.task != optimized.task:
        raise ValueError("the arms answered different items")
    given = (baseline.truth_N, baseline.chosen_N, optimized.chosen_N)
    replicates = noninferiority.resampled_scores(*given, len(baseline.labels), resamples, seed)
    identical = bool(np.abs(baseline.scores_NL - optimized.scores_NL).max() < 1e-4)
    to_wrong = int((baseline.right_N & ~optimized.right_N).sum())
    to_right = int((~baseline.right_N & optimized.right_N).sum())
    n = len(baseline.ids)
    found = [
        noninferiority.score(
            name,
            "classify",
            *(_score(name, arm) for arm in (baseline, optimized)),
            replicates[name],
            n=n,
            to_wrong=0 if identical else to_wrong,
            identical=identical,
            margin=margin,
            source=f"{baseline.task}, {n} items of the same prompts, label by log-likelihood, scikit-learn"
            + _before(baseline),
        )
        for name in replicates
    ]
    source = f"{baseline.task}, {n} items: {to_wrong} right answers became wrong, {to_right} wrong ones right"
    counts = {"flips": to_wrong + to_right, "flips_to_wrong": to_wrong, "flips_to_right": to_right}
    return found + [
        measurement.informative(name, "classify", 0, count, source, ratio=None, n=n) for name, count in counts.items()
    ]


def _before(baseline: Classified | Retrieved) -> str:
    """Say where the baseline's answers were not given in this run."""
    if baseline.answered is None:
        return ""
    return f"; the baseline's answers of {baseline.answered} (same weights, code, data and machine)"


def _score(name: str, arm: Classified) -> float:
    from sklearn import metrics  # half a second, where there are answers

    if name == "accuracy":
        return float(metrics.accuracy_score(arm.truth_N, arm.chosen_N))
    score = dict(zip(SCORES, (metrics.f1_score, metrics.precision_score, metrics.recall_score)))[name]
    labels = np.arange(len(arm.labels))
    return float(score(arm.truth_N, arm.chosen_N, labels=labels, average="macro", zero_division=0))


def compare_recalled(
    baseline: Retrieved, optimized: Retrieved, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> Measurement:
    """Return the exact match of generated values."""
    n = len(baseline.right_N)
    truth_N = np.ones(n, dtype=int)
    given = (truth_N, baseline.right_N.astype(int), optimized.right_N.astype(int))
    return noninferiority.score(
        "retrieval_exact_match",
        "generate",
        float(baseline.right_N.mean()),
        float(optimized.right_N.mean()),
        noninferiority.resampled_scores(*given, 2, resamples, seed)["accuracy"],
        n=n,
        to_wrong=int((baseline.right_N & ~optimized.right_N).sum()),
        margin=margin,
        source=f"{n} generated values over {baseline.distance} tokens, greedy, exact match" + _before(baseline),
    )


def compare_text(
    baseline: Text, optimized: Text, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return perplexity (verdict by margin), KL divergence from the baseline and agreement of the most likely token."""
    kl_N, agree_N = divergence(baseline, optimized)
    windows, tokens = baseline.ids_NT.shape
    source = f"{windows} held-out windows of {tokens} tokens"
    options = {"resamples": resamples, "seed": seed}
    perplexity = noninferiority.perplexity(baseline.loss_N, optimized.loss_N, margin=margin, source=source, **options)

    def told(metric: str, alike: float, values_N: np.ndarray, what: str, **more) -> Measurement:
        spread = {"ci": paired_stats.bootstrap_interval(values_N, **options), "n": windows}
        mean = float(values_N.mean())
        return measurement.informative(metric, "prefill", alike, mean, f"{source}, {what}", **spread, **more)

    kl = told("kl_divergence_nats", 0.0, kl_N, "KL(baseline ‖ optimized) over the whole vocabulary", ratio=None)
    agreement = told("top1_agreement", 1.0, agree_N, "share of positions with the same most likely token")
    return [perplexity, kl, agreement]


def flips(baseline: Classified, optimized: Classified) -> list[dict[str, str]]:
    """Return the items whose answer changed: id, truth, baseline's and optimized arm's label."""
    changed = np.flatnonzero(baseline.chosen_N != optimized.chosen_N)
    name = baseline.labels
    return [
        {
            "id": baseline.ids[i],
            "truth": name[baseline.truth_N[i]],
            "baseline": name[baseline.chosen_N[i]],
            "optimized": name[optimized.chosen_N[i]],
        }
        for i in changed
    ]


def perplexity(text: Text) -> float:
    """Return exp of the mean loss over all windows."""
    return math.exp(float(text.loss_N.mean()))
