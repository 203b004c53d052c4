"""Chooses and removes whole blocks: by influence, greedily by divergence, or as one contiguous span.

Independent of the parts inside a block.

Shapes: R real (not padding) tokens of a batch, H hidden, V vocabulary, C tokens of a chunk.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lib.models.calibration.walk import Walk
from lib.models.structure.anatomy import anatomy
from lib.models.structure.logits import CHUNK_ELEMENTS, in_chunks
from lib.models.structure.sharing import sharing
from lib.models.structure.surgery import synchronise

CRITERIA = ("influence", "divergence", "span")
CANDIDATES = 8  # least influential blocks tried per greedy step: trying all would be quadratic in depth


def least(scores: torch.Tensor, count: int, protected: int) -> list[int]:
    """Return the indices of the `count` least salient blocks, without the first `protected` blocks."""
    return sorted((scores[protected:].topk(int(count), largest=False).indices + protected).tolist())


def remove_blocks(model: nn.Module, removed: Iterable[int]) -> None:
    """Remove whole blocks in place; call `synchronise` afterwards to remove their entries from the configuration."""
    decoder, dropped = anatomy(model).decoder, set(removed)
    decoder.layers = nn.ModuleList(layer for index, layer in enumerate(decoder.layers) if index not in dropped)


def without_blocks(model: nn.Module, removed: Iterable[int]) -> nn.Module:
    """Return a read-only copy of `model` without the blocks `removed`; it shares every tensor with `model`."""
    student = sharing(model)
    remove_blocks(student, removed)
    return synchronise(student)


@torch.no_grad()
def greedy(
    model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], count: int, influence: torch.Tensor
) -> list[int]:
    """Return the indices of `count` blocks, chosen greedily: each step removes the block that costs least divergence.

    Divergence from `model` is in nats, infinite if outputs are not finite. Each step tries the CANDIDATES least
    influential blocks that remain. Last states are kept, but only CHUNK_ELEMENTS of the logits at a time: with a real
    vocabulary those of one batch take gigabytes.
    """
    view = anatomy(model)
    expected = [_last_states(model, inputs) for inputs in calibration]
    removed: list[int] = []
    for _ in range(count):
        losses = {}
        left = [index for index in range(view.fixed_blocks, len(view.blocks)) if index not in removed]
        for index in sorted(left, key=lambda index: float(influence[index]))[:CANDIDATES]:
            student = without_blocks(model, [*removed, index])
            each = (
                _divergence(model, states_RH, student, _last_states(student, inputs))
                for states_RH, inputs in zip(expected, calibration)
            )
            nats = sum(each)
            losses[index] = nats if math.isfinite(nats) else math.inf
        removed.append(min(losses, key=losses.__getitem__))
    return sorted(removed)


def _last_states(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the last hidden state of every real token of a batch, [R, H], the input of the head."""
    hidden_BTH = model.get_submodule("model")(**inputs, use_cache=False).last_hidden_state
    mask_BT = inputs.get("attention_mask")
    return hidden_BTH.flatten(0, 1) if mask_BT is None else hidden_BTH[mask_BT.bool().to(hidden_BTH.device)]


def _divergence(model: nn.Module, states_RH: torch.Tensor, student: nn.Module, changed_RH: torch.Tensor) -> float:
    """Return KL(model ‖ student) in nats, averaged over the tokens of the two sets of last states."""
    total = 0.0
    logits = (in_chunks(*arm, CHUNK_ELEMENTS) for arm in ((model, states_RH), (student, changed_RH)))
    for expected_CV, changed_CV in zip(*logits):
        target_CV, predicted_CV = expected_CV.log_softmax(-1), changed_CV.log_softmax(-1)
        total += float(nn.functional.kl_div(predicted_CV, target_CV, log_target=True, reduction="sum"))
    return total / len(states_RH)


@torch.no_grad()
def span(model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], count: int) -> list[int]:
    """Return the indices of `count` adjacent blocks, the span whose output is closest in angle to its input.

    Distance is the mean 1 − cos over all real tokens, as for influence. Gromov et al. 2024, who remove one span, use
    arccos ÷ π of the last token of each text. Holds the states of `count` blocks.
    """
    walk, blocks = Walk(model, calibration), anatomy(model).blocks
    protected = anatomy(model).fixed_blocks
    entered: deque[list[torch.Tensor]] = deque(maxlen=count + 1)
    turned: dict[int, float] = {}

    def compare(first: int) -> None:
        if first >= protected and len(entered) == count + 1:
            turned[first] = sum(
                float((1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)).sum())
                for before, after in zip(entered[0], entered[-1])
            )

    for block in walk:
        entered.append([batch.states_BTH[batch.mask_BT] for batch in walk.carried])
        compare(block.index - count)
        if block.index == len(blocks) - 1:
            outputs = zip(walk.outputs(), walk.carried)
            entered.append([output[batch.mask_BT] for output, batch in outputs])
            compare(block.index + 1 - count)
    first = min(turned, key=turned.__getitem__)
    return list(range(first, first + count))
