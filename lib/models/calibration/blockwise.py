"""Fits each changed decoder block to the output of the original block, by training or by least squares.

Walks through both models in parallel (`lib.models.calibration.walk`), from the first block to the last. The input of a
changed block is the output of the changed blocks before it; its target is the output of the original block on the
original's input, so that it also compensates for earlier errors (AA-SVD). Works on float32 copies of one block at a
time. A part of the text is held out, and changes that do not help there are undone. Knows nothing of what was changed.

Shapes: B sequences, T tokens, H hidden, O outputs and I inputs of a matrix, R rank.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lib.models.calibration.distillation import rate_for, split
from lib.models.calibration.positive_root import positive_root, ridge_of
from lib.models.calibration.walk import TextBatch, Walk, run
from lib.models.structure.anatomy import Block
from lib.models.structure.replacements.factored import FactoredExperts, FactoredLinear

DAMPING = 1e-4  # of the mean diagonal of a refit's normal equations


@dataclass
class Stream:
    """One batch: inputs and outputs [B, T, H] and other arguments of each block, and the mask of real tokens."""

    mask_BT: torch.Tensor
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    arguments: list[dict] = field(default_factory=list)


@torch.no_grad()
def streams(
    model: nn.Module, calibration: Sequence[dict[str, torch.Tensor]], *, in_float32: bool = True
) -> list[Stream]:
    """Return the inputs and outputs of all blocks of `model`, by batch, in float32 or the model's own dtype.

    Holds the states of every block in memory, while `Walk` holds those of one block.
    """
    walk = Walk(model, calibration)
    convert: Callable[[Any], Any] = _float if in_float32 else lambda value: value
    passed = [Stream(batch.mask_BT, arguments=convert(batch.arguments)) for batch in walk.carried]
    for _ in walk:
        outputs = list(walk.outputs())
        for stream, batch, output in zip(passed, walk.carried, outputs):
            stream.inputs.append(convert(batch.states_BTH).clone())
            stream.outputs.append(convert(output).clone())
        walk.carry_on(outputs)
    return passed


def _float(value: Any) -> Any:
    """Return `value` with its floating-point tensors in float32."""
    if isinstance(value, dict):
        return {name: _float(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_float(part) for part in value)
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


# --- both models side by side ----------------------------------------------------------------------------------------


@dataclass
class Lesson:
    """One batch for one block, float32: input, the original's output as target, other arguments, real-token mask."""

    states_BTH: torch.Tensor
    target_BTH: torch.Tensor
    arguments: dict[str, Any]
    mask_BT: torch.Tensor
    scale: float  # ‖original output − original input‖² over real tokens

    def distance(self, worker: nn.Module) -> torch.Tensor:
        """Return ‖output − target‖² of the block `worker`, divided by `scale`."""
        difference = run(worker, self.states_BTH, self.arguments) - self.target_BTH
        return difference[self.mask_BT].square().sum() / max(self.scale, 1e-12)


def _pairs(
    changed: nn.Module, original: nn.Module, calibration: Sequence[dict[str, torch.Tensor]]
) -> Iterator[tuple[Block, Block, Walk, list[Lesson]]]:
    """Yield (changed block, original block, walk through the original, a lesson per batch) for each block in turn.

    The walk through the original is in front of the block. The caller may modify the changed block in place.
    """
    before, after = Walk(original, calibration), Walk(changed, calibration)
    for whole, block in zip(before, after):
        yield block, whole, before, lessons_of(before, after)


def lessons_of(before: Walk, after: Walk) -> list[Lesson]:
    """Return the lessons of a block, one per batch: `before` and `after` walk through the original and changed model.

    Both are in front of the block. The original's outputs are carried on.
    """
    outputs = list(before.outputs())
    before.carry_on(outputs)
    batches = zip(before.carried, after.carried, outputs)
    return [_lesson(old, new, output, after.index) for old, new, output in batches]


def _lesson(old: TextBatch, new: TextBatch, output_BTH: torch.Tensor, index: int) -> Lesson:
    change = (output_BTH.float() - old.states_BTH.float())[old.mask_BT]
    arguments = _float(new.arguments[index])
    return Lesson(new.states_BTH.float(), output_BTH.float(), arguments, old.mask_BT, float(change.square().sum()))


@torch.no_grad()
def _error(worker: nn.Module, lessons: Sequence[Lesson]) -> float:
    return sum(float(lesson.distance(worker)) for lesson in lessons) / len(lessons)


