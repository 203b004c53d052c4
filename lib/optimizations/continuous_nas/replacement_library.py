"""Replacements for the parts of blocks: cheaper attention and feed-forward modules, views of one sorted copy that are
swapped in instantly.

A slot ("03.attention", "03.feed_forward") is the place of a part, an option ("groups_50", "channels_75", "none") a
possible replacement, and a choice one option per slot. The live student shares every tensor with the original model.
Swapping changes which modules it runs, copies nothing, and is undone exactly by the choice `whole`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import Block, anatomy
from lib.models.structure.anatomy import attention as view_attention
from lib.models.structure.anatomy import feed_forward as view_feed_forward
from lib.models.structure.replacements.no_op import NoAttention, NoFeedForward, place
from lib.models.structure.surgery import best_experts, keep_experts, synchronise
from lib.optimizations.continuous_nas import prefix_views

WHOLE = "whole"
ATTENTION = (WHOLE, "groups_50", "none")
DENSE = (WHOLE, "channels_88", "channels_75", "channels_50", "channels_25", "none")
EXPERTS = (WHOLE, "experts_75", "experts_50", "top_k_50", "experts_50_top_k_50", "none")
# At effort preview:
FEWEST = {
    "attention": ATTENTION,
    "dense": (WHOLE, "channels_75", "channels_50", "none"),
    "experts": (WHOLE, "experts_50", "top_k_50", "none"),
}
# For the uniform control: finer than the library, since it has as many evaluations to spend.
UNIFORM = {
    "attention": (WHOLE, "groups_75", "groups_50", "groups_25", "none"),
    "dense": (WHOLE, *(f"channels_{percent}" for percent in range(95, 15, -5))),
    "experts": (
        WHOLE,
        *(f"experts_{percent}" for percent in (88, 75, 63, 50)),
        *(f"experts_{percent}_top_k_{chosen}" for chosen in (75, 50, 25) for percent in (99, 75, 50, 38)),
    ),
}
# For the uniform control at effort preview:
FEWEST_UNIFORM = {
    "attention": ATTENTION,
    "dense": (WHOLE, *(f"channels_{percent}" for percent in range(90, 15, -10))),
    "experts": (
        WHOLE,
        *(f"experts_{percent}" for percent in (75, 50)),
        *(f"experts_{p}_top_k_50" for p in (99, 75, 50)),
    ),
}
PARTS = ("attention", "feed_forward")
DRAWS = 50  # most draws per random choice, since repeats are drawn again
CHANNEL_MULTIPLE = 8  # matrix kernels favour aligned rows

Choice = dict[str, str]  # slot → option


@dataclass
class Library:
    """Replacements by slot and option. Only `student`, which shares every tensor with the model, is swapped. `ordered`
    are the sorted parts whose views the replacements are.
    """

    modules: dict[str, dict[str, nn.Module]]
    student: nn.Module
    ordered: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def space(self) -> dict[str, tuple[str, ...]]:
        return {slot: tuple(options) for slot, options in self.modules.items()}

    @property
    def whole(self) -> Choice:
        return dict.fromkeys(self.modules, WHOLE)


def must_attend(model: nn.Module) -> set[int]:
    """Return the blocks that must keep an attention: the first, or all if blocks attend in different ways."""
    blocks = [block.index for block in anatomy(model).blocks]
    mixed = len(set(getattr(anatomy(model).config, "layer_types", None) or ())) > 1
    return set(blocks if mixed else blocks[:1])


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its tensors, stripped of all parts but the attentions that must stay."""
    left = _sharing(model)
    attending = must_attend(model)
    for index, layer in enumerate(cast(nn.ModuleList, anatomy(left).decoder.layers)):
        place(layer, "feed_forward", NoFeedForward())
        if index not in attending:
            place(layer, "attention", NoAttention())
    return synchronise(left)


