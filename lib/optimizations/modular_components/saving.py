"""Apply an optimization or a stack of them, save the model as a checkpoint folder, load it again and compare.

The project's own loader always reads it back, plain transformers if it can. A model that does not fit into memory is
written, read again and compared block by block. As a program (`python -m
lib.optimizations.modular_components.saving`) it reads a JSON request from standard input and answers with the fields of
`SavedModel`, `steps` (stems), `chosen_for` ([model, scale] of a stack's recipe, else null), `effort` (at which the
recipe was chosen; empty if not stated) and `unfit` (why that recipe must not be used with these weights, else null), or
with {"refused": why}.
"""

import gc
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from lib.errors import UserError
from lib.files import seen_from_here
from lib.measure.metrics import settings
from lib.models import loading
from lib.models.checkpoints import io, placement
from lib.models.checkpoints.folder import MANIFEST
from lib.models.loading import Loaded
from lib.models.structure.architecture import auto_class
from lib.models.structure.signature import signature
from lib.models.tasks import tasks
from lib.optimizations.common import absorbed_baseline, discovery, recipe
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import larger_than_memory
from lib.optimizations.modular_components import method as composing

WINDOWS, TOKENS = 2, 64  # of the text on which the saved model is compared
# Relative difference of logits explained by another order of summation, by dtype of the weights.
NEAR = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
COPIES = 3  # at once: the model, the optimized one, and the saved one loaded again
HELD = {"shapes", "weights", "storage"}  # the aspects of a model that a checkpoint can hold


class SavedModel(NamedTuple):
    """A saved model. `loads`: the class with which plain transformers reads it (None: only our loader does).

    `tokenizer`: whether it has one. `dtype` and `weights_hash` describe its weights. `by_blocks`: it was never whole in
    memory and has no hash. `latent`: it has latent attention, which is measured with absorbed decoding. `before`: the
    hash of the weights to which a stack was applied. `remark`: how it differs from the model made in memory, if so.
    """

    loads: str | None
    tokenizer: bool
    dtype: str
    weights_hash: str | None
    by_blocks: bool = False
    latent: bool = False
    before: str | None = None
    remark: str = ""


def save(
    model: str,
    optimization: str,
    stack: Sequence[RecipeStep] | None,
    parameters: Mapping[str, Any],
    place: Path,
    unfinished: Path | None = None,
    *,
    chosen_at: str = "",
) -> SavedModel:
    """Apply `optimization`, or instead the steps of `stack`, to `model` and save the result in the folder `place`.

    `parameters` are those of a run: scale, effort, device and so on. Without a stack the result is the model that
    such a run measures. `chosen_at`: the effort at which the stack was chosen; its calibration text, on which the
    stack was judged, is used here too (`calibration_text.of_stack`). `unfinished`: the folder in which a model that
    does not fit into memory COPIES times is written block by block. Raises UserError if no weights change, a step is
    refused, or a checkpoint cannot hold the model.
    """
    stems = [optimization] if stack is None else [step.optimization for step in stack]
    if not stems:
        raise UserError("the stack has no step, so there is nothing to save")
    parts = {stem: _part(stem, model, parameters["scale"]) for stem in stems}
    for stem, part in parts.items():
        if not HELD & set(part.COMPOSES["touches"]):
            advice = "" if stack is None else "; leave it out of the stack"
            raise UserError(f"{stem}: changes how a model computes, which no checkpoint holds{advice}")
    loaded = loading.load(
        model,
        parameters["scale"],
        device=parameters["device"],
        checkpoints=parameters["checkpoints"] or None,
        random_weights=parameters["random_weights"],
        seed=int(parameters.get("seed", 0)),
        copies=COPIES if stack is None and larger_than_memory.is_able(optimization, parameters) else 1,
    )
    latent = absorbed_baseline.has_latents(loaded.model)
    if larger_than_memory.is_streamed(loaded):
        if stack is not None:
            raise UserError(f"{model}: does not fit into memory; give one optimization that works from file to file")
        remark = larger_than_memory.remark(optimization, parameters)
        write = larger_than_memory.writer(loaded, optimization, parameters)
        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        del loaded
        gc.collect()  # models hold reference cycles
        write(place, shards=unfinished)
        return SavedModel(None, True, dtype, None, by_blocks=True, latent=latent, remark=remark)
    placement.require_room(loaded.model, 1, f"{model}: saving an optimized copy")
    optimized = (
        _alone(loaded, optimization, parameters) if stack is None else _composed(loaded, stack, parameters, chosen_at)
    )
    weights_hash = io.weights_hash(optimized)
    if signature(optimized) == signature(loaded.model) and weights_hash == io.weights_hash(loaded.model):
        raise UserError(
            f"{', '.join(stems)}: changes no weights of {model} with these parameters, so there is nothing to save"
        )
    try:
        io.save(optimized, place, tokenizer=loaded.tokenizer, image_processor=loaded.image_processor)
    except OSError as error:
        raise UserError(f"{error.filename or place}: cannot be written ({error.strerror or error})") from None
    dtype = str(loaded.dtype).removeprefix("torch.")
    plain = _check(optimized, place, loaded)
    before = None if stack is None else io.weights_hash(loaded.model)
    return SavedModel(plain, loaded.tokenizer is not None, dtype, weights_hash, latent=latent, before=before)


