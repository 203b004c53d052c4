"""A short distillation: trains a changed model on the logits of the original.

Used for recovery after an optimization has removed something. The loss is the Kullback-Leibler divergence from the
teacher's distribution to the student's, over all tokens except padding (Hinton et al. 2015, temperature 1). A part of
the text is held out. Weights in lower precision have float32 masters, since they would lose small updates. The learning
rate falls with the width (Yang et al. 2022, muP: Adam's rate goes with 1/width) and is lower for students close to the
teacher. Knows nothing of what was removed.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import anatomy

CHECKS = 4
PATIENCE = 2
TUNED_DIVERGENCE = 0.1  # nats per token at which the rates were tuned; closer students get lower rates
HELD_OUT = 4  # batches
KEPT_ELEMENTS = 2**26  # elements of the teacher's log-probabilities on held-out text, kept between evaluations
TUNED_WIDTH = 192  # hidden width at which the rates were tuned; wider models get proportionally lower rates
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Lessons:
    """The course of a distillation: `losses`, the training loss of each step, and `held_out`, number of steps →
    divergence from the teacher on held-out text (0: before the first step); both in nats per token.
    """

    losses: list[float]
    held_out: dict[int, float]

    @property
    def kept(self) -> int:
        """The number of steps with the lowest divergence on held-out text; 0 if no step improved it."""
        return min(self.held_out, key=lambda step: self.held_out[step], default=0)

    def checks(self) -> list[dict[str, float]]:
        """Return the held-out evaluations as rows for a record."""
        return [{"steps": step, "divergence": value} for step, value in self.held_out.items()]


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return (training batches, held-out batches): a quarter of the batches, at most HELD_OUT, is held out.

    With fewer than four batches, a quarter of the sequences of the last batch of text is held out. Held-out batches or
    sequences are spread evenly, since calibration begins with running text and ends with questions. Raises UserError if
    there are fewer than two sequences.
    """
    batches = list(batches)
    if count := min(HELD_OUT, len(batches) // 4):
        held_out = _spread(count, len(batches))
        return [batch for at, batch in enumerate(batches) if at not in held_out], [batches[at] for at in held_out]
    for index in reversed(range(len(batches))):
        batch, rows = batches[index], len(batches[index]["input_ids"])
        if rows > 1 and all(len(tensor) == rows for tensor in batch.values()):
            held_out = sorted(rows - 1 - at for at in _spread(max(1, rows // 4), rows))
            others = [row for row in range(rows) if row not in held_out]
            taught, rest = ({name: tensor[at] for name, tensor in batch.items()} for at in (others, held_out))
            return [*batches[:index], taught, *batches[index + 1 :]], [rest]
    if len(batches) > 1:
        return batches[1:], batches[:1]
    raise UserError("calibration: one sequence only; distillation holds out some text, give at least two sequences")


def _spread(count: int, size: int) -> list[int]:
    """Return `count` evenly spaced indices below `size`, starting at 0."""
    return [at * size // count for at in range(count)]


def can_split(batches: Sequence[Batch]) -> bool:
    """Return whether `batches` have enough sequences for `split`."""
    try:
        split(batches)
    except UserError:
        return False
    return True


def rate_for(model: nn.Module, learning_rate: float) -> float:
    """Return `learning_rate`, which was tuned at TUNED_WIDTH, scaled to the width of `model`."""
    return learning_rate * min(1.0, TUNED_WIDTH / anatomy(model).hidden)


def nearness(first: float) -> float:
    """Return the factor on the learning rate for a student that diverges from its teacher by `first` nats per token.

    Adam's steps are as long as the rate, however small the gradient, and the divergence grows with the square of the
    distance: a rate that helps a distant student would move a student close to its teacher away from it.
    """
    return min(1.0, math.sqrt(max(0.0, first) / TUNED_DIVERGENCE))


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int,
    held_out: Sequence[Batch] | None = None,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Lessons:
    """Train the decoder blocks and final norm of `student` in place for `steps` batches; return losses and evaluations.

    AdamW, a tenth of the steps as warm-up, then cosine to zero; the learning rate is scaled to the width by `rate_for`
    and multiplied by the student's `nearness`. The batches repeat, reshuffled in each round. The divergence on the
    `held_out` batches (default: those that `split` holds out of `batches`) is evaluated before the first step, CHECKS
    times in between and at the end. The student ends with the weights of the best evaluation, possibly the first, since
    training does harm if nothing was lost. Stops when PATIENCE evaluations in a row are worse than the first.
    """
    if held_out is None:
        batches, held_out = split(batches)
    view = anatomy(student)
    trained = [parameter for block in view.blocks for parameter in block.module.parameters()]
    trained += list(view.final_norm.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    # A parameter of float32 is its own master.
    masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True) for p in trained]
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    known = _answers_kept(teacher, held_out)
    checks = {0: _mean_divergence(student, teacher, held_out, known)}
    rate = rate_for(student, learning_rate) * nearness(checks[0])
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    best_values = [parameter.detach().clone() for parameter in trained]
    worse, every = 0, -(-steps // (CHECKS + 1))
    for batch in itertools.islice(_shuffled(batches, order), steps):
        loss = divergence(student, teacher, batch)
        for parameter in trained:
            parameter.grad = None
        loss.backward()
        _step(optimizer, trained, masters)
        schedule.step()
        losses.append(float(loss.detach()))
        if len(losses) % every == 0 or len(losses) == steps:
            now = _mean_divergence(student, teacher, held_out, known)
            if now < min(checks.values()):
                best_values = [parameter.detach().clone() for parameter in trained]
            checks[len(losses)] = now
            worse = worse + 1 if not now < checks[0] else 0
            if worse == PATIENCE:
                break
    for parameter, value in zip(trained, best_values, strict=True):
        parameter.data.copy_(value)
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    return Lessons(losses, checks)


def _step(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], masters: list[torch.Tensor]) -> None:
    """Update the float32 masters by the gradients of the trained parameters, then copy them into the parameters."""
    for parameter, master in zip(trained, masters):
        if master is not parameter:
            master.grad = None if parameter.grad is None else parameter.grad.float()
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for parameter, master in zip(trained, masters):
            if master is not parameter:
                parameter.copy_(master)


def _mean_divergence(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], known: Sequence[torch.Tensor | None]
) -> float:
    with torch.no_grad():
        values = [float(divergence(student, teacher, batch, target)) for batch, target in zip(batches, known)]
        return sum(values) / max(1, len(batches))


def _answers_kept(teacher: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor | None]:
    """Return the teacher's log-probabilities on each batch; None for batches beyond KEPT_ELEMENTS elements in total."""
    kept: list[torch.Tensor | None] = []
    room, vocabulary = KEPT_ELEMENTS, anatomy(teacher).vocabulary
    for batch in batches:
        room -= batch["input_ids"].numel() * vocabulary
        kept.append(_answers(teacher, batch) if room >= 0 else None)
    return kept


@torch.no_grad()
def _answers(teacher: nn.Module, inputs: Batch) -> torch.Tensor:
    return teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)


def divergence(
    student: nn.Module, teacher: nn.Module, inputs: Batch, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Return KL(teacher ‖ student) in nats, averaged over the real tokens of `inputs`. `target`: the teacher's
    log-probabilities, if already computed.
    """
    target = _answers(teacher, inputs) if target is None else target
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
    """Yield the batches endlessly, each round in a new order."""
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