def _sharing(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its tensors but has its own configuration, which follows its parts."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def locate(slot: str) -> tuple[int, str]:
    """Return the block index and the part of a slot."""
    index, _, part = slot.partition(".")
    return int(index), part


def build(
    model: nn.Module,
    saliency: Sequence[Mapping],
    options: Mapping[str, Sequence[str]] | None = None,
    ordered: dict[str, nn.Module] | None = None,
) -> Library:
    """Return the library of `model`: real modules that keep the most salient heads, channels or experts.

    `saliency` is per block: "heads" [G], "channels" [C], "experts" [E], if it has them. `options` restricts the option
    names by kind: attention, dense, experts. `ordered` are the sorted parts of another library of the same model, to be
    reused. The first block keeps an attention, since the cache takes the text length from it. All blocks do if they
    attend in different ways (sliding, full), since the cache assigns its layer types to blocks in order. Raises
    UserError for an unknown option, or if a slot would have none.
    """
    names = {"attention": ATTENTION, "dense": DENSE, "experts": EXPERTS} | dict(options or {})
    student = _sharing(model)
    ordered = {} if ordered is None else ordered
    attending = must_attend(model)
    modules: dict[str, dict[str, nn.Module]] = {}
    for block, scores in zip(anatomy(model).blocks, saliency):
        for part in PARTS:
            kind = "attention" if part == "attention" else block.feed_forward.kind
            slot = f"{block.index:02d}.{part}"
            replacements: dict[str, nn.Module] = {}
            sizes: set[tuple[int, ...]] = set()
            for option in names[kind]:
                if part == "attention" and option == "none" and block.index in attending:
                    continue
                module = _replacement(block, part, option, scores, slot, ordered)
                if module is None or (size := _size(part, module)) in sizes:
                    continue
                sizes.add(size)
                replacements[option] = module
            if not replacements:
                raise UserError(f'library: slot "{slot}" has no option: {kind} offers {list(names[kind])}')
            modules[slot] = replacements
    whole = anatomy(student).blocks
    for slot in modules:  # the option "whole" is the student's own module
        index, part = locate(slot)
        if WHOLE in modules[slot]:
            modules[slot][WHOLE] = getattr(whole[index], part).module
    return Library(modules, student, ordered)


def _replacement(
    block: Block, part: str, option: str, scores: Mapping, slot: str, ordered: dict[str, nn.Module]
) -> nn.Module | None:
    """Return the module of one option, or None if it would equal the whole part or leave the router too few experts.

    Replacements are views of the part's sorted copy, `ordered[slot]`, which is created when first needed.
    """
    source = getattr(block, part).module
    if option == "none":
        return NoAttention() if part == "attention" else NoFeedForward()
    if option == WHOLE:
        return source
    shares = _shares(option, "attention" if part == "attention" else block.feed_forward.kind)
    experts = block.feed_forward.experts if part == "feed_forward" else None
    chosen = None if experts is None or "top_k" not in shares else max(1, round(shares["top_k"] * experts.top_k))
    if experts is not None and chosen == experts.top_k:
        return None
    in_groups = experts is not None and experts.groups > 1
    if set(shares) == {"top_k"} or in_groups:
        cut = prefix_views.sharing(source)
    else:
        if slot not in ordered:
            ordered[slot] = prefix_views.ordered(block, part, scores)
        cut = prefix_views.sharing(ordered[slot])
    if part == "attention":
        count = _count(scores["heads"], shares["groups"])
        if count == block.attention.key_value_heads:
            return None
        prefix_views.first_groups(cut, count)
        return cut
    view = replace(block, feed_forward=view_feed_forward(cut))
    if view.feed_forward.experts is None:
        prefix_views.first_channels(view, _count(scores["channels"], shares["channels"], CHANNEL_MULTIPLE))
        return cut
    if "experts" in shares:
        cut_experts = view.feed_forward.experts
        count = _count(scores["experts"], shares["experts"])
        if count < cut_experts.least_per_group * cut_experts.groups:
            return None
        if in_groups:  # a router that picks groups first needs equally many of each: not a prefix, so a copy
            keep_experts(cut_experts, best_experts(cut_experts, scores["experts"], count))
        else:
            prefix_views.first_experts(cut_experts, count)
    if chosen is not None:
        setattr(view.feed_forward.experts.router, "top_k", chosen)  # noqa: B010
    return cut


def _size(part: str, module: nn.Module) -> tuple[int, ...]:
    """Return how much of a part is kept: options that keep the same amount are one (50 and 75 % of three groups)."""
    if isinstance(module, (NoAttention, NoFeedForward)):
        return ()
    if part == "attention":
        return (view_attention(module).key_value_heads,)
    view = view_feed_forward(module)
    return (view.channels,) if view.experts is None else (view.experts.count, view.experts.top_k)


def _shares(option: str, kind: str) -> dict[str, float]:
    """Return the shares that an option keeps: "experts_50_top_k_50" → {"experts": 0.5, "top_k": 0.5}.

    Raises UserError for an option that does not exist for parts of `kind`.
    """
    offered, may = {
        "attention": (ATTENTION, {"groups"}),
        "dense": (DENSE, {"channels"}),
        "experts": (EXPERTS, {"experts", "top_k"}),
    }[kind]
    words = option.replace("top_k", "top-k").split("_")
    shares = dict(zip((word.replace("-", "_") for word in words[::2]), words[1::2]))
    if len(shares) * 2 != len(words) or not set(shares) <= may or not all(map(_percent, shares.values())):
        raise UserError(f'library: option "{option}" of {kind}; expected one like {", ".join(offered)}')
    return {name: int(text) / 100 for name, text in shares.items()}


def _percent(text: str) -> bool:
    return text.isdigit() and 0 < int(text) < 100


def _count(scores: torch.Tensor, share: float, multiple: int = 1) -> int:
    """Return the number of pieces in a share of all, rounded to a multiple of `multiple`, at least one multiple."""
    return min(max(multiple, round(len(scores) * share / multiple) * multiple), len(scores))


def swap(library: Library, choice: Choice) -> nn.Module:
    """Turn the live `library.student` into the chosen architecture in place and return it; copies and loads nothing."""
    layers = cast(nn.ModuleList, anatomy(library.student).decoder.layers)
    for slot, option in choice.items():
        index, part = locate(slot)
        place(layers[index], part, library.modules[slot][option])
    return synchronise(library.student)


def child(library: Library, choice: Choice) -> nn.Module:
    """Return the chosen architecture as a separate model; the student is whole again afterwards."""
    chosen = copy.deepcopy(swap(library, choice))
    swap(library, library.whole)
    return synchronise(chosen)


def random_choices(space: Mapping[str, Sequence[str]], count: int, seed: int) -> list[Choice]:
    """Return `count` different random choices, or fewer if DRAWS times as many draws give no more.

    Each first draws the share of slots to replace, so that mild choices are among them.
    """
    draw = np.random.default_rng(seed)
    choices: list[Choice] = []
    for _ in range(DRAWS * count):
        if len(choices) == count:
            break
        share = draw.random()
        choice = {}
        for slot, options in space.items():
            others = [option for option in options if option != WHOLE]
            replaced = bool(others) and draw.random() < share
            choice[slot] = others[draw.integers(len(others))] if replaced else WHOLE
        if choice not in choices:
            choices.append(choice)
    return choices


def uniform_choices(space: Mapping[str, Sequence[str]], count: int) -> list[Choice]:
    """Return at most `count` evenly spread choices that treat all blocks alike, the mildest first.

    If a slot lacks an option (another kind of part, a first block that must attend), it takes the option at the same
    relative position in its own list.
    """
    attending = max((options for slot, options in space.items() if slot.endswith(".attention")), key=len)
    feeding = max((options for slot, options in space.items() if slot.endswith(".feed_forward")), key=len)
    choices = []
    for pair in ((at, feed) for at in attending for feed in feeding):
        choice = {}
        for slot, options in space.items():
            wanted, names = (pair[0], attending) if slot.endswith(".attention") else (pair[1], feeding)
            nearest = min(round(names.index(wanted) / max(1, len(names) - 1) * (len(options) - 1)), len(options) - 1)
            choice[slot] = wanted if wanted in options else options[nearest]
        choices.append(choice)
    choices = [choice for choice in choices if any(option != WHOLE for option in choice.values())]
    order = np.linspace(0, len(choices) - 1, min(count, len(choices))).round().astype(int)
    return [choices[index] for index in order]
