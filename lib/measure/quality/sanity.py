"""The gate before speed: whether a model's output has degenerated. An arm that fails here is `invalid`, and no speed-up
of it is shown. Knows no metric.
"""

import math

import torch
from torch import nn

from lib.measure.timing import workloads

LOOKED_AT = 32  # positions, of a model with random weights


def spread(length: int, most: int = LOOKED_AT) -> torch.Tensor:
    """Return at most `most` positions of a text of `length` tokens, evenly spread, with the last one."""
    return torch.linspace(0, length - 1, min(length, most)).round().long().unique()


@torch.inference_mode()
def check(model: nn.Module, ids_BT: torch.Tensor, *, new_tokens: int = 16, random_weights: bool = False) -> str | None:
    """Return why the output of `model` on held-out text `ids_BT` is degenerate, or None where it is sound.

    Degenerate are logits that are not finite, answers that all repeat one token, each its own or all the same, and a
    perplexity beyond that of guessing uniformly. Of a model with random weights only finite logits are required, in
    LOOKED_AT positions, since at real dimensions the head would be most of the work.
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
