"""The sanity gate: checks whether a model's output has degenerated before its speed is measured. An arm that fails is
`invalid`, and no speed-up of it is shown. Knows nothing about metrics.
"""

import math

import torch
from torch import nn

from lib.measure.timing import workloads

LOOKED_AT = 32  # positions that are checked in a model with random weights


def spread(length: int, most: int = LOOKED_AT) -> torch.Tensor:
    """Return at most `most` evenly spread positions of a text of `length` tokens, including the last."""
    return torch.linspace(0, length - 1, min(length, most)).round().long().unique()


@torch.inference_mode()
def check(model: nn.Module, ids_BT: torch.Tensor, *, new_tokens: int = 16, random_weights: bool = False) -> str | None:
    """Return why the output of `model` on held-out text `ids_BT` is degenerate, or None where it is sound.

    Output is degenerate if its logits are not finite, if its perplexity exceeds that of uniform guessing, or if every
    answer repeats a single token (the same in all answers or not). With random weights only the logits at LOOKED_AT
    positions are checked, since at real dimensions the head would be most of the work.
    """
    model_ids_BT = ids_BT.to(next(model.parameters()).device)
    positions = spread(model_ids_BT.shape[1]).to(model_ids_BT.device) if random_weights else 0
    logits_BTV = model(input_ids=model_ids_BT, logits_to_keep=positions).logits.float()
    if not torch.isfinite(logits_BTV).all():
        return "its logits are not finite (NaN or infinite)"
    if random_weights:
        return None
    vocabulary = logits_BTV.shape[-1]
    loss = nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), model_ids_BT[:, 1:].flatten()).item()
    if loss > math.log(vocabulary):
        return f"its perplexity of {math.exp(min(loss, 50)):.3g} is beyond uniform guessing ({vocabulary})"
    work = workloads.generate(model, model_ids_BT[:, : max(1, model_ids_BT.shape[1] // 2)], new_tokens)
    work()
    output_BN = work.output_BN
    assert output_BN is not None  # every call sets it
    if new_tokens > 1 and bool((output_BN == output_BN[:, :1]).all()):
        tokens = output_BN[:, 0].unique().tolist()
        return f"it answers every prompt with one repeated token ({', '.join(map(str, tokens[:3]))})"
    return None
