"""Second moments of what goes into each matrix of the decoder while calibration text runs through it: Σ x², or Σ x·xᵀ.

A matrix is a linear layer of a block, or the stack of one kind of matrix of its experts; an expert's moments are those
of the tokens that were routed to it, behind the input factor where experts share one. Padding is left out. Knows
nothing of what the moments are used for. Inputs that several matrices share (queries, keys and values; gate and up) are
kept once.

Shapes: T tokens of a batch without padding, E experts, O outputs and I inputs of a matrix, H hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import UserError
from lib.models.calibration.activations import real_T
from lib.models.structure.anatomy import FeedForward, anatomy
from lib.models.structure.sparse import is_dense

PARTS = ("attention", "feed_forward", "experts")


@dataclass(frozen=True)
class Matrix:
    """A weight [O, I], or [E, O, I] for experts: `owner.attribute`, found in the model under `name`, of one `part`."""

    name: str
    block: int
    part: str
    owner: nn.Module
    attribute: str

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.owner, self.attribute)


@dataclass
class Moments:
    """Sums over calibration tokens, float32: `squares` [I] or [E, I], `gram` [I, I] or [E, I, I] where asked for.

    `tokens` is a count [1] or [E].
    """

    tokens: torch.Tensor
    squares: torch.Tensor
    gram: torch.Tensor | None = None


class _Seen(Exception):
    """Ends a pass behind the block that was asked for."""


def matrices(model: nn.Module, part: str = "all", block: int | None = None) -> list[Matrix]:
    """Return the matrices of the decoder's blocks (of one block) of a part: one of PARTS, or "all".

    "feed_forward" is the whole feed-forward part, its experts among them; "experts" are the routed ones alone. Norms,
    routers, embeddings, the head and the vision tower are none of them. Empty where the model lacks the part.
    """
    names = {module: name for name, module in model.named_modules()}
    found = []
    for one in anatomy(model).blocks:
        if block is None or one.index == block:
            found += _linears(one.attention.module, one.index, "attention", names)
            found += feed_forward_matrices(one.feed_forward, one.index, names)
    wanted = {"all": PARTS, "feed_forward": ("feed_forward", "experts")}.get(part, (part,))
    return [matrix for matrix in found if matrix.part in wanted]


def feed_forward_matrices(part: FeedForward, block: int = 0, names: dict[nn.Module, str] | None = None) -> list[Matrix]:
    """Return the matrices of one feed-forward part; without `names` they are named from that part on."""
    names = names or {module: name for name, module in part.module.named_modules()}
    found = [] if part.dense is None else _linears(part.dense, block, "feed_forward", names)
    if part.experts is not None:
        owner = part.experts.module
        for attribute in ("gate_up_proj", "down_proj"):
            weight = getattr(owner, attribute, None)
            if weight is not None and is_dense(weight) and weight.is_floating_point():
                found.append(Matrix(f"{names[owner]}.{attribute}", block, "experts", owner, attribute))
    return found


def _linears(owner: nn.Module, block: int, part: str, names: dict[nn.Module, str]) -> list[Matrix]:
    linears = [module for module in owner.modules() if isinstance(module, nn.Linear)]
    return [Matrix(f"{names[module]}.weight", block, part, module, "weight") for module in linears]


@torch.no_grad()
def moments(
    model: nn.Module,
    calibration: Iterable[dict[str, torch.Tensor]],
    chosen: Sequence[Matrix],
    *,
    gram: bool = False,
) -> dict[str, Moments]:
    """Run `calibration` through `model` and return the moments of the matrices `chosen`, by name.

    With `gram` also Σ x·xᵀ, which takes I² numbers per input. The pass ends behind the last block of `chosen`. Raises
    UserError where there is no calibration token at all.
    """
    found: dict[str, Moments] = {}
    keep: dict[str, torch.Tensor] = {}
    hooks = _hooks(chosen, found, keep, gram)
    last = max((matrix.block for matrix in chosen), default=-1)
    hooks += [block.module.register_forward_hook(_stop) for block in anatomy(model).blocks if block.index == last]
    try:
        for inputs in calibration:
            keep["mask"] = real_T(inputs)
            try:
                model(**inputs, use_cache=False, logits_to_keep=1)
            except _Seen:
                keep.pop("input", None)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) < len(chosen):
        raise UserError("calibration: no token to observe; give at least one sequence")
    return found


def _stop(*_arguments) -> None:
    raise _Seen


def _hooks(chosen: Sequence[Matrix], found: dict, keep: dict, gram: bool) -> list:
    hooks = []
    experts = {matrix.owner: {} for matrix in chosen if matrix.part == "experts"}
    for matrix in chosen:
        if matrix.part == "experts":
            experts[matrix.owner][matrix.attribute] = matrix.name
        else:
            hooks.append(matrix.owner.register_forward_pre_hook(_watch(matrix.name, found, keep, gram)))
    for owner, names in experts.items():
        hooks.append(owner.register_forward_pre_hook(_watch_experts(names, found, keep, gram)))
    return hooks


def _watch(name: str, found: dict[str, Moments], keep: dict, gram: bool) -> Callable:
    def hook(_module: nn.Module, args: tuple) -> None:
        if args[0] is keep.get("input"):  # the neighbour's input, summed already
            found[name] = found[keep["name"]]
            return
        keep["input"], keep["name"] = args[0], name
        x_TI = args[0].reshape(-1, args[0].shape[-1])[keep["mask"]].float()
        tokens = torch.tensor([len(x_TI)])
        new = Moments(tokens, x_TI.square().sum(0), x_TI.T @ x_TI if gram else None)
        found[name] = _sum(found.get(name), new)

    return hook


def _watch_experts(names: dict[str, str], found: dict[str, Moments], keep: dict, gram: bool) -> Callable:
    """Run each expert on its own tokens once more, to see what goes into its second matrix."""

    def hook(module: nn.Module, args: tuple) -> None:
        hidden_TH, chosen_TK = (tensor[keep["mask"]] for tensor in args[:2])
        hidden_TH = module.enter(hidden_TH) if hasattr(module, "enter") else hidden_TH
        inputs: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for expert in range(module.down_proj.shape[0]):
            x_TH = hidden_TH[(chosen_TK == expert).any(-1)]
            inner_TI = module._apply_gate(nn.functional.linear(x_TH, module.gate_up_proj[expert]))
            inputs["gate_up_proj"].append(x_TH.float())
            inputs["down_proj"].append(inner_TI.float())
        for attribute, name in names.items():
            xs = inputs[attribute]
            tokens = torch.tensor([len(x) for x in xs])
            squares = torch.stack([x.square().sum(0) for x in xs])
            new = Moments(tokens, squares, torch.stack([x.T @ x for x in xs]) if gram else None)
            found[name] = _sum(found.get(name), new)

    return hook


def _sum(total: Moments | None, new: Moments) -> Moments:
    if total is None:
        return new
    both = None if new.gram is None else total.gram.add_(new.gram)
    return Moments(total.tokens + new.tokens, total.squares + new.squares, both)
