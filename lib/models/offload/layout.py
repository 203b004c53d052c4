"""A model without weights, and the places of its weights in the files: by unit, expert, or as a fixed part of memory.

The architecture is built of empty parameters, which have shape and dtype but a single NaN as storage. A unit is the set
of weights needed at once: a decoder block, a block of a vision tower, some rows of the head. Knows which tensor of a
checkpoint belongs to which unit, but reads none.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lib.errors import UserError
from lib.models.checkpoints import tying
from lib.models.checkpoints.folder import MANIFEST
from lib.models.checkpoints.weight_file import TensorPlace, WeightFile, aligned
from lib.models.offload import expert_cache
from lib.models.structure import architecture
from lib.models.structure.anatomy import Anatomy, Experts, anatomy
from lib.models.structure.replacements import factored, no_op
from lib.models.structure.surgery import synchronise

SINGLE = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")  # matrices of an individually stored expert
HEAD_BYTES = 2**25  # size of the pieces of the head, unless the largest block is smaller


@dataclass(frozen=True)
class Part:
    """One tensor of a unit: its place, the module that owns the parameter (None for rows of the head), the parameter's
    name in that module, and the empty parameter that replaces it while it is not in memory.
    """

    place: TensorPlace
    owner: nn.Module | None
    leaf: str
    empty: nn.Parameter | None


@dataclass(frozen=True)
class Layout:
    """A model without weights, and their places: `units`, `fixed` (tensors that always stay in memory, name → bytes),
    `experts` (see `expert_cache.Places`), `expert_size` (number of experts, bytes of one), `embeddings`, `total` bytes.
    """

    model: nn.Module
    view: Anatomy
    file: WeightFile
    units: dict[str, list[Part]]
    fixed: dict[str, int]
    experts: expert_cache.Places
    expert_size: tuple[int, int]
    embeddings: TensorPlace
    total: int


def layout(folder: Path, drop: bool, device: str) -> Layout:
    """Return the layout of a checkpoint folder. Raises UserError if it is damaged or lacks a tensor."""
    file = WeightFile(folder, drop=drop)
    model = _skeleton(folder, file, device)
    view = anatomy(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = _place(file, names[id(view.embeddings.weight)])
    head = embeddings if view.tied else _place(file, names[id(view.head.weight)])
    experts = _experts(view, names, file)
    units = _units(view, names, file, experts, head)
    fixed = _fixed(model, view, units, experts, file)
    count = sum(_experts_of(view, index).count for index in experts)
    size = count, expert_cache.expert_bytes(experts) if experts else 0
    total = sum(unit_bytes(units).values()) + sum(fixed.values()) + size[0] * size[1]
    total += 0 if view.tied else embeddings.nbytes
    return Layout(model, view, file, units, fixed, experts, size, embeddings, total)


def unit_bytes(units: Mapping[str, list[Part]]) -> dict[str, int]:
    """Return the bytes of each unit in memory, with aligned tensors."""
    return {name: sum(aligned(part.place.nbytes) for part in parts) for name, parts in units.items()}


def _skeleton(folder: Path, file: WeightFile, device: str) -> nn.Module:
    """Return the model built with empty parameters, in the stored shapes and the dtype in which most are stored."""
    configuration = tying.settle(AutoConfig.from_pretrained(folder), folder)
    with init_empty_weights(include_buffers=False):
        built = architecture.auto_class(configuration).from_config(configuration)
    model = architecture.with_generation(built, folder)
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if manifest.get("sparse"):
        raise UserError(f"{folder}: holds sparsely stored matrices, which cannot be streamed; stream the dense model")
    no_op.restore(model, manifest.get("blocks", []))
    factored.restore(model, manifest.get("factors", {}))
    model.tie_weights()
    file.places = _under_first_names(model, _as_named(model, file.places))
    shared: dict[int, nn.Parameter] = {}
    usual = _usual_dtype(file.places.values())
    for module_name, module in model.named_modules():
        for leaf, old in module._parameters.items():
            name = f"{module_name}.{leaf}" if module_name else leaf
            if old is not None and id(old) not in shared:
                place = file.places.get(name)
                nan = torch.full((1,), float("nan"), dtype=usual, device=device)
                shape = old.shape if place is None else place.shape
                shared[id(old)] = nn.Parameter(nan.expand(shape), requires_grad=False)
            if old is not None:
                module._parameters[leaf] = shared[id(old)]
        for leaf, old in module._buffers.items():
            module._buffers[leaf] = None if old is None else old.to(device)
    return (synchronise(model) if manifest else model).eval()


def _as_named(model: Any, places: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    """Return the places by the tensors' names in the model, renamed as transformers does while loading."""
    known = model.state_dict()
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    renamed = {
        rename_source_key(name, renamings, [], model.base_model_prefix, known)[0]: place
        for name, place in places.items()
        if name not in known
    }
    return renamed | {name: place for name, place in places.items() if name in known}


