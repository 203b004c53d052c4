"""What an optimization does to a model's answers: the same items for both arms, greedy, paired per item.

`evaluate` puts all questions to one arm and returns every answer; `compare` makes measurements of two such sets, so
that a baseline is evaluated once and compared with many arms. Verdicts are of non-inferiority
(`lib.measure.quality.noninferiority`). Text is compared with little memory: the last hidden states are held, and logits
are computed again in chunks. Knows no optimization.

Shapes: N items or windows, T tokens, H hidden, V vocabulary, L labels.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import measurement, paired_stats, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_cache, benchmarks, lm_eval, noninferiority
from lib.measure.quality.answers import Answers, Classified, Retrieved, Rolled, Text
from lib.measure.timing import workloads
from lib.models.decoding import continuations
from lib.models.loading import Loaded
from lib.models.structure import logits
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks as task_list
from lib.models.tasks import text_file
from lib.models.tasks.benchmarks import BENCHMARKS
from lib.models.tasks.registry import HARNESS, classifies
from lib.models.tasks.retrieval import LEAD

SCORES = ("f1_macro", "precision_macro", "recall_macro")
WORKLOAD_OF = {  # the metrics of `compare`
    **dict.fromkeys((*SCORES, "accuracy", "flips", "flips_to_wrong", "flips_to_right"), "classify"),
    "retrieval_exact_match": "generate",
    **dict.fromkeys(("perplexity", "kl_divergence_nats", "top1_agreement"), "prefill"),
}
__all__ = ["Answers", "Classified", "Retrieved", "Rolled", "Text"]  # and the functions below
CHUNK_ELEMENTS = 2**24  # logits held at a time
WINDOWS_AT_ONCE = 4
PROMPTS_AT_ONCE = 16


def evaluate(
    loaded: Loaded,
    effort: Effort | str,
    *,
    model: nn.Module | None = None,
    tasks: Sequence[str] | None = None,
    split: str = "final",
    seed: int = 0,
    lead: int = LEAD,
    acted: Callable[[], float] | None = None,
    known_text: Text | None = None,
) -> Answers:
    """Put all questions to one arm and return its answers.

    `loaded` gives tokenizer and tasks; `model` is the arm, by default `loaded.model`. `tasks` are the classification
    tasks, by default those of `loaded`. Random weights get no questions; unless accuracy is a requested dimension, only
    the final text is read. Text is not read again where the arm has read it already (`known_text`). `lead` tokens of
    text stand before a value to retrieve. `acted` returns how often the optimization has acted so far: a workload in
    which it did not act at all says nothing about it, and is named in `Answers.idle`. Answers of a model that is
    unchanged since it was loaded come from the cache where they are there (`lib.measure.quality.answer_cache`).
    """
    if loaded.random_weights:
        return Answers([], None, None, "random weights: answers carry no information")
    effort = settings.read(effort) if isinstance(effort, str) else effort
    arm = loaded if model is None else replace(loaded, model=model)
    if split == "final" and not settings.wants("accuracy"):  # controls need the text
        return Answers([], read_text(arm, split, effort, seed), None, settings.why_left_out())
    names = tasks if tasks is not None else [task for task in loaded.tasks if classifies(task)]
    idle: set[str] = set()

    def watched(workload: str, ask_now: Callable[[], Any]) -> Any:
        before = acted() if acted else None
        answers = ask_now()
        if acted and acted() == before:
            idle.add(workload)
        return answers

    classified: list[Classified | Rolled] = []
    for name in names:
        workload = "classify" if name in task_list.CLASSIFY else name
        classified.append(watched(workload, functools.partial(ask, arm, name, split, effort.items, seed)))
    text = known_text or watched("prefill", lambda: read_text(arm, split, effort, seed))
    sizes = effort.retrieval_distance, effort.retrieval_prompts, seed, lead
    retrieved = watched("generate", lambda: retrieval(arm, *sizes, split=split))
    chosen = [answers for answers in classified if isinstance(answers, Classified)]
    rolled = [answers for answers in classified if isinstance(answers, Rolled)]
    return Answers(chosen, text, retrieved, idle=frozenset(idle), rolled=rolled)


def read_text(arm: Loaded, split: str, effort: Effort, seed: int) -> Text:
    """Return how an arm reads the text that perplexity is measured on: the user's own file, or held-out text."""
    if arm.text and split == "final" and arm.tokenizer is not None:
        length = min(text_file.WINDOW_TOKENS, continuations.positions(arm.model))
        ids_NT = text_file.windows(arm.tokenizer, arm.text, max(text_file.LEAST_WINDOWS, effort.windows // 2), length)
        return replace(read(arm.model, ids_NT.to(arm.device)), name=Path(arm.text).name)
    window = effort.windows, effort.window_tokens, seed
    text = read(arm.model, task_list.text_windows(arm, split, *window))
    return replace(text, source_N=task_list.window_sources(arm, split, *window))


def ask(loaded: Loaded, task: str, split: str, limit: int, seed: int = 0) -> Classified | Rolled:
    """Return the answers to at most `limit` items of a split of one task: of a public task those that its name alone
    chooses (`lib.models.tasks.splits`), of another those that `seed` chooses.
    """
    if task.startswith(HARNESS):
        return lm_eval.answers(loaded, task, split, limit, seed)
    return classify(loaded, task, split, limit, seed)


def classify(loaded: Loaded, task: str, split: str, limit: int, seed: int = 0) -> Classified:
    """Return the label of highest log-likelihood for each of at most `limit` items of a split.

    Raises UserError for a task of the harness whose items are not right or wrong.
    """
    if task.startswith(HARNESS):
        answers = lm_eval.answers(loaded, task, split, limit, seed)
        if isinstance(answers, Rolled):
            raise UserError(f"{task}: measures perplexity, and has no items that are right or wrong")
        return answers
    if task in BENCHMARKS:
        return benchmarks.answers(loaded, task, split, limit)
    items = task_list.items(task, split, limit, seed)
    labels = task_list.class_labels(task)
    vocabulary = anatomy(loaded.model).vocabulary
    batch = max(1, min(32, CHUNK_ELEMENTS * 2 // (vocabulary * 256)))
    ids = [item.id for item in items]
    question: dict[str, object] = {"task": task, "split": split, "ids": ids}
    scores, answered = answer_cache.known_or(
        loaded, question, lambda: {"scores_NL": task_list.label_scores(loaded, task, items, batch).numpy()}
    )
    scores_NL, truth_N = scores["scores_NL"], np.array([labels.index(item.label) for item in items])
    sources = [item.source or item.id for item in items]
    source_N = np.unique(sources, return_inverse=True)[1] if items else None
    return Classified(task, labels, ids, truth_N, scores_NL.argmax(1), scores_NL, answered, source_N)


@torch.inference_mode()
def read(model: nn.Module, ids_NT: torch.Tensor) -> Text:
    """Return how `model` reads the windows ids_NT: the loss of each, and its last hidden states (on the CPU)."""
    head = logits.without_decoder(model)
    backbone: Any = model.model
    ids_NT = ids_NT.to(next(model.parameters()).device)
    losses, hidden = [], []
    for ids_BT in ids_NT.split(WINDOWS_AT_ONCE):
        hidden_BTH = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        for ids_T, hidden_TH in zip(ids_BT, hidden_BTH):
            pieces = zip(_logits(head, hidden_TH[:-1]), ids_T[1:].split(logits.rows_at_once(head, CHUNK_ELEMENTS)))
            loss = sum(
                nn.functional.cross_entropy(logits_CV, target_C, reduction="sum").item()
                for logits_CV, target_C in pieces
            )
            losses.append(loss / (len(ids_T) - 1))
        hidden.append(hidden_BTH.cpu())
    return Text(ids_NT.cpu(), np.array(losses), torch.cat(hidden), head)


@torch.inference_mode()
def retrieval(
    loaded: Loaded, distance: int, count: int, seed: int = 0, lead: int = LEAD, split: str = "final"
) -> Retrieved:
    """Return which of `count` values, stored `distance` tokens ago, the model repeats exactly when it generates
    greedily. They stand in text of `split`, `lead` tokens of it before them.
    """
    ids_BT, target_BV = task_list.retrieval_prompts(loaded, distance, count, seed, lead, split)

    def ask() -> dict[str, np.ndarray]:
        right = []
        for prompt_BT, value_BV in zip(ids_BT.split(PROMPTS_AT_ONCE), target_BV.split(PROMPTS_AT_ONCE)):
            work = workloads.generate(loaded.model, prompt_BT, value_BV.shape[1])
            work()
            assert work.output_BN is not None  # every call sets it
            right.append((work.output_BN.cpu() == value_BV.cpu()).all(1).numpy())
        return {"right_N": np.concatenate(right)}

    question: dict[str, object] = {"task": "retrieval", "distance": distance, "count": count, "seed": seed}
    question |= {"lead": lead, "split": split}
    answers, answered = answer_cache.known_or(loaded, question, ask)
    source_N = task_list.filler_sources(loaded, distance, count, seed, lead, split)
    return Retrieved(distance, answers["right_N"], answered, source_N)


@torch.inference_mode()
def divergence(baseline: Text, optimized: Text) -> tuple[np.ndarray, np.ndarray]:
    """Return per window the mean KL(baseline ‖ optimized), in nats, and the share of equal most likely tokens. Raises
    ValueError unless both arms read the same windows.
    """
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


def _logits(head: nn.Module, hidden_TH: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the logits of hidden_TH in chunks of rows, in float32."""
    return logits.in_chunks(head, hidden_TH, CHUNK_ELEMENTS)


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
        return [measurement.unavailable(name, workload, reason) for name, workload in WORKLOAD_OF.items()]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    measurements = []
    for base, opt in zip(baseline.classified, optimized.classified, strict=True):
        measurements += compare_classified(base, opt, margin=margin, **options)
    for read_before, read_after in zip(baseline.rolled, optimized.rolled, strict=True):
        measurements.append(benchmarks.compare_rolled(read_before, read_after, margin=perplexity_margin, **options))
    if baseline.retrieved and optimized.retrieved:
        measurements.append(compare_retrieved(baseline.retrieved, optimized.retrieved, margin=margin, **options))
    if baseline.text and optimized.text:
        measurements += compare_text(baseline.text, optimized.text, margin=perplexity_margin, **options)
    return [_not_exercised(m) if m.workload in optimized.idle else m for m in measurements]


def _not_exercised(m: Measurement) -> Measurement:
    """Return a judged measurement without its verdict: the optimization never acted on these prompts."""
    if m.verdict == "informative":
        return m
    reason = f"the optimization never acted on these prompts ({m.workload}), so their answers say nothing of it"
    update = {"verdict": "not_exercised", "reason": reason, "ci": None, "mde": None, "bound": None, "margin": None}
    return m.model_copy(update=update)


def compare_classified(
    baseline: Classified, optimized: Classified, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return macro F1, precision, recall, accuracy and the flips of one task. Raises ValueError unless both arms
    answered the same items.
    """
    if baseline.metric:  # of a public task
        return benchmarks.compare(baseline, optimized, margin=margin, resamples=resamples, seed=seed)
    if baseline.ids != optimized.ids or baseline.task != optimized.task:
        raise ValueError("the arms answered different items")
    truth_N, labels = baseline.truth_N, len(baseline.labels)
    replicates = noninferiority.resampled_scores(
        truth_N, baseline.chosen_N, optimized.chosen_N, labels, resamples, seed, baseline.source_N
    )
    same = bool((baseline.chosen_N == optimized.chosen_N).all())
    counts = noninferiority.class_counts(truth_N, baseline.chosen_N, labels)
    identical = bool(np.abs(baseline.scores_NL - optimized.scores_NL).max() < 1e-4)
    to_wrong = int((baseline.right_N & ~optimized.right_N).sum())
    to_right = int((~baseline.right_N & optimized.right_N).sum())
    n = len(baseline.ids)
    scores = [
        noninferiority.score(
            name,
            "classify",
            _score(name, baseline),
            _score(name, optimized),
            replicates[name],
            n=n,
            to_wrong=to_wrong,
            to_right=to_right,
            counts=None if name == "accuracy" else counts,
            same=same,
            identical=identical,
            margin=margin,
            source=f"{baseline.task}, {n} items of the same prompts, label by log-likelihood, scikit-learn"
            + _before(baseline),
        )
        for name in replicates
    ]
    source = f"{baseline.task}, {n} items: {to_wrong} right answers became wrong, {to_right} wrong ones right"
    flips = {"flips": to_wrong + to_right, "flips_to_wrong": to_wrong, "flips_to_right": to_right}
    return scores + [
        measurement.informative(name, "classify", 0, count, source, ratio=None, n=n) for name, count in flips.items()
    ]


def _before(baseline: Classified | Retrieved) -> str:
    """Return a phrase for answers of the baseline that are older than this run, else an empty one."""
    if baseline.answered is None:
        return ""
    return f"; the baseline's answers of {baseline.answered} (same weights, code, data and machine)"


def _score(name: str, arm: Classified) -> float:
    from sklearn import metrics  # takes half a second, and is needed only where there are answers

    if name == "accuracy":
        return float(metrics.accuracy_score(arm.truth_N, arm.chosen_N))
    score = dict(zip(SCORES, (metrics.f1_score, metrics.precision_score, metrics.recall_score)))[name]
    labels = np.arange(len(arm.labels))
    return float(score(arm.truth_N, arm.chosen_N, labels=labels, average="macro", zero_division=0))


def compare_retrieved(
    baseline: Retrieved, optimized: Retrieved, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> Measurement:
    """Return the exact match of generated values."""
    n = len(baseline.right_N)
    base_N, opt_N = baseline.right_N.astype(int), optimized.right_N.astype(int)
    truth_N = np.ones(n, dtype=int)
    replicates = noninferiority.resampled_scores(truth_N, base_N, opt_N, 2, resamples, seed, baseline.source_N)
    return noninferiority.score(
        "retrieval_exact_match",
        "generate",
        float(baseline.right_N.mean()),
        float(optimized.right_N.mean()),
        replicates["accuracy"],
        n=n,
        to_wrong=int((baseline.right_N & ~optimized.right_N).sum()),
        to_right=int((~baseline.right_N & optimized.right_N).sum()),
        same=bool((baseline.right_N == optimized.right_N).all()),
        margin=margin,
        source=f"{n} generated values over {baseline.distance} tokens, greedy, exact match" + _before(baseline),
    )


def compare_text(
    baseline: Text, optimized: Text, *, margin: float | None = None, resamples: int = 2000, seed: int = 0
) -> list[Measurement]:
    """Return perplexity (verdict by margin), KL divergence from the baseline and agreement of the most likely token."""
    kl_N, agree_N = divergence(baseline, optimized)
    windows, tokens = baseline.ids_NT.shape
    source = f"{windows} {baseline.name} windows of {tokens} tokens"
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "source_N": baseline.source_N}
    perplexity = noninferiority.perplexity(baseline.loss_N, optimized.loss_N, margin=margin, source=source, **options)

    def mean(metric: str, of_equal_arms: float, values_N: np.ndarray, what: str, **fields: Any) -> Measurement:
        low, high = noninferiority.mean_interval(values_N, paired_stats.CONFIDENCE, **options)
        ci = max(low, 0.0), high if of_equal_arms == 0 else min(high, of_equal_arms)  # no lower, no larger is possible
        value = float(values_N.mean())
        return measurement.informative(
            metric, "prefill", of_equal_arms, value, f"{source}, {what}", ci=ci, n=windows, **fields
        )

    kl = mean("kl_divergence_nats", 0.0, kl_N, "KL(baseline ‖ optimized) over the whole vocabulary", ratio=None)
    agreement = mean("top1_agreement", 1.0, agree_N, "share of positions with the same most likely token")
    return [perplexity, kl, agreement]
