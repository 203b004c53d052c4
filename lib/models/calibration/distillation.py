"""A short distillation: train a changed model on the logits of the original.

Used for recovery after an optimization has removed something. Loss: Kullback-Leibler divergence from the teacher's
distribution to the student's, over all tokens but padding (Hinton et al. 2015, temperature 1). Knows nothing of what
was removed. Trains in the student's own dtype: meant for float32; bfloat16 weights lose small updates.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lib.models.structure.anatomy import anatomy

CHECKS = 4
PATIENCE = 2


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    steps: int,
    held_out: Sequence[dict[str, torch.Tensor]] = (),
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train the decoder blocks of `student` in place for `steps` batches; return the loss of each step, nats per token.

    AdamW, a tenth of the steps as warm-up, then cosine to zero; the batches repeat, shuffled anew each round. With
    `held_out` batches the divergence on them is evaluated before the first step, CHECKS times on the way and at the
    end, and the student ends with the weights of the best evaluation, possibly the first: where nothing was lost,
    training does harm. Stops once PATIENCE evaluations in a row are worse than the first.
    """
    view = anatomy(student)
    trained = [parameter for block in view.blocks for parameter in block.module.parameters()]
    trained += list(view.final_norm.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    first = best = _mean_divergence(student, teacher, held_out)
    best_values = [parameter.detach().clone() for parameter in trained if held_out]
    worse, every = 0, -(-steps // (CHECKS + 1))
    for batch in itertools.islice(_shuffled(batches, order), steps):
        loss = divergence(student, teacher, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if held_out and (len(losses) % every == 0 or len(losses) == steps):
            now = _mean_divergence(student, teacher, held_out)
            if now < best:
                best, best_values = now, [parameter.detach().clone() for parameter in trained]
            worse = worse + 1 if now >= first else 0
            if worse == PATIENCE:
                break
    for parameter, value in zip(trained, best_values, strict=False):
        parameter.data.copy_(value)
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    return losses


def _mean_divergence(student: nn.Module, teacher: nn.Module, batches: Sequence[dict]) -> float:
    with torch.no_grad():
        return sum(float(divergence(student, teacher, batch)) for batch in batches) / max(1, len(batches))


def divergence(student: nn.Module, teacher: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return KL(teacher ‖ student), mean over the real tokens of `inputs`, nats."""
    with torch.no_grad():
        target = teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)
    predicted = student(**inputs, use_cache=False).logits.float().log_softmax(-1)
    per_token = nn.functional.kl_div(predicted, target, log_target=True, reduction="none").sum(-1)
    mask = inputs.get("attention_mask")
    return per_token.mean() if mask is None else per_token[mask.bool()].mean()


def _rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _shuffled(batches: Sequence[dict], generator: torch.Generator) -> Iterator[dict]:
    """Yield the batches without end, each round in another order."""
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
