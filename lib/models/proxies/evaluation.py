"""Scores a proxy model on held-out text, for its README and for choosing between training configurations.

Shapes: N items or windows, B rows, T tokens, V tokens of a value, C vocabulary, L labels.
"""

import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy

from lib.models.proxies.router_balance import RouterBalance
from lib.models.structure.anatomy import anatomy
from lib.models.structure.loaded_model import LoadedModel
from lib.models.tasks import tasks

RETRIEVAL_PROMPTS = 64
DISTANCES = (256, 512, 1024, 2048)  # tokens between a value and the prompt for it
WINDOW = 512  # tokens of a window for the perplexity


@torch.no_grad()
def scores(loaded: LoadedModel, limit: int | None = None, prompts: int = RETRIEVAL_PROMPTS) -> dict[str, float]:
    """Return the scores on the split `final`: macro-F1 per task, retrieval by distance, perplexity, and the share of
    the least used expert.
    """
    balance = RouterBalance(anatomy(loaded.model))
    values = classification_scores(loaded, "final", limit)
    windows_NT = tasks.text_windows(loaded, "final", 64, WINDOW)
    balance.reset()
    losses = [token_losses(loaded, rows_BT) for rows_BT in windows_NT.split(8)]
    values["perplexity"] = float(torch.cat(losses).mean().exp())
    if balance.experts:
        values["least_expert_share"] = min(min(shares) for shares in balance.shares().values())
    balance.close()
    for distance in DISTANCES:
        values[f"retrieval_{distance}"] = retrieval_accuracy(loaded, distance, prompts)
    return values


@torch.no_grad()
def classification_scores(loaded: LoadedModel, split: str, limit: int | None = None) -> dict[str, float]:
    """Return macro-F1, cross-entropy over the labels (nats) and number of items of each classification task."""
    values: dict[str, float] = {}
    for task in loaded.parameters.tasks:
        if task in tasks.CLASSIFY:
            items, labels = tasks.items(task, split, limit), tasks.class_labels(task)
            label_N = torch.tensor([labels.index(item.label) for item in items])
            scores_NL = tasks.label_scores(loaded, task, items)
            values[f"{task}_f1_macro"] = f1_score(label_N, scores_NL.argmax(1), average="macro")
            values[f"{task}_cross_entropy"] = float(cross_entropy(scores_NL.log_softmax(1), label_N))
            values[f"{task}_items"] = len(items)
    return values


@torch.no_grad()
def token_losses(loaded: LoadedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every token after the first of each row, in nats, with the rows concatenated."""
    logits_BTC = loaded.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits_BTC.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def retrieval_accuracy(loaded: LoadedModel, distance: int, count: int, seed: int = 1) -> float:
    """Return the share of values that greedy generation reproduces exactly.

    It reproduces a value if and only if each of its tokens is the most likely one after the tokens before it, which one
    forward pass shows.
    """
    ids_BT, target_BV = tasks.retrieval_prompts(loaded, distance, count, seed)
    reproduced = 0
    for ids, target in zip(ids_BT.split(4), target_BV.split(4)):
        width = target.shape[1]
        logits = loaded.model(input_ids=torch.cat([ids, target], 1), use_cache=False, logits_to_keep=width + 1).logits
        reproduced += int((logits[:, :-1].argmax(-1) == target).all(1).sum())
    return reproduced / count