def _part(stem: str, model: str, scale: str) -> ModuleType:
    """Return the module of an optimization that can be applied by itself.

    Raises UserError for an optimization that only chooses among others, or changes a server.
    """
    parts = composing.parts()
    if stem not in parts:
        raise UserError(
            f"{stem}: makes no checkpoint by itself, as it changes a server or is applied through others "
            f"({', '.join(parts)}); give one of them, or the stack that a search "
            f"wrote: --stack {seen_from_here(recipe.path_of(model, scale))}"
        )
    return parts[stem]


def _composed(loaded: Loaded, steps: Sequence[RecipeStep], parameters: Mapping[str, Any], chosen_at: str) -> nn.Module:
    steps, seed = composing.kept_order(steps, loaded.model), int(parameters.get("seed", 0))
    size = settings.read(parameters["effort"], loaded.scale)
    text = calibration_text.of_stack(loaded, size, seed, chosen_at=chosen_at)
    return composing.compose(loaded.model, text, steps, arrange=False, seed=seed).model


def _alone(loaded: Loaded, stem: str, parameters: Mapping[str, Any]) -> nn.Module:
    """Return the model that a run of one optimization measures, built by its protocol's `optimize` if it has one."""
    module = composing.module_of(stem)
    if reason := module.applies_to(loaded.model):
        raise UserError(f"{stem}: {reason}")
    size = settings.read(parameters["effort"], loaded.scale)
    optimize = getattr(discovery.beside_method(stem, "experiment"), "optimize", None)
    if optimize is not None:
        return optimize(loaded, size, **_accepted(optimize, parameters))
    text = calibration_text.batches(loaded, size, int(parameters.get("seed", 0)))
    return module.apply(loaded.model, text, **_accepted(module.apply, parameters))


def _accepted(function: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a run that `function` takes as keyword-only arguments."""
    knobs = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {name: value for name, value in parameters.items() if name in knobs}


@torch.inference_mode()
def _check(optimized: nn.Module, place: Path, loaded: Loaded) -> str | None:
    """Return the class with which plain transformers reads the folder as the same model, or None.

    Raises UserError if our own loader does not read it as the same model.
    """
    dtype = next(parameter.dtype for parameter in optimized.parameters() if parameter.is_floating_point())
    again = io.load_folder(place, dtype=dtype, device=loaded.device)
    if signature(again) != signature(optimized):
        raise UserError("a checkpoint cannot hold the optimized model (hooks, another attention or cache)")
    if loaded.tokenizer is None:
        config: Any = optimized.config
        ids_BT = torch.randint(0, config.get_text_config().vocab_size, (WINDOWS, TOKENS))
    else:
        ids_BT = tasks.text_windows(loaded, "final", WINDOWS, TOKENS, 0)
    expected = _logits(optimized, ids_BT)
    if not _near(_logits(again, ids_BT), expected, NEAR[torch.float32]):
        raise UserError("the saved model gives different answers when it is loaded again; nothing was kept")
    del again
    return _plain(place, dtype, ids_BT, expected)


def _plain(place: Path, dtype: torch.dtype, ids_BT: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Return the class with which transformers alone loads the folder, without missing or unexpected tensors and with
    equal logits; None if there is none.
    """
    described = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    if {"factors", "sparse"} & set(described):
        return None  # transformers has no such matrices
    loud = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a mismatch is an expected result here
    try:
        kind = auto_class(AutoConfig.from_pretrained(place))
        model, report = kind.from_pretrained(place, dtype=dtype, output_loading_info=True)
        if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
            return None
        return kind.__name__ if _near(_logits(model.eval(), ids_BT), expected, NEAR[dtype]) else None
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError, TypeError):
        return None  # an architecture unknown to transformers, such as uneven blocks
    finally:
        transformers_logging.set_verbosity(loud)


def _logits(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


def _near(logits: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    return bool((logits - expected).abs().max() <= share * expected.abs().max())


def main() -> None:
    """Answer one request: model, optimization, stack (a recipe's path, or null), parameters, place, unfinished."""
    request = json.load(sys.stdin)
    try:
        chosen = recipe.read(request["stack"]) if request["stack"] else None
        steps = chosen.stack if chosen else None
        place, unfinished = Path(request["place"]), Path(request["unfinished"])
        arguments = request["model"], request["optimization"], steps, request["parameters"], place, unfinished
        saved = save(*arguments, chosen_at=chosen.effort if chosen else "")
        answer: dict[str, Any] = {
            **saved._asdict(),
            "steps": [step.optimization for step in steps or [RecipeStep(optimization=request["optimization"])]],
            "chosen_for": [chosen.model, chosen.scale] if chosen else None,
            "effort": chosen.effort if chosen else "",
            "unfit": recipe.unfit(chosen, saved.before or "") if chosen else None,
        }
    except UserError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
