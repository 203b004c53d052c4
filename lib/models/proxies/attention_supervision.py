"""Supervises the attention of a few heads, so that copying is learned in tens of steps instead of many hundreds.

Copying the token that followed an earlier occurrence of the current token takes two heads in a row (Olsson et al.,
2022): one attends to the previous token, a later one (an induction head) to the tokens after earlier occurrences of the
current token. Small models discover the pair late and abruptly. While rows repeat one span, the correct attention of
both heads is known, and its negative log-likelihood is added to the loss. Used in training only.

Shapes: B rows, Q heads, T queries, S keys.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

# (block, head) of the supervised heads
PREVIOUS_TOKEN_HEADS = ((0, 0), (1, 2))
INDUCTION_HEADS = ((2, 0), (3, 2))


def supervised_forward(
    model: nn.Module, inputs: dict[str, torch.Tensor], spans_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits, loss) on rows that repeat spans of spans_B tokens.

    The loss is the mean negative log-likelihood of the correct keys under the attention of the supervised heads, in
    nats per query.
    """
    assert isinstance(model, PreTrainedModel)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only implementation that returns attention weights
    try:
        output = model(**inputs, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)
    length = inputs["input_ids"].shape[1]
    distance_TS = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    correct_BTS = (distance_TS > 0) & ((distance_TS + 1) % spans_B[:, None, None] == 0)
    repeated_BT = torch.arange(length) >= spans_B[:, None]
    blocks = len(output.attentions)
    losses = []
    for block, head in PREVIOUS_TOKEN_HEADS:
        attention_BTS = output.attentions[min(block, blocks - 2)][:, head]
        losses.append(-(attention_BTS.diagonal(-1, 1, 2) + 1e-6).log().mean())
    for block, head in INDUCTION_HEADS:
        attention_BTS = output.attentions[min(block, blocks - 1)][:, head]
        correct_BT = (attention_BTS * correct_BTS).sum(-1)
        losses.append(-(correct_BT + 1e-6).log()[repeated_BT].mean())
    return output.logits, torch.stack(losses).mean()