def _factors(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all factored modules inside `module`, shared ones once."""
    return list({id(matrix): matrix for part in _factored(module) for matrix in part.parameters()}.values())


def _factored(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, (FactoredLinear, FactoredExperts))]


def _copy_values(worker: nn.Module, module: nn.Module) -> None:
    """Replace the factors of the model's block `module` by those of `worker`, in the block's dtype.

    The old tensors are not written to, since another model may share them.
    """
    for old, new in zip(_factored(module), _factored(worker), strict=True):
        for owner, taught in zip(old.modules(), new.modules(), strict=True):
            for leaf, value in taught._parameters.items():
                if value is not None:
                    dtype = owner.get_parameter(leaf).dtype
                    owner._parameters[leaf] = nn.Parameter(value.detach().to(dtype), requires_grad=False)


# --- by training -----------------------------------------------------------------------------------------------------


def refine(
    changed: nn.Module,
    original: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
) -> list[tuple[float, float]]:
    """Train the factors of each block of `changed` in place; return each block's error (before, after).

    The error is ‖output − target‖² / ‖original output − original input‖² on held-out text. Adam, cosine schedule to
    zero, one batch per step, with the learning rate scaled to the width by `rate_for`. Factors of a block that did not
    improve on held-out text are restored. Both models need the same blocks.
    """
    taught, held_out = split(calibration)
    count, errors = len(taught), []
    learning_rate = rate_for(original, learning_rate)
    for block, _, _, lessons in _pairs(changed, original, [*taught, *held_out]):
        worker = copy.deepcopy(block.module).float()
        errors.append(_train(worker, lessons[:count], lessons[count:], steps, learning_rate))
        _copy_values(worker, block.module)
    return errors


def _train(
    worker: nn.Module, taught: list[Lesson], held_out: list[Lesson], steps: int, learning_rate: float
) -> tuple[float, float]:
    trained = _factors(worker)
    before = _error(worker, held_out)
    if not trained or not steps:
        return before, before
    initial = [parameter.detach().clone() for parameter in trained]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in range(steps):
            loss = taught[step % len(taught)].distance(worker)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    return before, _keep_if_better(worker, held_out, before, trained, initial)


def _keep_if_better(
    worker: nn.Module,
    held_out: list[Lesson],
    before: float,
    changed: Sequence[torch.Tensor],
    initial: Sequence[torch.Tensor],
) -> float:
    """Return the held-out error after a change; undo the change, restoring `initial`, if the error is not lower."""
    after = _error(worker, held_out)
    if after < before:
        return after
    with torch.no_grad():
        for parameter, value in zip(changed, initial):
            parameter.copy_(value)
    return before


# --- by least squares ------------------------------------------------------------------------------------------------


@torch.no_grad()
def refit(
    changed: nn.Module, original: nn.Module, calibration: Sequence[dict[str, torch.Tensor]]
) -> list[tuple[float, float]]:
    """Refit the outer factor of each factored linear layer of `changed` in place, in closed form; return each block's
    error (before, after) on held-out text, as `refine` does.

    With the inputs X of the original matrix W, the inputs X′ of the factors and the inner factor A, the outer factor
    becomes W·X·X′ᵀ·Aᵀ·(A·X′·X′ᵀ·Aᵀ)⁻¹, which is closest to the original output given the compressed blocks before it.
    Needs no gradients or optimizer state and holds the sums of one block. Factors of experts are unchanged.
    """
    taught, held_out = split(calibration)
    pairs = _pairs(changed, original, [*taught, *held_out])
    return [refit_block(block, whole, walk, lessons, len(taught)) for block, whole, walk, lessons in pairs]


@torch.no_grad()
def refit_block(block: Block, whole: Block, walk: Walk, lessons: list[Lesson], taught: int) -> tuple[float, float]:
    """Refit one block in place, as `refit` does; return its error (before, after) on the lessons from `taught` on.

    `walk` is in front of the original block, `whole`.
    """
    worker = copy.deepcopy(block.module).float()
    factored = {name: part for name, part in worker.named_modules() if isinstance(part, FactoredLinear)}
    before = _error(worker, lessons[taught:])
    sums = _cross_sums(factored, worker, lessons[:taught], whole, walk)
    outers = [part.outer.weight for part in factored.values()]
    initial = [outer.clone() for outer in outers]
    for name, part in factored.items():
        matrix: Any = whole.module.get_submodule(name)
        where = f"block {whole.index}, {name}"
        part.outer.weight.copy_(_nearest(matrix.weight, *sums[name], part.outer.weight, where))
    after = _keep_if_better(worker, lessons[taught:], before, outers, initial)
    _copy_values(worker, block.module)
    return before, after


def _cross_sums(
    factored: dict[str, FactoredLinear], worker: nn.Module, lessons: list[Lesson], whole: Block, walk: Walk
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (Σ x·zᵀ, Σ z·zᵀ) by module, float64 [I, R] and [R, R], for inputs x of the original and z = A·x′."""
    captured: dict[str, torch.Tensor] = {}

    def capture(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda _module, args: captured.update({name: args[0]})

    hooks = [whole.module.get_submodule(name).register_forward_pre_hook(capture(name)) for name in factored]
    inner = [part.inner.register_forward_hook(_capturing(captured, f"{name}:")) for name, part in factored.items()]
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    try:
        for lesson, batch in zip(lessons, walk.carried):
            run(whole.module, batch.states_BTH, batch.arguments[whole.index])
            run(worker, lesson.states_BTH, lesson.arguments)
            mask_T = lesson.mask_BT.flatten()
            for name in factored:
                x_TI, z_TR = (_rows(captured[key], mask_T) for key in (name, f"{name}:"))
                cross, own = (x_TI.T @ z_TR).double(), (z_TR.T @ z_TR).double()
                sums[name] = (sums[name][0] + cross, sums[name][1] + own) if name in sums else (cross, own)
    finally:
        for hook in [*hooks, *inner]:
            hook.remove()
    return sums


def _capturing(captured: dict[str, torch.Tensor], key: str) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
    return lambda _module, _args, output: captured.update({key: output})


def _rows(states: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])[mask_T].float()


def _nearest(
    weight_OI: torch.Tensor,
    cross_IR: torch.Tensor,
    own_RR: torch.Tensor,
    outer_OR: torch.Tensor,
    what: str = "a factored matrix",
) -> torch.Tensor:
    """Return the outer factor [O, R] that solves the normal equations, slightly damped towards the current `outer_OR`.

    The current factor is kept in directions that occurred in no token, and entirely if the output of the inner factor
    was always zero. Raises UserError naming `what`, as `positive_root` does.
    """
    root_RR, ridge = positive_root(own_RR, ridge_of(own_RR, DAMPING), what)
    right_OR = weight_OI.double() @ cross_IR + ridge * outer_OR.double()
    return torch.cholesky_solve(right_OR.T, root_RR).T