def _under_first_names(model: nn.Module, places: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    """Return the places, with tied tensors also under the name by which the model lists them, since files may store
    either the embeddings or the head.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    stored = {first: next((other for other in others if other in places), first) for first, *others in names.values()}
    return {**places, **{name: places[at] for name, at in stored.items() if name not in places and at in places}}


def _usual_dtype(places: Iterable[TensorPlace]) -> torch.dtype:
    """Return the dtype of most stored elements; in a fine-tuned model, norms or embeddings may have another dtype."""
    counts: Counter[torch.dtype] = Counter()
    for place in places:
        counts[place.dtype] += math.prod(place.shape) if place.dtype.is_floating_point else 0
    return counts.most_common(1)[0][0]


def _experts(
    view: Anatomy, names: Mapping[int, str], file: WeightFile
) -> dict[int, Callable[[int], list[TensorPlace]]]:
    """Return for each block with routed experts a function from an expert's index to its places, stacked or not."""
    by_block: dict[int, Callable[[int], list[TensorPlace]]] = {}
    for block in view.blocks:
        experts = block.feed_forward.experts
        if experts is None or isinstance(experts.module, factored.FactoredExperts):
            continue
        stacked = names[id(experts.gate_up)], names[id(experts.down)]
        if all(name in file.places for name in stacked):
            gate_up, down = (file.places[name] for name in stacked)
            by_block[block.index] = functools.partial(_stacked_expert, gate_up, down)
        else:
            by_block[block.index] = functools.partial(_single_expert, file, stacked[0].rpartition(".")[0])
    return by_block


def _stacked_expert(gate_up: TensorPlace, down: TensorPlace, expert: int) -> list[TensorPlace]:
    return [gate_up.element(expert), down.element(expert)]


def _single_expert(file: WeightFile, prefix: str, expert: int) -> list[TensorPlace]:
    of_expert = [[f"{prefix}.{expert}.{leaf}.weight" for leaf in leaves] for leaves in SINGLE]
    names = next((names for names in of_expert if names[0] in file.places), of_expert[0])
    return [_place(file, name) for name in names]


def _place(file: WeightFile, name: str) -> TensorPlace:
    if name not in file.places:
        raise UserError(f"{file.folder}: the checkpoint lacks {name}")
    return file.places[name]


def _units(
    view: Anatomy, names: Mapping[int, str], file: WeightFile, experts: expert_cache.Places, head: TensorPlace
) -> dict[str, list[Part]]:
    """Return the parts of every unit in order of use: blocks of the vision tower, decoder blocks, rows of the head."""
    units: dict[str, list[Part]] = {}
    for name, module in unit_modules(view).items():
        routed: set[int] = set()
        if name.startswith("block.") and int(name.partition(".")[2]) in experts:
            routed = {id(parameter) for parameter in _experts_of(view, int(name.partition(".")[2])).module.parameters()}
        units[name] = [
            Part(_place(file, names[id(parameter)]), owner, leaf, parameter)
            for owner in module.modules()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None and id(parameter) not in routed
        ]
    largest = max(unit_bytes({n: parts for n, parts in units.items() if n.startswith("block.")}).values())
    rows = max(1, min(HEAD_BYTES, largest) * head.shape[0] // head.nbytes)
    for first in range(0, head.shape[0], rows):
        units[f"head.{first}"] = [Part(head.rows(first, min(first + rows, head.shape[0])), None, "weight", None)]
    return units


def _experts_of(view: Anatomy, block: int) -> Experts:
    experts = view.blocks[block].feed_forward.experts
    assert experts is not None, f"block {block} has no routed experts"
    return experts


def unit_modules(view: Anatomy) -> dict[str, nn.Module]:
    """Return the modules that are units, by name, in order of use.

    First come the parts of the vision tower that have matrices (with each member of its lists as a unit), then the
    decoder blocks.
    """
    modules: dict[str, nn.Module] = {}
    for name, child in view.vision.named_children() if view.vision is not None else ():
        members = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        for at, member in members:
            if any(isinstance(part, nn.Linear) for part in member.modules()):
                modules[f"vision.{name}.{at}".rstrip(".")] = member
    return modules | {f"block.{block.index}": block.module for block in view.blocks}


def _fixed(
    model: nn.Module,
    view: Anatomy,
    units: Mapping[str, list[Part]],
    experts: expert_cache.Places,
    file: WeightFile,
) -> dict[str, int]:
    """Return name → bytes of all tensors that always stay in memory: norms, small parts of a vision tower, buffers."""
    elsewhere = {id(part.empty) for parts in units.values() for part in parts}
    elsewhere |= {id(parameter) for index in experts for parameter in _experts_of(view, index).module.parameters()}
    elsewhere |= {id(view.embeddings.weight), id(view.head.weight)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) not in elsewhere]
    stored = {name: _place(file, name) for name in names}
    stored |= {name: file.places[name] for name, _ in model.named_buffers() if name in file.places}
    return {name: aligned(place.nbytes) for name, place in stored.items()}
