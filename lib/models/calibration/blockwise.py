"""Decoder blocks one at a time: their inputs and outputs, and training a changed block on the original's output.

`refine` goes from the first block to the last: the input of each changed block is the output of the changed blocks
before it, its target the output of the original block on the original's input, so that it also compensates for earlier
errors (AA-SVD). Works on float32 copies of one block at a time. `rest` runs a model from one block on, so that the
blocks before a change need not run again. Knows nothing of what was changed.

Shapes: B sequences, T tokens, H hidden, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lib.models.structure.anatomy import anatomy
from lib.models.structure.factored import FactoredExperts, FactoredLinear


@dataclass
class Stream:
    """One batch: inputs and outputs of each block [B, T, H], the blocks' other arguments, the mask of real tokens."""

    mask_BT: torch.Tensor
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)


@torch.no_grad()
def streams(
    model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], *, in_float32: bool = True
) -> list[Stream]:
    """Return the inputs and outputs of the blocks of `model`, batch by batch, in float32 or the model's own dtype."""
    passed: list[Stream] = []
    convert: Callable[[Any], Any] = _float if in_float32 else lambda value: value

    def watch(module, args, kwargs, output) -> None:
        stream = passed[-1]
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        stream.inputs.append(convert(before).clone())
        stream.outputs.append(convert(after).clone())
        stream.arguments = {name: convert(value) for name, value in kwargs.items() if name != "hidden_states"}

    hooks = [block.module.register_forward_hook(watch, with_kwargs=True) for block in anatomy(model).blocks]
    try:
        for inputs in calibration:
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
            passed.append(Stream(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()))
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return passed


def _float(value: Any) -> Any:
    """Return `value` with its floating-point tensors in float32."""
    if isinstance(value, (tuple, list)):
        return type(value)(_float(part) for part in value)
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


@torch.no_grad()
def rest(model: nn.Module, stream: Stream, index: int) -> torch.Tensor:
    """Return the logits [B, T, V] of `model` run from block `index` on, or, behind the last block, of its output.

    `stream` is in the model's dtype, of this model or of one that equals it up to that block.
    """
    view = anatomy(model)
    last = len(view.blocks) - 1
    states = stream.inputs[index] if index <= last else stream.outputs[last]
    for block in view.blocks[index:]:
        states = _run(block.module, states, stream)
        if block.index < last:
            states = states + _added(stream, block.index)
    return view.head(view.final_norm(states))


def _added(stream: Stream, index: int) -> torch.Tensor:
    """Return the features that a vision tower adds between block `index` and the next; zero elsewhere."""
    return stream.inputs[index + 1] - stream.outputs[index]


def refine(
    changed: nn.Module,
    original: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
) -> list[tuple[float, float]]:
    """Train the factors of each block of `changed` in place; return each block's error (before, after).

    The error is ‖output − target‖² over ‖original output − original input‖², on the calibration batches. Adam, cosine
    to zero, one batch per step. Factors that `steps` did not improve are restored. Both models need the same blocks.
    """
    originals = streams(original, calibration)
    hidden = [stream.inputs[0] for stream in originals]
    errors = []
    last = len(anatomy(changed).blocks) - 1
    for block in anatomy(changed).blocks:
        worker = copy.deepcopy(block.module).float()
        errors.append(_train(worker, block.index, hidden, originals, steps, learning_rate))
        _copy_values(worker, block.module)
        with torch.no_grad():
            hidden = [_run(worker, states, stream) for states, stream in zip(hidden, originals)]
            if block.index < last:
                hidden = [states + _added(stream, block.index) for states, stream in zip(hidden, originals)]
    return errors


def _train(
    worker: nn.Module, index: int, hidden: list[torch.Tensor], originals: list[Stream], steps: int, learning_rate: float
) -> tuple[float, float]:
    trained = _factors(worker)
    before = _error(worker, index, hidden, originals)
    if not trained or not steps:
        return before, before
    initial = [parameter.detach().clone() for parameter in trained]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in range(steps):
            at = step % len(originals)
            loss = _distance(worker, index, hidden[at], originals[at])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    after = _error(worker, index, hidden, originals)
    if not after < before:
        for parameter, value in zip(trained, initial):
            parameter.copy_(value)
        after = before
    return before, after


def _factors(module: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of every factored module inside `module`."""
    factored = (part for part in module.modules() if isinstance(part, (FactoredLinear, FactoredExperts)))
    return list({id(matrix): matrix for part in factored for matrix in part.parameters()}.values())


def _run(worker: nn.Module, states: torch.Tensor, stream: Stream) -> torch.Tensor:
    output = worker(states, **stream.arguments)
    return output[0] if isinstance(output, tuple) else output


def _distance(worker: nn.Module, index: int, states: torch.Tensor, stream: Stream) -> torch.Tensor:
    target, mask = stream.outputs[index], stream.mask_BT
    scale = (target - stream.inputs[index])[mask].square().sum()
    return (_run(worker, states, stream) - target)[mask].square().sum() / scale.clamp_min(1e-12)


@torch.no_grad()
def _error(worker: nn.Module, index: int, hidden: list[torch.Tensor], originals: list[Stream]) -> float:
    distances = [float(_distance(worker, index, states, stream)) for states, stream in zip(hidden, originals)]
    return sum(distances) / len(originals)


def _copy_values(worker: nn.Module, module: nn.Module) -> None:
    """Copy the trained values into the model's block, in its dtype."""
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), worker.parameters(), strict=True):
            parameter.copy_(value)
