"""Evaluates one arm and returns its answers (labels, generated values, running text), decoded greedily on the same
items for every arm.

A baseline is evaluated once and compared with many arms (`lib.measure.quality.answer_comparison`). Comparing text needs
little memory: only the last hidden states are kept, and `divergence` recomputes the logits of two arms in chunks. Knows
nothing about particular optimizations.

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
from lib.measure.metrics import settings
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_cache, benchmarks, lm_eval
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
    """Evaluate one arm on all tasks and return its answers.

    `loaded` provides tokenizer and tasks; `model` is the arm, by default `loaded.model`. `tasks` are the classification
    tasks, by default those of `loaded`. A model with random weights is not evaluated. Unless accuracy is a requested
    dimension, only the final text is read. `known_text` is the arm's reading of the text, if it has read it already.
    `lead` tokens of text precede a value to retrieve. `acted` returns how often the optimization has acted so far: a
    workload in which it did not act says nothing about it, and is named in `Answers.idle`. Answers of a model that is
    unchanged since loading come from the cache if they are stored there (`lib.measure.quality.answer_cache`).
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
    first = next((name for name in names if name in task_list.CLASSIFY), None)
    for name in names:
        workload = "classify" if name == first else name  # as `answer_comparison.compare` names them
        classified.append(watched(workload, functools.partial(ask, arm, name, split, effort.items, seed)))
    text = known_text or watched("prefill", lambda: read_text(arm, split, effort, seed))
    sizes = effort.retrieval_distance, effort.retrieval_prompts, seed, lead
    retrieved = watched("generate", lambda: retrieval(arm, *sizes, split=split))
    chosen = [answers for answers in classified if isinstance(answers, Classified)]
    rolled = [answers for answers in classified if isinstance(answers, Rolled)]
    return Answers(chosen, text, retrieved, idle=frozenset(idle), rolled=rolled)


def read_text(arm: Loaded, split: str, effort: Effort, seed: int) -> Text:
    """Return an arm's reading of the text for perplexity: the user's own file, or held-out text."""
    if arm.text and split == "final" and arm.tokenizer is not None:
        length = min(text_file.WINDOW_TOKENS, continuations.positions(arm.model))
        ids_NT = text_file.windows(arm.tokenizer, arm.text, max(text_file.LEAST_WINDOWS, effort.windows // 2), length)
        return replace(read(arm.model, ids_NT.to(arm.device)), name=Path(arm.text).name)
    window = effort.windows, effort.window_tokens, seed
    text = read(arm.model, task_list.text_windows(arm, split, *window))
    return replace(text, source_N=task_list.window_sources(arm, split, *window))


def ask(loaded: Loaded, task: str, split: str, limit: int, seed: int = 0) -> Classified | Rolled:
    """Return the answers to at most `limit` items of a task's split. Items are drawn by the name of a public task
    (`lib.models.tasks.splits`), by `seed` for other tasks.
    """
    if task.startswith(HARNESS):
        return lm_eval.answers(loaded, task, split, limit, seed)
    return classify(loaded, task, split, limit, seed)


def classify(loaded: Loaded, task: str, split: str, limit: int, seed: int = 0) -> Classified:
    """Return the label of highest log-likelihood for each of at most `limit` items of a task's split.

    Raises UserError for a harness task whose items are not right or wrong.
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
    return Classified(task, labels, ids, truth_N, scores_NL.argmax(1), scores_NL, answered, sources_of(items))


def sources_of(items: Sequence[task_list.Item]) -> np.ndarray | None:
    """Return the document number of each item, [N]; None if there are no items."""
    sources = [item.source or item.id for item in items]
    return np.unique(sources, return_inverse=True)[1] if sources else None


def classified_by_all(
    arms: Sequence[Loaded], tasks: Sequence[str], split: str, limit: int, seed: int = 0
) -> list[list[Classified]]:
    """Return, for each of the `tasks` whose items are right or wrong, the answers of every arm to at most `limit` items
    of a split. A task that measures perplexity is recognised only by its answers; it is then put to the first arm only.
    """
    answered: list[list[Classified]] = []
    for task in filter(classifies, tasks):
        first = ask(arms[0], task, split, limit, seed)
        if isinstance(first, Classified):
            answered.append([first, *(classify(arm, task, split, limit, seed) for arm in arms[1:])])
    return answered


@torch.inference_mode()
def read(model: nn.Module, ids_NT: torch.Tensor) -> Text:
    """Return the model's reading of the windows `ids_NT`: their losses and last hidden states (on the CPU)."""
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
    """Return which of `count` values, seen `distance` tokens ago, the model repeats exactly when it generates greedily.
    Each value is embedded in text of `split`, after `lead` tokens of it.
    """
    ids_BT, target_BV = task_list.retrieval_prompts(loaded, distance, count, seed, lead, split)

    def ask() -> dict[str, np.ndarray]:
        outputs = []
        for prompt_BT in ids_BT.split(PROMPTS_AT_ONCE):
            work = workloads.generate(loaded.model, prompt_BT, target_BV.shape[1])
            work()
            assert work.output_BN is not None  # every call sets it
            outputs.append(work.output_BN.cpu())
        output_BV = torch.cat(outputs)
        return {"right_N": (output_BV == target_BV.cpu()).all(1).numpy(), "given_NV": output_BV.numpy()}

    question: dict[str, object] = {"task": "retrieval", "distance": distance, "count": count, "seed": seed}
    question |= {"lead": lead, "split": split}
    answers, answered = answer_cache.known_or(loaded, question, ask)
    source_N = task_list.filler_sources(loaded, distance, count, seed, lead, split)
    return Retrieved(distance, answers["right_N"], answered, source_N, answers["given_NV"])


@torch.inference_mode()
def divergence(baseline: Text, optimized: Text) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each window [N], the mean KL(baseline ‖ optimized) in nats per token and the share of positions with
    the same most likely token. Raises ValueError unless both arms read the same windows.
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
